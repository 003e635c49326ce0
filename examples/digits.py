"""Trains a linen CNN with BatchNorm and Dropout on scikit-learn's digits, a whole window in each jitted step.

python examples/digits.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxaccum.flax

MICRO_BATCH, EVERY_K, EPOCHS = 16, 4, 8


class CNN(nn.Module):
    """Two convolutions and two dense layers: images (N, 8, 8, 1) to logits (N, 10)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for features in (32, 64):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.95)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))


def loss(model: nn.Module, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy of one micro-batch."""
    logits = model(batch["image"], train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def main() -> None:
    """Trains, and prints the accuracy on held-out digits after every epoch."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    data = {"image": (digits.images[order, ..., None] / 16).astype(np.float32), "label": digits.target[order]}
    held_out, train = ({name: x[part] for name, x in data.items()} for part in (slice(297), slice(297, None)))

    module = CNN()
    variables = module.init(jax.random.key(0), held_out["image"], train=False)
    windows = len(train["label"]) // (EVERY_K * MICRO_BATCH)
    tx = optax.adamw(optax.cosine_decay_schedule(4e-3, EPOCHS * windows))
    opt_state = tx.init(variables["params"])

    # The running statistics pass from micro-batch to micro-batch, and each one has a dropout mask of its own.
    window = jaxaccum.flax.linen_value_and_grad(module, loss, EVERY_K, mutable="batch_stats", rngs="dropout")

    @jax.jit
    def train_step(variables, opt_state, batch, key):
        (value, variables), grads = window(variables, batch, key)
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        return {**variables, "params": optax.apply_updates(variables["params"], updates)}, opt_state, value

    @jax.jit
    def accuracy(variables, batch):
        return jnp.mean(module.apply(variables, batch["image"], train=False).argmax(-1) == batch["label"])

    print(f"{EVERY_K} micro-batches of {MICRO_BATCH} digits in a window, {windows} optimizer steps an epoch")
    for epoch in range(EPOCHS):
        order = rng.permutation(len(train["label"]))[: windows * EVERY_K * MICRO_BATCH].reshape(windows, -1)
        for i, rows in enumerate(order):
            key = jax.random.key(epoch * windows + i)
            variables, opt_state, value = train_step(variables, opt_state, {n: x[rows] for n, x in train.items()}, key)
        print(f"epoch {epoch:2}  loss {value:.4f}  held-out accuracy {accuracy(variables, held_out):.4f}")


if __name__ == "__main__":
    main()
