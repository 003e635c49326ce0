"""The norms in the state of a `MultiSteps`: `()` if they are off."""

from typing import Any

import jax.numpy as jnp

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
    micro_batch, pending = config.sync.local((zero, jnp.zeros(2, zero.dtype)))
    return GradientNorms(zero, micro_batch, Weighted(zero, zero), jnp.zeros((), jnp.int32), pending)


def added(config: Config, old: Any, grads: Tree, weight: Any, counted: Any, *, weighted: bool) -> Any:
    """`old` with a micro-batch's norm; the arguments are as for `norms.of_micro_batch`."""
    if config.gradient_norms != "all":
        return old
    norm, sums = norms.of_micro_batch(grads, weight, counted, weighted=weighted, shape=config.sync.shape)
    return old._replace(micro_batch=norm, pending=old.pending + sums)


def of_last_window(new: Any) -> Any:
    """The part that changes at an optimizer step only."""
    return new._replace(micro_batch=None, pending=None) if new else ()


def at_step(config: Config, new: Any, mean: Tree, weight: Any, reduced: Tree) -> Any:
    """`of_last_window` at an optimizer step on `mean`; `weight` is the window's Σ w, `reduced` is as for `joined`."""
    if config.gradient_norms is None:
        return ()
    window = config.sync.norm(mean, reduced)
    if config.gradient_norms == "window":
        return GradientNorms(window)
    square, count = config.sync.joined(new.pending)
    return GradientNorms(window, squares=Weighted(square, weight), count=count.astype(jnp.int32))


def reopened(config: Config, last_window: Any, new: Any, closes: Any) -> Any:
    """`new` after a micro-step, with `last_window`; nothing is pending if `closes`."""
    if config.gradient_norms != "all":
        return last_window
    pending = weighted_sum.select(closes, jnp.zeros_like(new.pending), new.pending)
    micro_batch, pending = config.sync.own((new.micro_batch, pending))
    return last_window._replace(micro_batch=micro_batch, pending=pending)
