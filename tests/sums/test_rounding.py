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


@pytest.mark.parametrize("way", [jax.grad, jax.jacfwd], ids=["grad", "jacfwd"])
def test_the_derivative_is_that_of_the_sum(way):
    """Catches random bits that cut a derivative off: that of a window's gradient was 0."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((3, 2)), rng.standard_normal((8, 3))
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    square = lambda gradient: way(lambda w: jnp.sum(gradient(w, x)[1] ** 2))
    with jax.enable_x64(True):
        want = square(jax.value_and_grad(loss))(jnp.asarray(w))
    w, x = jnp.float32(w), jnp.float32(x)
    got = square(jaxaccum.value_and_grad(loss, 4, accumulator_dtype=jnp.bfloat16))(w)
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())


STEP = 1.002  # Between two numbers of bfloat16, a quarter of the way.


def of_micro_step(at, window=0):
    """The sum of two equal leaves that STEP is added to in micro-step `at` of a window."""
    tx = jaxaccum.MultiSteps(optax.sgd(0.0), 4, accumulator_dtype=jnp.bfloat16)
    update, state = jax.jit(lambda g, s: tx.update([g, g], s)[1]), tx.init([jnp.zeros(SIZE)] * 2)
    for _ in range(4 * window + at):
        state = update(jnp.zeros(SIZE), state)
    return update(jnp.full(SIZE, STEP), state).acc_grads


def of_window(at, **options):
    """The gradient of a window whose micro-batch `at` has all of it, and each the loss 0."""
    other = lambda x: x - jax.lax.stop_gradient(x)
    f = jaxaccum.value_and_grad(
        lambda w, x: other(jnp.mean(x) * jnp.sum(w)), 2, accumulator_dtype=jnp.bfloat16, **options
    )
    rows = np.zeros((4, 1), np.float32) if options else np.zeros((2, 1), np.float32)
    rows[at::2] = STEP
    return jax.jit(f)(jnp.ones(SIZE), rows)[1]


def test_micro_steps_windows_and_leaves_round_differently():
    """Catches random bits that come again: of each micro-step, of each window, for each leaf."""
    differ = lambda a, b: (np.asarray(a) != np.asarray(b)).mean() > 0.2
    first, other = of_micro_step(0)
    assert differ(first, other)
    assert differ(first, of_micro_step(1)[0]) and differ(first, of_micro_step(0, window=1)[0])
    assert differ(of_window(0), of_window(1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    # Of two sums that are rounded apart, many means lie between two numbers of bfloat16.
    means = np.asarray(of_window(0, mesh=mesh)) * 2
    assert (means != means.astype(jnp.bfloat16)).mean() > 0.2


def test_the_devices_of_a_mapped_axis_round_differently():
    """Catches the same bits on each of them."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4, axis_name="data", accumulator_dtype=jnp.bfloat16)
    step = jax.pmap(lambda g: tx.update(g, tx.init(g))[1].acc_grads, "data", devices=jax.devices()[:2])
    sums = step(jnp.full((2, SIZE), STEP))
    assert (sums[0] != sums[1]).mean() > 0.2


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_a_nan_stays_one(bits):
    """Catches noise that carries a NaN's bits over to an infinity or a number."""
    nan = jnp.asarray(np.uint32(bits)).view(jnp.float32)
    kept = weighted_sum.add(jnp.zeros(64, jnp.bfloat16), jnp.broadcast_to(nan, 64), counters=(jnp.int32(1),))
    assert jnp.isnan(kept).all()
