"""Lets K follow the gradient noise scale."""

from typing import Any

from jaxaccum._choosing import adaptive
from jaxaccum._choosing.noise_scale import NoiseScale
from jaxaccum.callbacks.noise_scale import NoiseScaleMonitor

WARM_UP = 10  # The number of windows before K may change: the interval from a few windows is too narrow.


class AdaptiveAccumulation(NoiseScaleMonitor):
    """Sets K so that a window weighs as much as the gradient noise scale, and logs as `NoiseScaleMonitor`.

    The run starts with the Trainer's `accumulate_grad_batches`, moved into the bounds. From then on K changes at the
    start of a window, by the rule `jaxaccum.AdaptiveAccumulation`, if the window of the present K is outside of the
    confidence interval of the noise scale. K of a window follows from all windows but the one just before it, which the
    devices may still run: nothing waits, and K is the same in every process and after a resume. The first ten windows
    that it measures change nothing. No program depends on K, except with `fuse_windows`, which compiles one for each K.

    `chosen` has the schedule that the run chose. `Trainer(accumulate_grad_batches=AccumulationSchedule(chosen,
    by="step"))` repeats its windows.

    `learning_rate` scales the updates of the optimizer, after all of its transformations, by K / K₀ or its square root,
    where K₀ is the run's first K. For optimizers whose updates are proportional to the learning rate, as those of
    optax's `sgd` and `adamw` are, this scales the learning rate. `LearningRateMonitor` logs it without the factor.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxaccum
      >>> task = jaxaccum.Task(
      ...     init=lambda key, batch: jnp.zeros(64), loss=lambda w, x, key: jnp.mean(x @ w), optimizer=optax.sgd(0.1)
      ... )
      >>> loader = list(jax.random.normal(jax.random.key(0), (400, 4, 64)) + 1 / 8)  # |G|² = 1, tr(Σ) = 64
      >>> adaptive = AdaptiveAccumulation(min_k=2, max_k=32)
      >>> trainer = jaxaccum.Trainer(
      ...     accumulate_grad_batches=2, max_epochs=1, strategy="single", callbacks=adaptive, enable_progress_bar=False
      ... )
      >>> state = trainer.fit(task, loader)
      >>> adaptive.chosen[0], 10 < adaptive.every_k < 24  # 64 / 4 is 16.
      (2, True)
      >>> schedule = jaxaccum.AccumulationSchedule(adaptive.chosen, by="step")  # for accumulate_grad_batches

    Args:
      min_k: the smallest K; at least 2 on one device, where a window of one micro-step tells nothing of the noise.
      max_k: the largest K.
      hysteresis: by which fraction the K that the noise scale asks for may differ from K without changing it.
      learning_rate: how the learning rate follows K: "linear", "sqrt" or "none".
      scale: how windows are averaged, and the probability of the interval.

    Raises:
      TypeError, ValueError: as `jaxaccum.AdaptiveAccumulation` and `NoiseScaleMonitor`.
    """

    def __init__(
        self,
        min_k: int,
        max_k: int,
        hysteresis: float = 0.25,
        learning_rate: str = "none",
        scale: NoiseScale = NoiseScale(),  # noqa: B008 - it is immutable
    ):
        self.rule = adaptive.AdaptiveAccumulation(min_k, max_k, hysteresis, learning_rate)
        self.chosen: dict[int, int] = {}
        super().__init__(scale)

    @property
    def settings(self) -> str:
        return f"{super().settings}({self.rule})"

    @property
    def follows_k(self) -> bool:
        """Whether the learning rate follows K."""
        return self.rule.learning_rate != "none"

    @property
    def learning_rate_factor(self) -> float:
        """The factor for the learning rate of the present window."""
        return self.rule.learning_rate_factor(self.every_k, self.chosen[0])

    @property
    def every_k(self) -> int:
        """The present K."""
        return next(reversed(self.chosen.values()))

    def start(self, every_k: int) -> None:
        """Starts with K = `every_k`, moved into the bounds."""
        self.chosen = {0: min(max(every_k, self.rule.min_k), self.rule.max_k)}
        self._weights = self._micro_steps = 0.0
        self._windows = 0

    def measured(self, weight: Any, micro_steps: int) -> tuple[Any, ...]:
        """What `follow` needs of the window that was just closed: numbers and scalars on the devices."""
        return self.estimate.low, self.estimate.scale, self.estimate.high, weight, micro_steps

    def follow(self, step: int, low: float, scale: float, high: float, weight: float, micro_steps: int) -> None:
        """Decides K of window `step` by what a window measured."""
        self._windows += 1
        self._weights = self.scale.decay * self._weights + weight
        self._micro_steps = self.scale.decay * self._micro_steps + micro_steps
        micro_step = self._weights / self._micro_steps
        is_outside = not low <= self.every_k * micro_step <= high
        if self._windows >= WARM_UP and micro_step > 0 and is_outside:
            every_k = self.rule.next_k(self.every_k, scale, micro_step)
            if every_k != self.every_k:
                self.chosen[step] = every_k

    def state_dict(self) -> dict[str, Any]:
        sizes = {"windows": self._windows, "weights": self._weights, "micro_steps": self._micro_steps}
        return {**super().state_dict(), **sizes, "chosen": self.chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._windows = state_dict["windows"]
        self._weights, self._micro_steps = state_dict["weights"], state_dict["micro_steps"]
        self.chosen = dict(state_dict["chosen"])
