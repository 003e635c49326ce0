"""pmap and shard_map: P devices against one with the big batch, in float64, and the collectives, counted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import (
    DEVICES,
    FORMS,
    K,
    assert_close,
    batch,
    big_batch,
    big_loss,
    inner,
    loss,
    mapped,
    micro_batches,
    noisy,
    params,
    split,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum


@pytest.mark.parametrize("form", FORMS)
def test_micro_steps_on_every_device_are_the_big_batch(form):
    """Catches a mean of means over devices, a sum P times too large, and clipping before the sync."""
    with jax.enable_x64(True):
        tx = jaxaccum.MultiSteps(inner(), K, axis_name="data")

        def train(p, data):
            def step(carry, micro_batch):
                value, *carry = tx.micro_step(loss, *carry, micro_batch)
                return tuple(carry), value

            (p, state), values = jax.lax.scan(step, (p, tx.init(p)), data)
            return p, state.gradient_step, values

        windows = [batch(0), batch(1)]
        data = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *[split(w, DEVICES, K) for w in windows])
        got, steps, values = mapped(form, train, (None, 0), (None, None, 0))(params(), data)
        assert steps == 2 and values.shape == (DEVICES, 2 * K)
        assert_close(got, big_batch(windows))


def test_a_state_made_outside_of_pmap_is_replicated():
    """Catches an init that only runs inside the mapped function: flax's scripts make their state before it."""
    with jax.enable_x64(True):
        tx = jaxaccum.MultiSteps(inner(), K, axis_name="data")
        replicated = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), (params(), tx.init(params())))
        step = jax.pmap(lambda p, state, data: tx.micro_step(loss, p, state, data), axis_name="data")
        for i in range(K):
            micro_batch = jax.tree.map(lambda x, i=i: x[:, i], split(batch(), DEVICES, K))
            _, *replicated = step(*replicated, micro_batch)
        for device in range(DEVICES):
            assert_close(jax.tree.map(lambda x, device=device: x[device], replicated[0]), big_batch([batch()]))


@pytest.mark.parametrize("form", FORMS)
def test_a_window_on_every_device_is_the_big_batch(form):
    """Catches a loss or gradient that is one device's own."""
    with jax.enable_x64(True):
        f = jaxaccum.value_and_grad(loss, K, axis_name="data")
        got = mapped(form, f, (None, 0), (None, None))(params(), split(batch(), DEVICES))
        assert_close(got, jax.value_and_grad(big_loss)(params(), batch()))


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_numbered_as_on_one_device(form):
    """Catches the same dropout mask on every device."""
    with jax.enable_x64(True):
        one = jaxaccum.value_and_grad(noisy, DEVICES * K, key_argnums=2, stacked=True)
        f = jaxaccum.value_and_grad(noisy, K, key_argnums=2, axis_name="data")
        got = mapped(form, f, (None, 0, None), (None, None))(params(), split(batch(), DEVICES), jax.random.key(1))
        assert_close(got, one(params(), micro_batches(batch(), DEVICES, K), jax.random.key(1)))


