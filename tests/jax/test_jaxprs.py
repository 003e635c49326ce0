"""The program holds the loss as the user wrote it: its scopes and its jitted functions, each once."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxaccum

K, LAYERS = 4, 24


@functools.partial(jax.jit, static_argnums=2)
def layer(x, w, dtype):
    with jax.named_scope("attention"):
        return jnp.tanh(x.astype(dtype) @ w.astype(dtype))


def loss(p, x, dtype=jnp.float32):
    for i, w in enumerate(p):
        with jax.named_scope(f"block{i}"):
            x = layer(x, w, dtype)
    return jnp.mean(x.astype(jnp.float32) ** 2)


half = functools.partial(loss, dtype=jnp.bfloat16)


def params():
    return [jnp.eye(8)] * LAYERS


def by_hand(fun):
    def window(p, x):
        def micro_step(sums, i):
            value, grads = jax.value_and_grad(fun)(p, x[i])
            return jax.tree.map(jnp.add, sums, grads), value

        return jax.lax.scan(micro_step, jax.tree.map(jnp.zeros_like, p), jnp.arange(K))

    return window


def micro_step(fun, **options):
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, **options)
    return lambda p, x: tx.micro_step(fun, p, tx.init(p), x, boundary=False)[2].acc_grads


WINDOWS = {
    "plain": (jaxaccum.value_and_grad, loss, {}),
    "not in place": (jaxaccum.value_and_grad, loss, {"in_place": False}),
    "half precision": (jaxaccum.value_and_grad, half, {}),
    "auto": (jaxaccum.value_and_grad, half, {"prepare": "auto"}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_scopes_and_jitted_functions_stay(name):
    """Catches profiles without layers, and one jitted layer that is lowered 24 times: 318 kB of StableHLO for 63."""
    driver, fun, options = WINDOWS[name]
    x = jnp.ones((2 * K, 8))
    lowered = jax.jit(driver(fun, K, **options)).lower(params(), x)
    hand = jax.jit(by_hand(fun)).lower(params(), x.reshape(K, 2, 8))
    functions = lambda lowered: lowered.as_text().count("func.func private @")
    # With "auto" a layer's casts and the rest of it are two functions.
    assert functions(lowered) <= functions(hand) + (4 if name == "auto" else 1)
    assert len(lowered.as_text()) <= 1.6 * len(hand.as_text())
    text = lowered.as_text(debug_info=True)
    assert all(scope in text for scope in ("attention", *(f"block{i}" for i in range(LAYERS))))
    assert "@layer" in lowered.as_text()


@pytest.mark.parametrize("fun", [loss, half])
def test_so_they_do_in_micro_steps(fun):
    """Catches the same in a stream."""
    lowered = jax.jit(micro_step(fun)).lower(params(), jnp.ones((2, 8)))
    assert "block17" in lowered.as_text(debug_info=True) and "@layer" in lowered.as_text()
    hand = jax.jit(jax.value_and_grad(fun)).lower(params(), jnp.ones((2, 8)))
    assert lowered.as_text().count("func.func private @") <= hand.as_text().count("func.func private @") + 1
