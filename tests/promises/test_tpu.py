"""Every path lowers for a TPU, on a machine without one: nothing in it is for a CPU or a GPU alone. Nothing runs."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from devices import DEVICES, FORMS, KINDS, MESHES, K, batch, inner, loss, make, mapped, on_data, params, placed, split
from optax.contrib import muon

import jaxaccum.flax

OPTIMIZERS = {"adamw": inner(), "muon": muon(1e-3)}
DRIVES = {"counter": None, "accumulate": False, "boundary": True}
MULTI_STEPS = {"plain": {}, "weight and drop": {"nonfinite": "drop"}, "sums": {"use_grad_mean": False}}
WINDOWS = {
    "static": {},
    "carry": {"carry_argnums": 2},
    "keys": {"key_argnums": 2},
    "cast": {"prepare": jaxaccum.cast(jnp.bfloat16)},
    "aux": {"has_aux": True},
}
every_drive = pytest.mark.parametrize("drive", [*DRIVES, "traced"])
every_mesh = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in MESHES for kind in KINDS])


def lower(fun, *args):
    """The program for a TPU; jax refuses what has no lowering for it, and calls of what it doesn't know."""
    exported = jax.export.export(jax.jit(fun), platforms=["tpu"])(*args)
    assert exported.platforms == ("tpu",)


def driven(step, drive):
    """(`step` with the boundary of this mode, its further arguments): a traced boundary is an argument."""
    return (step, (True,)) if drive == "traced" else (functools.partial(step, boundary=DRIVES[drive]), ())


def micro_step(tx, method, weighted):
    """(params, state, batch, boundary) -> results of one of the three ways to make a micro-step."""

    def step(p, state, data, boundary):
        if method == "micro_step":
            fun = loss if weighted else lambda p, data: loss(p, data).total
            return tx.micro_step(fun, p, state, data, boundary=boundary)
        weight = data["mask"].sum() if weighted else None
        grads = jax.grad(lambda p: loss(p, data).total)(p)
        if method == "apply":
            return tx.apply(p, state, grads, weight=weight, boundary=boundary)
        return tx.update(grads, state, p, weight=weight, boundary=boundary)

    return step


def window(name, **options):
    """((params, batch, ...) -> results, the further arguments) of a window with the named options."""

    def fun(p, data, *rest):
        if name == "keys":
            data = {**data, "x": data["x"] * jax.random.bernoulli(rest[0], 0.5, data["x"].shape)}
        value = loss(p, data)
        return (value, rest[0] + data["x"].sum()) if name == "carry" else (value, data["x"]) if name == "aux" else value

    rest = {"carry": (jnp.zeros(()),), "keys": (jax.random.key(0),)}.get(name, ())
    return jaxaccum.value_and_grad(fun, K, **WINDOWS[name], **options), rest


@pytest.mark.parametrize("options", MULTI_STEPS)
@every_drive
@pytest.mark.parametrize("method", ["update", "apply", "micro_step"])
def test_micro_steps_lower(method, drive, options):
    """Catches a conditional, a barrier or a selection that a TPU has not."""
    for opt in OPTIMIZERS.values():
        tx = jaxaccum.MultiSteps(opt, K, **MULTI_STEPS[options])
        step, rest = driven(micro_step(tx, method, options != "plain"), drive)
        lower(step, params(), tx.init(params()), batch(), *rest)


def test_init_flush_and_a_scheduled_k_lower():
    """Catches the calls besides the micro-steps."""
    tx = jaxaccum.MultiSteps(inner(), lambda step: jnp.where(step < 2, 8, 4))
    state = tx.init(params())
    lower(tx.init, params())
    lower(tx.flush, state, params())
    step, _ = driven(micro_step(tx, "apply", False), "counter")
    lower(step, params(), state, batch())


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_lowers(name):
    """Catches a loop, a random key or a cast that a TPU has not."""
    f, rest = window(name)
    lower(f, params(), batch(), *rest)


def test_a_coupled_window_lowers():
    """Catches a gather of representations that a TPU has not."""
    encode = lambda p, data, key: jnp.tanh(data["x"] @ p["w"]) * jax.random.bernoulli(key, 0.5, (len(data["x"]), 4))
    coupled = lambda p, rows: jnp.mean(jnp.tanh(rows @ rows[::-1].T + p["b"][0]))
    mesh, data_axis, _ = make("data", "auto")
    for options in ({"prepare": "auto"}, {"mesh": mesh, "data_axis": data_axis}):
        f = jaxaccum.coupled_value_and_grad(encode, coupled, K, key_argnums=2, **options)
        lower(f, params(), batch(), jax.random.key(0))


def test_a_window_of_a_traced_k_lowers():
    """Catches a loop with a trip count that must be known."""
    f = lambda p, data, k: jaxaccum.value_and_grad(loss, k, stacked=True)(p, data)
    lower(f, params(), split(batch(), K), jnp.int32(2))


