"""Calls outside of jit: traced each time, compiled once for equal programs."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.core import trace_state_clean
from jax.extend import core

from jaxaccum import _jaxprs

# By the text of the program: a function of it that jax has compiled.
_PROGRAMS: collections.OrderedDict[str, Callable[..., list[Any]]] = collections.OrderedDict()
_MOST = 256


def run(fun: Callable[..., Any], *args: Any) -> Any:
    """`fun(*args)`, in one compiled program if this is called outside of jit and of any other transformation.

    A loop in a closure is another function to jax in each call, which compiles it anew. Here `fun` is traced in each
    call, so that it may close over what changes, and what compiled before for the same program runs again.

    Args:
      fun: a pure function of the arrays in `args`.
      *args: trees; what is no array is passed as it is.
    """
    if not trace_state_clean() or jax.config.values["jax_disable_jit"]:
        return fun(*args)
    leaves, treedef = jax.tree.flatten(args)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]

    def of_arrays(arrays):
        given = iter(arrays)
        full = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        return fun(*treedef.unflatten(full))

    closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
    # A callback is a Python function, which the text of a program does not tell from another.
    program = functools.partial(_evaluate, closed.jaxpr)
    if not closed.effects and not _has_callback(closed.jaxpr):
        program = _compiled(program, closed.consts, arrays)
    return jax.tree.unflatten(jax.tree.structure(shapes), program(closed.consts, arrays))


def _evaluate(jaxpr, consts, arrays):
    return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, consts))(*arrays)


def _compiled(program: Callable[..., list[Any]], *args: Any) -> Callable[..., list[Any]]:
    """`program`, or an equal one of before."""
    jitted = jax.jit(program)
    text = jitted.lower(*args).as_text()
    known = _PROGRAMS.setdefault(text, jitted)
    _PROGRAMS.move_to_end(text)
    if len(_PROGRAMS) > _MOST:
        _PROGRAMS.popitem(last=False)
    return known


def _has_callback(jaxpr: core.Jaxpr) -> bool:
    return any("callback" in eqn.primitive.name or any(map(_has_callback, _jaxprs.bodies(eqn))) for eqn in jaxpr.eqns)
