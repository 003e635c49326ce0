"""Argument checks for `MultiSteps`. Each error names the argument, the value and the remedy."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxaccum._devices import placement
from jaxaccum._devices.topology import Sync
from jaxaccum._integers import positive_int
from jaxaccum._multi_steps.conditions import known
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._sums.numeric import is_real, kind, path_name, scalar_dtype
from jaxaccum._sums.traced_loss import or_one_each
from jaxaccum._sums.weighted_sum import is_inexact
from jaxaccum._types import Tree


def state(value: Any, method: str, sync: Sync | None = None) -> MultiStepsState:
    """Checks that `value` is a `MultiStepsState` and, given `sync`, that its local sums match the devices."""
    if not isinstance(value, MultiStepsState):
        raise TypeError(
            f"{method} takes the MultiStepsState that init returned, got a {type(value)}; in a chain's state "
            "it is the entry of this transformation, in a TrainState its opt_state."
        )
    if sync is not None:
        nnx = sys.modules.get("flax.nnx")
        if nnx is not None and isinstance(value.mini_step, nnx.Variable):
            raise TypeError(
                f"{method} got the opt_state of an nnx.Optimizer, which holds nnx Variables. To close a window, call "
                "optimizer.update(model, grads, boundary=True) with its last micro-batch."
            )
        placement.in_map(sync)
        if jnp.shape(value.weight) != sync.shape:
            shape = jnp.shape(value.weight)
            made = lambda shape: f"made with mesh= for {shape[0]} devices" if shape else "made without mesh="
            raise ValueError(
                f"{method} got a state whose weight has shape {shape}, as if {made(shape)}, but this MultiSteps was "
                f"{made(sync.shape)}. Use a state from its own init, or convert this one with its redistribute."
            )
    return value


def on_device(acc_grads: Tree) -> None:
    """Checks that no sum lies in host memory."""
    for path, total in jax.tree_util.tree_leaves_with_path(acc_grads):
        if isinstance(total, jax.Array) and jax.typeof(total).memory_space == jax.memory.Space.Host:
            raise ValueError(
                f"state.acc_grads{path_name(path)} lies in host memory, and sums are added on the device. Move it "
                "there, for example with jax.device_put(state, jax.memory.Space.Device)."
            )


def gradients(grads: Tree, acc_grads: Tree, sync: Sync) -> None:
    """Checks that gradients match the parameters' tree and shapes and are floating or complex."""
    is_none = lambda leaf: leaf is None
    want = dict(jax.tree_util.tree_leaves_with_path(acc_grads, is_leaf=is_none))
    got = dict(jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_none))
    if want.keys() != got.keys():
        missing = ", ".join(map(path_name, want.keys() - got.keys()))
        extra = ", ".join(map(path_name, got.keys() - want.keys()))
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
            dtype = "None" if grad is None else jnp.result_type(grad)
            raise TypeError(
                f"grads{path_name(path)} must be floating or complex, got {dtype}. Integer parameters have no "
                "gradient: differentiate with respect to the others alone, or with allow_int=True."
            )
        if acc is None or jnp.shape(grad) != acc.shape:
            shape = "an integer parameter" if acc is None else f"a parameter of shape {acc.shape[len(sync.shape) :]}"
            hint = (
                f" With mesh= it must be {acc.shape}, (devices, *parameter), as jaxaccum.local_value_and_grad gives it."
                if acc is not None and sync.shape
                else ""
            )
            raise ValueError(f"grads{path_name(path)} has shape {jnp.shape(grad)}, for {shape}.{hint}")


def inner_state(state: Tree) -> None:
    """Checks that an inner optimizer's state contains no `MultiSteps` state."""
    is_accumulating = lambda node: isinstance(node, (MultiStepsState, optax.MultiStepsState))
    if any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating))):
        raise accumulates()


