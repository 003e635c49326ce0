"""One micro-step of `MultiSteps`, as functions of its configuration and state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxaccum._devices import placement
from jaxaccum._devices.topology import MeshAxis, Sync
from jaxaccum._gradient import once_per_window
from jaxaccum._multi_steps import checks, inner_update
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import numeric, overwrites, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class Shapes(NamedTuple):
    """A tree's structure, shapes and dtypes, comparable and hashable."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: Tree) -> "Shapes":
        """From a tree of arrays, numbers or `jax.ShapeDtypeStruct`s."""
        leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda tree: tree, tree))
        return cls(treedef, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))

    @property
    def tree(self) -> Tree:
        """A tree of `jax.ShapeDtypeStruct`s."""
        return self.treedef.unflatten(self.leaves)


class Config(NamedTuple):
    """The configuration of a `MultiSteps`, which documents the fields."""

    opt: optax.GradientTransformation
    every_k: int | Callable[[Any], Any]
    use_grad_mean: bool
    should_skip_update_fn: Callable[..., Any] | None
    accumulator_dtype: Any
    nonfinite: str
    averaged_extra_args: tuple[str, ...]
    sync: Sync
    prepare: Callable[[Tree], Tree] | None
    in_place: bool | None
    averaged_shapes: tuple[tuple[str, Shapes], ...] = ()
    """Of those in `averaged_extra_args` that are no scalars."""

    @property
    def inner(self) -> optax.GradientTransformationExtraArgs:
        """`opt` with support for extra args. Not a field, because it is a new closure each time and breaks equality."""
        return optax.with_extra_args_support(self.opt)

    @property
    def called(self) -> optax.GradientTransformationExtraArgs:
        """`inner`, ignoring averaged extra args and `grad` if it does not take them."""
        return inner_update.without_refused(self.inner, (*self.averaged_extra_args, "grad"))


class Output(NamedTuple):
    """What a call returns beside the state: `close(updates)` at a boundary, `stay()` otherwise."""

    close: Callable[[Tree], Tree]
    stay: Callable[[], Tree]


class _Window(NamedTuple):
    """The pending sums.

    Attributes:
      sums: the gradients' sums.
      averages: the sums of the averaged extra args.
      count: the number of micro-steps.
      may_be_empty: whether the total weight may be 0.
    """

    sums: Weighted
    averages: dict[str, Weighted]
    count: Any
    may_be_empty: bool


class _Selection(NamedTuple):
    """What happens to a micro-batch. Each field is a Python bool if known at trace time, else traced.

    Attributes:
      accepted: whether it counts as a micro-step; False if `should_skip_update_fn` skips it.
      keep: whether it is added to the sums; None if it always is.
      closed: whether it closes the window.
    """

    accepted: Any
    keep: Any
    closed: Any


def init(config: Config, params: Tree) -> MultiStepsState:
    """A state with an empty window. No two leaves of the state and `params` share a buffer."""
    numeric.available("accumulator_dtype", config.accumulator_dtype)
    numeric.arrays(params)
    placement.placed(params, config.sync)
    gradient_step = jnp.zeros((), jnp.int32)
    if callable(config.every_k):
        checks.scheduled_k(config.every_k(gradient_step))
    skip_state = ()
    if config.should_skip_update_fn is not None:
        seen = overwrites.optimized(params)
        _, skip_state = config.should_skip_update_fn(jax.tree.map(jnp.zeros_like, seen), gradient_step, seen)
    local = config.sync.local
    seen, prepared = params, ()
    if config.prepare is not None:
        numeric.differentiable(params)
        once_per_window.check(config.prepare, params)
        seen, prepared = once_per_window.made(config.prepare, params)
    state = MultiStepsState(
        mini_step=jnp.zeros((), jnp.int32),
        gradient_step=gradient_step,
        inner_opt_state=_inner_state(config, params),
        acc_grads=local(weighted_sum.init(seen, config.accumulator_dtype)),
        skip_state=skip_state,
        weight=local(_zero()),
        averages=local(_no_averages(config)),
        every_k=None if callable(config.every_k) else jnp.full((), config.every_k, jnp.int32),
        updated=jnp.zeros((), jnp.bool_),
        dropped=local(jnp.zeros((), jnp.int32)),
        prepared=prepared,
    )
    return config.sync.settled(inner_update.unshared(state, params))


