"""jit on a mesh: its data axis against one device with the big batch, in float64, Auto and Explicit axes alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from devices import (
    KINDS,
    MESHES,
    K,
    assert_close,
    batch,
    big_batch,
    big_loss,
    inner,
    loss,
    make,
    mesh_of,
    micro_batches,
    noisy,
    on_data,
    params,
    placed,
    split,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._devices.topology import MeshAxis, OneDevice
from jaxaccum._gradient import micro_gradient
from jaxaccum._gradient.roles import Roles

every_mesh = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in MESHES for kind in KINDS])


@every_mesh
@pytest.mark.parametrize("stacked", [False, True])
def test_a_window_on_a_mesh_is_the_big_batch(name, kind, stacked):
    """Catches a gradient that is one device's own, P times too large, or laid out anew."""
    with jax.enable_x64(True):
        mesh, data_axis, devices = make(name, kind)
        f = jaxaccum.value_and_grad(loss, K, mesh=mesh, data_axis=data_axis, stacked=stacked)
        data = split(batch(0, devices), K) if stacked else batch(0, devices)
        p = placed(mesh)
        value, grads = jax.jit(f)(p, on_data(mesh, data_axis, data, dim=int(stacked)))
        assert_close((value, grads), jax.value_and_grad(big_loss)(params(), batch(0, devices)))
        assert grads["w"].sharding.is_equivalent_to(p["w"].sharding, 2)


@every_mesh
def test_a_k_that_is_traced_compiles_once_on_a_mesh(name, kind):
    """Catches a K that leaks into shapes."""
    mesh, data_axis, devices = make(name, kind)
    step = jax.jit(lambda p, x, k: jaxaccum.value_and_grad(loss, k, mesh=mesh, data_axis=data_axis, stacked=True)(p, x))
    p, data = placed(mesh), on_data(mesh, data_axis, split(batch(0, devices), K), dim=1)
    for k in (K, 1, 2):
        want = jax.value_and_grad(big_loss)(
            params(), jax.tree.map(lambda x, k=k: x[: k * 2 * devices], batch(0, devices))
        )
        got = step(p, data, k)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    assert step._cache_size() == 1


@every_mesh
def test_aux_on_a_mesh_is_that_of_every_device(name, kind):
    """Catches aux that is gathered, averaged or one device's own."""
    mesh, data_axis, devices = make(name, kind)
    fun = lambda p, data: (loss(p, data), data["x"].sum(axis=0))
    f = jaxaccum.value_and_grad(fun, K, mesh=mesh, data_axis=data_axis, has_aux=True)
    (_, aux), _ = jax.jit(f)(placed(mesh), on_data(mesh, data_axis, batch(0, devices)))
    want = micro_batches(batch(0, devices)["x"], devices, K).sum(axis=1).reshape(devices, K, -1).swapaxes(0, 1)
    np.testing.assert_allclose(aux, want, rtol=1e-5)
    assert aux.sharding.spec[:2] == (None, data_axis)


