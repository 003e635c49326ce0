"""What the tests of the Trainer's noise scale share: tasks with a known gradient, and norms from the batches."""

import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum


def linear(unit=1):
    """A task whose gradient is the mean of the batch's rows, each of which weighs `unit`."""
    return jaxaccum.Task(
        init=lambda key, batch: jnp.zeros(batch.shape[1:]),
        loss=lambda w, batch, key: jaxaccum.Weighted(unit * jnp.sum(batch @ w), unit * len(batch)),
        optimizer=optax.sgd(1.0),
    )


def plain():
    """The same task with a plain loss."""
    return jaxaccum.Task(
        lambda key, batch: jnp.zeros(batch.shape[1:]), lambda w, batch, key: jnp.mean(batch @ w), optax.sgd(1.0)
    )


def rows(*sizes):
    """Batches of these sizes."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((size, 64)) + 1 / 8).astype(np.float32) for size in sizes]


def two_sizes(parts, whole):
    """(the squared norms, the sizes) of the parts, averaged, and of the whole, from their batches."""
    square = lambda batches: np.sum(np.mean(np.concatenate(batches), axis=0, dtype=np.float64) ** 2)
    size = lambda batches: sum(map(len, batches))
    sizes = list(map(size, parts))
    return [np.average(list(map(square, parts)), weights=sizes), square(whole)], [np.mean(sizes), size(whole)]
