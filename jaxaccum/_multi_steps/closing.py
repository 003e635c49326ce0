"""The end of a window: the reduction over devices, the mean, and the optimizer step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxaccum._devices.topology import MeshAxis
from jaxaccum._gradient import once_per_window
from jaxaccum._multi_steps import averaged_args, checks, conditions, inner_update, norms
from jaxaccum._multi_steps.config import Config
from jaxaccum._multi_steps.inner_update import InnerOptimizer
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class Window(NamedTuple):
    """The pending sums."""

    sums: Weighted  # Of the gradients.
    averages: dict[str, Weighted]  # Of the averaged extra args.
    norms: Any  # As in the state, with the last micro-batch's.
    count: Any  # The number of micro-steps.
    may_be_empty: bool  # Whether the total weight may be 0.
    like: Tree  # A tree with the gradients' dtypes without accumulation.


class Call(NamedTuple):
    """What the caller of a driver passes for the optimizer step, and which result it wants."""

    params: Tree | None  # None if neither the inner optimizer nor the result needs them.
    extra_args: dict[str, Any]  # For the inner optimizer; the averaged ones are this micro-batch's values.
    applies: bool  # Whether the result is the new parameters, or the updates: zeros without an optimizer step.

    def result(self, updates: Tree) -> Tree:
        """The result for the updates of an optimizer step."""
        if self.applies:
            return inner_update.apply_updates(self.params, updates)
        return inner_update.differences(updates, self.params)


def close(
    config: Config, state: MultiStepsState, window: Window, call: Call, closes: Any
) -> tuple[Tree, MultiStepsState, Any]:
    """Runs the optimizer step if `closes`, leaving the window's sums and counters: (result, state, whether it ran)."""
    sync = config.sync
    # If each device has its own copy of the state, jax treats results as varying, even though the copies are equal.
    held = jax.tree.leaves((state.mini_step, state.inner_opt_state, call.params))
    same = sync.local if any(map(sync.varies, held)) else lambda tree: tree

    def branch(pred, step, stay):
        def close():
            result, inner, *rest = step()
            # On explicit axes both branches of a conditional must lay out the state alike.
            inner = inner if isinstance(pred, bool) else sync.like(inner, state.inner_opt_state)
            return same((result, inner, *rest))

        return conditions.branch(pred, close, lambda: same(stay()))

    def reduce():
        carried, reduced = _carried_back(config, call.params, window)
        total = sync.joined(carried, reduced)
        weight, averages = sync.joined((window.sums.weight, window.averages))
        means = {name: averaged_args.mean(sums, call.extra_args[name]) for name, sums in averages.items()}

        def step():
            divisor = weight if config.use_grad_mean else jnp.full_like(weight, sync.size())
            mean = weighted_sum.mean(Weighted(total, divisor), window.like)
            local, joined = Weighted(carried, window.sums.weight), Weighted(total, weight)
            of_window = norms.at_step(config, window, local, joined, mean, reduced)
            args = call._replace(extra_args=call.extra_args | means), mean, window.like
            return *_optimizer_step(config, state, *args), of_window

        if not window.may_be_empty:
            return *step(), None
        filled = conditions.known(weight != 0)
        return *branch(filled, step, unchanged), filled

    def unchanged():
        # Under ZeRO a state from a checkpoint, or of other devices, isn't laid out as a step leaves it.
        inner = sync.spread(state.inner_opt_state)
        result = _result_without_step(config, state, call, window.like)
        return result, inner, state.prepared, norms.of_last_window(state.norms)

    none_made = jnp.asarray(False) if window.may_be_empty else None
    result, inner, prepared, of_window, filled = branch(closes, reduce, lambda: (*unchanged(), none_made))
    applied = closes if filled is None else filled
    state = state._replace(
        gradient_step=weighted_sum.select(applied, optax.safe_increment(state.gradient_step), state.gradient_step),
        inner_opt_state=inner,
        updated=jnp.asarray(applied),
        prepared=prepared,
        norms=of_window,
    )
    return result, state, applied


def flush(
    config: Config, state: MultiStepsState, params: Tree | None, extra_args: dict[str, Any]
) -> tuple[Tree, MultiStepsState]:
    """Closes a partial window; does nothing if the window is empty."""
    if params is None and config.prepare is not None:
        raise TypeError("flush needs params here: with prepare= the sums are carried back to them. Pass params.")
    checks.on_device(state.acc_grads)
    # Any values of the averaged ones will do: they show only which means to pass, and their dtypes.
    stand_ins = {name: shapes.tree for name, shapes in config.averaged_shapes}
    extra_args = dict.fromkeys((*state.averages, "grad"), jnp.nan) | stand_ins | extra_args
    window = Window(
        sums=Weighted(state.acc_grads, state.weight),
        averages=state.averages,
        norms=state.norms,
        count=state.mini_step,
        may_be_empty=True,
        like=inner_update.like_gradients(params if params is not None else config.sync.one(state.acc_grads)),
    )
    pending = conditions.known(state.mini_step > 0)
    updates, state, _ = close(config, state, window, Call(params, extra_args, applies=False), pending)
    return updates, state._replace(
        mini_step=jnp.zeros_like(state.mini_step),
        averages=config.sync.own(jax.tree.map(jnp.zeros_like, state.averages)),
        norms=norms.reopened(config, state.norms, window.norms, True),
    )


def _optimizer_step(config, state, call, mean, like):
    """(result, inner state, prepared parameters) of the optimizer step on `mean`."""
    params = call.params
    mean, aligned = config.sync.aligned(mean, params)
    call = call._replace(params=aligned)
    inner_optimizer = InnerOptimizer(config.tolerant_inner_opt, state.inner_opt_state, call.params, call.extra_args)
    wide = jnp.float32 if config.accumulator_dtype is None else config.accumulator_dtype
    updates, inner = inner_optimizer.update(mean, like, wide)
    prepared = ()
    if config.prepare is not None:
        new_params = config.sync.whole(inner_update.apply_updates(call.params, updates), params)
        _, prepared = once_per_window.compute(config.prepare, new_params)
    return config.sync.whole(call.result(updates), params), config.sync.spread(inner), prepared


def _result_without_step(config, state, call, like):
    """The parameters, or zero updates of the types that an optimizer step returns."""
    if call.applies:
        return config.sync.unchanged(call.params)
    extra_args = call.extra_args | averaged_args.zero_means(config, call.extra_args)
    inner_optimizer = InnerOptimizer(config.tolerant_inner_opt, state.inner_opt_state, call.params, extra_args)
    return inner_optimizer.zero_updates(like)


def _carried_back(config, params, window):
    """Applies the transpose of `prepare` to the local sums: (the sums, the axes over which each is now reduced)."""
    if config.prepare is None:
        return window.sums.total, None
    # Inside a mapped axis, the parameters must vary over it, like the sums.
    own = config.sync.unsplit(params) if isinstance(config.sync, MeshAxis) else config.sync.local(params)
    once_per_window.check_linear(config.prepare, own)
    _, transpose = once_per_window.with_transpose(config.prepare, own)
    carried = config.sync.each(lambda sums: transpose(sums, window.count), window.sums.total)
    return carried, once_per_window.gathered_axes(config.prepare, own, config.sync.names)
