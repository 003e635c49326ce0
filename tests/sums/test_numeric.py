"""What counts as a number, and as a floating dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum._sums import numeric


@pytest.mark.parametrize(
    ("value", "shape", "want"),
    [
        *((x, (), True) for x in (1, 1.0, True, np.float64(1), np.bool_(True), np.array(1, np.int8))),
        *((jnp.ones((), dtype), (), True) for dtype in (jnp.bfloat16, jnp.float32, jnp.uint8, bool)),
        (jnp.ones(3), (3,), True),
        (np.ones(3, bool), (3,), True),
        (1.0, (3,), True),
        *((x, (), False) for x in (None, "float32", 1j, jnp.complex64(1), jnp.ones(1), [1.0], jax.random.key(0))),
        (jnp.ones(2), (3,), False),
        (jnp.ones(3, complex), (3,), False),
        (jax.random.split(jax.random.key(0), 3), (3,), False),
    ],
)
def test_real_numbers(value, shape, want):
    """Catches a bool or a small integer that is refused as a weight, and a key, a name or an array that is taken."""
    assert numeric.is_real(value, shape) is want


@pytest.mark.parametrize("dtype", [None, float, jnp.bfloat16, "float16", np.dtype(np.float64)])
def test_floating_dtypes(dtype):
    """Catches a dtype in another form that is refused."""
    numeric.floating("accumulator_dtype", dtype)


@pytest.mark.parametrize("dtype", [int, bool, jnp.complex64, "float31", 32])
def test_other_dtypes(dtype):
    """Catches sums of integers, and a name of no dtype that numpy complains of."""
    with pytest.raises(TypeError, match="accumulator_dtype must be a floating dtype or None"):
        numeric.floating("accumulator_dtype", dtype)


def test_dtypes_that_x64_enables():
    """Catches float64 that jax would cut to float32 without a word."""
    for x64 in (True, False):
        with jax.enable_x64(x64):
            for dtype in (None, jnp.float32, jnp.bfloat16, *([jnp.float64] if x64 else [])):
                numeric.available("grad_dtype", dtype)
    with jax.enable_x64(False), pytest.raises(ValueError, match="grad_dtype=float64 needs x64"):
        numeric.available("grad_dtype", jnp.float64)
