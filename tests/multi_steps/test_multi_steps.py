"""`MultiSteps`, rule by rule. Exactness is in test_exact, programs in test_compiled, composition in test_compose."""

import functools

import exact
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum

DRIVES = ["eager", "counter", "static", "traced"]


def run(tx, params, grads, weights=None, *, drive="counter", k=None, state=None, **extra_args):
    """Feeds `grads` one by one; boundaries that the host decides fall on every `k`-th call."""
    state = tx.init(params) if state is None else state
    step = lambda p, s, g, w, boundary, extra: tx.apply(p, s, g, weight=w, boundary=boundary, **extra)
    step = step if drive == "eager" else jax.jit(step, static_argnums=4 if drive == "static" else ())
    for i, grad in enumerate(grads):
        closes = (i + 1) % k == 0 if k else None
        boundary = {"static": closes, "traced": None if closes is None else jnp.asarray(closes)}.get(drive)
        extra = {name: values[i] for name, values in extra_args.items()}
        params, state = step(params, state, grad, None if weights is None else weights[i], boundary, extra)
    return params, state


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_gradient_ends_with_its_window(drive, bad):
    """Catches sums cleared by a product, which NaN survives."""
    tx = jaxaccum.MultiSteps(optax.chain(optax.zero_nans(), optax.sgd(1.0)), 2)
    grads = [jnp.array(g) for g in (bad, 1.0, 2.0, 4.0)]
    state = run(tx, jnp.array(0.0), grads, drive=drive, k=2)[1]
    before = run(tx, jnp.array(0.0), grads[:2], drive=drive, k=2)
    params, _ = run(tx, jnp.array(0.0), grads[2:], drive=drive, k=2, state=before[1])
    assert params == -3.0
    assert int(state.dropped) == 0


@pytest.mark.parametrize("drive", DRIVES)
def test_dropping_costs_the_nonfinite_micro_batch_only(drive):
    """Catches a drop that loses the window, is not counted, divides by K, or takes an infinity for a number."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4, nonfinite="drop")
    grads = [jnp.array([1.0, 1.0]), jnp.array([5.0, np.nan]), jnp.array([-np.inf, 5.0]), jnp.array([3.0, 5.0])]
    params, state = run(tx, jnp.zeros(2), grads, drive=drive, k=4)
    assert_same(params, jnp.array([-2.0, -3.0]))
    assert int(state.dropped) == 2 and int(state.gradient_step) == 1


def test_what_weighs_nothing_is_not_dropped():
    """Catches padding that is NaN, and counted among the micro-batches that were dropped."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, nonfinite="drop")
    params, state = run(tx, jnp.array(0.0), [jnp.array(np.nan), jnp.array(2.0)], [0.0, 1.0])
    assert params == -2.0 and int(state.dropped) == 0


@pytest.mark.parametrize("drive", DRIVES)
def test_a_window_that_weighs_nothing_changes_nothing(drive):
    """Catches the weight decay, moments and counts of an optimizer step on 0/0."""
    tx = jaxaccum.MultiSteps(optax.adamw(0.1, weight_decay=0.1), 2)
    params = {"w": jnp.arange(3.0), "b": jnp.ones(())}
    params, state = run(tx, params, [params, params], drive=drive, k=2)
    assert tx.has_updated(state)
    nothing = jax.tree.map(lambda p: jnp.full_like(p, np.nan), params)
    after, new_state = run(tx, params, [nothing, nothing], [0.0, 0.0], drive=drive, k=2, state=state)
    assert_same((after, new_state.inner_opt_state), (params, state.inner_opt_state))
    assert int(new_state.mini_step) == 0 and int(new_state.gradient_step) == 1
    assert not tx.has_updated(new_state)


