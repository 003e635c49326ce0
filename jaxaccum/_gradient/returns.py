"""The form of what a loss returns: its value, its carry and aux."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices.topology import MappedAxis, OneDevice
from jaxaccum._jax import prng
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class Returns(NamedTuple):
    """The public arguments `has_aux` and `carry_argnums`."""

    has_aux: bool
    carry_argnums: int | Sequence[int] | None

    def unpack(self, returned: Any) -> tuple[Any, tuple[Tree, ...], Tree]:
        """Normalizes the result of `fun` to (loss, new carry, aux), with () for no carry and None for no aux."""
        has_aux, carry_argnums = self
        has_carry = carry_argnums is not None
        if not has_aux and not has_carry:
            return returned, (), None

        def pair(value):
            if not isinstance(value, (tuple, list)) or isinstance(value, Weighted) or len(value) != 2:
                form = (
                    "(loss, (new_carry, aux))"
                    if has_aux and has_carry
                    else "(loss, new_carry)"
                    if has_carry
                    else "(loss, aux)"
                )
                got = "a single array" if isinstance(value, jax.Array) else f"a {type(value).__name__}"
                raise TypeError(f"with {has_aux=} and {carry_argnums=} fun must return {form}, got {got}.")
            return value

        value, rest = pair(returned)
        if not has_carry:
            return value, (), rest
        carry, aux = pair(rest) if has_aux else (rest, None)
        return value, (carry,) if isinstance(carry_argnums, int) else tuple(carry), aux

    def pack(self, value: Any, carry: Sequence[Tree], aux: Tree) -> Any:
        """The inverse of `unpack`."""
        if self.carry_argnums is None:
            return (value, aux) if self.has_aux else value
        rest = carry[0] if isinstance(self.carry_argnums, int) else tuple(carry)
        return value, ((rest, aux) if self.has_aux else rest)


class Carry(NamedTuple):
    """A carry, as leaves: loops compare tree structures, and not every pytree class supports comparison."""

    leaves: list[jax.Array]
    structure: Any

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> "Carry":
        """The carry arguments."""
        leaves, structure = jax.tree.flatten(tuple(trees))
        return cls(list(map(strong, leaves)), structure)

    def local(self, device: OneDevice | MappedAxis) -> list[jax.Array]:
        """The leaves on one device, with keys of its own."""
        return prng.fold_beyond_first(device.local(self.leaves), device.index())

    def trees(self, leaves: Sequence[Any]) -> tuple[Tree, ...]:
        """The arguments with these leaves."""
        return self.structure.unflatten(leaves)

    def renewed(self, new: tuple[Tree, ...]) -> list[jax.Array]:
        """The leaves of the new carry, checked to match the old one's tree, shapes and dtypes."""
        old = self.trees(self.leaves)
        flat = jax.tree_util.tree_leaves_with_path
        types = lambda tree: [(path, jnp.shape(x), jnp.result_type(x)) for path, x in flat(tree)]
        if types(new) != types(old):
            shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
            raise ValueError(
                f"fun must return a new carry of the same tree, shapes and dtypes: carry_argnums passed {shapes(old)}, "
                f"fun returned {shapes(new)}."
            )
        return list(map(strong, jax.tree.leaves(new)))


def strong(x: Any) -> jax.Array:
    """`x` as an array without a weak type, which would make a loop or a jitted function trace twice."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if jax.typeof(x).weak_type else x
