"""Checks of what callers pass, made before anything runs: each error names the argument, the value and the remedy."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum._accumulator import Weighted, is_inexact
from jaxaccum._integers import positive_int
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._state import MultiStepsState
from jaxaccum._sync import MappedAxis, MeshAxis, OneDevice, Sync

Tree = Any


def known(flag: Any) -> Any:
    """`flag` as a Python bool where its value can be read now; the traced array where it can't."""
    return flag if isinstance(flag, jax.core.Tracer) else bool(flag)


def floating(name: str, dtype: Any) -> None:
    """A dtype argument: floating, or None."""
    if not (dtype is None or _is_floating(dtype)):
        raise TypeError(f"{name} must be a floating dtype or None, got {dtype!r}.")


def prepare(value: Any, *, auto: bool = False) -> None:
    """None, or a function of the parameters, or, where `auto`, the string "auto"."""
    if isinstance(value, str) and not (auto and value == "auto"):
        takes = '"auto", None or a function' if auto else "None or a function"
        hint = "" if auto else '; "auto" is an option of jaxaccum.value_and_grad alone'
        raise ValueError(f"prepare must be {takes} of the parameters, got {value!r}{hint}.")
    if not (auto and value == "auto") and not (value is None or callable(value)):
        raise TypeError(f"prepare must be None or a function of the parameters, got {value!r}.")


def in_place(value: Any) -> None:
    """True, False, or None for a choice by rule."""
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"in_place must be True, False or None, got {value!r}.")


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


def weight(value: Any, shape: tuple[int, ...] = ()) -> None:
    """A weight: a real scalar, or one for each device; finite and not negative where the value can be read."""
    if not _is_real(value, shape):
        raise ValueError(
            f"weight must be one real number{_or_one_each(shape)}, got {_kind(value)}; sum the weights of the "
            "micro-batch's examples first."
        )
    if not isinstance(value, jax.core.Tracer):
        numbers = np.asarray(value, np.float64)
        if not np.all((numbers >= 0) & np.isfinite(numbers)):
            raise ValueError(
                f"weight must be finite and at least 0, got {value}; it is what the micro-batch counts for "
                "(its number of examples or tokens), and 0 leaves the micro-batch out."
            )


