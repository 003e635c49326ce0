"""The classic Flax script for several devices (replicate, shard, pmap), with gradient accumulation as one changed line.

python examples/pmap_train.py

`MultiSteps` around the optimizer is that line, in the place of the script's `pmean` of the gradients: the devices' sums
are joined once a window, and by it. (A `pmean` left where it was changes no number. It costs a reduction in every
micro-step.) Without accelerators it runs on 8 devices made out of the CPU.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # Read by jax; accelerators ignore it.

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.jax_utils import replicate, unreplicate
from flax.training.common_utils import shard
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jaxaccum

MICRO_BATCH, EVERY_K, EPOCHS = 8, 4, 12  # A micro-batch is one device's share of a loader batch.


class CNN(nn.Module):
    """Two convolutions and two dense layers: images (N, 8, 8, 1) to logits (N, 10)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1))))


def create_train_state(key: jax.Array) -> TrainState:
    """Parameters and optimizer of a new model."""
    model = CNN()
    params = model.init(key, jnp.ones((1, 8, 8, 1)))["params"]
    tx = optax.adamw(4e-3)
    tx = jaxaccum.MultiSteps(tx, EVERY_K, axis_name="data")  # The changed line.
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
    """One micro-batch on each device; with every fourth call comes an optimizer step, the same on all of them."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    # The line that it replaces: grads = jax.lax.pmean(grads, axis_name="data")
    return state.apply_gradients(grads=grads), jax.lax.pmean(loss, axis_name="data")


def main() -> None:
    """Trains, and prints the accuracy on held-out digits after every epoch."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    data = {"image": (digits.images[order, ..., None] / 16).astype(np.float32), "label": digits.target[order]}
    held_out, train = ({name: x[part] for name, x in data.items()} for part in (slice(297), slice(297, None)))

    devices = jax.local_device_count()
    batch_size = devices * MICRO_BATCH
    steps = len(train["label"]) // batch_size
    window = batch_size * EVERY_K
    print(f"{devices} devices, {EVERY_K} micro-batches of {MICRO_BATCH} digits on each, {window} in a window")

    state = replicate(create_train_state(jax.random.key(0)))
    p_train_step = jax.pmap(train_step, axis_name="data", donate_argnums=0)
    predict = jax.jit(lambda params, images: CNN().apply({"params": params}, images).argmax(-1))
    for epoch in range(EPOCHS):
        for rows in rng.permutation(len(train["label"]))[: steps * batch_size].reshape(steps, batch_size):
            state, loss = p_train_step(state, shard({name: x[rows] for name, x in train.items()}))
        accuracy = np.mean(predict(unreplicate(state.params), held_out["image"]) == held_out["label"])
        print(f"epoch {epoch:2}  loss {unreplicate(loss):.4f}  held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
