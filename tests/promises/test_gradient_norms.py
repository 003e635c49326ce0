"""The norms of gradients from every driver, and functions of each micro-batch's gradient, beside float64 by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import KINDS, mesh_of
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.flax

K, N, D = 3, 2, 8
WHERE = {
    "one device": {},
    "shard_map": {"axis_name": "data"},
    **{kind: {"mesh": mesh_of(kind)} for kind in KINDS},
    **{f"{kind} zero": {"mesh": mesh_of(kind), "reduce": "scatter"} for kind in KINDS},
}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def params():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(3, 8))), "b": jnp.asarray(rng.normal(size=8))}


def batch(devices):
    """Rows (P, N, K, ...) of each device's micro-batches; device 1 has no tokens, micro-batch 1 of the last is NaN."""
    rng = np.random.default_rng(devices)
    x, mask = rng.normal(size=(devices, N, K, 3)), rng.integers(1, 4, (devices, N, K)).astype(float)
    if devices > 1:
        mask[1] = 0
    mask[-1, :, 1] = 0
    x[-1, :, 1] = np.nan
    return {"x": x, "mask": mask}


def flat(rows):
    """The batch that a window splits so."""
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(-1, *x.shape[3:])), rows)


def ragged(p, b):
    error = jnp.sum((jnp.tanh(b["x"] @ p["w"]) + p["b"]) ** 2, axis=1)
    return jaxaccum.Weighted(jnp.sum(error * b["mask"]), jnp.sum(b["mask"]))


def plain(p, b):
    return jnp.mean((jnp.tanh(jnp.nan_to_num(b["x"]) @ p["w"]) + p["b"]) ** 2)


LOSSES = {"ragged": ragged, "plain": plain}


def mean_gradient(loss, p, micro_batch):
    """(the weight, the gradient of the mean) of a micro-batch."""
    returned = loss(p, micro_batch)
    if not isinstance(returned, jaxaccum.Weighted):
        return 1.0, jax.grad(loss)(p, micro_batch)
    weight = float(returned.weight)
    return weight, jax.grad(lambda p: loss(p, micro_batch).total / weight)(p) if weight else None


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x))) for x in jax.tree.leaves(tree)))


@functools.cache
def by_hand(name, devices, transform=lambda g: g):
    """(norms of the micro-batches (K, P), their weights, the window's gradient)."""
    norms, weights, total = np.zeros((K, devices)), np.zeros((K, devices)), None
    for i in range(K):
        for p in range(devices):
            micro_batch = jax.tree.map(lambda x, p=p, i=i: jnp.asarray(x[p, :, i]), batch(devices))
            weight, grad = mean_gradient(LOSSES[name], params(), micro_batch)
            weights[i, p] = weight
            if weight:
                norms[i, p] = norm(grad)
                term = jax.tree.map(lambda g, weight=weight: weight * g, transform(grad))
                total = term if total is None else jax.tree.map(jnp.add, total, term)
    return norms, weights, jax.tree.map(lambda x: x / weights.sum(), total)


def assert_norms(got, name, devices):
    """All but `micro_batch`."""
    norms, weights, mean = by_hand(name, devices)
    np.testing.assert_allclose(got.window, norm(mean), rtol=1e-12)
    if got.squares is not None:
        np.testing.assert_allclose(got.squares, (np.sum(weights * norms**2), weights.sum()), rtol=1e-12)
        assert got.count == np.sum(weights > 0) and not np.any(got.pending)


def on_devices(where, fun, out_specs):
    """`fun(params, batch)` where its driver runs."""
    if "axis_name" not in where:
        return jax.jit(fun)
    mesh = mesh_of("auto")
    return jax.jit(jax.shard_map(fun, mesh=mesh, in_specs=(P(), P("data")), out_specs=out_specs))


def placed(where):
    return jax.device_put(params(), NamedSharding(where["mesh"], P())) if "mesh" in where else params()


@pytest.mark.parametrize(
    ("place", "name", "flag"),
    [(place, *rest) for place in WHERE for rest in (("ragged", "all"), ("ragged", "window"), ("plain", "all"))],
)
def test_windows(place, name, flag):
    """Catches norms of w·g, of one device, of what was left out, of NaN, and of a gradient that is reduced twice."""
    where, devices = WHERE[place], 1 if place == "one device" else D

    def run(p, b):
        _, _, norms = jaxaccum.value_and_grad(LOSSES[name], K, gradient_norms=flag, **where)(p, b)
        rows = norms.micro_batch
        return norms._replace(micro_batch=None), rows[:, None] if "axis_name" in where and rows is not None else rows

    norms, rows = on_devices(where, run, (P(), P(None, "data")))(placed(where), flat(batch(devices)))
    assert_norms(norms, name, devices)
    if flag == "all":
        np.testing.assert_allclose(np.reshape(rows, (K, devices)), by_hand(name, devices)[0], rtol=1e-12)


