"""The state of `MultiSteps`, and what the host changes in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._integers import positive_int
from jaxaccum._sums import weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class MultiStepsState(NamedTuple):
    """State of `MultiSteps`: the five fields of `optax.MultiStepsState`, then those for exact accumulation.

    `acc_grads` and `weight` are valid only while `mini_step` is above 0. They are not cleared at a boundary: the next
    window's first micro-step overwrites them.

    Attributes:
      mini_step: int32 scalar, the number of micro-steps in the open window.
      gradient_step: int32 scalar, the number of optimizer steps.
      inner_opt_state: the inner optimizer's state.
      acc_grads: Σ w·g, a tree like the parameters or, with `prepare`, like its output; None for leaves without a
        gradient.
      skip_state: the last `skip_state` from `should_skip_update_fn`; `()` without one.
      weight: float scalar, Σ w.
      averages: for each name in `averaged_extra_args`, its `Weighted` sum; 0 if it was not passed in this window.
      every_k: int32 scalar, K; None if K is a function of `gradient_step`.
      updated: bool scalar, whether the last call ran the inner optimizer.
      dropped: int32 scalar, the number of non-finite micro-batches dropped since `init`.
      prepared: the output of `prepare` at the last optimizer step, a tuple of arrays, without the parameters that it
        returns unchanged. `()` without one.
      norms: with `gradient_norms`, a NamedTuple. `window` is the norm of the gradient of the last optimizer step. With
        "all" there are also `micro_batch`, the norm of the last micro-batch's mean gradient, per device with `mesh`, 0
        if it was left out; `squares`, Σ w·‖g‖² and Σ w over the last window's micro-batches g on all devices; `count`,
        how many of them counted; and `pending`, the sums of the open window. With "noise" there is `two_sizes`, of the
        last window. `()` without the option.
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
    norms: Any = ()


def with_cleared_sums(state: MultiStepsState, clear: Callable[[Tree], Tree] = weighted_sum.cleared) -> MultiStepsState:
    """`state` with `acc_grads` and `weight` set to 0."""
    acc_grads, weight = clear((state.acc_grads, state.weight))
    return state._replace(acc_grads=acc_grads, weight=weight)


def set_every_k(state: Any, k: int) -> Any:
    """Sets K to `k` in every `MultiStepsState` in `state`. Call it on the host, between steps.

    Only the value of a leaf changes, so nothing recompiles. If the open window already holds `k` or more micro-steps,
    it closes at the next one and the mean is over all of them.

    Example:
      >>> import jaxaccum, optax
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), jaxaccum.MultiSteps(optax.adam(1e-3), 8))
      >>> state = jaxaccum.set_every_k(tx.init({"w": jnp.ones(3)}), 4)
      >>> int(state[1].every_k)
      4

    Args:
      state: any pytree that contains a `MultiStepsState`, such as the state of a chain or of another wrapper, a flax
        `TrainState` or an `nnx.Optimizer`.
      k: the new K, an integer of at least 1.

    Returns:
      A new tree of the same structure, shapes, dtypes and shardings.

    Raises:
      TypeError: if `k` is not an integer.
      ValueError: if `k` is below 1, if `state` contains no `MultiStepsState`, or if K is a function.
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