@pytest.mark.parametrize("form", FORMS)
def test_model_state_is_averaged_in_the_windows_sync(form):
    """Catches statistics of one device, and integers that a mean would turn into floats."""
    fun = lambda p, data, stats: (big_loss(p, data), {"mean": stats["mean"] + data["x"].sum(), "n": stats["n"] + 1})
    with jax.enable_x64(True):
        f = jaxaccum.value_and_grad(fun, K, carry_argnums=2, axis_name="data")
        stats = {"mean": jnp.array(1.0), "n": jnp.int32(0)}
        (_, new), _ = mapped(form, f, (None, 0, None), (None, None))(params(), split(batch(), DEVICES), stats)
        assert new["n"] == K and new["n"].dtype == jnp.int32
        np.testing.assert_allclose(new["mean"], 1 + batch()["x"].sum() / DEVICES, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_nonfinite_micro_batch_is_dropped_on_its_device_alone(form):
    """Catches a drop that the other devices wait for, or that loses the window."""
    with jax.enable_x64(True):
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, axis_name="data", nonfinite="drop")

        def train(p, grad, weight):
            p, state = tx.apply(p, tx.init(p), grad, weight=weight)
            return p, state.dropped

        grads, weights = jnp.arange(8.0).at[5].set(jnp.nan), jnp.arange(8.0) + 1
        got, dropped = mapped(form, train, (None, 0, 0), (None, 0))(jnp.array(0.0), grads, weights)
        assert dropped.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
        keep = np.arange(8) != 5
        np.testing.assert_allclose(got, -np.sum((grads * weights)[keep]) / np.sum(weights[keep]), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_flush_joins_what_the_devices_hold(form):
    """Catches a partial window divided by one device's weight."""
    with jax.enable_x64(True):
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4, axis_name="data")

        def train(p, grad, weight):
            updates, state = tx.update(grad, tx.init(p), p, weight=weight)
            updates, state = tx.flush(state, p)
            return updates, state.gradient_step

        weights = jnp.arange(8.0)
        updates, steps = mapped(form, train, (None, 0, 0), (None, None))(jnp.array(0.0), jnp.arange(8.0), weights)
        np.testing.assert_allclose(updates, -np.sum(np.arange(8.0) ** 2) / 28, rtol=1e-12)
        assert steps == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_window_that_weighs_nothing_on_any_device_changes_nothing(form):
    """Catches an optimizer step on 0/0, decided device by device."""
    tx = jaxaccum.MultiSteps(optax.adamw(0.1, weight_decay=0.1), 1, axis_name="data")

    def train(p, grad, weight):
        p, state = tx.apply(p, tx.init(p), grad, weight=weight)
        return p, state.gradient_step

    run = mapped(form, train, (None, 0, 0), (None, None))
    for weights, steps in ((jnp.zeros(8), 0), (jnp.zeros(8).at[2].set(1.0), 1)):
        got, count = run(jnp.array(1.0), jnp.full(8, 3.0), weights)
        assert count == steps and (got == 1.0) == (steps == 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_grad_mean", [True, False])
def test_the_sum_mode_is_the_mean_over_devices(form, use_grad_mean):
    """Catches a sum that grows with the number of devices."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, use_grad_mean, axis_name="data")

    def train(p, grad):
        state = tx.init(p)
        for _ in range(2):
            p, state = tx.apply(p, state, grad)
        return (p,)

    (got,) = mapped(form, train, (None, 0), (None,))(jnp.array(0.0), jnp.arange(8.0))
    assert got == (-3.5 if use_grad_mean else -7.0)


@pytest.mark.parametrize("form", FORMS)
def test_a_value_is_averaged_over_the_devices(form):
    """Catches a schedule fed one device's loss: the replicas would part."""
    seen = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    tx = jaxaccum.MultiSteps(seen, 1, axis_name="data")

    def train(p, grad, value, weight):
        _, state = tx.update(grad, tx.init(p), p, value=value, weight=weight)
        return (state.inner_opt_state,)

    values, weights = jnp.arange(8.0), jnp.arange(8.0)
    (got,) = mapped(form, train, (None, 0, 0, 0), (None,))(jnp.array(0.0), values, values, weights)
    np.testing.assert_allclose(got, 140 / 28, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_sync_is_once_a_window(form):
    """Catches a reduction in every micro-step: it changes no number, and costs K times the wire."""
    tx = jaxaccum.MultiSteps(optax.adam(1e-3), K, axis_name="data")

    def program(boundary):
        def train(p, data):
            def step(carry, data):
                return tx.micro_step(loss, *carry, data, boundary=boundary)[1:], None

            (p, state), _ = jax.lax.scan(step, (p, tx.init(p)), data)
            return p, state.gradient_step

        compiled = mapped(form, train, (None, 0), (None, None)).lower(params(), split(batch(), DEVICES, K)).compile()
        return jaxaccum.collectives(compiled, mesh=jax.make_mesh((DEVICES,), ("data",)))

    assert program(False).all == ()
    assert len(program(True).all) == program(True).count("all-reduce", axis="data", in_conditional=False) == 1
    (sync,) = program(None).all
    assert sync.kind == "all-reduce" and sync.axes == ("data",) and sync.where == ("loop", "conditional")


@pytest.mark.parametrize("form", FORMS)
def test_a_windows_sync_is_after_its_loop(form):
    """Catches a reduction of every micro-batch's gradient inside the loop."""
    f = jaxaccum.value_and_grad(loss, K, axis_name="data")
    program = mapped(form, f, (None, 0), (None, None)).lower(params(), split(batch(), DEVICES)).compile()
    found = jaxaccum.collectives(program, mesh=jax.make_mesh((DEVICES,), ("data",)))
    assert len(found.all) == found.count("all-reduce", axis="data", in_loop=False, in_conditional=False) == 1


def test_a_boundary_that_differs_between_devices_is_refused():
    """Catches a deadlock."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, axis_name="data")
    train = lambda p, data: (tx.micro_step(loss, p, tx.init(p), data, boundary=data["mask"].sum() > 0)[1],)
    with pytest.raises(ValueError, match=r"boundary must be the same on every device.*axis_name=\('data',\)"):
        mapped("shard_map", train, (None, 0), (None,))(params(), split(batch(), DEVICES))


def test_a_gradient_that_is_reduced_already_is_refused():
    """Catches the reduction that jax inserts in every micro-step, and a gradient P times too large."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, axis_name="data")
    train = lambda p, data: (tx.apply(p, tx.init(p), jax.grad(lambda p: loss(p, data).total)(p))[0],)
    with pytest.raises(ValueError, match=r"has been reduced over it already.*pcast"):
        mapped("shard_map", train, (None, 0), (None,))(params(), split(batch(), DEVICES))


def test_a_loss_that_is_reduced_already_is_refused_in_micro_steps():
    """Catches a gradient that is divided by the number of devices twice."""
    reduced = lambda p, data: jax.lax.pmean(loss(p, data).total, "data")
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, axis_name="data")
    train = lambda p, data: (tx.micro_step(reduced, p, tx.init(p), data)[0],)
    with pytest.raises(ValueError, match=r"the loss does not vary over axis_name=.*Return each device's own mean"):
        mapped("shard_map", train, (None, 0), (None,))(params(), split(batch(), DEVICES))


def test_a_skip_decided_on_one_device_is_refused():
    """Catches a deadlock: the others would wait for a boundary that never comes."""
    with pytest.raises(ValueError, match=r"should_skip_update_fn can't be used on several devices.*nonfinite='drop'"):
        jaxaccum.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite, axis_name="data")