def stepper(driver, tx, local):
    """`step(params, state, micro_batch, is_last)` returns (params, state)."""
    if driver == "host":
        step = jaxaccum.HostDriven(tx, ragged)
        return lambda p, state, b, is_last: step(p, state, b)[1:]

    def step(p, state, b, is_last):
        if driver in ("update", "apply"):
            value, grads = local(p, b)
            if driver == "apply":
                return tx.apply(p, state, grads, weight=value.weight)
            updates, state = tx.update(grads, state, p, weight=value.weight)
            return optax.apply_updates(p, updates), state
        boundary = {"counter": None, "static": is_last, "traced": jnp.asarray(is_last)}[driver]
        return tx.micro_step(ragged, p, state, b, boundary=boundary)[1:]

    return jax.jit(step, static_argnums=3 if driver == "static" else ())


def local(p, b):
    """A micro-batch's `Weighted` loss and the gradient of its mean."""
    grads = jax.grad(lambda p: ragged(p, b).total / jnp.maximum(ragged(p, b).weight, 1))(p)
    return ragged(p, b), grads


@pytest.mark.parametrize(
    ("place", "driver", "flag"),
    [
        *[("one device", driver, "all") for driver in ("counter", "static", "traced", "host", "update", "apply")],
        *[(place, "host", "all") for place in WHERE if "mesh" in WHERE[place]],
        ("auto", "counter", "all"),
        ("auto", "update", "all"),
        ("one device", "host", "window"),
        ("explicit zero", "host", "window"),
    ],
)
def test_streams(place, driver, flag):
    """Catches norms that are cleared too early or too late, are of w·g, or are one device's."""
    where, devices = WHERE[place], 1 if place == "one device" else D
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, gradient_norms=flag, **where)
    of_each = jaxaccum.local_value_and_grad(ragged, mesh=where["mesh"]) if "mesh" in where else local
    step, p = stepper(driver, tx, of_each), placed(where)
    state = tx.init(p)
    for i in range(2 * K):
        before = np.asarray(state.norms.window)
        micro_batch = jax.tree.map(lambda x, i=i: jnp.asarray(x[:, :, i % K].reshape(-1, *x.shape[3:])), batch(devices))
        p, state = step(p, state, micro_batch, i % K == K - 1)
        if flag == "all" and i < K:
            norms, _, _ = by_hand("ragged", devices)
            np.testing.assert_allclose(np.reshape(state.norms.micro_batch, devices), norms[i], rtol=1e-12)
        if i == K - 1:
            assert_norms(state.norms, "ragged", devices)
        elif i % K < K - 1:
            assert state.norms.window == before
    assert flag == "window" or not np.any(state.norms.pending)


def test_streams_in_a_mapped_function():
    """Catches sums that are not reduced, and types that differ between the branches of a conditional."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, gradient_norms="all", axis_name="data")

    def body(p, xs):
        state, seen = tx.init(p), []
        for i in range(K):
            _, p, state = tx.micro_step(ragged, p, state, jax.tree.map(lambda x, i=i: x[0, :, i], xs))
            seen.append(state.norms.micro_batch)
        return state.norms._replace(micro_batch=None, pending=None), jnp.stack(seen)[:, None]

    specs = dict(in_specs=(P(), P("data")), out_specs=(P(), P(None, "data")))
    run = jax.jit(jax.shard_map(body, mesh=mesh_of("auto"), check_vma=False, **specs))
    norms, rows = run(params(), batch(D))
    assert_norms(norms, "ragged", D)
    np.testing.assert_allclose(rows, by_hand("ragged", D)[0], rtol=1e-12)


def test_gathered_parameters():
    """Catches the norm of one device's shard, and that of a replicated leaf counted once for each device."""
    mesh, start = mesh_of("auto"), params()
    gather = lambda p: {"w": jax.lax.all_gather(p["w"], "data", axis=1, tiled=True), "b": p["b"]}
    options = {"axis_name": "data", "gradient_norms": "all", "prepare": gather}
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, **options)

    def body(p, b):
        rows = jax.tree.map(lambda x: x.reshape(N, K, *x.shape[1:]), b)
        state = tx.init(p)
        for i in range(K):
            _, p, state = tx.micro_step(
                ragged, p, state, jax.tree.map(lambda x, i=i: x[:, i], rows), boundary=i == K - 1
            )
        _, _, norms = jaxaccum.value_and_grad(ragged, K, **options)(start_of(p, b), b)
        return [x._replace(micro_batch=None, pending=None) for x in (norms, state.norms)]

    def start_of(p, b):
        del b
        index = jax.lax.axis_index("data")
        return {"w": jax.lax.dynamic_slice_in_dim(start["w"], index, 1, axis=1), "b": start["b"]}

    specs = {"w": P(None, "data"), "b": P()}
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs, P("data")), out_specs=P(), check_vma=False))
    for norms in run(start, flat(batch(D))):
        assert_norms(norms, "ragged", D)


