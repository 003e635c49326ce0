"""What depends on the parameters alone, once a window: forward before the loop, its transpose after it, on the sum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Tree = Any


def once(prepare: Callable[[Tree], Tree], params: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """`prepare(params)`, and the function that carries a gradient back from there to the parameters.

    A gradient is linear in its cotangents, so the map back commutes with the sum over the window. Where the last thing
    that `prepare` does to a leaf is to narrow its dtype, the way back takes the sum as wide as it is: the transpose
    of that cast would round it.

    Args:
      prepare: a differentiable function of the parameters.
      params: the parameters.

    Returns:
      (what the loss sees, transpose). `transpose` takes a tree like the former, of any floating dtypes.
    """
    closed, shapes = jax.make_jaxpr(prepare, return_shape=True)(params)
    narrow, treedef = jax.tree.flatten(shapes)
    wide, vjp = jax.vjp(core.jaxpr_as_fun(_without_last_casts(closed)), *jax.tree.leaves(params))
    prepared = [x.astype(shape.dtype) for x, shape in zip(wide, narrow, strict=True)]

    def transpose(grads: Tree) -> Tree:
        cotangents = [g.astype(x.dtype) for g, x in zip(jax.tree.leaves(grads), wide, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), vjp(cotangents))

    return jax.tree.unflatten(treedef, prepared), transpose


def _without_last_casts(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """`closed` with each output taken from before the narrowing casts that end in it."""
    casts = {
        eqn.outvars[0]: eqn.invars[0]
        for eqn in closed.jaxpr.eqns
        if eqn.primitive.name == "convert_element_type"
        and _narrows(eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
    }

    def before(var):
        return before(casts[var]) if not isinstance(var, core.Literal) and var in casts else var

    return closed.replace(jaxpr=closed.jaxpr.replace(outvars=[before(var) for var in closed.jaxpr.outvars]))


def _narrows(old: Any, new: Any) -> bool:
    floating = jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)
    return floating and jnp.promote_types(old, new) == old