@pytest.mark.parametrize("form", FORMS)
def test_a_prepare_that_gathers_is_carried_back_once(form):
    """Catches a shard's gradient summed over the devices twice, one that is not, and a gather in every micro-step."""
    with jax.enable_x64(True):
        gather = lambda p: {"w": jax.lax.all_gather(p["w"], "data", tiled=True), "b": p["b"]}
        padded = lambda x: jnp.pad(x, ((0, 0), (0, 13)))
        fun = lambda p, data: loss(p, {**data, "x": padded(data["x"])})
        f = jaxaccum.value_and_grad(fun, K, prepare=gather, axis_name="data")
        shards = jnp.zeros((16, 4)).at[:3].set(params()["w"]).reshape(DEVICES, 2, 4)

        def window(w, b, data):
            value, grads = f({"w": w, "b": b}, data)
            return value, grads["w"], grads["b"]

        mapped_window = mapped(form, window, (0, None, 0), (None, 0, None))
        value, w, b = mapped_window(shards, params()["b"], split(batch(), DEVICES))
        got = value, {"w": w.reshape(16, 4)[:3], "b": b}
        assert_close(got, jax.value_and_grad(big_loss)(params(), batch()))
        text = mapped_window.lower(shards, params()["b"], split(batch(), DEVICES)).compile().as_text()
        entry = text[text.index("ENTRY") :]
        for kind in ("all-gather", "reduce-scatter"):
            assert entry.count(f" {kind}(") == text.count(f" {kind}(") == 1


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda p: jax.lax.psum(p, "data"), NotImplementedError, "prepare calls psum.*over.*data.*all_gather"),
        (
            lambda p: (p, jax.lax.all_gather(p, "data")),
            ValueError,
            r"hands params on gathered over \('data',\) and also not",
        ),
        (
            lambda p: jax.lax.scan(lambda c, x: (c, jax.lax.all_gather(x, "data")), 0, p)[1],
            NotImplementedError,
            "prepare calls scan over.*outside of loops",
        ),
    ],
)
def test_a_prepare_that_communicates_otherwise_is_refused(prepare, error, message):
    """Catches a gradient P times too large."""
    f = jaxaccum.value_and_grad(lambda p, x: jnp.mean(x), K, prepare=prepare, axis_name="data")
    with pytest.raises(error, match=message):
        mapped("pmap", f, (0, 0), (None, 0))(jnp.ones((DEVICES, 3)), jnp.ones((DEVICES, K, 24)))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_parameters_may_be_gathered_over_two_axes_in_turn(order):
    """Catches a gradient that is reduced again over the first of them."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))

    def gather(w):
        for name in order:
            w = jax.lax.all_gather(w, name, tiled=True)
        return w

    fun = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    f = jaxaccum.value_and_grad(fun, K, prepare=gather, axis_name=("a", "b"))
    rows = P(order[::-1])
    window = jax.shard_map(f, mesh=mesh, in_specs=(rows, P(("a", "b"))), out_specs=(P(), rows), check_vma=False)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = rng.standard_normal((4, 2)), rng.standard_normal((4 * K, 4))
        assert_close(jax.jit(window)(w, x), jax.value_and_grad(fun)(w, x))


def test_keys_are_numbered_over_a_tuple_of_axes():
    """Catches devices along one of two data axes that draw the same masks."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    with jax.enable_x64(True):
        one = jaxaccum.value_and_grad(noisy, DEVICES * K, key_argnums=2, stacked=True)
        want = one(params(), micro_batches(batch(), DEVICES, K), jax.random.key(1))
        f = jaxaccum.value_and_grad(noisy, K, key_argnums=2, mesh=mesh, data_axis=("data", "fsdp"))
        data = jax.device_put(batch(), NamedSharding(mesh, P(("data", "fsdp"))))
        assert_close(jax.jit(f)(params(), data, jax.random.key(1)), want)
