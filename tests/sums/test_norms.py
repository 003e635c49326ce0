"""Norms of gradients in each dtype and layout, beside numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum._sums import norms, overwrites
from jaxaccum._sums.weighted_sum import Weighted

P = 3  # Devices.


def grads(dtype=jnp.float32):
    """Gradients of each device, with leaves that are none."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(300 * rng.standard_normal((P, *shape)), dtype)
    integers = np.zeros((P, 2), jax.dtypes.float0)
    return {"w": draw(4, 5), "b": draw(), "none": None, "n": integers, overwrites.NAME: {"amax": draw()}}


def squares_of_devices(tree):
    square = lambda x: np.sum(abs(np.asarray(x, complex)).reshape(P, -1) ** 2, axis=1)
    return square(tree["w"]) + square(tree["b"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_squares_are_summed_in_float32(dtype):
    """Catches a square that overflows or is rounded in half precision, a lost part of a number, and statistics."""
    tree = grads(dtype)
    if dtype == jnp.complex64:
        tree = jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0 else x * (1 + 2j), tree)
    want = squares_of_devices(tree)
    for shape, expected in (((P,), want), ((), want.sum())):
        got = norms.total(norms.squares(tree, shape))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_micro_batchs_norm_is_of_its_mean():
    """Catches the norm of w·g, weights squared or left out, and what does not count."""
    weight, counted = jnp.array([2.0, 0.0, 4.0]), jnp.array([True, False, True])
    tree = grads()
    tree = tree | {name: tree[name].at[1].set(jnp.nan) for name in "wb"}
    want = np.nan_to_num(squares_of_devices(tree))
    for is_weighted in (False, True):
        mean = want / np.array([4, 1, 16]) if is_weighted else want
        norm, sums = norms.of_micro_batch(tree, weight, counted, weighted=is_weighted, shape=(P,))
        np.testing.assert_allclose(norm, np.sqrt(mean), rtol=1e-6)
        np.testing.assert_allclose(sums, np.stack([weight * mean, [1, 0, 1]], axis=-1), rtol=1e-6)
    norm, sums = norms.of_micro_batch(grads(), None, True, weighted=True)
    total = squares_of_devices(grads()).sum()
    np.testing.assert_allclose((norm, *sums), (np.sqrt(total), total, 1), rtol=1e-6)


def test_parts_are_weighed_and_empty_ones_left_out():
    """Catches a part without weight that counts, and the square of a sum for that of a mean."""
    tree, weight = grads(), np.array([2.0, 0.0, 4.0])
    square = squares_of_devices(tree)
    part = norms.of_part(Weighted(tree, jnp.asarray(weight)), (P,))
    want = [[square[0] / 2, 2, 1], [0, 0, 0], [square[2] / 4, 4, 1]]
    np.testing.assert_allclose(part, want, rtol=1e-6)
    found = norms.of_two_sizes(jnp.float32(3.0), part.sum(0), norms.of_part(Weighted(tree, jnp.float32(6.0))))
    assert found.window == 3 and found.count == 2 and found.count.dtype == jnp.int32
    squares, sizes = found.two_sizes
    np.testing.assert_allclose(squares, [(square[0] / 2 + square[2] / 4) / 6, square.sum() / 36], rtol=1e-6)
    np.testing.assert_allclose(sizes, [3, 6], rtol=1e-6)


def test_the_root_of_nothing_has_no_slope():
    """Catches a NaN in the derivative of the norm of a gradient of 0."""
    value, slope = jax.vmap(jax.value_and_grad(norms.root))(jnp.array([0.0, 4.0]))
    np.testing.assert_array_equal(value, [0, 2])
    np.testing.assert_array_equal(slope, [0, 0.25])


def test_two_batch_sizes_are_of_micro_batches_and_devices():
    """Catches a window that is refused though it has two sizes, as with as many devices as micro-batches."""
    for k, devices in ((8, 8), (1, 8), (8, 1), (jnp.int32(1), 1)):
        norms.check_two_sizes("every_k_schedule", k, devices)
    with pytest.raises(ValueError, match="every_k_schedule=1 on one device"):
        norms.check_two_sizes("every_k_schedule", 1, 1)
