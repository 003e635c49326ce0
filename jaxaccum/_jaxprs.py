"""Equations of jaxprs: what they are, and how to run them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core


class ScanOperands(NamedTuple):
    """How many of a scan's operands are what; what it walks along follows."""

    constants: int
    carries: int


def scan_operands(scan: core.JaxprEqn, body: core.Jaxpr) -> ScanOperands:
    """Told by shapes, since jax's versions disagree: constants and carries go in whole, and carries come out whole."""
    whole = lambda outer, inner: sum(ndim(a) == ndim(b) for a, b in zip(outer, inner, strict=True))
    carries = whole(scan.outvars, body.outvars)
    return ScanOperands(whole(scan.invars, body.invars) - carries, carries)


def ndim(atom: Any) -> int:
    """The number of dimensions of a variable or a literal."""
    return len(atom.aval.shape)


def is_plain_jit(eqn: core.JaxprEqn) -> bool:
    """Whether `eqn` is a jit without shardings of its own, and may as well run equation by equation."""
    if eqn.primitive.name != "jit":
        return False
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return not any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)


def run(eqn: core.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of one equation."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]