def test_flax_models_lower():
    """Catches what the adapters add: collections, streams, a TrainState."""
    module = nn.Sequential([nn.BatchNorm(use_running_average=False), nn.Dropout(0.5, deterministic=False)])
    x = jnp.ones((2 * K, 3))
    fun = lambda model, x: jnp.mean(model(x) ** 2)
    f = jaxaccum.flax.linen_value_and_grad(module, fun, K, mutable="batch_stats", rngs="dropout")
    lower(f, module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x), x, jax.random.key(1))

    tx = jaxaccum.MultiSteps(inner(), K)
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=params(), tx=tx)
    lower(lambda state, weight: state.apply_gradients(grads=state.params, weight=weight).params, state, 2.0)


@every_drive
@pytest.mark.parametrize("form", FORMS)
def test_micro_steps_on_a_mapped_axis_lower(form, drive):
    """Catches a reduction that a TPU has not, in the conditional and outside of it."""
    tx = jaxaccum.MultiSteps(inner(), K, axis_name="data", nonfinite="drop")

    def train(p, data, boundary):
        value, p, state = tx.micro_step(loss, p, tx.init(p), data, boundary=boundary)
        updates, state = tx.flush(state, p)
        return value, p, updates, state.gradient_step

    step, rest = driven(train, drive)
    in_axes = (None, 0, *[None] * len(rest))
    lower(mapped(form, step, in_axes, (0, None, None, None)), params(), split(batch(), DEVICES), *rest)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("form", FORMS)
def test_a_window_on_a_mapped_axis_lowers(form, name):
    """Catches a sync of sums, carry or keys that a TPU has not."""
    f, rest = window(name, axis_name="data")
    in_axes = (None, 0, *[None] * len(rest))
    lower(mapped(form, f, in_axes, (0, None)), params(), split(batch(), DEVICES), *rest)


@every_mesh
@every_drive
def test_micro_steps_on_a_mesh_lower(name, kind, drive):
    """Catches a layout or a manual region that is not for a TPU."""
    mesh, data_axis, devices = make(name, kind)
    p, data = placed(mesh), on_data(mesh, data_axis, batch(0, devices))
    tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh, data_axis=data_axis)
    state = tx.init(p)
    step, rest = driven(micro_step(tx, "micro_step", True), drive)
    lower(step, p, state, data, *rest)
    lower(tx.flush, state, p)


@every_mesh
def test_local_gradients_on_a_mesh_lower(name, kind):
    """Catches the gradient alone, for loops that call MultiSteps themselves."""
    mesh, data_axis, devices = make(name, kind)
    p, data = placed(mesh), on_data(mesh, data_axis, batch(0, devices))
    tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh, data_axis=data_axis)
    local = jaxaccum.local_value_and_grad(loss, mesh=mesh, data_axis=data_axis)

    def step(p, state, data):
        value, grads = local(p, data)
        return tx.apply(p, state, grads, weight=value.weight)

    lower(step, p, tx.init(p), data)


@every_mesh
@pytest.mark.parametrize("window_name", WINDOWS)
def test_a_window_on_a_mesh_lowers(name, kind, window_name):
    """Catches the same in a window of its own."""
    mesh, data_axis, devices = make(name, kind)
    f, rest = window(window_name, mesh=mesh, data_axis=data_axis)
    lower(f, placed(mesh), on_data(mesh, data_axis, batch(0, devices)), *rest)


@every_mesh
def test_zero_lowers(name, kind):
    """Catches a reduce-scatter of the sums, or a gather of the parameters, that is not for a TPU."""
    mesh, data_axis, devices = make(name, kind)
    fun = lambda w, x: jnp.mean((x @ w) ** 2)
    w = jax.device_put(jnp.ones((16, 4)), placed(mesh)["w"].sharding)
    x = on_data(mesh, data_axis, jnp.ones((2 * K * devices, 16)))
    options = {"mesh": mesh, "data_axis": data_axis, "reduce": "scatter"}
    lower(jaxaccum.value_and_grad(fun, K, **options), w, x)
    tx = jaxaccum.MultiSteps(inner(), K, **options)
    lower(lambda w, state, x: tx.micro_step(fun, w, state, x), w, tx.init(w), x)


def test_what_a_tpu_has_not_is_refused():
    """Catches a check that checks nothing: an inner optimizer with an eigendecomposition, and a call of a library."""
    decomposed = lambda g: jnp.linalg.eig(g)[0].real
    library = lambda g: jax.ffi.ffi_call("library", jax.ShapeDtypeStruct(g.shape, g.dtype))(g)
    for fun, error, message in (
        (decomposed, NotImplementedError, "platform tpu"),
        (library, ValueError, "custom calls whose targets have no compatibility guarantees"),
    ):
        tx = jaxaccum.MultiSteps(optax.stateless(lambda updates, params, fun=fun: fun(updates)), K)
        p = jnp.ones((3, 3))
        with pytest.raises(error, match=message):
            lower(tx.update, p, tx.init(p), p)
