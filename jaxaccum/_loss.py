"""What a loss function may return, in one form for both drivers: a plain scalar, or a `Weighted`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum import _accumulator, _checks
from jaxaccum._accumulator import Weighted

Tree = Any


def total(fun: Callable[..., Any]) -> Callable[..., tuple[Any, tuple[Weighted, Any]]]:
    """`fun`, which returns `(loss, rest)`, the loss plain or `Weighted`, in the form to differentiate.

    Returns:
      A function that returns `(the loss's total, (loss, rest))`: the loss as a `Weighted`, whose weight is None where
      it was plain.
    """

    def total(*args, **kwargs):
        loss, rest = fun(*args, **kwargs)
        loss = loss if isinstance(loss, Weighted) else Weighted(loss, None)
        _checks.total(loss.total)
        if loss.weight is not None:
            _checks.weight(loss.weight)
        return loss.total, (loss, rest)

    return total


def value_and_grad(fun: Callable[..., Any]) -> Callable[..., tuple[tuple[Weighted, Any], Tree]]:
    """`jax.value_and_grad` of such a loss: returns `((loss, rest), gradient of its total)`."""

    def value_and_grad(*args, **kwargs):
        (_, returned), grads = jax.value_and_grad(total(fun), has_aux=True)(*args, **kwargs)
        return returned, grads

    return value_and_grad


def mean(loss: Weighted) -> jax.Array:
    """Total over weight; 0 where the weight is 0, whatever the total holds."""
    if loss.weight is None:
        return loss.total
    weight = jnp.asarray(loss.weight).astype(_accumulator.weight_dtype())
    value = _accumulator.mean(Weighted(loss.total, weight), loss.total)
    return jnp.where(weight == 0, jnp.zeros_like(value), value)


def mean_gradient(loss: Weighted, grads: Tree) -> Tree:
    """The gradient of a `Weighted` loss's mean, from that of its total."""
    weight = jnp.asarray(loss.weight).astype(_accumulator.weight_dtype())
    return _accumulator.mean(Weighted(grads, weight), grads)
