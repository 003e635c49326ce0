"""Trains an MLP on scikit-learn's digits with jit on a data x model mesh, a whole window in each jitted step.

python examples/mesh_train.py

Matrices are split over the mesh's "model" axis and batches over its "data" axis. Every row of the mesh sums the
gradients of K micro-batches of its own, and one reduction over "data" joins the sums, once a window; what the split
matrices exchange over "model" is left to jax. Without accelerators it runs on 8 devices made out of the CPU, as 4 x 2.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # Read by jax; accelerators ignore it.

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxaccum

MICRO_BATCH, EVERY_K, EPOCHS = 8, 4, 10  # A micro-batch lies on one row of the mesh.
WIDTH, BLOCKS = 256, 2
PARAMETERS = {  # The shape of each, and how it lies on the mesh.
    "in": ((64, 64), P()),
    "up": ((BLOCKS, 64, WIDTH), P(None, None, "model")),
    "down": ((BLOCKS, WIDTH, 64), P(None, "model", None)),
    "out": ((64, 10), P()),
}

Params = dict[str, jax.Array]


def init(key: jax.Array, mesh: Mesh) -> Params:
    """Normal values, scaled by the number of inputs, on the mesh."""
    keys = dict(zip(PARAMETERS, jax.random.split(key, len(PARAMETERS)), strict=True))
    values = {name: jax.random.normal(keys[name], shape) * shape[-2] ** -0.5 for name, (shape, _) in PARAMETERS.items()}
    return jax.device_put(values, {name: NamedSharding(mesh, spec) for name, (_, spec) in PARAMETERS.items()})


def logits(params: Params, images: jax.Array) -> jax.Array:
    """Images (N, 64) to logits (N, 10), through residual blocks of two matrices."""
    x = images @ params["in"]
    for up, down in zip(params["up"], params["down"], strict=True):
        x = x + jax.nn.relu(x @ up) @ down
    return x @ params["out"]


def loss(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy of one micro-batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["image"]), batch["label"]).mean()


def main() -> None:
    """Trains, and prints the accuracy on held-out digits after every epoch."""
    model = 2 if jax.device_count() % 2 == 0 else 1
    shape = (jax.device_count() // model, model)
    # Auto: jax finds out how activations lie. On Explicit axes, which are jax's default, the model must say it itself.
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    rng = np.random.default_rng(0)
    digits = load_digits()
    order = rng.permutation(len(digits.target))
    data = {"image": (digits.data[order] / 16).astype(np.float32), "label": digits.target[order]}
    held_out, train = ({name: x[part] for name, x in data.items()} for part in (slice(297), slice(297, None)))

    params = init(jax.random.key(0), mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3))  # Of the whole gradient, once a window.
    # Moments lie as their parameters do; the count of steps is put on the mesh too, or the second step compiles again.
    opt_state = jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, NamedSharding(mesh, P())), tx.init(params))
    window = jaxaccum.value_and_grad(loss, EVERY_K, mesh=mesh, data_axis="data")

    def train_step(params, opt_state, batch):
        value, grads = window(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    # Said outright, or XLA may lay out anew what it returns.
    kept = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    train_step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*kept, None))
    predict = jax.jit(lambda params, images: logits(params, images).argmax(-1))

    size = mesh.shape["data"] * EVERY_K * MICRO_BATCH
    windows = len(train["label"]) // size
    print(f"mesh {dict(mesh.shape)}: {EVERY_K} micro-batches of {MICRO_BATCH} digits on each row, {size} in a window")
    for epoch in range(EPOCHS):
        for rows in rng.permutation(len(train["label"]))[: windows * size].reshape(windows, size):
            batch = {name: jax.device_put(x[rows], NamedSharding(mesh, P("data"))) for name, x in train.items()}
            params, opt_state, value = train_step(params, opt_state, batch)
        accuracy = np.mean(predict(params, held_out["image"]) == held_out["label"])
        print(f"epoch {epoch:2}  loss {value:.4f}  held-out accuracy {accuracy:.4f}")
    print(f"up lies as {params['up'].sharding.spec}, its first moment as {opt_state[1][0].mu['up'].sharding.spec}")


if __name__ == "__main__":
    main()
