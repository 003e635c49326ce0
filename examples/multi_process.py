"""Trains on scikit-learn's digits in several processes: each feeds its own devices, and they meet once a window.

    python examples/multi_process.py --processes 2  # two processes on this machine's CPU
    srun python examples/multi_process.py           # under SLURM; likewise on every host of a TPU pod

The optimizer steps are the same with any number of processes. Kill one, and the others say so and end.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxaccum
import jaxaccum.distributed

WINDOW, EVERY_K, EPOCHS = 160, 4, 8  # The examples of a window, over all processes, and its micro-batches.


def init(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A perceptron with one hidden layer."""
    hidden, out = rng.standard_normal((64, 128)) / 8, rng.standard_normal((128, 10)) / 11
    return {"hidden": np.float32(hidden), "bias": np.zeros(128, np.float32), "out": np.float32(out)}


def logits(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Images (N, 64) to logits (N, 10)."""
    return jax.nn.relu(images @ params["hidden"] + params["bias"]) @ params["out"]


def loss(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    """The mean cross-entropy of a micro-batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["image"]), batch["label"]).mean()


def train(out: str | None) -> None:
    """Trains in this process, together with the others, and prints what is the same on all of them once."""
    process, processes = jax.process_index(), jax.process_count()
    say = print if process == 0 else lambda *_: None
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    data = {"image": (images[order] / 16).astype(np.float32), "label": labels[order]}
    held_out, rest = ({name: x[part] for name, x in data.items()} for part in (slice(297), slice(297, None)))

    params = jax.make_array_from_process_local_data(replicated, init(np.random.default_rng(0)))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-3))
    state = jax.jit(tx.init, out_shardings=replicated)(params)
    # Each device sums the gradients of its own micro-batches, and all meet once, at the end of the window.
    window = jaxaccum.value_and_grad(loss, EVERY_K, mesh=mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, batch):
        _, grads = window(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def accuracy(params):
        return jnp.mean(logits(params, held_out["image"]).argmax(-1) == held_out["label"])

    say(f"{processes} processes, {jax.device_count()} devices; K={EVERY_K}, {WINDOW} examples in a window")
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(rest["label"]))
        windows = len(order) // WINDOW
        # If one process took fewer, the others would wait for it in a window: here all of them raise instead.
        jaxaccum.distributed.agree(f"epoch {epoch}", {"windows": windows, "every_k": EVERY_K})
        for rows in order[: windows * WINDOW].reshape(windows, WINDOW):
            mine = {name: x[rows[process::processes]] for name, x in rest.items()}
            batch = jax.make_array_from_process_local_data(split, mine)
            params, state = train_step(params, state, batch)
        say(f"epoch {epoch}  held-out accuracy {accuracy(params):.4f}")
    if out and process == 0:
        np.savez(out, **params)


def launch(processes: int, arguments: list[str]) -> int:
    """Starts this script `processes` times on this machine, and returns 1 if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, __file__, *arguments, "--coordinator", address, "--process-id"]
    started = [subprocess.Popen([*command, str(i)], env=environment) for i in range(processes)]
    return int(any([process.wait() for process in started]))


def main() -> None:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="how many; default: as the cluster says")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; default: as the cluster says")
    parser.add_argument("--process-id", type=int, help="number of this one; without it, --processes starts all")
    parser.add_argument("--out", metavar="FILE.npz", help="where process 0 saves the parameters")
    args = parser.parse_args()
    if args.processes and args.process_id is None:
        sys.exit(launch(args.processes, sys.argv[1:]))
    jaxaccum.distributed.initialize(args.coordinator, args.processes, args.process_id)
    train(args.out)


if __name__ == "__main__":
    main()
