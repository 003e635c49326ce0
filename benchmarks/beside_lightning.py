"""How fast does the same model train here and with PyTorch Lightning?

A window of K micro-batches of N sequences of a GPT-2-shaped language model, with AdamW, on one device: float32
parameters, bfloat16 compute. The same architecture, parameter count, distribution of the start, optimizer, and data:

    jaxaccum                     `value_and_grad` and the update, in one jit
    jaxaccum, prepare            the same with `prepare=jaxaccum.cast(bfloat16)`
    jaxaccum, Trainer            Trainer(accumulate_grad_batches=K)
    Lightning, default           Trainer(accumulate_grad_batches=K, precision="bf16-mixed"), model under `torch.compile`
    Lightning, reduce-overhead   the same with CUDA graphs, `torch.compile(mode="reduce-overhead")`
    torch loop, default          by hand, without the Trainer
    torch loop, reduce-overhead

Each has a process of its own, which trains for a window when it is asked to: they take turns on the device. A side
whose loss does not start within 1% of the first side's, or does not fall, is refused. Needs `pip install torch
lightning`.

    PYTHONPATH=. python benchmarks/beside_lightning.py --out beside_lightning.json
    PYTHONPATH=. python benchmarks/beside_lightning.py --table beside_lightning.json
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from _measure import WARMUP, Comparison, Record, Side, interleave, parser
from _model import Model, add_options, chosen
from _train import CAST, OPTIMIZERS, POOL, Problem, drawn, fresh, in_one_jit, in_trainer, ours, windows

PATIENCE = 240  # seconds for a window, the first of which compiles


class Gate:
    """A worker's end of the pipes: a line on stdin asks for a window, one on what was stdout answers."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # What libraries print is no answer.

    def asked(self) -> bool:
        """Whether another window is asked for; waits for it."""
        return sys.stdin.readline() != ""

    def answer(self, loss: float, size: int) -> None:
        """A window has been trained, and the device is done: its mean loss, and the model's parameter count."""
        print(json.dumps({"loss": loss, "parameters": size}), file=self.answers, flush=True)


def by_jaxaccum(model: Model, k: int, n: int, gate: Gate, **options: Any) -> None:
    """A worker that trains with `value_and_grad`."""
    start = jax.jit(model.init)(jax.random.key(0))
    problem = Problem(model, OPTIMIZERS["adamw"], k, start, windows(model, k, n))
    way = in_one_jit(functools.partial(ours, **options), problem)
    params, inner = fresh(problem)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for tokens in itertools.cycle(problem.windows):
        if not gate.asked():
            return
        params, inner, _, loss = jax.block_until_ready(way.step(params, inner, None, tokens))
        gate.answer(float(loss), size)


def by_trainer(model: Model, k: int, n: int, gate: Gate) -> None:
    """A worker that trains with `Trainer.fit`."""
    start = jax.jit(model.init)(jax.random.key(0))
    problem = Problem(model, OPTIMIZERS["adamw"], k, start, windows(model, k, n))
    way = in_trainer(problem)
    size = sum(leaf.size for leaf in jax.tree.leaves(start))
    while gate.asked():
        way.step(None, None, None, problem.windows[0])  # It reads the windows in turn.
        gate.answer(float(way.own.loss()), size)


def by_torch(way: str, mode: str, model: Model, k: int, n: int, gate: Gate) -> None:
    """A worker that trains in `_torch_model`'s way, under `torch.compile(mode=)`."""
    import _torch_model

    getattr(_torch_model, way)(model, mode, drawn(model, k, n), gate)


SIDES = {
    "jaxaccum": by_jaxaccum,
    "jaxaccum, prepare": functools.partial(by_jaxaccum, prepare=CAST),
    "jaxaccum, Trainer": by_trainer,
    "Lightning, default": functools.partial(by_torch, "trainer", "default"),
    "Lightning, reduce-overhead": functools.partial(by_torch, "trainer", "reduce-overhead"),
    "torch loop, default": functools.partial(by_torch, "loop", "default"),
    "torch loop, reduce-overhead": functools.partial(by_torch, "loop", "reduce-overhead"),
}
FIRST = "jaxaccum"
COMPARISON = Comparison(
    floor=FIRST,
    rival="Lightning, default",
    columns={
        "loss of the first window": lambda case, side: f"{case['losses'][side][0]:.3f}",
        "of the last": lambda case, side: f"{case['losses'][side][-1]:.3f}",
    },
)


