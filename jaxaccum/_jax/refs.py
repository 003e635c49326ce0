"""References that a backward pass adds to."""

from collections.abc import Sequence
from typing import Any

import jax


def backward(vjp: Any, cotangent: jax.Array, inside: Sequence[bool], pending: Sequence[Any]) -> list[Any]:
    """The gradients that `vjp`, of one list of leaves, gives for `cotangent`; those `inside` as their new sums.

    It uses references, which not every transformation takes: see `jaxprs.purely`.
    """
    # For a slot that is no reference, `with_refs` returns the gradient.
    slots: list[Any] = [jax.new_ref(x) if added else 0.0 for x, added in zip(pending, inside, strict=True)]
    (grads,) = vjp.with_refs(slots)(cotangent)
    return [jax.freeze(slot) if added else grad for grad, slot, added in zip(grads, slots, inside, strict=True)]
