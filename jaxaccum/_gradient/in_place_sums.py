"""Adds gradients to their sums inside the backward pass, so that no second tree of them is allocated."""

import collections
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import layout
from jaxaccum._gradient.stand_in import standing_for
from jaxaccum._jax import core, jaxprs, refs


def walked(jaxpr: core.Jaxpr, fits: set[core.Var]) -> set[core.Var]:
    """The inputs in `fits` that one scan uses as its scanned-over operands and nothing else uses."""
    return set().union(*(stack for stack in _stacks(jaxpr) if stack <= fits))


def _stacks(jaxpr: core.Jaxpr) -> list[set[core.Var]]:
    """For each scan, its inexact scanned-over operands, if they are all inputs that are not used elsewhere.

    It is all or nothing: if a scan runs over both references and differentiated values, jax 0.10 confuses them.
    Constants are not differentiated.
    """
    operands = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    uses = collections.Counter(atom for atom in operands if isinstance(atom, core.Var))
    inputs, constants = set(jaxpr.invars), set(jaxpr.constvars)
    floats = lambda atom: jnp.issubdtype(jnp.result_type(atom.aval), jnp.inexact)
    found: list[list[Any]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] and refs.reach(eqn):
            along = eqn.invars[sum(jaxprs.scan_operands(eqn, eqn.params["jaxpr"].jaxpr)) :]
            found.append([atom for atom in along if floats(atom)])
        elif jaxprs.is_plain_jit(eqn):
            body = eqn.params["jaxpr"].jaxpr
            outer = dict(zip(body.invars, eqn.invars, strict=True))
            found += [[outer[var] for var in stack] for stack in _stacks(body)]
    found = [[atom for atom in stack if atom not in constants] for stack in found]
    return [set(stack) for stack in found if all(atom in inputs and uses[atom] == 1 for atom in stack)]


class _Stack(NamedTuple):
    """A stack that a scan runs over: `lift` receives the gradient of `value`."""

    lift: Any
    value: Any


def sliced(closed: core.ClosedJaxpr, params: Sequence[Any], chosen: Sequence[bool]) -> Callable[..., list[Any]]:
    """Converts `closed` to a flat function whose scans slice the chosen inputs, as returned by `walked`.

    The results are those of `closed`. `params` are its first inputs. The values of chosen ones are read from there; the
    function's own arguments only receive their gradients, through `jax.lax.dynamic_slice`. Its transpose adds to a
    slice that has all axes of the sum, which XLA does in one pass. The transpose of a scan removes the slice's first
    axis, and XLA copies the slice before it adds. A reference that is sharded over explicit mesh axes can't be sliced.
    """
    chosen = [
        is_chosen and not layout.is_explicitly_sharded(jax.typeof(x))
        for x, is_chosen in zip(params, chosen, strict=True)
    ]

    def fun(*inputs):
        lifts, others = inputs[: len(params)], inputs[len(params) :]
        entries = [
            _Stack(*pair) if is_chosen else pair[0] for *pair, is_chosen in zip(lifts, params, chosen, strict=True)
        ]
        return _evaluate(jaxprs.Jits(), closed, [*entries, *others])

    return fun


def _evaluate(jits: jaxprs.Jits, closed: core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    return jaxprs.evaluate(closed.jaxpr, closed.consts, inputs, functools.partial(_results, jits), lambda x: x)


def _results(jits: jaxprs.Jits, eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    if not any(isinstance(x, _Stack) for x in operands):
        return jaxprs.bind(eqn, operands)
    closed = eqn.params["jaxpr"]
    if jaxprs.is_plain_jit(eqn):
        return jits.call(eqn, None, functools.partial(_evaluate, jits, closed), operands)

    def body(inputs, i):
        part = lambda stack, x: standing_for(jax.lax.dynamic_slice_in_dim(stack.lift, i, 1)[0], x)
        inputs = [part(of, x) if isinstance(of, _Stack) else x for of, x in zip(operands, inputs, strict=True)]
        return core.jaxpr_as_fun(closed)(*inputs)

    values = [x.value if isinstance(x, _Stack) else x for x in operands]
    return jaxprs.rescanned(eqn, body, values, jnp.arange(eqn.params["length"]))


def check_argument(value: Any) -> None:
    """Checks `in_place`: True, False, or None for the default rules."""
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"in_place must be True, False or None, got {value!r}.")
