"""Measures the gradient noise scale of a run."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._choosing.noise_scale import NoiseEstimate, NoiseScale, NoiseScaleState
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.task import Task


class NoiseScaleMonitor(Callback):
    """Logs the gradient noise scale, with its confidence interval, beside the weight of a window.

    Records get "noise_scale", "noise_scale_low", "noise_scale_high" and "window_weight", and `Trainer.plot` draws them.
    All are in examples, or in the units of the weights of a `Weighted` loss, such as tokens. A window that weighs much
    less than the noise scale makes almost twice the progress in an optimizer step with twice the K; one that weighs
    much more, hardly any more.

    The windows themselves provide the norms, as with `gradient_norms="noise"` (see `NoiseScale`). On one device these
    are the norms of a window's first micro-batch and of the whole window, so K must be above 1 there, and windows of
    one micro-step are left out. On several devices they are the norms of the devices' own sums and of the whole window;
    a window that ran on one device alone is left out. Nothing waits for the devices. The state is saved with the run.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxaccum
      >>> task = jaxaccum.Task(
      ...     init=lambda key, batch: jnp.zeros(3),
      ...     loss=lambda w, x, key: jnp.mean((x @ w - 1.0) ** 2),
      ...     optimizer=optax.sgd(0.01),
      ... )
      >>> loader = [jax.random.normal(key, (8, 3)) + 1.0 for key in jax.random.split(jax.random.key(0), 80)]
      >>> monitor = NoiseScaleMonitor()
      >>> trainer = jaxaccum.Trainer(
      ...     accumulate_grad_batches=4,
      ...     max_epochs=1,
      ...     strategy="single",
      ...     callbacks=monitor,
      ...     log_every_n_steps=10,
      ...     enable_progress_bar=False,
      ... )
      >>> state = trainer.fit(task, loader)
      >>> logged = trainer.callback_metrics
      >>> logged["noise_scale_low"] < logged["noise_scale"] < logged["noise_scale_high"], logged["window_weight"]
      (True, 32.0)

    Args:
      scale: how windows are averaged, and the probability of the interval.

    Raises:
      TypeError: if `scale` is not a `NoiseScale`.
    """

    def __init__(self, scale: NoiseScale = NoiseScale()):  # noqa: B008 - it is immutable
        if not isinstance(scale, NoiseScale):
            raise TypeError(f"scale must be a jaxaccum.NoiseScale, got {scale!r}.")
        self.scale = scale
        self.estimate: Any = None  # A `NoiseEstimate` on the device; None before the run's first window.

    @property
    def settings(self) -> str:
        """What the processes of a run must agree on."""
        return f"{type(self).__qualname__}({self.scale})"

    def begin(self) -> None:
        """Starts a run."""
        self._state: NoiseScaleState = self.scale.init()
        self.estimate = None

    def close_window(self, weight: Any, two_sizes: Any) -> None:
        """Adds a window of this weight and these two sizes, without waiting. The Trainer calls it before the hooks."""
        # All devices have the same values, so that each process computes the same from its own.
        own = jax.tree.map(lambda x: x.addressable_data(0), two_sizes)
        state = jax.device_put(self._state, own[0].sharding)
        self._state, self.estimate = _updated(self.scale, state, *own)
        self._weight = weight

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        if trainer.should_log:
            trainer.log("noise_scale", self.estimate.scale)
            trainer.log("noise_scale_low", self.estimate.low)
            trainer.log("noise_scale_high", self.estimate.high)
            trainer.log("window_weight", self._weight)

    def state_dict(self) -> dict[str, Any]:
        return {name: np.asarray(x).tolist() for name, x in self._state._asdict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        numbers = {name: state_dict[name] for name in NoiseScaleState._fields}
        self._state = jax.tree.map(lambda old, x: jnp.asarray(x, old.dtype), self._state, NoiseScaleState(**numbers))


@functools.partial(jax.jit, static_argnums=0)
def _updated(
    scale: NoiseScale, state: NoiseScaleState, squares: jax.Array, sizes: jax.Array
) -> tuple[NoiseScaleState, NoiseEstimate]:
    """The state with another window, and its estimates."""
    state = scale.update(state, squares, sizes)
    return state, scale.estimate(state)
