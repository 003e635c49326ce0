"""An exponential moving average of the parameters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._sums import weighted_sum
from jaxaccum._types import Tree
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.task import Task


class EMA(Callback):
    """Keeps an exponential moving average of the parameters, with which the Trainer validates.

    It starts at the parameters that the run starts from. After each optimizer step it is `decay * average + (1 - decay)
    * params`, without bias correction. It is stored in float32 or wider.

    `fit` validates with the average, and `Trainer.validate`, `test` and `predict` use it unless they are given a state.
    The parameters that `fit` returns, and those of `jaxaccum.checkpoint.load(path, like=params)`, are those of the last
    step. Checkpoints keep the average as arrays named ".average" in place of ".params". A run that resumes from a
    checkpoint without an average starts one there.

    Example:
      >>> import numpy as np, optax, jaxaccum
      >>> task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), lambda w, x, key: w * x.mean(), optax.sgd(1.0))
      >>> ema = EMA(decay=0.75)
      >>> trainer = jaxaccum.Trainer(max_epochs=1, strategy="single", callbacks=ema, enable_progress_bar=False)
      >>> state = trainer.fit(task, [np.full(2, 4, np.float32)] * 2)
      >>> print(state.params, ema.params)  # 0.75 * (0.25 * -4) + 0.25 * -8
      -8.0 -2.75

    Args:
      decay: the weight of the former average, from 0 to below 1.

    Raises:
      ValueError: for an invalid argument.
    """

    def __init__(self, decay: float = 0.999):
        if isinstance(decay, (bool, str)) or not 0 <= decay < 1:
            raise ValueError(f"decay must be a number from 0 to below 1, such as 0.999, got {decay!r}.")
        self.decay = float(decay)
        self.average: Tree = None  # As it is stored; a resume replaces it.
        self._dtypes: Tree = None
        self._step = 0  # The optimizer step that it includes.

    @property
    def params(self) -> Tree:
        """The average, in the dtypes of the parameters; None before the first `fit`.

        The next optimizer step may delete its arrays; copy them to keep them longer.
        """
        return jax.tree.map(lambda x, dtype: x.astype(dtype), self.average, self._dtypes)

    def begin(self, params: Tree, step: int) -> None:
        """Starts at a copy of the parameters after optimizer step `step`."""
        self.average = jax.tree.map(_stored, params)
        self._dtypes, self._step = jax.tree.map(lambda x: x.dtype, params), step

    def on_fit_start(self, trainer: TrainerView, task: Task) -> None:
        self._follow(trainer)  # A hook that raised may have left the last step to the resumed run.

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        self._follow(trainer)  # A stop may have flushed a window.

    def on_exception(self, trainer: TrainerView, task: Task, error: BaseException) -> None:
        self._follow(trainer)

    def _follow(self, trainer: TrainerView) -> None:
        """Includes an optimizer step, if there is a new one."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.average = _moved(self.average, trainer.state.params, self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _moved(average: Tree, params: Tree, decay: float) -> Tree:
    return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x.astype(old.dtype), average, params)


def _stored(x: jax.Array) -> jax.Array:
    """Returns a copy in float32 or wider; in half precision an average would not move."""
    return jnp.copy(x).astype(weighted_sum.promoted(x.dtype, jnp.float32))
