"""What a loss function may return, in one form for both drivers: a plain scalar, or a `Weighted`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._jax import core, jaxprs, linearity, varying
from jaxaccum._sums import numeric, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class Traced(NamedTuple):
    """The trace of a loss: its Python code runs once, however often the loss is evaluated.

    Attributes:
      args: the arguments that it was traced with, the parameters first.
      closed: the trace, from flat arguments to flat results.
      shapes: the shapes of the results, `(the loss's total, (loss, rest))`.
    """

    args: tuple[Tree, ...]
    closed: core.ClosedJaxpr
    shapes: Any

    def total(self, *args: Tree) -> tuple[Any, tuple[Weighted, Any]]:
        """`(the loss's total, (loss, rest))`, in the form to differentiate.

        The loss is a `Weighted`, whose weight is None where it was plain.
        """
        return self.unflatten(core.jaxpr_as_fun(self.closed)(*jax.tree.leaves(args)))

    def unflatten(self, flat: Sequence[Any]) -> tuple[Any, tuple[Weighted, Any]]:
        """Flat results as `total` gives them."""
        return jax.tree.unflatten(jax.tree.structure(self.shapes), map(jnp.asarray, flat))

    def less(self, mean: Any) -> "Traced":
        """The loss with `total - mean·weight` for its total.

        The derivative of Σ total / Σ weight is that of Σ (total - mean·weight) / Σ weight, if `mean` is the value of
        the former, held constant. So the weight's derivative needs no sums of its own.
        """

        def less(*args):
            total, (loss, rest) = self.total(*args)
            return Weighted((total - mean * loss.weight).astype(total.dtype), loss.weight), rest

        return trace(less, *self.args)

    @property
    def weight(self) -> int | float | None:
        """The weight where it is a number that no input enters, and not 0: that of every micro-batch. Else None."""
        if self.shapes[1][0].weight is None:
            return None
        atom = self.closed.jaxpr.outvars[_WEIGHT]
        return (np.asarray(atom.val).item() or None) if isinstance(atom, core.Literal) else None

    @property
    def has_weight(self) -> bool:
        """Whether the loss has a weight that must be read, and may be 0."""
        return self.shapes[1][0].weight is not None and self.weight is None

    def weight_varies(self) -> bool:
        """Whether the weight has a derivative with respect to the parameters that is not symbolically zero.

        What comes of comparisons, of integers and of `stop_gradient` has none.
        """
        if not self.has_weight:
            return False
        leaves, count = jax.tree.leaves(self.args), jax.tree.structure(self.args[0]).num_leaves
        is_varied = [i < count and weighted_sum.is_inexact(x) for i, x in enumerate(leaves)]
        if not jaxprs.reached(self.closed.jaxpr, is_varied)[_WEIGHT]:
            return False

        def weight(varied):
            inputs = iter(varied)
            flat = [next(inputs) if varies else x for x, varies in zip(leaves, is_varied, strict=True)]
            return core.jaxpr_as_fun(self.closed)(*flat)[_WEIGHT]

        varied = [x for x, varies in zip(leaves, is_varied, strict=True) if varies]
        tangent = lambda varied, tangents: jax.jvp(weight, (varied,), (tangents,))[1]
        count = len(varied)
        if not jaxprs.reached(jax.make_jaxpr(tangent)(varied, varied).jaxpr, [False] * count + [True] * count)[0]:
            return False
        # To jvp all results of a custom_vjp vary. Its backward pass may show that this one does not.
        gradient = lambda varied, cotangent: jax.vjp(weight, varied)[1](cotangent)
        try:
            closed = jax.make_jaxpr(gradient)(varied, jax.eval_shape(weight, varied))
        except Exception:  # Such as a loop that reverse mode can't pass, though the loss's total does.
            return True
        return not linearity.is_zero(closed.jaxpr, [False] * count + [True])

    def refuse_reduced(self, names: Sequence[str]) -> None:
        """Refuses a loss that is the same on all devices of mapped axes, where jax's types tell.

        Raises:
          ValueError: if it doesn't vary over any of `names` though the parameters do: it has been reduced already, and
            its gradient would be divided by the number of devices once more.
        """
        over = lambda aval: varying.axes_of(aval).intersection(names)
        count = jax.tree.structure(self.args[0]).num_leaves
        if any(map(over, self.closed.in_avals[:count])) and not over(self.closed.out_avals[0]):
            raise ValueError(
                f"the loss does not vary over axis_name={tuple(names)!r}: it is reduced over it already, as by "
                "jax.lax.pmean. Return each device's own mean, or a Weighted; the window reduces it once."
            )

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
    """Traces `fun(*args)`, which returns (loss, rest), the loss plain or `Weighted`; nothing is run.

    Args:
      fun: the loss.
      *args: its arguments, the parameters first.
    """

    def total(*args):
        loss, rest = fun(*args)
        loss = loss if isinstance(loss, Weighted) else Weighted(loss, None)
        check_total(loss.total)
        if loss.weight is not None:
            check_weight(loss.weight)
        return loss.total, (loss, rest)

    closed, shapes = jax.make_jaxpr(total, return_shape=True)(*args)
    traced = Traced(args, closed, shapes)
    if traced.weight is not None:
        check_weight(traced.weight)
    return traced


def keep(weight: Any) -> jax.Array | None:
    """Whether a micro-batch of this weight counts; None where it is known to."""
    return None if weight is None or (isinstance(weight, (int, float)) and weight) else jnp.asarray(weight) != 0


def mean(loss: Weighted) -> jax.Array:
    """Total over weight; 0 where the weight is 0, whatever the total holds."""
    if loss.weight is None:
        return loss.total
    weight = jnp.asarray(loss.weight).astype(weighted_sum.weight_dtype())
    value = weighted_sum.mean(Weighted(loss.total, weight), loss.total)
    return jnp.where(weight == 0, jnp.zeros_like(value), value)


def mean_gradient(loss: Weighted, grads: Tree) -> Tree:
    """The gradient of a `Weighted` loss's mean, from that of its total."""
    weight = jnp.asarray(loss.weight).astype(weighted_sum.weight_dtype())
    return weighted_sum.mean(Weighted(grads, weight), grads)


