r"""What does a whole training step cost, beside the gradients and the update that it is made of?

A window of K micro-batches of N sequences of a GPT-2-shaped language model (float32 parameters, bfloat16 compute) on
one device, by these sides in one run:

    floor                 K calls of the gradient alone, nothing added, and one of the update: two programs
    hand-written scan     what one writes without us: sums in a `lax.scan`, mean and update, in one jit
    the same by two       with `lax.scan(unroll=2)`
    window                `jaxaccum.value_and_grad` and the update, in one jit
    window, afterwards    the same with `in_place=False`: gradients are added when they are whole. Layers that have code
                          of their own leave nothing to add in place
    window, cast          the same with `prepare=jaxaccum.cast(bfloat16)`
    window, auto          the same with `prepare="auto"`, which finds the casts
    window, auto, by two  the same with `unroll=2` besides
    window, noise scale   "window" with `gradient_norms="noise"` and `NoiseScale.update`, in the same jit
    Weighted              "window" with a token-weighted loss, `jaxaccum.Weighted`. All tokens are real
    Weighted, one at 0    the same; a micro-batch of the window is padding alone, so that this side trains on less data
    Weighted, auto        "window, auto" with a token-weighted loss
    host driven           `HostDriven`: K - 1 calls of a program without a boundary, handed parameters and sums alone,
                          one of a program with it
    host driven, cast     the same, with `MultiSteps(prepare=jaxaccum.cast(bfloat16))`
    host driven, Weighted  with the token-weighted loss: the host computes each micro-batch's weight first
    host driven, drop     with `nonfinite="drop"`, where nothing is dropped
    host driven, noise scale  with `gradient_norms="noise"`; the norms stay in the state
    Trainer               `Trainer.fit` on host arrays; "fused" with `fuse_windows=True`
    counter               K calls of one program of `MultiSteps.micro_step`: the state's counter finds the boundary
    optax.MultiSteps      K calls of `value_and_grad`, `update` and `apply_updates` in one program
    optax.microbatch      around `jax.value_and_grad`, and the update, in one jit
    one big batch         no accumulation: the gradient of K·N sequences at once, and the update, in one jit

First each side trains for two windows from the same start on the same data. The table says where it ends: the window's
mean loss, and how far the parameters are from those of the first side that trains (the floor doesn't: it is left with
one micro-batch in K). Where a gradient is nothing but rounding, as for a key's bias, AdamW makes whole steps of it, so
sides that round elsewhere part there. Then the sides are timed in turn: each trains for two windows off the clock and
for three on it, since a program whose buffers lie where those of its last run lay starts faster, as it does in
training. To hold a large model once and not once a side, parameters and optimizer state pass from side to side. A side
that fails or runs out of memory says so, in its row.

    PYTHONPATH=. python benchmarks/window.py --out window.json
    PYTHONPATH=. python benchmarks/window.py --size 758M --batches 1 --sides floor window "window, cast"
    PYTHONPATH=. python benchmarks/window.py --optimizer muon --batches 1 --out window-muon.json
    PYTHONPATH=. python benchmarks/window.py --table window.json
"""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import numpy as np
import optax
from _measure import (
    ROUND,
    WARMUP,
    Comparison,
    Record,
    Side,
    difference,
    difference_cell,
    interleave_windows,
    parser,
    reason,
)
from _model import add_options, chosen, parameters
from _train import (
    CAST,
    OPTIMIZERS,
    POOL,
    Problem,
    Way,
    by_hand,
    by_optax,
    counter,
    floor,
    fresh,
    host_driven,
    in_one_jit,
    in_trainer,
    one_a_call,
    optax_contract,
    ours,
    ours_weighted,
    windows,
    with_noise_scale,
)

import jaxaccum

Tree = Any

