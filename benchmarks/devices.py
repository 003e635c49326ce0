r"""What does one synchronisation a window save, on several devices?

A window of K micro-batches on each device, of N sequences each, of a GPT-2-shaped language model (124M parameters in
float32, computed in bfloat16) with AdamW, data-parallel over all devices, by these sides in one run:

    no sync                   each device for itself: no side can cost less, and the devices' parameters part
    window                    `value_and_grad(mesh=)` and the update, in one jit
    no sync, auto             both with `prepare="auto"`
    window, auto
    ZeRO                      `value_and_grad(mesh=, reduce="scatter")` and the update of a state in parts, in one jit
    micro-steps               `MultiSteps(mesh=)` driven by the host: K - 1 calls without a boundary, one with it
    pmap                      `value_and_grad(axis_name=)` and the update, in one pmap
    sync in every micro-step  by hand: a scan inside shard_map that reduces each gradient where it arises
    automatic                 plain jit, no shard_map: a scan over micro-batches that lie split over the devices
    last peeled               with --overlap: by hand, the last micro-batch outside the loop, a reduction a leaf

All that sync must end with the same parameters and the same loss. The table says how nearly they do, against "sync
in every micro-step", and counts the collectives in the compiled programs. ("automatic" rounds to bfloat16 after other
sums than the rest. The gradient of a key's bias is nothing but such rounding, and AdamW makes whole steps of it.)

    PYTHONPATH=. python benchmarks/devices.py --repeats 21 --out devices.json
    PYTHONPATH=. python benchmarks/devices.py --table devices.json

`--overlap` compares "last peeled" with what it could beat. It wants --unrolled, since a loop over layers gives all of
their gradients at its end; and an XLA that keeps the reductions apart and moves them, which is asked for with:

    XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
    XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_all_reduce_combine_threshold_bytes=33554432"

    PYTHONPATH=. python benchmarks/devices.py --unrolled --overlap --batches 1 --repeats 21
"""

import dataclasses
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _measure import ROUND, WARMUP, Comparison, Record, Side, difference, difference_cell, interleave_windows, parser
from _model import Model, add_options, chosen, parameters
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

Tree = Any
Gradient = Callable[[Tree, jax.Array], tuple[jax.Array, Tree]]  # of a window

OPTIMIZER = optax.adamw(3e-4)
POOL = 3  # windows, used in turn


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every side works on.

    Attributes:
      model: the model.
      k: micro-batches a window.
      mesh: all devices along one axis, "data".
      start: parameters, on the host.
      windows: tokens, each (P, K, N, T + 1) int32, on the host.
    """

    model: Model
    k: int
    mesh: jax.sharding.Mesh
    start: Tree
    windows: list[np.ndarray]

    def put(self, tree: Tree, *spec: str | None) -> Tree:
        """`tree` on the mesh."""
        return jax.device_put(tree, NamedSharding(self.mesh, P(*spec)))

    def by_device(self) -> list[jax.Array]:
        """The windows as (P·K·N, T + 1), a device's K·N sequences on it."""
        return [self.put(window.reshape(-1, window.shape[-1]), "data") for window in self.windows]

    def by_micro_batch(self) -> list[np.ndarray]:
        """The windows as (K, P·N, T + 1), on the host."""
        return [np.moveaxis(window, 0, 1).reshape(self.k, -1, window.shape[-1]) for window in self.windows]

    def summed(self, params: Tree, tokens: jax.Array, join: Callable[[Tree], Tree] = lambda gradient: gradient) -> Tree:
        """Σ of loss and gradient over micro-batches, each of them joined before it is added."""

        def micro_step(sums, tokens):
            return jax.tree.map(jnp.add, sums, join(jax.value_and_grad(self.model.loss)(params, tokens))), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(micro_step, zeros, tokens)[0]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A side and its compiled programs.

    Attributes:
      side: the carry is (params, optimizer state, losses).
      programs: with how often a window calls each.
    """

    side: Side
    programs: list[tuple[int, jax.stages.Compiled]]


def step(gradient: Gradient, params: Tree, state: Tree, tokens: jax.Array) -> tuple[Tree, Tree, jax.Array]:
    """A window's gradient, and the update."""
    loss, grads = gradient(params, tokens)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def laid_out(fun: Callable[..., Any], params: Tree, state: Tree, tokens: jax.Array) -> jax.stages.Compiled:
    """`fun(params, state, tokens) -> (params, state, loss)` compiled, in place and laid out as it came."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(fun, donate_argnums=(0, 1), out_shardings=(*layout, None))
    return jitted.lower(params, state, tokens).compile()


def one_call(name: str, program: jax.stages.Compiled, carry: Tree, windows: list[jax.Array]) -> Contender:
    """A side that is one program a window."""
    tokens = itertools.cycle(windows)
    return Contender(Side(name, lambda carry: program(*carry[:2], next(tokens)), (*carry, None)), [(1, program)])


def under_jit(name: str, gradient: Gradient, problem: Problem, windows: list[jax.Array]) -> Contender:
    """`gradient` and the update in global code."""
    carry = problem.put((problem.start, OPTIMIZER.init(problem.start)))
    program = laid_out(functools.partial(step, gradient), *carry, windows[0])
    return one_call(name, program, carry, windows)


def under_shard_map(name: str, gradient: Gradient, problem: Problem) -> Contender:
    """`gradient` and the update on each device, by hand."""
    carry, windows = problem.put((problem.start, OPTIMIZER.init(problem.start))), problem.by_device()
    options = {"mesh": problem.mesh, "in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": False}
    program = laid_out(jax.shard_map(functools.partial(step, gradient), **options), *carry, windows[0])
    return one_call(name, program, carry, windows)


def no_sync(name: str, problem: Problem, **options: Any) -> Contender:
    """Our own window, without its devices."""
    return under_shard_map(name, jaxaccum.value_and_grad(problem.model.loss, problem.k, **options), problem)


def window(name: str, problem: Problem, **options: Any) -> Contender:
    """The whole window at hand, on a mesh."""
    gradient = jaxaccum.value_and_grad(problem.model.loss, problem.k, mesh=problem.mesh, **options)
    return under_jit(name, gradient, problem, problem.by_device())


def zero(name: str, problem: Problem) -> Contender:
    """The whole window at hand, the optimizer's state split over the devices."""
    gradient = jaxaccum.value_and_grad(problem.model.loss, problem.k, mesh=problem.mesh, reduce="scatter")
    params, state, windows = problem.put(problem.start), OPTIMIZER.init(problem.start), problem.by_device()
    state = jax.device_put(state, jaxaccum.zero_sharding(state, problem.mesh))
    program = laid_out(functools.partial(step, gradient), params, state, windows[0])
    return one_call(name, program, (params, state), windows)


