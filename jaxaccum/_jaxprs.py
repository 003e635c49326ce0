"""Equations of jaxprs: what they are, and how to run them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.state import discharge  # Has no public name.
from jax.extend import core

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
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def evaluate(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    results: Callable[[core.JaxprEqn, list[Any]], Sequence[Any]],
    entry: Callable[[Any], Any],
) -> list[Any]:
    """The outputs of `jaxpr`, equation by equation, in what stands for its values; a plain jit is looked into.

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
        if is_plain_jit(eqn):
            body = eqn.params["jaxpr"]
            outputs = evaluate(body.jaxpr, body.consts, operands, results, entry)
        else:
            outputs = results(eqn, operands)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def purely(fun: Callable[..., Any], *args: Any) -> Any:
    """`fun(*args)`, which may make references of its own, without any.

    What it does with them becomes arrays that are threaded through its loops. Those can be batched, differentiated and
    rematerialised; references can't. XLA is given the same program either way.
    """
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    pure = discharge.discharge_state(closed)
    return jax.tree.unflatten(jax.tree.structure(shapes), core.jaxpr_as_fun(pure)(*jax.tree.leaves(args)))


def bodies(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The functions that an equation calls."""
    for param in eqn.params.values():
        for value in param if isinstance(param, (tuple, list)) else (param,):
            if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
                yield value.jaxpr if isinstance(value, core.ClosedJaxpr) else value


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
    for value in eqn.params.values():
        for closed in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = closed.jaxpr if isinstance(closed, core.ClosedJaxpr) else closed
            if isinstance(jaxpr, core.Jaxpr):
                found = found.union(*map(axes, jaxpr.eqns))
    return found
