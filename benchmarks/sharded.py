"""What does a window cost where the parameters of a large model lie in shards (FSDP)?

A window of K micro-batches on each device of a GPT-2-shaped language model (1.3B parameters in float32, computed in
bfloat16, layers in a loop and rematerialised) with AdamW, by these sides in one run:

    no sync                    each device for itself, with a whole model: no side can cost less
    gather once                `value_and_grad(mesh=)`; parameters and optimizer state in shards, gathered once a window
    gather once, scattered     the same with `reduce="scatter"`
    ZeRO                       whole parameters, `reduce="scatter"`, optimizer state in shards
    by hand, gather once       a scan inside shard_map: parameters gathered before it, sums scattered after it
    by hand, gather always     a scan under plain jit, with shards: XLA gathers parameters in every micro-step

"planned" is what a device needs by the compiler's plan: arguments, results that reuse none of them, temporary memory.

    PYTHONPATH=. python benchmarks/sharded.py --out sharded.json
    PYTHONPATH=. python benchmarks/sharded.py --table sharded.json
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _measure import ROUND, WARMUP, Comparison, Record, interleave_windows, parser, reason
from _model import add_options, chosen, parameters
from devices import (
    OPTIMIZER,
    POOL,
    Contender,
    Problem,
    collectives_cell,
    collectives_of,
    laid_out,
    no_sync,
    one_call,
    step,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum

Tree = Any


def sharded(
    name: str, problem: Problem, gradient: Callable[..., Any], windows: list[jax.Array], whole: bool = False
) -> Contender:
    """`gradient` and the update in global code, with optimizer state, and parameters unless `whole`, in shards."""
    in_shards = functools.partial(jaxaccum.zero_sharding, mesh=problem.mesh)
    params = problem.put(problem.start) if whole else jax.device_put(problem.start, in_shards(problem.start))
    state = jax.jit(OPTIMIZER.init, out_shardings=in_shards(jax.eval_shape(OPTIMIZER.init, params)))(params)
    program = laid_out(functools.partial(step, gradient), params, state, windows[0])
    return one_call(name, program, (params, state), windows)


def ours(name: str, problem: Problem, whole: bool = False, **options: Any) -> Contender:
    """`value_and_grad(mesh=)`."""
    gradient = jaxaccum.value_and_grad(problem.model.loss, problem.k, mesh=problem.mesh, **options)
    return sharded(name, problem, gradient, problem.by_device(), whole)


def gathered_once(name: str, problem: Problem) -> Contender:
    """One gather before the scan and one scatter after it."""
    shardings = jaxaccum.zero_sharding(problem.start, problem.mesh)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    axis = lambda spec: next((i for i, name in enumerate(spec) if name is not None), None)

    def gather(x, spec):
        return x if axis(spec) is None else jax.lax.all_gather(x, "data", axis=axis(spec), tiled=True)

    def scatter(x, spec):
        if axis(spec) is None:
            return jax.lax.psum(x, "data")
        return jax.lax.psum_scatter(x, "data", scatter_dimension=axis(spec), tiled=True)

    def on_device(params, tokens):
        count = problem.k * problem.mesh.size
        loss, sums = problem.summed(
            jax.tree.map(gather, params, specs), tokens.reshape(problem.k, -1, tokens.shape[-1])
        )
        return jax.lax.psum(loss, "data") / count, jax.tree.map(lambda x, spec: scatter(x, spec) / count, sums, specs)

    options = {"in_specs": (specs, P("data")), "out_specs": (P(), specs), "check_vma": False}
    return sharded(name, problem, jax.shard_map(on_device, mesh=problem.mesh, **options), problem.by_device())


def gathered_always(name: str, problem: Problem) -> Contender:
    """A scan over micro-batches that lie split over the devices."""
    gradient = lambda params, tokens: jax.tree.map(lambda x: x / problem.k, problem.summed(params, tokens))
    windows = [problem.put(window, None, "data") for window in problem.by_micro_batch()]
    return sharded(name, problem, gradient, windows)


SIDES: dict[str, Callable[[str, Problem], Contender]] = {
    "no sync": no_sync,
    "gather once": ours,
    "gather once, scattered": functools.partial(ours, reduce="scatter"),
    "ZeRO": functools.partial(ours, reduce="scatter", whole=True),
    "by hand, gather once": gathered_once,
    "by hand, gather always": gathered_always,
}
COMPARISON = Comparison(
    floor="no sync",
    rival="by hand, gather always",
    columns={
        "loss": lambda case, side: f"{case['loss'][side]:.4f}",
        "collectives": collectives_cell,
        "planned MiB a device": lambda case, side: f"{case['planned'][side] / 2**20:.0f}",
    },
)


def planned(contender: Contender) -> int:
    """Bytes that a device needs for the program."""
    plan = contender.programs[0][1].memory_analysis()
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes


def measure(problem: Problem, names: list[str], repeats: int) -> Record:
    """One case: a window by each side, one after another, since two models don't fit in a device's memory."""
    n = problem.windows[0].shape[2]
    case: Record = {
        "name": f"N = {n}",
        "n": n,
        "seconds": {},
        "loss": {},
        "collectives": {},
        "planned": {},
        "failed": {},
    }
    for name in names:
        try:
            contender = SIDES[name](name, problem)
            case["seconds"] |= interleave_windows([contender.side], repeats)
        except Exception as error:  # Whatever it is, it costs one row.
            case["failed"][name] = reason(error)
            continue
        case["loss"][name] = float(np.mean(jax.device_get(contender.side.carry[2])))
        case["collectives"][name] = collectives_of(contender)
        case["planned"][name] = planned(contender)
        del contender
    return case


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--batches", default="1", help="N, sequences in a device's micro-batch; one case for each")
    options.add_argument("--k", type=int, default=8, help="micro-batches a window")
    options.add_argument("--sides", nargs="+", default=[*SIDES], choices=SIDES, metavar="SIDE")
    add_options(options)
    options.set_defaults(size="1.3B")
    args = options.parse_args()
    if args.table is not None:
        print(COMPARISON.table(json.loads(args.table.read_text())))
        return
    model = dataclasses.replace(chosen(args), remat=True)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    start = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    cases = []
    for n in map(int, args.batches.split(",")):
        draw = lambda n=n: rng.integers(model.vocabulary, size=(mesh.size, args.k, n, model.length + 1), dtype=np.int32)
        cases.append(
            measure(Problem(model, args.k, mesh, start, [draw() for _ in range(POOL)]), args.sides, args.repeats)
        )
    settings = {"devices": mesh.size, "parameters": parameters(start), **dataclasses.asdict(model)}
    settings |= {"k": args.k, "repeats": args.repeats, "warmup": WARMUP, "round": ROUND, "windows": POOL}
    COMPARISON.finish(args.out, settings, cases)


if __name__ == "__main__":
    main()
