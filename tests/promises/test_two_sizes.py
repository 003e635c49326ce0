"""The norms that `NoiseScale` takes from windows and streams, beside float64 by hand, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles
from devices import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

K, N, D = 3, 2, 8
WHERE = {
    "one device": {},
    "shard_map": {"axis_name": "data"},
    "auto": {"mesh": mesh_of("auto")},
    "explicit zero": {"mesh": mesh_of("explicit"), "reduce": "scatter"},
}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def loss(p, b):
    error = jnp.sum((jnp.tanh(b["x"] @ p["w"]) + p["b"]) ** 2, axis=1)
    return jaxaccum.Weighted(jnp.sum(error * b["mask"]), jnp.sum(b["mask"]))


def params():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(3, 8))), "b": jnp.asarray(rng.normal(size=8))}


def batch(devices, k=K):
    """Rows (P, N, K, ...); device 1 has no tokens, and micro-batch 2 of the last one is NaN."""
    rng = np.random.default_rng(devices)
    x, mask = rng.normal(size=(devices, N, k, 3)), rng.integers(1, 4, (devices, N, k)).astype(float)
    if devices > 1:
        mask[1] = 0
    mask[-1, :, 2], x[-1, :, 2] = 0, np.nan
    return {"x": x, "mask": mask}


def flat(rows):
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[3:])), rows)


def square(rows):
    """(the squared norm of the mean gradient, the weight) of rows."""
    rows = flat(jax.tree.map(np.nan_to_num, rows))
    weight = float(rows["mask"].sum())
    grad = jax.grad(lambda p: loss(p, rows).total / max(weight, 1.0))(params())
    return sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(grad)), weight


def by_hand(devices, first=1, k=K):
    """`two_sizes`, whose small batch on one device is the `first` micro-batches."""
    rows = batch(devices, k)
    of = lambda *index: square(jax.tree.map(lambda x: x[index], rows))
    whole, total = of(slice(None))
    if devices == 1:
        small, size = of(slice(None), slice(None), slice(first))
    else:
        squares, weights = np.transpose([of(slice(p, p + 1)) for p in range(devices)])
        small, size = np.average(squares, weights=weights), weights.sum() / np.count_nonzero(weights)
    return (small, whole), (size, total)


def placed(where):
    return jax.device_put(params(), NamedSharding(where["mesh"], P())) if "mesh" in where else params()


def assert_norms(got, want):
    np.testing.assert_allclose(got.two_sizes, want, rtol=1e-12)
    np.testing.assert_allclose(got.window**2, want[0][1], rtol=1e-12)


@pytest.mark.parametrize("place", WHERE)
def test_windows(place):
    """Catches norms of sums instead of means, the wrong devices' weights, and NaN of what is left out."""
    where, devices = WHERE[place], 1 if place == "one device" else D
    run = lambda p, b: jaxaccum.value_and_grad(loss, K, gradient_norms="noise", **where)(p, b)[1:]
    if "axis_name" in where:
        run = jax.shard_map(run, mesh=mesh_of("auto"), in_specs=(P(), P("data")), out_specs=P())
    grads, norms = jax.jit(run)(placed(where), flat(batch(devices)))
    assert_norms(norms, by_hand(devices))
    squares = [np.sum(np.square(np.asarray(x))) for x in jax.tree.leaves(grads)]
    np.testing.assert_allclose(np.sum(squares), norms.window**2, rtol=1e-12)


@pytest.mark.parametrize("options", [{"unroll": 2}, {"prepare": "auto"}, {"prepare": jaxaccum.cast(jnp.float64)}])
def test_half_a_window(options):
    """Catches a part that is not half of an even K, and rows of aux that change their order."""
    with_aux = lambda p, b: (loss(p, b), b["mask"])
    f = jaxaccum.value_and_grad(with_aux, 4, has_aux=True, gradient_norms="noise", **options)
    (_, aux), _, norms = jax.jit(f)(params(), flat(batch(1, k=4)))
    assert_norms(norms, by_hand(1, first=2, k=4))
    np.testing.assert_array_equal(aux, batch(1, k=4)["mask"][0].T)


