"""The compiled programs of a run, and the arrays that go through them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum import task as _task
from jaxaccum._gradient import sum_packing
from jaxaccum._multi_steps import inner_update, loss_step, stepping
from jaxaccum._multi_steps.api import MultiSteps
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import numeric, weighted_sum
from jaxaccum._types import Tree
from jaxaccum.task import Task
from jaxaccum.trainer.input import process_shards
from jaxaccum.trainer.input.prefetch import MicroStep
from jaxaccum.trainer.input.strategies import Piece, Strategy
from jaxaccum.trainer.programs import objective
from jaxaccum.trainer.programs.objective import Logs
from jaxaccum.trainer.programs.step_outputs import Outputs


class Pending(NamedTuple):
    """What an open window holds, on P devices each its own: all of its arrays but `index` are (P, ...) then.

    Attributes:
      sums: of the gradients; a `MultiStepsState` without its `inner_opt_state`.
      logs: of the loss and the metrics, as scalars.
      model_state: the model's state after the last micro-batch; () without.
      index: uint32 scalar, the loader batches that went into the run so far, which number the keys.
    """

    sums: MultiStepsState
    logs: Logs
    model_state: Tree
    index: Any


class FitState(NamedTuple):
    """All arrays of a run. Each micro-step donates them: to keep one beyond it, copy it.

    Attributes:
      params: the parameters.
      opt_state: the optimizer's state; with clipping, of the chain of both.
      model_state: the model's state at the last optimizer step; () without.
      pending: what the open window holds.
    """

    params: Tree
    opt_state: Tree
    model_state: Tree
    pending: Pending


class Programs:
    """The programs of a run and of those like it, each compiled at most once for a shape of batch.

    `accumulate` takes parameters and pending sums and nothing else; `step` adds the window's last piece and runs the
    optimizer; `flush` runs it on what is pending; `window` is as many accumulates as it takes and a step, in one.

    Args:
      task: what to train.
      strategy: the devices.
      optimizer: the task's, with what goes before it once a window.
      nonfinite: as for `MultiSteps`.
      seed: the key of a micro-batch is `fold_in(key(seed), index of the loader batch)`.
    """

    def __init__(
        self, task: Task, strategy: Strategy, optimizer: optax.GradientTransformation, nonfinite: str, seed: int
    ):
        self._task, self._strategy, self._sync, self._seed = task, strategy, strategy.sync, seed
        self._objective = functools.partial(objective.objective, task, strategy, seed)
        # K is the host's to know: every call says whether it is a boundary.
        self._tx = MultiSteps(optimizer, 1, nonfinite=nonfinite, **self._sync.options())
        self._kind: Any = None

    def initial(self, batch: Tree) -> FitState:
        """The state at the start of a run, on the devices, and the programs for it.

        Args:
          batch: a loader batch, for `task.init`.
        """
        batch = self._strategy.read(batch).arrays
        # The last number that a key is folded with, which no loader batch has.
        key = jax.random.fold_in(jax.random.key(self._seed), np.uint32(2**32 - 1))
        made = self._strategy.of_first(_task.initial(self._task, key, batch))
        # Copied: every step donates them, and init may return arrays that the caller keeps.
        params, model_state = self._strategy.placed(made, self._strategy.common)
        numeric.differentiable(params)
        piece, *_ = self._first_pieces(batch)
        args = params, model_state, *piece
        shardings = self._shardings(*args[:2], *jax.eval_shape(self._begin, *args))
        kind = jax.tree.flatten(shardings)
        if kind != self._kind:  # Else the programs of the run before serve this one too.
            self._compile(shardings)
            self._kind = kind
        opt_state, pending = self._start(*args)
        return FitState(params, opt_state, model_state, pending)

    def _first_pieces(self, batch: Tree) -> list[Piece]:
        strategy = self._strategy
        if strategy.processes.count == 1:
            return strategy.pieces([batch])
        offers = strategy.processes.gather("the first batch", process_shards.offer(strategy, [batch]))
        return strategy.processes.together(lambda: process_shards.pieces(strategy, [batch], offers, batch))

    def _begin(self, params, model_state, batch, place):
        """(optimizer state, an empty window)."""
        sums: Any = self._tx.init(params)
        own, index = self._sync.local(jax.tree.map(jnp.copy, model_state)), jnp.zeros((), jnp.uint32)
        args = params, sums, own, batch, place, index
        _, (_, logs), _, _ = jax.eval_shape(functools.partial(self._micro_step, boundary=False), *args)
        logs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), logs)
        return sums.inner_opt_state, Pending(sums._replace(inner_opt_state=None), logs, own, index)

    def _shardings(self, params, model_state, opt_state, pending) -> FitState:
        """Where all of it lies: on every device, but for what an open window holds and what a strategy spreads."""
        common, local = self._strategy.common, self._strategy.local
        everywhere = lambda tree, sharding: jax.tree.map(lambda _: sharding, tree)
        sums = everywhere(pending.sums, common)._replace(
            acc_grads=everywhere(pending.sums.acc_grads, local),
            weight=local,
            averages=everywhere(pending.sums.averages, local),
            dropped=local,
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
        self._accumulate = jax.jit(self._add_piece, donate_argnums=1, out_shardings=(shardings.pending, local))
        self._step = jax.jit(self._close_with, donate_argnums=0, out_shardings=(shardings, local, common))
        self._flush = jax.jit(self._close, donate_argnums=0, out_shardings=(shardings, common))
        self._window = jax.jit(self._scan, donate_argnums=0, out_shardings=(shardings, local, common))

    def run(
        self, state: FitState, micro_steps: Sequence[MicroStep], boundary: bool, share: jax.Array | None
    ) -> tuple[FitState, list[Outputs], dict[str, jax.Array] | None]:
        """One micro-step, or in one call all that are left of a window.

        Args:
          state: is donated.
          micro_steps: where there are several, each has one piece, and all have the same shapes.
          boundary: whether the window ends with the last of them; several end one.
          share: at a boundary, what to multiply the window's gradient with; None is 1.

        Returns:
          (state, each micro-step's loss and metrics, at a boundary the window's means).
        """
        if len(micro_steps) > 1:
            pieces = [piece for micro_step in micro_steps for piece in micro_step.pieces]
            state, logs, means = self._window(state, pieces, share)
            return state, [Outputs([logs], (..., i)) for i in range(len(pieces))], means
        pieces = micro_steps[0].pieces
        params, opt_state, model_state, pending = state
        outputs, means = [], None
        for piece in pieces[:-1] if boundary else pieces:
            pending, logs = self._accumulate(params, pending, *piece)
            outputs.append(logs)
        state = FitState(params, opt_state, model_state, pending)
        if boundary:
            state, logs, means = self._step(state, *pieces[-1], share)
            outputs.append(logs)
        return state, [Outputs(outputs)], means

    def flush(self, state: FitState, share: jax.Array | None) -> tuple[FitState, dict[str, jax.Array]]:
        """An optimizer step on what is pending: (state, the window's means). `state` is donated."""
        return self._flush(state, share)

    def redistribute(self, sums: MultiStepsState) -> MultiStepsState:
        """The sums of an open window, from any number of devices, for these. For the host."""
        return self._tx.redistribute(sums, batch="weighted")  # A plain loss weighs its examples.

    # What is compiled.

    def _add_piece(self, params, pending, batch, place):
        _, _, pending, logs = self._add(params, None, pending, batch, place, boundary=False)
        return pending, logs

    def _close_with(self, state, batch, place, share):
        share = {} if share is None else {"share": share}
        params, opt_state, pending, logs = self._add(
            state.params, state.opt_state, state.pending, batch, place, boundary=True, **share
        )
        return self._closed(params, opt_state, pending), logs, self._means(pending.logs)

    def _scan(self, state, pieces, share):
        *others, (batch, place) = pieces
        packing = sum_packing.of(state.pending.sums.acc_grads)
        with_sums = lambda pending, sums: pending._replace(sums=pending.sums._replace(acc_grads=sums))
        pack = lambda pending: with_sums(pending, packing.pack(pending.sums.acc_grads))
        unpack = lambda pending: with_sums(pending, packing.unpack(pending.sums.acc_grads))

        def add(pending, piece):
            pending, logs = self._add_piece(state.params, unpack(pending), *piece)
            return pack(pending), logs

        pieces = jax.tree.map(lambda *x: jnp.stack(x), *others)
        pending, logs = jax.lax.scan(add, pack(state.pending), pieces)
        state, last_logs, means = self._close_with(state._replace(pending=unpack(pending)), batch, place, share)
        # The micro-steps on the last axis: the devices' stays the first, and says where they lie.
        together = lambda x, end: jnp.concatenate([jnp.moveaxis(x, 0, -1), end[..., None]], axis=-1)
        return state, jax.tree.map(together, logs, last_logs), means

    def _close(self, state, share):
        share = {} if share is None else {"share": share}
        sums = state.pending.sums._replace(inner_opt_state=state.opt_state)
        updates, sums = self._tx.flush(sums, state.params, **share)
        params = inner_update.apply_updates(state.params, updates)
        pending = state.pending._replace(sums=stepping.cleared(sums)._replace(inner_opt_state=None))
        return self._closed(params, sums.inner_opt_state, pending), self._means(pending.logs)

    def _closed(self, params, opt_state, pending):
        """The state after a window: the model's state is every device's again."""
        model_state = self._sync.averaged(pending.model_state)
        pending = pending._replace(model_state=self._sync.local(model_state))
        return FitState(params, opt_state, model_state, pending)

    def _means(self, logs: Logs) -> dict[str, jax.Array]:
        """The window's weighted means; NaN where it weighs nothing."""
        joined = self._sync.joined(logs)
        divide = lambda sums: jnp.where(sums.weight == 0, jnp.nan, weighted_sum.mean(sums, sums.total))
        return {name: divide(sums) for name, sums in joined.items()}

    def _micro_step(self, params, sums, *args, boundary, extra_args=None):
        """(loss, (model state, logs), params, sums) with one more piece; sums are 0 where a window begins."""
        config = self._tx._config
        options = {"own": objective.OWN, "boundary": boundary, "clears": True, "extra_args": extra_args}
        return loss_step.step(config, self._objective, objective.ROLES, params, sums, args, **options)

    def _add(self, params, opt_state, pending, batch, place, boundary, **extra_args):
        """(params, opt_state, pending, logs) with one more piece; the optimizer runs at a boundary."""
        sums = pending.sums._replace(inner_opt_state=opt_state)
        args = params, sums, pending.model_state, batch, place, pending.index
        _, (model_state, logs), params, sums = self._micro_step(*args, boundary=boundary, extra_args=extra_args)
        weight = logs["loss"].weight
        counts = jnp.logical_and(weight != 0, sums.dropped == pending.sums.dropped)
        first = pending.sums.mini_step == 0
        add = lambda total, x: weighted_sum.add(total, x, keep=counts, first=first)
        pending = Pending(
            sums=sums._replace(inner_opt_state=None),
            logs=jax.tree.map(add, pending.logs, logs),
            model_state=weighted_sum.select(counts, model_state, pending.model_state),
            index=pending.index + place[2].astype(jnp.uint32),
        )
        return params, sums.inner_opt_state, pending, logs
