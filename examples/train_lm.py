"""Trains a small language model on Python's own standard library, with token-weighted gradient accumulation.

The model reads bytes, and a sequence is the source text of one function. Functions differ in length, so a micro-batch
counts for its number of real tokens: a window of K micro-batches then gives the gradient of the one big batch that
holds them all. K halves from epoch to epoch. Nothing is downloaded; two CPU cores need a minute or two.

    python examples/train_lm.py
    python examples/train_lm.py --epochs 2 --accumulate 0:16,1:2

`train_lm_loop.py` is the same training as a loop of one's own, without the Trainer.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jaxaccum
from jaxaccum.callbacks import Callback

LENGTH = 128  # bytes of a function that are read; what is longer is cut off
VOCABULARY = 128  # ASCII; byte 0, which source text never holds, begins a sequence, ends it and pads it
WIDTH, LAYERS, HEADS = 64, 2, 2
PEAK_LEARNING_RATE = 8e-3
PROMPT, TEMPERATURE = b"def ", 0.7


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level transformer on the functions of Python's standard library, accumulating "
        "gradients over K micro-batches of N functions, each weighted by its number of real tokens. K follows the "
        "epoch. Prints the plan, then a table with one line per epoch (bits per byte on the training and the held-out "
        "functions) and a generated sample; writes metrics.jsonl and loss.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training functions")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="functions in a micro-batch")
    parser.add_argument(
        "--accumulate",
        type=accumulation,
        default="0:8,1:4,2:2,3:1",
        metavar="EPOCH:K,...",
        help="micro-batches in a window, from which epoch on; epochs count from 0",
    )
    parser.add_argument("--limit", type=int, metavar="S", help="use S functions only, for a quick look")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order, the parameters and the sample")
    parser.add_argument("--out", type=Path, default="runs/train_lm", help="folder for metrics.jsonl and loss.png")
    return parser.parse_args()


def accumulation(text: str) -> jaxaccum.AccumulationSchedule:
    """Reads a schedule such as "0:8,1:4,2:2,3:1"."""
    pairs = (item.split(":") for item in text.split(","))
    return jaxaccum.AccumulationSchedule({int(epoch): int(k) for epoch, k in pairs})


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields the outermost functions below `node`: a nested one is part of its parent's text."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from functions(child)


def read_standard_library() -> np.ndarray:
    """Returns the functions of the standard library, each once, in a fixed order: uint8, (S, 1 + LENGTH)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}  # A dict keeps the order and drops repeats, which would leak into the held-out set.
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(path.relative_to(root).parts):
            source = path.read_bytes()
            lines = source.splitlines()
            for function in functions(ast.parse(source)):
                indent, body = b" " * function.col_offset, lines[function.lineno - 1 : function.end_lineno]
                text = b"\n".join(line.removeprefix(indent) for line in body)
                if text.isascii():
                    texts[text[:LENGTH]] = None
    rows = np.zeros((len(texts), 1 + LENGTH), np.uint8)
    for row, text in zip(rows, texts, strict=True):
        row[1 : 1 + len(text)] = np.frombuffer(text, np.uint8)
    return rows


def micro_batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields `size` rows at a time. Empty rows fill up the last ones: without a real token they weigh nothing."""
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield np.pad(batch, ((0, size - len(batch)), (0, 0)))


class Loader:
    """The micro-batches of an epoch, in another order each time."""

    def __init__(self, rows: np.ndarray, size: int, rng: np.random.Generator):
        self.rows, self.size, self.rng = rows, size, rng

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self) -> Iterator[np.ndarray]:
        return micro_batches(self.rng.permutation(self.rows), self.size)


def real_tokens(rows: Any) -> Any:
    """Returns which targets count, (N, LENGTH): every byte, and the 0 that ends a function, but not the padding."""
    return (rows[:, :-1] | rows[:, 1:]) != 0


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax attention, (N, HEADS, T, D); normalised last, which on CPU takes a third off the whole step."""
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(q.shape[2], dtype=bool), scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return weights @ v / weights.sum(axis=-1, keepdims=True)