def _inner_state(config: Config, params: Tree) -> Tree:
    """The inner optimizer's initial state, in the layout that its updates keep."""
    params = overwrites.optimized(params)
    state = config.opt.init(params)
    checks.inner_state(state)
    if not isinstance(config.sync, MeshAxis):
        return state
    # Under jit, optax's zeros lose the parameters' sharding over Explicit axes.
    return config.sync.spread(inner_update.beside_params(config.sync.like, state, params))


def run(
    config: Config,
    grads: Tree,
    state: MultiStepsState,
    params: Tree | None,
    weight: Any,
    boundary: Any,
    extra_args: dict[str, Any],
    output: Output,
    *,
    like: Tree = None,
    weighted: bool = False,
    clears: bool = False,
) -> tuple[Tree, MultiStepsState]:
    """Adds one micro-batch's gradient and, at a boundary, runs the inner optimizer on the window's mean.

    Args:
      config: the transformation's configuration.
      grads: the micro-batch's mean gradient g, or w·g if `weighted`. A leaf may be `Added`.
      state: the state.
      params: the parameters, if the inner optimizer or the output needs them.
      weight: w, a scalar; None is 1.
      boundary: None, a Python bool or a traced bool.
      extra_args: for the inner optimizer; the averaged ones are this micro-batch's values.
      output: makes the result from the updates.
      like: a tree with the gradients' dtypes without accumulation; None is `grads`.
      weighted: whether `grads` is already multiplied by the weight.
      clears: whether the sums are 0 when a window starts and must be cleared when it closes. If True, `boundary` must
        be a Python bool.

    Returns:
      (the output, the new state).
    """
    shown = weighted_sum.bare(grads)
    checks.gradients(shown, state.acc_grads, config.sync)
    placement.local_gradients(shown, config.sync)
    averaged = {name: extra_args[name] for name in config.averaged_extra_args if extra_args.get(name) is not None}
    shapes = dict(config.averaged_shapes)
    for name, value in averaged.items():
        if name in shapes:
            checks.averaged_tree(name, value, shapes[name].tree, config.sync.shape)
        else:
            checks.averaged(name, value, config.sync.shape)
    (accepted, keep, closed), skip_state, dropped = _select(config, state, shown, params, weight, boundary, averaged)

    first = None if clears else state.mini_step == 0
    counters = (state.gradient_step, state.mini_step, config.sync.index())
    acc_grads = weighted_sum.add(
        state.acc_grads, grads, None if weighted else weight, keep=keep, first=first, counters=counters
    )
    one = jnp.ones_like(state.weight)
    total_weight = weighted_sum.add(state.weight, one, weight, keep=keep, first=first)
    averages = dict(state.averages)
    for name, value in averaged.items():
        add = functools.partial(weighted_sum.add, weight=weight, keep=keep)
        averages[name] = Weighted(add(averages[name].total, value), add(averages[name].weight, one))

    closed = _both(closed, accepted)
    # A window can be empty only if its last micro-batch can be excluded.
    window = _Window(
        Weighted(acc_grads, total_weight), {n: averages[n] for n in averaged}, state.mini_step + 1, keep is not None
    )
    like = config.sync.one(shown) if like is None else like
    result, inner_opt_state, prepared, applied = _emit(config, state, params, like, window, extra_args, output, closed)

    mini_step = weighted_sum.select(closed, jnp.zeros_like(state.mini_step), state.mini_step + 1)
    averages = weighted_sum.select(closed, _zeros_like(averages), averages)
    if clears and closed:
        acc_grads, total_weight = weighted_sum.cleared((acc_grads, total_weight))
    elif applied is True:
        acc_grads = state.acc_grads  # The sums are invalid after a boundary, so the write can be skipped.
    mini_step, total_weight, averages, dropped = weighted_sum.select(
        accepted,
        (mini_step, total_weight, averages, dropped),
        (state.mini_step, state.weight, state.averages, state.dropped),
    )
    return result, MultiStepsState(
        mini_step=mini_step,
        gradient_step=weighted_sum.select(applied, optax.safe_increment(state.gradient_step), state.gradient_step),
        inner_opt_state=inner_opt_state,
        acc_grads=weighted_sum.select(accepted, acc_grads, state.acc_grads),
        skip_state=skip_state,
        weight=total_weight,
        averages=config.sync.own(averages),
        every_k=state.every_k,
        updated=jnp.asarray(applied),
        dropped=dropped,
        prepared=prepared,
    )


