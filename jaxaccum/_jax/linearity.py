"""Checks whether a backward pass is linear in its cotangents, so that it can run once on their sum.

jax's own transpose rules are linear. A user's rule, such as that of a `jax.custom_vjp`, need not be: it may clip
gradients, square them or divide them by their norm. This module traces such a rule and propagates linearity from the
cotangents to the outputs.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._jax import core, jaxprs

# Primitives that are differentiated by a user's rule, in any version of jax.
_VJPS = ("call_hi_primitive", "call_hi_primitive_linearized", "custom_vjp_call", "custom_vjp_call_jaxpr")
_USERS = (*_VJPS, "custom_transpose_call", "linear_call")
# jax transposes a custom_jvp's rule with its own rules and doesn't differentiate the body.
_JVPS = ("custom_jvp_call", "custom_jvp_call_jaxpr")

# How a value depends on the cotangents. The kind of a sum is the bitwise or of its terms' kinds.
_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 1, 2, 3

_SUMS = ("add", "add_any", "cumsum", "neg", "reduce_sum", "reduce_window_sum", "sub")
_PARTS = ("complex", "conj", "imag", "name", "real")
_COLLECTIVES = ("all_to_all", "pbroadcast", "pcast", "ppermute", "psum", "psum2", "psum_invariant", "reduce_scatter")
# Jointly linear in all operands.
_JOINTLY = frozenset([*jaxprs.MOVES, *_SUMS, *_PARTS, *_COLLECTIVES, "pad"])
# Jointly linear in the listed operands; the others are indices or parameters.
_DATA = {
    "div": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "gather": (0,),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter_add": (0, 2),
    "triangular_solve": (1,),
}
# Linear in each of two operands separately.
_PRODUCTS = ("conv_general_dilated", "dot_general", "mul", "ragged_dot", "ragged_dot_general")
# The backward pass of `jax.nn.dot_product_attention` in cuDNN: linear in one operand, the cotangent.
_ATTENTION = ("dot_product_attention_bwd", "dot_product_attention_bwd_wrapper")
_CALLS = (*_JVPS, "closed_call", "core_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "jit", "pjit")


def unproved(jaxpr: core.Jaxpr) -> str | None:
    """The name of the first user's rule in `jaxpr` whose backward pass can't be shown to be linear, or None."""
    return _unproved(jaxpr, in_rule=False)


def unproved_in(eqn: core.JaxprEqn, *, in_rule: bool = False) -> str | None:
    """`unproved` for one equation and the jaxprs it calls; in the rule of a custom_jvp, jax inlines other ones."""
    name = eqn.primitive.name
    if name in _USERS:
        return None if _is_linear(eqn) else _name(eqn)
    to_rule = name in _JVPS and not in_rule
    rule = _jvp(eqn) if to_rule else None
    if to_rule and rule is None:
        return _name(eqn)
    bodies = jaxprs.bodies(eqn) if rule is None else [rule]
    return next(filter(None, (_unproved(body, in_rule or to_rule) for body in bodies)), None)


def _unproved(jaxpr: core.Jaxpr, in_rule: bool) -> str | None:
    return next(filter(None, (unproved_in(eqn, in_rule=in_rule) for eqn in jaxpr.eqns)), None)


def communicates(jaxpr: core.Jaxpr) -> bool:
    """Whether `jaxpr` or its derivative may communicate over a mapped axis."""
    rules = [_jvp(eqn) for eqn in jaxprs.equations(jaxpr) if eqn.primitive.name in _JVPS]
    return any(rule is None or any(map(jaxprs.axes, rule.eqns)) for rule in [jaxpr, *rules])


def _jvp(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """The jaxpr that jax transposes for a custom_jvp: its rule, not its body. None if it can't be traced here."""
    operands = [atom.aval for atom in eqn.invars]
    zero = lambda atom: np.zeros(atom.aval.shape, jax.dtypes.float0)

    def tangents_of(operands, tangents):
        given = iter(tangents)
        every = [next(given) if _is_inexact(atom) else zero(atom) for atom in eqn.invars]
        return jax.jvp(lambda *operands: jaxprs.bind(eqn, operands), operands, every)[1]

    try:
        return jax.make_jaxpr(tangents_of)(operands, [atom.aval for atom in eqn.invars if _is_inexact(atom)]).jaxpr
    except Exception:  # For example, a rule that supports some of the operands only.
        return None


