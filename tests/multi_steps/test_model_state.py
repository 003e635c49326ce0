"""aux, model state and keyword arguments in streams of micro-steps, and the lowered programs of `HostDriven`."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles
from devices import KINDS, mesh_of
from flax.linen import fp8_ops
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

K, N = 4, 8
FP8 = fp8_ops.OVERWRITE_WITH_GRADIENT


class Network(nn.Module):
    """A layer of eight bits and batch statistics."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(16, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)(x)
        return nn.Dense(4)(nn.relu(nn.BatchNorm(use_running_average=False)(h)))


def network():
    """(parameters with fp8 statistics, batch statistics, loss, a batch whose micro-batch 2 is NaN and weighs 0)."""
    module = Network()
    x = jax.random.normal(jax.random.key(1), (K * N, 16)) * jnp.linspace(0.5, 2.0, K * N)[:, None]
    variables = module.init(jax.random.key(0), x)
    params = {"params": variables["params"], FP8: variables[FP8]}
    mask = jnp.ones(K * N).at[2::K].set(0)

    def loss(params, statistics, batch):
        y, changed = module.apply({**params, "batch_stats": statistics}, batch["x"], mutable=["batch_stats"])
        total = jnp.sum(jnp.sum(y**2, axis=1) * batch["mask"])
        return jaxaccum.Weighted(total, jnp.sum(batch["mask"])), changed["batch_stats"]

    return params, variables["batch_stats"], loss, {"x": x.at[2::K].set(jnp.nan), "mask": mask}


def stepper(driver, tx, fun, **roles):
    """`step(params, state, *args, **kwargs)` of a driver."""
    if driver == "HostDriven":
        return jaxaccum.HostDriven(tx, fun, **roles)
    jit = jax.jit if driver == "jit" else lambda step: step
    return jit(lambda params, state, *args, **kwargs: tx.micro_step(fun, params, state, *args, **roles, **kwargs))


@pytest.mark.parametrize("driver", ["jit", "HostDriven"])
def test_batch_statistics_and_fp8_are_those_of_a_window(driver):
    """Catches statistics that NaN reaches, that are one micro-batch's, or that are summed."""
    start, statistics, loss, batch = network()
    opt = optax.sgd(0.125)
    tx = jaxaccum.MultiSteps(opt, K)
    step = stepper(driver, tx, loss, carry_argnums=1)
    params, state, carry = jax.tree.map(jnp.copy, start), tx.init(start), statistics
    for i in range(K):
        (_, carry), params, state = step(params, state, carry, jax.tree.map(lambda x, i=i: x[i::K], batch))
    window = jaxaccum.value_and_grad(loss, K, carry_argnums=1, batch_argnums=2)
    (_, want), grads = jax.jit(window)(start, statistics, batch)
    jax.tree.map(np.testing.assert_array_equal, carry, want)
    jax.tree.map(np.testing.assert_array_equal, params[FP8], grads[FP8])
    updates, _ = opt.update(grads["params"], opt.init(start["params"]))
    want = optax.apply_updates(start["params"], updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), params["params"], want)


def drifting(w, state, x, scale=1.0):
    """The mean loss, a state of each kind of leaf, and aux."""
    key, own = jax.random.split(state["key"])
    h = (x - state["mean"]) * w * scale * jax.random.bernoulli(own, 0.5, x.shape)
    new = {"mean": (state["mean"] + jnp.mean(x)) / 2, "count": state["count"] + 1, "key": key}
    return jnp.mean(h**2), (new, h[0])


def counted(w, state, x, scale=1.0):
    """The same; a batch that begins with NaN weighs 0."""
    value, rest = drifting(w, state, x, scale)
    weight = jnp.where(jnp.isnan(x[0]), 0, 2)
    return jaxaccum.Weighted(value * weight, weight), rest


def first_state():
    return {"mean": jnp.float32(0.5), "count": jnp.int32(2), "key": jax.random.key(3)}


def assert_same(a, b):
    """Trees of arrays and typed keys, bit for bit."""
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), a, b)


REASONS = {
    "weight": (counted, {}),
    "drop": (drifting, {"nonfinite": "drop"}),
    "skip": (drifting, {"should_skip_update_fn": optax.skip_not_finite}),
}


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        *[(driver, reason) for driver in ("eager", "jit") for reason in REASONS],
        *[("HostDriven", r) for r in ("weight", "drop")],
    ],
)
def test_a_micro_batch_that_is_left_out_leaves_the_carry(driver, reason):
    """Catches NaN in a state, a count of what was left out, and a key that it used up."""
    fun, options = REASONS[reason]
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 3, **options)
    step = stepper(driver, tx, fun, has_aux=True, carry_argnums=1)
    params, state, carry = jnp.float32(1.0), tx.init(jnp.float32(1.0)), first_state()
    (_, (carry, _)), params, state = step(params, state, carry, jnp.ones(2))
    assert carry["mean"] == 0.75 and carry["count"] == 3
    (_, (same, aux)), params, state = step(params, state, carry, jnp.full(2, jnp.nan))
    assert_same(same, carry)
    assert jnp.isnan(aux)  # aux is as it came.


