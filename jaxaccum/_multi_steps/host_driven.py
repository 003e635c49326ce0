"""`HostDriven`, for custom training loops: two compiled programs, with micro-steps counted on the host."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum import _calls
from jaxaccum._devices.topology import MappedAxis
from jaxaccum._gradient.host_weight import HostWeight
from jaxaccum._gradient.returns import Returns, strong
from jaxaccum._integers import positive_int
from jaxaccum._jax import prng
from jaxaccum._multi_steps import checks, inner_update, loss_step, norms
from jaxaccum._multi_steps.accumulation import Boundary
from jaxaccum._multi_steps.api import MultiSteps, config_of
from jaxaccum._multi_steps.state import MultiStepsState, set_every_k, with_cleared_sums
from jaxaccum._sums import modules, numeric, weighted_sum
from jaxaccum._types import Tree

_AS_IT_IS = "a micro-batch is taken as it is, and all arguments after state are the loss's"
# What to do in place of passing an argument of `value_and_grad`.
REMEDIES = {
    "batch_argnums": _AS_IT_IS,
    "key_argnums": f"{_AS_IT_IS}: pass a key as an argument, another one in each call",
}


class HostDriven:
    """Runs `MultiSteps.micro_step` as two compiled programs and counts micro-steps on the host to choose between them.

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

    The first program only accumulates: it takes the parameters and the pending sums and returns the sums. The
    optimizer's state does not pass through it. The second also runs the optimizer, without a conditional, and clears
    the sums. Changing K does not recompile either. With `gradient_norms="noise"` on one device, a third one accumulates
    the first micro-batch of a window and takes its norm.

    The position in the window belongs to the state. For a state returned by this object, the host knows the position
    without waiting for the device. For any other state (new, restored, copied, or from another step function), it
    waits for the device and reads `mini_step` and `every_k`. States may be interleaved, and a call that raises does not
    count.

    K also belongs to the state, as set by `MultiSteps`, `set_every_k` or a checkpoint. Assigning `every_k` on this
    object writes the new K into the next state passed, once into each other state that this object returned before the
    assignment, and into each state that it has not seen before and that still has the K of
    `MultiSteps(opt, every_k_schedule)`. A state with another K, from `set_every_k` or from a checkpoint, keeps it. An
    assignment during a call takes effect at the next call.

    If the loss is a `Weighted` whose weight comes from the data (see `Weighted`), the host computes the weight before
    each call, and waits for arrays that the weight depends on if they are still being computed; NumPy arrays are there
    at once. A micro-batch of weight 0 compiles a second pair of programs when it first occurs.

    Whole equinox modules are parameters, arguments and carry, as with `equinox.filter_jit`: arrays pass through the
    programs, and another value of any other leaf, such as a flag, compiles them again. The arrays that are not trained
    are not donated.

    Args:
      tx: the `MultiSteps`.
      fun: the loss, as for `MultiSteps.micro_step`.
      has_aux: whether `fun` returns aux, as there.
      carry_argnums: the arguments of `fun` that are model state, as there. The carry is not donated.

    Raises:
      TypeError, ValueError: if `tx` is not a `MultiSteps`, if its micro-steps can't be counted on the host (it has
        `axis_name`, a function for K, or `should_skip_update_fn`), or if `fun` is not callable.
    """

    @_calls.explains(**REMEDIES)
    def __init__(
        self,
        tx: MultiSteps,
        fun: Callable[..., Any],
        has_aux: bool = False,
        carry_argnums: int | Sequence[int] | None = None,
    ):
        if not isinstance(tx, MultiSteps):
            raise TypeError(f"tx must be a jaxaccum.MultiSteps, got {numeric.kind(tx)}.")
        if not callable(fun):
            raise TypeError(f"fun must be callable, got {fun!r}.")
        config = config_of(tx)
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
        self._assigned = self._last_written = self._built  # The latest assignment, and the latest written to a state.
        self._every_k = self._built.every_k
        self._positions = _Facts()
        self._ks = _Facts()
        self._compiled = set()  # (program, signature) pairs that are known to compile.

        fun, returns = modules.whole(fun), Returns(has_aux, carry_argnums)
        self._roles = loss_step.micro_step_roles(config.sync, returns)
        value_alone = lambda *args, **kwargs: (returns.unpack(fun(*args, **kwargs))[0], None)
        self._weight = HostWeight(value_alone, config.sync, self._roles)

        def programs(counts, starts=False):
            micro_step = loss_step.micro_step(config, fun, returns, counts=counts)

            def accumulate(params, prepared, pending, /, *args, **kwargs):
                pending = pending._replace(prepared=prepared)
                boundary = Boundary(False, clears=True, starts=starts)
                loss, _, pending = micro_step(params, pending, args, kwargs, boundary)
                return loss, pending._replace(prepared=())

            def close(params, state, /, *args, **kwargs):
                return micro_step(params, state, args, kwargs, Boundary(True, clears=True, starts=False))

            return jax.jit(accumulate, donate_argnums=2), jax.jit(close, donate_argnums=(0, 1))

        def flush(params, state):
            updates, state = tx.flush(state, params)
            return inner_update.apply_updates(params, updates), with_cleared_sums(state)

        self._programs = {counts: programs(counts) for counts in (False, True)}
        self._starting = {}  # The programs that accumulate a window's first micro-batch, if they differ.
        if norms.measures_starts(config):
            self._starting = {counts: programs(counts, starts=True)[0] for counts in self._programs}
        self._flush = jax.jit(flush, donate_argnums=(0, 1))
        self._clear = jax.jit(weighted_sum.cleared, donate_argnums=0)

    @property
    def every_k(self) -> int:
        """K of the last call's state, or the value assigned since.

        If it is set to the number of pending micro-steps or less, the next micro-step closes the window.
        """
        assigned = self._assigned
        return self._every_k if assigned is self._last_written else assigned.every_k

    @every_k.setter
    def every_k(self, k: int) -> None:
        self._assigned = _Assignment(positive_int(k, "every_k"))

    @property
    def mini_step(self) -> int:
        """The number of micro-steps in the open window of the last returned state."""
        return self._mini_step

    def __call__(
        self, params: Tree, state: MultiStepsState, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tree, MultiStepsState]:
        """Runs one micro-step; every K-th one is a boundary.

        Args:
          params: the parameters; donated at a boundary.
          state: the state. Its sums are donated in every call, and all of it at a boundary. A call that raises before
            its program starts, for instance because `fun` or the compiler raises, donates nothing.
          *args: the other arguments of `fun`, passed through jit.
          **kwargs: its keyword arguments, passed through jit.

        Returns:
          (the micro-batch's mean loss, params, state); in place of the loss (loss, aux), (loss, carry) or
          (loss, (carry, aux)).

        Raises:
          TypeError: if `state` is not a `MultiStepsState`, or if called inside `jax.jit`.
        """
        state = checks.state(state, "HostDriven", self._sync)
        _check_on_host("HostDriven", (params, state.mini_step, args, kwargs))
        state, position, k = self._read(state)
        params, rest = modules.parted(params)
        args, kwargs = modules.arguments(rest, args, kwargs)
        accumulate, close = self._programs_for(params, args, kwargs, starts=position.mini_step == 0)
        params, args = self._settled(params, args)
        if position.mini_step + 1 >= k.every_k:
            loss, params, state = self._run(close, (params,), state, args, kwargs, position)
            mini_step = 0
        else:
            kept, pending = _parted(state)
            loss, pending = self._run(accumulate, (params, state.prepared), pending, args, kwargs, position)
            state = pending._replace(**kept)
            mini_step = position.mini_step + 1
        self._remember(state, mini_step, k)
        return modules.restored(loss), modules.combined(params, rest), state

    def lower(
        self, params: Tree, state: MultiStepsState, *args: Any, **kwargs: Any
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Lowers the two programs for these arguments, for example to compile them and to see what they hold.

        Example:
          >>> import jax.numpy as jnp, optax, jaxaccum
          >>> tx = jaxaccum.MultiSteps(optax.adam(0.1), every_k_schedule=2)
          >>> step = jaxaccum.HostDriven(tx, lambda w, x: jnp.mean((x @ w) ** 2))
          >>> accumulate, close = step.lower(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones((4, 3)))
          >>> "sqrt" in accumulate.as_text(), "sqrt" in close.as_text()
          (False, True)

        Args:
          params: the parameters. They and all other arguments may be `jax.ShapeDtypeStruct`s, with shardings on a mesh.
          state: the state.
          *args: as for a call.
          **kwargs: as for a call.

        Returns:
          (the program that accumulates, the program that also runs the optimizer). For a `Weighted` loss they are those
          of a micro-batch that counts, unless `args` hold one that doesn't.

        Raises:
          TypeError: if `state` is not a `MultiStepsState`.
        """
        state = checks.state(state, "HostDriven.lower", self._sync)
        params, rest = modules.parted(params)
        args, kwargs = modules.arguments(rest, args, kwargs)
        accumulate, close = self._programs_for(params, args, kwargs)
        params, args = self._settled(params, args)
        _, pending = _parted(state)
        return (
            accumulate.lower(params, state.prepared, pending, *args, **kwargs),
            close.lower(params, state, *args, **kwargs),
        )

    def flush(self, params: Tree, state: MultiStepsState) -> tuple[Tree, MultiStepsState]:
        """Closes a partial window with an optimizer step on the mean of its micro-batches. Donates both arguments."""
        state = checks.state(state, "HostDriven.flush", self._sync)
        _check_on_host("HostDriven.flush", (params, state.mini_step))
        state, _, k = self._read(state)
        params, rest = modules.parted(params)
        params, state = self._flush(params, state)
        self._remember(state, 0, k)
        return modules.combined(params, rest), state

    def _programs_for(
        self, params: Tree, args: tuple[Any, ...], kwargs: dict[str, Any], starts: bool = False
    ) -> tuple[Any, Any]:
        """The two programs for these arguments of `fun`, which are checked; `starts`: a window begins."""
        prng.refuse_rngs((*args, *kwargs.values()))
        self._roles.check((params, *args))
        counts = self._weight.is_positive(params, *args, **kwargs)
        accumulate, close = self._programs[counts]
        return self._starting[counts] if starts and self._starting else accumulate, close

    def _settled(self, params: Tree, args: tuple[Any, ...]) -> tuple[Tree, tuple[Any, ...]]:
        """The parameters and the carry in the types and the places that programs return them in.

        Otherwise each program would compile twice.
        """
        as_returned = lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else strong(x)
        settled = lambda tree: self._sync.settled(jax.tree.map(as_returned, tree))
        carry = self._roles.carry
        return self._sync.settled(params), tuple(settled(x) if i in carry else x for i, x in enumerate(args, 1))

    def _read(self, state: MultiStepsState) -> tuple[MultiStepsState, "_Position", "_K"]:
        """Applies a pending assignment of K: (`state`, its position, its K)."""
        assigned = self._assigned  # Read once: a later assignment, e.g. in a signal handler, waits for the next call.
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
        """Records a returned state's position and K, so that the next call does not read them from the device."""
        cleared = () if mini_step else tuple(map(weakref.ref, _sums(state)))
        self._positions.add(state.mini_step, _Position(mini_step, cleared))
        self._ks.add(state.every_k, k)
        self._mini_step, self._every_k, self._last_written = mini_step, k.every_k, k.written

    def _run(self, program, given, state, args, kwargs, position):
        """Runs `program(*given, state, *args, **kwargs)`, clearing the sums of `state` first if a window starts."""
        if not position.mini_step and not position.holds_cleared(_sums(state)):
            # Raise any error here, before clearing donates the caller's sums.
            numeric.arrays(given[0])
            jax.block_until_ready((given, state, args, kwargs))
            signature = _signature((given, state, args, kwargs))
            if (program, signature) not in self._compiled:
                program.lower(*given, state, *args, **kwargs).compile()
                self._compiled.add((program, signature))
            state = with_cleared_sums(state, self._clear)
        return program(*given, state, *args, **kwargs)


class _Assignment(NamedTuple):
    """One assignment to `HostDriven.every_k`, compared by identity."""

    every_k: int


class _K(NamedTuple):
    """A state's K, and the latest assignment that was applied to the state or that is older than it."""

    every_k: int
    written: _Assignment


class _Position(NamedTuple):
    """A state's number of micro-steps in its window, and references to its sums if they are known to be 0."""

    mini_step: int
    cleared: tuple[weakref.ref, ...]

    def holds_cleared(self, sums: list[Any]) -> bool:
        """Whether `sums` are the arrays known to be 0."""
        if len(sums) != len(self.cleared):
            return False
        return all(ref() is x for ref, x in zip(self.cleared, sums, strict=True))


class _Facts:
    """Host-side facts about arrays, kept for the arrays' lifetime. They stay valid because arrays are immutable."""

    def __init__(self):
        self._facts: dict[int, tuple[weakref.ref, Any]] = {}

    def add(self, array: jax.Array, fact: Any) -> None:
        """Records `fact` about `array`."""
        key = id(array)  # Arrays are not hashable.
        self._facts[key] = weakref.ref(array, functools.partial(self._facts.pop, key)), fact

    def get(self, array: Any) -> Any:
        """The fact recorded about this object, or None."""
        known = self._facts.get(id(array))
        return known[1] if known and known[0]() is array else None


def _parted(state: MultiStepsState) -> tuple[dict[str, Any], MultiStepsState]:
    """(the fields that only change at a boundary and bypass the accumulating program, the state without them)."""
    kept = {"inner_opt_state": state.inner_opt_state, "prepared": state.prepared}
    return kept, state._replace(inner_opt_state=None, prepared=())


def _check_on_host(method: str, tree: Tree) -> None:
    """Raises inside `jax.jit`, where a call runs once, during tracing, and the host can't count micro-steps."""
    is_tracer = lambda leaf: isinstance(leaf, jax.core.Tracer)
    # Eager vmap and grad use tracers too, but there an array created without arguments is concrete.
    if any(map(is_tracer, jax.tree.leaves(tree))) and is_tracer(jnp.zeros(())):
        raise TypeError(
            f"{method} was called with tracers, inside jax.jit or a loop of jax.lax, where the host can't count the "
            "micro-steps. Call it outside, or use tx.micro_step and tx.flush there, which count on the device."
        )


def _on_host(scalar: Any) -> int:
    """Reads a state's counter. Waits for the device."""
    return int(scalar)


def _signature(args: Any) -> tuple:
    """The cache key for compilation: everything about `args` except their values."""

    def kind(x):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            return (x.aval, x.sharding, x.committed)
        return type(x), getattr(x, "shape", None), getattr(x, "dtype", None)

    leaves, treedef = jax.tree.flatten(args)
    return jax.sharding.get_abstract_mesh(), treedef, tuple(map(kind, leaves))


def _sums(state: MultiStepsState) -> list[Any]:
    return jax.tree.leaves((state.acc_grads, state.weight))