@pytest.mark.parametrize("reason", ["drop", "skip"])
def test_micro_batches_that_are_left_out(reason):
    """Catches NaN in the sums of norms, and a count of what was left out."""
    options = {"drop": {"nonfinite": "drop"}, "skip": {"should_skip_update_fn": optax.skip_not_finite}}[reason]
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4, gradient_norms="all", **options)
    p = jnp.array([3.0, 4.0])
    state = tx.init(p)
    for x in (1.0, np.nan, 2.0):
        _, p, state = tx.micro_step(lambda p, x: x * jnp.sum(p * jnp.array([3.0, 4.0])), p, state, x)
        assert state.norms.micro_batch == (0 if np.isnan(x) else 5 * x)
    _, state = tx.flush(state, p)
    assert (state.norms.window, *state.norms.squares, state.norms.count) == (7.5, 125.0, 2.0, 2)
    assert not np.any(state.norms.pending)


def test_the_derivative_of_a_norm_of_nothing():
    """Catches the square root's, which is NaN at 0."""
    window = jaxaccum.value_and_grad(lambda p, x: jnp.mean((p * x) ** 2), 2, gradient_norms="all")
    assert jax.grad(lambda p: window(p, jnp.ones(4))[2].window)(0.0) == 0


def test_complex_gradients():
    """Catches the norm of the real parts alone."""
    loss = lambda p, x: jnp.mean(jnp.abs(x @ p - 1j) ** 2)
    p, x = jnp.array([1 + 2j, -3j]), jnp.array([[1.0, 2.0], [3.0, -1.0]])
    _, _, norms = jaxaccum.value_and_grad(loss, 2, gradient_norms="all")(p, x)
    length = lambda rows: np.linalg.norm(jax.grad(loss)(p, rows))
    np.testing.assert_allclose(
        (norms.window, *norms.micro_batch), (length(x), length(x[:1]), length(x[1:])), rtol=1e-12
    )


@pytest.mark.parametrize(("batch", "want"), [("per_device", (140.25, 9.0, 9)), ("global", (17.75, 2.0, 9))])
def test_pending_norms_on_another_number_of_devices(batch, want):
    """Catches sums that are lost or not scaled with the weights, and micro-batches' norms that are added up."""
    options = {"gradient_norms": "all"}
    many = jaxaccum.MultiSteps(optax.sgd(1.0), 3, mesh=mesh_of("auto"), **options)
    one = jaxaccum.MultiSteps(optax.sgd(1.0), 3, **options)
    p, xs = jnp.ones(()), jnp.arange(8.0)
    _, p, state = many.micro_step(lambda p, x: jnp.mean(p * x), p, many.init(p), xs)
    p, state = jax.device_put((p, one.redistribute(state, batch=batch)), jax.devices()[0])
    assert state.norms.micro_batch == 0
    _, p, state = one.micro_step(lambda p, x: jnp.mean(p * x), p, state, xs[:2])
    _, state = one.flush(state, p)
    assert (*state.norms.squares, state.norms.count) == want


