"""Which mapped axes a value varies over."""

from typing import Any

import jax


def axes(x: Any) -> frozenset[str]:
    return axes_of(jax.typeof(x))


def axes_of(aval: Any) -> frozenset[str]:
    return aval.mat.varying
