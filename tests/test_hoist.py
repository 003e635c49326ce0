"""What a loss computes from its parameters alone, found and taken out of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum
from jaxaccum import _hoist

LAYERS, WIDTH, K, N = 3, 8, 4, 2


def params():
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda i, *shape: 0.3 * jax.random.normal(keys[i], shape)
    return {
        "embedding": normal(0, 16, WIDTH),
        "layers": {"kernel": normal(1, LAYERS, WIDTH, WIDTH), "bias": normal(2, LAYERS, WIDTH)},
        "base": normal(3, WIDTH, WIDTH),
        "low": normal(4, WIDTH, 2),
        "up": normal(5, 2, WIDTH),
    }


def batch():
    return jax.random.randint(jax.random.key(1), (K * N, 5), 0, 16)


def half(x):
    return x.astype(jnp.bfloat16)


def layer(x, layer):
    return jnp.tanh(x @ half(layer["kernel"]) + half(layer["bias"])), None


def language_model(wrap):
    """Tied embedding, scanned layers that cast for themselves, a merge of low rank; `wrap`s each layer."""

    def loss(p, tokens):
        x = half(p["embedding"][tokens])
        x, _ = jax.lax.scan(wrap(layer), x, p["layers"])
        x = x @ half(p["base"] + p["low"] @ p["up"])
        logits = (x @ half(p["embedding"]).T).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    return loss


WRAPS = {
    "plain": lambda f: f,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "both": lambda f: jax.jit(jax.checkpoint(f)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_split(wrap):
    """A cast left in, one taken out that belongs in, or another result."""
    loss = language_model(wrap)
    prepare, rest = _hoist.split(loss, params(), batch()[:N])
    kept, made = prepare(params())
    # The embedding is gathered from, and a bias is a vector; all else is read in half precision alone.
    assert [x.shape for x in jax.tree.leaves(kept)] == [(16, WIDTH), (LAYERS, WIDTH)]
    assert {(x.shape, str(x.dtype)) for x in made} == {
        ((16, WIDTH), "bfloat16"),
        ((LAYERS, WIDTH, WIDTH), "bfloat16"),
        ((WIDTH, WIDTH), "bfloat16"),
    }
    np.testing.assert_allclose(rest((kept, made), batch()[:N]), loss(params(), batch()[:N]), rtol=1e-3)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_gradients(wrap):
    """A gradient that is lost on the way back, or comes twice."""
    loss = language_model(wrap)
    f = lambda prepare: jax.jit(jaxaccum.value_and_grad(loss, K, prepare=prepare))(params(), batch())
    for x, y in zip(jax.tree.leaves(f("auto")), jax.tree.leaves(f(None)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.03, atol=2e-4)


def made(loss, *args):
    """Shapes and dtypes of what is taken out of `loss`."""
    prepare, _ = _hoist.split(loss, *args)
    return [(x.shape, str(x.dtype)) for x in jax.eval_shape(prepare, args[0])[1]]


W, X = jnp.ones((4, 4)), jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda w, x: (x @ half(w)).sum(), [((4, 4), "bfloat16")]),
        (lambda w, x: (x @ half(w).T).sum(), [((4, 4), "bfloat16")]),
        (lambda w, x: (x @ w.T).sum(), []),
        (lambda w, x: (x @ w[:2].T).sum(), []),
        (lambda w, x: (x @ jnp.concatenate([w, w], axis=1)).sum(), []),
        (lambda w, x: (x @ jnp.exp(jnp.concatenate([w, w], axis=1))).sum(), []),
        (lambda w, x: (x @ (w / jnp.linalg.norm(w, axis=0))).sum(), [((4, 4), "float32")]),
        (lambda w, x: (x @ w).sum() + (w**2).sum(), [((), "float32")]),
        (
            lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ half(w)).astype(w.dtype), None), x, length=3)[0].sum(),
            [],
        ),
        (lambda w, x: jax.lax.cond(x.sum() > 0, lambda w: (x @ half(w)).sum(), lambda w: jnp.float32(0), w), []),
    ],
    ids=["cast", "cast-transpose", "transpose", "slice", "larger", "larger-work", "norm", "penalty", "loop", "cond"],
)
def test_rule(loss, expected):
    """What saves nothing, makes something larger, or would be summed over a loop in half precision."""
    assert made(loss, W, X) == expected


def test_vectors():
    """A cast of a bias, which costs nothing where it is added; not one that a matrix has a part in."""
    b = jnp.ones(4)
    assert made(lambda p, x: (half(x) + half(p)).sum(), b, X) == []
    assert made(lambda p, x: (x * (p[0] @ p[1])).sum(), (W, b), X) == [((4,), "float32")]
