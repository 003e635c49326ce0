"""Validation and test: computes the weighted means of a loss and its metrics, on the training devices."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum.distributed.process_group import Processes
from jaxaccum.task import Task
from jaxaccum.trainer.input.prefetch import micro_steps
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.programs import objective, step_outputs
from jaxaccum.trainer.programs.objective import Logs
from jaxaccum.trainer.programs.prediction import Prediction


class Evaluation:
    """The validation program, which adds each piece's loss and metrics to sums on the devices, and the prediction."""

    def __init__(self, task: Task, strategy: Strategy, processes: Processes):
        self.task, self._strategy, self._processes = task, strategy, processes
        self.prediction = Prediction(task, strategy, processes)
        self._losses = functools.partial(objective.losses, task, strategy)
        self._add = jax.jit(self._added, donate_argnums=0, out_shardings=strategy.local)

    def run(
        self,
        params: Tree,
        model_state: Tree,
        loaders: Mapping[str, Iterable[Tree]],
        look: Callable[[], None] = lambda: None,
        stage: str = "val",
    ) -> dict[str, float]:
        """Returns the means of loss and metrics over all processes, for each loader by its name.

        The results are named "val_loss", or "val_loss/name" if the loader's name is not "". `look` is called before
        each micro-step and may raise. Raises ValueError if a loader has no batches.
        """
        params, model_state = self._strategy.held((params, model_state))
        results = {}
        for name, batches in loaders.items():
            suffix = f"/{name}" if name else ""
            means = self._means(params, model_state, batches, look)
            if means is None:
                remedy = ", or limit_val_batches=0 for no validation" if stage == "val" else ""
                raise ValueError(
                    f"{stage}_loader{f'[{name!r}]' if name else ''} gave no batch: pass something that can be iterated "
                    f"again and again, such as a list{remedy}."
                )
            results |= {f"{stage}_{metric}{suffix}": mean for metric, mean in means.items()}
        return results

    def _means(
        self, params: Tree, model_state: Tree, batches: Iterable[Tree], look: Callable[[], None]
    ) -> dict[str, float] | None:
        """Returns the means over one loader; None without batches."""
        strategy, processes = self._strategy, self._processes
        sums: Logs | None = None
        for micro_step in micro_steps(batches, strategy, processes, may_differ=True):
            look()
            for piece in micro_step.pieces:
                args = params, model_state, *piece.inputs
                sums = self._zeros(*args) if sums is None else sums
                sums = self._add(sums, *args)
        if sums is None:
            return None
        own = {name: step_outputs.summed([part]) for name, part in sums.items()}
        of_all = processes.gather("a validation's end", own)
        parts = {name: [Weighted(*sums_of_one[name]) for sums_of_one in of_all] for name in own}
        return {name: _mean(part) for name, part in parts.items()}

    def _zeros(self, *args: Any) -> Logs:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(self._losses, *args))
        return self._strategy.placed(zeros, self._strategy.local)

    def _added(self, sums, *args):
        return jax.tree.map(jax.numpy.add, sums, self._losses(*args))


def _mean(parts: list[Weighted]) -> float:
    total, weight = (sum(column) for column in zip(*parts, strict=True))
    return total / weight if weight else float("nan")
