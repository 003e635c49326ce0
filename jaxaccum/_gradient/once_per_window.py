"""Runs `prepare` once per window: forward before the loop, and its transpose after the loop, on the summed gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._devices import layout
from jaxaccum._jax import core, jaxprs, linearity
from jaxaccum._sums import numeric, overwrites
from jaxaccum._types import Tree

_GATHERS = ("all_gather", "all_gather_invariant")


def with_transpose(prepare: Callable[[Tree], Tree], params: Tree) -> tuple[Tree, Callable[[Tree, Any], Tree]]:
    """Returns `prepare(params)` and its transpose, which maps gradients of the result to gradients of the parameters.

    `transpose(sums, count)` takes sums of `count` gradients, in any floating dtypes; its result is like `params`, in
    float32 where they are narrower.

    A VJP is linear in its cotangents, so it commutes with the sum over the window. If a leaf's last operation in
    `prepare` is a cast, the transpose skips that cast, because it would round the sum. Operations after the cast that
    only move elements (a transpose, a stack, an all-gather, a resharding) don't change this. Casts inside jit are found
    too, unless it has explicit shardings; casts inside `jax.checkpoint` or a scan are not.
    """
    leaves, treedef = jax.tree.flatten(params)
    closed, shapes = jax.make_jaxpr(prepare, return_shape=True)(params)

    def forward(*wide):
        inputs = [(x.astype(jnp.result_type(leaf)), x) for x, leaf in zip(wide, leaves, strict=True)]
        values, wide = zip(*_evaluate(closed, inputs), strict=True) if closed.jaxpr.outvars else ((), ())
        return wide, values

    lifted = [jnp.asarray(leaf, _at_least_float32(jnp.result_type(leaf))) for leaf in leaves]
    wide, vjp, values = jax.vjp(forward, *lifted, has_aux=True)
    dtypes = [x.dtype for x in wide]

    def transpose(sums: Tree, count: Any) -> Tree:
        # A sum can overflow float16 even if no term does, so it is scaled down to about the mean.
        scale = _power_of_two(count) if _has_small_range(closed.jaxpr) else 1
        scaled = lambda x, by: x if isinstance(by, int) else x * by.astype(jnp.finfo(x.dtype).dtype)
        leaves = [scaled(x, scale if isinstance(scale, int) else 1 / scale) for x in jax.tree.leaves(sums)]
        grads = vjp(tuple(x.astype(dtype) for x, dtype in zip(leaves, dtypes, strict=True)))
        return jax.tree.unflatten(treedef, [scaled(x, scale) for x in grads])

    return jax.tree.unflatten(jax.tree.structure(shapes), values), transpose


def check_linear(prepare: Callable[[Tree], Tree], params: Tree) -> None:
    """Traces `prepare` and raises if its transpose can't be shown to commute with the sum over the window."""
    closed, shapes = jax.make_jaxpr(prepare, return_shape=True)(params)
    numeric.differentiable(shapes, "what prepare returns")
    statistics = lambda tree: len(jax.tree.leaves(overwrites.only(tree)))
    if statistics(params) != statistics(shapes):
        raise ValueError(
            f"prepare returns {statistics(shapes)} of {statistics(params)} statistics under {overwrites.NAME!r}, by "
            "which they are known to be overwritten and not summed. Return them under the name that they came with."
        )
    name = linearity.unproved(closed.jaxpr)
    if name is not None:
        raise ValueError(
            f"prepare calls {name}, which has a backward pass of its own (jax.custom_vjp) that can't be shown to be "
            "linear in its cotangents. prepare is differentiated once a window, on the sum of the micro-batches' "
            "gradients, and to clip, square or normalise that is not to do so to each of them. Call it in the loss "
            "instead of in prepare."
        )


def compute(prepare: Callable[[Tree], Tree], params: Tree) -> tuple[Tree, tuple[jax.Array, ...]]:
    """Returns (`prepare(params)`, its leaves that are not unchanged parameters: the ones to keep)."""
    closed, treedef, origins = _origins(prepare, params)
    leaves = core.jaxpr_as_fun(closed)(*jax.tree.leaves(params))
    return treedef.unflatten(leaves), tuple(x for x, i in zip(leaves, origins, strict=True) if i is None)


def restore(prepare: Callable[[Tree], Tree], params: Tree, kept: tuple[jax.Array, ...]) -> Tree:
    """Rebuilds `prepare(params)` from the parameters and the leaves that `compute` kept."""
    _, treedef, origins = _origins(prepare, params)
    leaves, others = jax.tree.leaves(params), iter(kept)
    return treedef.unflatten(next(others) if i is None else leaves[i] for i in origins)


def _origins(prepare, params):
    """(the traced `prepare`, its output tree, for each output leaf the index of the parameter it equals, or None)."""
    closed, shapes = jax.make_jaxpr(prepare, return_shape=True)(params)
    number = {var: i for i, var in enumerate(closed.jaxpr.invars)}
    is_var = lambda atom: not isinstance(atom, core.Literal)
    origins = [number.get(var) if is_var(var) else None for var in closed.jaxpr.outvars]
    return closed, jax.tree.structure(shapes), origins


