"""Adds gradients to their sums inside the backward pass, so that no second tree of them is allocated."""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._jax import core, jaxprs


def backward(vjp: Any, cotangent: jax.Array, inside: Sequence[bool], pending: Sequence[Any]) -> list[Any]:
    """Runs `vjp`, of one list of leaves, on `cotangent`; for leaves marked `inside`, returns the new sum instead.

    It uses references, which not every transformation supports: see `jaxprs.purely`.
    """
    # If a slot is not a reference, `with_refs` returns the gradient.
    slots: list[Any] = [jax.new_ref(x) if added else 0.0 for x, added in zip(pending, inside, strict=True)]
    (grads,) = vjp.with_refs(slots)(cotangent)
    return [jax.freeze(slot) if added else grad for grad, slot, added in zip(grads, slots, inside, strict=True)]


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
        if eqn.primitive.name == "scan":
            along = eqn.invars[sum(jaxprs.scan_operands(eqn, eqn.params["jaxpr"].jaxpr)) :]
            found.append([atom for atom in along if floats(atom)])
        elif jaxprs.is_plain_jit(eqn):
            body = eqn.params["jaxpr"].jaxpr
            outer = dict(zip(body.invars, eqn.invars, strict=True))
            found += [[outer[var] for var in stack] for stack in _stacks(body)]
    return [set(stack) for stack in found if all(atom in inputs and uses[atom] == 1 for atom in stack)]


def checked(value: Any) -> None:
    """Checks `in_place`: True, False, or None for the default rules."""
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"in_place must be True, False or None, got {value!r}.")
