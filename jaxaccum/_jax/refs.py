"""References that a backward pass adds to."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxaccum._jax import core, jaxprs

# jax 0.9 doesn't transpose a `jax.checkpoint` to references.
REACH_CHECKPOINTS = jax.__version_info__ >= (0, 10)


def reach(scan: core.JaxprEqn) -> bool:
    """Whether the backward pass of a scan can add to references."""
    return REACH_CHECKPOINTS or not any(
        jaxprs.is_checkpoint(eqn) for body in jaxprs.bodies(scan) for eqn in jaxprs.equations(body)
    )


def backward(vjp: Any, cotangent: jax.Array, inside: Sequence[bool], pending: Sequence[Any]) -> list[Any]:
    """Runs `vjp`, of one list of leaves, on `cotangent`; for leaves marked `inside`, returns the new sum instead.

    It uses references, which not every transformation supports: see `jaxprs.purely`.
    """
    # If a slot is not a reference, `with_refs` returns the gradient.
    slots: list[Any] = [jax.new_ref(x) if added else 0.0 for x, added in zip(pending, inside, strict=True)]
    (grads,) = vjp.with_refs(slots)(cotangent)
    return [jax.freeze(slot) if added else grad for grad, slot, added in zip(grads, slots, inside, strict=True)]
