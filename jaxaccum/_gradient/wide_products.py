"""Computes weight gradients of half-precision matrix products in float32, so that a product can add to the sum.

If a loss casts a parameter to bfloat16 and multiplies by it, jax rounds the parameter's gradient to bfloat16 and casts
it back to float32, although the matrix unit accumulates in float32. Without the rounding, the gradient is more
accurate, and `sum + gradient` becomes a single matrix operation that reads and writes the sum. A separate addition
has half as much memory traffic again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._devices import layout
from jaxaccum._gradient.stand_in import standing_for
from jaxaccum._jax import core, jaxprs


class _Value(NamedTuple):
    """A value of the loss.

    For a parameter, possibly cast to half precision and rearranged, `wide` is the same value without the cast, which
    receives the float32 gradient. It is None for all other values.
    """

    array: Any
    wide: Any = None


def occur(jaxpr: core.Jaxpr) -> bool:
    """Whether `jaxpr` has a half-precision matrix product that `widened` would find."""

    def has(eqn):
        if jaxprs.is_plain_jit(eqn):
            return occur(eqn.params["jaxpr"].jaxpr)
        return occur(eqn.params["jaxpr"]) if jaxprs.is_checkpoint(eqn) else _is_half_product(eqn)

    return any(map(has, jaxpr.eqns))


def lifted(params: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    """The inputs to differentiate `widened` with respect to: chosen half-precision parameters are cast to float32."""
    lift = lambda x: x.astype(jnp.float32) if _is_half(x.dtype) else x
    return [lift(x) if is_chosen else x for x, is_chosen in zip(params, chosen, strict=True)]


def widened(closed: core.ClosedJaxpr, params: Sequence[Any], chosen: Sequence[bool]) -> Callable[..., list[Any]]:
    """Converts `closed` to a flat function of `lifted` parameters and the other inputs.

    Results are bitwise equal to those of `closed`. Gradients are too, with one exception: if a chosen parameter in half
    precision (as given, or cast in `closed`) reaches a matrix product, with nothing but rearrangements in between, its
    gradient there is computed in float32 and not rounded. Products in jit and `jax.checkpoint` are found; products in
    loops are not.

    `params` are the first inputs of `closed`. The values of lifted parameters are read from there; the function's own
    arguments only receive their gradients.
    """

    def fun(*inputs):
        lifts, others = inputs[: len(params)], inputs[len(params) :]
        entries = [_entry(*entry) for entry in zip(params, lifts, chosen, strict=True)]
        outputs = _evaluate(jaxprs.Jits(), closed.jaxpr, closed.consts, [*entries, *map(_Value, others)])
        return [x.array for x in outputs]

    return fun


def _entry(param: Any, lift: Any, is_chosen: bool) -> _Value:
    """The entry of a parameter whose gradient `lift` receives."""
    if is_chosen and _is_half(param.dtype):
        return _Value(standing_for(lift, param), lift)
    return _Value(lift, lift if is_chosen else None)


def _evaluate(jits: jaxprs.Jits, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[_Value]) -> list[_Value]:
    return jaxprs.evaluate(jaxpr, consts, inputs, functools.partial(_results, jits), _Value)


def _results(jits: jaxprs.Jits, eqn: core.JaxprEqn, operands: Sequence[_Value]) -> list[_Value]:
    if all(x.wide is None for x in operands):
        return [_Value(x) for x in jaxprs.bind(eqn, [x.array for x in operands])]
    if jaxprs.is_checkpoint(eqn):
        body = functools.partial(_evaluate, jits, eqn.params["jaxpr"], [])
        with jaxprs.located(eqn):
            return jaxprs.checkpointed(eqn, body)(operands)
    if jaxprs.is_plain_jit(eqn):
        closed = eqn.params["jaxpr"]
        return jits.call(eqn, None, lambda operands: _evaluate(jits, closed.jaxpr, closed.consts, operands), operands)
    if _is_weighing(eqn, operands):
        return [_Value(_product(eqn, operands))]
    arrays, wide = [x.array for x in operands], [x.wide for x in operands]
    results = jaxprs.bind(eqn, arrays)
    if any(x is None for x in wide):
        return [_Value(x) for x in results]
    if eqn.primitive.name == "convert_element_type" and _is_half(results[0].dtype):
        return [_Value(results[0], wide[0])]
    if eqn.primitive.name not in jaxprs.MOVES:
        return [_Value(x) for x in results]
    uncast = all(x is y for x, y in zip(arrays, wide, strict=True))
    return [_Value(*pair) for pair in zip(results, results if uncast else jaxprs.bind(eqn, wide), strict=True)]


def _is_weighing(eqn: core.JaxprEqn, operands: Sequence[_Value]) -> bool:
    """Whether `eqn` is a half-precision product of a parameter and an activation."""
    return _is_half_product(eqn) and sum(x.wide is None for x in operands) == 1


def _is_half_product(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a half-precision matrix product without an explicit sharding or algorithm."""
    atoms: list[Any] = [*eqn.invars, *eqn.outvars]
    if eqn.primitive.name != "dot_general" or len({atom.aval.dtype for atom in atoms}) > 1:
        return False
    placed = eqn.params["out_sharding"] is not None or any(layout.is_explicitly_sharded(atom.aval) for atom in atoms)
    algorithm = isinstance(eqn.params["precision"], (jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset))
    return _is_half(atoms[0].aval.dtype) and not placed and not algorithm


