"""One micro-step of `MultiSteps`, as functions of its configuration and state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxaccum import _accumulator, _checks, _inner
from jaxaccum._accumulator import Weighted
from jaxaccum._state import MultiStepsState

Tree = Any


class Config(NamedTuple):
    """What tells one `MultiSteps` from another; its arguments are documented there."""

    opt: optax.GradientTransformation
    every_k: int | Callable[[Any], Any]
    use_grad_mean: bool
    should_skip_update_fn: Callable[..., Any] | None
    accumulator_dtype: Any
    nonfinite: str
    averaged_extra_args: tuple[str, ...]

    @property
    def inner(self) -> optax.GradientTransformationExtraArgs:
        """`opt`, taking extra args. Made when asked for: a new closure each time, it must not enter comparisons."""
        return optax.with_extra_args_support(self.opt)


class Output(NamedTuple):
    """What a call returns beside the state: made from the updates at a boundary, and without any in between."""

    close: Callable[[Tree], Tree]
    stay: Callable[[], Tree]


class _Selection(NamedTuple):
    """What becomes of a micro-batch; each is a Python bool where that can be known, else traced.

    Attributes:
      accepted: it counts as a micro-step; False where `should_skip_update_fn` says so.
      keep: it enters the sums; None where nothing could leave it out.
      closed: the window ends with it.
    """

    accepted: Any
    keep: Any
    closed: Any


def init(config: Config, params: Tree) -> MultiStepsState:
    """A state with nothing pending; no two leaves of it and of `params` share a buffer."""
    _checks.available(config.accumulator_dtype)
    gradient_step = jnp.zeros((), jnp.int32)
    if callable(config.every_k):
        _checks.scheduled_k(config.every_k(gradient_step))
    skip_state = ()
    if config.should_skip_update_fn is not None:
        _, skip_state = config.should_skip_update_fn(jax.tree.map(jnp.zeros_like, params), gradient_step, params)
    state = MultiStepsState(
        mini_step=jnp.zeros((), jnp.int32),
        gradient_step=gradient_step,
        inner_opt_state=config.opt.init(params),
        acc_grads=_accumulator.init(params, config.accumulator_dtype),
        skip_state=skip_state,
        weight=_zero(),
        averages={name: Weighted(_zero(), _zero()) for name in config.averaged_extra_args},
        every_k=None if callable(config.every_k) else jnp.full((), config.every_k, jnp.int32),
        updated=jnp.zeros((), jnp.bool_),
        dropped=jnp.zeros((), jnp.int32),
    )
    return _inner.unshared(state, params)


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
    weighted: bool = False,
) -> tuple[Tree, MultiStepsState]:
    """Adds one micro-batch's gradient and, at a boundary, hands the window's mean to the inner optimizer.

    Args:
      config: the transformation.
      grads: the micro-batch's mean gradient g; w·g where `weighted`.
      state: its state.
      params: the parameters, where the inner optimizer or the output needs them.
      weight: w, a scalar; None is 1.
      boundary: None, a Python bool or a traced one.
      extra_args: for the inner optimizer; the averaged ones are this micro-batch's.
      output: what to make of the updates.
      weighted: whether `grads` has its weight already.

    Returns:
      (the output, the new state).
    """
    _checks.gradients(grads, state.acc_grads)
    averaged = {name: extra_args[name] for name in config.averaged_extra_args if extra_args.get(name) is not None}
    for name, value in averaged.items():
        _checks.averaged(name, value)
    (accepted, keep, closed), skip_state, dropped = _select(config, state, grads, params, weight, boundary, averaged)

    first = state.mini_step == 0
    acc_grads = _accumulator.add(state.acc_grads, grads, None if weighted else weight, keep=keep, first=first)
    add_scalar = functools.partial(_accumulator.add, weight=weight, keep=keep, first=first)
    one = jnp.ones_like(state.weight)
    total_weight = add_scalar(state.weight, one)
    averages = {}
    for name, sums in state.averages.items():
        if name in averaged:
            averages[name] = Weighted(add_scalar(sums.total, averaged[name]), add_scalar(sums.weight, one))
        else:
            averages[name] = _accumulator.select(first, _zeros_like(sums), sums)

    # A window can be empty only if its last micro-batch can be left out.
    filled = True if keep is None else _checks.known(total_weight != 0)
    closed = _both(closed, accepted)
    applied = _both(closed, filled)
    means = {name: _average(averages[name], value) for name, value in averaged.items()}
    result, inner_opt_state = _emit(
        config, state, params, grads, Weighted(acc_grads, total_weight), extra_args | means, output, applied
    )

    mini_step = _accumulator.select(closed, jnp.zeros_like(state.mini_step), state.mini_step + 1)
    mini_step, total_weight, averages, dropped = _accumulator.select(
        accepted,
        (mini_step, total_weight, averages, dropped),
        (state.mini_step, state.weight, state.averages, state.dropped),
    )
    return result, MultiStepsState(
        mini_step=mini_step,
        gradient_step=_accumulator.select(applied, optax.safe_increment(state.gradient_step), state.gradient_step),
        inner_opt_state=inner_opt_state,
        # After a step that is certain, the old sums are as good as the new, and need not be written.
        acc_grads=state.acc_grads if applied is True else _accumulator.select(accepted, acc_grads, state.acc_grads),
        skip_state=skip_state,
        weight=total_weight,
        averages=averages,
        every_k=state.every_k,
        updated=jnp.asarray(applied),
        dropped=dropped,
    )


def flush(
    config: Config, state: MultiStepsState, params: Tree | None, extra_args: dict[str, Any]
) -> tuple[Tree, MultiStepsState]:
    """Closes the window with what it holds; does nothing where it holds nothing."""
    grads = _inner.like_gradients(params if params is not None else state.acc_grads)
    extra_args = extra_args | {
        name: _average(sums, extra_args.get(name, jnp.nan)) for name, sums in state.averages.items()
    }
    applied = _checks.known((state.mini_step > 0) & (state.weight != 0))
    sums = Weighted(state.acc_grads, state.weight)
    output = updates_output(config, grads, state, params, extra_args)
    updates, inner_opt_state = _emit(config, state, params, grads, sums, extra_args, output, applied)
    return updates, state._replace(
        mini_step=jnp.zeros_like(state.mini_step),
        gradient_step=_accumulator.select(applied, optax.safe_increment(state.gradient_step), state.gradient_step),
        inner_opt_state=inner_opt_state,
        updated=jnp.asarray(applied),
    )


def updates_output(config, grads, state, params, extra_args) -> Output:
    """The optax contract: the updates at a boundary, zeros of the same types in between."""

    def stay():
        return _inner.zeros(_inner.update_shapes(config.inner, grads, state.inner_opt_state, params, extra_args))

    return Output(lambda updates: updates, stay)


def apply_output(params: Tree) -> Output:
    """The new parameters at a boundary, the old ones in between."""
    return Output(lambda updates: _inner.apply_updates(params, updates), lambda: params)


def _emit(config, state, params, grads, sums, extra_args, output, applied):
    """(output, inner state): of an optimizer step where `applied`, else unchanged."""

    def close():
        weight = sums.weight if config.use_grad_mean else jnp.ones_like(sums.weight)
        mean = _accumulator.mean(Weighted(sums.total, weight), grads)
        wide = jnp.float32 if config.accumulator_dtype is None else config.accumulator_dtype
        updates, inner = _inner.update(config.inner, mean, grads, state.inner_opt_state, params, extra_args, wide)
        return output.close(updates), inner

    return _inner.branch(applied, close, lambda: (output.stay(), state.inner_opt_state))


def _select(config, state, grads, params, weight, boundary, averaged):
    """(_Selection, skip_state, dropped) for one micro-batch."""
    if boundary is None:
        every_k = (
            _checks.scheduled_k(config.every_k(state.gradient_step)) if callable(config.every_k) else state.every_k
        )
        closed = _checks.known(state.mini_step + 1 >= every_k)
    else:
        closed = _checks.boundary(boundary)

    accepted, skip_state = True, state.skip_state
    if config.should_skip_update_fn is not None:
        skip, skip_state = config.should_skip_update_fn(grads, state.gradient_step, params)
        accepted = _checks.known(jnp.logical_not(_checks.skip(skip)))

    keep, dropped = None, state.dropped
    if weight is not None:
        _checks.weight(weight)
        keep = jnp.asarray(weight) != 0
    if config.nonfinite == "drop":
        finite = _accumulator.all_finite((grads, averaged))
        bad = jnp.logical_not(finite) if keep is None else jnp.logical_and(keep, jnp.logical_not(finite))
        dropped = dropped + bad.astype(dropped.dtype)
        keep = finite if keep is None else jnp.logical_and(keep, finite)
    return _Selection(accepted, keep, closed), skip_state, dropped


def _both(a: Any, b: Any) -> Any:
    """`a and b`, known if one of them decides it."""
    if isinstance(a, bool):
        return b if a else False
    return a if b is True else (False if b is False else jnp.logical_and(a, b))


def _average(sums: Weighted, value: Any) -> jax.Array:
    """The window's mean of an extra arg, never narrower than `value`; `value` itself where nothing was summed."""
    dtype = jnp.promote_types(jnp.result_type(value), jnp.float32)
    mean = _accumulator.mean(sums, sums.total)
    return jnp.where(sums.weight == 0, jnp.asarray(value).astype(dtype), mean.astype(dtype))


def _zero() -> jax.Array:
    return jnp.zeros((), _accumulator.weight_dtype())


def _zeros_like(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)
