"""References that a backward pass adds to."""

from collections.abc import Sequence
from typing import Any

import jax


def backward(vjp: Any, cotangent: jax.Array, inside: Sequence[bool], pending: Sequence[Any]) -> list[Any]:
    """Runs `vjp`, of one list of leaves, on `cotangent`; for leaves marked `inside`, returns the new sum instead.

    It uses references, which not every transformation supports: see `jaxprs.purely`.
    """
    # If a slot is not a reference, `with_refs` returns the gradient.
    slots: list[Any] = [jax.new_ref(x) if added else 0.0 for x, added in zip(pending, inside, strict=True)]
    (grads,) = vjp.with_refs(slots)(cotangent)
    return [jax.freeze(slot) if added else grad for grad, slot, added in zip(grads, slots, inside, strict=True)]