def _product(eqn: core.JaxprEqn, operands: Sequence[_Value]) -> jax.Array:
    """Multiplies an activation and a weight; the weight's uncast value receives the gradient."""
    side = 0 if operands[0].wide is not None else 1  # the weight's operand index

    def multiply(activation, weight):
        return jaxprs.bind(eqn, (weight, activation) if side == 0 else (activation, weight))[0]

    @jax.custom_vjp
    def product(activation, weight, wide):
        del wide
        return multiply(activation, weight)

    def forward(activation, weight, wide):
        del wide
        return multiply(activation, weight), (activation, weight)

    def backward(residuals, cotangent):
        activation, weight = residuals
        _, pull_back = jax.vjp(lambda activation: multiply(activation, weight), activation)
        # None for the cast weight: `wide` receives its gradient.
        return *pull_back(cotangent), None, _weight_gradient(eqn, side, activation, cotangent)

    product.defvjp(forward, backward)
    return product(operands[1 - side].array, *operands[side])


def _weight_gradient(eqn: core.JaxprEqn, side: int, activation: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The float32 gradient of operand `side` of a product whose other operand is `activation`."""
    contracted, batched = eqn.params["dimension_numbers"]
    ndim = jaxprs.ndim(eqn.invars[side])
    free = lambda ndim, taken: [i for i in range(ndim) if i not in taken]
    own = free(ndim, (*contracted[side], *batched[side]))
    other = free(activation.ndim, (*contracted[1 - side], *batched[1 - side]))
    # The product's dimensions are the batched ones, then the left operand's, then the right operand's.
    at = len(batched[side]) + (len(own) if side == 0 else 0)
    dimensions = (other, range(at, at + len(other))), (batched[1 - side], range(len(batched[side])))

    def product(x, y):
        return jax.lax.dot_general(
            x, y, dimensions, precision=eqn.params["precision"], preferred_element_type=jnp.float32
        )

    def on_cpu(x, y):  # The CPU doesn't support this product for all shapes, and computes in float32 anyway.
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    gradient = jax.lax.platform_dependent(activation, cotangent, cpu=on_cpu, default=product)
    pairs = sorted(zip(contracted[1 - side], contracted[side], strict=True))
    order = [*batched[side], *(dimension for _, dimension in pairs), *own]
    return jax.lax.transpose(gradient, tuple(np.argsort(order)))


def _is_half(dtype: Any) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)
