"""The float64 reference that the exactness tests compare with, and an optimizer that records what it receives."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

TREES = {
    "float32": {"w": jnp.ones((3, 2)), "b": jnp.ones(5), "none": None, "empty": jnp.ones((0, 4))},
    "bfloat16": {"low": {"w": jnp.ones((4, 3), jnp.bfloat16), "h": jnp.ones(3, jnp.float16)}, "high": [jnp.ones(2)]},
    "complex": (jnp.ones((2, 2), jnp.complex64), jnp.ones(())),
}


class Recorded(NamedTuple):
    """What the inner optimizer received last, and how often it ran."""

    mean: Any
    count: Any


def recorder(learning_rate=0.125):
    """An inner optimizer that keeps the whole mean that it receives."""

    def init(params):
        wide = lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))
        return Recorded(jax.tree.map(wide, params), jnp.zeros((), jnp.int32))

    def update(mean, state, params=None):
        del params
        return jax.tree.map(lambda g: g * -learning_rate, mean), Recorded(mean, state.count + 1)

    return optax.GradientTransformation(init, update)


def draw(tree, rng, scale=1.0):
    """Normally distributed gradients for `tree`, in its dtypes."""

    def leaf(p):
        x = rng.standard_normal(p.shape) * scale
        if jnp.issubdtype(p.dtype, jnp.complexfloating):
            x = x + 1j * rng.standard_normal(p.shape) * scale
        return jnp.asarray(x).astype(p.dtype)

    return jax.tree.map(leaf, tree)


def poisoned(grads, value):
    """`grads` with one entry of each leaf replaced by `value`."""
    return jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(value) if g.size else g, grads)


def wide(x):
    """A leaf in double precision."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


class Window(NamedTuple):
    """The reference's sums over one window, in double precision."""

    total: list
    magnitude: list
    weight: float
    size: int

    @classmethod
    def empty(cls, tree):
        zeros = [np.zeros(p.shape, np.complex128) for p in jax.tree.leaves(tree)]
        return cls(zeros, [np.zeros(p.shape) for p in jax.tree.leaves(tree)], 0.0, 0)

    def add(self, grads, weight):
        """One more micro-batch; one of weight 0 is counted and left out."""
        weight = float(np.float32(weight))
        total, magnitude = self.total, self.magnitude
        if weight:
            leaves = [wide(g) for g in jax.tree.leaves(grads)]
            total = [t + weight * g for t, g in zip(total, leaves, strict=True)]
            magnitude = [m + weight * abs(g) for m, g in zip(magnitude, leaves, strict=True)]
        return Window(total, magnitude, self.weight + weight, self.size + 1)

    def check(self, received, use_grad_mean=True):
        """Asserts that `received` is the mean (or sum) to 2K·eps·Σw|g|/Σw, elementwise."""
        divisor = self.weight if use_grad_mean else 1.0
        bound = 2 * self.size * np.finfo(np.float32).eps
        for got, total, magnitude in zip(jax.tree.leaves(received), self.total, self.magnitude, strict=True):
            assert got.dtype in (jnp.float32, jnp.complex64)
            error = abs(wide(got) - total / divisor)
            assert np.all(error <= bound * magnitude / divisor), (error / (magnitude / divisor)).max() / bound
