"""Sums in bfloat16: noisy, but without a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum
from jaxaccum._sums import weighted_sum

SIZE = 4096


def total(gradients, dtype, counters=True):
    """The sum of the rows, as the drivers make it."""

    def step(sums, row):
        i, x = row
        return weighted_sum.add(sums, x, counters=(i,) if counters else None), None

    start = jnp.zeros(gradients.shape[1:], dtype)
    return np.asarray(jax.lax.scan(step, start, (jnp.arange(len(gradients)), gradients))[0], np.float64)


def error(sums, gradients):
    """(relative error of the sums, relative error of their mean)."""
    exact = np.asarray(gradients, np.float64).sum(axis=0)
    norm = np.linalg.norm
    return norm(sums - exact) / norm(exact), abs((sums - exact).mean()) / np.abs(exact).mean()


def test_nothing_small_is_lost():
    """2,048 ones that make 256, and what is lost of gradients that pull in one direction."""
    gradients = 1 + 0.1 * jax.random.normal(jax.random.key(0), (2048, SIZE))
    nearest = error(total(gradients, jnp.bfloat16, counters=False), gradients)
    stochastic = error(total(gradients, jnp.bfloat16), gradients)
    wide = error(total(gradients, jnp.float32), gradients)
    assert nearest[0] > 0.7
    assert stochastic[0] < 0.06
    assert stochastic[1] < 3e-3
    assert wide[0] < 1e-6


def test_noise_where_gradients_have_no_direction():
    """The price: √2 of what rounding to the nearest costs there, and no more."""
    gradients = jax.random.normal(jax.random.key(0), (256, SIZE))
    nearest, stochastic = (error(total(gradients, jnp.bfloat16, counters), gradients)[0] for counters in (False, True))
    assert stochastic < 1.6 * nearest


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 256.0, np.inf, -np.inf, np.nan, 3e38, -3e38])
def test_what_needs_no_rounding_is_exact(value):
    """A carry into the sign or out of the exponent, or a NaN that noise makes a number of."""
    exact = np.float32(jnp.bfloat16(value))
    sums = total(jnp.full((1, 512), exact, jnp.float32), jnp.bfloat16)
    np.testing.assert_array_equal(sums, np.float64(exact))


@pytest.mark.parametrize("x", [1.002, -1.002, 3.1415, -1e-20])
def test_the_mean_of_many_roundings(x):
    """Bits that favour up or down, or are the same for neighbours."""
    once = total(jnp.full((1, 1 << 16), x, jnp.float32), jnp.bfloat16)
    below, above = sorted(set(once))
    assert below < np.float32(x) < above
    assert abs(once.mean() - np.float32(x)) < 0.01 * (above - below)
    assert abs(np.corrcoef(once[1:], once[:-1])[0, 1]) < 0.02


def test_a_resume_rounds_alike():
    """Bits that come from anywhere but the counters."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4, accumulator_dtype=jnp.bfloat16)
    params = jnp.ones(SIZE)
    states = []
    for _ in range(2):
        state = tx.init(params)
        for i in range(3):
            _, state = jax.jit(tx.update)(jax.random.normal(jax.random.key(i), (SIZE,)), state)
        states.append(state.acc_grads)
    np.testing.assert_array_equal(*states)
    assert states[0].dtype == jnp.bfloat16


def test_windows_and_devices_round_differently():
    """The same bits everywhere: their errors would add up."""
    loss = lambda w, x: jnp.sum(w * 1.002) + jnp.mean(x)
    f = jax.jit(jaxaccum.value_and_grad(loss, 2, accumulator_dtype=jnp.bfloat16))
    first, again, other = (f(jnp.ones(SIZE), jnp.full(2, x))[1] for x in (0.0, 0.0, 1.0))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4, accumulator_dtype=jnp.bfloat16, mesh=mesh)
    _, state = tx.update(jnp.full((2, SIZE), 1.002), tx.init(jnp.ones(SIZE)))
    assert (state.acc_grads[0] != state.acc_grads[1]).mean() > 0.2
