"""Equations of jaxprs: what they are, and how to run them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import source_info_util  # These two have no public names.
from jax._src.state import discharge

from jaxaccum._jax import core

# What only moves numbers about: it commutes with a cast, forward and back.
_IN_SHAPE = ("broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "tile", "transpose")
_IN_PARTS = ("concatenate", "slice", "split", "stack", "unstack")
_IN_PLACE = ("all_gather", "all_gather_invariant", "copy", "device_put", "pvary", "reshard", "sharding_constraint")
MOVES = frozenset([*_IN_SHAPE, *_IN_PARTS, *_IN_PLACE])


class ScanOperands(NamedTuple):
    """How many of a scan's operands are what; what it walks along follows."""

    constants: int
    carries: int


def scan_operands(scan: core.JaxprEqn, body: core.Jaxpr) -> ScanOperands:
    """Told by shapes, since jax's versions disagree: constants and carries go in whole, and carries come out whole."""
    whole = lambda outer, inner: sum(ndim(a) == ndim(b) for a, b in zip(outer, inner, strict=True))
    carries = whole(scan.outvars, body.outvars)
    return ScanOperands(whole(scan.invars, body.invars) - carries, carries)


def ndim(atom: Any) -> int:
    """The number of dimensions of a variable or a literal."""
    return len(atom.aval.shape)


def dtype(atom: Any) -> Any:
    """The dtype of a variable or a literal."""
    return atom.aval.dtype


def is_plain_jit(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a jit without shardings of its own, and may as well run equation by equation."""
    if eqn.primitive.name != "jit":
        return False
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return not any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)


def is_checkpoint(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a `jax.checkpoint`."""
    return eqn.primitive.name in ("checkpoint", "remat", "remat2")


def checkpointed(eqn: core.JaxprEqn, body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` under a `jax.checkpoint` like `eqn`."""
    return jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def run(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of one equation."""
    with located(eqn):
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


@contextlib.contextmanager
def located(eqn: core.JaxprEqn) -> Iterator[None]:
    """What is traced inside has the named scopes and the traceback of `eqn`."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


class Jits:
    """The jitted functions of a program that is made anew from a jaxpr.

    Where the jaxpr calls one function many times, so does the program: it is traced and lowered once, under its name.
    """

    def __init__(self):
        self._functions: dict[Any, tuple[Any, Any]] = {}

    def call(self, eqn: core.JaxprEqn, key: Any, fun: Callable[[Any], Any], operands: Any) -> Any:
        """`fun(operands)` under a jit like that of `eqn`, which calls with an equal key share."""
        closed = eqn.params["jaxpr"]
        key = id(closed), key, jax.tree.structure(operands)
        if key not in self._functions:
            fun.__name__ = eqn.params["name"]
            self._functions[key] = jax.jit(fun), closed  # Kept, so that no other jaxpr takes its id.
        with located(eqn):
            return self._functions[key][0](operands)


def evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    results: Callable[[core.JaxprEqn, list[Any]], Sequence[Any]],
    entry: Callable[[Any], Any],
) -> list[Any]:
    """The outputs of `jaxpr`, equation by equation, in what stands for its values.

    Args:
      jaxpr: what to evaluate.
      consts: its constants, arrays.
      inputs: what stands for its inputs.
      results: `results(eqn, operands)` is what stands for the results of an equation.
      entry: what stands for an array of which nothing more is known: a constant, or a literal.
    """
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values |= dict(zip(jaxpr.constvars, map(entry, consts), strict=True))
    read = lambda atom: entry(atom.val) if isinstance(atom, core.Literal) else values[atom]
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        values.update(zip(eqn.outvars, results(eqn, operands), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def purely(fun: Callable[..., Any], *args: Any) -> Any:
    """`fun(*args)`, which may make references of its own, without any.

    What it does with them becomes arrays that are threaded through its loops. Those can be batched, differentiated and
    rematerialised; references can't. XLA is given the same program either way.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    pure = discharge.discharge_state(closed)
    return jax.tree.unflatten(jax.tree.structure(shapes), core.jaxpr_as_fun(pure)(*jax.tree.leaves(args)))


def parts(eqn: core.JaxprEqn) -> Iterator[Any]:
    """The parameters of an equation; of a tuple or a list each entry."""
    for param in eqn.params.values():
        yield from param if isinstance(param, (tuple, list)) else (param,)


def bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The functions that an equation calls."""
    for part in parts(eqn):
        if isinstance(part, (core.Jaxpr, core.ClosedJaxpr)):
            yield part.jaxpr if isinstance(part, core.ClosedJaxpr) else part


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The equations of a jaxpr and of all that it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def reached(jaxpr: core.Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """For each output whether it may depend on one of the marked inputs: each result of an equation on all operands."""
    marked = {var for var, is_marked in zip(jaxpr.invars, inputs, strict=True) if is_marked}
    is_marked = lambda atom: isinstance(atom, core.Var) and atom in marked
    for eqn in jaxpr.eqns:
        if any(map(is_marked, eqn.invars)):
            marked.update(eqn.outvars)
    return [is_marked(atom) for atom in jaxpr.outvars]


def axes(eqn: core.JaxprEqn) -> set[str]:
    """The mapped axes that an equation communicates over, in itself or in what it calls."""
    if eqn.primitive.name in ("axis_index", "pvary"):
        return set()
    names = [eqn.params.get(name, ()) for name in ("axis_name", "axes")]
    found = {
        axis for given in names for axis in (given if isinstance(given, tuple) else (given,)) if isinstance(axis, str)
    }
    return found.union(*(axes(inner) for body in bodies(eqn) for inner in body.eqns))