@pytest.mark.parametrize("drive", ["eager", "counter"])
def test_a_k_that_shrinks_closes_the_window_at_the_next_micro_step(drive):
    """Catches pending micro-batches lost, or divided by the new K: 5 pending, then K goes from 8 to 3."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 8)
    grads = [jnp.array(float(g)) for g in (1, 2, 3, 4, 5)]
    params, state = run(tx, jnp.array(0.0), grads, drive=drive)
    state = jaxaccum.set_every_k(state, 3)
    params, state = run(tx, params, [jnp.array(9.0)], drive=drive, state=state)
    assert params == -4.0 and tx.has_updated(state)
    params, state = run(tx, params, [jnp.array(1.0)] * 3, drive=drive, state=state)
    assert params == -5.0 and int(state.gradient_step) == 2


def test_a_schedule_function_gives_k_by_optimizer_step():
    """Catches K fixed at its first value, or read before the step that changes it."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), lambda step: jnp.where(step < 2, 1, 3))
    params, state = jnp.array(0.0), tx.init(jnp.array(0.0))
    updated = []
    for _ in range(8):
        params, state = jax.jit(tx.apply)(params, state, jnp.array(1.0))
        updated.append(bool(tx.has_updated(state)))
    assert updated == [True, True, False, False, True, False, False, True]
    assert state.every_k is None


@pytest.mark.parametrize("drive", DRIVES)
def test_a_skipped_micro_step_never_happened(drive):
    """Catches a skip that is counted, closes the window, or leaves its gradient in the sums."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite)
    params, state = run(tx, jnp.array(0.0), [jnp.array(1.0)], drive=drive, k=2)
    for bad in (np.nan, np.inf):
        step = jax.jit(tx.apply, static_argnames="boundary")
        params, after = step(params, state, jnp.array(bad), boundary=True if drive == "static" else None)
        assert_same(after._replace(skip_state=(), updated=()), state._replace(skip_state=(), updated=()))
        assert not tx.has_updated(after) and bool(after.skip_state["should_skip"])
        state = after
    params, state = run(tx, params, [jnp.array(3.0)], drive=drive, k=1, state=state)
    assert params == -2.0 and int(state.gradient_step) == 1


def test_the_inner_optimizer_sees_no_partial_sum():
    """Catches an optimizer run on what is not a mean yet: this one is infinite on it."""
    reciprocal = optax.stateless(lambda updates, params: jax.tree.map(lambda g: 1 / (g - 1), updates))
    tx = jaxaccum.MultiSteps(optax.chain(reciprocal, optax.trace(0.9)), 2)
    for drive in DRIVES:
        params, state = run(tx, jnp.array(0.0), [jnp.array(1.0), jnp.array(3.0)], drive=drive, k=2)
        assert params == 1.0
        assert np.all(np.isfinite(jax.tree.leaves(state.inner_opt_state)[0]))


def test_flush_divides_by_what_the_window_holds():
    """Catches a partial window divided by K."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 8)
    _, state = run(tx, jnp.array(0.0), [jnp.array(2.0), jnp.array(6.0)], [1.0, 3.0])
    updates, state = jax.jit(tx.flush)(state, jnp.array(0.0))
    assert updates == -5.0 and tx.has_updated(state)
    assert int(state.mini_step) == 0 and int(state.gradient_step) == 1


def test_the_largest_count_of_steps_stays():
    """Catches a count that becomes negative, and schedules that begin again."""
    tx, most = jaxaccum.MultiSteps(optax.sgd(1.0), 1), np.iinfo(np.int32).max
    state = tx.init(jnp.array(0.0))._replace(gradient_step=jnp.int32(most))
    params, state = tx.apply(jnp.array(0.0), state, jnp.array(2.0))
    assert params == -2.0 and state.gradient_step == most


@pytest.mark.parametrize("jitted", [False, True])
def test_flush_of_nothing_does_nothing(jitted):
    """Catches an optimizer step on stale sums."""
    tx = jaxaccum.MultiSteps(optax.adamw(0.1), 2)
    params, state = run(tx, jnp.ones(3), [jnp.ones(3), jnp.ones(3)])
    updates, after = (jax.jit(tx.flush) if jitted else tx.flush)(state, params)
    assert_same(updates, jnp.zeros(3))
    assert_same(after._replace(updated=()), state._replace(updated=()))
    assert not tx.has_updated(after)


