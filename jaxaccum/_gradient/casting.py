"""`cast`, a ready-made `prepare`: mixed precision that casts the parameters once per window."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._jax import core, jaxprs
from jaxaccum._sums import modules
from jaxaccum._types import Tree

_PRODUCTS = frozenset(["conv_general_dilated", "dot_general", "ragged_dot_general"])


@dataclasses.dataclass(frozen=True)
class Cast:
    """The result of `cast`; `value_and_grad` calls its `seeing` with the loss."""

    dtype: Any
    where: Callable[[str, Any], bool] | None

    def __call__(self, params: Tree) -> Tree:
        """Casts the selected leaves of `params` to `dtype`."""
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
        """Selects the leaves to cast for `loss(params, *args)`, which is traced and not run.

        `value_and_grad` calls this automatically. Call it yourself for `MultiSteps(prepare=...)`, whose state is
        created before it sees a loss.

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
        params, rest = modules.parted(params)
        names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        jaxpr = jax.make_jaxpr(lambda params, *args: loss(modules.combined(params, rest), *args))(params, *args).jaxpr
        others = [set()] * (len(jaxpr.invars) - len(names))
        wide, _ = _summed(jaxpr, [*({name} for name in names), *others])
        return dataclasses.replace(self, where=lambda path, leaf: leaf.ndim >= 2 and path not in wide)


def cast(dtype: Any, where: Callable[[str, Any], bool] | None = None) -> Cast:
    """A `prepare` for `value_and_grad` that casts parameters to `dtype` once per window and sums gradients in float32.

    The gradient of a cast leaf is computed in `dtype` for each micro-batch, as if the loss did the cast, or in float32
    where `in_place` selects that. The sum is converted back to the parameter's dtype without rounding to `dtype`.

    By default, leaves with fewer than two dimensions are not cast (norms and biases; in a scan over layers, those of
    each layer). Leaves whose gradient within one micro-batch is a running sum are not cast either, since bfloat16 is
    too narrow for such a sum: 1,024 ones add up to 256. These are:

    * leaves that the loss gathers from, such as an embedding, tied or not: the gradient of a gather is a scatter-add;
    * leaves that a loop reuses in each iteration, such as a recurrent kernel, or a head applied chunk by chunk.

    The loss must choose the dtype that it computes in, as flax's layers do with `dtype=`.

    Example:
      >>> import jax.numpy as jnp, jaxaccum
      >>> loss = lambda params, x: jnp.mean((x.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) ** 2)
      >>> f = jaxaccum.value_and_grad(loss, 4, prepare=jaxaccum.cast(jnp.bfloat16))
      >>> value, grads = f({"w": jnp.ones((3, 2))}, jnp.ones((8, 3)))
      >>> print(value, grads["w"].dtype)
      9.0 float32

    Args:
      dtype: a floating dtype, for example `jnp.bfloat16`.
      where: `where(path, leaf)`, with a path such as "blocks/0/kernel", returns whether to cast a floating leaf. If
        given, it replaces the default rules. If not, the loss is traced twice; the first trace selects the leaves.

    Returns:
      The `prepare`.

    Raises:
      TypeError: if `dtype` is not floating or `where` is not callable.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"dtype must be floating, for example jnp.bfloat16, got {dtype!r}.")
    if where is not None and not callable(where):
        raise TypeError(f"where must be None or a function of (path, leaf), got {where!r}.")
    return Cast(jnp.dtype(dtype), where)


def _summed(jaxpr: core.Jaxpr, inputs: Sequence[set[str]]) -> tuple[set[str], list[set[str]]]:
    """(the leaves whose gradient is a running sum, the leaves each output stems from), given those of each input."""
    summed: set[str] = set()
    made_of = dict(zip(jaxpr.invars, inputs, strict=True))
    leaves = lambda atom: set() if isinstance(atom, core.Literal) else made_of.get(atom, set())
    for eqn in jaxpr.eqns:
        name, bodies = eqn.primitive.name, _bodies(eqn)
        operands = [leaves(atom) for atom in eqn.invars]
        if name == "gather":
            summed |= operands[0]
        elif name == "scan":
            # Constants receive a term from each iteration. Scanned-over operands are stacked layers, maybe of vectors.
            vectors = [of for of, var in zip(operands, bodies[0].invars, strict=True) if jaxprs.ndim(var) < 2]
            summed = summed.union(*operands[: jaxprs.scan_operands(eqn, bodies[0]).constants], *vectors)

        # A product's result is an activation, which stems from no leaf.
        own = set() if bodies or name in _PRODUCTS else set().union(*operands)
        outputs = [own] * len(eqn.outvars)
        for body in bodies:
            found, returned = _summed(body, operands[len(operands) - len(body.invars) :])
            summed |= found
            outputs = [old | new for old, new in zip(outputs, returned, strict=True)]
        made_of.update(zip(eqn.outvars, outputs, strict=True))
    return summed, [leaves(atom) for atom in jaxpr.outvars]


def _bodies(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """The functions that an equation calls with its operands; a conditional's index is not passed on."""
    arity = len(eqn.invars) - (eqn.primitive.name == "cond"), len(eqn.outvars)
    return [body for body in jaxprs.bodies(eqn) if (len(body.invars), len(body.outvars)) == arity]


def _name(path: Any) -> str:
    # nnx and linen box parameters; the box's field is not part of the name.
    boxed = bool(path) and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[: len(path) - boxed], simple=True, separator="/")
