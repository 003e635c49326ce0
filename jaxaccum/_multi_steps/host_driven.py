"""For a training loop of one's own: the two programs of a window, and the host's count of its micro-steps."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices.topology import MappedAxis
from jaxaccum._integers import positive_int
from jaxaccum._jax import prng
from jaxaccum._multi_steps import checks, inner_update, loss_step, stepping
from jaxaccum._multi_steps.api import MultiSteps
from jaxaccum._multi_steps.state import MultiStepsState, set_every_k
from jaxaccum._sums import numeric, weighted_sum
from jaxaccum._types import Tree


class HostDriven:
    """`MultiSteps.micro_step` as two compiled programs, between which Python picks by counting: the fastest stream.

    The first only accumulates: it takes the parameters and the pending sums and returns the sums, so the optimizer's
    state does not pass through it. The second also runs the optimizer, without a conditional, and clears the sums.
    Changing K compiles nothing.

    The state that is passed decides where its window stands. For a state that a call returned, the host knows this
    without waiting for the device; for any other (fresh, restored, copied, or from another step function) it reads
    `mini_step` and `every_k` from the state, which waits. Several states can take turns, and a call that raises counts
    for none of them.

    K is the state's own: what `MultiSteps`, `set_every_k` or a checkpoint put there. Assigning `every_k` on this object
    writes a new K into the next state that is passed, once into each other state that this object returned before the
    assignment, and into each state that is new to it and still has the K of `MultiSteps(opt, every_k_schedule)`. A
    state whose K was changed by `set_every_k`, or comes with another K from a checkpoint, keeps its own. An assignment
    during a call waits for the next one.

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
        self._sync = config.sync
        self._mini_step = 0
        self._built = _Assignment(positive_int(config.every_k, "every_k_schedule"))
        self._assigned = self._last_written = self._built  # what holds now, and what a state has received
        self._every_k = self._built.every_k
        self._positions = _Facts()
        self._ks = _Facts()
        self._compiled = set()  # (program, signature) where it is known to compile

        loss = loss_step.without_aux(fun, "HostDriven")
        micro_step = functools.partial(loss_step.micro_step, config, loss, clears=True)

        def accumulate(params, prepared, pending, *args):
            loss, _, pending = micro_step(params, pending._replace(prepared=prepared), args, boundary=False)
            return loss, pending._replace(prepared=())

        def close(params, state, *args):
            return micro_step(params, state, args, boundary=True)

        def flush(params, state):
            updates, state = tx.flush(state, params)
            return inner_update.apply_updates(params, updates), stepping.cleared(state)

        self._accumulate = jax.jit(accumulate, donate_argnums=2)
        self._close = jax.jit(close, donate_argnums=(0, 1))
        self._flush = jax.jit(flush, donate_argnums=(0, 1))
        self._clear = jax.jit(weighted_sum.cleared, donate_argnums=0)

    @property
    def every_k(self) -> int:
        """K of the last call's state, or the value assigned since.

        Set to what is pending or less, the next micro-step closes the window.
        """
        assigned = self._assigned
        return self._every_k if assigned is self._last_written else assigned.every_k

    @every_k.setter
    def every_k(self, k: int) -> None:
        self._assigned = _Assignment(positive_int(k, "every_k"))

    @property
    def mini_step(self) -> int:
        """The micro-steps in the open window of the last returned state; 0 where none is pending."""
        return self._mini_step

    def __call__(self, params: Tree, state: MultiStepsState, *args: Any) -> tuple[jax.Array, Tree, MultiStepsState]:
        """One micro-step; a boundary after every K of them.

        Args:
          params: the parameters; donated at a boundary.
          state: the state; its sums are donated in every call, all of it at a boundary. A call that raises before its
            program starts, as where `fun` or the compiler raises, donates nothing.
          *args: what `fun` takes besides, for jit.

        Returns:
          (the micro-batch's mean loss, params, state).

        Raises:
          TypeError: if `state` is not that of a `MultiSteps`, and inside `jax.jit`.
        """
        state = checks.state(state, "HostDriven", self._sync)
        _check_on_host("HostDriven", (params, state.mini_step, args))
        prng.refuse_rngs(args)
        state, position, k = self._read(state)
        if position.mini_step + 1 >= k.every_k:
            loss, params, state = self._run(self._close, (params,), state, args, position)
            mini_step = 0
        else:
            # What only a boundary changes goes around the program.
            kept = {"inner_opt_state": state.inner_opt_state, "prepared": state.prepared}
            pending = state._replace(inner_opt_state=None, prepared=())
            loss, pending = self._run(self._accumulate, (params, state.prepared), pending, args, position)
            state = pending._replace(**kept)
            mini_step = position.mini_step + 1
        self._remember(state, mini_step, k)
        return loss, params, state

    def flush(self, params: Tree, state: MultiStepsState) -> tuple[Tree, MultiStepsState]:
        """Closes a partial window: an optimizer step on the mean of what it holds. Both arguments are donated."""
        state = checks.state(state, "HostDriven.flush", self._sync)
        _check_on_host("HostDriven.flush", (params, state.mini_step))
        state, _, k = self._read(state)
        params, state = self._flush(params, state)
        self._remember(state, 0, k)
        return params, state

    def _read(self, state: MultiStepsState) -> tuple[MultiStepsState, "_Position", "_K"]:
        """(`state` with the K that is assigned to it, its position, its K)."""
        assigned = self._assigned  # What is assigned from here on, as by a signal handler, waits for the next call.
        position = self._positions.get(state.mini_step)
        k = self._ks.get(state.every_k)
        if k is None and self._last_written is assigned:
            every_k = _on_host(state.every_k)
            is_as_built = position is None and every_k == self._built.every_k
            k = _K(every_k, self._built if is_as_built else assigned)
        if k is None or k.written is not assigned:
            state = set_every_k(state, assigned.every_k)
            k = _K(assigned.every_k, assigned)
        return state, position or _Position(_on_host(state.mini_step), ()), k

    def _remember(self, state: MultiStepsState, mini_step: int, k: "_K") -> None:
        """Notes what the programs made of a state, so that the next call does not read it."""
        cleared = () if mini_step else tuple(map(weakref.ref, _sums(state)))
        self._positions.add(state.mini_step, _Position(mini_step, cleared))
        self._ks.add(state.every_k, k)
        self._mini_step, self._every_k, self._last_written = mini_step, k.every_k, k.written

    def _run(self, program, given, state, args, position):
        """`program(*given, state, *args)`, with nothing in the sums of `state` where a window begins."""
        if not position.mini_step and not position.holds_cleared(_sums(state)):
            # Whatever can raise does so here, before the clearing takes the caller's sums.
            numeric.arrays(given[0])
            jax.block_until_ready((given, state, args))
            signature = _signature((given, state, args))
            if (program, signature) not in self._compiled:
                program.lower(*given, state, *args).compile()
                self._compiled.add((program, signature))
            state = stepping.cleared(state, self._clear)
        return program(*given, state, *args)