def test_what_a_program_holds():
    """Catches work for norms that are off, and more than one pass over a gradient for its norm."""
    loss = lambda p, x: jnp.sum(x @ p)
    p, x = jnp.ones((3, 3)), jnp.ones((4, 3))

    def squares(flag):
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, gradient_norms=flag)
        step = lambda p, state, x: tx.micro_step(loss, p, state, x, boundary=True)
        window = jax.make_jaxpr(jaxaccum.value_and_grad(loss, 2, gradient_norms=flag))(p, x)
        return [str(jaxpr).count("= square") for jaxpr in (window, jax.make_jaxpr(step)(p, tx.init(p), x))]

    assert [squares(flag) for flag in (None, "window", "all")] == [[0, 0], [1, 1], [2, 2]]
    assert jax.tree.leaves(jaxaccum.MultiSteps(optax.sgd(1.0), 2).init(p).norms) == []


@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_collectives(reduce):
    """Catches a reduction for each micro-batch or for each sum."""
    mesh = mesh_of("auto")

    def found(flag):
        f = jaxaccum.value_and_grad(ragged, K, gradient_norms=flag, mesh=mesh, reduce=reduce)
        program = jax.jit(f).lower(placed({"mesh": mesh}), flat(batch(D))).compile()
        found = jaxaccum.collectives(program, mesh=mesh)
        return np.array([found.count(in_loop=True), found.count(in_loop=False)])

    # XLA combines the sums of scalars with others. With ZeRO, those of the mean's norm come after the gradient's.
    for flag in ("window", "noise", "all"):
        assert list(found(flag) - found(None)) == [0, reduce == "scatter" and flag != "noise"]


def test_layers_are_added_in_place_for_the_norm_of_the_window():
    """Catches a second tree of gradients for the one norm that doesn't need it, and norms of the sums so far."""

    def loss(p, x):
        return jnp.mean(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2)

    layers, x = jnp.full((16, 32, 32), 0.1), jnp.ones((4, 32))

    def temporary(flag):
        f = jax.jit(jaxaccum.value_and_grad(loss, 2, gradient_norms=flag, accumulator_dtype=jnp.float64))
        return f.lower(layers, x).compile().memory_analysis().temp_size_in_bytes

    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 3, gradient_norms="all", accumulator_dtype=jnp.float64)
    state = tx.init(layers)
    for rows in (x, 2 * x):
        _, _, state = tx.micro_step(loss, layers, state, rows)
        np.testing.assert_allclose(state.norms.micro_batch, norm(jax.grad(loss)(layers, rows)), rtol=1e-12)
    off, window, all_ = map(temporary, (None, "window", "all"))
    assert window < off + layers.nbytes / 2 <= all_
    for options in ({"gradient_norms": "all"}, {"transform_micro_gradient": lambda g: g}):
        with pytest.raises(ValueError, match="can't be had with"):
            jaxaccum.value_and_grad(loss, 2, in_place=True, **options)
    with pytest.raises(ValueError, match="can't be had with gradient_norms"):
        jaxaccum.MultiSteps(optax.sgd(1.0), 2, in_place=True, gradient_norms="all")


def test_bad_arguments():
    """Catches a bool, which would say nothing of which norms."""
    for make in (
        functools.partial(jaxaccum.value_and_grad, plain, 2),
        functools.partial(jaxaccum.MultiSteps, optax.sgd(1.0), 2),
    ):
        with pytest.raises(ValueError, match=r"gradient_norms must be None, .*got True"):
            make(gradient_norms=True)
    with pytest.raises(TypeError, match=r"transform_micro_gradient must be None or a function, got 1\.0"):
        jaxaccum.value_and_grad(plain, 2, transform_micro_gradient=1.0)
    f = jaxaccum.value_and_grad(lambda p, x: jnp.sum(p["w"]) * jnp.sum(x), 2, transform_micro_gradient=lambda g: g["w"])
    with pytest.raises(ValueError, match="transform_micro_gradient must return a tree like the gradient"):
        f({"w": jnp.ones(3)}, jnp.ones(4))


def shrunk(g):
    """Not linear, and not 0 at 0: what is left out must not come in by it; NaN at 0 in the bias."""
    return {"w": jnp.tanh(g["w"]) + 0.25, "b": g["b"] / jnp.linalg.norm(g["b"])}


