"""The optimizer of a window: the task's optimizer after the Trainer's scaling and clipping."""

import jax
import optax


def of_window(
    optimizer: optax.GradientTransformation, gradient_clip_val: float | None, divide_by_k: bool
) -> optax.GradientTransformation:
    """Chains scaling and clipping, if requested, with `optimizer`. All of it runs once per window.

    Args:
      optimizer: the task's optimizer.
      gradient_clip_val: the maximum global norm of a window's gradient, or None.
      divide_by_k: whether to first multiply the gradient by the extra arg `share`.
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