class Worker:
    """A side's process, seen from here."""

    def __init__(self, side: str, model: Model, k: int, n: int):
        self.losses, self.failed = [], None
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        call = json.dumps({"side": side, "model": dataclasses.asdict(model), "k": k, "n": n})
        # With a cache of its own no worker waits for another's locks, or has its work done by it.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{self._folder.name}/inductor"}
        command, pipe = [sys.executable, __file__, "--worker", call], subprocess.PIPE
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)

    def ask(self) -> None:
        """Asks for a window, unless the side has failed."""
        if self.failed is None:
            try:
                print(file=self._process.stdin, flush=True)
            except BrokenPipeError:
                self._fail("has ended")

    def wait(self) -> None:
        """Waits until the window is done."""
        if self.failed is not None:
            return
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._fail("has ended" if ready else f"no answer within {PATIENCE} s")
            return
        answer = json.loads(line)
        self.losses.append(answer["loss"])
        self.parameters = answer["parameters"]

    def end(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=30)  # It ends where its stdin does.
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def judge(self, first: "Worker") -> None:
        """A side that trains another model than the first side is no side."""
        if self.failed is None:
            same = self.parameters == first.parameters and abs(self.losses[0] / first.losses[0] - 1) < 0.01
            before = self.losses[(len(self.losses) - 1) % POOL]  # when it first saw the data of the last window
            if not (same and self.losses[-1] < before):
                self.failed = f"{self.parameters} parameters, loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}"

    def _fail(self, how: str) -> None:
        self._process.kill()
        self._process.wait()
        lines = self._log.read_text().strip().splitlines()
        print(*lines[-40:], sep="\n", file=sys.stderr)
        self.failed = f"{how}: {''.join(lines[-1:])[:200]}".replace("|", "/")


def measure(model: Model, sides: list[str], k: int, n: int, repeats: int) -> Record:
    """One case: a window by all sides."""
    workers: dict[str, Worker] = {}

    def start(some: list[str]) -> None:
        """The first window of `some`, side by side."""
        workers.update({name: Worker(name, model, k, n) for name in some})
        for name in some:
            workers[name].ask()
        for name in some:
            workers[name].wait()

    def run(worker: Worker) -> None:
        worker.ask()
        worker.wait()

    try:
        # jax times candidates as it compiles, alone on the device; torch compiles for long, on the host.
        for name in sides:
            if name.startswith(FIRST):
                start([name])
        start([name for name in sides if name not in workers])
        # A round takes a fraction of a millisecond more than its window: two lines through pipes.
        timed = [Side(name, lambda _, worker=worker: run(worker), None) for name, worker in workers.items()]
        seconds = interleave(timed, repeats)
    finally:
        for worker in workers.values():
            worker.end()
    for worker in workers.values():
        worker.judge(workers[FIRST])
    whole = {name: worker for name, worker in workers.items() if worker.failed is None}
    return {
        "name": f"N = {n}",
        "n": n,
        "seconds": {name: seconds[name] for name in whole},
        "losses": {name: worker.losses for name, worker in whole.items()},
        "failed": {name: worker.failed for name, worker in workers.items() if worker.failed is not None},
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--batches", default="1,4", help="N, sequences in a micro-batch; one case for each")
    options.add_argument("--k", type=int, default=8, help="micro-batches a window")
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, metavar="SIDE")
    options.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    add_options(options)
    args = options.parse_args()
    if args.worker is not None:
        call = args.worker
        SIDES[call["side"]](Model(**call["model"]), call["k"], call["n"], Gate())
        return
    if args.table is not None:
        print(COMPARISON.table(json.loads(args.table.read_text())))
        return
    missing = [name for name in ("torch", "lightning") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"pip install {' '.join(missing)}: this benchmark compares with them.")
    # A process takes what it needs and no more, so that all find room on the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    model = chosen(args)
    sides = [FIRST, *(side for side in args.sides if side != FIRST)]
    cases = [measure(model, sides, args.k, n, args.repeats) for n in map(int, args.batches.split(","))]
    settings = {name: importlib.metadata.version(name) for name in ("torch", "lightning")}
    settings |= dataclasses.asdict(model) | {
        "k": args.k,
        "repeats": args.repeats,
        "warmup": 1 + WARMUP,
        "windows": POOL,
    }
    COMPARISON.finish(args.out, settings, cases)


if __name__ == "__main__":
    main()
