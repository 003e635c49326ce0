"""The norms in the state of a `MultiSteps`: `()` if they are off."""

from typing import Any

import jax.numpy as jnp

from jaxaccum._multi_steps import conditions
from jaxaccum._multi_steps.config import Config
from jaxaccum._sums import norms, weighted_sum
from jaxaccum._sums.norms import GradientNorms
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


def zeros(config: Config) -> Any:
    """The norms before the first micro-step."""
    if config.gradient_norms is None:
        return ()
    zero = jnp.zeros((), weighted_sum.weight_dtype())
    if config.gradient_norms == "window":
        return GradientNorms(zero)
    squares, count = Weighted(zero, zero), jnp.zeros((), jnp.int32)
    if config.gradient_norms == "noise":
        return GradientNorms(zero, None, squares, count, config.sync.local(jnp.zeros(3, zero.dtype)), squares)
    micro_batch, pending = config.sync.local((zero, jnp.zeros(2, zero.dtype)))
    return GradientNorms(zero, micro_batch, squares, count, pending)


def added(config: Config, old: Any, grads: Tree, weight: Any, counted: Any, *, weighted: bool) -> Any:
    """`old` with a micro-batch's norm; the arguments are as for `norms.of_micro_batch`."""
    if config.gradient_norms != "all":
        return old
    norm, sums = norms.of_micro_batch(grads, weight, counted, weighted=weighted, shape=config.sync.shape)
    return old._replace(micro_batch=norm, pending=old.pending + sums)


def measures_starts(config: Config) -> bool:
    """Whether the norm of the sums is taken after the first micro-step of a window."""
    return config.gradient_norms == "noise" and config.sync.size() == 1


def started(config: Config, old: Any, sums: Weighted, starts: Any) -> Any:
    """`old` with the norm of the `sums` after a micro-step, if it `starts` a window and this is measured."""
    if not measures_starts(config):
        return old
    part = conditions.branch(starts, lambda: norms.of_part(sums, config.sync.shape), lambda: old.pending)
    return old._replace(pending=part)


def of_last_window(new: Any) -> Any:
    """The part that changes at an optimizer step only."""
    return new._replace(micro_batch=None, pending=None) if new else ()


def at_step(config: Config, window: Any, local: Weighted, joined: Weighted, mean: Tree, reduced: Tree) -> Any:
    """`of_last_window` at an optimizer step.

    Args:
      config: the configuration.
      window: the window, whose sums are of the gradients with respect to what `prepare` returns.
      local: the local sums of the gradients with respect to the parameters.
      joined: those of all devices.
      mean: the window's gradient, as the optimizer receives it.
      reduced: as for `joined`, the method.
    """
    sync, kind = config.sync, config.gradient_norms
    if kind is None:
        return ()
    if kind == "noise":
        # Not of `mean`: XLA would write it out for two uses.
        norm = sync.norm(joined.total, reduced)
        divisor = joined.weight if config.use_grad_mean else sync.size()
        if measures_starts(config):
            parts = window.norms.pending, norms.of_part(window.sums, sync.shape)
            return norms.of_two_sizes(norm / divisor, *sync.joined(parts))
        norms.refuse_reduced(reduced)
        part = sync.joined(norms.of_part(local, sync.shape))
        return norms.of_two_sizes(norm / divisor, part, (norm**2 / joined.weight, joined.weight))
    norm = sync.norm(mean, reduced)
    if kind == "window":
        return GradientNorms(norm)
    square, count = sync.joined(window.norms.pending)
    return GradientNorms(norm, squares=Weighted(square, joined.weight), count=count.astype(jnp.int32))


def reopened(config: Config, last_window: Any, new: Any, closes: Any) -> Any:
    """`new` after a micro-step, with `last_window`; nothing is pending if `closes`."""
    if config.gradient_norms not in ("all", "noise"):
        return last_window
    pending = weighted_sum.select(closes, jnp.zeros_like(new.pending), new.pending)
    micro_batch, pending = config.sync.own((new.micro_batch, pending))
    return last_window._replace(micro_batch=micro_batch, pending=pending)