def test_keys_on_a_mesh_are_numbered_as_on_one_device():
    """Catches the same dropout mask on every device."""
    with jax.enable_x64(True):
        mesh, _, devices = make("data", "auto")
        one = jaxaccum.value_and_grad(noisy, devices * K, key_argnums=2, stacked=True)
        f = jaxaccum.value_and_grad(noisy, K, key_argnums=2, mesh=mesh)
        want = one(params(), micro_batches(batch(), devices, K), jax.random.key(1))
        assert_close(jax.jit(f)(params(), batch(), jax.random.key(1)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "drive"),
    [("data", "counter"), ("data", "static"), ("data x model", "static"), ("data x fsdp x model", "counter")],
)
def test_micro_steps_on_a_mesh_are_the_big_batch(name, kind, drive):
    """Catches clipping before the sync, a device without weight that counts, and state that is laid out anew."""
    with jax.enable_x64(True):
        mesh, data_axis, devices = make(name, kind)
        tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh, data_axis=data_axis)
        start = placed(mesh)
        p, state = start, tx.init(start)
        step = jax.jit(lambda p, s, x, b: tx.micro_step(loss, p, s, x, boundary=b), static_argnums=3)
        windows = [batch(seed, devices) for seed in (0, 1)]
        for i in range(2 * K):
            rows = jax.tree.map(
                lambda x, i=i: split(x, devices, K)[:, i % K].reshape(-1, *x.shape[1:]), windows[i // K]
            )
            boundary = None if drive == "counter" else i % K == K - 1
            values, p, state = step(p, state, on_data(mesh, data_axis, rows), boundary)
            assert values.shape == (devices,)
        assert_close(p, big_batch(windows))
        assert int(state.gradient_step) == 2
        for leaf in (p["w"], state.inner_opt_state[1][0].mu["w"]):
            assert leaf.sharding.is_equivalent_to(start["w"].sharding, 2)
        assert state.acc_grads["w"].sharding.spec[0] == data_axis
        if (name, kind) == ("data", "auto"):  # Elsewhere out_shardings must say how XLA is to lay out what it returns.
            assert step._cache_size() == (1 if drive == "counter" else 2)


def test_the_host_sets_k_on_a_mesh_without_a_compile():
    """Catches a K of another sharding than the one compiled for; a window flushed in the middle."""
    with jax.enable_x64(True):
        mesh, _, _ = make("data x model", "auto")
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh)
        step = jax.jit(tx.apply)
        p = jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))
        state = tx.init(p)
        grads = on_data(mesh, "data", jnp.ones((4, 3)))
        p, state = step(p, state, grads)
        for k in (8, 3, 1, 4):
            state = jaxaccum.set_every_k(state, k)
            p, state = step(p, state, grads)
        assert step._cache_size() == 1
        updates, state = jax.jit(tx.flush)(state, p)
        np.testing.assert_allclose(updates, -np.ones(3))


@pytest.mark.parametrize(("name", "kind"), [("data x model", kind) for kind in KINDS])
@pytest.mark.parametrize(
    "opt",
    [
        optax.adam(0.1),
        optax.adafactor(0.1, min_dim_size_to_factor=2),  # The shapes of its state are not those of the parameters.
        optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    ],
)
def test_a_jitted_init_keeps_the_layout(name, kind, opt):
    """Catches accumulators on one device, and moments that jax's types take for whole: the step would not trace."""
    mesh, data_axis, devices = make(name, kind)
    tx = jaxaccum.MultiSteps(opt, 2, mesh=mesh, data_axis=data_axis)
    p = placed(mesh)
    state = jax.jit(tx.init)(p)
    step = jax.jit(lambda p, s, x: tx.micro_step(loss, p, s, x))
    _, new, state = step(p, state, on_data(mesh, data_axis, batch(0, devices)))
    assert new["w"].sharding.is_equivalent_to(p["w"].sharding, 2)
    want = NamedSharding(mesh, P(data_axis, *p["w"].sharding.spec))
    assert state.acc_grads["w"].sharding.is_equivalent_to(want, 3)


@pytest.mark.parametrize("tree", [lambda p: p, lambda p: {"w": p}, lambda p: {"a": [p]}], ids=["leaf", "dict", "deep"])
def test_moments_lie_as_the_parameters_at_the_end_of_their_paths(tree):
    """Catches an optimizer's zeros that stay whole on each device, and a state of another shape that can't be split."""
    mesh, _, _ = make("data x model", "explicit")
    p = jax.device_put(jnp.ones((3, 4)), NamedSharding(mesh, P(None, "model")))
    moments = lambda params: {"m": jax.tree.map(lambda p: jnp.zeros((3, 4)), params), "rows": tree(jnp.zeros(3))}
    tx = jaxaccum.MultiSteps(optax.GradientTransformation(moments, optax.sgd(1.0).update), 2, mesh=mesh)
    for init in (tx.init, jax.jit(tx.init)):
        inner = init(tree(p)).inner_opt_state
        specs = [x.sharding.spec for name in ("m", "rows") for x in jax.tree.leaves(inner[name])]
        assert specs == [P(None, "model"), P()]


