"""Adds gradients to their sums inside the backward pass, so that no second tree of them is allocated."""

import collections
import itertools
from typing import Any

import jax.numpy as jnp

from jaxaccum._jax import core, jaxprs, refs


def walked(jaxpr: core.Jaxpr, fits: set[core.Var]) -> set[core.Var]:
    """The inputs in `fits` that one scan uses as its scanned-over operands and nothing else uses."""
    return set().union(*(stack for stack in _stacks(jaxpr) if stack <= fits))


def _stacks(jaxpr: core.Jaxpr) -> list[set[core.Var]]:
    """For each scan, its inexact scanned-over operands, if they are all inputs that are not used elsewhere.

    It is all or nothing: if a scan runs over both references and values, jax 0.10 confuses them.
    """
    operands = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    uses = collections.Counter(atom for atom in operands if isinstance(atom, core.Var))
    inputs = set(jaxpr.invars)
    floats = lambda atom: jnp.issubdtype(jnp.result_type(atom.aval), jnp.inexact)
    found: list[list[Any]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and refs.reach(eqn):
            along = eqn.invars[sum(jaxprs.scan_operands(eqn, eqn.params["jaxpr"].jaxpr)) :]
            found.append([atom for atom in along if floats(atom)])
        elif jaxprs.is_plain_jit(eqn):
            body = eqn.params["jaxpr"].jaxpr
            outer = dict(zip(body.invars, eqn.invars, strict=True))
            found += [[outer[var] for var in stack] for stack in _stacks(body)]
    return [set(stack) for stack in found if all(atom in inputs and uses[atom] == 1 for atom in stack)]


def check_argument(value: Any) -> None:
    """Checks `in_place`: True, False, or None for the default rules."""
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"in_place must be True, False or None, got {value!r}.")
