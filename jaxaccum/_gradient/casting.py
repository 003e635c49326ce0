"""`cast`, a ready `prepare`: mixed precision with one cast of the parameters a window."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._jax import core, jaxprs
from jaxaccum._types import Tree

# What mixes the entries of a parameter with so much else that its result is an activation.
_PRODUCTS = frozenset(["conv_general_dilated", "dot_general", "ragged_dot_general"])


@dataclasses.dataclass(frozen=True)
class Cast:
    """What `cast` returns; `value_and_grad` shows it the loss."""

    dtype: Any
    where: Callable[[str, Any], bool] | None

    def __call__(self, params: Tree) -> Tree:
        """`params` with the chosen leaves in `dtype`."""
        if self.where is None:
            raise TypeError(
                "cast() chooses by looking at the loss, and only value_and_grad shows it that by itself; elsewhere say "
                "where=, such as where=lambda path, leaf: leaf.ndim >= 2, or cast(dtype).seeing(loss, params, batch)."
            )

        def leaf(path, x):
            chosen = jnp.issubdtype(x.dtype, jnp.floating) and self.where(_name(path), x)
            return x.astype(self.dtype) if chosen else x

        return jax.tree.map_with_path(leaf, params)

    def seeing(self, loss: Callable[..., Any], params: Tree, *args: Any) -> "Cast":
        """This cast with its choice made for `loss(params, *args)`, which is traced and not run.

        `value_and_grad` does this by itself. For `MultiSteps(prepare=...)`, whose state is made before it sees a loss:

        Example:
          >>> import jax.numpy as jnp, optax, jaxaccum
          >>> loss = lambda params, x: jnp.mean((x.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) ** 2)
          >>> params = {"w": jnp.ones((3, 2))}
          >>> cast = jaxaccum.cast(jnp.bfloat16).seeing(loss, params, jnp.ones((4, 3)))
          >>> print(jaxaccum.MultiSteps(optax.sgd(0.1), 4, prepare=cast).init(params).prepared[0].dtype)
          bfloat16
        """
        if self.where is not None:
            return self
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        jaxpr = jax.make_jaxpr(loss)(params, *args).jaxpr
        others = [set()] * (len(jaxpr.invars) - len(names))
        wide, _ = _summed(jaxpr, [*({name} for name in names), *others])
        return dataclasses.replace(self, where=lambda path, leaf: leaf.ndim >= 2 and path not in wide)


def cast(dtype: Any, where: Callable[[str, Any], bool] | None = None) -> Cast:
    """A `prepare` for `value_and_grad`: parameters cast to `dtype` once a window, their gradient summed in float32.

    The gradient of a cast leaf is formed in `dtype` for each micro-batch, as it is where the loss casts, or in float32
    where `in_place` has it so, and its sum goes back to the parameter's dtype unrounded. By default leaves of fewer
    than two dimensions stay as they are (norms and biases; in a scan over layers, those of each layer), and so do
    leaves whose gradient within one micro-batch is a running sum, which is not to be had in bfloat16, where 1,024 ones
    make 256:

    * what the loss gathers from, such as an embedding, tied or not: the gradient of a gather is a scatter-add;
    * what a loop uses again in each iteration, such as a recurrent kernel, or a head applied to chunk after chunk.

    The loss must say itself in which dtype it computes, as flax's layers do with `dtype=`.

    Args:
      dtype: a floating dtype, for example `jnp.bfloat16`.
      where: `where(path, leaf)`, with the path as in "blocks/0/kernel", says whether to cast a floating leaf; given,
        it alone decides. Without it the loss is traced twice, the first time to be looked at.

    Returns:
      The `prepare`.

    Raises:
      TypeError: if `dtype` is not floating or `where` is not callable.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> loss = lambda params, x: jnp.mean((x.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) ** 2)
      >>> f = jaxaccum.value_and_grad(loss, 4, prepare=jaxaccum.cast(jnp.bfloat16))
      >>> value, grads = f({"w": jnp.ones((3, 2))}, jnp.ones((8, 3)))
      >>> print(value, grads["w"].dtype)
      9.0 float32
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"dtype must be floating, for example jnp.bfloat16, got {dtype!r}.")
    if where is not None and not callable(where):
        raise TypeError(f"where must be None or a function of (path, leaf), got {where!r}.")
    return Cast(jnp.dtype(dtype), where)


def _summed(jaxpr: core.Jaxpr, inputs: Sequence[set[str]]) -> tuple[set[str], list[set[str]]]:
    """Which leaves have a gradient that is a running sum in their own dtype, and which leaves each output is made of.

    `inputs` says which leaves each input is made of. A product ends that: what comes out of it is an activation.
    """
    summed: set[str] = set()
    made_of = dict(zip(jaxpr.invars, inputs, strict=True))
    leaves = lambda atom: set() if isinstance(atom, core.Literal) else made_of.get(atom, set())
    for eqn in jaxpr.eqns:
        name, bodies = eqn.primitive.name, _bodies(eqn)
        operands = [leaves(atom) for atom in eqn.invars]
        if name == "gather":
            summed |= operands[0]
        elif name == "scan":
            # A constant gets a term from each iteration. A stack of layers is walked along, and may be one of vectors.
            vectors = [of for of, var in zip(operands, bodies[0].invars, strict=True) if jaxprs.ndim(var) < 2]
            summed = summed.union(*operands[: jaxprs.scan_operands(eqn, bodies[0]).constants], *vectors)

        own = set() if bodies or name in _PRODUCTS else set().union(*operands)
        outputs = [own] * len(eqn.outvars)
        for body in bodies:
            found, returned = _summed(body, operands[len(operands) - len(body.invars) :])
            summed |= found
            outputs = [old | new for old, new in zip(outputs, returned, strict=True)]
        made_of.update(zip(eqn.outvars, outputs, strict=True))
    return summed, [leaves(atom) for atom in jaxpr.outvars]


def _bodies(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """The functions that an equation calls with its operands; a conditional keeps the first, its index, to itself."""
    arity = len(eqn.invars) - (eqn.primitive.name == "cond"), len(eqn.outvars)
    return [body for body in jaxprs.bodies(eqn) if (len(body.invars), len(body.outvars)) == arity]


def _name(path: Any) -> str:
    # nnx and linen keep a parameter in a box, whose field is no part of its name.
    boxed = bool(path) and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[: len(path) - boxed], simple=True, separator="/")