def flush(
    config: Config, state: MultiStepsState, params: Tree | None, extra_args: dict[str, Any]
) -> tuple[Tree, MultiStepsState]:
    """Closes a partial window; does nothing if the window is empty."""
    if params is None and config.prepare is not None:
        raise TypeError("flush needs params here: with prepare= the sums are carried back to them. Pass params.")
    grads = inner_update.like_gradients(params if params is not None else config.sync.one(state.acc_grads))
    stand_ins = {name: shapes.tree for name, shapes in config.averaged_shapes}
    extra_args = dict.fromkeys((*state.averages, "grad"), jnp.nan) | stand_ins | extra_args
    window = _Window(Weighted(state.acc_grads, state.weight), state.averages, state.mini_step, may_be_empty=True)
    output = updates_output(config, lambda: grads, state, params, extra_args)
    pending = numeric.known(state.mini_step > 0)
    updates, inner_opt_state, prepared, applied = _emit(
        config, state, params, grads, window, extra_args, output, pending
    )
    return updates, state._replace(
        mini_step=jnp.zeros_like(state.mini_step),
        gradient_step=weighted_sum.select(applied, optax.safe_increment(state.gradient_step), state.gradient_step),
        inner_opt_state=inner_opt_state,
        averages=config.sync.own(_zeros_like(state.averages)),
        updated=jnp.asarray(applied),
        prepared=prepared,
    )


def cleared(state: MultiStepsState, clear: Callable[[Tree], Tree] = weighted_sum.cleared) -> MultiStepsState:
    """`state` with `acc_grads` and `weight` set to 0."""
    acc_grads, weight = clear((state.acc_grads, state.weight))
    return state._replace(acc_grads=acc_grads, weight=weight)


def updates_output(config, like, state, params, extra_args) -> Output:
    """The updates at a boundary, zeros of the same types otherwise, as in optax; `like()` is a tree like gradients."""

    def stay():
        args = like(), state.inner_opt_state, params, extra_args | _like_averages(config, extra_args)
        return inner_update.zeros(inner_update.update_shapes(config.called, *args))

    return Output(lambda updates: inner_update.differences(updates, params), stay)


def apply_output(params: Tree) -> Output:
    """The new parameters at a boundary, the old ones otherwise."""
    return Output(lambda updates: inner_update.apply_updates(params, updates), lambda: params)


def _emit(config, state, params, grads, window, extra_args, output, closed):
    """Runs the optimizer step if `closed`: (output, inner state, prepared parameters, whether a step was made).

    `grads` has the dtypes of the gradients without accumulation.
    """
    # If each device has its own copy of the state, jax treats results as varying, even though the copies are equal.
    held = jax.tree.leaves((state.mini_step, state.inner_opt_state, params))
    same = config.sync.local if any(config.sync.varies(leaf) for leaf in held) else lambda tree: tree
    branch = lambda pred, close, stay: inner_update.branch(pred, lambda: same(close()), lambda: same(stay()))

    def close():
        total, reduced = _carried_back(config, params, window)
        total = config.sync.joined(total, reduced)
        weight, averages = config.sync.joined((window.sums.weight, window.averages))
        means = {name: _average(average, extra_args[name]) for name, average in averages.items()}

        def step():
            divisor = weight if config.use_grad_mean else jnp.full_like(weight, config.sync.size())
            mean = weighted_sum.mean(Weighted(total, divisor), grads)
            wide = jnp.float32 if config.accumulator_dtype is None else config.accumulator_dtype
            args = (mean, grads, state.inner_opt_state, params, extra_args | means, wide)
            updates, inner = inner_update.update(config.called, *args)
            prepared = ()
            if config.prepare is not None:
                new_params = config.sync.whole(inner_update.apply_updates(params, updates))
                _, prepared = once_per_window.made(config.prepare, new_params)
            return config.sync.whole(output.close(updates)), config.sync.spread(inner), prepared

        if not window.may_be_empty:
            return *step(), None
        filled = numeric.known(weight != 0)
        return *branch(filled, step, unchanged), filled

    def unchanged():
        return output.stay(), state.inner_opt_state, state.prepared

    none_made = jnp.asarray(False) if window.may_be_empty else None
    result, inner, prepared, filled = branch(closed, close, lambda: (*unchanged(), none_made))
    return result, inner, prepared, closed if filled is None else filled


