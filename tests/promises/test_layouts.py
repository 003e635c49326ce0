"""Everything at once, in every layout of local sums: uneven weights, a device without any, a micro-batch dropped on one
device, K set by the host, and a flush in mid-window; against one device with the big batches, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import FORMS, assert_close, big_batch, inner, loss, mapped, params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

N = 2
WINDOWS = [(0, 1, 2), (3, 4), (5,)]  # K = 3, then 2, then a window flushed after one micro-step.
DROPPED = 1, 5  # A micro-step, and the device whose micro-batch is not finite in it.
MESHES = {
    "data": ((8,), ("data",), "data", {}),
    "data x model": ((4, 2), ("data", "model"), "data", {}),
    "data x fsdp, sharded sums": ((4, 2), ("data", "fsdp"), "data", {}),
    "data x fsdp, full sums": ((4, 2), ("data", "fsdp"), ("data", "fsdp"), {}),
    "ZeRO": ((8,), ("data",), "data", {"reduce": "scatter"}),
    "ZeRO x model": ((4, 2), ("data", "model"), "data", {"reduce": "scatter"}),
}


def micro_batch(step, devices):
    """N examples for each device; device 3 has none that count."""
    rng = np.random.default_rng(step)
    data = {"x": rng.standard_normal((devices * N, 16)), "y": rng.standard_normal((devices * N, 4))}
    mask = (rng.random((devices, N)) < 0.7).astype(float)
    mask[3] = 0
    mask[DROPPED[1] % devices] = 1
    if step == DROPPED[0]:
        data["x"].reshape(devices, N, 16)[DROPPED[1] % devices] = np.nan
    return {**data, "mask": mask.reshape(-1)}


def start():
    return {"w": jnp.linspace(-1.0, 1.0, 64).reshape(16, 4), "b": params()["b"]}


def wanted(devices):
    """What the bare optimizer makes of each window as one batch, without the micro-batch that is dropped."""

    def kept(step):
        data = micro_batch(step, devices)
        bad = np.isnan(data["x"]).any(axis=1)
        return {**data, "x": np.where(bad[:, None], 0, data["x"]), "mask": np.where(bad, 0, data["mask"])}

    windows = [jax.tree.map(lambda *x: np.concatenate(x), *map(kept, steps)) for steps in WINDOWS]
    return big_batch(windows, start())


def train(tx, p, state, step, flush, place):
    """The micro-steps of `WINDOWS`, with K set by the host."""
    for i in range(6):
        if i == 3:
            state = jaxaccum.set_every_k(state, 2)
        p, state = step(p, state, place(i))
    updates, state = flush(state, p)
    return optax.apply_updates(p, updates), state


@pytest.mark.parametrize("name", MESHES)
def test_everything_at_once_on_a_mesh(name):
    """Catches a layout in which one of these is lost, and one that compiles again for it."""
    with jax.enable_x64(True):
        shape, names, data_axis, options = MESHES[name]
        mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
        devices = 8 if len(names) == 1 or isinstance(data_axis, tuple) else 4
        tx = jaxaccum.MultiSteps(inner(), 3, mesh=mesh, data_axis=data_axis, nonfinite="drop", **options)
        spec = P(None, "model") if "model" in names else P("fsdp") if "fsdp" in names else P()
        shardings = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P())}
        p = jax.device_put(start(), shardings)
        state = tx.init(p)
        kept = shardings, jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(lambda *args: tx.micro_step(loss, *args)[1:], out_shardings=kept)
        place = lambda i: jax.device_put(micro_batch(i, devices), NamedSharding(mesh, P(data_axis)))
        p, state = train(tx, p, state, step, jax.jit(tx.flush), place)
        assert_close(p, wanted(devices))
        assert step._cache_size() == 1
        assert int(state.gradient_step) == len(WINDOWS)
        assert state.dropped.tolist() == [int(d == DROPPED[1] % devices) for d in range(devices)]


@pytest.mark.parametrize("form", FORMS)
def test_everything_at_once_along_a_mapped_axis(form):
    """Catches a layout in which one of these is lost, and one that compiles again for it."""
    with jax.enable_x64(True):
        tx = jaxaccum.MultiSteps(inner(), 3, axis_name="data", nonfinite="drop")
        init = mapped(form, lambda _, p: (tx.init(p),), (0, None), (0,))
        step = mapped(form, lambda p, s, x: tx.micro_step(loss, p, s, x)[1:], (0, 0, 0), (0, 0))
        flush = mapped(form, tx.flush, (0, 0), (0, 0))
        (state,) = init(np.zeros(8), start())
        place = lambda i: jax.tree.map(lambda x: x.reshape(8, N, *x.shape[1:]), micro_batch(i, 8))
        p = jax.tree.map(lambda x: jnp.stack([x] * 8), start())
        p, state = train(tx, p, state, step, flush, place)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * 8)), p)
        assert_close(jax.tree.map(lambda x: x[0], p), wanted(8))
        assert state.gradient_step.tolist() == [len(WINDOWS)] * 8
        assert state.dropped.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


def test_dropping_costs_one_scalar_over_a_model_axis():
    """Catches a check for finite numbers that gathers what the model axis splits."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    p = {"w": jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P(None, "model")))}
    grads = {"w": jax.device_put(jnp.ones((4, 16, 4)), NamedSharding(mesh, P("data", None, "model")))}

    def found(nonfinite):
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 3, mesh=mesh, nonfinite=nonfinite)
        step = jax.jit(lambda p, s, g: tx.apply(p, s, g, boundary=False))
        return jaxaccum.collectives(step.lower(p, tx.init(p), grads).compile(), mesh=mesh).all

    assert found("propagate") == ()
    (check,) = found("drop")
    assert check.axes == ("model",) and check.num_bytes <= 4
