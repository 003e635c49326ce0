"""`train_lm.py` as a loop of one's own: what the Trainer does there, written out with `MultiSteps`.

    python examples/train_lm_loop.py

First it takes some windows twice, as micro-batches and as one big batch each with plain optax, and prints by how much
the parameters differ.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm
from train_lm import ByteLM, loss, micro_batches, optimizer, parse_arguments, read_standard_library, split

import jaxaccum

CHECKED_WINDOWS = 4


def check(
    micro_step: Callable[..., Any],
    loss_fn: Callable[..., jaxaccum.Weighted],
    tx: jaxaccum.MultiSteps,
    params: nnx.State,
    windows: Sequence[Sequence[np.ndarray]],
) -> tuple[float, float]:
    """Trains on `windows` twice: by micro-steps, and taking each as one big batch with the bare optimizer.

    Returns:
      The largest difference between the two in any parameter, and the farthest that one moved.
    """

    def mean_loss(params, rows):
        total, tokens = loss_fn(params, rows)
        return total / tokens

    @jax.jit
    def big_step(params, opt_state, rows):
        updates, opt_state = tx.inner_opt.update(jax.grad(mean_loss)(params, rows), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    accumulated, opt_state = jax.tree.map(jnp.copy, params), tx.init(params)  # A copy: micro_step donates it.
    big, big_opt_state = params, tx.inner_opt.init(params)
    for window in windows:
        for i, rows in enumerate(window):
            _, accumulated, opt_state = micro_step(accumulated, opt_state, rows, boundary=i == len(window) - 1)
        big, big_opt_state = big_step(big, big_opt_state, np.concatenate(window))
    distance = lambda a, b: max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))
    return distance(accumulated, big), distance(big, params)


def main() -> None:
    """Trains; see the module's docstring."""
    args = parse_arguments()
    rng = np.random.default_rng(args.seed)
    train, held_out = split(read_standard_library(), args.limit, rng)
    graphdef, params = nnx.split(ByteLM(nnx.Rngs(args.seed)))
    loss_fn = functools.partial(loss, graphdef)

    micro_steps = math.ceil(len(train) / args.batch_size)
    every_k = [args.accumulate(epoch) for epoch in range(args.epochs)]
    steps = args.accumulate.optimizer_steps(args.epochs, micro_steps)
    tx = jaxaccum.MultiSteps(optimizer(steps), every_k_schedule=every_k[0])
    opt_state = tx.init(params)

    # The host knows its place in the window, so `boundary` is static: two programs, and only one holds the optimizer.
    @functools.partial(jax.jit, static_argnames="boundary", donate_argnames=("params", "opt_state"))
    def micro_step(params, opt_state, rows, boundary):
        return tx.micro_step(loss_fn, params, opt_state, rows, boundary=boundary)

    batches = list(micro_batches(train[: CHECKED_WINDOWS * every_k[0] * args.batch_size], args.batch_size))
    windows = [batches[start : start + every_k[0]] for start in range(0, len(batches), every_k[0])]
    difference, movement = check(micro_step, loss_fn, tx, params, windows)
    print(
        f"{len(windows)} windows, accumulated and as one big batch each: the parameters moved by up to {movement:.1e}"
    )
    print(f"and differ by at most {difference:.1e}")

    evaluate = jax.jit(loss_fn)
    with tqdm(total=args.epochs * micro_steps, unit="micro-step", mininterval=0.5, leave=False) as bar:
        for epoch, k in enumerate(every_k):
            opt_state = jaxaccum.set_every_k(opt_state, k)
            for i, rows in enumerate(micro_batches(rng.permutation(train), args.batch_size)):
                # An epoch closes its last window, full or not.
                boundary = (i + 1) % k == 0 or i + 1 == micro_steps
                _, params, opt_state = micro_step(params, opt_state, rows, boundary=boundary)
                bar.update()
            held_out_sums = [evaluate(params, rows) for rows in micro_batches(held_out, args.batch_size)]
            nats = sum(total for total, _ in held_out_sums) / sum(weight for _, weight in held_out_sums)
            bar.write(
                f"epoch {epoch}, K = {k}: {int(opt_state.gradient_step)} of {steps} optimizer steps, "
                f"{nats / math.log(2):.4f} bits per byte held out"
            )


if __name__ == "__main__":
    main()