def check_weight(value: Any, shape: tuple[int, ...] = ()) -> None:
    """A weight: a real scalar, or one for each device; finite and not negative where the value can be read."""
    if not numeric.is_real(value, shape):
        raise ValueError(
            f"weight must be one real number{or_one_each(shape)}, got {numeric.kind(value)}; sum the weights of the "
            "micro-batch's examples first."
        )
    if not isinstance(value, jax.core.Tracer):
        numbers = np.asarray(value, np.float64)
        if not np.all((numbers >= 0) & np.isfinite(numbers)):
            raise ValueError(
                f"weight must be finite and at least 0, got {value}; it is what the micro-batch counts for "
                "(its number of examples or tokens), and 0 leaves the micro-batch out."
            )


def check_total(value: Any, without_aux: str | None = None) -> None:
    """A loss, or the total of a `Weighted` one: one floating scalar.

    Args:
      value: the loss.
      without_aux: what was called, if that takes no aux.
    """
    dtype = numeric.scalar_dtype(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        others = (
            f"{without_aux} takes no aux yet: return the loss alone, or use jaxaccum.value_and_grad with has_aux=True."
            if without_aux
            else "Return other results with has_aux=True."
        )
        raise TypeError(
            f"the loss must be one floating scalar, or a Weighted with such a total, got {numeric.kind(value)}; "
            f"reduce an array first. {others}"
        )


def or_one_each(shape: tuple[int, ...]) -> str:
    return f", or an array of shape {shape} with one for each device" if shape else ""
