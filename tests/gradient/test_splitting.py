"""Plain jit on a batch that is split over devices: it stays where it is, and each device computes its own part."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS, micro_batches
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.flax

K, DEVICES, WIDTH = 8, 8, 32
MESHES = {"data": ((8,), ("data",), "data"), "data x fsdp": ((4, 2), ("data", "fsdp"), ("data", "fsdp"))}


def make(name, kind):
    shape, names, axes = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names)), axes


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"a": jax.random.normal(keys[0], (WIDTH, WIDTH)), "b": jax.random.normal(keys[1], (WIDTH, 4))}


def batch(n=8 * K):
    return jax.random.normal(jax.random.key(1), (n, WIDTH))


def loss(p, x):
    return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2)


def weighted(p, x):
    squared = (jnp.tanh(x @ p["a"]) @ p["b"]) ** 2
    return jaxaccum.Weighted(jnp.sum(squared), jnp.sum(x[:, 0] > 0))


def place(mesh, axes, p, x):
    return jax.device_put((p, x), (NamedSharding(mesh, P()), NamedSharding(mesh, P(axes))))


def is_gathered(compiled, mesh):
    return any(one.kind in ("all-gather", "all-to-all", "collective-permute") for one in collectives(compiled, mesh))


def collectives(compiled, mesh):
    return jaxaccum.collectives(compiled, mesh=mesh, data_axis=mesh.axis_names).all


def flops(compiled):
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("options", [{}, {"prepare": "auto"}, {"in_place": False}, {"unroll": 2}], ids=str)
def test_no_device_does_the_work_of_others(name, kind, options):
    """Catches a batch that is gathered, so that every device computes all of it: 7.5 times the work on 8 devices."""
    mesh, axes = make(name, kind)
    p, x = place(mesh, axes, params(), batch(64 * K))
    compile_ = lambda **where: jax.jit(jaxaccum.value_and_grad(loss, K, **options, **where)).lower(p, x).compile()
    plain, on_mesh = compile_(), compile_(mesh=mesh, data_axis=axes)
    assert not is_gathered(plain, mesh)
    assert flops(plain) <= 1.05 * flops(on_mesh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("form", ["split", "stacked", "traced", "eager"])
def test_a_window_is_the_big_batch(name, kind, form):
    """Catches rows lost, and an error from inside jax on Explicit axes."""
    mesh, axes = make(name, kind)
    want = jax.value_and_grad(loss)(params(), batch())
    p, x = place(mesh, axes, params(), batch())
    if form in ("stacked", "traced"):
        x = jax.device_put(micro_batches(batch(), 1, K), NamedSharding(mesh, P(None, axes)))
    f = lambda k: jaxaccum.value_and_grad(loss, k, stacked=form in ("stacked", "traced"))
    if form == "traced":
        got = jax.jit(lambda k, p, x: f(k)(p, x))(jnp.int32(K), p, x)
    else:
        got = (f(K) if form == "eager" else jax.jit(f(K)))(p, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_loss(kind):
    """Catches a weighted loss that gathers where a plain one doesn't."""
    mesh, axes = make("data", kind)
    p, x = place(mesh, axes, params(), batch())
    compiled = jax.jit(jaxaccum.value_and_grad(weighted, K)).lower(p, x).compile()
    on_mesh = jax.jit(jaxaccum.value_and_grad(weighted, K, mesh=mesh)).lower(p, x).compile()
    assert not is_gathered(compiled, mesh) and flops(compiled) <= 1.05 * flops(on_mesh)


def linen(x):
    module = nn.Dense(4)
    f = jaxaccum.flax.linen_value_and_grad(module, lambda model, x: jnp.mean(model(x) ** 2), K)
    return f, module.init(jax.random.key(0), x)


def with_nnx(x):
    del x
    graphdef, p = nnx.split(nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)))
    f = jaxaccum.flax.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), K)
    return lambda p, x: f(nnx.merge(graphdef, p), x), p


