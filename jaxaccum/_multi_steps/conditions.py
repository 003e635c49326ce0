"""Conditions that are Python bools where they are known during tracing, and traced bools otherwise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._types import Tree


def known(flag: Any) -> Any:
    """Converts `flag` to a Python bool, unless it is traced."""
    return flag if isinstance(flag, jax.core.Tracer) else bool(flag)


def both(a: Any, b: Any) -> Any:
    """`a and b`, a Python bool if either operand determines it."""
    if isinstance(a, bool):
        return b if a else False
    return a if b is True else (False if b is False else jnp.logical_and(a, b))


def branch(pred: Any, close: Callable[[], Tree], stay: Callable[[], Tree]) -> Tree:
    """`close()` if `pred`, else `stay()`; a traced `pred` makes a conditional.

    The barrier prevents XLA:GPU from turning the conditional into selects, which would run both branches.
    """
    if isinstance(pred, bool):
        return close() if pred else stay()
    return jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)