def test_a_thousand_ones_in_bfloat16_are_a_thousand():
    """Catches sums in the gradients' dtype: 1,024 ones in bfloat16 give 256."""
    tx = jaxaccum.MultiSteps(exact.recorder(), 1024, use_grad_mean=False)
    one = jnp.ones((), jnp.bfloat16)
    _, state = run(tx, one, [one] * 1024)
    assert state.inner_opt_state.mean == 1024


def test_the_mean_reaches_the_optimizer_unrounded():
    """Catches a mean cast to the gradients' dtype on its way: 1 and 1 + 2^-7 have a mean between two bfloat16."""
    tx = jaxaccum.MultiSteps(exact.recorder(), 2)
    grads = [jnp.asarray(1.0, jnp.bfloat16), jnp.asarray(1 + 2**-7, jnp.bfloat16)]
    _, state = run(tx, grads[0], grads)
    assert state.inner_opt_state.mean == 1 + 2**-8


@pytest.mark.parametrize("grad_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_types_are_those_of_the_bare_optimizer(param_dtype, grad_dtype):
    """Catches updates or a state whose dtypes change when the optimizer is wrapped, or from call to call."""
    opt = optax.adam(0.1)
    params, grads = jnp.ones(3, param_dtype), jnp.ones(3, grad_dtype)
    tx = jaxaccum.MultiSteps(opt, 2)
    state = tx.init(params)
    want, _ = opt.update(grads, opt.init(params), params)
    for boundary in (None, None, False, True):
        updates, new_state = jax.jit(tx.update, static_argnames="boundary")(grads, state, params, boundary=boundary)
        assert updates.dtype == want.dtype
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
        assert types(new_state) == types(state)
        state = new_state


def test_k_of_one_is_the_bare_optimizer_bit_for_bit():
    """Catches anything done to a gradient that needs nothing."""
    opt = optax.adamw(0.1)
    params = {"w": jnp.linspace(-1.0, 1.0, 7), "b": jnp.array(-0.0)}
    updates, _ = jax.jit(opt.update)(params, opt.init(params), params)
    tx = jaxaccum.MultiSteps(opt, 1)
    ours, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert_same(ours, updates)


def test_a_value_reaches_the_optimizer_as_the_windows_weighted_mean():
    """Catches extra args that are lost, or are the last micro-batch's."""
    seen = optax.GradientTransformationExtraArgs(
        lambda params: {"value": jnp.zeros(()), "other": jnp.zeros(())},
        lambda updates, state, params=None, *, value, other, **_: (updates, {"value": value, "other": other}),
    )
    tx = jaxaccum.MultiSteps(seen, 3)
    values = [jnp.array(v) for v in (1.0, 5.0, np.nan)]
    for drive in DRIVES:
        _, state = run(
            tx, jnp.zeros(2), [jnp.ones(2)] * 3, [1.0, 3.0, 0.0], drive=drive, k=3, value=values, other=[7.0, 8.0, 9.0]
        )
        assert_same(state.inner_opt_state, {"value": 4.0, "other": 9.0})


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("skips", [False, True])
def test_micro_step_is_backward_and_apply(nonfinite, skips):
    """Catches a loss's weight used twice or not at all."""
    options = {"nonfinite": nonfinite, "should_skip_update_fn": optax.skip_not_finite if skips else None}
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2, **options)
    loss = lambda w, x, mask: jaxaccum.Weighted(jnp.sum((x * w) ** 2 * mask), mask.sum())
    x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    params, state = jnp.array(1.0), tx.init(jnp.array(1.0))
    losses = []
    for i in range(2):
        value, params, state = jax.jit(lambda p, s, x, m: tx.micro_step(loss, p, s, x, m))(params, state, x[i], mask[i])
        losses.append(float(value))
    big = jax.grad(lambda w: jnp.sum((x * w) ** 2 * mask) / mask.sum())(jnp.array(1.0))
    np.testing.assert_allclose(params, 1 - 0.1 * big, rtol=1e-6)
    np.testing.assert_allclose(losses, [14 / 3, 16.0], rtol=1e-6)


