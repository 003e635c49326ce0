"""The optimizer of a window: the task's optimizer after the Trainer's scaling and clipping."""

import jax
import optax


def of_window(
    optimizer: optax.GradientTransformation, gradient_clip_val: float | None, algorithm: str, divide_by_k: bool
) -> optax.GradientTransformation:
    """Chains, if requested, scaling by the extra arg `share` and then clipping with `optimizer`.

    `algorithm` is "norm", to a global norm, or "value", of each entry.
    """
    parts: list[optax.GradientTransformation] = [_scale_by_share()] * divide_by_k
    if gradient_clip_val is not None:
        clip = optax.clip if algorithm == "value" else optax.clip_by_global_norm
        parts.append(clip(gradient_clip_val))
    return optax.chain(*parts, optimizer) if parts else optimizer


def _scale_by_share() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra_args):
        del params
        share = extra_args["share"]
        return jax.tree.map(lambda x: (x * share).astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