@pytest.mark.parametrize("place", [*KINDS, "shard_map", "shard_map without vma"])
def test_on_several_devices(place):
    """Catches the state of one device, a device of weight 0 that spreads NaN, and one key for all devices."""
    xs = np.random.default_rng(0).normal(size=(2, 8, 2)).astype(np.float32)
    xs[1, 3] = np.nan  # Micro-step 1 on device 3.
    mesh = mesh_of(place if place in KINDS else "auto")
    roles = dict(has_aux=True, carry_argnums=1)
    start = jnp.float32(1.0)
    if place in KINDS:
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh)
        step = jaxaccum.HostDriven(tx, counted, **roles)
        params, state, carry, aux = jnp.copy(start), tx.init(start), first_state(), []
        for x in xs:
            (_, (carry, of_step)), params, state = step(params, state, carry, jnp.asarray(x.ravel()))
            aux.append(of_step)
    else:
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, axis_name="data")

        def both(params, carry, xs):
            state, aux = tx.init(params), []
            for x in xs:
                (_, (carry, of_step)), params, state = tx.micro_step(counted, params, state, carry, x, **roles)
                aux.append(of_step)
            return params, carry, jnp.stack(aux)[:, None]

        specs = dict(in_specs=(P(), P(), P(None, "data")), out_specs=(P(), P(), P(None, "data")))
        run = jax.jit(jax.shard_map(both, mesh=mesh, check_vma=place == "shard_map", **specs))
        params, carry, aux = run(start, first_state(), jnp.asarray(xs.reshape(2, 16)))
    want, total, weight = first_state(), 0.0, 0.0
    for i in range(2):
        news = []
        for p in range(8):
            own = {**want, "key": jax.random.fold_in(want["key"], p) if p else want["key"]}
            (_, (new, h)), grad = jax.value_and_grad(drifting, has_aux=True)(start, own, jnp.asarray(xs[i, p]))
            np.testing.assert_allclose(np.asarray(aux[i])[p], h, rtol=1e-5)
            is_left_out = np.isnan(xs[i, p, 0])
            news.append(own if is_left_out else new)
            total, weight = total + (0 if is_left_out else 2 * grad), weight + (0 if is_left_out else 2)
        mean = sum(new["mean"] for new in news) / 8
        want = {"mean": mean, "count": want["count"] + 1, "key": news[0]["key"]}
    np.testing.assert_allclose(carry["mean"], want["mean"], rtol=1e-6)
    assert_same({**carry, "mean": 0 * mean}, {**want, "mean": 0 * mean})
    np.testing.assert_allclose(params, start - total / weight, rtol=1e-5)


@pytest.mark.parametrize("driver", ["eager", "jit", "HostDriven"])
def test_keyword_arguments_reach_the_loss(driver):
    """Catches keyword arguments that are lost, and one of the loss's that is taken for ours."""
    fun = lambda w, x, *, scale, boundary: jnp.mean(w * x) * scale * boundary
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1)
    step = stepper(driver, tx, functools.partial(fun, boundary=3.0))
    loss, params, _ = step(jnp.float32(1.0), tx.init(jnp.float32(1.0)), jnp.ones(2), scale=2.0)
    assert loss == 6.0 and params == -5.0


@pytest.mark.parametrize("driver", ["jit", "HostDriven"])
def test_carries_in_any_order(driver):
    """Catches carries that the loss gets in other places once it has more arguments."""
    fun = lambda w, a, x, b, y: (w * x + y, (b + x, a + y))
    tx, w = jaxaccum.MultiSteps(optax.sgd(1.0), 1), jnp.float32(1.0)
    step = stepper(driver, tx, fun, carry_argnums=(3, 1))
    (loss, (b, a)), w, _ = step(w, tx.init(w), 10.0, 2.0, 20.0, 3.0)
    assert (loss, b, a, w) == (5.0, 22.0, 13.0, -1.0)


def test_a_key_by_keyword_on_a_mesh():
    """Catches one mask for all devices."""
    fun = lambda w, x, *, key: jnp.sum(w * x * jax.random.normal(key))
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, mesh=mesh_of("auto"))
    loss, *_ = tx.micro_step(fun, jnp.float32(1.0), tx.init(jnp.float32(1.0)), jnp.ones(8), key=jax.random.key(0))
    want = [jax.random.normal(jax.random.fold_in(jax.random.key(0), p)) for p in range(8)]
    np.testing.assert_allclose(loss, want, rtol=1e-6)


