"""Runs functions outside jit: each call is traced, and equal programs are compiled once."""

import collections
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.core import trace_state_clean
from jax.sharding import Mesh, Sharding

from jaxaccum._jax import core, jaxprs

# Compiled functions, keyed by program text, types and shardings.
_PROGRAMS: collections.OrderedDict[Any, Callable[..., list[Any]]] = collections.OrderedDict()
_MOST = 64
_LARGE = 2**20  # bytes


def call_compiled(fun: Callable[..., Any], *args: Any) -> Any:
    """Runs `fun(*args)` as one compiled program if called outside jit and all other transformations.

    To jax, a closure is a new function in each call, so a loop in it would recompile each time. Here `fun`, a pure
    function of the arrays in `args`, is traced in each call, so it may close over values that change, and an equal
    program is compiled only once. Arrays in the closure are not traced, so code may branch on them; they become inputs
    of the program. Leaves of `args` that are neither arrays nor floats are passed through.
    """
    if not trace_state_clean() or jax.config.values["jax_disable_jit"]:
        return fun(*args)
    leaves, treedef = jax.tree.flatten(args)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray, float)) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]

    def of_arrays(arrays):
        given = iter(arrays)
        full = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        return fun(*treedef.unflatten(full))

    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
    program = functools.partial(_evaluate, closed.jaxpr)  # Without the constants, which the cache would keep alive.
    if not closed.effects and all(map(_can_be_told, jaxprs.equations(closed.jaxpr))):
        program = _compiled(program, closed, arrays)
    return jax.tree.unflatten(jax.tree.structure(shapes), program(closed.consts, arrays))


def _evaluate(jaxpr, consts, arrays):
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*arrays)


def _compiled(program: Callable[..., list[Any]], closed: core.ClosedJaxpr, arrays: list[Any]) -> Callable[..., Any]:
    """Returns the jitted `program`, or an equal one from the cache."""
    jitted = jax.jit(program)
    text = jitted.lower(closed.consts, arrays).as_text()
    # The text contains neither the program's devices nor the types of its keys.
    types = tuple(str(aval) for aval in (*map(jax.typeof, closed.consts), *closed.in_avals, *closed.out_avals))
    key = hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))
    known = _PROGRAMS.setdefault(key, jitted)
    _PROGRAMS.move_to_end(key)
    if len(_PROGRAMS) > _MOST:
        _PROGRAMS.popitem(last=False)
    return known


def _can_be_told(eqn: core.JaxprEqn) -> bool:
    """Whether the program text identifies this equation, and caching it takes little memory."""
    consts = [x for param in jaxprs.parts(eqn) for x in (param.consts if isinstance(param, core.ClosedJaxpr) else ())]
    is_large = sum(getattr(x, "nbytes", 0) for x in consts) > _LARGE
    # A callback's Python function is not in the text.
    return "callback" not in eqn.primitive.name and not is_large


def _places(jaxpr: core.Jaxpr) -> list[Any]:
    """The meshes and shardings in a jaxpr."""
    parts = (part for eqn in jaxprs.equations(jaxpr) for part in jaxprs.parts(eqn))
    return [part for part in parts if isinstance(part, (Mesh, Sharding))]
