"""`AdaptiveAccumulation`: K from the gradient noise scale, as pure functions."""

import dataclasses
import math

from jaxaccum._integers import is_number, positive_int

_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclasses.dataclass(frozen=True)
class AdaptiveAccumulation:
    """The rule by which K follows the gradient noise scale, and the learning rate follows K.

    Example:
      >>> rule = AdaptiveAccumulation(min_k=2, max_k=64, learning_rate="sqrt")
      >>> rule.next_k(8, noise_scale=1000.0, micro_step_size=32)  # 1000 / 32 examples
      31
      >>> rule.next_k(8, noise_scale=300.0, micro_step_size=32)  # 9.4: within the hysteresis
      8
      >>> rule.learning_rate_factor(32, reference_k=8)
      2.0

    A window of K micro-steps should weigh as much as the noise scale (see `NoiseScale`). K moves if that needs a K
    outside [K / (1 + hysteresis), K · (1 + hysteresis)]: the noise scale is an estimate, and each change of K is a
    change of the batch that the optimizer's moments average over. The rule holds no state and runs on the host: the
    same numbers give the same K in each process.

    Args:
      min_k: the smallest K, an integer of at least 1.
      max_k: the largest K, an integer of at least `min_k`.
      hysteresis: by which fraction the K that the noise scale asks for may differ from K without changing it, at
        least 0.
      learning_rate: how the learning rate follows K: "linear", "sqrt" or "none".

    Raises:
      TypeError, ValueError: if a bound is not an integer of at least 1, if `max_k` is below `min_k`, if `hysteresis` is
        negative or not finite, or if `learning_rate` is none of the three.
    """

    min_k: int
    max_k: int
    hysteresis: float = 0.25
    learning_rate: str = "none"

    def __post_init__(self):
        for name in ("min_k", "max_k"):
            object.__setattr__(self, name, positive_int(getattr(self, name), name))
        if self.max_k < self.min_k:
            raise ValueError(f"max_k must be at least min_k, got min_k={self.min_k} and max_k={self.max_k}.")
        if not (is_number(self.hysteresis) and 0 <= self.hysteresis < math.inf):
            raise ValueError(f"hysteresis must be a finite number of at least 0, got {self.hysteresis!r}.")
        if self.learning_rate not in _EXPONENTS:
            raise ValueError(f"learning_rate must be one of {tuple(_EXPONENTS)}, got {self.learning_rate!r}.")

    def next_k(self, every_k: int, noise_scale: float, micro_step_size: float) -> int:
        """The K of the next window.

        Args:
          every_k: the present K.
          noise_scale: B_simple, smoothed, as `NoiseScale.estimate` gives it; infinite asks for `max_k`, and NaN for no
            change. It is infinite before the first window, so first wait for some.
          micro_step_size: what one micro-step weighs on all devices, in the units of `noise_scale`: N·P examples.

        Returns:
          K, within the bounds.

        Raises:
          TypeError, ValueError: if `every_k` is not an integer of at least 1, if `noise_scale` is negative, or if
            `micro_step_size` is not a finite number above 0.
        """
        every_k, scale = positive_int(every_k, "every_k"), float(noise_scale)
        if scale < 0:
            raise ValueError(
                f"noise_scale must be at least 0, or NaN, got {scale}: if the estimate of |G|² is not positive, pass "
                "infinity."
            )
        if not 0 < micro_step_size < math.inf:
            raise ValueError(f"micro_step_size must be a finite number above 0, got {micro_step_size!r}.")
        present = min(max(every_k, self.min_k), self.max_k)
        wanted = min(max(scale / micro_step_size, self.min_k), self.max_k)
        moves = wanted > present * (1 + self.hysteresis) or wanted < present / (1 + self.hysteresis)
        return round(wanted) if moves and not math.isnan(scale) else present

    def learning_rate_factor(self, every_k: int, reference_k: int) -> float:
        """The factor for the learning rate of a window of `every_k` micro-steps, if it suits `reference_k` of them.

        Raises:
          TypeError, ValueError: if either is not an integer of at least 1.
        """
        ratio = positive_int(every_k, "every_k") / positive_int(reference_k, "reference_k")
        return ratio ** _EXPONENTS[self.learning_rate]