def total(value: Any, without_aux: str | None = None) -> None:
    """A loss, or the total of a `Weighted` one: one floating scalar.

    Args:
      value: the loss.
      without_aux: what was called, if that takes no aux.
    """
    dtype = _scalar_dtype(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        others = (
            f"{without_aux} takes no aux yet: return the loss alone, or use jaxaccum.value_and_grad with has_aux=True."
            if without_aux
            else "Return other results with has_aux=True."
        )
        raise TypeError(
            f"the loss must be one floating scalar, or a Weighted with such a total, got {_kind(value)}; "
            f"reduce an array first. {others}"
        )


def without_aux(fun: Callable[..., Any], method: str) -> Callable[..., Any]:
    """`fun`, a loss for `method`, which takes no aux; what it returns is checked."""

    @functools.wraps(fun, updated=())
    def checked(*args):
        value = fun(*args)
        total(value.total if isinstance(value, Weighted) else value, method)
        return value

    return checked


def boundary(value: Any, sync: Sync) -> Any:
    """A bool, Python's or numpy's or an array's; traced only if the array is, and then the same on every device."""
    if not _is_bool(value):
        raise TypeError(
            f"boundary must be None (the state's counter decides) or one bool, got {value!r}; "
            "for example boundary=(batch_index + 1) % k == 0."
        )
    value = known(value)
    if not isinstance(value, bool) and sync.varies(value):
        raise ValueError(
            f"boundary must be the same on every device, but it varies over axis_name={sync.names!r}: the devices "
            "would wait for each other for ever. Decide it on the host, or from values that jax.lax.psum made equal."
        )
    return value


def sync(axis_name: Any, mesh: Any, data_axis: Any, should_skip_update_fn: Any = None, *, reduce: str = "mean") -> Sync:
    """Where the local sums live, on one device, along a mapped axis, or along a mesh's data axis, and how they join."""
    if reduce not in ("mean", "scatter"):
        raise ValueError(f"reduce must be 'mean' or 'scatter' (ZeRO), got {reduce!r}.")
    if reduce == "scatter" and mesh is None:
        raise ValueError(
            "reduce='scatter' needs mesh=: the update must run in global code, where clipping sees the norm of the "
            "whole gradient, and not that of one device's part."
        )
    if axis_name is None and mesh is None:
        return OneDevice()
    if axis_name is not None and mesh is not None:
        raise ValueError(f"axis_name={axis_name!r} is for pmap and shard_map, mesh for jit: give one of them.")
    if should_skip_update_fn is not None:
        raise ValueError(
            "should_skip_update_fn can't be used on several devices: one could skip a micro-step that the others "
            "count, and they would wait for each other for ever. Use nonfinite='drop', or weight=0 where a micro-batch "
            "should not count."
        )
    if axis_name is not None:
        return MappedAxis(_names("axis_name", axis_name))
    return dataclasses.replace(mesh_axis(mesh, data_axis), scatter=reduce == "scatter")


def mesh_axis(mesh: Any, data_axis: Any) -> MeshAxis:
    """The data axis of a mesh, which must have it."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, for example jax.make_mesh((8,), ('data',)), got {mesh!r}.")
    names = _names("data_axis", data_axis)
    missing = [name for name in names if name not in mesh.axis_names]
    if missing:
        raise ValueError(f"data_axis={data_axis!r}: the mesh has no axis {missing[0]!r}, only {mesh.axis_names}.")
    return MeshAxis(mesh, names)


def _names(argument: str, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, tuple) else (value,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a name or a tuple of names, got {value!r}.")
    return names


def local_gradients(grads: Tree, sync: Sync) -> None:
    """Gradients must be each device's own: summed over the devices already, they would be summed again."""
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if is_inexact(grad) and sync.is_reduced(grad):
            raise ValueError(
                f"grads{_name(path)} does not vary over axis_name={sync.names!r}: it has been reduced over it already, "
                "in this micro-step. Differentiate with respect to parameters cast by jax.lax.pcast(params, "
                f"{sync.names!r}, to='varying'), or use MultiSteps.micro_step or jaxaccum.value_and_grad, which do."
            )


def averaged(name: str, value: Any, shape: tuple[int, ...] = ()) -> None:
    """An averaged extra arg: one real number, or one for each device."""
    if not _is_real(value, shape):
        raise ValueError(
            f"the extra arg {name!r} is averaged over the window and must be one real number{_or_one_each(shape)}, got "
            f"{_kind(value)}. To average an array or a tree, say its shapes with averaged_extra_args={{{name!r}: "
            f"...}}; to hand it over as it is at the boundary, leave {name!r} out of averaged_extra_args."
        )


def averaged_tree(name: str, value: Tree, like: Tree, shape: tuple[int, ...]) -> None:
    """An averaged extra arg that is no scalar: a tree like the one that `averaged_extra_args` has, of each device."""
    numbers(name, value)
    got = jax.tree.map(jnp.shape, value)
    want = jax.tree.map(lambda x: (*shape, *x.shape), like)
    if jax.tree.structure(value) != jax.tree.structure(like) or got != want:
        raise ValueError(
            f"the extra arg {name!r} must have the tree and shapes that averaged_extra_args gives: {want}, not {got}."
        )


def numbers(name: str, tree: Tree) -> Tree:
    """`tree`, an averaged extra arg or one like it, which must consist of numbers, and of one at least."""
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
        has_dtype = hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        if not (has_dtype or isinstance(leaf, (int, float, complex))):
            raise TypeError(f"averaged_extra_args: {name!r} must be arrays or numbers, got {_kind(leaf)}.")
    if not leaves:
        raise TypeError(f"averaged_extra_args: {name!r} must be arrays or numbers, got {tree!r}.")
    return tree


def skip(value: Any) -> Any:
    """The verdict of `should_skip_update_fn`: one bool."""
    if not _is_bool(value):
        raise ValueError(
            f"should_skip_update_fn must return (skip, skip_state) with skip one bool, got {_kind(value)}."
        )
    return value


def available(name: str, dtype: Any) -> None:
    """A dtype argument must be one that jax has switched on."""
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name}={jnp.dtype(dtype)} needs x64: set jax_enable_x64 first.")