@pytest.mark.parametrize("adapter", [linen, with_nnx])
def test_flax_models(adapter):
    """Catches an adapter that splits the batch in runs."""
    mesh, axes = make("data", "auto")
    f, p = adapter(batch())
    p, x = place(mesh, axes, p, batch())
    assert not is_gathered(jax.jit(f).lower(p, x).compile(), mesh)


def test_memory_with_a_batch_of_images():
    """Catches a transposed copy of the batch."""
    images = jnp.zeros((16, 64, 64, 3))
    p = {"w": jnp.zeros((64 * 64 * 3, 4))}
    fun = lambda p, x: jnp.mean((x.reshape(len(x), -1) @ p["w"]) ** 2)
    runs = lambda p, x: jaxaccum.value_and_grad(fun, 4, stacked=True)(p, x.reshape(4, 4, *x.shape[1:]))
    temporary = lambda f: jax.jit(f).lower(p, images).compile().memory_analysis().temp_size_in_bytes
    assert temporary(jaxaccum.value_and_grad(fun, 4)) <= 1.02 * temporary(runs)


@pytest.mark.parametrize("name", MESHES)
def test_micro_batches_that_would_be_gathered_are_refused(name):
    """Catches work that is repeated on every device, on axes that a trace can see."""
    mesh, axes = make(name, "explicit")
    p, x = place(mesh, axes, params(), batch(4 * K))
    with pytest.raises(ValueError, match=r"args\[1\] is split over 8 devices.*N=4 examples.*multiple of 8"):
        jax.jit(jaxaccum.value_and_grad(loss, K))(p, x)
    stacked = jax.device_put(batch(8 * 16).reshape(8, 16, WIDTH), NamedSharding(mesh, P(axes)))
    with pytest.raises(ValueError, match=r"args\[1\] is split over 8 devices along its micro-batches.*axis 1"):
        jax.jit(jaxaccum.value_and_grad(loss, K, stacked=True))(p, stacked)


def test_per_example_aux_in_the_order_of_the_batch():
    """Catches what the docstring says of aux: the order of rows, on one device and on a mesh."""
    fun = lambda p, x: (loss(p, x), x[:, 0])
    (_, aux), _ = jaxaccum.value_and_grad(fun, K, has_aux=True)(params(), batch())
    np.testing.assert_array_equal(jnp.moveaxis(aux, 0, 1).reshape(8 * K), batch()[:, 0])
    mesh, axes = make("data", "auto")
    f = jax.jit(jaxaccum.value_and_grad(fun, 4, has_aux=True, mesh=mesh))
    (_, aux), _ = f(*place(mesh, axes, params(), batch()))
    np.testing.assert_array_equal(jnp.moveaxis(aux, 0, 2).reshape(8 * K), batch()[:, 0])


@pytest.mark.parametrize("where", ["one device", "mesh", "axis_name"])
def test_micro_batch_i_is_every_kth_row(where):
    """Catches micro-batches that are runs of rows, or that part between placements."""
    x = jnp.arange(float(DEVICES * 4 * 2))
    fun = lambda w, x: (jnp.mean(w * x), x)
    w, options = jnp.ones(()), {"has_aux": True}
    mesh, _ = make("data", "auto")
    if where == "one device":
        (_, aux), _ = jaxaccum.value_and_grad(fun, 4, **options)(w, x)
        devices = 1
    elif where == "mesh":
        (_, aux), _ = jax.jit(jaxaccum.value_and_grad(fun, 4, mesh=mesh, **options))(w, x)
        aux, devices = aux.swapaxes(0, 1).reshape(DEVICES * 4, -1), DEVICES
    else:
        f = lambda w, x: jaxaccum.value_and_grad(fun, 4, axis_name="data", **options)(w, x)[0][1]
        aux, devices = (
            jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(w, x),
            DEVICES,
        )
    np.testing.assert_array_equal(aux, micro_batches(x, devices, 4))
