"""Trains a small language model on Python's own standard library, with token-weighted gradient accumulation.

The model reads bytes, and a sequence is the source text of one function. Functions differ in length, so a micro-batch
counts for its number of real tokens: a window of K micro-batches then gives the gradient of the one big batch that
holds them all. K halves from epoch to epoch. Nothing is downloaded; two CPU cores need a minute or two.

    python examples/train_lm.py
    python examples/train_lm.py --epochs 2 --accumulate 0:16,1:2 --check
"""

import argparse
import ast
import functools
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxaccum

LENGTH = 128  # bytes of a function that are read; what is longer is cut off
VOCABULARY = 128  # ASCII; byte 0, which source text never holds, begins a sequence, ends it and pads it
WIDTH, LAYERS, HEADS = 64, 2, 2
PEAK_LEARNING_RATE = 8e-3
PROMPT, TEMPERATURE = b"def ", 0.7
CHECKED_WINDOWS = 4


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
    parser.add_argument(
        "--check",
        action="store_true",
        help="before training, take the first windows also as one big batch each, with plain optax, and print by how "
        "much the parameters differ",
    )
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


def check(
    micro_step: Callable[..., Any],
    loss_fn: Callable[..., jaxaccum.Weighted],
    tx: jaxaccum.MultiSteps,
    params: nnx.State,
    windows: Sequence[Sequence[np.ndarray]],
) -> tuple[float, float]:
    """Trains on `windows` twice: by micro-steps, and taking each as one big batch with the bare optimizer.

    Returns:
      The largest difference between the two in any parameter, and the farthest that one moved.
    """

    def mean_loss(params, rows):
        total, tokens = loss_fn(params, rows)
        return total / tokens

    @jax.jit
    def big_step(params, opt_state, rows):
        updates, opt_state = tx.inner_opt.update(jax.grad(mean_loss)(params, rows), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    accumulated, opt_state = jax.tree.map(jnp.copy, params), tx.init(params)  # A copy: micro_step donates it.
    big, big_opt_state = params, tx.inner_opt.init(params)
    for window in windows:
        for i, rows in enumerate(window):
            _, accumulated, opt_state = micro_step(accumulated, opt_state, rows, boundary=i == len(window) - 1)
        big, big_opt_state = big_step(big, big_opt_state, np.concatenate(window))
    distance = lambda a, b: max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))
    return distance(accumulated, big), distance(big, params)


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


