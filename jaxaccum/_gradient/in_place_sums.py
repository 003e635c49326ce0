"""Which gradients can be added to their sums inside of the backward pass, so that no second tree of them exists."""

import collections
import itertools
from typing import Any

import jax.numpy as jnp

from jaxaccum._jax import core, jaxprs


def walked(jaxpr: core.Jaxpr, fits: set[core.Var]) -> set[core.Var]:
    """The inputs among `fits` that a scan walks along, alone or with others of them, and that nothing else uses."""
    return set().union(*(stack for stack in _stacks(jaxpr) if stack <= fits))


def _stacks(jaxpr: core.Jaxpr) -> list[set[core.Var]]:
    """For each scan what it walks along and could have a gradient, if that is nothing but inputs not used elsewhere.

    All of it or nothing: where a scan walks along references and values, jax 0.10 takes the ones for the others.
    """
    operands = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    uses = collections.Counter(atom for atom in operands if isinstance(atom, core.Var))
    inputs = set(jaxpr.invars)
    floats = lambda atom: jnp.issubdtype(jnp.result_type(atom.aval), jnp.inexact)
    found: list[list[Any]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            along = eqn.invars[sum(jaxprs.scan_operands(eqn, eqn.params["jaxpr"].jaxpr)) :]
            found.append([atom for atom in along if floats(atom)])
        elif jaxprs.is_plain_jit(eqn):
            body = eqn.params["jaxpr"].jaxpr
            outer = dict(zip(body.invars, eqn.invars, strict=True))
            found += [[outer[var] for var in stack] for stack in _stacks(body)]
    return [set(stack) for stack in found if all(atom in inputs and uses[atom] == 1 for atom in stack)]


def checked(value: Any) -> None:
    """True, False, or None for a choice by rule."""
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"in_place must be True, False or None, got {value!r}.")
