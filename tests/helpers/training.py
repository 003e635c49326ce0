"""What the tests of the Trainer share: a small task, loaders, and a callback and a logger that record."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from jaxaccum.callbacks import Callback

trainer = functools.partial(jaxaccum.Trainer, enable_progress_bar=False, max_epochs=1)
single = functools.partial(trainer, strategy="single")


def task(optimizer=None, *, dropout=0.0, model_state=False):
    """A layer's squared error, a plain loss, with the mean prediction as a metric."""

    def init(key, batch):
        params = {"w": jax.random.normal(key, (batch["x"].shape[1], 2)), "b": jnp.zeros(2)}
        return (params, {"seen": jnp.zeros(()), "steps": jnp.zeros((), jnp.int32)}) if model_state else params

    def loss(params, batch, key):
        x = batch["x"]
        if dropout and key is not None:
            x = x * jax.random.bernoulli(key, 1 - dropout, x.shape)
        y = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.mean((y - batch["y"]) ** 2), {"mean": y.mean()}

    def stateful(params, state, batch, key):
        value, metrics = loss(params, batch, key)
        new = {"seen": state["seen"] + batch["x"].mean(), "steps": state["steps"] + 1}
        return value, new, metrics

    return jaxaccum.Task(init, stateful if model_state else loss, optimizer or optax.adamw(0.05), model_state)


def loader(*sizes, seed=0):
    """A batch of each size."""
    rng = np.random.default_rng(seed)
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return [{"x": draw(n, 3), "y": draw(n, 2)} for n in sizes]


def slope(optimizer=None):
    """A task whose gradient is the mean of the batch: `sgd(1.0)`, from 0, shows each window's mean in its step."""
    return jaxaccum.Task(
        init=lambda key, batch: jnp.zeros(()),
        loss=lambda w, batch, key: w * jnp.mean(batch),
        optimizer=optimizer or optax.sgd(1.0),
    )


def ones(*sizes):
    """Batches of ones, for `slope`."""
    return [np.ones(n, np.float32) for n in sizes]


class Unsized:
    """Batches without a length, or with one that lies."""

    def __init__(self, batches, length=None):
        self.batches = batches
        if length is not None:
            self.__class__ = type("Sized", (Unsized,), {"__len__": lambda self: length})

    def __iter__(self):
        return iter(self.batches)


class Recorder(Callback):
    """Keeps what `look(trainer)` gives after each micro-step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.seen.append(self.look(trainer))


class Logged:
    """A logger that keeps the records of the newest run."""

    def __init__(self):
        self.records = []

    def begin(self, place):
        self.records = []

    def write_scalars(self, step, scalars):
        self.records.append({"step": step, **scalars})


def assert_close(got, want, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, want)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)