def plot(losses: Sequence[np.ndarray], epochs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws bits per byte over micro-steps: the training loss, smoothed, and the held-out loss after each epoch."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = np.concatenate(losses)
    span = math.ceil(len(train) / 200)
    means = [train[start : start + span].mean() for start in range(0, len(train), span)]
    axes.plot(np.minimum(np.arange(1, 1 + len(means)) * span, len(train)), means, label="training")
    ends = np.cumsum([len(epoch) for epoch in losses])
    axes.plot(ends, [epoch["held_out_bits_per_byte"] for epoch in epochs], "o-", label="held out")
    for start, epoch in zip([0, *ends], epochs, strict=False):
        axes.axvline(start, color="lightgray", zorder=0)
        axes.text(start, 1.01, f" K={epoch['every_k']}", transform=axes.get_xaxis_transform())
    axes.set(xlabel="micro-step", ylabel="bits per byte")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains; see the module's docstring."""
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)

    library = read_standard_library()
    shuffled = rng.permutation(library)[: args.limit]
    held_out, train = np.split(shuffled, [math.ceil(len(shuffled) / 20)])
    graphdef, params = nnx.split(ByteLM(nnx.Rngs(args.seed)))
    loss_fn = functools.partial(loss, graphdef)

    # The optimizer's clock ticks once a window, and each epoch closes its last one, full or not.
    micro_steps = math.ceil(len(train) / args.batch_size)
    every_k = [args.accumulate(epoch) for epoch in range(args.epochs)]
    effective_batch = [k * args.batch_size for k in every_k]
    optimizer_steps = [math.ceil(micro_steps / k) for k in every_k]
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.1 * PEAK_LEARNING_RATE,
        peak_value=PEAK_LEARNING_RATE,
        warmup_steps=sum(optimizer_steps) // 20,
        decay_steps=sum(optimizer_steps),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.95, weight_decay=0.1))
    tx = jaxaccum.MultiSteps(optimizer, every_k_schedule=every_k[0])
    opt_state = tx.init(params)

    print(f"data             {len(library):,} functions of Python {platform.python_version()}'s standard library")
    print(f"                 sha256 {hashlib.sha256(library).hexdigest()[:16]}")
    print(f"                 {len(train):,} to train on, {len(held_out):,} held out")
    print(f"model            {sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    print(f"micro-batch      N = {args.batch_size} functions, {micro_steps:,} micro-steps an epoch")
    print(f"window           K by epoch = {every_k}, effective batch {effective_batch}")
    print(f"optimizer steps  {optimizer_steps}, together {sum(optimizer_steps):,}")

    # The host knows its place in the window, so `boundary` is static: two programs, and only one holds the optimizer.
    @functools.partial(jax.jit, static_argnames="boundary", donate_argnames=("params", "opt_state"))
    def micro_step(params, opt_state, rows, boundary):
        return tx.micro_step(loss_fn, params, opt_state, rows, boundary=boundary)

    if args.check:
        batches = list(micro_batches(train[: CHECKED_WINDOWS * effective_batch[0]], args.batch_size))
        windows = [batches[start : start + every_k[0]] for start in range(0, len(batches), every_k[0])]
        difference, movement = check(micro_step, loss_fn, tx, params, windows)
        print(f"check            {len(windows)} windows, accumulated and as one big batch each: the parameters moved")
        print(f"                 by up to {movement:.1e} and differ by at most {difference:.1e}")

    evaluate = jax.jit(loss_fn)
    optimizer_step, epochs, losses = 0, [], []
    print(f"\n{'epoch':>5}{'K':>4}{'effective batch':>17}{'optimizer steps':>17}", end="")
    print(f"{'train bits/byte':>17}{'held-out bits/byte':>20}{'seconds':>9}")
    with tqdm(total=args.epochs * micro_steps, unit="micro-step", mininterval=0.5, leave=False) as bar:
        for epoch, k in enumerate(every_k):
            start = time.perf_counter()
            opt_state = jaxaccum.set_every_k(opt_state, k)
            bar.set_description(f"epoch {epoch}")
            nats, tokens = [], []
            for i, rows in enumerate(micro_batches(rng.permutation(train), args.batch_size)):
                boundary = (i + 1) % k == 0 or i + 1 == micro_steps
                mean, params, opt_state = micro_step(params, opt_state, rows, boundary=boundary)
                nats.append(mean)
                tokens.append(np.count_nonzero(real_tokens(rows)))
                optimizer_step += boundary
                place = f"micro-step {i % k + 1}/{k}, optimizer step {optimizer_step}"
                bar.set_postfix_str(f"{place}, effective batch {effective_batch[epoch]}", refresh=False)
                bar.update()
            losses.append(np.array(jax.device_get(nats)) / math.log(2))
            held_out_sums = [evaluate(params, rows) for rows in micro_batches(held_out, args.batch_size)]
            held_out_nats = sum(total for total, _ in held_out_sums) / sum(weight for _, weight in held_out_sums)
            epochs.append(
                {
                    "epoch": epoch,
                    "every_k": k,
                    "effective_batch": effective_batch[epoch],
                    "optimizer_steps": int(opt_state.gradient_step) - sum(optimizer_steps[:epoch]),
                    "train_bits_per_byte": float(np.average(losses[-1], weights=tokens)),
                    "held_out_bits_per_byte": float(held_out_nats) / math.log(2),
                    "seconds": time.perf_counter() - start,
                }
            )
            bar.write("{:>5}{:>4}{:>17}{:>17}{:>17.4f}{:>20.4f}{:>9.1f}".format(*epochs[-1].values()))

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    plot(losses, epochs, args.out / "loss.png")
    print(f"\nwrote {args.out}/metrics.jsonl and {args.out}/loss.png; a sample:\n")
    print(generate(graphdef, params, rng))


if __name__ == "__main__":
    main()