def test_a_micro_batch_is_dropped_on_its_device_alone_on_a_mesh():
    """Catches a drop that costs the other devices their micro-batch."""
    mesh, _, _ = make("data", "auto")
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, mesh=mesh, nonfinite="drop")
    grads, weights = jnp.arange(8.0).at[5].set(jnp.nan), jnp.arange(8.0) + 1
    p = jnp.array(0.0)
    p, state = jax.jit(tx.apply)(p, tx.init(p), grads, weight=weights)
    keep = np.arange(8) != 5
    np.testing.assert_allclose(p, -np.sum((grads * weights)[keep]) / np.sum(weights[keep]), rtol=1e-6)
    assert state.dropped.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@every_mesh
def test_the_sync_on_a_mesh_is_once_a_window(name, kind):
    """Catches a reduction over the data axis in every micro-step: it changes no number. The model's own may stay."""
    mesh, data_axis, devices = make(name, kind)
    tx = jaxaccum.MultiSteps(optax.adam(1e-3), K, mesh=mesh, data_axis=data_axis)
    p = placed(mesh)
    state, data = tx.init(p), on_data(mesh, data_axis, batch(0, devices))

    def over_data(fun, *args):
        found = jaxaccum.collectives(jax.jit(fun).lower(*args).compile(), mesh=mesh, data_axis=data_axis)
        return [(one.kind, one.axes, one.where) for one in found.all if set(one.axes) & set(found.data_axes)]

    axes = data_axis if isinstance(data_axis, tuple) else (data_axis,)
    micro_step = lambda boundary: lambda p, s, x: tx.micro_step(loss, p, s, x, boundary=boundary)
    assert over_data(micro_step(False), p, state, data) == []
    assert over_data(micro_step(True), p, state, data) == [("all-reduce", axes, ())]
    assert over_data(micro_step(None), p, state, data) == [("all-reduce", axes, ("conditional",))]
    window = jaxaccum.value_and_grad(loss, K, mesh=mesh, data_axis=data_axis)
    assert over_data(window, p, data) == [("all-reduce", axes, ())]


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda mesh: jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh, data_axis="rows"), "no axis 'rows'"),
        (lambda mesh: jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh, axis_name="data"), "give one of them"),
        (lambda mesh: jaxaccum.value_and_grad(loss, K, mesh=mesh, axis_name="data"), "give one of them"),
        (
            lambda mesh: jaxaccum.value_and_grad(loss, 3, mesh=mesh)(params(), batch()),
            "64 examples.*8 devices.*3.*48 or 72",
        ),
        (
            lambda mesh: (lambda tx: tx.apply(params(), tx.init(params()), params()))(
                jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh)
            ),
            r"shape \(4,\), for a parameter of shape \(4,\). .* must be \(8, 4\), \(devices, \*parameter\)",
        ),
    ],
)
def test_bad_input_on_a_mesh_is_refused(make_it, message):
    """Catches a traceback from inside jax, or a batch that is cut."""
    mesh, _, _ = make("data", "auto")
    with pytest.raises(ValueError, match=message):
        make_it(mesh)


def test_a_prepare_that_gathers_what_is_whole_is_refused():
    """Catches a parameter repeated for every device."""
    mesh, _, _ = make("data", "auto")
    gather = lambda p: jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), p)
    f = jaxaccum.value_and_grad(lambda p, x: jnp.mean(x["x"]) * p["w"].sum(), K, prepare=gather, mesh=mesh)
    with pytest.raises(ValueError, match=r"prepare gathers over data_axis=\('data',\).*Leave the gather out"):
        jax.jit(f)(params(), batch())


def test_a_constant_weight_is_that_of_each_device():
    """Catches a number that the next micro-step refuses, as it is none of each device."""
    mesh = mesh_of("auto")
    fun = lambda w, x: jaxaccum.Weighted(jnp.sum(w * x), 2.0)
    value, grads = jaxaccum.local_value_and_grad(fun, mesh=mesh)(jnp.ones(()), jnp.arange(16.0))
    assert value.weight.tolist() == [2.0] * 8
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, mesh=mesh)
    w, _ = tx.apply(jnp.ones(()), tx.init(jnp.ones(())), grads, weight=value.weight)
    assert w == 1 - 7.5