def gathered_axes(prepare: Callable[[Tree], Tree], params: Tree, names: tuple[str, ...]) -> Tree:
    """For each parameter, the axes of `names` that `prepare` gathers it over, or (); its transpose sums over them.

    Raises for a parameter used both gathered and not, and for any other collective, or one in a loop.
    """
    leaves, treedef = jax.tree.flatten(params)
    jaxpr = jax.make_jaxpr(prepare)(params).jaxpr
    ways = _ways(jaxpr, [{(i, ())} for i in range(len(leaves))], frozenset(names))
    axes = [{axes for way in ways for number, axes in way if number == i} for i in range(len(leaves))]
    for found, (path, _) in zip(axes, jax.tree_util.tree_leaves_with_path(params), strict=True):
        if len(found) > 1:
            raise ValueError(
                f"prepare hands params{jax.tree_util.keystr(path)} on gathered over {max(found)} and also not: its "
                "gradient would be summed over the devices in part. Gather it once, and use nothing but the result."
            )
    return treedef.unflatten([next(iter(found), ()) for found in axes])


def _ways(jaxpr: core.Jaxpr, inputs: Sequence[set], names: frozenset[str]) -> list[set]:
    """For each output, the (parameter index, gathered axes) pairs of the parameters that it depends on."""
    ways = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: set() if isinstance(atom, core.Literal) else ways.get(atom, set())
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if jaxprs.is_plain_jit(eqn):
            ways.update(zip(eqn.outvars, _ways(eqn.params["jaxpr"].jaxpr, operands, names), strict=True))
            continue
        through = set().union(*operands)
        axes = jaxprs.axes(eqn) & names
        if axes and (eqn.primitive.name != "all_gather" or eqn.params["axis_index_groups"] is not None):
            raise NotImplementedError(
                f"prepare calls {eqn.primitive.name} over {sorted(axes)}, which can't be carried back through the "
                "window's one reduction. Of the collectives prepare may use jax.lax.all_gather, outside of loops."
            )
        if axes:
            through = {(number, tuple(sorted({*done, *axes}))) for number, done in through}
        ways.update((var, through) for var in eqn.outvars)
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(closed: core.ClosedJaxpr, inputs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Evaluates `closed`; returns each output as (value, value without its final casts).

    The second entry is the one to differentiate: its VJP skips the casts.
    """

    def pairs(eqn, operands):
        if jaxprs.is_plain_jit(eqn):
            return _evaluate(eqn.params["jaxpr"], operands)
        values, wide = zip(*operands, strict=True) if operands else ((), ())
        results = _gather_wide(eqn, *values) if eqn.primitive.name in _GATHERS else jaxprs.bind(eqn, values)
        if eqn.primitive.name == "convert_element_type" and _floating(wide[0], results[0]):
            before = wide
        elif eqn.primitive.name in jaxprs.MOVES and len({x.dtype for x in wide}) == 1:
            before = jaxprs.bind(eqn, wide)
        else:
            before = results
        return list(zip(results, before, strict=True))

    return jaxprs.evaluate(closed.jaxpr, closed.consts, inputs, pairs, lambda x: (x, x))


def _gather_wide(eqn: core.JaxprEqn, x: Any) -> list[Any]:
    """Gathers `x`; the transpose sums over the devices in float32 or wider."""

    def narrow(x):
        return jaxprs.bind(eqn, [x])[0]

    gather = jax.custom_vjp(narrow)

    def backward(x, cotangent):
        _, pull_back = jax.vjp(narrow, layout.wide(x))
        (gradient,) = pull_back(layout.wide(cotangent))
        return (gradient.astype(x.dtype),)

    gather.defvjp(lambda x: (narrow(x), x), backward)
    return [gather(x)]


def _has_small_range(jaxpr: core.Jaxpr) -> bool:
    """Whether `jaxpr` has a result of a floating dtype with a smaller range than bfloat16."""
    largest = lambda var: jnp.finfo(var.aval.dtype).maxexp if _floating(var.aval) else np.inf
    results = (var for eqn in jaxprs.equations(jaxpr) for var in eqn.outvars)
    return any(largest(var) < jnp.finfo(jnp.bfloat16).maxexp for var in results)


def _power_of_two(count: Any) -> jax.Array:
    """The smallest power of two that is at least `count` (an integer >= 1), as a float32 scalar."""
    bits = 32 - jax.lax.clz(jnp.asarray(count, jnp.int32) - 1)
    return jnp.ldexp(jnp.float32(1), bits)


def _floating(*arrays: Any) -> bool:
    return all(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def check_argument(value: Any, *, auto: bool = False) -> None:
    """Checks `prepare`: None, a function of the parameters, or "auto" if `auto` allows it."""
    if isinstance(value, str) and not (auto and value == "auto"):
        takes = '"auto", None or a function' if auto else "None or a function"
        hint = "" if auto else '; "auto" is an option of value_and_grad and coupled_value_and_grad alone'
        raise ValueError(f"prepare must be {takes} of the parameters, got {value!r}{hint}.")
    if not (auto and value == "auto") and not (value is None or callable(value)):
        raise TypeError(f"prepare must be None or a function of the parameters, got {value!r}.")
