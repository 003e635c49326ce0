"""What happens to each micro-batch's gradient between its backward pass and its addition to the sums."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._sums import norms, overwrites, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class Observed(NamedTuple):
    """Whether to compute its norm, and the function to apply to it, if any."""

    norms: bool
    transform: Callable[[Tree], Tree] | None

    def __bool__(self) -> bool:
        """Whether anything happens, so that no gradient can be added inside the backward pass."""
        return self.norms or self.transform is not None

    def check(self, in_place: bool | None) -> None:
        """Checks `transform_micro_gradient`, which excludes `in_place=True`."""
        if self.transform is not None and not callable(self.transform):
            raise TypeError(f"transform_micro_gradient must be None or a function, got {self.transform!r}.")
        if self.transform is not None and in_place:
            raise ValueError(
                "in_place=True can't be had with transform_micro_gradient, which needs each micro-batch's gradient "
                "before it is added: leave it at None."
            )

    def __call__(self, grads: Tree, weight: Any, counted: Any) -> tuple[Tree, Any]:
        """Returns (w·g as it is added, its norm and sums as by `norms.of_micro_batch` or None).

        Args:
          grads: the micro-batch's w·g.
          weight: its w; None is 1.
          counted: whether it counts; the norm is 0 if it doesn't.
        """
        found = norms.of_micro_batch(grads, weight, counted, weighted=True) if self.norms else None
        return (grads if self.transform is None else _transformed(self.transform, grads, weight)), found


def _transformed(transform: Callable[[Tree], Tree], grads: Tree, weight: Any) -> Tree:
    """w·transform(g), without rounding; overwritten statistics stay."""
    mean = grads if weight is None else traced_loss.mean_gradient(Weighted(None, weight), grads)
    mean = overwrites.without(mean)
    new = transform(mean)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if jax.tree.structure(new) != jax.tree.structure(mean) or shapes(new) != shapes(mean):
        raise ValueError(
            "transform_micro_gradient must return a tree like the gradient that it gets, with leaves of shapes "
            f"{shapes(mean)}; it returned {shapes(new)}."
        )
    zeros = lambda x: jnp.zeros_like(x, dtype=weighted_sum.promoted(jnp.result_type(x), jnp.float32))
    return overwrites.either(weighted_sum.add(jax.tree.map(zeros, new), new, weight), overwrites.only(grads))