@pytest.mark.parametrize("driver", ["counter", "host", "mesh"])
def test_micro_steps_pass_their_loss_as_value(driver):
    """Catches an optimizer such as `reduce_on_plateau` left without its value, or with the last micro-batch's."""
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    tx = jaxaccum.MultiSteps(seen, 2, **{"mesh": mesh} if driver == "mesh" else {})
    loss = lambda w, x: jaxaccum.Weighted(jnp.sum(w * x), jnp.sum(x > 0))
    step = jaxaccum.HostDriven(tx, loss) if driver == "host" else functools.partial(tx.micro_step, loss)
    params = jnp.ones(())
    state = tx.init(params)
    for x in ([1.0, 2.0], [6.0, 0.0]):
        _, params, state = step(params, state, jnp.array(x))
    assert state.inner_opt_state == 3.0


def test_a_micro_batch_without_tokens_needs_no_guard():
    """Catches a 0/0 loss of weight 0 that is multiplied away instead of selected out."""
    tx = jaxaccum.MultiSteps(optax.adamw(0.1), 2)
    loss = lambda w, x, m: jaxaccum.Weighted(jnp.sum(x * w * m) / m.sum() * m.sum(), m.sum())
    params, state = jnp.array(1.0), tx.init(jnp.array(1.0))
    for mask in (jnp.ones(3), jnp.zeros(3)):
        value, params, state = tx.micro_step(loss, params, state, jnp.ones(3), mask)
    assert value == 0.0 and np.isfinite(params) and tx.has_updated(state)


def test_leaves_without_gradient_pass_through():
    """Catches integers, random keys and None among the parameters that are summed, or crash."""
    params = {"w": jnp.ones(2), "steps": jnp.arange(3), "key": jax.random.key(0), "none": None, "empty": ()}
    no_gradient = lambda p: p if jnp.issubdtype(p.dtype, jnp.inexact) else np.zeros(p.shape, jax.dtypes.float0)
    grads = jax.tree.map(no_gradient, params)
    only_w = optax.masked(optax.sgd(1.0), {"w": True, "steps": False, "key": False, "none": None, "empty": ()})
    tx = jaxaccum.MultiSteps(only_w, 2)
    for drive in DRIVES:
        new, state = run(tx, params, [grads, grads], drive=drive, k=2)
        assert_same(new["w"], jnp.zeros(2))
        assert_same(
            (new["steps"], jax.random.key_data(new["key"])), (params["steps"], jax.random.key_data(params["key"]))
        )
        assert state.acc_grads["steps"] is None
    updates, _ = jax.jit(tx.flush)(run(tx, params, [grads])[1], params)
    assert_same(updates["w"], -jnp.ones(2))


def test_double_precision_parameters_are_summed_in_double_precision():
    """Catches float64 sums rounded to the default accumulator dtype."""
    with jax.enable_x64(True):
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
        params, state = run(tx, jnp.zeros((), jnp.float64), [jnp.float64(1.0), jnp.float64(1 + 2**-40)], [1.0, 1.0])
        assert params == -(1 + 2**-41) and state.acc_grads.dtype == jnp.float64 and state.weight.dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_the_accumulator_dtype_is_the_callers(dtype):
    """Catches an `accumulator_dtype` that is ignored."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, accumulator_dtype=dtype)
    params, state = run(tx, jnp.zeros(3, jnp.float16), [jnp.ones(3, jnp.float16)] * 2)
    assert state.acc_grads.dtype == (dtype or jnp.float16) and params.dtype == jnp.float16
    assert_same(params, -jnp.ones(3, jnp.float16))


def test_a_state_is_carried_through_a_scan():
    """Catches leaves whose type changes from call to call."""
    tx = jaxaccum.MultiSteps(optax.adam(0.1), 3)
    params = {"w": jnp.ones(3, jnp.bfloat16)}

    def step(carry, grad):
        params, state = carry
        params, state = tx.apply(params, state, {"w": grad}, weight=2.0)
        return (params, state), tx.has_updated(state)

    (_, state), updated = jax.lax.scan(step, (params, tx.init(params)), jnp.ones((7, 3), jnp.bfloat16))
    assert updated.tolist() == [False, False, True, False, False, True, False]
    assert int(state.mini_step) == 1


def test_the_static_boundary_may_be_numpys():
    """Catches `np.bool_` taken for a traced value, or refused."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 8)
    params, state = tx.apply(jnp.zeros(()), tx.init(jnp.zeros(())), jnp.ones(()), boundary=np.bool_(True))
    assert params == -1.0 and int(state.gradient_step) == 1


