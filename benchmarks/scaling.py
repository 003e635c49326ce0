"""What does a longer window cost, a micro-step?

Windows of K = 1 to 1,024 micro-batches of N sequences of a small language model, with AdamW, by these sides in one run:

    window               `jaxaccum.value_and_grad` and the update, in one jit: a program for each K
    hand-written scan    the same with sums in a `lax.scan`
    window, traced K     `value_and_grad(stacked=True)`: one program, told K with each call
    counter              `MultiSteps.micro_step`, once a micro-batch: one program, told K by `set_every_k`

The table says what a micro-step takes, its share of the update included, and how long a program takes to compile, from
tracing on, with caches cleared; both beside the same side's at K = 8. The last line counts what the sides of one
program compile when K changes. A round has at least 64 micro-steps.

    PYTHONPATH=. python benchmarks/scaling.py --out scaling.json
    PYTHONPATH=. python benchmarks/scaling.py --table scaling.json
"""

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import WARMUP, Record, Side, environment, heading, interleave, parser, publish, row
from _model import Model, add_options, chosen, parameters
from _train import Problem, by_hand, ours, update

import jaxaccum

Tree = Any

OPTIMIZER = optax.adamw(3e-4)
REFERENCE = 8
ROUND = 64  # micro-steps at the least
A_PROGRAM_EACH = {"window": ours, "hand-written scan": by_hand}
TRACED, COUNTER = "window, traced K", "counter"


def program(gradient: Callable[..., Any]) -> Any:
    """`gradient(params, *batch)` and the update, in one jit."""

    def step(params, inner, *batch):
        _, grads = gradient(params, *batch)
        return update(OPTIMIZER, grads, inner, params)

    return jax.jit(step, donate_argnums=(0, 1))


def compiled(side: str, model: Model, tokens: jax.Array) -> tuple[jax.stages.Compiled, float]:
    """A side's program for windows like `tokens`, (K, N, T + 1), and the seconds that it took."""
    k = len(tokens)
    start = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(OPTIMIZER.init, start)
    batch = jax.ShapeDtypeStruct((k * tokens.shape[1], tokens.shape[2]), tokens.dtype)
    jitted = program(A_PROGRAM_EACH[side](Problem(model, OPTIMIZER, k, start, [])))
    jax.clear_caches()
    began = time.perf_counter()
    result = jitted.lower(start, state, batch).compile()
    return result, time.perf_counter() - began


def traced(model: Model, tokens: jax.Array) -> Callable[[Tree, int], Tree]:
    """`run(carry, k)` of the side whose program is told K."""
    step = program(lambda params, tokens, k: jaxaccum.value_and_grad(model.loss, k, stacked=True)(params, tokens))
    return lambda carry, k: step(*carry, tokens, np.int32(k))


def counted(model: Model, tokens: jax.Array, tx: jaxaccum.MultiSteps) -> Callable[[Tree, int], Tree]:
    """`run(carry, k)` of the side whose state has been told K."""
    step = jax.jit(functools.partial(tx.micro_step, model.loss), donate_argnums=(0, 1))
    parts = list(tokens)

    def run(carry, k):
        params, state = carry
        for part in parts[:k]:
            _, params, state = step(params, state, part)
        return params, state

    return run


def tell(side: str, carry: Tree, k: int) -> Tree:
    """The carry of a side whose state must know K."""
    return (carry[0], jaxaccum.set_every_k(carry[1], k)) if side == COUNTER else carry


def compiles(side: str, run: Callable[[Tree, int], Tree], carry: Tree, ks: list[int]) -> int:
    """How many programs are compiled for a second K and all further ones."""
    events = []
    listen = lambda event, *_, **__: events.append(event)
    carry = run(tell(side, carry, ks[0]), ks[0])
    jax.monitoring.register_event_duration_secs_listener(listen)
    for k in ks[1:]:
        carry = run(tell(side, carry, k), k)
    jax.monitoring.unregister_event_duration_listener(listen)
    return events.count("/jax/core/compile/backend_compile_duration")


