"""What does accumulation itself cost, gradients given?

A window of K micro-steps on a GPT-2-shaped tree of float32 parameters, by six sides in one run. Each call is jitted;
parameters and state are donated, gradients never. The gradients are random, and differ from one micro-step to the
next.

    floor                    K calls of `acc + g`, in place, then one of mean, inner update and `apply_updates`
    optax.MultiSteps         K calls of `update` and `apply_updates`
    update                   the same calls with `jaxaccum.MultiSteps`: the state's counter finds the boundary
    apply                    K calls of `jaxaccum.MultiSteps.apply`: the same counter
    apply, static boundary   K - 1 calls of the program for `boundary=False`, one of that for `boundary=True`
    apply, sums alone        the same; parameters and inner state stay out of the first K - 1 calls

The floor clears its accumulator between windows, off the clock: its first micro-step is an add like the others, and
nobody pays for the clearing. All sides must end with the same parameters, and the table says how nearly they do.

    PYTHONPATH=. python benchmarks/transform.py
    PYTHONPATH=. python benchmarks/transform.py --optimizers adamw,muon --parameters 50e6,5e6 --out transform.json
    PYTHONPATH=. python benchmarks/transform.py --table transform.json
"""

import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _measure import WARMUP, Comparison, Side, difference, difference_cell, interleave, parser
from optax.contrib import muon

import jaxaccum

Tree = Any

COMPARISON = Comparison("floor", "optax.MultiSteps", {"difference": difference_cell})
OPTIMIZERS = {"adamw": optax.adamw(1e-3), "muon": muon(1e-3)}
POOL = 3  # gradient trees, used in turn: no divisor of K = 8, so that windows differ too


def shapes(parameters: int, layers: int) -> Tree:
    """The shapes of a transformer's layers, GPT-2's leaves, as wide as that number of parameters makes them."""
    width = max(8, 8 * round((parameters / (12 * layers)) ** 0.5 / 8))
    norm = {"scale": (width,), "bias": (width,)}
    dense = lambda inputs, outputs: {"kernel": (inputs * width, outputs * width), "bias": (outputs * width,)}
    attention = {"norm": norm, "qkv": dense(1, 3), "out": dense(1, 1)}
    mlp = {"norm": norm, "up": dense(1, 4), "down": dense(4, 1)}
    return [{"attention": attention, "mlp": mlp}] * layers


def normal(key: jax.Array, tree: Tree) -> Tree:
    """Standard normal values in the tree's shapes, float32."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(map(jax.random.normal, keys, leaves))


def floor(opt: optax.GradientTransformation, params: Tree, pool: list[Tree], k: int) -> Side:
    """The least that K calls can do: K bare adds and one optimizer step."""
    add = jax.jit(lambda acc, grads: jax.tree.map(jnp.add, acc, grads), donate_argnums=0)
    clear = jax.jit(lambda acc: jax.tree.map(jnp.zeros_like, acc), donate_argnums=0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def close(params, state, acc):
        mean = jax.tree.map(lambda total: total * (1 / k), acc)
        updates, state = opt.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    grads = itertools.cycle(pool)

    def run(carry):
        params, state, acc = carry
        for _ in range(k):
            acc = add(acc, next(grads))
        return *close(params, state, acc), acc

    carry = (params, opt.init(params), jax.tree.map(jnp.zeros_like, params))
    return Side(COMPARISON.floor, run, carry, prepare=lambda carry: (*carry[:2], clear(carry[2])))


def updating(name: str, tx: Any, params: Tree, pool: list[Tree], k: int) -> Side:
    """K calls in optax's contract."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return stepping(name, [step] * k, tx, params, pool)


def applying(name: str, tx: jaxaccum.MultiSteps, params: Tree, pool: list[Tree], boundaries: list[bool | None]) -> Side:
    """A call of `apply` for each of `boundaries`; each kind of boundary has a program of its own."""
    program = lambda boundary: jax.jit(functools.partial(tx.apply, boundary=boundary), donate_argnums=(0, 1))
    programs = {boundary: program(boundary) for boundary in boundaries}
    return stepping(name, [programs[boundary] for boundary in boundaries], tx, params, pool)


