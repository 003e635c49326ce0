"""The losses of the matrix, their parameters and their data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum

K, N, WIDTH, VOCABULARY = 3, 2, 3, 5


class Loss(NamedTuple):
    """A loss function `fun(params, batch, *extras)` and what a test needs to know about it.

    Attributes:
      fun: the loss. It computes in the dtype of the batch, whatever dtype the parameters are cast to.
      shapes: the shapes of its parameters.
      extra: "key" or "carry" where it takes one as its third argument. With "carry" it returns (loss, new carry).
      carries_key: the carry holds a typed key.
      has_aux: it returns (loss, aux).
      is_mean: the loss of the big batch is the mean of those of its micro-batches, and so is the gradient.
      exact: the same loss without low precision.
      dtype: that of the parameters; None is the default dtype.
      tolerance: the largest error, beside the largest entry of what is expected.
    """

    fun: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    extra: str | None = None
    carries_key: bool = False
    has_aux: bool = False
    is_mean: bool = True
    exact: Callable[..., Any] | None = None
    dtype: Any = None
    tolerance: float = 1e-4

    @property
    def returns_pair(self):
        return self.has_aux or self.extra == "carry"


def params(loss, variant=0):
    """Parameters that bfloat16 represents exactly."""
    rng = np.random.default_rng(variant)
    return {name: rng.integers(-8, 9, shape) / 8 for name, shape in loss.shapes.items()}


def batch(devices, variant=0, k=K, n=N):
    """Leaves (P, K, N, ...): micro-batch i of device p is row [p, i]."""
    rng = np.random.default_rng(100 + variant)
    shape = devices, k, n
    return {
        "x": rng.integers(-16, 17, (*shape, WIDTH)) / 16,
        "tokens": rng.integers(0, VOCABULARY, (*shape, 2)).astype(np.int32),
        "mask": (rng.random(shape) < 0.7) + 0.25,
    }


def extras(loss, dtype):
    """The arguments after the batch."""
    if loss.extra == "key":
        return (jax.random.key(7),)
    if loss.extra == "carry":
        state = {"mean": jnp.full(WIDTH, 0.5, dtype), "count": jnp.int32(2)}
        return ({**state, "key": jax.random.key(3)} if loss.carries_key else state,)
    return ()


def times(x, w):
    return x @ w.astype(x.dtype)


def dense(p, b):
    return jnp.mean(times(jnp.tanh(times(b["x"], p["w"]) + p["b"].astype(b["x"].dtype)), p["v"]) ** 2)


def layers(wrap):
    def fun(p, b):
        layer = wrap(lambda h, w: (jnp.tanh(times(h, w)), None))
        return jnp.mean(jax.lax.scan(layer, b["x"], p["layers"])[0] ** 2)

    return fun


def constant_start(p, b):
    """A scan whose carry starts from a constant and comes to depend on the parameters and the batch."""

    def layer(carry, w):
        h, total = carry
        h = jnp.tanh(times(h, w))
        return (h, total + jnp.mean(h**2)), None

    return jax.lax.scan(layer, (b["x"], jnp.zeros((), b["x"].dtype)), p["layers"])[0][1]


def embedding(p, b):
    """The embedding is gathered from, and multiplied by as the head."""
    table = p["embedding"].astype(b["x"].dtype)
    logits = jnp.tanh(table[b["tokens"][:, 0]]) @ table.T
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), b["tokens"][:, 1:], axis=1))


@jax.custom_vjp
def squashed(x):
    return jnp.sin(x)


squashed.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.tanh(3 * g) * jnp.cos(x),))


@jax.custom_jvp
def straight_through(x):
    return jnp.sin(x)


@straight_through.defjvp
def _(primals, tangents):
    return jnp.sin(primals[0]), 0.5 * tangents[0] * jnp.tanh(primals[0])


def elementwise(function):
    return lambda p, b: jnp.mean(function(times(b["x"], p["w"])) ** 2)


def on_weights(function):
    """The function is applied to what depends on the parameters alone, as for fake quantisation."""
    return lambda p, b: jnp.mean(times(b["x"], function(p["w"].astype(b["x"].dtype))) ** 2)


def convolution(p, b):
    kernel = p["kernel"].astype(b["x"].dtype)
    return jnp.mean(jnp.tanh(jax.lax.conv_general_dilated(b["x"][:, None], kernel, (1,), "SAME")) ** 2)


def masked(x, key):
    keep = jax.random.bits(key, x.shape, "uint32") % 2
    return x * keep.astype(x.dtype)


def keys(p, b, key):
    return dense(p, {**b, "x": masked(b["x"], key)})


def carried_key(p, b, state):
    key, own = jax.random.split(state["key"])
    value, new = carry({"w": p["w"]}, {"x": masked(b["x"], own)}, state)
    return value, {**new, "key": key}


def carry(p, b, state):
    h = times(b["x"] - state["mean"], p["w"])
    mean = (state["mean"] + jnp.mean(jnp.tanh(h), axis=0)) / 2
    return jnp.mean(h**2), {"mean": mean, "count": state["count"] + 1}


def aux(p, b):
    h = jnp.tanh(times(b["x"], p["w"]))
    return jnp.mean(h**2), {"rows": h[:, 0], "last": jnp.max(b["tokens"])}


def weighted(p, b):
    return jaxaccum.Weighted(jnp.sum(times(b["x"], p["w"]) ** 2 * b["mask"][:, None]), jnp.sum(b["mask"]))


def varying_weight(p, b):
    score = times(b["x"], p["w"])
    return jaxaccum.Weighted(jnp.sum(jnp.exp(score) * score**2), jnp.sum(jnp.exp(score)))


def low_precision(dtype):
    def fun(p, b):
        h = jnp.tanh(times(b["x"].astype(dtype), p["w"]) + p["b"].astype(dtype))
        return jnp.mean(times(h, p["v"]).astype(b["x"].dtype) ** 2)

    return fun


def quantised(p, b):
    """The forward pass multiplies integers, the backward pass sees none."""
    x, w = b["x"], p["w"].astype(b["x"].dtype)
    codes, levels = jnp.round(x * 16).astype(jnp.int8), jnp.round(w * 8).astype(jnp.int8)
    forward = jax.lax.dot(codes, levels, preferred_element_type=jnp.int32).astype(x.dtype) / 128
    h = x @ w + jax.lax.stop_gradient(forward - x @ w)
    return jaxaccum.Weighted(jnp.sum(jnp.tanh(h) ** 2 * b["mask"][:, None]), jnp.sum(b["mask"]))


def inner_vmap(p, b):
    return jnp.mean(jax.vmap(lambda row: jnp.sum(jnp.tanh(times(row, p["w"]))) ** 2)(b["x"]))


def while_loop(p, b):
    """A loop without a derivative, of what depends on the parameters and the batch."""
    settle = lambda state: (state[0] + 1, jnp.cos(state[1]))
    target = jax.lax.stop_gradient(times(b["x"], p["w"]))
    _, target = jax.lax.while_loop(lambda state: state[0] < 3, settle, (0, target))
    return jnp.mean((times(b["x"], p["w"]) - target) ** 2)


def callback(p, b):
    h = times(b["x"], p["w"])
    jax.debug.callback(lambda h: None, h)
    return jnp.mean(jnp.tanh(h) ** 2)


@jax.jit
def layer(h, w):
    return h + jnp.tanh(times(h, w)) / 8


def nested_jit(p, b):
    h = b["x"]
    for _ in range(24):
        h = layer(h, p["w"])
    return jnp.mean(jnp.tanh(h) ** 2)


MATRIX = {"w": (WIDTH, WIDTH)}
DENSE = {"w": (WIDTH, WIDTH), "b": (WIDTH,), "v": (WIDTH, 1)}
LAYERS = {"layers": (2, WIDTH, WIDTH)}
LOSSES = {
    "dense": Loss(dense, DENSE),
    "scan": Loss(layers(lambda layer: layer), LAYERS),
    "checkpoint": Loss(layers(jax.checkpoint), LAYERS),
    "constant_start": Loss(constant_start, LAYERS),
    "embedding": Loss(embedding, {"embedding": (VOCABULARY, WIDTH)}),
    "custom_vjp": Loss(elementwise(squashed), MATRIX, is_mean=False),
    "custom_vjp_of_weights": Loss(on_weights(squashed), MATRIX, is_mean=False),
    "custom_jvp": Loss(on_weights(straight_through), MATRIX),
    "convolution": Loss(convolution, {"kernel": (2, 1, 3)}),
    "keys": Loss(keys, DENSE, extra="key", is_mean=False),
    "carry": Loss(carry, MATRIX, extra="carry", is_mean=False),
    "carried_key": Loss(carried_key, MATRIX, extra="carry", carries_key=True, is_mean=False),
    "aux": Loss(aux, MATRIX, has_aux=True),
    "weighted": Loss(weighted, MATRIX),
    "varying_weight": Loss(varying_weight, MATRIX),
    "bf16": Loss(low_precision(jnp.bfloat16), DENSE, exact=low_precision(jnp.float64), tolerance=0.1),
    "fp16": Loss(low_precision(jnp.float16), DENSE, exact=low_precision(jnp.float64), tolerance=0.02),
    "bf16_parameters": Loss(dense, DENSE, dtype=jnp.bfloat16, tolerance=0.05),
    "quantised": Loss(quantised, MATRIX),
    "inner_vmap": Loss(inner_vmap, MATRIX),
    "while_loop": Loss(while_loop, MATRIX),
    "callback": Loss(callback, MATRIX),
    "nested_jit": Loss(nested_jit, MATRIX),
}