def test_local_gradients_get_every_argument():
    """Catches a keyword that does not reach the loss, and an argument that is split beside the batch."""
    fun = lambda scale, w, x, *, shift: (jnp.mean((scale * w * x - shift) ** 2), x)
    with jax.enable_x64(True):
        f = jaxaccum.local_value_and_grad(fun, mesh=mesh_of("auto"), has_aux=True, batch_argnums=2)
        scale, w, x, shift = (jnp.asarray(x) for x in (3.0, np.linspace(0.5, 1.0, 2), np.arange(16.0), 0.25))
        (value, aux), grads = f(scale, w, x, shift=shift)
        own = x.reshape(8, 2)
        of_one = jax.value_and_grad(lambda scale, x: fun(scale, w, x, shift=shift), has_aux=True)
        assert_close(((value, aux), grads), jax.vmap(of_one, (None, 0))(scale, own))


@pytest.mark.parametrize("is_mesh", [False, True])
@pytest.mark.parametrize("weight", [None, 2])
def test_a_constant_weight_stays_one(is_mesh, weight):
    """Catches a constant that is returned as an array: each gradient would be selected, as if it could be 0."""
    sync = MeshAxis(mesh_of("auto"), ("data",)) if is_mesh else OneDevice()
    fun = lambda w, x: (jaxaccum.Weighted(jnp.sum(w * x), weight), None)
    roles = Roles(params=(0,), batch=(1,), keys=(), carry=())
    value, _, grads = micro_gradient.on_each(fun, sync, roles, (jnp.ones(()), jnp.arange(8.0)))
    assert value.weight is weight
    assert grads.sum() == value.total.sum() == 28


def test_parameters_on_another_device_are_refused():
    """Catches parameters that jax would move, or a message about a computation that the user did not write."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    p = jax.device_put(params(), jax.devices()[5])
    for call in (
        lambda: jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh).init(p),
        lambda: jaxaccum.value_and_grad(loss, K, mesh=mesh)(p, batch()),
        lambda: jaxaccum.local_value_and_grad(loss, mesh=mesh)(p, batch()),
    ):
        with pytest.raises(ValueError, match=r"\['b'\] lies on .*5.*not among the mesh's 4 devices"):
            call()


def test_new_parameters_go_to_a_mesh_without_the_default_device():
    """Catches the check of above for parameters that no one put anywhere, which jax moves to the mesh."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[4:])
    window = jaxaccum.value_and_grad(lambda w, x: jnp.mean((w * x) ** 2), K, mesh=mesh)
    value, grad = window(jnp.ones(()), np.ones(4 * K, np.float32))
    state = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh).init(jnp.ones(()))
    assert (value, grad) == (1.0, 2.0) and state.mini_step.devices() == {*mesh.devices.flat}


def test_a_mesh_that_is_none_is_refused():
    """Catches a shape given for a mesh."""
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh.*got \(8,\)"):
        jaxaccum.value_and_grad(loss, K, mesh=(8,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["update", "apply"])
def test_a_value_for_each_device_is_one_number_to_the_inner_optimizer(kind, method):
    """Catches local values shown to an optimizer that branches on their mean, between boundaries too."""
    mesh, data_axis, devices = make("data", kind)
    opt = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    tx = jaxaccum.MultiSteps(opt, 2, mesh=mesh, data_axis=data_axis)
    one, one_inner = jnp.zeros(()), opt.init(jnp.zeros(()))
    w, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    call = tx.apply if method == "apply" else lambda w, state, g, value: tx.update(g, state, w, value=value)
    step = jax.jit(call)
    for i in range(8):
        value = on_data(mesh, data_axis, np.arange(devices, dtype=np.float32) + i % 2)
        result, state = step(w, state, on_data(mesh, data_axis, np.ones(devices, np.float32)), value=value)
        w = result if method == "apply" else optax.apply_updates(w, result)
        if i % 2:
            updates, one_inner = opt.update(jnp.ones(()), one_inner, one, value=jnp.float32(devices / 2))
            one = optax.apply_updates(one, updates)
    assert_close((w, state.inner_opt_state), (one, one_inner))
    assert float(one) > -4
