"""One micro-step of `MultiSteps`: adds a micro-batch to its window and, at a boundary, closes the window."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import placement
from jaxaccum._multi_steps import averaged_args, checks, closing, conditions, norms
from jaxaccum._multi_steps.closing import Call, Window
from jaxaccum._multi_steps.config import Config
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import overwrites, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class MicroBatch(NamedTuple):
    """What a micro-batch adds to its window."""

    grads: Tree  # Its mean gradient g, or w·g if `weighted`. A leaf may be `Added`.
    weight: Any  # w, a scalar; None is 1.
    weighted: bool = False
    like: Tree = None  # A tree with the gradients' dtypes without accumulation; None is `grads`.
    counts: bool = False  # Whether the weight is known to be positive.


class Boundary(NamedTuple):
    """What decides whether a micro-step is the last one of its window."""

    # None lets the state's counter decide; a Python bool is static, a traced bool decides on the device.
    is_last: Any
    # Whether the sums are 0 when a window starts and must be cleared when it closes; needs a Python bool as `is_last`.
    clears: bool = False
    # Whether the micro-step starts a window: a Python bool, or None to let the state's counter decide.
    starts: bool | None = None

    def reached(self, config: Config, state: MultiStepsState) -> Any:
        """Whether the next micro-step is the last one: a Python bool if it is known during tracing."""
        if self.is_last is not None:
            return checks.boundary(self.is_last, config.sync)
        every_k = checks.scheduled_k(config.every_k(state.gradient_step)) if callable(config.every_k) else state.every_k
        return conditions.known(state.mini_step + 1 >= every_k)


def add(
    config: Config, state: MultiStepsState, micro_batch: MicroBatch, boundary: Boundary, call: Call
) -> tuple[Tree, MultiStepsState, Any]:
    """Adds one micro-batch and, at a boundary, runs the inner optimizer.

    Returns (the result that `call` wants, new state, whether the micro-batch counts: it has a weight, and is neither
    skipped nor dropped).
    """
    weight, grads = micro_batch.weight, weighted_sum.bare(micro_batch.grads)
    averaged = averaged_args.given(config, call.extra_args)
    checks.on_device(state.acc_grads)
    checks.gradients(grads, state.acc_grads, config.sync)
    placement.local_gradients(grads, config.sync)
    averaged_args.check(config, averaged)
    reached = boundary.reached(config, state)
    accepted, skip_state = _accepted(config, state, grads, call.params)
    closes = conditions.both(reached, accepted)
    keep, dropped = _kept(config, state, micro_batch, (grads, averaged))
    counted = conditions.both(accepted, True if keep is None else keep)
    of_grads = norms.added(config, state.norms, grads, weight, counted, weighted=micro_batch.weighted)

    first = None if boundary.clears else state.mini_step == 0
    counters = (state.gradient_step, state.mini_step, config.sync.index())
    acc_grads = weighted_sum.add(
        state.acc_grads,
        micro_batch.grads,
        None if micro_batch.weighted else weight,
        keep=keep,
        first=first,
        counters=counters,
    )
    one = jnp.ones_like(state.weight)
    total_weight = weighted_sum.add(state.weight, one, weight, keep=keep, first=first)
    sums = Weighted(acc_grads, total_weight)
    starts = conditions.known(state.mini_step == 0) if boundary.starts is None else boundary.starts
    of_grads = norms.started(config, of_grads, sums, starts)
    values = {name: Weighted(value, one) for name, value in averaged.items()}
    passed = weighted_sum.add({name: state.averages[name] for name in values}, values, weight, keep=keep)

    window = Window(
        sums=sums,
        averages=passed,
        norms=of_grads,
        count=state.mini_step + 1,
        may_be_empty=keep is not None,  # A window can be empty only if its last micro-batch can be excluded.
        like=config.sync.one(grads) if micro_batch.like is None else micro_batch.like,
    )
    result, new, applied = closing.close(config, state, window, call, closes)

    averages = state.averages | passed
    mini_step, averages = weighted_sum.select(
        closes, jax.tree.map(jnp.zeros_like, (state.mini_step, averages)), (state.mini_step + 1, averages)
    )
    if boundary.clears and closes:
        acc_grads, total_weight = weighted_sum.cleared((acc_grads, total_weight))
    elif applied is True:
        acc_grads = state.acc_grads  # The sums are invalid after a boundary, so the write can be skipped.
    mini_step, acc_grads, total_weight, averages, dropped = weighted_sum.select(
        accepted,
        (mini_step, acc_grads, total_weight, averages, dropped),
        (state.mini_step, state.acc_grads, state.weight, state.averages, state.dropped),
    )
    new = new._replace(
        mini_step=mini_step,
        acc_grads=acc_grads,
        skip_state=skip_state,
        weight=total_weight,
        averages=config.sync.own(averages),
        dropped=dropped,
        norms=norms.reopened(config, new.norms, of_grads, closes),
    )
    return result, new, counted


def _accepted(config, state, grads, params):
    """(whether the micro-batch is counted, skip_state)."""
    if config.should_skip_update_fn is None:
        return True, state.skip_state
    grads, params = overwrites.optimized(grads), overwrites.optimized(params)
    skip, skip_state = config.should_skip_update_fn(grads, state.gradient_step, params)
    return conditions.known(jnp.logical_not(checks.skip(skip))), skip_state


def _kept(config, state, micro_batch, added):
    """(whether the micro-batch is added to the sums or None if it always is, `dropped`)."""
    keep, dropped, weight = None, state.dropped, micro_batch.weight
    if weight is not None:
        traced_loss.check_weight(weight, config.sync.shape)
        keep = None if micro_batch.counts else traced_loss.keep(weight)
    if config.nonfinite == "drop":
        finite = weighted_sum.all_finite(added, config.sync.shape)
        bad = jnp.logical_not(finite) if keep is None else jnp.logical_and(keep, jnp.logical_not(finite))
        dropped = dropped + bad.astype(dropped.dtype)
        keep = finite if keep is None else jnp.logical_and(keep, finite)
    return keep, dropped
