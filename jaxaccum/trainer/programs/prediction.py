"""Prediction: a task's `predict` on each loader batch, on the training devices."""

import collections
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxaccum import task as _task
from jaxaccum._devices import mesh_map
from jaxaccum._devices.topology import OneDevice
from jaxaccum._types import Tree
from jaxaccum.distributed.process_group import Processes
from jaxaccum.task import Task
from jaxaccum.trainer.input.prefetch import AHEAD, micro_steps
from jaxaccum.trainer.input.strategies import Piece, Strategy
from jaxaccum.trainer.programs import step_outputs


class Prediction:
    """The prediction program of a task."""

    def __init__(self, task: Task, strategy: Strategy, processes: Processes):
        self._strategy, self._processes = strategy, processes
        self._predict = jax.jit(functools.partial(_on_devices, task, strategy), out_shardings=strategy.local)

    def run(self, params: Tree, model_state: Tree, batches: Iterable[Tree]) -> list[Tree]:
        """Returns what `predict` returns for each of this process's batches, in NumPy arrays."""
        params, model_state = self._strategy.held((params, model_state))
        found: list[Tree] = []
        running: collections.deque[list[tuple[Piece, Tree]]] = collections.deque()
        for micro_step in micro_steps(batches, self._strategy, self._processes, may_differ=True):
            running.append([(piece, self._predict(params, model_state, piece.batch)) for piece in micro_step.pieces])
            if len(running) > AHEAD:
                found += self._fetched(running.popleft())
        for outputs in running:
            found += self._fetched(outputs)
        return found

    def _fetched(self, outputs: Sequence[tuple[Piece, Tree]]) -> list[Tree]:
        """Returns the predictions of a micro-step, one for each of this process's batches; waits for the device."""
        strategy = self._strategy
        if strategy.size == 1:
            return [jax.tree.map(np.asarray, output) for _, output in outputs]
        shares = []
        for piece, output in outputs:
            first, present, _ = np.asarray(piece.place)
            stacked = jax.tree.map(step_outputs.own, output)
            for i in range(strategy.own):
                device = strategy.own * strategy.process_index + i
                if first % strategy.size <= device < first % strategy.size + present:
                    shares.append(jax.tree.map(lambda x, i=i: x[i], stacked))
        if strategy.name != "dp" or not shares:
            return shares
        return [jax.tree.map(lambda *parts: _joined(parts), *shares)]


def _on_devices(task: Task, strategy: Strategy, params: Tree, model_state: Tree, batch: Tree) -> Tree:
    """Returns the predictions of a piece; on several devices with a leading axis of devices."""
    sync, args = strategy.sync, (params, model_state, batch)
    if isinstance(sync, OneDevice):
        return _task.predicted(task, *args)
    body = lambda *args: jax.tree.map(lambda x: jnp.asarray(x)[None], _task.predicted(task, *args))
    return mesh_map.on_data_axes(body, sync, args, {}, split=(2,), split_dim=0, out_specs=P(sync.names))


def _joined(shares: Sequence[np.ndarray]) -> np.ndarray:
    if not shares[0].ndim:
        raise ValueError(
            "predict returned a scalar, which can't be split over the examples of a batch: with strategy='dp' it must "
            "return arrays with one entry for each example."
        )
    return np.concatenate(shares)
