"""Calls outside of jit: traced each time, compiled once for equal programs."""

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

# By what tells one program from another: a function that jax has compiled.
_PROGRAMS: collections.OrderedDict[Any, Callable[..., list[Any]]] = collections.OrderedDict()
_MOST = 64
_LARGE = 2**20  # bytes


def run(fun: Callable[..., Any], *args: Any) -> Any:
    """`fun(*args)`, in one compiled program if this is called outside of jit and of any other transformation.

    A loop in a closure is another function to jax in each call, which compiles it anew. Here `fun` is traced in each
    call, so that it may close over what changes, and what compiled before for the same program runs again. Arrays that
    it closes over are not traced, so code may branch on them, and are inputs of the program.

    Args:
      fun: a pure function of the arrays in `args`.
      *args: trees; what is neither an array nor a float is passed as it is.
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
    program = functools.partial(_evaluate, closed.jaxpr)
    if not closed.effects and all(map(_can_be_told, jaxprs.equations(closed.jaxpr))):
        program = _compiled(program, closed, arrays)
    return jax.tree.unflatten(jax.tree.structure(shapes), program(closed.consts, arrays))


def _evaluate(jaxpr, consts, arrays):
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*arrays)


def _compiled(program: Callable[..., list[Any]], closed: core.ClosedJaxpr, arrays: list[Any]) -> Callable[..., Any]:
    """`program`, or an equal one of before."""
    jitted = jax.jit(program)
    text = jitted.lower(closed.consts, arrays).as_text()
    # The text says neither which devices a program is for nor of what type its keys are.
    types = tuple(str(aval) for aval in (*map(jax.typeof, closed.consts), *closed.in_avals, *closed.out_avals))
    key = hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))
    known = _PROGRAMS.setdefault(key, jitted)
    _PROGRAMS.move_to_end(key)
    if len(_PROGRAMS) > _MOST:
        _PROGRAMS.popitem(last=False)
    return known


def _can_be_told(eqn: core.JaxprEqn) -> bool:
    """Whether the text of a program tells this equation from any other, and keeping it takes little memory."""
    consts = [x for param in jaxprs.parts(eqn) for x in (param.consts if isinstance(param, core.ClosedJaxpr) else ())]
    is_large = sum(getattr(x, "nbytes", 0) for x in consts) > _LARGE
    # A callback is a Python function.
    return "callback" not in eqn.primitive.name and not is_large


def _places(jaxpr: core.Jaxpr) -> list[Any]:
    """The meshes and shardings in a jaxpr."""
    parts = (part for eqn in jaxprs.equations(jaxpr) for part in jaxprs.parts(eqn))
    return [part for part in parts if isinstance(part, (Mesh, Sharding))]