def stepping(name: str, steps: list[Any], tx: Any, params: Tree, pool: list[Tree]) -> Side:
    """A window of `steps`, each `step(params, state, grads) -> (params, state)`."""
    grads = itertools.cycle(pool)

    def run(carry):
        for step in steps:
            carry = step(*carry, next(grads))
        return carry

    return Side(name, run, (params, tx.init(params)))


def holding_back(name: str, tx: jaxaccum.MultiSteps, params: Tree, pool: list[Tree], k: int) -> Side:
    """A static boundary whose accumulating program receives no more than it needs."""
    accumulate = jax.jit(lambda sums, grads: tx.apply(None, sums, grads, boundary=False)[1], donate_argnums=0)
    close = jax.jit(functools.partial(tx.apply, boundary=True), donate_argnums=(0, 1))
    grads = itertools.cycle(pool)

    def run(carry):
        params, state = carry
        sums = state._replace(inner_opt_state=None)
        for _ in range(k - 1):
            sums = accumulate(sums, next(grads))
        return close(params, sums._replace(inner_opt_state=state.inner_opt_state), next(grads))

    return Side(name, run, (params, tx.init(params)))


def measure(name: str, parameters: int, layers: int, k: int, repeats: int) -> dict[str, Any]:
    """One case: a window of K micro-steps around one inner optimizer, by all sides."""
    opt = OPTIMIZERS[name]
    ours = jaxaccum.MultiSteps(opt, k)
    start_key, *grad_keys = jax.random.split(jax.random.key(0), 1 + POOL)
    tree = shapes(parameters, layers)
    start = jax.tree.map(lambda x: 0.02 * x, normal(start_key, tree))
    pool = [normal(key, tree) for key in grad_keys]
    fresh = lambda: jax.tree.map(jnp.copy, start)
    sides = [
        floor(opt, fresh(), pool, k),
        updating(COMPARISON.rival, optax.MultiSteps(opt, k), fresh(), pool, k),
        updating("update", ours, fresh(), pool, k),
        applying("apply", ours, fresh(), pool, [None] * k),
        applying("apply, static boundary", ours, fresh(), pool, [False] * (k - 1) + [True]),
        holding_back("apply, sums alone", ours, fresh(), pool, k),
    ]
    seconds = interleave(sides, repeats)
    reference = sides[0].carry[0]
    leaves = jax.tree.leaves(start)
    size = sum(leaf.size for leaf in leaves)
    return {
        "name": f"{name}, {size / 1e6:.3g}M parameters in {len(leaves)} leaves",
        "optimizer": name,
        "parameters": size,
        "leaves": len(leaves),
        "seconds": seconds,
        "difference": {side.name: float(difference(side.carry[0], reference, start)) for side in sides},
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument("--optimizers", default="adamw,muon", help=f"out of {', '.join(OPTIMIZERS)}")
    options.add_argument("--parameters", default="50e6", help="about how many; one number, or one for each optimizer")
    options.add_argument("--layers", default="1", help="one number, or one for each case: more layers, more leaves")
    options.add_argument("--k", type=int, default=8, help="micro-steps a window")
    args = options.parse_args()
    if args.table is not None:
        print(COMPARISON.table(json.loads(args.table.read_text())))
        return
    optimizers = args.optimizers.split(",")
    sizes, layers = (_each(values, len(optimizers)) for values in (args.parameters, args.layers))
    cases = [measure(*case, args.k, args.repeats) for case in zip(optimizers, sizes, layers, strict=True)]
    COMPARISON.finish(args.out, {"k": args.k, "repeats": args.repeats, "warmup": WARMUP, "gradients": POOL}, cases)


def _each(text: str, count: int) -> list[int]:
    """As many numbers as there are cases, from one for all or one for each."""
    values = [int(float(value)) for value in text.split(",")]
    return values * count if len(values) == 1 else values


if __name__ == "__main__":
    main()
