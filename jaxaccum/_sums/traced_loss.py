"""Traces a loss, which returns a plain scalar or a `Weighted`, to one form for all drivers."""

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
    """A traced loss: its Python code runs once, even if the loss is evaluated several times."""

    args: tuple[Tree, ...]  # The arguments of the trace, the parameters first.
    closed: core.ClosedJaxpr  # From flat arguments to flat results.
    shapes: Any  # Of the results, as `total` returns them.

    def total(self, *args: Tree) -> tuple[Any, tuple[Weighted, Any]]:
        """Returns `(the loss's total, (loss, rest))`, for `jax.value_and_grad` with `has_aux=True`.

        The loss is a `Weighted`, whose weight is None for a plain loss.
        """
        return self.unflatten(core.jaxpr_as_fun(self.closed)(*jax.tree.leaves(args)))

    def unflatten(self, flat: Sequence[Any]) -> tuple[Any, tuple[Weighted, Any]]:
        """Converts flat results to those of `total`."""
        return jax.tree.unflatten(jax.tree.structure(self.shapes), map(jnp.asarray, flat))

    def less(self, mean: Any) -> "Traced":
        """Replaces the loss's total with `total - mean·weight`.

        If `mean` is Σ total / Σ weight, held constant, then Σ total / Σ weight has the derivative of
        Σ (total - mean·weight), divided by Σ weight. So the derivative of the weight needs no separate sums.
        """

        def less(*args):
            total, (loss, rest) = self.total(*args)
            return Weighted((total - mean * loss.weight).astype(total.dtype), loss.weight), rest

        return trace(less, *self.args)

    @property
    def weight(self) -> int | float | None:
        """The weight if it is a nonzero constant, the same for every micro-batch; else None."""
        if self.shapes[1][0].weight is None:
            return None
        atom = self.closed.jaxpr.outvars[_WEIGHT]
        return (np.asarray(atom.val).item() or None) if isinstance(atom, core.Literal) else None

    @property
    def has_weight(self) -> bool:
        """Whether the loss has a weight that is not a nonzero constant, so that it may be 0."""
        return self.shapes[1][0].weight is not None and self.weight is None

    def weight_alone(self) -> tuple[core.ClosedJaxpr, list[bool]]:
        """The jaxpr of the weight, without what only other results need, and for each flat argument if it takes it."""
        return jaxprs.pruned(self.closed, _WEIGHT)

    def weight_varies(self) -> bool:
        """Whether the weight has a derivative with respect to the parameters that is not symbolically zero.

        Results of comparisons, of integer operations and of `stop_gradient` have no derivative.
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
        # To jvp, all results of a custom_vjp vary. Its backward pass may show that this one doesn't.
        gradient = lambda varied, cotangent: jax.vjp(weight, varied)[1](cotangent)
        try:
            closed = jax.make_jaxpr(gradient)(varied, jax.eval_shape(weight, varied))
        except Exception:  # For example, a loop without reverse mode that the total doesn't use.
            return True
        return not linearity.is_zero(closed.jaxpr, [False] * count + [True])

    def refuse_reduced(self, names: Sequence[str]) -> None:
        """Raises if jax's types show that the parameters vary over the mapped axes `names` and the loss doesn't.

        Such a loss is already reduced, and its gradient would be divided by the number of devices twice.
        """
        over = lambda aval: varying.axes_of(aval).intersection(names)
        count = jax.tree.structure(self.args[0]).num_leaves
        if any(map(over, self.closed.in_avals[:count])) and not over(self.closed.out_avals[0]):
            raise ValueError(
                f"the loss does not vary over axis_name={tuple(names)!r}: it is reduced over it already, as by "
                "jax.lax.pmean. Return each device's own mean, or a Weighted; the window reduces it once."
            )

    def refuse_varying_weight(self) -> None:
        """Raises if the weight has a derivative in the parameters, which single micro-steps don't support."""
        if self.weight_varies():
            raise ValueError(
                "the weight of the Weighted loss depends on the parameters, and its derivative is part of the gradient "
                "of Σ total / Σ weight, which sums of one micro-batch after another can't hold. Use "
                "jaxaccum.value_and_grad, which computes it, or jax.lax.stop_gradient(weight) to leave it out."
            )


# The index of the weight in the flat results: (total, (Weighted(total, weight), rest)).
_WEIGHT = 2


def trace(fun: Callable[..., Any], *args: Any) -> Traced:
    """Traces `fun(*args)`, parameters first, which returns (loss, rest) with a plain or `Weighted` loss."""

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
    """Whether a micro-batch with this weight counts: a bool array, or None if it always does."""
    return None if weight is None or (isinstance(weight, (int, float)) and weight) else jnp.asarray(weight).astype(bool)


def counted(kept: Any, returned: tuple[Any, tuple[Weighted, Any]]) -> tuple[Any, tuple[Weighted, Any]]:
    """Results of `Traced.total` with total and weight 0 where `kept` is False; None and True change nothing."""
    if kept is None or kept is True:
        return returned
    total, (loss, rest) = returned
    total, weight = weighted_sum.only_if(kept, (total, loss.weight))
    return total, (Weighted(total, weight), rest)


def mean(loss: Weighted) -> jax.Array:
    """Total divided by weight; 0 if the weight is 0, even if the total is NaN."""
    if loss.weight is None:
        return loss.total
    weight = jnp.asarray(loss.weight).astype(weighted_sum.weight_dtype())
    value = weighted_sum.mean(Weighted(loss.total, weight), loss.total)
    return jnp.where(weight == 0, jnp.zeros_like(value), value)


def mean_gradient(loss: Weighted, grads: Tree) -> Tree:
    """Converts the gradient of a `Weighted` loss's total to the gradient of its mean."""
    weight = jnp.asarray(loss.weight).astype(weighted_sum.weight_dtype())
    return weighted_sum.mean(Weighted(grads, weight), grads)


def check_weight(value: Any, shape: tuple[int, ...] = ()) -> None:
    """Checks a weight: a real scalar, or one per device; finite and not negative, unless it is traced."""
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


def check_total(value: Any) -> None:
    """Checks that a loss or total is one floating scalar."""
    dtype = numeric.scalar_dtype(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"the loss must be one floating scalar, or a Weighted with such a total, got {numeric.kind(value)}; "
            "reduce an array first. Return other results with has_aux=True."
        )


def or_one_each(shape: tuple[int, ...]) -> str:
    """The end of an error message: that one value for each device is accepted too, if it is."""
    return f", or an array of shape {shape} with one for each device" if shape else ""