def arrays(params: Tree) -> None:
    """Parameters: arrays or numbers, every one. A module of equinox holds functions too."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))):
            raise TypeError(
                f"the parameters hold {leaf!r} at {_name(path) or 'their root'}, which is not an array. Separate the "
                "arrays from the rest, for an equinox module with arrays, rest = eqx.partition(model, "
                "eqx.is_inexact_array); pass the arrays as the parameters, and call eqx.combine(arrays, rest) in the "
                "loss."
            )


def differentiable(params: Tree, what: str = "the argument that argnums names") -> None:
    """Parameters to differentiate: floating or complex, every one."""
    arrays(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_inexact(leaf):
            raise TypeError(
                f"{what} holds {jnp.result_type(leaf)} at {_name(path) or 'its root'}, which has no gradient; pass it "
                "as another argument."
            )


def placed(params: Tree, sync: Sync) -> None:
    """Parameters must lie on the mesh's devices, as far as it can be seen where they lie: outside of jit."""
    if not isinstance(sync, MeshAxis):
        return
    devices = set(sync.mesh.devices.flat)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
            continue
        others = leaf.sharding.device_set - devices
        if others:
            raise ValueError(
                f"the parameter {_name(path) or 'given'} lies on {min(others, key=str)}, which is not among the mesh's "
                f"{len(devices)} devices; move it there, for example with jax.device_put(params, "
                "NamedSharding(mesh, P()))."
            )


def accumulates() -> ValueError:
    """The error for an optimizer that accumulates by itself, where it is to do so in one that does."""
    return ValueError(
        "opt accumulates by itself: it holds a MultiSteps. Pass the optimizer without it, and K once: for a window of "
        "K1·K2 micro-steps make one MultiSteps(opt, K1·K2) with all else inside; for the Trainer pass K as "
        "accumulate_grad_batches."
    )


def inner_state(state: Tree) -> None:
    """The state of an inner optimizer, which must not accumulate by itself."""
    is_accumulating = lambda node: isinstance(node, (MultiStepsState, optax.MultiStepsState))
    if any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating))):
        raise accumulates()


def in_map(sync: Sync) -> None:
    """Refuses a mapped axis outside of its map."""
    try:
        sync.size()
    except NameError:
        raise NameError(
            f"axis_name={sync.options()['axis_name']!r} names no axis here: call this inside the function that "
            "jax.pmap or jax.shard_map maps over that axis, or leave axis_name out."
        ) from None


def state(value: Any, method: str, sync: Sync | None = None) -> MultiStepsState:
    """A state of `MultiSteps`; where `sync` is given, one whose local sums are of its devices.

    Raises:
      TypeError: if it is none.
      ValueError: if its local sums are those of other devices.
      NameError: if `sync` is a mapped axis, and this is not inside of its map.
    """
    if not isinstance(value, MultiStepsState):
        raise TypeError(
            f"{method} takes the MultiStepsState that init returned, got a {type(value)}; in a chain's state "
            "it is the entry of this transformation."
        )
    if sync is not None:
        in_map(sync)
        if jnp.shape(value.weight) != sync.shape:
            shape = jnp.shape(value.weight)
            made = lambda shape: f"made with mesh= for {shape[0]} devices" if shape else "made without mesh="
            raise ValueError(
                f"{method} got a state whose weight has shape {shape}, as if {made(shape)}, but this MultiSteps was "
                f"{made(sync.shape)}. Use a state from its own init, or convert this one with its redistribute."
            )
    return value


def gradients(grads: Tree, acc_grads: Tree, sync: Sync) -> None:
    """Gradients must form the parameters' tree, shape by shape, and be inexact.

    Raises:
      ValueError: if the tree or a shape differs.
      TypeError: if a gradient is not floating or complex.
    """
    hint = (
        f" With mesh=, gradients have a leading axis for the {sync.shape[0]} devices of the data axis, as "
        "jaxaccum.local_value_and_grad gives them."
        if sync.shape
        else ""
    )
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
            raise ValueError(f"grads{_name(path)} has shape {jnp.shape(grad)}, for {shape}.{hint}")


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


def _is_real(value: Any, shape: tuple[int, ...]) -> bool:
    dtype = value.dtype if shape and getattr(value, "shape", None) == shape else _scalar_dtype(value)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)) if dtype else False


def _or_one_each(shape: tuple[int, ...]) -> str:
    return f", or an array of shape {shape} with one for each device" if shape else ""


def _is_bool(value: Any) -> bool:
    return _scalar_dtype(value) == jnp.bool_


def _kind(value: Any) -> str:
    """What `value` is, for an error: an array without its contents."""
    return f"{value.dtype} of shape {value.shape}" if hasattr(value, "shape") else repr(value)
