"""`cast`, a ready `prepare`: mixed precision with one cast of the parameters a window."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Tree = Any

_VIEWS = frozenset(
    ["broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "slice", "squeeze", "transpose"]
)


@dataclasses.dataclass(frozen=True)
class Cast:
    """What `cast` returns; `value_and_grad` shows it the loss."""

    dtype: Any
    where: Callable[[str, Any], bool] | None

    def __call__(self, params: Tree) -> Tree:
        """`params` with the chosen leaves in `dtype`."""
        if self.where is None:
            raise TypeError(
                "cast() chooses by looking at the loss, so only value_and_grad can apply it; "
                "to use it elsewhere say where=, for example where=lambda path, leaf: leaf.ndim >= 2."
            )

        def leaf(path, x):
            chosen = jnp.issubdtype(x.dtype, jnp.floating) and self.where(_name(path), x)
            return x.astype(self.dtype) if chosen else x

        return jax.tree.map_with_path(leaf, params)

    def seeing(self, loss: Callable[..., Any], params: Tree, *args: Any) -> "Cast":
        """This cast with its choice made for `loss(params, *args)`, which is traced and not run."""
        if self.where is not None:
            return self
        paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        closed = jax.make_jaxpr(loss)(params, *args)
        gathered, _ = _gathered(closed.jaxpr, [{path} for path in paths])
        return dataclasses.replace(self, where=lambda path, leaf: leaf.ndim >= 2 and path not in gathered)


def cast(dtype: Any, where: Callable[[str, Any], bool] | None = None) -> Cast:
    """A `prepare` for `value_and_grad`: parameters cast to `dtype` once a window, their gradient summed in float32.

    The gradient of a cast leaf is formed in `dtype` for each micro-batch, as it is where the loss casts, and its sum
    goes back to the parameter's dtype unrounded. By default leaves of fewer than two dimensions stay (norms, biases),
    and so do those that the loss gathers rows from, as from an embedding: the gradient of a gather is a scatter-add,
    which in bfloat16 would lose all but the first few of a token's occurrences.

    Args:
      dtype: a floating dtype, for example `jnp.bfloat16`.
      where: `where(path, leaf)`, with the path as in "blocks/0/kernel", says whether to cast a floating leaf; given,
        it alone decides. Without it the loss is traced once more, to be looked at.

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


def _gathered(jaxpr: core.Jaxpr, inputs: list[set[str]]) -> tuple[set[str], list[set[str]]]:
    """Which of its sources `jaxpr` gathers from, directly or through a view, and which its outputs are views of.

    `inputs` holds the sources of its first inputs; the others have none.
    """
    found: set[str] = set()
    sources = dict(zip(jaxpr.invars, inputs, strict=False))
    of = lambda var: set() if isinstance(var, core.Literal) else sources.get(var, set())
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "gather":
            found |= of(eqn.invars[0])
        elif eqn.primitive.name in _VIEWS:
            sources[eqn.outvars[0]] = of(eqn.invars[0])
        for inner in _inner_jaxprs(eqn):
            # Inner arguments are the last of the equation's: a conditional's index and a loop's condition come first.
            arguments = eqn.invars[len(eqn.invars) - len(inner.invars) :]
            inner_found, outputs = _gathered(inner, [of(argument) for argument in arguments])
            found |= inner_found
            for var, output in zip(eqn.outvars, outputs, strict=False):
                sources[var] = of(var) | output
    return found, [of(var) for var in jaxpr.outvars]


def _inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    params = [p for param in eqn.params.values() for p in (param if isinstance(param, (tuple, list)) else [param])]
    opened = [p.jaxpr if isinstance(p, core.ClosedJaxpr) else p for p in params]
    return [p for p in opened if isinstance(p, core.Jaxpr)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