def measure(model: Model, ks: list[int], n: int, repeats: int, compiled_times: int) -> list[Record]:
    """A case a side."""
    shape = max(ks), n, model.length + 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(model.vocabulary, size=shape, dtype=np.int32))
    programs, took = {}, {}
    for _, side, k in itertools.product(range(compiled_times), A_PROGRAM_EACH, ks):
        programs[side, k], seconds = compiled(side, model, tokens[:k])
        took.setdefault((side, k), []).append(seconds)

    init = jax.jit(model.init)
    tx = jaxaccum.MultiSteps(OPTIMIZER, max(ks))
    fresh = lambda opt: (params := init(jax.random.key(0)), opt.init(params))
    told = {TRACED: (traced(model, tokens), OPTIMIZER), COUNTER: (counted(model, tokens, tx), tx)}
    anew = {side: compiles(side, run, fresh(opt), ks) for side, (run, opt) in told.items()}

    def timed(side: str, k: int) -> Side:
        if side in told:
            run, opt = told[side]
            window = functools.partial(run, k=k)
        else:
            opt, batch = OPTIMIZER, tokens[:k].reshape(-1, tokens.shape[-1])
            window = lambda carry: programs[side, k](*carry, batch)

        def rounds(carry):
            for _ in range(windows(k)):
                carry = window(carry)
            return carry

        return Side(f"{side}, K = {k}", rounds, tell(side, fresh(opt), k))

    names = [*A_PROGRAM_EACH, *told]
    seconds = interleave([timed(side, k) for side, k in itertools.product(names, ks)], repeats)
    a_micro_step = lambda side, k: [x / (k * windows(k)) for x in seconds[f"{side}, K = {k}"]]
    return [
        {
            "name": side,
            "seconds": {k: a_micro_step(side, k) for k in ks},
            "compile_seconds": {k: took[side, k] for k in ks} if side in A_PROGRAM_EACH else None,
            "compiles_when_k_changes": anew.get(side),
        }
        for side in names
    ]


def windows(k: int) -> int:
    """How many make a round."""
    return -(-ROUND // k)


def table(record: Record) -> str:
    """The markdown of a run: ratios of medians, the fastest and slowest in brackets; times on accelerators only."""
    absolute = record["environment"]["platform"] != "cpu"
    lines = [heading(record)]
    for case in record["cases"]:
        kinds = {"time of a micro-step": (case["seconds"], 1e6, "µs")}
        if case["compile_seconds"]:
            kinds["compile time"] = case["compile_seconds"], 1, "s"
        ks = list(case["seconds"])
        reference = min(ks, key=lambda k: abs(int(k) - REFERENCE))
        header = [f"{case['name']}: K"]
        for kind, (_, _, unit) in kinds.items():
            header += [f"{kind} / that at K = {reference}", *[unit] * absolute]
        lines += ["", row(header), row(["---"] * len(header))]
        for k in ks:
            cells = [str(k)]
            for times, scale, _ in kinds.values():
                base, median = statistics.median(times[reference]), statistics.median(times[k])
                cells.append(f"{median / base:.2f} ({min(times[k]) / base:.2f} to {max(times[k]) / base:.2f})")
                cells += [f"{scale * median:.4g}"] * absolute
            lines.append(row(cells))
    anew = {case["name"]: case["compiles_when_k_changes"] for case in record["cases"]}
    told = ", ".join(f'"{name}" {count}' for name, count in anew.items() if count is not None)
    return "\n".join([*lines, "", f"Compiled anew when K changes: {told}."])


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--n", type=int, default=4, help="N, sequences in a micro-batch")
    options.add_argument("--ks", default="1,2,8,64,256,1024", help="K, micro-batches a window; one row for each")
    options.add_argument("--compiles", type=int, default=3, help="of each program, to be timed")
    add_options(options)
    options.set_defaults(layers=4, width=256, heads=4, vocabulary=1024, length=128)
    args = options.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    jax.config.update("jax_enable_compilation_cache", False)  # What it holds would take no time.
    model = chosen(args)
    cases = measure(model, list(map(int, args.ks.split(","))), args.n, args.repeats, args.compiles)
    size = parameters(jax.eval_shape(model.init, jax.random.key(0)))
    settings = {"parameters": size, **dataclasses.asdict(model), "n": args.n}
    settings |= {"repeats": args.repeats, "warmup": WARMUP, "compiles": args.compiles}
    publish({"environment": environment(), "settings": settings, "cases": cases}, table, args.out)


if __name__ == "__main__":
    main()
