"""Trains two towers to match functions and their docstrings: exact negatives over micro-batches, beside naive ones.

The pairs are those of Python's own standard library. A contrastive loss compares each docstring with the code of all
others, so the loss of 1,024 pairs is not the mean of the losses of 16 micro-batches of 64.
`jaxaccum.coupled_value_and_grad` gives its gradient in the activations of one micro-batch. Beside it, a plain window
sees 63 negatives in place of 1,023. Both train on the same pairs in the same order, from the same parameters. Nothing
is downloaded; two CPU cores need less than two minutes.

    python examples/contrastive.py
    python examples/contrastive.py --epochs 2 --limit 2000
"""

import argparse
import ast
import json
import re
import sysconfig
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import jaxaccum

LENGTH = 64  # words of a docstring or of a function's code that are read
BUCKETS, WIDTH = 2**13, 128  # words are hashed; bucket 0 is the padding
Batch = dict[str, Any]  # "text" and "code", (N, LENGTH) each


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train two towers contrastively on the docstrings and the code of Python's standard library: with "
        "the negatives of a whole window, and with those of one micro-batch. Prints a table with one line per epoch "
        "(how often the right code is the nearest among the held-out ones); writes metrics.jsonl and retrieval.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training pairs")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pairs in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=16, metavar="K", help="micro-batches in a window")
    parser.add_argument("--limit", type=int, metavar="S", help="use S pairs only, for a quick look")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order and the parameters")
    parser.add_argument(
        "--out", type=Path, default="runs/contrastive", help="folder for metrics.jsonl and retrieval.png"
    )
    return parser.parse_args()


def words(text: str) -> list[int]:
    """Returns the buckets of the first words; `camelCase` and `snake_case` are two words each."""
    found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text)[:LENGTH]
    return [1 + zlib.crc32(word.lower().encode()) % (BUCKETS - 1) for word in found]


def pairs(source: bytes) -> Iterator[tuple[str, str]]:
    """Yields (docstring, code without it) of the functions in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            text = ast.get_docstring(node)
            if text is not None:
                node.body = node.body[1:]
                yield text, ast.unparse(node)


def read_standard_library() -> Batch:
    """Returns the pairs of the standard library, each docstring and each code once, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    kept: dict[str, dict[tuple[int, ...], None]] = {"text": {}, "code": {}}
    rows = {"text": [], "code": []}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(path.relative_to(root).parts):
            for pair in pairs(path.read_bytes()):
                hashed = dict(zip(rows, map(words, pair), strict=True))
                if len(hashed["text"]) >= 4 and all(tuple(hashed[name]) not in kept[name] for name in rows):
                    for name, row in hashed.items():
                        kept[name][tuple(row)] = None
                        rows[name].append(np.pad(row, (0, LENGTH - len(row))))
    return {name: np.array(matrix, np.int32) for name, matrix in rows.items()}


class Tower(nnx.Module):
    """A bag of words to a unit vector."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(BUCKETS, WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, rows: jax.Array) -> jax.Array:
        real = (rows > 0)[..., None]
        mean = jnp.sum(self.embed(rows), axis=1, where=real) / jnp.sum(real, axis=1)
        h = mean + self.out(nnx.gelu(self.hidden(nnx.standardize(mean))))
        return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


class Towers(nnx.Module):
    """A tower for docstrings, one for code, and the temperature of the loss."""

    def __init__(self, rngs: nnx.Rngs):
        self.text, self.code = Tower(rngs), Tower(rngs)
        self.log_scale = nnx.Param(jnp.log(10.0))


def encode(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> dict[str, jax.Array]:
    """The representations of a micro-batch: a row for each pair, from each tower."""
    towers = nnx.merge(graphdef, params)
    return {"text": towers.text(batch["text"]), "code": towers.code(batch["code"])}


def info_nce(graphdef: nnx.GraphDef, params: nnx.State, rows: dict[str, jax.Array]) -> jax.Array:
    """Each docstring classifies the code of all rows, and each code all docstrings."""
    scores = jnp.exp(nnx.merge(graphdef, params).log_scale[...]) * rows["text"] @ rows["code"].T
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, jnp.arange(len(x))) for x in (scores, scores.T)]
    return jnp.mean(jnp.stack(losses))


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Plots how many held-out pairs are retrieved, epoch by epoch."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("exact", "negatives of the window"), ("naive", "negatives of a micro-batch")):
        retrieved = [record["retrieved"] for record in records if record["negatives"] == name]
        axes.plot(range(1, len(retrieved) + 1), retrieved, marker=".", label=label)
    axes.set(xlabel="epoch", ylabel="held-out docstrings that find their code", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Trains; see the module's docstring."""
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    library = read_standard_library()
    order = rng.permutation(len(library["text"]))[: args.limit]
    held_out, train = np.split(order, [len(order) // 8])
    window = args.batch_size * args.accumulate
    if len(train) < window:
        raise SystemExit(
            f"{len(train)} pairs are left to train on, fewer than the {window} of a window: raise --limit."
        )
    print(f"{len(train):,} pairs to train on, {len(held_out):,} held out, {window:,} in a window")

    graphdef, start = nnx.split(Towers(nnx.Rngs(args.seed)))
    steps = args.epochs * (len(train) // window)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(steps // 10, 1), steps), weight_decay=0.1)
    encoder = lambda params, batch: encode(graphdef, params, batch)
    loss = lambda params, rows: info_nce(graphdef, params, rows)
    gradients = {
        "exact": jaxaccum.coupled_value_and_grad(encoder, loss, args.accumulate),
        "naive": jaxaccum.value_and_grad(lambda params, batch: loss(params, encoder(params, batch)), args.accumulate),
    }

    def trained(gradient):
        """A jitted step of training by one of the gradients."""

        @jax.jit
        def step(params, state, batch):
            value, grads = gradient(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return step

    @jax.jit
    def accuracy(params, batch):
        rows = encoder(params, batch)
        nearest = jnp.argmax(rows["text"] @ rows["code"].T, axis=1)
        return jnp.mean(nearest == jnp.arange(len(nearest)))

    rows_of = lambda numbers: {name: matrix[numbers] for name, matrix in library.items()}
    orders = [rng.permutation(train)[: len(train) // window * window].reshape(-1, window) for _ in range(args.epochs)]
    records = []
    for name, gradient in gradients.items():
        step, params, state = trained(gradient), start, optimizer.init(start)
        print(f"\n{name:<8}{'epoch':>6}{'loss':>9}{'retrieved':>11}{'seconds':>9}")
        for epoch, windows in enumerate(orders):
            began = time.perf_counter()
            for numbers in windows:
                params, state, value = step(params, state, rows_of(numbers))
            record = {"negatives": name, "epoch": epoch, "loss": float(value)}
            record |= {"retrieved": float(accuracy(params, rows_of(held_out))), "seconds": time.perf_counter() - began}
            records.append(record)
            print(f"{name:<8}{epoch:>6}{value:>9.4f}{record['retrieved']:>11.3f}{record['seconds']:>9.1f}")

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw(records, args.out / "retrieval.png")
    print(f"\nwrote {args.out}/metrics.jsonl and {args.out}/retrieval.png")


if __name__ == "__main__":
    main()
