"""The optimizer of a window: the task's optimizer after the Trainer's scaling and clipping."""

import jax
import optax


def of_window(
    optimizer: optax.GradientTransformation,
    gradient_clip_val: float | None,
    algorithm: str,
    divide_by_k: bool,
    follows_k: bool,
) -> optax.GradientTransformation:
    """Chains, if requested, scaling by the extra arg `share`, clipping, `optimizer` and `learning_rate_factor`.

    `algorithm` is "norm", to a global norm, or "value", of each entry. The updates of an optimizer are proportional to
    its learning rate, so that `learning_rate_factor`, an extra arg too, multiplies them.
    """
    parts: list[optax.GradientTransformation] = [_scale_by("share")] * divide_by_k
    if gradient_clip_val is not None:
        clip = optax.clip if algorithm == "value" else optax.clip_by_global_norm
        parts.append(clip(gradient_clip_val))
    parts += [optimizer, *[_scale_by("learning_rate_factor")] * follows_k]
    return optax.chain(*parts) if len(parts) > 1 else optimizer


def _scale_by(name: str) -> optax.GradientTransformationExtraArgs:
    """Multiplies by the extra arg `name`."""

    def update(updates, state, params=None, **extra_args):
        del params
        factor = extra_args[name]
        return jax.tree.map(lambda x: (x * factor).astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