def micro_steps(name: str, problem: Problem) -> Contender:
    """One micro-batch per call. The accumulating program receives the parameters and the sums alone."""
    tx = jaxaccum.MultiSteps(OPTIMIZER, problem.k, mesh=problem.mesh)
    params = problem.put(problem.start)
    # Its counters are made on one device; the sums lie on the mesh.
    state = jax.tree.map(lambda x: x if len(x.devices()) == problem.mesh.size else problem.put(x), tx.init(params))
    windows = [[problem.put(rows, "data") for rows in window] for window in problem.by_micro_batch()]

    def accumulate(sums, params, tokens):
        loss, _, sums = tx.micro_step(problem.model.loss, params, sums, tokens, boundary=False)
        return sums, loss

    def close(params, state, tokens):
        loss, params, state = tx.micro_step(problem.model.loss, params, state, tokens, boundary=True)
        return params, state, loss

    sums = state._replace(inner_opt_state=None)
    layout = jax.tree.map(lambda leaf: leaf.sharding, sums)
    jitted = jax.jit(accumulate, donate_argnums=0, out_shardings=(layout, None))
    accumulate = jitted.lower(sums, params, windows[0][0]).compile()
    close = laid_out(close, params, state, windows[0][0])
    tokens = itertools.cycle(windows)

    def run(carry):
        params, state, _ = carry
        *micro_batches, last = next(tokens)
        sums, losses = state._replace(inner_opt_state=None), []
        for micro_batch in micro_batches:
            sums, loss = accumulate(sums, params, micro_batch)
            losses.append(loss)
        params, state, loss = close(params, sums._replace(inner_opt_state=state.inner_opt_state), last)
        return params, state, [*losses, loss]

    side = Side(name, run, (params, state, None))
    return Contender(side, [(problem.k - 1, accumulate), (1, close)])


def pmap(name: str, problem: Problem) -> Contender:
    """The window, where each device has its own copy of everything."""
    on_pmap = functools.partial(jax.pmap, axis_name="data")
    copies = on_pmap(lambda _, tree: tree, in_axes=(0, None))
    carry = copies(np.zeros(problem.mesh.size), (problem.start, OPTIMIZER.init(problem.start)))
    spread = on_pmap(lambda tokens: tokens)
    windows = [spread(window.reshape(problem.mesh.size, -1, window.shape[-1])) for window in problem.windows]
    gradient = jaxaccum.value_and_grad(problem.model.loss, problem.k, axis_name="data")
    program = on_pmap(functools.partial(step, gradient), donate_argnums=(0, 1))
    return one_call(name, program.lower(*carry, windows[0]).compile(), carry, windows)


def every_micro_step(name: str, problem: Problem) -> Contender:
    """Each micro-batch's gradient reduced at once."""
    # The barrier keeps the reduction in the loop: where XLA can, it moves it out.
    join = lambda gradient: jax.lax.optimization_barrier(jax.lax.psum(gradient, "data"))

    def gradient(params, tokens):
        sums = problem.summed(params, tokens.reshape(problem.k, -1, tokens.shape[-1]), join)
        return jax.tree.map(lambda x: x / (problem.k * problem.mesh.size), sums)

    return under_shard_map(name, gradient, problem)


