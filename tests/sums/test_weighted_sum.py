"""Weighted sums, function by function, beside numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum._sums import overwrites, weighted_sum
from jaxaccum._sums.weighted_sum import Added, Weighted

BF16 = jnp.bfloat16
assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def statistics(x):
    return {overwrites.NAME: x}


@pytest.mark.parametrize(
    ("dtype", "accumulator_dtype", "want"),
    [
        (BF16, jnp.float32, jnp.float32),
        (jnp.float32, BF16, BF16),
        (jnp.float32, None, jnp.float32),
        (jnp.float64, jnp.float32, jnp.float64),
        (jnp.complex64, jnp.float32, jnp.complex64),
    ],
)
def test_the_dtype_of_a_sum(dtype, accumulator_dtype, want):
    """Catches a double or a complex number that is summed in another dtype."""
    assert weighted_sum.sum_dtype(jnp.dtype(dtype), accumulator_dtype) == want


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_zero_sums(wrap):
    """Catches a sum for an integer, and statistics in the dtype of the sums."""
    tree = {"x": jnp.ones(2, BF16), "i": jnp.arange(2), "number": 1.0, **statistics(jnp.ones(2, BF16))}
    sums = wrap(lambda tree: weighted_sum.init(tree, jnp.float32))(tree)
    assert sums["i"] is None and not any(map(np.any, jax.tree.leaves(sums)))
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), sums, is_leaf=lambda x: hasattr(x, "dtype"))
    assert shapes == {
        "x": ((2,), "float32"),
        "i": None,
        "number": ((), "float32"),
        **statistics(((2,), "bfloat16")),
    }
    partly = jax.make_jaxpr(lambda x: weighted_sum.init({"x": x, "constant": 1.0}, None))(1.0)
    assert "optimization_barrier" in str(partly)  # It keeps the layout of what is traced.
    assert_equal(weighted_sum.cleared({"x": jnp.array([1.0, jnp.nan])}), {"x": jnp.zeros(2)})


def test_plain_numbers_become_arrays():
    """Catches a number that keeps no dtype, and an array that is copied."""
    x, y = jnp.ones(2), np.ones(2)
    made = weighted_sum.arrays([x, y, 2.0])
    assert made[0] is x and made[1] is y and isinstance(made[2], jax.Array)


WEIGHTS = {"none": None, "one": 3.0, "per row": np.array([2.0, 0.0])}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("keep", [None, np.array(True), np.array(False), np.array([True, False])], ids=str)
@pytest.mark.parametrize("first", [None, np.array(True), np.array(False)], ids=str)
def test_an_addition(weight, keep, first):
    """Catches a weight, a selection or a start on the wrong side of each other, or along another axis."""
    total, x = np.float32([[1, 2], [4, 8]]), np.float32([[16, 32], [64, 128]])
    total[0, 0] = np.nan if first is not None and first else 1  # What a window leaves behind.
    got = weighted_sum.add({"x": total}, {"x": x}, weight, keep=keep, first=first)["x"]
    along = lambda value: 1.0 if value is None else np.reshape(value, (-1, 1))
    term = x * along(weight) * along(keep)
    np.testing.assert_array_equal(got, term if first is not None and first else total + term)


def test_what_an_addition_leaves_alone():
    """Catches an `Added` sum that is added again, a leaf without a sum, and statistics with a weight."""
    total = {"none": None, "added": jnp.ones(2), **statistics(jnp.array([1.0, 5.0]))}
    x = {"none": jnp.ones(2), "added": Added(jnp.full(2, 7.0)), **statistics(jnp.array([2.0, 3.0]))}
    assert_equal(weighted_sum.add(total, x, 10.0), {"none": None, "added": jnp.full(2, 7.0), **statistics([2.0, 5.0])})
    assert_equal(weighted_sum.bare(x), {**x, "added": jnp.full(2, 7.0)})
    first = weighted_sum.add(total, x, first=np.array(True))
    assert_equal(first, {"none": None, "added": jnp.full(2, 7.0), **statistics([2.0, 3.0])})
    left_out = weighted_sum.add(
        statistics(jnp.array([1.0, 5.0])), statistics(jnp.full(2, jnp.nan)), keep=np.array(False)
    )
    assert_equal(left_out, statistics([1.0, 5.0]))


@pytest.mark.parametrize(
    ("dtype", "term"), [(jnp.float32, BF16), (BF16, jnp.float32), (BF16, BF16), (jnp.float16, BF16)]
)
def test_an_addition_rounds_once(dtype, term):
    """Catches a product or a sum that is rounded to half precision on its way."""
    rng = np.random.default_rng(0)
    total, x = jnp.asarray(rng.standard_normal(64), dtype), jnp.asarray(rng.standard_normal(64), term)
    got = weighted_sum.add(total, x, 1.1)
    exact = (np.float32(total) + np.float32(x) * np.float32(1.1)).astype(np.float32)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, exact.astype(dtype))


def test_complex_terms_have_real_weights():
    """Catches a weight in a dtype that loses the imaginary part, or is refused."""
    got = weighted_sum.add(jnp.complex64(1 + 1j), jnp.complex64(2j), 3.0, keep=np.array(True))
    assert complex(got) == 1 + 7j and got.dtype == jnp.complex64
    mean = weighted_sum.mean(Weighted(got, jnp.float32(2)), jnp.complex64(0))
    assert complex(mean) == 0.5 + 3.5j and mean.dtype == jnp.complex64


def test_stochastic_sums_differ_by_leaf_and_counter():
    """Catches leaves that share their noise, a sum in float32 that has some, and a sum without counters that has."""
    x = jnp.full(256, 1 + 2**-9, jnp.float32)
    zero = lambda dtype: [jnp.zeros(256, dtype)] * 2
    a, b = weighted_sum.add(zero(BF16), [x, x], counters=(0,))
    c, _ = weighted_sum.add(zero(BF16), [x, x], counters=(1,))
    assert np.any(a != b) and np.any(a != c) and np.any(b != c)
    assert_equal(weighted_sum.add(zero(jnp.float32), [x, x], counters=(0,)), [x, x])
    plain = weighted_sum.add(zero(BF16), [x, x])[0]
    assert np.all(plain == plain[0])
    merged = weighted_sum.merge(Weighted(zero(BF16), jnp.float32(1)), Weighted([x, x], 2.0), counters=(0,))
    assert_equal(merged.total, [a, b])
    assert float(merged.weight) == 3.0
    square = np.float32(weighted_sum.add(jnp.zeros((16, 16), BF16), x.reshape(16, 16), counters=(0,)))
    assert all(len(np.unique(rows, axis=0)) == 16 for rows in (square, square.T))


@pytest.mark.parametrize("keep", [None, np.array(False), np.array(True)])
def test_merged_sums(keep):
    """Catches a weight that is merged where its total is not."""
    total, weight = weighted_sum.merge(
        Weighted(jnp.ones(2), jnp.float32(1)), Weighted(jnp.array([2.0, 4.0]), jnp.float32(3)), keep=keep
    )
    assert_equal((total, weight), ([3.0, 5.0], 4.0) if keep is None or keep else ([1.0, 1.0], 1.0))


@pytest.mark.parametrize(
    ("sums", "like", "want"),
    [
        (BF16, BF16, BF16),
        (BF16, jnp.float32, jnp.float32),
        (jnp.float32, BF16, jnp.float32),
        (BF16, jnp.float16, jnp.float32),
        (jnp.float32, jnp.float8_e4m3fn, jnp.float32),
        (BF16, jnp.float8_e4m3fn, BF16),
    ],
)
def test_the_dtype_of_a_mean(sums, like, want):
    """Catches a mean that is rounded to the narrower dtype, and one that is not computed in float32."""
    got = weighted_sum.mean(Weighted(jnp.full(2, 10.0, sums), jnp.float32(3)), jnp.ones(2, like))
    assert got.dtype == want
    np.testing.assert_array_equal(got, np.full(2, np.float32(10) * (1 / np.float32(3)), np.float32).astype(want))


def test_the_mean_of_sums():
    """Catches a division by 0, statistics that are divided, and a leaf without a sum that is lost."""
    total = {"x": jnp.array([2.0, 4.0]), "none": None, **statistics(jnp.array([3.0]))}
    like = {"x": jnp.ones(2), "none": 7, **statistics(jnp.ones(1, BF16))}
    got = weighted_sum.mean(Weighted(total, jnp.float32(4)), like)
    assert_equal(got, {"x": [0.5, 1.0], "none": 7, **statistics([3.0])})
    assert got[overwrites.NAME].dtype == BF16
    assert_equal(weighted_sum.mean(Weighted(total, jnp.float32(0)), like)["x"], [2.0, 4.0])


def test_dtypes():
    """Catches strict promotion, and a weight that is not the widest float in use."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert weighted_sum.promoted(BF16, jnp.float32) == jnp.float32
        sums = weighted_sum.add(jnp.ones(2, BF16), jnp.ones(2, jnp.float16), jnp.float64(2), first=np.array(False))
        mean = weighted_sum.mean(Weighted(sums, jnp.float64(3)), jnp.ones(2, jnp.float16))
        assert_equal((sums, mean), ([3.0, 3.0], [1.0, 1.0]))
    assert weighted_sum.weight_dtype() == jnp.float32
    with jax.enable_x64(True):
        assert weighted_sum.weight_dtype() == jnp.float64
    assert [weighted_sum.is_inexact(x) for x in (1.0, 1, True, np.complex64(1), jnp.ones(2, BF16))] == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_finite_leaves():
    """Catches a leaf that is not looked at, an integer that is, and an answer for another device."""
    nan, x = jnp.array([[1.0, jnp.inf], [1.0, 2.0]]), jnp.ones((2, 3))
    assert weighted_sum.all_finite({"x": x, "i": jnp.arange(2)}) and not weighted_sum.all_finite([x, nan])
    assert not weighted_sum.all_finite([nan, x])
    np.testing.assert_array_equal(weighted_sum.all_finite([x, nan], (2,)), [False, True])
    np.testing.assert_array_equal(weighted_sum.all_finite([jnp.arange(2)], (2,)), [True, True])
    assert weighted_sum.all_finite([jnp.arange(2)]).shape == ()


def test_selection():
    """Catches a selection along another axis, of a static bool by an operation, or of a float0, which has no values."""
    new, old = {"x": jnp.ones((2, 2))}, {"x": jnp.zeros((2, 2))}
    assert weighted_sum.select(True, new, old) is new and weighted_sum.select(False, new, old) is old
    assert_equal(weighted_sum.select(np.array([True, False]), new, old), {"x": [[1.0, 1.0], [0.0, 0.0]]})
    assert_equal(weighted_sum.select(np.array(False), new, old), old)
    none = np.zeros(2, jax.dtypes.float0)
    assert weighted_sum.select(np.array(False), none, none) is none
    assert_equal(weighted_sum.only_if(np.array([False, True]), jnp.array([jnp.nan, 2.0])), [0.0, 2.0])
