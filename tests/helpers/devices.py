"""What the tests of several devices share: a ragged problem, its big batch on one device, mapped functions, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

DEVICES = 8
K = 4
FORMS = ["pmap", "shard_map", "shard_map without vma"]
MESHES = {
    "data": ((8,), ("data",), "data"),
    "data x model": ((4, 2), ("data", "model"), "data"),
    "data x fsdp x model": ((2, 2, 2), ("data", "fsdp", "model"), ("data", "fsdp")),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12))


def params():
    """Parameters of a small model, in the precision in use."""
    return {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.array([0.5, -0.5, 0.25, 0.0])}


def batch(seed=0, devices=DEVICES):
    """2·K examples for each device, with a mask that leaves device 3 without any."""
    rng = np.random.default_rng(seed)
    n = devices * K * 2
    mask = (rng.random(n) < 0.7).astype(float)
    mask.reshape(devices, -1)[3] = 0
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    return {"x": draw(n, 3), "y": draw(n, 4), "mask": jnp.asarray(mask)}


def loss(p, data):
    """The masked examples' squared error and their number."""
    error = ((jnp.tanh(data["x"] @ p["w"] + p["b"]) - data["y"]) ** 2).sum(axis=1)
    return jaxaccum.Weighted(jnp.sum(error * data["mask"]), data["mask"].sum())


def big_loss(p, data):
    """The mean over all examples that count."""
    return loss(p, data).total / loss(p, data).weight


def noisy(p, data, key):
    """The loss with dropout."""
    keep = jax.random.bernoulli(key, 0.5, data["x"].shape)
    return loss(p, {**data, "x": data["x"] * keep})


def split(tree, *shape):
    """Leaves (n, ...) as (*shape, the rest, ...)."""
    return jax.tree.map(lambda x: x.reshape(*shape, -1, *x.shape[1:]), tree)


def micro_batches(tree, devices, k):
    """(P·K, N, ...): device p's micro-batch i, of its rows i, i + K, ..., is number p·K + i."""
    leaf = lambda x: x.reshape(devices, -1, k, *x.shape[1:]).swapaxes(1, 2).reshape(devices * k, -1, *x.shape[1:])
    return jax.tree.map(leaf, tree)


def inner():
    """An optimizer that sees the norm of the whole gradient."""
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01))


def big_batch(windows, start=None):
    """The bare optimizer on each window as one batch, on one device."""
    opt = inner()
    p = params() if start is None else start
    state = opt.init(p)
    for data in windows:
        updates, state = opt.update(jax.grad(big_loss)(p, data), state, p)
        p = optax.apply_updates(p, updates)
    return p


def mapped(form, fun, in_axes, out_axes):
    """`fun` on every device, as pmap has it: an axis of 0 is split over the devices, one of None is common to all."""
    if form == "pmap":
        return jax.pmap(fun, axis_name="data", in_axes=in_axes, out_axes=out_axes)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    specs = lambda axes: tuple(P() if axis is None else P("data") for axis in axes)
    per_leaf = lambda f, axes, trees: tuple(
        tree if axis is None else jax.tree.map(f, tree) for axis, tree in zip(axes, trees, strict=True)
    )

    def body(*args):
        results = fun(*per_leaf(lambda x: x[0], in_axes, args))
        return per_leaf(lambda x: x[None], out_axes, results)

    options = {"mesh": mesh, "check_vma": form == "shard_map"}
    return jax.jit(jax.shard_map(body, in_specs=specs(in_axes), out_specs=specs(out_axes), **options))


def mesh_of(kind="auto"):
    """All devices along one axis."""
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(KINDS[kind],))


def make(name, kind):
    """(mesh, data axis, number of its devices)."""
    shape, names, data_axis = MESHES[name]
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))
    return mesh, data_axis, 8 // mesh.shape.get("model", 1)


def placed(mesh):
    """The parameters on the mesh, the matrix split over the model axis if there is one."""
    matrix = P(None, "model") if "model" in mesh.axis_names else P()
    return jax.device_put(params(), {"w": NamedSharding(mesh, matrix), "b": NamedSharding(mesh, P())})


def on_data(mesh, data_axis, data, dim=0):
    return jax.device_put(data, NamedSharding(mesh, P(*[None] * dim, data_axis)))