def automatic(name: str, problem: Problem) -> Contender:
    """What one writes without a thought of devices: where the reductions go is for XLA to find."""
    gradient = lambda params, tokens: jax.tree.map(lambda x: x / problem.k, problem.summed(params, tokens))
    windows = [problem.put(window, None, "data") for window in problem.by_micro_batch()]
    return under_jit(name, gradient, problem, windows)


def last_peeled(name: str, problem: Problem) -> Contender:
    """The last micro-batch's backward pass in one block with the reductions, so that XLA can run them side by side."""

    def gradient(params, tokens):
        tokens = tokens.reshape(problem.k, -1, tokens.shape[-1])
        last = jax.value_and_grad(problem.model.loss)(params, tokens[-1])
        mean = lambda total, x: jax.lax.psum(total + x, "data") / (problem.k * problem.mesh.size)
        return jax.tree.map(mean, problem.summed(params, tokens[:-1]), last)

    return under_shard_map(name, gradient, problem)


def collectives_of(contender: Contender) -> dict[str, int]:
    """Those of a window: "kind" outside of loops, "kind in a loop" however often that runs."""
    counts = Counter()
    for calls, program in contender.programs:
        for one in jaxaccum.collectives(program).all:
            counts[one.kind + " in a loop" * one.in_loop] += calls
    return dict(counts)


def collectives_cell(case: Record, side: str) -> str:
    """The column of a case's `collectives` by side."""
    return ", ".join(f"{count} {kind}" for kind, count in case["collectives"][side].items()) or "none"


SIDES: dict[str, Callable[[str, Problem], Contender]] = {
    "no sync": no_sync,
    "window": window,
    "no sync, auto": functools.partial(no_sync, prepare="auto"),
    "window, auto": functools.partial(window, prepare="auto"),
    "ZeRO": zero,
    "micro-steps": micro_steps,
    "pmap": pmap,
    "sync in every micro-step": every_micro_step,
    "automatic": automatic,
    "last peeled": last_peeled,
}
OVERLAP = ["no sync", "window", "sync in every micro-step", "last peeled"]
COMPARISON = Comparison(
    floor="no sync",
    rival="sync in every micro-step",
    columns={
        "difference": difference_cell,
        "loss": lambda case, side: f"{case['loss'][side]:.4f}",
        "collectives": collectives_cell,
        "optimizer state a device": lambda case, side: f"{case['state_bytes'][side] / 1e6:.4g} MB",
    },
)


def measure(problem: Problem, names: list[str], repeats: int) -> Record:
    """One case: a window by all sides."""
    contenders = {name: SIDES[name](name, problem) for name in names}
    seconds = interleave_windows([contender.side for contender in contenders.values()], repeats)
    carries = {name: contender.side.carry for name, contender in contenders.items()}
    # Under pmap every leaf has a copy for each device.
    one = lambda x, start: np.asarray(x).reshape(-1, *start.shape)[0]
    params = {name: jax.tree.map(one, carry[0], problem.start) for name, carry in carries.items()}
    reference = params[COMPARISON.rival]
    n = problem.windows[0].shape[2]
    return {
        "name": f"N = {n}",
        "n": n,
        "seconds": seconds,
        "difference": {name: float(difference(p, reference, problem.start)) for name, p in params.items()},
        "loss": {name: float(np.mean(jax.device_get(carry[2]))) for name, carry in carries.items()},
        "collectives": {name: collectives_of(contender) for name, contender in contenders.items()},
        "state_bytes": {name: state_bytes(carry[1]) for name, carry in carries.items()},
    }


def state_bytes(state: Tree) -> int:
    """What the inner optimizer's state takes on one device."""
    inner = state.inner_opt_state if isinstance(state, jaxaccum.MultiStepsState) else state
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(inner))


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--batches", default="1,4", help="N, sequences in a device's micro-batch; one case for each")
    options.add_argument("--k", type=int, default=8, help="micro-batches a window")
    add_options(options)
    options.add_argument("--overlap", action="store_true", help="only what bears on overlapping the sync")
    options.add_argument("--sides", nargs="+", default=[*SIDES][:-1], choices=SIDES, metavar="SIDE")
    args = options.parse_args()
    if args.table is not None:
        print(COMPARISON.table(json.loads(args.table.read_text())))
        return
    model = chosen(args)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    start = jax.device_get(model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    cases = []
    for n in map(int, args.batches.split(",")):
        draw = lambda n=n: rng.integers(model.vocabulary, size=(mesh.size, args.k, n, model.length + 1), dtype=np.int32)
        problem = Problem(model, args.k, mesh, start, [draw() for _ in range(POOL)])
        cases.append(measure(problem, OVERLAP if args.overlap else args.sides, args.repeats))
    settings = {"devices": mesh.size, "parameters": parameters(start), **dataclasses.asdict(model)}
    settings |= {"k": args.k, "repeats": args.repeats, "warmup": WARMUP, "round": ROUND, "windows": POOL}
    settings |= {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "none")}
    COMPARISON.finish(args.out, settings, cases)


if __name__ == "__main__":
    main()
