"""The estimates of the gradient noise scale, beside a problem whose |G|² and tr(Σ) are known."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum
from jaxaccum._sums import norms
from jaxaccum._sums.norms import GradientNorms
from jaxaccum._sums.weighted_sum import Weighted

GRADIENT, NOISE, D = 1.0, 8.0, 64  # |G|², tr(Σ), and the number of parameters


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def two_sizes(kind, grads, weights):
    """Squared norms and sizes of windows of gradients (K, P, D), as the drivers compute them from their sums."""
    sums = Weighted(jnp.sum(grads * weights[..., None], 0), jnp.sum(weights, 0))
    joined = Weighted(jnp.sum(sums.total, 0), jnp.sum(sums.weight))
    norm = jnp.linalg.norm(joined.total / joined.weight)
    if kind == "all":
        squares = Weighted(jnp.sum(weights * jnp.sum(grads**2, -1)), joined.weight)
        return GradientNorms(norm, squares=squares, count=jnp.int32(weights.size)).two_sizes
    if kind == "one device":
        part = norms.of_part(Weighted(grads[0, 0] * weights[0, 0], weights[0, 0]))
    else:
        part = jnp.sum(norms.of_part(sums, weights.shape[1:]), 0)
    return norms.of_two_sizes(norm, part, norms.of_part(joined)).two_sizes


def windows(count, kind, k, is_equal, seed=0):
    """`two_sizes` of random windows; each micro-batch weighs 4, or 1 to 16."""
    rng, shape = np.random.default_rng(seed), (count, k, 8 if kind == "8 devices" else 1)
    deviations = np.sqrt(NOISE * np.linspace(1, 3, D) / (2 * D))
    weights = np.full(shape, 4.0) if is_equal else rng.integers(1, 17, shape).astype(float)
    noise = rng.standard_normal((*shape, D), np.float32) * deviations / np.sqrt(weights)[..., None]
    return two_sizes(kind, np.sqrt(GRADIENT / D) + noise, weights)


@functools.partial(jax.jit, static_argnums=0)
def seen(scale, windows):
    """The state after windows."""
    return jax.lax.scan(lambda state, x: (scale.update(state, *x), None), scale.init(), windows)[0]


@pytest.mark.parametrize("is_equal", [True, False])
@pytest.mark.parametrize(("kind", "k"), [(kind, k) for kind in ("one device", "8 devices", "all") for k in (2, 32)])
def test_estimates(kind, k, is_equal):
    """Catches a bias, a size that is not the one of the norm, and weights taken for equal ones."""
    scale = jaxaccum.NoiseScale(decay=1.0)
    drawn = windows(1400, kind, k, is_equal)
    of_seeds = jax.tree.map(lambda x: x[:400].reshape(200, 2, 2), drawn)
    estimates = np.asarray(jax.vmap(functools.partial(seen, scale))(of_seeds).mean, np.float64)
    error = np.std(estimates, axis=0, ddof=1) / np.sqrt(200)
    assert np.all(abs(np.mean(estimates, axis=0) - (GRADIENT, NOISE)) < 2 * error)
    found = scale.estimate(seen(scale, jax.tree.map(lambda x: x[400:], drawn)))
    np.testing.assert_allclose(found.scale, NOISE / GRADIENT, rtol=0.05)
    np.testing.assert_allclose(found.noise, NOISE, rtol=0.05)
    assert found.low < found.scale < found.high


def test_the_interval_holds_the_scale():
    """Catches the variance of a window for that of the mean, and a covariance of the wrong sign."""
    scale = jaxaccum.NoiseScale(confidence=0.9)
    of_seeds = jax.tree.map(lambda x: x.reshape(300, 200, 2), windows(60_000, "one device", 2, True))
    found = jax.vmap(lambda x: scale.estimate(seen(scale, x)))(of_seeds)
    inside = np.mean((found.low < NOISE / GRADIENT) & (found.high > NOISE / GRADIENT))
    assert 0.85 < inside < 0.95
    narrow = jaxaccum.NoiseScale(confidence=0.5).estimate(seen(scale, jax.tree.map(lambda x: x[0], of_seeds)))
    assert found.low[0] < narrow.low < found.scale[0] < narrow.high < found.high[0]


@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_the_interval_is_fiellers(confidence):
    """Catches each part of the formula, against the roots of its quadratic in float64."""
    gradients, noises = np.array([4.0, 5.0, 6.0, 4.5, 5.5]), np.array([20.0, 31.0, 24.0, 18.0, 33.0])
    scale = jaxaccum.NoiseScale(decay=0.9, confidence=confidence)
    with jax.enable_x64(True):
        squares = np.stack([gradients + noises / 2, gradients + noises / 6], axis=1)
        found = scale.estimate(seen(scale, (squares, np.tile([2.0, 6.0], (5, 1)))))
    weights = 0.9 ** np.arange(4, -1, -1)
    g, n = np.average(gradients, weights=weights), np.average(noises, weights=weights)
    variances = np.cov([gradients, noises], aweights=weights) * np.sum(weights**2) / np.sum(weights) ** 2
    ((s, st), (_, t)), z = variances, statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = sorted(np.roots([g**2 - z**2 * s, -2 * (g * n - z**2 * st), n**2 - z**2 * t]))
    np.testing.assert_allclose(found, [n / g, low, high, g, n], rtol=1e-10)


def test_what_can_not_be_told():
    """Catches an interval from one window, and a finite scale where there is no gradient."""
    scale = jaxaccum.NoiseScale()
    with jax.debug_nans(True):
        assert scale.estimate(scale.init()) == (np.inf, 0.0, np.inf, 0.0, 0.0)
        one = scale.update(scale.init(), [5.0, 3.0], [1.0, 2.0])
        assert scale.estimate(one) == (4.0, 0.0, np.inf, 1.0, 4.0)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 2, D)).cumsum(1)  # Of weights 1 and 2, without a gradient.
    squares = np.sum((noise / np.array([1.0, 2.0])[:, None]) ** 2, axis=-1)
    found = scale.estimate(seen(scale, (squares, np.tile([1.0, 2.0], (100, 1)))))
    assert found.high == np.inf and found.low > 10
    assert scale.estimate(seen(scale, (np.tile([1.0, 3.0], (9, 1)), np.tile([1.0, 2.0], (9, 1))))).low == 0


@pytest.mark.parametrize(
    ("squares", "sizes"),
    [([5.0, 5.0], [2.0, 2.0]), ([0.0, 5.0], [0.0, 2.0]), ([np.nan, 5.0], [1.0, 2.0]), ([5.0, np.inf], [1.0, 2.0])],
)
def test_a_window_that_tells_nothing(squares, sizes):
    """Catches NaN that stays for ever: K = 1, a first micro-batch of weight 0, and gradients that are not finite."""
    scale = jaxaccum.NoiseScale()
    state = scale.update(scale.init(), [5.0, 3.0], [1.0, 2.0])
    for x, y in zip(state, scale.update(state, squares, sizes), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sizes", [[1.0, 1.0], [2.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
def test_a_window_of_one_size_divides_by_something(sizes):
    """Catches a NaN that is left out, but that `jax.debug_nans` stops at."""
    scale = jaxaccum.NoiseScale()
    with jax.debug_nans(True), jax.debug_infs(True):
        for found, want in zip(scale.update(scale.init(), [5.0, 3.0], sizes), scale.init(), strict=True):
            np.testing.assert_array_equal(found, want)


def test_older_windows_fade():
    """Catches a mean that starts at 0, and one over all windows."""
    scale = jaxaccum.NoiseScale(decay=0.5)
    state = scale.init()
    for square in (5.0, 5.0, 9.0):  # Estimates (|G|², tr(Σ)): (1, 4), (1, 4), (-3, 12).
        state = scale.update(state, [square, 3.0], [1.0, 2.0])
    np.testing.assert_allclose(state.mean, [(0.25 + 0.5 - 3) / 1.75, (1 + 2 + 12) / 1.75], rtol=1e-6)
    weights, x = np.array([0.25, 0.5, 1.0]), np.array([[1, 4], [1, 4], [-3, 12]])
    np.testing.assert_allclose(state.scatter, 1.75 * np.cov(x.T, aweights=weights, ddof=0), rtol=1e-5)
    np.testing.assert_allclose((state.weight, state.weight_squared), (1.75, np.sum(weights**2)))


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.0},
        {"decay": 1.5},
        {"decay": True},
        {"decay": None},
        {"confidence": 0},
        {"confidence": 1.0},
        {"confidence": "0.95"},
    ],
)
def test_bad_arguments(options):
    """Catches a decay that forgets all, and a level of confidence in percent."""
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        jaxaccum.NoiseScale(**options)
