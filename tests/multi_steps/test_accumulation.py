"""A micro-step's decisions: whether it is the last one of its window, and whether its micro-batch counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum
from jaxaccum._multi_steps import accumulation, conditions
from jaxaccum._multi_steps.accumulation import Boundary, MicroBatch

K = 3
W = jnp.ones(2)


def begun(micro_steps, every_k=K, opt=None, **options):
    """(the configuration, a state after so many micro-steps)."""
    tx = jaxaccum.MultiSteps(opt or optax.sgd(1.0), every_k, **options)
    return tx._config, tx.init(W)._replace(mini_step=jnp.int32(micro_steps))


@pytest.mark.parametrize(
    ("micro_steps", "every_k", "want"),
    [(0, 3, False), (1, 3, False), (2, 3, True), (5, 3, True), (0, 1, True), (1, lambda step: 2 - step, True)],
)
def test_the_counter_decides(micro_steps, every_k, want):
    """Catches a window of K - 1 or K + 1 micro-steps, and one that stays open after K has shrunk."""
    config, state = begun(micro_steps, every_k)
    reached = Boundary(None).reached(config, state)
    assert reached is want
    traced = jax.jit(lambda state: Boundary(None).reached(config, state))(state)
    assert traced.dtype == bool and bool(traced) is want
    for given in (True, False):
        assert Boundary(given).reached(config, state) is given


def test_conditions():
    """Catches a conditional where tracing knows the answer, and an answer that is not waited for."""
    found = {}

    def body(flag):
        found["known"] = conditions.known(flag) is flag
        found["both"] = [conditions.both(a, b) for a in (True, False, flag) for b in (True, False, flag)]
        found["is flag"] = [x is flag for x in found["both"]]
        return conditions.both(flag, jnp.logical_not(flag)), conditions.both(flag, flag)

    assert [bool(x) for x in jax.jit(body)(True)] == [False, True]
    assert found["known"] and conditions.known(jnp.asarray(True)) is True
    assert found["both"][:2] == [True, False] and found["both"][3:6] == [False] * 3 and found["both"][7] is False
    assert found["is flag"] == [False, False, True, False, False, False, True, False, False]
    assert conditions.branch(True, lambda: 1, lambda: 2) == 1 and conditions.branch(False, lambda: 1, lambda: 2) == 2
    branch = lambda flag: conditions.branch(flag, lambda: 1.0, lambda: 2.0)
    assert [float(jax.jit(branch)(flag)) for flag in (True, False)] == [1.0, 2.0]
    assert "optimization_barrier" in str(jax.make_jaxpr(branch)(True))


NAN = jnp.array([1.0, jnp.nan])
# Of a configuration, a micro-batch: (whether it may be left out, whether it is kept, how many are dropped).
KEPT = {
    "plain": ("raise", W, None, False, (None, 0)),
    "a weight": ("raise", W, jnp.float32(2), False, (True, 0)),
    "no weight": ("raise", W, jnp.float32(0), False, (False, 0)),
    "a weight that counts": ("raise", W, jnp.float32(2), True, (None, 0)),
    "finite": ("drop", W, None, False, (True, 0)),
    "NaN": ("drop", NAN, None, False, (False, 1)),
    "NaN of weight 0": ("drop", NAN, jnp.float32(0), False, (False, 0)),
    "NaN of a weight": ("drop", NAN, jnp.float32(2), False, (False, 1)),
    "finite of weight 0": ("drop", W, jnp.float32(0), False, (False, 0)),
    "finite of a weight": ("drop", W, jnp.float32(2), False, (True, 0)),
    "NaN of a weight that counts": ("drop", NAN, jnp.float32(2), True, (False, 1)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name):
    """Catches a micro-batch of weight 0 that counts as dropped, and a selection where nothing can be left out."""
    nonfinite, grads, weight, counts, (want, dropped) = KEPT[name]
    config, state = begun(0, nonfinite="drop") if nonfinite == "drop" else begun(0)
    keep, number = accumulation._kept(config, state, MicroBatch(grads, weight, counts=counts), grads)
    assert (keep is None) == (want is None) and (want is None or bool(keep) is want)
    assert int(number) == dropped and number.dtype == jnp.int32


def test_what_is_accepted():
    """Catches a skip that is not one, or of other arguments than optax's, and a skip_state that is lost."""
    assert accumulation._accepted(*begun(0), W, W) == (True, ())
    seen = []

    def skips(grads, step, params):
        seen.append((grads, int(step), params))
        return grads[0] > 1, {"state": 7}

    config, state = begun(0, should_skip_update_fn=skips)
    state = state._replace(gradient_step=jnp.int32(5))
    assert accumulation._accepted(config, state, W, 3 * W) == (True, {"state": 7})
    assert accumulation._accepted(config, state, 2 * W, 3 * W)[0] is False
    grads, step, params = seen[-1]
    np.testing.assert_array_equal((grads, params), (2 * W, 3 * W))
    assert step == 5