@pytest.mark.parametrize("flag", ["noise", "all", "window"])
@pytest.mark.parametrize("place", ["one device", "auto"])
def test_a_window_in_which_nothing_counts(place, flag):
    """Catches 0 / 0 in a norm, which a noise scale would keep."""
    rows = flat(batch(1 if place == "one device" else D)) | {"mask": jnp.zeros(K * N * (D if place == "auto" else 1))}
    run = jaxaccum.value_and_grad(loss, K, gradient_norms=flag, **WHERE[place])
    _, _, norms = jax.jit(run)(placed(WHERE[place]), rows)
    assert norms.window == 0
    if flag != "window":
        np.testing.assert_array_equal(norms.two_sizes, np.zeros((2, 2)))


def test_a_traced_k():
    """Catches a loop over all of the stacked batch, and a window of one micro-batch that tells something."""
    rows = jax.tree.map(lambda x: jnp.asarray(x[0].swapaxes(0, 1)), batch(1, k=5))
    f = jax.jit(lambda k: jaxaccum.value_and_grad(loss, k, stacked=True, gradient_norms="noise")(params(), rows)[2])
    short = jax.tree.map(lambda x: x[:, :, :4], batch(1, k=5))
    of_first = square(jax.tree.map(lambda x: x[:, :, :1], short))
    assert_norms(f(4), np.transpose([of_first, square(short)]))
    assert len(set(np.asarray(f(1).two_sizes[1]))) == 1


@pytest.mark.parametrize(
    ("place", "driver"),
    [*[("one device", driver) for driver in ("counter", "static", "host")], *[(p, "host") for p in list(WHERE)[2:]]],
)
def test_streams(place, driver):
    """Catches a first norm that a later micro-step overwrites, or that outlives its window."""
    where, devices = WHERE[place], 1 if place == "one device" else D
    tx = jaxaccum.MultiSteps(optax.sgd(0.0), K, gradient_norms="noise", **where)
    step = lambda p, state, b, last: tx.micro_step(loss, p, state, b, boundary=last if driver == "static" else None)
    step = jax.jit(step, static_argnums=3)
    if driver == "host":
        host = jaxaccum.HostDriven(tx, loss)
        step = lambda p, state, b, last: host(p, state, b)
    p, state = placed(where), tx.init(placed(where))
    assert not np.any(state.norms.two_sizes)
    for i in range(2 * K):
        before = np.asarray(state.norms.two_sizes)
        micro_batch = jax.tree.map(lambda x, i=i: jnp.asarray(x[:, :, i % K].reshape(-1, *x.shape[3:])), batch(devices))
        _, p, state = step(p, state, micro_batch, i % K == K - 1)
        if i % K == K - 1:
            assert_norms(state.norms, by_hand(devices))
            assert not np.any(state.norms.pending)
        else:
            np.testing.assert_array_equal(state.norms.two_sizes, before)


def test_the_sum_for_the_optimizer():
    """Catches the norm of Σ w·g for that of the mean gradient."""
    tx = jaxaccum.MultiSteps(optax.sgd(0.0), K, use_grad_mean=False, gradient_norms="noise")
    p, state = params(), tx.init(params())
    for i in range(K):
        rows = jax.tree.map(lambda x, i=i: jnp.asarray(x[0, :, i]), batch(1))
        _, p, state = tx.micro_step(loss, p, state, rows)
    want = by_hand(1)
    np.testing.assert_allclose(state.norms.two_sizes, want, rtol=1e-12)
    np.testing.assert_allclose(state.norms.window, np.sqrt(want[0][1]) * want[1][1], rtol=1e-12)


def test_a_window_goes_on_elsewhere():
    """Catches a first norm of another number of devices, and a part that is lost with the sums that are scaled."""
    where = WHERE["auto"]
    one, many = (jaxaccum.MultiSteps(optax.sgd(0.0), 2, gradient_norms="noise", **w) for w in ({}, where))
    fun, xs = lambda p, x: jnp.mean(p * x), jnp.arange(1.0, 9.0)
    p = jnp.ones(())
    _, _, state = one.micro_step(fun, p, one.init(p), xs)
    moved = one.redistribute(state, batch="global")
    np.testing.assert_array_equal(moved.norms.pending, state.norms.pending)
    p = jax.device_put(p, NamedSharding(where["mesh"], P()))
    _, _, state = many.micro_step(fun, p, many.redistribute(state, batch="global"), xs)
    assert state.norms.two_sizes[1][1] == 16 and state.norms.two_sizes[1][0] == 2


