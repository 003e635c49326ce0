"""Which mapped axes a value varies over."""

from typing import Any

import jax


def axes(x: Any) -> frozenset[str]:
    """The mapped axes that an array varies over."""
    return axes_of(jax.typeof(x))


def axes_of(aval: Any) -> frozenset[str]:
    """The mapped axes that values of an abstract value vary over."""
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # jax 0.9 has no `mat`.