class Normalised(eqx.Module):
    """A layer with batch statistics in equinox's way."""

    norm: eqx.nn.BatchNorm
    scale: jax.Array

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.scale = jnp.ones(3)

    def __call__(self, x, state):
        return self.norm(x * self.scale, state)


@pytest.mark.parametrize("driver", ["eager", "HostDriven"])
def test_the_state_of_an_equinox_model(driver):
    """Catches a State, which has no `__eq__`, refused as a carry, or compiled for in each micro-step."""
    model, start = eqx.nn.make_with_state(Normalised)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fun(params, x, state):
        call = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = call(x, state)
        return jnp.mean(y**2), state

    x = jax.random.normal(jax.random.key(1), (8, 3))
    tx = jaxaccum.MultiSteps(optax.sgd(0.0), 2)
    step = stepper(driver, tx, fun, carry_argnums=2)
    state, got, want = tx.init(params), start, start
    for i, rows in enumerate([x[i::4] for i in range(4)]):
        with counted_compiles() as compiles:
            (_, got), params, state = step(params, state, rows, got)
        assert i < 2 or driver == "eager" or not compiles
        _, want = fun(params, rows, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_arrays_that_are_not_yet_on_the_mesh(reduce):
    """Catches programs that compile twice, and XLA's error about donated parameters that it splits."""
    mesh = mesh_of("auto")
    tx = jaxaccum.MultiSteps(optax.adam(0.1), 2, mesh=mesh, reduce=reduce)
    step = jaxaccum.HostDriven(tx, lambda w, x, s: (jnp.mean((x @ w) ** 2), s + jnp.mean(x, axis=0)), carry_argnums=2)
    params, carry, x = jnp.ones(16), jnp.zeros(16), jnp.ones((8, 16))
    state = tx.init(params)
    for _ in range(4):
        (_, carry), params, state = step(params, state, x, carry)
    np.testing.assert_array_equal(carry, 4.0)
    assert [program._cache_size() for program in step._programs[True]] == [1, 1]


def test_a_number_as_carry():
    """Catches programs that compile again for what they return, which has no weak type."""
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2)
    step = jaxaccum.HostDriven(tx, lambda w, x, s: (jnp.sum(x * w), s + x[0]), carry_argnums=2)
    params, carry, state = jnp.ones(2), 0.0, tx.init(jnp.ones(2))
    for _ in range(4):
        (_, carry), params, state = step(params, state, np.ones(2, np.float32), carry)
    assert carry == 4.0 and [program._cache_size() for program in step._programs[True]] == [1, 1]


def test_lowered_programs():
    """Catches programs that are not those of a call, a reduction in the accumulating one, and a count that moves."""
    mesh = mesh_of("auto")
    tx = jaxaccum.MultiSteps(optax.adam(0.1), 2, mesh=mesh)
    fun = lambda w, b: jaxaccum.Weighted(jnp.sum((b["x"] @ w) ** 2 * b["m"]), jnp.sum(b["m"]))
    step = jaxaccum.HostDriven(tx, fun)
    params, batch = jax.device_put(jnp.ones(16), NamedSharding(mesh, P())), {"x": jnp.ones((16, 16)), "m": jnp.ones(16)}
    args = params, tx.init(params), batch
    lowered = step.lower(*args)
    sync = [jaxaccum.collectives(x.compile(), mesh=mesh).count(axis="data") for x in lowered]
    assert sync[0] == 0 and sync[1] > 0
    careful = step.lower(*args[:2], {**batch, "m": batch["m"].at[:2].set(0)})
    assert all(a.as_text() != b.as_text() for a, b in zip(lowered, careful, strict=True))
    assert step.mini_step == 0
    step(*args)
    assert [program._cache_size() for program in step._programs[True]] == [1, 0]


def test_programs_lowered_from_shapes():
    """Catches a weight or a carry that is read where there is none."""
    tx = jaxaccum.MultiSteps(optax.adam(0.1), 2)
    step = jaxaccum.HostDriven(
        tx, lambda w, s, b, *, m: (jaxaccum.Weighted(jnp.sum(b @ w), jnp.sum(m)), s + 1), False, 1
    )
    params = jnp.ones(3)
    args, kwargs = (params, tx.init(params), jnp.float32(0.0), jnp.ones((4, 3))), {"m": jnp.ones(4)}
    shapes = jax.eval_shape(lambda: (args, kwargs))
    texts = [[x.as_text() for x in step.lower(*args, **kwargs)] for args, kwargs in ((args, kwargs), shapes)]
    assert texts[0] == texts[1]
