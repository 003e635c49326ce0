"""What a loss function may return, in one form for both drivers: a plain scalar, or a `Weighted`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxaccum import _accumulator, _checks, _jaxprs
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


class Traced(NamedTuple):
    """A loss, and its trace for some arguments.

    Attributes:
      total: the loss as `total` gives it.
      args: the arguments that it was traced with, the parameters first.
      closed: the trace: from flat arguments to flat results.
      shapes: the shapes of the results, `(the loss's total, (loss, rest))`.
    """

    total: Callable[..., tuple[Any, tuple[Weighted, Any]]]
    args: tuple[Tree, ...]
    closed: core.ClosedJaxpr
    shapes: Any

    @property
    def has_weight(self) -> bool:
        """Whether the loss is a `Weighted`."""
        return self.shapes[1][0].weight is not None

    def weight_varies(self) -> bool:
        """Whether the weight has a derivative with respect to the parameters that is not symbolically zero.

        What comes of comparisons, of integers and of `stop_gradient` has none.
        """
        if not self.has_weight:
            return False
        leaves, count = jax.tree.leaves(self.args), jax.tree.structure(self.args[0]).num_leaves
        is_varied = [i < count and _accumulator.is_inexact(x) for i, x in enumerate(leaves)]
        if not _jaxprs.reached(self.closed.jaxpr, is_varied)[_WEIGHT]:
            return False

        def weight(varied):
            inputs = iter(varied)
            flat = [next(inputs) if varies else x for x, varies in zip(leaves, is_varied, strict=True)]
            return core.jaxpr_as_fun(self.closed)(*flat)[_WEIGHT]

        varied = [x for x, varies in zip(leaves, is_varied, strict=True) if varies]
        tangent = lambda varied, tangents: jax.jvp(weight, (varied,), (tangents,))[1]
        tangents = [False] * len(varied) + [True] * len(varied)
        return _jaxprs.reached(jax.make_jaxpr(tangent)(varied, varied).jaxpr, tangents)[0]

    def refuse_varying_weight(self) -> None:
        """A stream of micro-batches has no place for the derivative of a weight.

        Raises:
          ValueError: if there is one.
        """
        if self.weight_varies():
            raise ValueError(
                "the weight of the Weighted loss depends on the parameters, and its derivative is part of the gradient "
                "of Σ total / Σ weight, which sums of one micro-batch after another can't hold. Use "
                "jaxaccum.value_and_grad, which computes it, or jax.lax.stop_gradient(weight) to leave it out."
            )


# Where the weight is among the flat results of `total`: (total, (Weighted(total, weight), rest)).
_WEIGHT = 2


def trace(fun: Callable[..., Any], *args: Any) -> Traced:
    """Traces `fun`, as for `total`, with `args`, the parameters first; nothing is run."""
    normalised = total(fun)
    closed, shapes = jax.make_jaxpr(normalised, return_shape=True)(*args)
    return Traced(normalised, args, closed, shapes)


def value_and_grad(fun: Callable[..., Any]) -> Callable[..., tuple[tuple[Weighted, Any], Tree]]:
    """`jax.value_and_grad` of such a loss: returns `((loss, rest), gradient of its total)`.

    The weight of a `Weighted` loss may not depend on the parameters.
    """

    def value_and_grad(*args, **kwargs):
        trace(functools.partial(fun, **kwargs), *args).refuse_varying_weight()
        (_, returned), grads = jax.value_and_grad(total(fun), has_aux=True)(*args, **kwargs)
        return returned, grads

    return value_and_grad


def less(fun: Callable[..., Any], mean: Any) -> Callable[..., Any]:
    """`fun` with `total - mean·weight` for its total.

    The derivative of Σ total / Σ weight is that of Σ (total - mean·weight) / Σ weight, if `mean` is the value of the
    former, held constant. So the weight's derivative needs no sums of its own.
    """

    def fun_less_mean(*args):
        loss, rest = fun(*args)
        total = jnp.asarray(loss.total)
        return Weighted((total - mean * loss.weight).astype(total.dtype), loss.weight), rest

    return fun_less_mean


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
