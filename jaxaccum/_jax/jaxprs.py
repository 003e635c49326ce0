"""Helpers to inspect and evaluate jaxprs."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util  # These two have no public names.
from jax._src.state import discharge
from jax.interpreters import partial_eval

from jaxaccum._jax import core

# Primitives that only move elements: they and their transposes commute with casts.
_IN_SHAPE = ("broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "tile", "transpose")
_IN_PARTS = ("concatenate", "slice", "split", "stack", "unstack")
_IN_PLACE = ("all_gather", "all_gather_invariant", "copy", "device_put", "pvary", "reshard", "sharding_constraint")
MOVES = frozenset([*_IN_SHAPE, *_IN_PARTS, *_IN_PLACE])

_discharged = getattr(discharge, "discharge_state2", discharge.discharge_state)  # jax 0.9 has both.


class ScanOperands(NamedTuple):
    """The numbers of a scan's constants and carries; the scanned-over operands follow."""

    constants: int
    carries: int


def scan_operands(scan: core.JaxprEqn, body: core.Jaxpr) -> ScanOperands:
    """Counts constants and carries by rank, which is the same inside and outside the body for these operands only.

    The parameters of scan differ between jax versions.
    """
    whole = lambda outer, inner: sum(ndim(a) == ndim(b) for a, b in zip(outer, inner, strict=True))
    carries = whole(scan.outvars, body.outvars)
    return ScanOperands(whole(scan.invars, body.invars) - carries, carries)


def ndim(atom: Any) -> int:
    """The number of dimensions of a variable or literal."""
    return len(atom.aval.shape)


def dtype(atom: Any) -> Any:
    """The dtype of a variable or literal."""
    return atom.aval.dtype


def is_plain_jit(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a jit without explicit shardings, so that it can be evaluated equation by equation."""
    if eqn.primitive.name != "jit":
        return False
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return not any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)


def is_checkpoint(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a `jax.checkpoint`."""
    return eqn.primitive.name in ("checkpoint", "remat", "remat2")


def checkpointed(eqn: core.JaxprEqn, body: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `body` in a `jax.checkpoint` with the options of `eqn`."""
    return jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluates one equation; returns its results in a sequence even if there is only one."""
    with located(eqn):
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


@contextlib.contextmanager
def located(eqn: core.JaxprEqn) -> Iterator[None]:
    """Gives equations traced inside the context the named scopes and the traceback of `eqn`."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def rescanned(
    eqn: core.JaxprEqn, body: Callable[[list[Any], Any], Sequence[Any]], operands: Sequence[Any], along: Any = None
) -> Sequence[Any]:
    """Runs the scan `eqn` with another body, `body(inputs, slices)`; it also scans over `along`, to give `slices`."""
    constants, carries = scan_operands(eqn, eqn.params["jaxpr"].jaxpr)
    shared, start, stacks = operands[:constants], operands[constants:][:carries], operands[constants + carries :]

    def step(carry, slices):
        results = body([*shared, *carry, *slices[0]], slices[1])
        return results[:carries], results[carries:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    with located(eqn):
        carry, rows = jax.lax.scan(step, list(start), (list(stacks), along), **options)
    return [*carry, *rows]


class Jits:
    """The jitted functions of a program rebuilt from a jaxpr: each is traced and lowered once, and keeps its name."""

    def __init__(self):
        self._functions: dict[Any, tuple[Any, Any]] = {}

    def call(self, eqn: core.JaxprEqn, key: Any, fun: Callable[[Any], Any], operands: Any) -> Any:
        """Calls `fun(operands)` under a jit named like that of `eqn`; calls with equal keys share it."""
        closed = eqn.params["jaxpr"]
        key = id(closed), key, jax.tree.structure(operands)
        if key not in self._functions:
            fun.__name__ = eqn.params["name"]
            self._functions[key] = jax.jit(fun), closed  # Kept alive, so that its id stays unique.
        with located(eqn):
            return self._functions[key][0](operands)


def evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    results: Callable[[core.JaxprEqn, list[Any]], Sequence[Any]],
    entry: Callable[[Any], Any],
) -> list[Any]:
    """Evaluates `jaxpr` equation by equation on entries of any type instead of arrays.

    `inputs` are the entries of its inputs, `entry(x)` that of a constant or a literal, and `results(eqn, operands)`
    those of an equation's results.
    """
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= dict(zip(jaxpr.constvars, map(entry, consts), strict=True))

    def read(atom):
        return entry(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, results(eqn, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def purely(fun: Callable[..., Any], *args: Any) -> Any:
    """Runs `fun(*args)`, which may create references, in a pure form without references.

    The references become arrays that are threaded through its loops. Unlike references, arrays can be batched,
    differentiated and rematerialised. XLA receives the same program either way.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    pure = _discharged(closed)
    return jax.tree.unflatten(jax.tree.structure(shapes), core.jaxpr_as_fun(pure)(*jax.tree.leaves(args)))


def parts(eqn: core.JaxprEqn) -> Iterator[Any]:
    """The parameters of an equation, with tuples and lists flattened one level."""
    for param in eqn.params.values():
        yield from param if isinstance(param, (tuple, list)) else (param,)


def bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls."""
    for part in parts(eqn):
        if isinstance(part, (core.Jaxpr, core.ClosedJaxpr)):
            yield part.jaxpr if isinstance(part, core.ClosedJaxpr) else part


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The equations of a jaxpr, including those of the jaxprs it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def reached(jaxpr: core.Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """For each output, whether it may depend on a marked input; an equation's results depend on all its operands."""
    marked = {var for var, is_marked in zip(jaxpr.invars, inputs, strict=True) if is_marked}
    is_marked = lambda atom: isinstance(atom, core.Var) and atom in marked
    for eqn in jaxpr.eqns:
        if any(map(is_marked, eqn.invars)):
            marked.update(eqn.outvars)
    return [is_marked(atom) for atom in jaxpr.outvars]


def pruned(closed: core.ClosedJaxpr, output: int) -> tuple[core.ClosedJaxpr, list[bool]]:
    """(the jaxpr of one output and of the equations with effects, for each input whether it is still one)."""
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [i == output for i in range(len(closed.jaxpr.outvars))])
    return core.ClosedJaxpr(jaxpr, closed.consts), used


def names_axis(jaxpr: core.Jaxpr, names: Iterable[str]) -> bool:
    """Whether `jaxpr` communicates over one of the mapped axes `names`, or reads a device's index on it."""
    named = lambda axis: axis if isinstance(axis, tuple) else (axis,)
    indices = (eqn.params["axis_name"] for eqn in equations(jaxpr) if eqn.primitive.name == "axis_index")
    return not set(names).isdisjoint(itertools.chain(*map(axes, jaxpr.eqns), *map(named, indices)))


def axes(eqn: core.JaxprEqn) -> set[Any]:
    """The mapped axes that an equation, or a jaxpr it calls, communicates over."""
    if eqn.primitive.name in ("axis_index", "pvary"):
        return set()
    names = [eqn.params.get(name, ()) for name in ("axis_name", "axes")]
    found = {
        # Integers are axes of an array; names are any other hashable.
        axis
        for given in names
        for axis in (given if isinstance(given, tuple) else (given,))
        if not isinstance(axis, int)
    }
    return found.union(*(axes(inner) for body in bodies(eqn) for inner in body.eqns))