def test_two_sizes_are_needed():
    """Catches one device with K = 1, which would wait for ever for an estimate."""
    fun, p, x = lambda p, x: jnp.mean(p * x), jnp.ones(()), jnp.arange(8.0)
    match = "needs two batch sizes in a window, and {}=1 on one device"
    with pytest.raises(ValueError, match=match.format("num_micro_batches")):
        jaxaccum.value_and_grad(fun, 1, gradient_norms="noise")
    with pytest.raises(ValueError, match=match.format("every_k_schedule")):
        jaxaccum.MultiSteps(optax.sgd(0.0), 1, gradient_norms="noise")
    mapped = jaxaccum.value_and_grad(fun, 1, gradient_norms="noise", axis_name="data")
    with pytest.raises(ValueError, match=match.format("num_micro_batches")):
        jax.shard_map(
            mapped, mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), in_specs=P(), out_specs=P()
        )(p, x)
    _, _, norms = jaxaccum.value_and_grad(fun, 1, gradient_norms="noise", **WHERE["auto"])(p, x)
    np.testing.assert_allclose(norms.two_sizes, [[17.5, 12.25], [1, 8]])
    with pytest.raises(ValueError, match=r"two_sizes needs gradient_norms='noise' or 'all'"):
        _ = jaxaccum.value_and_grad(fun, 2, gradient_norms="window")(p, x)[2].two_sizes


def test_norms_of_every_micro_batch_have_two_sizes_too():
    """Catches the number of micro-batches of weight 0, and the sum of squares for their mean."""
    _, _, norms = jaxaccum.value_and_grad(loss, K, gradient_norms="all")(params(), flat(batch(1)))
    of_each = [square(jax.tree.map(lambda x, i=i: x[:, :, i : i + 1], batch(1))) for i in (0, 1)]
    squares, weights = np.transpose(of_each)
    want = (np.average(squares, weights=weights), weights.mean())
    np.testing.assert_allclose(np.asarray(norms.two_sizes)[:, 0], want, rtol=1e-12)


def test_gathered_parameters_are_refused():
    """Catches sums that are already reduced over the devices, taken for a device's own."""
    gather = lambda p: jax.lax.all_gather(p, "data", tiled=True)
    options = {"prepare": gather, "axis_name": "data", "gradient_norms": "noise"}
    run = lambda p, x: jaxaccum.value_and_grad(lambda p, x: jnp.mean(p * x), 2, **options)(p, x)[2].window
    mapped = jax.shard_map(run, mesh=mesh_of("auto"), in_specs=P("data"), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match="prepare gathers parameters"):
        mapped(jnp.ones(8), jnp.ones((16, 8)))


def layers(p, x):
    return jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_memory_of_a_window(k):
    """Catches a second tree of gradients, and sums that a loop copies."""
    p, x = jnp.ones((16, 32, 32)), jnp.ones((4 * k, 32))

    def temporary(flag):
        f = jax.jit(jaxaccum.value_and_grad(layers, k, gradient_norms=flag, accumulator_dtype=jnp.float64))
        return f.lower(p, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary("noise") < temporary(None) + p.nbytes / 16


def test_programs_of_a_stream():
    """Catches a second tree of gradients, and a program for each K or window."""
    p, x = jnp.ones((16, 32, 32)), jnp.ones((4, 32))

    def programs(flag):
        tx = jaxaccum.MultiSteps(optax.adam(0.1), 3, gradient_norms=flag)
        step, state = jaxaccum.HostDriven(tx, layers), tx.init(p)
        found = step.lower(p, state, x)
        return step, state, [program.compile().memory_analysis().temp_size_in_bytes for program in found]

    _, _, off = programs(None)
    step, state, on = programs("noise")
    assert np.all(np.subtract(on, off) < p.nbytes / 16)
    params = jnp.array(p)
    for i in range(10):
        with counted_compiles() as compiled:
            _, params, state = step(params, state, x)
        assert i < 3 or not compiled
        step.every_k = 2 if i > 5 else 3
