"""Does the micro-batch that `jaxaccum.plan` finds fit, and is its peak the device's own?

A GPT-2-shaped language model (float32 parameters, bfloat16 compute) with AdamW. One process plans, with the device's
own limit. Two others train for two windows, at the planned N and at the next larger one: "trained" is the most that the
device has held there, by its own statistics, or "out of memory". On a CPU, which has no such statistics, nothing
trains, and `--memory-limit` is needed.

    PYTHONPATH=. python benchmarks/plan.py --size 1.3B --out plan.json
    PYTHONPATH=. python benchmarks/plan.py --table plan.json
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
from _measure import Record, environment, heading, in_a_process, parser, publish, row
from _model import Model, add_options, chosen, parameters
from _train import OPTIMIZERS
from memory import training_peak

import jaxaccum

GIB = 2**30


def planned(model: Model, target: int, memory_limit: int | None, measure: bool) -> Record:
    """A plan, and the time that it took."""
    start = time.perf_counter()
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.ShapeDtypeStruct((1, model.length + 1), jnp.int32)
    options = {"memory_limit": memory_limit, "measure": measure}
    plan = jaxaccum.plan(model.loss, params, batch, OPTIMIZERS["adamw"], target, **options)
    memory = lambda trial: {} if trial.memory is None else trial.memory._asdict() | {"peak": trial.memory.total}
    return {
        "n": plan.micro_batch_size,
        "limit": plan.memory_limit,
        "seconds": time.perf_counter() - start,
        "trials": [
            {"n": trial.micro_batch_size, "k": trial.every_k, "fits": trial.fits, "window": trial.seconds}
            | memory(trial)
            for trial in plan.trials
        ],
    }


def trained(model: Model, k: int, n: int) -> Record:
    """The most bytes that the device has held in two windows of training."""
    if jax.default_backend() == "cpu":
        return {"failed": "–"}
    return {"trained": 2**20 * training_peak(model, "training, window", k, n)["peak"]}


def table(record: Record) -> str:
    """The markdown of a run."""
    kinds = ["parameters", "optimizer", "sums", "activations", "peak"]
    header = ["N", "K", *(f"{kind} GiB" for kind in kinds), "fits", "trained", "trained / peak", "ms"]
    plan = record["plan"]
    lines = [
        heading(record),
        "",
        f"Planned: N = {plan['n']} of at most {plan['limit'] / GIB:.2f} GiB, in {len(plan['trials'])} compiles and "
        f"{plan['seconds']:.0f} s.",
        "",
        row(header),
        row(["---"] * len(header)),
    ]
    for trial in plan["trials"]:
        run = record["runs"].get(str(trial["n"]), {})
        peak, most = trial.get("peak"), run.get("trained")
        cells = [
            *(str(trial[name]) for name in ("n", "k")),
            *(f"{trial[kind] / GIB:.2f}" if kind in trial else "–" for kind in kinds),
            "yes" if trial["fits"] else "no",
            f"{most / GIB:.2f}" if most else run.get("failed", "–"),
            f"{most / peak:.3f}" if most and peak else "–",
            f"{1e3 * trial['window']:.0f}" if trial["window"] else "–",
        ]
        lines.append(row(cells))
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__, timed=False)
    options.add_argument("--target", type=int, default=128, help="sequences in a window")
    options.add_argument("--memory-limit", type=float, help="bytes; by default the device's own limit")
    options.add_argument("--measure", action="store_true", help="choose the fastest size that fits")
    options.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    add_options(options)
    args = options.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    if args.case is not None:
        model = Model(**args.case.pop("model"))
        print(json.dumps((trained if "k" in args.case else planned)(model, **args.case)))
        return
    model = chosen(args)
    alone = lambda **case: in_a_process(__file__, {"model": dataclasses.asdict(model)} | case)
    limit = None if args.memory_limit is None else int(args.memory_limit)
    plan = alone(target=args.target, memory_limit=limit, measure=args.measure)
    if "failed" in plan:
        raise SystemExit(plan["failed"])
    # The planned size and, if there is one, the next.
    tried = [trial for trial in plan["trials"] if trial["n"] >= plan["n"]][:2]
    runs = {str(trial["n"]): alone(k=trial["k"], n=trial["n"]) for trial in tried}
    size = parameters(jax.eval_shape(model.init, jax.random.key(0)))
    settings = {"parameters": size, **dataclasses.asdict(model), "target": args.target}
    publish({"environment": environment(), "settings": settings, "plan": plan, "runs": runs}, table, args.out)


if __name__ == "__main__":
    main()