class Block(nnx.Module):
    """A pre-norm transformer block: causal attention, then a perceptron with squared ReLU."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.merge = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.perceptron_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3 * HEADS, -1).swapaxes(1, 2)
        x += self.merge(causal_attention(*jnp.split(heads, 3, axis=1)).swapaxes(1, 2).reshape(x.shape))
        return x + self.down(jnp.square(nnx.relu(self.up(self.perceptron_norm(x)))))


class ByteLM(nnx.Module):
    """A decoder-only transformer: bytes (N, T) in, the next byte's logits (N, T, VOCABULARY) out."""

    def __init__(self, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = self.bytes(inputs) + self.positions(jnp.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(graphdef: nnx.GraphDef, params: nnx.State, rows: jax.Array) -> jaxaccum.Weighted:
    """Returns the total of the real tokens' losses, in nats, and their number: `jaxaccum` divides, once a window."""
    logits = nnx.merge(graphdef, params)(rows[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    real = real_tokens(rows)
    return jaxaccum.Weighted(jnp.sum(nats, where=real), jnp.sum(real))


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW after clipping, for so many windows: everything that should happen once a window."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.1 * PEAK_LEARNING_RATE,
        peak_value=PEAK_LEARNING_RATE,
        warmup_steps=steps // 20,
        decay_steps=steps,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.95, weight_decay=0.1))


def generate(graphdef: nnx.GraphDef, params: nnx.State, rng: np.random.Generator) -> str:
    """Samples a function that starts with PROMPT, until it ends or is LENGTH bytes long."""
    logits = jax.jit(lambda params, row, i: nnx.merge(graphdef, params)(row[None])[0, i])
    row = np.zeros(1 + LENGTH, np.uint8)
    row[1 : 1 + len(PROMPT)] = np.frombuffer(PROMPT, np.uint8)
    for i in range(len(PROMPT), LENGTH):
        noise = rng.gumbel(size=VOCABULARY)  # The largest of logits plus Gumbel noise is a sample of their softmax.
        row[i + 1] = np.argmax(logits(params, row[:-1], i) / TEMPERATURE + noise)
        if row[i + 1] == 0:
            break
    return row.tobytes().strip(b"\0").decode()


class Table(Callback):
    """Prints a line at the end of each epoch, and keeps it as a record."""

    def __init__(self):
        self.epochs: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer, task):
        self.losses, self.tokens = [], []
        self.start, self.steps_before = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.losses.append(outputs)
        self.tokens.append(np.count_nonzero(real_tokens(batch)))

    def on_train_epoch_end(self, trainer, task):
        nats = np.average([outputs["loss"] for outputs in self.losses], weights=self.tokens)
        self.epochs.append(
            {
                "epoch": trainer.current_epoch,
                "every_k": trainer.accumulate_grad_batches,
                "effective_batch": trainer.effective_batch_size,
                "optimizer_steps": trainer.global_step - self.steps_before,
                "train_bits_per_byte": nats / math.log(2),
                "held_out_bits_per_byte": trainer.callback_metrics["val_loss"] / math.log(2),
                "seconds": time.perf_counter() - self.start,
            }
        )
        tqdm.write("{:>5}{:>4}{:>17}{:>17}{:>17.4f}{:>20.4f}{:>9.1f}".format(*self.epochs[-1].values()))


def split(library: np.ndarray, limit: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the functions to train on and those to hold out, a twentieth, from `limit` of them in a random order."""
    shuffled = rng.permutation(library)[:limit]
    held_out, train = np.split(shuffled, [math.ceil(len(shuffled) / 20)])
    return train, held_out


def main() -> None:
    """Trains; see the module's docstring."""
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)

    library = read_standard_library()
    train, held_out = split(library, args.limit, rng)
    graphdef, params = nnx.split(ByteLM(nnx.Rngs(args.seed)))
    loader = Loader(train, args.batch_size, rng)

    # The optimizer's clock ticks once a window, and each epoch closes its last one, full or not.
    every_k = [args.accumulate(epoch) for epoch in range(args.epochs)]
    optimizer_steps = args.accumulate.optimizer_steps(args.epochs, len(loader))
    task = jaxaccum.Task(
        init=lambda key, batch: params,
        loss=lambda params, rows, key: loss(graphdef, params, rows),
        optimizer=optimizer(optimizer_steps),
    )

    print(f"data             {len(library):,} functions of Python {platform.python_version()}'s standard library")
    print(f"                 sha256 {hashlib.sha256(library).hexdigest()[:16]}")
    print(f"                 {len(train):,} to train on, {len(held_out):,} held out")
    print(f"model            {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    print(f"micro-batch      N = {args.batch_size} functions, {len(loader):,} micro-steps an epoch")
    print(f"window           K by epoch = {every_k}, effective batch {[k * args.batch_size for k in every_k]}")
    print(f"optimizer steps  {optimizer_steps:,}")
    print(f"\n{'epoch':>5}{'K':>4}{'effective batch':>17}{'optimizer steps':>17}", end="")
    print(f"{'train bits/byte':>17}{'held-out bits/byte':>20}{'seconds':>9}")

    table = Table()
    trainer = jaxaccum.Trainer(
        accumulate_grad_batches=args.accumulate,
        max_epochs=args.epochs,
        strategy="single",
        callbacks=table,
        log_every_n_steps=10,
        seed=args.seed,
    )
    state = trainer.fit(task, loader, list(micro_batches(held_out, args.batch_size)))

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in table.epochs))
    figure = trainer.plot()
    figure.axes[0].set_ylabel("loss (nats per byte)")
    figure.savefig(args.out / "loss.png")
    print(f"\nwrote {args.out}/metrics.jsonl and {args.out}/loss.png; a sample:\n")
    print(generate(graphdef, state.params, rng))


if __name__ == "__main__":
    main()
