"""`NoiseScale`: the batch size at which a gradient's noise is as large as the gradient itself."""

import dataclasses
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._integers import is_number
from jaxaccum._sums import weighted_sum


class NoiseScaleState(NamedTuple):
    """What `NoiseScale` has seen, with older windows weighted less.

    Attributes:
      weight: Σ c over the windows, where c falls by the factor `decay` with every window.
      weight_squared: Σ c².
      mean: (2,), the weighted means of the windows' estimates of |G|² and tr(Σ).
      scatter: (2, 2), the weighted sum of the products of their deviations from the mean.
    """

    weight: Any
    weight_squared: Any
    mean: Any
    scatter: Any


class NoiseEstimate(NamedTuple):
    """An estimate of the noise scale. All are scalars, in the units of the weights.

    Attributes:
      scale: B_simple = tr(Σ) / |G|²; infinite if the estimate of |G|² is not positive.
      low: the lower end of its confidence interval.
      high: the upper end; infinite if |G|² can't be told from 0.
      gradient: |G|², the squared norm of the true gradient; it may be negative.
      noise: tr(Σ), the variance of the gradient of a batch of weight 1.
    """

    scale: Any
    low: Any
    high: Any
    gradient: Any
    noise: Any


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """Estimates the gradient noise scale B_simple (McCandlish et al. 2018, appendix A.1) from the norms of windows.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> scale = jaxaccum.NoiseScale()
      >>> loss = lambda w, x: jnp.mean((x @ w - 1.0) ** 2)
      >>> window = jaxaccum.value_and_grad(loss, 4, gradient_norms="noise")
      >>> @jax.jit
      ... def step(w, noise, x):
      ...     value, grads, norms = window(w, x)
      ...     return w - 0.01 * grads, scale.update(noise, *norms.two_sizes)
      >>> w, noise = jnp.zeros(3), scale.init()
      >>> for key in jax.random.split(jax.random.key(0), 50):
      ...     w, noise = step(w, noise, jax.random.normal(key, (32, 3)) + 1.0)
      >>> found = scale.estimate(noise)
      >>> bool(found.low < found.scale < found.high)
      True

    A batch of B examples has the gradient G + noise, of variance tr(Σ) / B. Below B_simple = tr(Σ) / |G|² examples,
    twice the batch makes almost twice the progress in a step; far above it, hardly any more.

    The squared norm of the mean gradient of a batch of weight W is |G|² + tr(Σ) / W on average: weights are numbers of
    examples or tokens, so the mean gradient of a micro-batch of weight w has the covariance Σ / w. Two batches of
    different W in one window give an estimate of |G|² and one of tr(Σ), each unbiased, also for unequal weights. Their
    means over the windows are unbiased too. B_simple is the ratio of the means, and not unbiased. Its confidence
    interval is Fieller's, which treats the windows' estimates as independent.

    Results have the units of the weights: examples or tokens with a `Weighted` loss. A plain loss has the weight 1 in
    each micro-batch: multiply by the number of its examples. The tokens of a sequence share their noise, so that a
    scale in tokens holds for sequences of about that length.

    `value_and_grad` and `MultiSteps` return norms with `gradient_norms="noise"`, which takes two passes over the sums
    of a window, or with "all", whose estimates vary less, but which forms each micro-batch's gradient. `update` takes
    norms from elsewhere too. All methods are pure, and work inside `jax.jit`.

    Args:
      decay: the factor by which a window's weight falls with each later one, above 0 and up to 1. The means are about
        those of the last (1 + decay) / (1 - decay) windows; 1 weights all alike.
      confidence: the probability that the interval is meant to hold the scale, between 0 and 1.

    Raises:
      ValueError: if one is out of these bounds.
    """

    decay: float = 0.99
    confidence: float = 0.95

    def __post_init__(self):
        if not (is_number(self.decay) and 0 < self.decay <= 1):
            raise ValueError(f"decay must be a number above 0 and up to 1, got {self.decay!r}.")
        if not (is_number(self.confidence) and 0 < self.confidence < 1):
            raise ValueError(f"confidence must be a number between 0 and 1, got {self.confidence!r}.")

    def init(self) -> NoiseScaleState:
        """The state before the first window."""
        dtype = weighted_sum.weight_dtype()
        return NoiseScaleState(*(jnp.zeros(shape, dtype) for shape in ((), (), 2, (2, 2))))

    def update(self, state: NoiseScaleState, squares: Any, sizes: Any) -> NoiseScaleState:
        """Adds a window. Call it once per window.

        In a stream of micro-steps under jit:
        `jax.lax.cond(tx.has_updated(state), scale.update, lambda noise, *_: noise, noise, *state.norms.two_sizes)`.

        Args:
          state: the state.
          squares: (2,), the squared norms of the mean gradients of a small and a large batch, or averages of such. The
            batches may overlap.
          sizes: (2,), the weights of the two batches. If the squares are averages over batches, weighted by the
            batches' weights, the size is the mean of those weights.

        Returns:
          The new state; the old one if the window tells nothing: its sizes are equal or 0, or a norm is not finite.
        """
        squares, sizes = (jnp.asarray(x, state.mean.dtype) for x in (squares, sizes))
        (small, large), (few, many) = squares, sizes
        is_told = (few > 0) & (few < many) & jnp.all(jnp.isfinite(squares))
        few, many = jnp.where(is_told, few, 1), jnp.where(is_told, many, 2)
        gradient = (many * large - few * small) / (many - few)
        noise = (small - large) * (few * many / (many - few))
        estimates = jnp.stack([gradient, noise])

        weight = self.decay * state.weight + 1
        mean = state.mean + (estimates - state.mean) / weight
        scatter = self.decay * state.scatter + jnp.outer(estimates - state.mean, estimates - mean)
        new = NoiseScaleState(weight, self.decay**2 * state.weight_squared + 1, mean, scatter)
        return jax.tree.map(lambda new, old: jnp.where(is_told, new, old), new, state)

    def estimate(self, state: NoiseScaleState) -> NoiseEstimate:
        """The estimates from the windows so far; before the first one the scale is infinite, and before the second one
        the interval is unbounded.
        """
        gradient, noise = state.mean
        is_told = state.weight_squared < state.weight**2  # There are two windows.
        weight, rest = (jnp.where(is_told, x, 1) for x in (state.weight, state.weight**2 - state.weight_squared))
        # The variances and the covariance of the two means.
        ((s, st), (_, t)) = state.scatter * state.weight_squared / (weight * rest)
        # The interval has the scales B that are not rejected: (noise - B·gradient)² <= z²·Var(noise - B·gradient).
        z = statistics.NormalDist().inv_cdf((1 + self.confidence) / 2) ** 2
        a, b, c = gradient**2 - z * s, noise * gradient - z * st, jnp.maximum(noise, 0) ** 2 - z * t
        end = b + jnp.sqrt(jnp.maximum(b**2 - a * c, 0))
        is_bounded = is_told & (a > 0) & (gradient > 0)
        return NoiseEstimate(
            scale=_ratio(jnp.maximum(noise, 0), gradient, jnp.inf),
            low=jnp.where(is_told, _ratio(jnp.maximum(c, 0), end, 0), 0),
            high=jnp.where(is_bounded, _ratio(jnp.maximum(end, 0), a, jnp.inf), jnp.inf),
            gradient=gradient,
            noise=noise,
        )


def _ratio(x: jax.Array, y: jax.Array, otherwise: float) -> jax.Array:
    """Returns x / y for positive y, else `otherwise`."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), otherwise)