def _is_linear(eqn: core.JaxprEqn) -> bool:
    """Whether the outputs of the backward pass of `eqn` can be shown to be linear in its cotangents."""
    floats = [_is_inexact(var) for var in eqn.outvars]

    def backward(operands, cotangents):
        given = iter(cotangents)
        _, pull_back = jax.vjp(lambda *operands: list(jaxprs.bind(eqn, operands)), *operands)
        none = lambda var: np.zeros(var.aval.shape, jax.dtypes.float0)
        pairs = zip(eqn.outvars, floats, strict=True)
        grads = pull_back([next(given) if is_float else none(var) for var, is_float in pairs])
        return [x for x in grads if x.dtype != jax.dtypes.float0]

    operands = [atom.aval for atom in eqn.invars]
    cotangents = [var.aval for var, is_float in zip(eqn.outvars, floats, strict=True) if is_float]
    try:
        closed = jax.make_jaxpr(backward)(operands, cotangents)
    except Exception:  # The rule can't be traced here, for example because it uses a mapped axis.
        return False
    kinds = [_CONSTANT] * len(operands) + [_LINEAR] * len(cotangents)
    outputs = _kinds(closed.jaxpr, kinds)
    return not closed.effects and all(kind in (_ZERO, _LINEAR) for kind in outputs)


def is_zero(jaxpr: core.Jaxpr, linear: Sequence[bool]) -> bool:
    """Whether all outputs of `jaxpr`, which is linear in the marked inputs, can be shown to be 0."""
    return all(kind == _ZERO for kind in _kinds(jaxpr, [_LINEAR if x else _CONSTANT for x in linear]))


def _kinds(jaxpr: core.Jaxpr, inputs: Sequence[int]) -> list[int]:
    consts = [_CONSTANT] * len(jaxpr.constvars)
    kinds = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    read = lambda atom: _literal(atom.val) if isinstance(atom, core.Literal) else kinds[atom]
    for eqn in jaxpr.eqns:
        kinds.update(zip(eqn.outvars, _results(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(eqn: core.JaxprEqn, kinds: Sequence[int]) -> Sequence[int]:
    name = eqn.primitive.name
    if name in _CALLS or jaxprs.is_checkpoint(eqn):
        (body,) = jaxprs.bodies(eqn)
        return _kinds(body, kinds)
    if name == "cond" and kinds[0] <= _CONSTANT:
        return [
            _union(branch) for branch in zip(*(_kinds(body, kinds[1:]) for body in jaxprs.bodies(eqn)), strict=True)
        ]
    if name == "scan":
        return _of_scan(eqn, kinds)
    if name == "optimization_barrier":
        return kinds
    return [_of_operation(eqn, kinds)] * len(eqn.outvars)


def _of_scan(eqn: core.JaxprEqn, kinds: Sequence[int]) -> Sequence[int]:
    """The kinds of a scan's results: carries are unions over all iterations, found as a fixed point."""
    (body,) = jaxprs.bodies(eqn)
    constants, carries = jaxprs.scan_operands(eqn, body)
    kinds = list(kinds)
    while True:
        results = _kinds(body, kinds)
        start = kinds[constants:][:carries]
        around = list(map(operator.or_, start, results))
        if around == start:
            return results
        kinds[constants : constants + carries] = around


def _of_operation(eqn: core.JaxprEqn, kinds: Sequence[int]) -> int:
    name = eqn.primitive.name
    if name in _PRODUCTS and len(kinds) == 2:
        a, b = kinds
        return _ZERO if _ZERO in kinds else a if b == _CONSTANT else b if a == _CONSTANT else _OTHER
    if name in _JOINTLY or (name == "convert_element_type" and _keeps_range(eqn)):
        data = range(len(kinds))
    elif name == "select_n":
        data = range(1, len(kinds))
    elif name in _ATTENTION:
        data = [i for i, kind in enumerate(kinds) if kind > _CONSTANT][:1]
    else:
        data = _DATA.get(name, ())
    is_known = all(kind <= _CONSTANT for i, kind in enumerate(kinds) if i not in data)
    return _union(kinds[i] for i in data) if data and is_known else (_CONSTANT if is_known else _OTHER)


def _keeps_range(eqn: core.JaxprEqn) -> bool:
    """Whether a cast can't overflow; in a dtype of smaller range, a sum may overflow even if no term does."""
    before, after = (jaxprs.dtype(atom) for atom in (eqn.invars[0], eqn.outvars[0]))
    if not (_is_inexact(eqn.invars[0]) and _is_inexact(eqn.outvars[0])):
        return _is_inexact(eqn.outvars[0])
    return jnp.finfo(after).maxexp >= min(jnp.finfo(before).maxexp, jnp.finfo(jnp.float32).maxexp)


def _union(kinds: Any) -> int:
    return functools.reduce(operator.or_, kinds, _ZERO)


def _literal(value: Any) -> int:
    is_zero = np.ndim(value) == 0 and (np.result_type(value) == jax.dtypes.float0 or value == 0)
    return _ZERO if is_zero else _CONSTANT


def _is_inexact(atom: Any) -> bool:
    return jax.dtypes.issubdtype(jaxprs.dtype(atom), np.inexact)


def _name(eqn: core.JaxprEqn) -> str:
    """The name of a user's rule for an error: the function's name if known."""
    info = next((getattr(body, "debug_info", None) for body in jaxprs.bodies(eqn)), None)
    return getattr(info, "func_name", None) or eqn.primitive.name
