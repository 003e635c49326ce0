"""What the tests of several devices share: a ragged problem, and its big batch on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum

DEVICES = 8
K = 4
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


def split(tree, *shape):
    """Leaves (n, ...) as (*shape, the rest, ...)."""
    return jax.tree.map(lambda x: x.reshape(*shape, -1, *x.shape[1:]), tree)


def inner():
    """An optimizer that sees the norm of the whole gradient."""
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01))


def big_batch(windows):
    """The bare optimizer on each window as one batch, on one device."""
    opt = inner()
    p, state = params(), opt.init(params())
    for data in windows:
        updates, state = opt.update(jax.grad(big_loss)(p, data), state, p)
        p = optax.apply_updates(p, updates)
    return p