def _carried_back(config, params, window):
    """Applies the transpose of `prepare` to the local sums: (the sums, the axes over which each is now reduced)."""
    if config.prepare is None:
        return window.sums.total, None
    # Inside a mapped axis, the parameters must vary over it, like the sums.
    own = params if isinstance(config.sync, MeshAxis) else config.sync.local(params)
    once_per_window.check(config.prepare, own)
    _, transpose = once_per_window.once(config.prepare, own)
    carried = config.sync.each(lambda sums: transpose(sums, window.count), window.sums.total)
    return carried, once_per_window.gathered(config.prepare, own, config.sync.names)


def _select(config, state, grads, params, weight, boundary, averaged):
    """(_Selection, skip_state, dropped) for one micro-batch."""
    if boundary is None:
        every_k = checks.scheduled_k(config.every_k(state.gradient_step)) if callable(config.every_k) else state.every_k
        closed = numeric.known(state.mini_step + 1 >= every_k)
    else:
        closed = checks.boundary(boundary, config.sync)

    accepted, skip_state = True, state.skip_state
    if config.should_skip_update_fn is not None:
        shown, seen = overwrites.optimized(grads), overwrites.optimized(params)
        skip, skip_state = config.should_skip_update_fn(shown, state.gradient_step, seen)
        accepted = numeric.known(jnp.logical_not(checks.skip(skip)))

    keep, dropped = None, state.dropped
    if weight is not None:
        traced_loss.check_weight(weight, config.sync.shape)
        keep = traced_loss.keep(weight)
    if config.nonfinite == "drop":
        finite = weighted_sum.all_finite((grads, averaged), config.sync.shape)
        bad = jnp.logical_not(finite) if keep is None else jnp.logical_and(keep, jnp.logical_not(finite))
        dropped = dropped + bad.astype(dropped.dtype)
        keep = finite if keep is None else jnp.logical_and(keep, finite)
    return _Selection(accepted, keep, closed), skip_state, dropped


def _both(a: Any, b: Any) -> Any:
    """`a and b`, a Python bool if either operand determines it."""
    if isinstance(a, bool):
        return b if a else False
    return a if b is True else (False if b is False else jnp.logical_and(a, b))


def _no_averages(config: Config) -> dict[str, Weighted]:
    """Zero sums for the averaged extra args."""
    sum_dtype = lambda x: weighted_sum.promoted(x.dtype, weighted_sum.weight_dtype())
    zeros = lambda shapes: jax.tree.map(lambda x: jnp.zeros(x.shape, sum_dtype(x)), shapes.tree)
    totals = {name: _zero() for name in config.averaged_extra_args}
    totals |= {name: zeros(shapes) for name, shapes in config.averaged_shapes}
    return {name: Weighted(total, _zero()) for name, total in totals.items()}


def _like_averages(config: Config, extra_args: dict[str, Any]) -> dict[str, Tree]:
    """Zeros like the result of `_average` for each averaged extra arg in `extra_args`."""
    trees = {name: shapes.tree for name, shapes in config.averaged_shapes}

    def zeros(name):
        shapes = trees[name] if name in trees else jax.ShapeDtypeStruct((), jnp.result_type(extra_args[name]))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, _mean_dtype(x)), shapes)

    return {name: zeros(name) for name in config.averaged_extra_args if extra_args.get(name) is not None}


def _average(sums: Weighted, value: Tree) -> Tree:
    """The window's mean of an extra arg, at least as wide as `value`; NaN if the total weight is 0."""
    leaf = lambda mean, x: jnp.where(sums.weight == 0, jnp.nan, mean).astype(_mean_dtype(x))
    return jax.tree.map(leaf, weighted_sum.mean(sums, sums.total), value)


def _mean_dtype(value: Any) -> Any:
    return weighted_sum.promoted(jnp.result_type(value), jnp.float32)


def _zero() -> jax.Array:
    return jnp.zeros((), weighted_sum.weight_dtype())


def _zeros_like(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)
