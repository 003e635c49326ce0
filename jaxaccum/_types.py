"""Types that have no better home."""

from typing import Any

Tree = Any  # A pytree: jax has no type for it.
