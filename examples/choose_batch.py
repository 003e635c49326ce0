"""Chooses N and K for the language model of `train_lm.py`: N by memory, and K by the gradient's noise as it trains.

`jaxaccum.plan` finds the largest micro-batch that fits in a budget of memory. `AdaptiveAccumulation` then measures the
gradient noise scale in each window and moves K towards it: the noise grows as the model learns, and so does K. Nothing
is downloaded; two CPU cores need less than two minutes.

    python examples/choose_batch.py
    python examples/choose_batch.py --memory 64 --learning-rate-rule sqrt
"""

import argparse
import math
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from train_lm import PEAK_LEARNING_RATE, ByteLM, Loader, loss, micro_batches, read_standard_library, split

import jaxaccum

WARMUP = 20  # windows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Plan the micro-batch N of a byte-level language model for a budget of memory, then train it with "
        "a K that follows the gradient noise scale. Prints the plan and the schedule of K that the run chose; writes "
        "batch.png with losses, K, and the noise scale beside the tokens of a window.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--memory", type=float, default=24, metavar="MIB", help="memory for a step, in MiB")
    parser.add_argument("--target", type=int, default=64, help="functions in the window that is planned")
    parser.add_argument("--max-k", type=int, default=32, help="the largest K")
    parser.add_argument("--learning-rate-rule", choices=("none", "sqrt", "linear"), default="none")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training functions")
    parser.add_argument("--limit", type=int, default=4000, metavar="S", help="use S functions only")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order and the parameters")
    parser.add_argument("--out", type=Path, default="runs/choose_batch", help="folder for batch.png")
    return parser.parse_args()


def main() -> None:
    """Plans and trains; see the module's docstring."""
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    train, held_out = split(read_standard_library(), args.limit, rng)
    graphdef, params = nnx.split(ByteLM(nnx.Rngs(args.seed)))
    # The number of windows is not known beforehand, so the learning rate does not decay: K grows instead.
    learning_rate = optax.linear_schedule(0, PEAK_LEARNING_RATE / 2, WARMUP)
    task = jaxaccum.Task(
        init=lambda key, batch: params,
        loss=lambda params, rows, key: loss(graphdef, params, rows),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.95, weight_decay=0.1)),
    )

    plan = jaxaccum.plan(task, None, train[:1], target_batch_size=args.target, memory_limit=args.memory * 2**20)
    print(f"{plan}\n")

    adaptive = jaxaccum.callbacks.AdaptiveAccumulation(
        min_k=2, max_k=args.max_k, learning_rate=args.learning_rate_rule, scale=jaxaccum.NoiseScale(decay=0.95)
    )
    trainer = jaxaccum.Trainer(
        accumulate_grad_batches=2,
        max_epochs=args.epochs,
        strategy="single",
        callbacks=adaptive,
        log_every_n_steps=10,
        seed=args.seed,
    )
    trainer.fit(task, Loader(train, plan.micro_batch_size, rng), list(micro_batches(held_out, 16)))

    print(f"K by optimizer step  {adaptive.chosen}")
    print(f"optimizer steps      {trainer.global_step:,} for {trainer.samples_seen:,} functions")
    print(f"noise scale          {trainer.callback_metrics['noise_scale']:,.0f} tokens")
    print(f"held-out bits/byte   {trainer.callback_metrics['val_loss'] / math.log(2):.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    figure = trainer.plot()
    figure.axes[0].set_ylabel("loss (nats per byte)")
    figure.axes[2].set_ylabel("tokens")
    figure.savefig(args.out / "batch.png")
    print(f"wrote {args.out}/batch.png")


if __name__ == "__main__":
    main()
