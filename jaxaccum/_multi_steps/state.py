"""The state of `MultiSteps`, and the host's hand on its K."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._integers import positive_int
from jaxaccum._sums.weighted_sum import Weighted


class MultiStepsState(NamedTuple):
    """State of `MultiSteps`: optax's five fields first, then what exact accumulation needs besides.

    `acc_grads` and `weight` mean something while `mini_step` is above 0: the next window's first micro-step overwrites
    them, and nothing ever clears them.

    Attributes:
      mini_step: int32 scalar, the micro-steps in the window so far; 0 when none is pending.
      gradient_step: int32 scalar, the optimizer steps made.
      inner_opt_state: the inner optimizer's state.
      acc_grads: Σ w·g, a tree like the parameters, or with `prepare` like what it returns; None for leaves without
        gradient.
      skip_state: what `should_skip_update_fn` returned last; `()` without one.
      weight: float scalar, Σ w.
      averages: for each name in `averaged_extra_args`, its `Weighted` sum; 0 where none was passed in this window.
      every_k: int32 scalar, K; None where K is a function of `gradient_step`.
      updated: bool scalar, whether the last call ran the inner optimizer.
      dropped: int32 scalar, the micro-batches left out as non-finite since `init`.
      prepared: what `prepare` made of the parameters at the last optimizer step, a tuple of arrays: what it handed on
        as it was is not kept twice. `()` without one.
    """

    mini_step: Any
    gradient_step: Any
    inner_opt_state: Any
    acc_grads: Any
    skip_state: Any
    weight: Any
    averages: dict[str, Weighted]
    every_k: Any
    updated: Any
    dropped: Any
    prepared: Any = ()


def set_every_k(state: Any, k: int) -> Any:
    """`state` with K set to `k` in every `MultiStepsState` that it holds. For the host, between steps.

    Compiled steps see other contents in the same leaf, so none compiles again. Where K shrinks in mid-window to no
    more than what is pending, the window closes at the next micro-step, divided by what it really holds.

    Args:
      state: any pytree that holds a `MultiStepsState`: its own, that of a chain or of another wrapper, a flax
        `TrainState`, an `nnx.Optimizer`.
      k: the new K, an integer of at least 1.

    Returns:
      A new tree of the same structure, shapes, dtypes and shardings.

    Raises:
      TypeError: if `k` is not an integer.
      ValueError: if `k` is below 1, if `state` holds no `MultiStepsState`, or if K is a function there.

    Example:
      >>> import jaxaccum, optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), jaxaccum.MultiSteps(optax.adam(1e-3), 8))
      >>> state = jaxaccum.set_every_k(tx.init({"w": jnp.ones(3)}), 4)
      >>> int(state[1].every_k)
      4
    """
    k = positive_int(k, "k")
    found = 0

    def replace(node):
        nonlocal found
        if not isinstance(node, MultiStepsState):
            return node
        found += 1
        if not jax.tree.leaves(node.every_k):
            raise ValueError(
                f"k={k} can't be set: K is a function of gradient_step in this MultiSteps. "
                "Build it with an integer every_k_schedule to set K from the host."
            )
        every_k = jax.tree.map(lambda old: jnp.full_like(old, k), node.every_k)
        return node._replace(every_k=every_k)

    state = jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, MultiStepsState))
    if not found:
        raise ValueError(
            f"state holds no MultiStepsState to set k={k} in, got a {type(state)}. Pass the state that "
            "MultiSteps.init returned, or a tree that contains it."
        )
    return state