@pytest.mark.parametrize("static", [False, True])
def test_a_value_of_one_window_does_not_reach_the_next(static):
    """Catches a mean that holds values of an earlier window, where not every call passes one, or none: it is NaN."""
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None, *, value=0.0, **_: (updates, jnp.asarray(value)),
    )
    tx = jaxaccum.MultiSteps(seen, 3)
    state = tx.init(jnp.zeros(()))
    for i, value in enumerate((None, 7.0, None, None, 1.0, 3.0)):
        extra = {} if value is None else {"value": jnp.asarray(value)}
        boundary = i % 3 == 2 if static else None
        update = jax.jit(lambda s, extra, b=boundary: tx.update(jnp.ones(()), s, boundary=b, **extra)[1])
        state = update(state, extra)
    assert state.inner_opt_state == 2.0
    _, state = tx.flush(tx.update(jnp.ones(()), state, boundary=False if static else None)[1])
    assert np.isnan(state.inner_opt_state)


@pytest.mark.parametrize("norms", ["all", "noise"])
def test_a_new_state_holds_nothing(norms):
    """Catches sums, a weight or counters of a window that has not begun, which a flush or a checkpoint would take."""
    like = {"value": jnp.ones(2), "other": 1.0}
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, averaged_extra_args=like, gradient_norms=norms)
    state = tx.init(jnp.ones(3))._replace(every_k=None)
    assert not any(map(np.any, jax.tree.leaves(state)))


def test_a_number_among_traced_parameters():
    """Catches an init under jit that takes every parameter for an array."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
    state = jax.jit(lambda w: tx.init({"w": w, "b": 1.0}))(jnp.ones(3))
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), state.acc_grads) == {
        "w": ((3,), "float32"),
        "b": ((), "float32"),
    }
    assert not any(jax.tree.leaves(jax.tree.map(np.any, state.acc_grads)))


def test_a_value_that_is_nan_is_dropped_with_its_micro_batch():
    """Catches a loss of NaN, whose gradient is finite, that reaches the optimizer as the window's mean."""
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    tx = jaxaccum.MultiSteps(seen, 3, nonfinite="drop")
    params, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for grad, value in ((1.0, 2.0), (7.0, np.nan), (3.0, 4.0)):
        params, state = tx.apply(params, state, jnp.array(grad), value=jnp.array(value))
    assert params == 2.0 and state.inner_opt_state == 3.0 and state.dropped == 1


def test_low_precision_parameters_are_lifted_with_the_mean():
    """Catches a weight decay that is rounded to bfloat16 before it is added to a mean in float32."""
    opt = optax.chain(optax.add_decayed_weights(-0.3), optax.sgd(1.0))
    params, grad = jnp.ones((), jnp.bfloat16), jnp.asarray(0.3, jnp.bfloat16)  # It is 0.30078125.
    tx = jaxaccum.MultiSteps(opt, 1)
    updates, _ = tx.update(grad, tx.init(params), params)
    np.testing.assert_allclose(np.float32(updates), 0.3 - 0.30078125, rtol=1e-2)


def test_the_state_of_low_precision_parameters_is_not_rounded_on_its_way():
    """Catches a moment that decays in bfloat16, where the mean and the parameters are lifted to float32."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0, momentum=0.9), 1)
    params = jnp.zeros((), jnp.bfloat16)
    state = tx.init(params)
    for grad in (1.0, 0.099):  # 0.9 is 0.8984 in bfloat16.
        params, state = tx.apply(params, state, jnp.bfloat16(grad))
    assert state.inner_opt_state[0].trace == 1.0  # And not 0.9961.
