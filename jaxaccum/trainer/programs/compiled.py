"""The compiled programs of a run and the arrays that they work on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum import task as _task
from jaxaccum._gradient import sum_packing
from jaxaccum._gradient.host_weight import HostWeight
from jaxaccum._multi_steps import inner_update, norms
from jaxaccum._multi_steps.accumulation import Boundary
from jaxaccum._multi_steps.api import MultiSteps, config_of
from jaxaccum._multi_steps.loss_step import LossStep
from jaxaccum._multi_steps.state import MultiStepsState, with_cleared_sums
from jaxaccum._sums import numeric, weighted_sum
from jaxaccum._sums.norms import GradientNorms
from jaxaccum._types import Tree
from jaxaccum.distributed.process_group import Processes
from jaxaccum.task import Task
from jaxaccum.trainer.input import process_shards
from jaxaccum.trainer.input.prefetch import MicroStep
from jaxaccum.trainer.input.strategies import Piece, Strategy
from jaxaccum.trainer.programs import objective
from jaxaccum.trainer.programs.objective import Logs
from jaxaccum.trainer.programs.step_outputs import Outputs


class Pending(NamedTuple):
    """The state of an open window.

    On P devices, per-device arrays have a leading axis of P. `index` and the counters in `sums` are replicated.

    Attributes:
      sums: the gradient sums; a `MultiStepsState` without its `inner_opt_state`, and of `norms` with `pending` alone,
        `()` unless the noise scale is measured.
      logs: the weighted sums of the loss and the metrics, as scalars.
      model_state: the model state after the last micro-batch; () without one.
      index: uint32 scalar, the number of loader batches in the run so far, from which keys are derived.
    """

    sums: MultiStepsState
    logs: Logs
    model_state: Tree
    index: Any


class FitState(NamedTuple):
    """The arrays of a run. Each micro-step donates them; copy an array to keep it longer.

    Attributes:
      params: the parameters.
      opt_state: the optimizer state; with clipping, the state of the optax chain.
      model_state: the model state at the last optimizer step; () without one.
      pending: the state of the open window.
    """

    params: Tree
    opt_state: Tree
    model_state: Tree
    pending: Pending


class WindowLogs(NamedTuple):
    """What a window logs, replicated over the devices.

    Attributes:
      means: the weighted means of the loss and the metrics, "train_loss" and so on, and "grad_norm" with
        `log_grad_norm`. They are NaN if the weight is 0.
      sums: the weighted sums of which they are the means; None without `log_epoch_means`.
      weight: Σ w, a scalar; None without `log_weight`.
      two_sizes: the arguments of `NoiseScale.update`; None without `log_noise`.
    """

    means: dict[str, jax.Array]
    sums: Logs | None
    weight: jax.Array | None
    two_sizes: tuple[jax.Array, jax.Array] | None = None


class Programs:
    """The compiled programs of a run, reused by later runs of the same kind.

    Each compiles at most twice per batch shape: for pieces that are known to count on every device, and for others.
    With `log_noise` on one device, `accumulate` also compiles for the first piece of a window, whose norm it takes.
    `accumulate` reads the parameters and updates only the pending sums; `step` adds the window's last piece and runs
    the optimizer; `flush` runs the optimizer on the pending sums; `window` is several accumulates and a step in one
    call. `optimizer` is the task's, chained after the Trainer's transformations. A micro-batch's key is derived from
    `key(seed)` by `fold_in` with the index of its loader batch. `WindowLogs` describes what the options `log_` add.
    """

    def __init__(
        self,
        task: Task,
        strategy: Strategy,
        optimizer: optax.GradientTransformation,
        nonfinite: str,
        seed: int,
        total_steps: int | None = None,
        log_grad_norm: bool = False,
        log_epoch_means: bool = False,
        log_weight: bool = False,
        log_noise: bool = False,
    ):
        self._task, self._strategy, self._sync, self.seed = task, strategy, strategy.sync, seed
        self._total_steps = total_steps  # The optimizer is made for, if this matters.
        self._objective = functools.partial(objective.objective, task, strategy, seed)
        self._weight = HostWeight(functools.partial(objective.returned, task), strategy.sync)
        # The host tracks K and passes `boundary` with every call; "noise" refuses a K of 1.
        self._tx = MultiSteps(
            optimizer,
            2 if log_noise else 1,
            nonfinite=nonfinite,
            gradient_norms="noise" if log_noise else "window" if log_grad_norm else None,
            **self._sync.options(),
        )
        self._measures_starts = norms.measures_starts(config_of(self._tx))
        self._log_grad_norm, self._log_epoch_means = log_grad_norm, log_epoch_means
        self._log_weight, self._log_noise = log_weight, log_noise
        self._kind: Any = None

    def fits(self, task: Task, seed: int, total_steps: int | None) -> bool:
        """Whether these are the programs for this task and seed, and for this number of steps if it matters."""
        return self._task is task and (self.seed, self._total_steps) == (seed, total_steps)

    def initial(
        self,
        batch: Tree,
        processes: Processes,
        replace: Callable[[Tree, Tree], tuple[Tree, Tree]] = lambda params, model_state: (params, model_state),
    ) -> FitState:
        """Initialises a run's state on the devices from a loader batch, and compiles the programs if needed.

        `replace` receives the parameters and the model state that `Task.init` returned, and returns those to start
        from.
        """
        batch = self._strategy.read(batch).arrays
        # An index that no loader batch has.
        key = jax.random.fold_in(jax.random.key(self.seed), np.uint32(2**32 - 1))
        made = replace(*self._strategy.of_first(_task.initial(self._task, key, batch)))
        # Copied, because steps donate them and the caller may keep the arrays that init returned.
        params, model_state = self._strategy.placed(made, self._strategy.common)
        del made  # Makes room for the optimizer's state.
        numeric.differentiable(params)
        piece, *_ = self._first_pieces(batch, processes)
        args = params, model_state, *piece.inputs
        shardings = self._shardings(*args[:2], *jax.eval_shape(self._begin, *args))
        kind = jax.tree.flatten(shardings)
        if kind != self._kind:  # Otherwise the previous run's programs are reused.
            self._compile(shardings)
            self._kind = kind
        opt_state, pending = self._start(*args)
        return FitState(params, opt_state, model_state, pending)

    def _first_pieces(self, batch: Tree, processes: Processes) -> list[Piece]:
        strategy = self._strategy
        if processes.count == 1:
            return strategy.pieces([batch])
        offers = processes.gather("the first batch", process_shards.offer(strategy, [batch]))
        return processes.together(lambda: process_shards.pieces(strategy, [batch], offers, batch))

    def _begin(self, params, model_state, batch, place):
        """Returns (optimizer state, empty pending state)."""
        sums: Any = self._tx.init(params)
        own, index = self._sync.local(jax.tree.map(jnp.copy, model_state)), jnp.zeros((), jnp.uint32)
        args = params, sums, own, batch, place, index
        _, (_, logs), *_ = jax.eval_shape(
            functools.partial(self._micro_step, False, boundary=Boundary(False, clears=True)), *args
        )
        logs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), logs)
        return sums.inner_opt_state, Pending(_without_step(sums), logs, own, index)

    def _shardings(self, params, model_state, opt_state, pending) -> FitState:
        """Returns the state's shardings: replicated, except for per-device sums and sharded optimizer state."""
        common, local = self._strategy.common, self._strategy.local
        everywhere = lambda tree, sharding: jax.tree.map(lambda _: sharding, tree)
        sums = everywhere(pending.sums, common)._replace(
            acc_grads=everywhere(pending.sums.acc_grads, local),
            weight=local,
            averages=everywhere(pending.sums.averages, local),
            dropped=local,
            norms=everywhere(pending.sums.norms, local),
        )
        return FitState(
            params=everywhere(params, common),
            opt_state=self._strategy.spread(opt_state),
            model_state=everywhere(model_state, common),
            pending=Pending(
                sums, everywhere(pending.logs, local), everywhere(pending.model_state, local), index=common
            ),
        )

    def _compile(self, shardings: FitState) -> None:
        common, local = self._strategy.common, self._strategy.local
        self._start = jax.jit(self._begin, out_shardings=(shardings.opt_state, shardings.pending))
        jit = functools.partial(jax.jit, static_argnames="counts")
        self._accumulate = jax.jit(
            self._add_piece,
            static_argnames=("counts", "starts"),
            donate_argnums=1,
            out_shardings=(shardings.pending, local),
        )
        self._step = jit(self._close_with, donate_argnums=0, out_shardings=(shardings, local, common))
        self._flush = jax.jit(self._close, donate_argnums=0, out_shardings=(shardings, common))
        self._window = jit(self._scan, donate_argnums=0, out_shardings=(shardings, local, common))

    def run(
        self,
        state: FitState,
        micro_steps: Sequence[MicroStep],
        *,
        starts: bool,
        boundary: bool,
        extra_args: dict[str, jax.Array],
    ) -> tuple[FitState, list[Outputs], WindowLogs | None]:
        """Runs one micro-step, or the rest of a window in one call. Donates `state`.

        Several micro-steps must have one piece each and equal shapes, and `boundary`, whether the window ends with the
        last of them, must be True. `starts` says whether it starts with the first. `extra_args` are those of the
        optimizer at a boundary. Returns (state, each micro-step's loss and metrics, the window's logs at a boundary or
        None).
        """
        params, opt_state, model_state, pending = state
        held = params, model_state
        counts = lambda piece: piece.is_full and self._weight.is_positive(held, piece.host)
        if len(micro_steps) > 1:
            pieces = [piece for micro_step in micro_steps for piece in micro_step.pieces]
            is_known = all(map(counts, pieces))
            state, logs, of_window = self._window(
                state, [piece.inputs for piece in pieces], extra_args, counts=is_known
            )
            return state, [Outputs([logs], (..., i)) for i in range(len(pieces))], of_window
        pieces = micro_steps[0].pieces
        outputs, of_window = [], None
        starts = starts and self._measures_starts
        for piece in pieces[:-1] if boundary else pieces:
            pending, logs = self._accumulate(params, pending, *piece.inputs, counts=counts(piece), starts=starts)
            outputs.append(logs)
            starts = False
        state = FitState(params, opt_state, model_state, pending)
        if boundary:
            state, logs, of_window = self._step(state, *pieces[-1].inputs, extra_args, counts=counts(pieces[-1]))
            outputs.append(logs)
        return state, [Outputs(outputs)], of_window

    def flush(self, state: FitState, extra_args: dict[str, jax.Array]) -> tuple[FitState, WindowLogs]:
        """Runs the optimizer on the pending sums and returns (state, the window's logs). Donates `state`."""
        return self._flush(state, extra_args)

    def redistribute(self, sums: MultiStepsState) -> MultiStepsState:
        """Converts pending sums from any number of devices to this one. Runs outside jit."""
        return self._tx.redistribute(sums, batch="weighted")  # A plain loss is weighted by its examples.

    # The functions below are jitted.

    def _add_piece(self, params, pending, batch, place, counts=False, starts: bool | None = False):
        boundary = Boundary(False, clears=True, starts=starts)
        _, _, pending, logs = self._add(counts, params, None, pending, batch, place, boundary, {})
        return pending, logs

    def _close_with(self, state, batch, place, extra_args, counts=False):
        boundary = Boundary(True, clears=True, starts=False)
        params, sums, pending, logs = self._add(
            counts, state.params, state.opt_state, state.pending, batch, place, boundary, extra_args
        )
        return self._closed(params, sums.inner_opt_state, pending), logs, self._window_logs(pending.logs, sums)

    def _scan(self, state, pieces, extra_args, counts=False):
        *others, (batch, place) = pieces
        packing = sum_packing.of(state.pending.sums.acc_grads)
        with_sums = lambda pending, sums: pending._replace(sums=pending.sums._replace(acc_grads=sums))
        pack = lambda pending: with_sums(pending, packing.pack(pending.sums.acc_grads))
        unpack = lambda pending: with_sums(pending, packing.unpack(pending.sums.acc_grads))

        def add(pending, piece):
            pending, logs = self._add_piece(state.params, unpack(pending), piece[0], piece[1], counts, starts=None)
            return pack(pending), logs

        pieces = jax.tree.map(lambda *x: jnp.stack(x), *others)
        pending, logs = jax.lax.scan(add, pack(state.pending), pieces)
        state = state._replace(pending=unpack(pending))
        state, last_logs, of_window = self._close_with(state, batch, place, extra_args, counts)
        # Micro-steps are stacked on the last axis, because the first one is sharded over the devices.
        together = lambda x, end: jnp.concatenate([jnp.moveaxis(x, 0, -1), end[..., None]], axis=-1)
        return state, jax.tree.map(together, logs, last_logs), of_window

    def _close(self, state, extra_args):
        sums = self._with_step(state.pending.sums, state.opt_state)
        updates, sums = self._tx.flush(sums, state.params, **extra_args)
        params = inner_update.apply_updates(state.params, updates)
        pending = state.pending._replace(sums=_without_step(with_cleared_sums(sums)))
        return self._closed(params, sums.inner_opt_state, pending), self._window_logs(pending.logs, sums)

    def _closed(self, params, opt_state, pending):
        """Returns the state after a window, with the model state averaged over the devices."""
        model_state = self._sync.averaged(pending.model_state)
        pending = pending._replace(model_state=self._sync.local(model_state))
        return FitState(params, opt_state, model_state, pending)

    def _window_logs(self, logs: Logs, sums: MultiStepsState) -> WindowLogs:
        """Returns the logs of a window, given those pending on each device and the sums after its optimizer step."""
        joined = self._sync.joined(logs)
        divide = lambda sums: jnp.where(sums.weight == 0, jnp.nan, weighted_sum.mean(sums, sums.total))
        means = {f"train_{name}": divide(sums) for name, sums in joined.items()}
        if self._log_grad_norm:
            means["grad_norm"] = sums.norms.window
        weight = joined["loss"].weight if self._log_weight else None
        two_sizes = sums.norms.two_sizes if self._log_noise else None
        return WindowLogs(means, joined if self._log_epoch_means else None, weight, two_sizes)

    def _micro_step(self, counts, params, sums, *args, boundary, extra_args=None):
        """Adds a piece, as `LossStep` does, whose rest is (model state, logs); sums are 0 at a window's start."""
        step = LossStep(config_of(self._tx), self._objective, objective.ROLES, counts)
        return step(params, sums, args, boundary, extra_args)

    def _add(self, counts, params, opt_state, pending, batch, place, boundary, extra_args):
        """Adds a piece and returns (params, sums, pending, logs); runs the optimizer at a boundary."""
        sums = self._with_step(pending.sums, opt_state)
        args = params, sums, pending.model_state, batch, place, pending.index
        _, (model_state, logs), _, params, sums = self._micro_step(
            counts, *args, boundary=boundary, extra_args=extra_args
        )
        weight = logs["loss"].weight
        keep = jnp.logical_and(weight != 0, sums.dropped == pending.sums.dropped)
        first = pending.sums.mini_step == 0
        add = lambda total, x: weighted_sum.add(total, x, keep=keep, first=first)
        pending = Pending(
            sums=_without_step(sums),
            logs=jax.tree.map(add, pending.logs, logs),
            model_state=weighted_sum.select(keep, model_state, pending.model_state),
            index=pending.index + place[2].astype(jnp.uint32),
        )
        return params, sums, pending, logs

    def _with_step(self, sums: MultiStepsState, opt_state: Tree) -> MultiStepsState:
        """Returns the state of `MultiSteps` for pending sums; the norm is NaN until an optimizer step."""
        of_window = norms.zeros(config_of(self._tx))
        if of_window:
            of_window = of_window._replace(window=jnp.full_like(of_window.window, jnp.nan))
        if sums.norms:
            of_window = of_window._replace(pending=sums.norms.pending)
        return sums._replace(inner_opt_state=opt_state, norms=of_window)


def _without_step(sums: MultiStepsState) -> MultiStepsState:
    """Drops what does not belong to the pending sums: `FitState` holds it, or no checkpoint does."""
    has_pending = sums.norms and sums.norms.pending is not None
    return sums._replace(
        inner_opt_state=None, norms=GradientNorms(None, pending=sums.norms.pending) if has_pending else ()
    )
