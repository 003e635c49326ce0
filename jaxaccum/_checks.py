"""Checks of what callers pass, made before anything runs: each error names the argument, the value and the remedy."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._accumulator import is_inexact
from jaxaccum._integers import positive_int
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._state import MultiStepsState

Tree = Any


def known(flag: Any) -> Any:
    """`flag` as a Python bool where its value can be read now; the traced array where it can't."""
    return flag if isinstance(flag, jax.core.Tracer) else bool(flag)


def floating(name: str, dtype: Any) -> None:
    """A dtype argument: floating, or None."""
    if not (dtype is None or _is_floating(dtype)):
        raise TypeError(f"{name} must be a floating dtype or None, got {dtype!r}.")


def num_micro_batches(value: Any, stacked: bool) -> Any:
    """K of one window: a Python int, or a traced integer scalar where the batch is stacked."""
    if not isinstance(value, jax.core.Tracer):
        return positive_int(value, "num_micro_batches")
    if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"num_micro_batches must be one integer, got {value.dtype} of shape {value.shape}.")
    if not stacked:
        raise TypeError(
            "num_micro_batches is traced, but the batch is not stacked: how to split it must be known at compile time. "
            "Pass a Python int, or stacked=True with batch leaves of shape (K_max, N, ...)."
        )
    return value


def every_k_schedule(value: Any) -> int | Callable[[Any], Any]:
    """An integer K, or a function of `gradient_step` that gives integers; anything else is refused.

    Raises:
      TypeError, ValueError: if `value` is neither, or is a function whose result is not one integer of at least 1.
    """
    if isinstance(value, AccumulationSchedule):
        raise TypeError(
            f"every_k_schedule={value!r} gives K by epoch, but MultiSteps counts optimizer steps. Start with "
            "every_k_schedule=schedule(0), and at each epoch's start use set_every_k(state, schedule(epoch))."
        )
    if not callable(value):
        return positive_int(value, "every_k_schedule")
    returned = []

    def record(step):
        returned.append(value(step))
        return returned[-1]

    try:
        jax.eval_shape(record, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.ConcretizationTypeError:
        return value  # A function of the step's value, for use outside jit: its results are checked one by one.
    scheduled_k(returned[-1])
    return value


def scheduled_k(k: Any) -> Any:
    """What a schedule function returned: one integer, of at least 1 where the value can be read."""
    what = "the result of every_k_schedule"
    if not isinstance(k, jax.core.Tracer):
        return positive_int(k, what)
    if k.shape or not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"{what} must be one integer of at least 1, got {k.dtype} of shape {k.shape}.")
    return k


def weight(value: Any) -> None:
    """A weight: a real scalar; finite and not negative where the value can be read."""
    if not _is_real(value):
        raise ValueError(
            f"weight must be one real number, got {_kind(value)}; sum the weights of the micro-batch's examples first."
        )
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(value) < math.inf:
        raise ValueError(
            f"weight must be finite and at least 0, got {value}; it is what the micro-batch counts for "
            "(its number of examples or tokens), and 0 leaves the micro-batch out."
        )


def total(value: Any) -> None:
    """A loss, or the total of a `Weighted` one: one floating scalar."""
    dtype = _scalar_dtype(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the loss must be one floating scalar, or a Weighted with such a total, got {_kind(value)}; "
            "reduce an array first, and return other results with has_aux=True."
        )


def boundary(value: Any) -> Any:
    """A bool, Python's or numpy's or an array's; traced only if the array is."""
    if not _is_bool(value):
        raise TypeError(
            f"boundary must be None (the state's counter decides) or one bool, got {value!r}; "
            "for example boundary=(batch_index + 1) % k == 0."
        )
    return known(value)


def averaged(name: str, value: Any) -> None:
    """An averaged extra arg: one real number."""
    if not _is_real(value):
        raise ValueError(
            f"the extra arg {name!r} is averaged over the window and must be one real number, got "
            f"{_kind(value)}. To hand it over as it is at the boundary, leave "
            f"{name!r} out of averaged_extra_args."
        )


def skip(value: Any) -> Any:
    """The verdict of `should_skip_update_fn`: one bool."""
    if not _is_bool(value):
        raise ValueError(
            f"should_skip_update_fn must return (skip, skip_state) with skip one bool, got {_kind(value)}."
        )
    return value


def available(accumulator_dtype: Any) -> None:
    """The accumulator's dtype must be one that jax has switched on."""
    if accumulator_dtype is not None and jax.dtypes.canonicalize_dtype(accumulator_dtype) != accumulator_dtype:
        raise ValueError(f"accumulator_dtype={jnp.dtype(accumulator_dtype)} needs x64: set jax_enable_x64 first.")


def differentiable(params: Tree) -> None:
    """Parameters to differentiate: floating or complex, every one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_inexact(leaf):
            raise TypeError(
                f"the argument that argnums names holds {jnp.result_type(leaf)} at {_name(path) or 'its root'}, which "
                "has no gradient; pass it as another argument."
            )


def state(value: Any, method: str) -> MultiStepsState:
    """A state of `MultiSteps`."""
    if not isinstance(value, MultiStepsState):
        raise TypeError(
            f"{method} takes the MultiStepsState that init returned, got a {type(value)}; in a chain's state "
            "it is the entry of this transformation."
        )
    return value


def gradients(grads: Tree, acc_grads: Tree) -> None:
    """Gradients must form the parameters' tree, shape by shape, and be inexact.

    Raises:
      ValueError: if the tree or a shape differs.
      TypeError: if a gradient is not floating or complex.
    """
    is_none = lambda leaf: leaf is None
    want = dict(jax.tree_util.tree_leaves_with_path(acc_grads, is_leaf=is_none))
    got = dict(jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_none))
    if want.keys() != got.keys():
        missing, extra = (", ".join(map(_name, keys)) for keys in (want.keys() - got.keys(), got.keys() - want.keys()))
        raise ValueError(
            "grads must have the tree of the parameters that init was given"
            + (f"; missing: {missing}" if missing else "")
            + (f"; not among the parameters: {extra}" if extra else "")
            + ". Differentiate with respect to those parameters, or call init on these."
        )
    for path, acc in want.items():
        grad = got[path]
        no_gradient = grad is None or jnp.result_type(grad) == jax.dtypes.float0
        if acc is None and no_gradient:
            continue
        if no_gradient or not is_inexact(grad):
            kind = "None" if grad is None else jnp.result_type(grad)
            raise TypeError(
                f"grads{_name(path)} must be floating or complex, got {kind}. Integer parameters have no gradient: "
                "differentiate with respect to the others alone, or with allow_int=True."
            )
        if acc is None or jnp.shape(grad) != acc.shape:
            shape = "an integer parameter" if acc is None else f"a parameter of shape {acc.shape}"
            raise ValueError(f"grads{_name(path)} has shape {jnp.shape(grad)}, for {shape}.")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _scalar_dtype(value: Any) -> Any:
    """The dtype of one number or one bool; None for anything else, such as a string, which jax takes for a dtype."""
    is_scalar = isinstance(value, (bool, int, float, complex)) or getattr(value, "shape", None) == ()
    return jnp.result_type(value) if is_scalar else None


def _is_real(value: Any) -> bool:
    dtype = _scalar_dtype(value)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)) if dtype else False


def _is_bool(value: Any) -> bool:
    return _scalar_dtype(value) == jnp.bool_


def _kind(value: Any) -> str:
    """What `value` is, for an error: an array without its contents."""
    return f"{value.dtype} of shape {value.shape}" if hasattr(value, "shape") else repr(value)
