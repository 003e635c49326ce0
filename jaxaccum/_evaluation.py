"""Validation: the weighted means of a loss over a loader, on the devices of training."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxaccum import _outputs, _pieces
from jaxaccum._feed import micro_steps
from jaxaccum._pieces import Logs
from jaxaccum._strategy import Strategy
from jaxaccum.task import Task

Tree = Any


class Evaluation:
    """The program that adds a piece's loss and metrics to sums, which the devices keep until the end.

    Args:
      task: whose loss.
      strategy: the devices.
    """

    def __init__(self, task: Task, strategy: Strategy):
        self._strategy = strategy
        self._losses = functools.partial(_pieces.losses, task, strategy)
        self._add = jax.jit(self._added, donate_argnums=0, out_shardings=strategy.local)

    def run(self, params: Tree, model_state: Tree, batches: Iterable[Tree]) -> dict[str, float]:
        """The means of loss and metrics, with "val_" before their names.

        Raises:
          ValueError: if there is no batch.
        """
        params, model_state = jax.device_put((params, model_state), self._strategy.common)
        sums: Logs | None = None
        for micro_step in micro_steps(batches, self._strategy):
            for piece in micro_step.pieces:
                sums = self._zeros(params, model_state, *piece) if sums is None else sums
                sums = self._add(sums, params, model_state, *piece)
        if sums is None:
            raise ValueError(
                "val_loader gave no batch: pass something that can be iterated again and again, such as a list, "
                "or limit_val_batches=0 for no validation."
            )
        return {f"val_{name}": _outputs.mean([part]) for name, part in sums.items()}

    def _zeros(self, *args: Any) -> Logs:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(self._losses, *args))
        return jax.device_put(zeros, self._strategy.local, may_alias=False)

    def _added(self, sums, *args):
        return jax.tree.map(jax.numpy.add, sums, self._losses(*args))