@pytest.mark.parametrize("clears", [False, True])
def test_what_a_boundary_leaves(clears):
    """Catches sums that the next window starts with, counters that go on, and a write that is not needed."""
    config, state = begun(K - 1)
    state = state._replace(acc_grads=jnp.full(2, 10.0), weight=jnp.float32(2), updated=jnp.asarray(False))
    call = accumulation.Call(W, {}, applies=True)
    params, new, counted = accumulation.add(config, state, MicroBatch(2 * W, None), Boundary(True, clears), call)
    np.testing.assert_array_equal(params, W - 12 / 3)
    assert counted is True and bool(new.updated) and int(new.mini_step) == 0 and int(new.gradient_step) == 1
    if clears:
        assert not np.any(new.acc_grads) and float(new.weight) == 0
    else:
        assert new.acc_grads is state.acc_grads
    _, other, _ = accumulation.add(config, state, MicroBatch(2 * W, None), Boundary(False, clears), call)
    np.testing.assert_array_equal(other.acc_grads, [12.0, 12.0])
    assert float(other.weight) == 3 and int(other.mini_step) == K and not bool(other.updated)


@pytest.mark.parametrize("clears", [False, True])
def test_the_first_micro_step_of_a_window(clears):
    """Catches sums of the window before, which a boundary doesn't clear, and a start where they are cleared already."""
    config, state = begun(0)
    state = state._replace(acc_grads=jnp.full(2, 10.0), weight=jnp.float32(5))
    call = accumulation.Call(W, {}, applies=False)
    updates, new, _ = accumulation.add(
        config, state, MicroBatch(6 * W, 2.0, weighted=True), Boundary(False, clears), call
    )
    np.testing.assert_array_equal(updates, [0.0, 0.0])
    np.testing.assert_array_equal(new.acc_grads, [16.0, 16.0] if clears else [6.0, 6.0])
    assert float(new.weight) == (7 if clears else 2)
    _, new, _ = accumulation.add(config, state, MicroBatch(6 * W, 2.0), Boundary(False), call)
    np.testing.assert_array_equal(new.acc_grads, [12.0, 12.0])


@pytest.mark.parametrize("accumulator_dtype", [None, jnp.float32])
def test_the_dtypes_of_an_optimizer_step(accumulator_dtype):
    """Catches a step on bfloat16 parameters in another dtype than float32, and a `prepare` of parameters in that."""
    seen = []

    def update(updates, state, params):
        seen.append((updates.dtype, params.dtype))
        return -0.01 * updates.astype(jnp.float32), state

    opt = optax.GradientTransformation(lambda params: (), update)
    with jax.enable_x64(True):
        w = jnp.asarray([1.0, 3.0], jnp.bfloat16)
        tx = jaxaccum.MultiSteps(opt, 1, accumulator_dtype=accumulator_dtype, prepare=lambda w: 2 * w)
        loss = lambda w, x: jnp.sum(w * x).astype(jnp.float32)
        _, new, state = tx.micro_step(loss, w, tx.init(w), jnp.ones(2))
        assert seen[-1] == (jnp.float32, jnp.float32) and new.dtype == jnp.bfloat16
        np.testing.assert_array_equal(state.prepared[0], 2 * new, strict=True)


@pytest.mark.parametrize(
    ("micro_steps", "starts", "measured"),
    [(0, None, True), (1, None, False), (0, False, False), (1, True, True)],
)
def test_the_norm_of_the_first_sums(micro_steps, starts, measured):
    """Catches a norm of later sums, or none, where one device's noise scale compares a window's first part."""
    config, state = begun(micro_steps, gradient_norms="noise")
    before = jnp.array([5.0, 7.0, 1.0])
    state = state._replace(acc_grads=W, weight=jnp.float32(1), norms=state.norms._replace(pending=before))
    call = accumulation.Call(W, {}, applies=False)
    _, new, _ = accumulation.add(config, state, MicroBatch(2 * W, None), Boundary(False, starts=starts), call)
    weight, total = float(new.weight), np.asarray(new.acc_grads)
    np.testing.assert_allclose(new.norms.pending, [np.sum(total**2) / weight, weight, 1] if measured else before)