@pytest.mark.parametrize(
    ("name", "place", "options"),
    [
        *[("ragged", place, {}) for place in ("shard_map", "explicit", "auto zero")],
        *[("ragged", "one device", options) for options in ({}, {"unroll": 3}, {"stacked": True}, {"prepare": "auto"})],
        ("plain", "auto", {}),
    ],
)
def test_transformed_gradients(name, place, options):
    """Catches a function of w·g, of the window's gradient, or of what is left out."""
    where, devices = WHERE[place], 1 if place == "one device" else D
    data = flat(batch(devices))
    if "stacked" in options:
        data = jax.tree.map(lambda x: x.reshape(N, K, *x.shape[1:]).swapaxes(0, 1), data)
    f = jaxaccum.value_and_grad(
        LOSSES[name], K, transform_micro_gradient=shrunk, gradient_norms="all", **options, **where
    )
    grads, norms = on_devices(where, lambda p, b: (f(p, b)[1], f(p, b)[2].squares), P())(placed(where), data)
    _, weights, want = by_hand(name, devices, shrunk)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), grads, want)
    of_each, _, _ = by_hand(name, devices)
    np.testing.assert_allclose(norms.total, np.sum(weights * of_each**2), rtol=1e-12)  # Those before it.


def test_a_window_of_one_micro_batch_is_transformed():
    """Catches the way without a loop, and a total of NaN that weighs 0."""
    f = jaxaccum.value_and_grad(ragged, 1, transform_micro_gradient=shrunk, gradient_norms="all")
    row = jax.tree.map(lambda x: jnp.asarray(x[0, :, 0]), batch(1))
    _, grad = mean_gradient(ragged, params(), row)
    _, grads, norms = f(params(), row)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), grads, shrunk(grad))
    np.testing.assert_allclose(norms.micro_batch, [norm(grad)], rtol=1e-12)
    _, grads, norms = f(params(), jax.tree.map(lambda x: jnp.asarray(x[0, :, 1]), batch(1)))
    assert not any(map(np.any, jax.tree.leaves((grads, norms))))


def test_no_rounding_and_no_statistics():
    """Catches w·g rounded to bfloat16, and fp8 statistics that are clipped or are part of a norm."""

    @jax.custom_vjp
    def observed(x, amax):
        return x

    observed.defvjp(lambda x, amax: (x, jnp.max(x)), lambda largest, g: (g, largest))
    name = "_overwrite_with_gradient"
    loss = lambda p, x: jaxaccum.Weighted(3.0 * jnp.sum(observed(x, p[name]["amax"]) * p["w"].astype(x.dtype)), 3.0)
    p = {"w": jnp.ones((), jnp.bfloat16), name: {"amax": jnp.zeros(())}}
    seen = []
    transform = lambda g: seen.append(g) or jax.tree.map(lambda x: x * 0 + jnp.asarray(1.0078125, x.dtype), g)
    f = jaxaccum.value_and_grad(
        loss, 2, transform_micro_gradient=transform, gradient_norms="all", grad_dtype=jnp.float32
    )
    _, grads, norms = f(p, jnp.array([2.0, 8.0]))
    assert grads["w"] == 1.0078125 and grads[name]["amax"] == 8.0 and seen[0][name]["amax"] is None
    np.testing.assert_array_equal(norms.micro_batch, [2.0, 8.0])
    assert norms.window == 1.0078125


def test_a_traced_k_and_transformations_of_the_whole():
    """Catches rows of micro-batches that don't run, and a derivative of 0/0 where one is left out."""
    data = jax.tree.map(lambda x: jnp.asarray(x[0].swapaxes(0, 1)), batch(1))
    f = lambda k, p: jaxaccum.value_and_grad(ragged, k, stacked=True, gradient_norms="all")(p, data)
    _, _, norms = jax.jit(f)(2, params())
    np.testing.assert_allclose(norms.micro_batch, [by_hand("ragged", 1)[0][0, 0], 0, 0], rtol=1e-12)
    assert norms.count == 1
    both = jax.vmap(lambda scale: f(K, jax.tree.map(lambda x: x * scale, params()))[2])(jnp.array([1.0, 2.0]))
    assert_norms(jax.tree.map(lambda x: x[0], both), "ragged", 1)
    second = jax.grad(lambda p: f(K, p)[2].window)(params())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(second))


def test_flax():
    """Catches wrappers that take a pair for what a window returns."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    loss = lambda model, x: jnp.mean(model(x) ** 2)
    module = nn.Dense(2)
    variables = module.init(jax.random.key(0), x)
    f = jaxaccum.flax.linen_value_and_grad(module, loss, 2, gradient_norms="all")
    _, grads, norms = f(variables, x)
    np.testing.assert_allclose(norms.window, norm(grads), rtol=1e-6)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    _, grads, norms = jaxaccum.flax.value_and_grad(loss, 2, gradient_norms="window")(model, x)
    np.testing.assert_allclose(norms.window, norm(grads), rtol=1e-6)
