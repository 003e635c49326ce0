r"""What does an exact contrastive gradient cost, beside a plain window of the same encoder?

A GPT-2-shaped tower (float32 parameters, bfloat16 compute) encodes K micro-batches of N sequences, and row 2i of the
representations is to find row 2i + 1 among all others (InfoNCE with a learnt temperature). Each program returns the
loss and the gradient of a window; no optimizer is in it. By these sides in one run:

    plain window         `jaxaccum.value_and_grad`: each row is compared with those of its micro-batch alone
    plain window, auto   the same with `prepare="auto"`, which casts the parameters once
    coupled              `jaxaccum.coupled_value_and_grad`: compared with those of the window, by a second forward pass
    coupled, auto        the same with `prepare="auto"`
    coupled, cast        the same with `prepare=jaxaccum.cast(bfloat16)`
    one big batch        `jax.value_and_grad` of the window at once

"difference" is the distance of a side's gradient from that of one big batch, or of "coupled" where that does not fit,
relative to its norm; at most a few per cent are due to biases, whose gradients the big batch sums in bfloat16.
"temporary MiB" is what the compiler plans beside arguments and results. A second forward pass,
beside a forward and a backward pass of twice its work, makes 1.33; rematerialised (`--remat`), 1.25.

    PYTHONPATH=. python benchmarks/coupled.py --unrolled --out coupled.json
    PYTHONPATH=. python benchmarks/coupled.py --table coupled.json
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _measure import ROUND, WARMUP, Comparison, Record, Side, interleave_windows, parser, reason
from _model import Model, add_options, chosen, parameters
from _train import CAST, POOL, windows

import jaxaccum

Tree = Any
MIB = 2**20


def encode(model: Model, params: Tree, tokens: jax.Array) -> jax.Array:
    """The last token's residual stream as a unit vector, (N, width) float32."""
    last = model.hidden(params["tower"], tokens[:, :-1])[:, -1].astype(jnp.float32)
    return last / jnp.linalg.norm(last, axis=-1, keepdims=True)


def info_nce(params: Tree, rows: jax.Array) -> jax.Array:
    """Each row of a pair classifies the other's side."""
    scores = jnp.exp(params["temperature"]) * rows[0::2] @ rows[1::2].T
    return -sum(jnp.mean(jnp.diag(jax.nn.log_softmax(x))) for x in (scores, scores.T)) / 2


def whole(model: Model, params: Tree, tokens: jax.Array) -> jax.Array:
    """The loss of a batch at once."""
    return info_nce(params, encode(model, params, tokens))


def plain(model: Model, k: int, **options: Any) -> Callable[..., Any]:
    """A window of losses of micro-batches."""
    return jaxaccum.value_and_grad(functools.partial(whole, model), k, **options)


def coupled(model: Model, k: int, **options: Any) -> Callable[..., Any]:
    """A window of one loss."""
    return jaxaccum.coupled_value_and_grad(functools.partial(encode, model), info_nce, k, **options)


BIG, COUPLED = "one big batch", "coupled"
SIDES = {
    "plain window": plain,
    "plain window, auto": functools.partial(plain, prepare="auto"),
    COUPLED: coupled,
    "coupled, auto": functools.partial(coupled, prepare="auto"),
    "coupled, cast": functools.partial(coupled, prepare=CAST),
    BIG: lambda model, k: jax.value_and_grad(functools.partial(whole, model)),
}
COMPARISON = Comparison(
    floor="plain window",
    rival=BIG,
    columns={
        "difference": lambda case, side: f"{case['difference'][side]:.0e}",
        "temporary MiB": lambda case, side: f"{case['temporary'][side]:.0f}",
    },
)


@jax.jit
def distance(grads: Tree, reference: Tree) -> jax.Array:
    """How far a gradient is from a reference, relative to the latter's norm."""
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)))
    return norm(jax.tree.map(jnp.subtract, grads, reference)) / norm(reference)


def measure(model: Model, params: Tree, k: int, n: int, sides: list[str], repeats: int) -> Record:
    """One case: a window by all sides."""
    case = {"name": f"K = {k}, N = {n}", "difference": {}, "temporary": {}, "failed": {}}
    batches = [tokens.whole for tokens in windows(model, k, n)]
    reference, ways = None, []
    # The reference comes first.
    for name in sorted(sides, key=[BIG, COUPLED, *SIDES].index):
        gradient = SIDES[name](model, k)
        # A gradient goes where the one before it was.
        step = jax.jit(lambda old, *args, f=gradient: f(*args), donate_argnums=0, keep_unused=True)
        try:
            program = step.lower(params, params, batches[0]).compile()
            _, grads = program(jax.tree.map(jnp.zeros_like, params), params, batches[0])
            reference = grads if reference is None else reference
            case["difference"][name] = float(distance(grads, reference))
        except Exception as error:  # Whatever it is, it costs one row.
            case["failed"][name] = reason(error)
            continue
        case["temporary"][name] = program.memory_analysis().temp_size_in_bytes / MIB
        data = itertools.cycle(batches)
        ways.append((name, lambda old, program=program, data=data: program(old, params, next(data))[1]))
        del grads
    del reference
    ways.sort(key=lambda way: list(SIDES).index(way[0]))
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    case["seconds"] = interleave_windows([Side(name, run, zeros()) for name, run in ways], repeats)
    return case


def main() -> None:
    """Runs the benchmark from the command line."""
    options = parser(__doc__)
    options.add_argument(
        "--batches", default="8", help="N, sequences in a micro-batch, an even number; one case for each"
    )
    options.add_argument("--k", type=int, default=8, help="micro-batches a window")
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, metavar="SIDE")
    add_options(options)
    args = options.parse_args()
    if args.table is not None:
        print(COMPARISON.table(json.loads(args.table.read_text())))
        return
    model = chosen(args)
    params = {"tower": jax.jit(model.init)(jax.random.key(0)), "temperature": jnp.float32(2.0)}
    cases = [measure(model, params, args.k, n, args.sides, args.repeats) for n in map(int, args.batches.split(","))]
    settings = {"parameters": parameters(params), **dataclasses.asdict(model)}
    settings |= {"k": args.k, "repeats": args.repeats, "warmup": WARMUP, "round": ROUND, "windows": POOL}
    COMPARISON.finish(args.out, settings, cases)


if __name__ == "__main__":
    main()