class _Assignment(NamedTuple):
    """One assignment to `HostDriven.every_k`, told from others by its identity."""

    every_k: int


class _K(NamedTuple):
    """A state's K.

    Attributes:
      every_k: its value.
      written: the last assignment that the state has received or that came before it.
    """

    every_k: int
    written: _Assignment


class _Position(NamedTuple):
    """Where a state stands in its window.

    Attributes:
      mini_step: the micro-steps in the window.
      cleared: where that is 0, references to the state's sums if they are known to be 0.
    """

    mini_step: int
    cleared: tuple[weakref.ref, ...]

    def holds_cleared(self, sums: list[Any]) -> bool:
        """Whether `sums` are the arrays that are known to be 0."""
        if len(sums) != len(self.cleared):
            return False
        return all(ref() is x for ref, x in zip(self.cleared, sums, strict=True))


class _Facts:
    """What the host knows of arrays, for as long as they live. Arrays do not change, so it remains true."""

    def __init__(self):
        self._facts: dict[int, tuple[weakref.ref, Any]] = {}

    def add(self, array: jax.Array, fact: Any) -> None:
        """Notes `fact` of `array`."""
        key = id(array)  # Arrays have no hash.
        self._facts[key] = weakref.ref(array, functools.partial(self._facts.pop, key)), fact

    def get(self, array: Any) -> Any:
        """What is known of this very object; None if nothing is."""
        known = self._facts.get(id(array))
        return known[1] if known and known[0]() is array else None


def _check_on_host(method: str, tree: Tree) -> None:
    """Refuses to run inside of `jax.jit`: the host counts calls, and there a call is made once, while tracing."""
    is_tracer = lambda leaf: isinstance(leaf, jax.core.Tracer)
    # Under an eager vmap or grad there are tracers too, but what is made of no argument is an array.
    if any(map(is_tracer, jax.tree.leaves(tree))) and is_tracer(jnp.zeros(())):
        raise TypeError(
            f"{method} was called with tracers, inside jax.jit or a loop of jax.lax, where the host can't count the "
            "micro-steps. Call it outside, or use tx.micro_step and tx.flush there, which count on the device."
        )


def _on_host(scalar: Any) -> int:
    """The value of a state's counter. Waits for the device."""
    return int(scalar)


def _signature(args: Any) -> tuple:
    """What decides whether a program must be traced and compiled anew: all but the values in `args`."""
    leaves, treedef = jax.tree.flatten(args)
    kind = lambda x: (type(x), getattr(x, "shape", None), getattr(x, "dtype", None))
    placed = lambda x: (x.aval, x.sharding, x.committed)
    is_placed = lambda x: isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    kinds = tuple(placed(x) if is_placed(x) else kind(x) for x in leaves)
    return jax.sharding.get_abstract_mesh(), treedef, kinds


def _sums(state: MultiStepsState) -> list[Any]:
    return jax.tree.leaves((state.acc_grads, state.weight))
