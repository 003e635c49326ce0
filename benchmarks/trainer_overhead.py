"""What does the Trainer's loop cost, beside a bare loop over the same two programs?

A linear model too small to matter, one device, windows of K micro-steps, batches as numpy arrays. Each side runs an
epoch of micro-steps, and is timed from one of them on, when everything has been compiled, until the device is done.

    bare loop           the programs that the Trainer compiles, called in turn
    Trainer             without a progress bar
    Trainer, with bar   as it is by default, the bar drawn into a file
    Lightning           PyTorch Lightning on a like model, where it is installed, without and with its bar

    PYTHONPATH=. python benchmarks/trainer_overhead.py
    PYTHONPATH=. python benchmarks/trainer_overhead.py --micro-steps 800 --repeats 9 --out trainer.json
    PYTHONPATH=. python benchmarks/trainer_overhead.py --table trainer.json
"""

import contextlib
import importlib.util
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import environment, parser, publish

import jaxaccum
from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.programs.compiled import Programs

WARMUP = 200  # micro-steps before the clock starts
BARE, PLAIN, BAR = "bare loop", "Trainer", "Trainer, with bar"

TASK = jaxaccum.Task(
    init=lambda key, batch: jnp.zeros(batch["x"].shape[1]),
    loss=lambda params, batch, key: jnp.mean((batch["x"] @ params - batch["y"]) ** 2),
    optimizer=optax.sgd(1e-3),
)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    """Loader batches of 8 examples."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((8, *shape)).astype(np.float32)
    return [{"x": draw(4), "y": draw()} for _ in range(count)]


def bare(loader: list[Any], k: int) -> float:
    """Seconds for each micro-step of a loop that does nothing else."""
    strategy = Strategy("single", 1)
    programs = Programs(TASK, strategy, TASK.optimizer, "propagate", seed=0)
    params, opt_state, model_state, pending = state = programs.initial(loader[0], Processes())
    (piece,) = strategy.pieces(loader[:1])
    accumulate, step = programs._accumulate, programs._step
    start = 0.0
    for i, batch in enumerate(loader):
        if i == WARMUP:
            jax.block_until_ready(pending)
            start = time.perf_counter()
        if (i + 1) % k:
            pending, _ = accumulate(params, pending, batch, piece.place)
        else:
            state, _, _ = step(state._replace(pending=pending), batch, piece.place, {})
            params, opt_state, model_state, pending = state
            state = type(state)(params, opt_state, model_state, pending)
    jax.block_until_ready((params, pending))
    return (time.perf_counter() - start) / (len(loader) - WARMUP)


class Clock(jaxaccum.callbacks.Callback):
    """Runs from the micro-step after the warm-up to the end."""

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if batch_idx == WARMUP:
            jax.block_until_ready(trainer.state)
            self.start = time.perf_counter()

    def on_train_end(self, trainer, task):
        jax.block_until_ready(trainer.state)
        self.seconds = (time.perf_counter() - self.start) / (trainer.micro_step - WARMUP)


def trained(loader: list[Any], k: int, bar: bool) -> float:
    """Seconds for each micro-step of a `fit`."""
    clock = Clock()
    trainer = jaxaccum.Trainer(
        accumulate_grad_batches=k, max_epochs=1, strategy="single", callbacks=clock, enable_progress_bar=bar
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        trainer.fit(TASK, loader)
    return clock.seconds


def lightning(loader: list[Any], k: int, bar: bool) -> float:
    """Seconds for each micro-step of a fit of PyTorch Lightning."""
    import torch
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def training_step(self, batch, batch_idx):
            if batch_idx == WARMUP:
                self.start = time.perf_counter()
            return torch.mean((batch["x"] @ self.weight - batch["y"]) ** 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

        def on_train_end(self):
            self.seconds = (time.perf_counter() - self.start) / (len(loader) - WARMUP)

    module = Module()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=k, enable_progress_bar=bar, **quiet)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        tensors = [{name: torch.from_numpy(x) for name, x in batch.items()} for batch in loader]
        trainer.fit(module, torch.utils.data.DataLoader(tensors, batch_size=None))
    return module.seconds


def measure(micro_steps: int, k: int, repeats: int) -> dict[str, list[float]]:
    """Each side's seconds for a micro-step, all sides once a round."""
    loader = batches(WARMUP + micro_steps)
    sides: dict[str, Callable[[], float]] = {
        BARE: lambda: bare(loader, k),
        PLAIN: lambda: trained(loader, k, bar=False),
        BAR: lambda: trained(loader, k, bar=True),
    }
    if importlib.util.find_spec("lightning") is not None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        sides["Lightning"] = lambda: lightning(loader, k, bar=False)
        sides["Lightning, with bar"] = lambda: lightning(loader, k, bar=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    return seconds


def table(record: dict[str, Any]) -> str:
    """The markdown of a run: medians in microseconds, the fastest and the slowest round in brackets."""
    env, settings = record["environment"], record["settings"]
    machine = f"CPU, {env['cores']} cores" if env["platform"] == "cpu" else env["device"]
    used = ", ".join(f"{name} {value}" for name, value in settings.items())
    lines = [
        f"{env['date']}: {machine}; jax {env['jax']}, jaxaccum {env['jaxaccum']}, Python {env['python']}; {used}.",
        "",
        "| a micro-step | µs | more than the bare loop |",
        "| --- | --- | --- |",
    ]
    bare = statistics.median(record["seconds"][BARE])
    for name, times in record["seconds"].items():
        median, low, high = (1e6 * f(times) for f in (statistics.median, min, max))
        lines.append(f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {median - 1e6 * bare:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--micro-steps", type=int, default=2000, help="in a timed epoch")
    options.add_argument("--k", type=int, default=8, help="micro-steps a window")
    args = options.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    seconds = measure(args.micro_steps, args.k, args.repeats)
    settings = {"k": args.k, "micro-steps": args.micro_steps, "repeats": args.repeats, "warmup": WARMUP}
    publish({"environment": environment(), "settings": settings, "seconds": seconds}, table, args.out)


if __name__ == "__main__":
    main()