SIDES = {
    "floor": floor,
    "hand-written scan": functools.partial(in_one_jit, by_hand),
    "the same by two": functools.partial(in_one_jit, functools.partial(by_hand, unroll=2)),
    "window": functools.partial(in_one_jit, ours),
    "window, afterwards": functools.partial(in_one_jit, functools.partial(ours, in_place=False)),
    "window, cast": functools.partial(in_one_jit, functools.partial(ours, prepare=CAST)),
    "window, auto": functools.partial(in_one_jit, functools.partial(ours, prepare="auto")),
    "window, auto, by two": functools.partial(in_one_jit, functools.partial(ours, prepare="auto", unroll=2)),
    "window, noise scale": with_noise_scale,
    "Weighted": functools.partial(in_one_jit, ours_weighted),
    "Weighted, one at 0": functools.partial(in_one_jit, functools.partial(ours_weighted, left_out=1)),
    "Weighted, auto": functools.partial(in_one_jit, functools.partial(ours_weighted, prepare="auto")),
    "host driven": host_driven,
    "host driven, cast": functools.partial(host_driven, prepare=True),
    "host driven, Weighted": functools.partial(host_driven, weighted=True),
    "host driven, drop": functools.partial(host_driven, nonfinite="drop"),
    "host driven, noise scale": functools.partial(host_driven, gradient_norms="noise"),
    "Trainer": in_trainer,
    "Trainer, fused": functools.partial(in_trainer, fuse_windows=True),
    "Trainer, Weighted": functools.partial(in_trainer, weighted=True),
    "Trainer, fused, Weighted": functools.partial(in_trainer, weighted=True, fuse_windows=True),
    "Trainer, drop": functools.partial(in_trainer, nonfinite="drop"),
    "counter": functools.partial(one_a_call, jaxaccum.MultiSteps, counter),
    "optax.MultiSteps": functools.partial(one_a_call, optax.MultiSteps, optax_contract),
    "optax.microbatch": functools.partial(in_one_jit, by_optax),
    "one big batch": functools.partial(in_one_jit, lambda problem: jax.value_and_grad(problem.model.loss)),
}
COMPARISON = Comparison(
    floor="floor",
    rival="optax.MultiSteps",
    columns={
        "difference": difference_cell,
        "loss": lambda case, side: f"{case['loss'][side]:.4f}" if side in case["loss"] else "–",
    },
)


def warmed(way: Way, problem: Problem) -> tuple[Tree, float]:
    """(parameters, the last window's mean loss) after the first windows."""
    params, inner = fresh(problem)
    losses = []
    for tokens in problem.windows[:WARMUP]:
        params, inner, way.rest, losses = way.step(params, inner, way.rest, tokens)
    if way.own is not None:
        return way.own.params(), way.own.loss()
    return params, float(np.mean(jax.device_get(losses)))


def measure(problem: Problem, sides: list[str], repeats: int) -> Record:
    """One case: a window by all sides."""
    n = problem.windows[0].parts[0].shape[0]
    case = {"name": f"N = {n}", "n": n, "difference": {}, "loss": {}, "failed": {}}
    ways, params, reference = {}, None, None
    for name in sides:
        params = None  # Those of the side before make room.
        try:
            way = SIDES[name](problem)
            params, loss = warmed(way, problem)
        except Exception as error:  # Whatever it is, it costs one row.
            case["failed"][name] = reason(error)
            continue
        ways[name] = way
        if name != COMPARISON.floor:
            reference = params if reference is None else reference
            case["loss"][name] = loss
            case["difference"][name] = float(difference(params, reference, problem.start))
    del params, reference
    held = fresh(problem)

    def side(name: str, way: Way) -> Side:
        data = itertools.cycle(problem.windows)

        def window(carry):
            nonlocal held
            *carry, _ = way.step(*carry, next(data))
            *held, rest = carry
            return *held, rest

        return Side(name, window, (None, None, way.rest), prepare=lambda carry: (*held, carry[2]))

    case["seconds"] = interleave_windows([side(name, way) for name, way in ways.items()], repeats)
    return case


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--batches", default="1,4", help="N, sequences in a micro-batch; one case for each")
    options.add_argument("--k", type=int, default=8, help="micro-batches a window")
    options.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, metavar="SIDE")
    add_options(options)
    args = options.parse_args()
    if args.table is not None:
        print(COMPARISON.table(json.loads(args.table.read_text())))
        return
    model = chosen(args)
    start = jax.jit(model.init)(jax.random.key(0))
    opt, cases = OPTIMIZERS[args.optimizer], []
    for n in map(int, args.batches.split(",")):
        problem = Problem(model, opt, args.k, start, windows(model, args.k, n))
        cases.append(measure(problem, args.sides, args.repeats))
    settings = {"optimizer": args.optimizer, "parameters": parameters(start), **dataclasses.asdict(model)}
    settings |= {"k": args.k, "repeats": args.repeats, "warmup": WARMUP, "round": ROUND, "windows": POOL}
    COMPARISON.finish(args.out, settings, cases)


if __name__ == "__main__":
    main()
