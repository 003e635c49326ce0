"""Does a K that follows the gradient noise scale reach a fixed schedule's loss with fewer samples and fewer steps?

Trains the byte-level language model of examples/train_lm.py, once for each policy and seed, and validates as it goes.
All policies see the same data in the same order, with AdamW and a learning rate that is constant after a warm-up.
"adaptive" is `callbacks.AdaptiveAccumulation`. The others have a constant K, or one that falls by epoch.

    PYTHONPATH=.:examples python benchmarks/adaptive.py --out adaptive.json
    PYTHONPATH=.:examples python benchmarks/adaptive.py --table adaptive.json
"""

import argparse
import itertools
import json
import math
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import train_lm
from _measure import Record, environment, heading, parser, publish, row
from flax import nnx

import jaxaccum
from jaxaccum.callbacks import AdaptiveAccumulation

WARMUP = 20  # windows
POLICIES = {
    "adaptive": 2,
    "adaptive, learning rate by sqrt(K)": 2,
    "K = 2": 2,
    "K = 4": 4,
    "K = 8": 8,
    "K = 16": 16,
    "K = 16, 8, 4, 2 by epoch": {0: 16, 1: 8, 2: 4, 3: 2},
}


class Curve:
    """A logger that keeps the validations: (samples, optimizer steps, held-out bits per byte)."""

    def __init__(self) -> None:
        self.points: list[tuple[int, int, float]] = []

    def write_scalars(self, step: int, values: dict[str, Any]) -> None:
        """Keeps a record that has a validation."""
        if "val_loss" in values:
            self.points.append((int(values["samples_seen"]), step, float(values["val_loss"]) / math.log(2)))


def trained(policy: str, seed: int, library: np.ndarray, args: argparse.Namespace) -> Record:
    """A run's curve and the schedule that it chose."""
    rng = np.random.default_rng(seed)
    train, held_out = train_lm.split(library, args.limit, rng)
    graphdef, params = nnx.split(train_lm.ByteLM(nnx.Rngs(seed)))
    learning_rate = lambda step: args.learning_rate * jnp.minimum(1, (step + 1) / WARMUP)
    task = jaxaccum.Task(
        init=lambda key, batch: params,
        loss=lambda params, rows, key: train_lm.loss(graphdef, params, rows),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.95, weight_decay=0.1)),
    )
    adaptive = AdaptiveAccumulation(
        2, 64, learning_rate="sqrt" if "sqrt" in policy else "none", scale=jaxaccum.NoiseScale(decay=0.95)
    )
    curve = Curve()
    trainer = jaxaccum.Trainer(
        accumulate_grad_batches=POLICIES[policy],
        max_epochs=args.epochs,
        strategy="single",
        callbacks=[adaptive] if policy.startswith("adaptive") else [],
        val_check_interval=1 / args.validations,
        logger=curve,
        enable_progress_bar=False,
        seed=seed,
    )
    loader = train_lm.Loader(train, args.batch, rng)
    trainer.fit(task, loader, list(train_lm.micro_batches(held_out, 64)))
    return {"policy": policy, "seed": seed, "curve": curve.points, "chosen": adaptive.chosen}


def reached(curve: list[tuple[int, int, float]], loss: float) -> tuple[float, float] | None:
    """The samples and optimizer steps at which a curve first is at most `loss`, interpolated; None if it never is."""
    if curve[0][2] <= loss:
        return curve[0][:2]
    for before, after in itertools.pairwise(curve):
        if after[2] <= loss:
            part = (before[2] - loss) / (before[2] - after[2])
            return before[0] + part * (after[0] - before[0]), before[1] + part * (after[1] - before[1])
    return None


def spread(values: list[float], digits: int) -> str:
    """The median, and in brackets the smallest and the largest value."""
    low, middle, high = (f"{x:,.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def table(record: Record) -> str:
    """The markdown of a run: each policy's end, then what the adaptive runs needed to reach each fixed one's end."""
    runs = {(run["policy"], run["seed"]): run["curve"] for run in record["runs"]}
    seeds = sorted({seed for _, seed in runs})
    policies = list(dict.fromkeys(policy for policy, _ in runs))
    header = ["policy", "held-out bits per byte", "optimizer steps", "samples"]
    lines = [heading(record), "", row(header), row(["---"] * len(header))]
    for policy in policies:
        samples, steps, losses = zip(*(runs[policy, seed][-1] for seed in seeds), strict=True)
        lines.append(row([policy, spread(losses, 3), spread(steps, 0), spread(samples, 0)]))
    header = ["to reach the end of", "by", "seeds", "samples / its", "steps / its"]
    lines += ["", row(header), row(["---"] * len(header))]
    adaptive = [policy for policy in policies if policy.startswith("adaptive")]
    for fixed in (policy for policy in policies if policy not in adaptive):
        for policy in adaptive:
            ends = [(runs[fixed, seed][-1], reached(runs[policy, seed], runs[fixed, seed][-1][2])) for seed in seeds]
            found = [(end, at) for end, at in ends if at is not None]
            parts = [spread([at[i] / end[i] for end, at in found], 2) if found else "–" for i in (0, 1)]
            lines.append(row([fixed, policy, f"{len(found)} of {len(seeds)}", *parts]))
    return "\n".join(lines)


def main() -> None:
    """Runs what the command line asks for."""
    options = parser(__doc__, timed=False)
    options.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES, metavar="POLICY")
    options.add_argument("--seeds", type=int, default=5, help="how many runs of each policy")
    options.add_argument("--limit", type=int, help="use so many functions only")
    options.add_argument("--batch", type=int, default=8, metavar="N", help="functions in a micro-batch")
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--learning-rate", type=float, default=4e-3, help="after the warm-up")
    options.add_argument("--validations", type=int, default=8, help="in an epoch")
    args = options.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    library = train_lm.read_standard_library()
    runs = [trained(policy, seed, library, args) for seed in range(args.seeds) for policy in args.policies]
    names = ("seeds", "limit", "batch", "epochs", "learning_rate", "validations")
    settings = {name: getattr(args, name) for name in names}
    publish({"environment": environment(), "settings": settings, "runs": runs}, table, args.out)


if __name__ == "__main__":
    main()