def accumulates() -> ValueError:
    """The error for an inner optimizer that already accumulates."""
    return ValueError(
        "opt accumulates by itself: it holds a MultiSteps. Pass the optimizer without it, and K once: for a window of "
        "K1·K2 micro-steps make one MultiSteps(opt, K1·K2) with all else inside; for the Trainer pass K as "
        "accumulate_grad_batches."
    )


def boundary(value: Any, sync: Sync) -> Any:
    """Checks `boundary`: a bool from Python, numpy or jax. A traced one must not vary over the data axis."""
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


def skip(value: Any) -> Any:
    """Checks that `should_skip_update_fn` returned one bool for `skip`."""
    if not _is_bool(value):
        raise ValueError(f"should_skip_update_fn must return (skip, skip_state) with skip one bool, got {kind(value)}.")
    return value


def every_k_schedule(value: Any) -> int | Callable[[Any], Any]:
    """Checks K: an integer, or a function of `gradient_step` that returns one."""
    if isinstance(value, AccumulationSchedule):
        raise TypeError(
            f"every_k_schedule={value!r} gives K by {value.by} on the host, but MultiSteps counts optimizer steps on "
            "the devices. Start with every_k_schedule=schedule(0), and use set_every_k(state, schedule(...)) between "
            "windows, for example at each epoch's start."
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
        return value  # The function needs a concrete step, so it runs outside jit and each result is checked.
    scheduled_k(returned[-1])
    return value


def scheduled_k(k: Any) -> Any:
    """Checks the result of a schedule function: one integer and, if it is concrete, at least 1."""
    what = "the result of every_k_schedule"
    if not isinstance(k, jax.core.Tracer):
        return positive_int(k, what)
    if k.shape or not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"{what} must be one integer of at least 1, got {k.dtype} of shape {k.shape}.")
    return k


def averaged_extra_args(value: Any) -> dict[str, Tree]:
    """Checks `averaged_extra_args`; returns a dict from each name to a tree, 0.0 for one given by name alone."""
    if not isinstance(value, (tuple, list, Mapping)) or not all(isinstance(name, str) for name in value):
        raise TypeError(
            f"averaged_extra_args must be a tuple of names, or a dict of names and what they are like, got {value!r}."
        )
    trees = dict(value) if isinstance(value, Mapping) else dict.fromkeys(value, 0.0)
    for name, tree in trees.items():
        if name != "grad":
            _numbers(name, tree)
    return trees


def averaged(name: str, value: Any, shape: tuple[int, ...] = ()) -> None:
    """Checks an averaged extra arg: one real number, or one per device."""
    if not is_real(value, shape):
        raise ValueError(
            f"the extra arg {name!r} is averaged over the window and must be one real number{or_one_each(shape)}, got "
            f"{kind(value)}. To average an array or a tree, say its shapes with averaged_extra_args={{{name!r}: "
            f"...}}; to hand it over as it is at the boundary, leave {name!r} out of averaged_extra_args."
        )


def averaged_tree(name: str, value: Tree, like: Tree, shape: tuple[int, ...]) -> None:
    """Checks a non-scalar averaged extra arg: a tree like the one in `averaged_extra_args`, per device."""
    _numbers(name, value)
    got = jax.tree.map(jnp.shape, value)
    want = jax.tree.map(lambda x: (*shape, *x.shape), like)
    if jax.tree.structure(value) != jax.tree.structure(like) or got != want:
        raise ValueError(
            f"the extra arg {name!r} must have the tree and shapes that averaged_extra_args gives: {want}, not {got}."
        )


def _is_bool(value: Any) -> bool:
    return scalar_dtype(value) == jnp.bool_


def _numbers(name: str, tree: Tree) -> None:
    """Checks that an averaged extra arg has at least one leaf and only numeric leaves."""
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
        has_dtype = hasattr(leaf, "dtype") and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        if not (has_dtype or isinstance(leaf, (int, float, complex))):
            raise TypeError(f"averaged_extra_args: {name!r} must be arrays or numbers, got {kind(leaf)}.")
    if not leaves:
        raise TypeError(f"averaged_extra_args: {name!r} must be arrays or numbers, got {tree!r}.")
