"""How much memory does a window take beyond that of one gradient?

A GPT-2-shaped language model (float32 parameters, bfloat16 compute), its layers in a loop and rematerialised: what is
left is what accumulation adds. Each program returns the mean loss and the gradient of a window of K micro-batches of N
sequences; no optimizer is in it. By these sides:

    gradient              of one micro-batch, `jax.value_and_grad`: no side can take less
    window                `jaxaccum.value_and_grad`, which adds the layers' gradients in place
    window, afterwards    the same with `in_place=False`
    window, auto          the same with `prepare="auto"`: half-precision parameters, kept for a window
    Weighted              "window" with a token-weighted loss, `jaxaccum.Weighted`
    Weighted, auto        "window, auto" with it
    hand-written scan     sums in a `lax.scan`
    one big batch         K·N sequences at once

Whole training steps, with AdamW; only their peak is measured:

    training, window          "window" and the update, in one jit
    training, host driven     `jaxaccum.HostDriven`
    training, Trainer         `jaxaccum.Trainer`

"temporary" is what the compiler plans beside arguments and outputs (`Compiled.memory_analysis`); "peak" is the most
that the device has held in a run, by its own statistics, which are those of a process. So each case has a process of
its own. On a CPU, which has no such statistics, programs are compiled only. `--jobs` of them work side by side on one
device; what runs out of memory beside others is tried again alone.

    PYTHONPATH=. python benchmarks/memory.py --size 1.3B --out memory.json
    PYTHONPATH=. python benchmarks/memory.py --table memory.json
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import OUT_OF_MEMORY, environment, heading, in_a_process, parser, publish, row
from _model import Model, add_options, chosen, parameters
from _train import (
    OPTIMIZERS,
    Problem,
    Way,
    by_hand,
    fresh,
    host_driven,
    in_one_jit,
    in_trainer,
    ours,
    ours_weighted,
    windows,
)

Record = dict[str, Any]
FLOOR, BIG = "gradient", "one big batch"
MIB = 2**20

plain = lambda problem: jax.value_and_grad(problem.model.loss)
SIDES: dict[str, Callable[[Problem], Callable[..., Any]]] = {
    FLOOR: plain,
    "window": ours,
    "window, afterwards": functools.partial(ours, in_place=False),
    "window, auto": functools.partial(ours, prepare="auto"),
    "Weighted": ours_weighted,
    "Weighted, auto": functools.partial(ours_weighted, prepare="auto"),
    "hand-written scan": by_hand,
    BIG: plain,
}
TRAINING: dict[str, Callable[[Problem], Way]] = {
    "training, window": functools.partial(in_one_jit, ours),
    "training, host driven": host_driven,
    "training, Trainer": in_trainer,
}


def measure(model: Model, side: str, k: int, n: int) -> Record:
    """One case, in MiB: what the compiler plans, and on an accelerator the most that a run took."""
    batch = jax.ShapeDtypeStruct((k * n, model.length + 1), jnp.int32)
    start = jax.eval_shape(model.init, jax.random.key(0))
    gradient = SIDES[side](Problem(model, opt=None, k=k, start=start, windows=[]))
    program = jax.jit(gradient).lower(start, batch).compile()
    plan = program.memory_analysis()
    sizes = {kind: getattr(plan, f"{kind}_size_in_bytes") / MIB for kind in ("argument", "output", "temp")}
    if jax.default_backend() == "cpu":
        return sizes
    # Zeros take as much memory as any other values do.
    params, tokens = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (start, batch))
    jax.block_until_ready(program(params, tokens))
    return sizes | {"peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / MIB}


def training_peak(model: Model, side: str, k: int, n: int) -> Record:
    """The most that the device has held in two windows of training, in MiB."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)  # On the host.
    problem = Problem(model, OPTIMIZERS["adamw"], k, start, windows(model, k, n))
    way = TRAINING[side](problem)
    params, inner = fresh(problem) if way.own is None else (None, None)
    for tokens in problem.windows[:2]:
        params, inner, way.rest, _ = way.step(params, inner, way.rest, tokens)
    jax.block_until_ready((params, inner, way.rest))
    return {"peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / MIB}


def table(record: Record) -> str:
    """The markdown of a run."""
    header = ["", "K", "temporary MiB", f"over {FLOOR}'s", "arguments", "results", "peak"]
    lines = [heading(record), "", row(header), row(["---"] * len(header))]
    floor = next(case.get("temp") for case in record["cases"] if case["side"] == FLOOR)
    for case in record["cases"]:
        cells = [case["side"], str(case["k"])]
        if "failed" in case:
            lines.append(row([*cells, case["failed"].replace("|", "/").replace("\n", " "), *[""] * 4]))
            continue
        sizes = {name: f"{case[name]:.1f}" if name in case else "–" for name in ("temp", "argument", "output", "peak")}
        ratio = f"{case['temp'] / floor:.3f}" if floor and "temp" in case else "–"
        lines.append(row([*cells, sizes["temp"], ratio, sizes["argument"], sizes["output"], sizes["peak"]]))
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__, timed=False)
    options.add_argument("--n", type=int, default=1, help="N, sequences in a micro-batch")
    options.add_argument("--ks", default="1,2,8,64", help="K, micro-batches a window; one case a side for each")
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=[*SIDES, *TRAINING], metavar="SIDE")
    options.add_argument("--jobs", type=int, default=4, help="cases at a time")
    options.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    add_options(options)
    args = options.parse_args()
    if args.case is not None:
        model = Model(**args.case.pop("model"))
        measured = training_peak if args.case["side"] in TRAINING else measure
        print(json.dumps(measured(model, **args.case)))
        return
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    # A process takes what it needs and no more, so that several find room on a device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    model = dataclasses.replace(chosen(args), remat=True)
    sides = [side for side in args.sides if side != FLOOR]
    ks = list(map(int, args.ks.split(",")))
    cases = [{"side": side, "k": k, "n": args.n} for side, k in [(FLOOR, 1), *itertools.product(sides, ks)]]
    measured = lambda case: case | in_a_process(__file__, {"model": dataclasses.asdict(model)} | case)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(measured, cases))
    again = lambda case, result: measured(case) if result.get("failed") == OUT_OF_MEMORY else result
    results = [again(case, result) for case, result in zip(cases, results, strict=True)]
    size = parameters(jax.eval_shape(model.init, jax.random.key(0)))
    settings = {"parameters": size, **dataclasses.asdict(model), "n": args.n}
    publish({"environment": environment(), "settings": settings, "cases": results}, table, args.out)


if __name__ == "__main__":
    main()
