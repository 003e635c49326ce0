"""The optimizer of a window: the task's, with what the Trainer puts before it."""

import jax
import optax


def of_window(
    optimizer: optax.GradientTransformation, gradient_clip_val: float | None, divide_by_k: bool
) -> optax.GradientTransformation:
    """Clipping and scaling, where asked for, and then `optimizer`: all of it once a window.

    Args:
      optimizer: the task's.
      gradient_clip_val: the largest global norm of a window's gradient, or None.
      divide_by_k: whether the gradient is first multiplied by the extra arg `share`.
    """
    parts: list[optax.GradientTransformation] = [_scale_by_share()] * divide_by_k
    if gradient_clip_val is not None:
        parts.append(optax.clip_by_global_norm(gradient_clip_val))
    return optax.chain(*parts, optimizer) if parts else optimizer


def _scale_by_share() -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra_args):
        del params
        share = extra_args["share"]
        return jax.tree.map(lambda x: (x * share).astype(x.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
