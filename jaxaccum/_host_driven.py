"""For a training loop of one's own: the two programs of a window, and the host's count of its micro-steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxaccum import _accumulator, _inner, _multi_steps
from jaxaccum._integers import positive_int
from jaxaccum._multi_steps import MultiSteps
from jaxaccum._state import MultiStepsState, set_every_k
from jaxaccum._sync import MappedAxis

Tree = Any


class HostDriven:
    """`MultiSteps.micro_step` as two compiled programs, of which the host picks one by counting: the fastest drive.

    The one for between boundaries takes the parameters and what is pending, and gives the latter back: the optimizer's
    state does not pass through it, and it adds to the sums without asking whether there are any. The other one closes
    the window, without a conditional, and clears them. K is the host's: to change it compiles nothing.

    Args:
      tx: what accumulates.
      fun: the loss, as for `MultiSteps.micro_step`.

    Raises:
      TypeError, ValueError: if `tx` is no `MultiSteps`, or one that a host can't count for: with `axis_name`, with a
        function for K, or with `should_skip_update_fn`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxaccum
      >>> tx = jaxaccum.MultiSteps(optax.sgd(0.05), every_k_schedule=2)
      >>> step = jaxaccum.HostDriven(tx, lambda w, x: (w * x) ** 2)
      >>> params = jnp.array(1.0)
      >>> state = tx.init(params)
      >>> for x in (1.0, 3.0):
      ...     loss, params, state = step(params, state, x)
      ...     print(f"{loss} {params:.3f}")
      1.0 1.000
      9.0 0.500
    """

    def __init__(self, tx: MultiSteps, fun: Callable[..., Any]):
        if not isinstance(tx, MultiSteps):
            raise TypeError(f"tx must be a jaxaccum.MultiSteps, got {tx!r}.")
        if not callable(fun):
            raise TypeError(f"fun must be callable, got {fun!r}.")
        config = tx._config
        reasons = {
            "axis_name": isinstance(config.sync, MappedAxis),
            "a function for every_k_schedule": callable(config.every_k),
            "should_skip_update_fn": config.should_skip_update_fn is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"the host can't count the windows of a MultiSteps with {reason}; jit tx.micro_step.")
        self._tx = tx
        self._every_k = positive_int(config.every_k, "every_k_schedule")
        self._mini_step: int | None = None
        self._is_stale = False  # whether the state does not know of K yet

        micro_step = functools.partial(_multi_steps.micro_step, config, fun, clears=True)

        def accumulate(params, prepared, pending, *args):
            loss, _, pending = micro_step(params, pending._replace(prepared=prepared), args, boundary=False)
            return loss, pending._replace(prepared=())

        def close(params, state, *args):
            return micro_step(params, state, args, boundary=True)

        def flush(params, state):
            updates, state = tx.flush(state, params)
            return _inner.apply_updates(params, updates), _cleared(state, _accumulator.cleared)

        self._accumulate = jax.jit(accumulate, donate_argnums=2)
        self._close = jax.jit(close, donate_argnums=(0, 1))
        self._flush = jax.jit(flush, donate_argnums=(0, 1))
        self._clear = jax.jit(_accumulator.cleared, donate_argnums=0)

    @property
    def every_k(self) -> int:
        """K. Set below what is pending, the next micro-step closes the window."""
        return self._every_k

    @every_k.setter
    def every_k(self, k: int) -> None:
        self._every_k = positive_int(k, "every_k")
        self._is_stale = True

    @property
    def mini_step(self) -> int:
        """The micro-steps in the open window; 0 where none is pending."""
        return self._mini_step or 0

    def __call__(self, params: Tree, state: MultiStepsState, *args: Any) -> tuple[jax.Array, Tree, MultiStepsState]:
        """One micro-step; a boundary after every K of them.

        The first call reads from `state` where the window stands, which waits for the device; no other one does.

        Args:
          params: the parameters; donated at a boundary.
          state: the state; its sums are donated in every call, all of it at a boundary.
          *args: what `fun` takes besides, for jit.

        Returns:
          (the micro-batch's mean loss, params, state).
        """
        if self._mini_step is None:
            self._mini_step = int(state.mini_step)
            if not self._mini_step:
                state = _cleared(state, self._clear)  # Other drives leave there what the last window held.
        if self._is_stale:
            state, self._is_stale = set_every_k(state, self._every_k), False
        self._mini_step += 1
        if self._mini_step >= self._every_k:
            self._mini_step = 0
            return self._close(params, state, *args)
        # What only a boundary changes goes around the program.
        kept = {"inner_opt_state": state.inner_opt_state, "prepared": state.prepared}
        pending = state._replace(inner_opt_state=None, prepared=())
        loss, pending = self._accumulate(params, state.prepared, pending, *args)
        return loss, params, pending._replace(**kept)

    def flush(self, params: Tree, state: MultiStepsState) -> tuple[Tree, MultiStepsState]:
        """Closes a partial window: an optimizer step on the mean of what it holds. Both arguments are donated."""
        self._mini_step = 0
        return self._flush(params, state)


def _cleared(state: MultiStepsState, clear: Callable[[Tree], Tree]) -> MultiStepsState:
    """`state` with nothing in its sums."""
    acc_grads, weight = clear((state.acc_grads, state.weight))
    return state._replace(acc_grads=acc_grads, weight=weight)
