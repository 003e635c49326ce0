"""The rule by which K follows the noise scale."""

import math

import numpy as np
import pytest

from jaxaccum import AdaptiveAccumulation


@pytest.mark.parametrize(
    ("k", "scale", "want"),
    [
        (8, 8 * 32.0, 8),
        (8, 9.9 * 32, 8),  # Within a quarter.
        (8, 10.1 * 32, 10),
        (8, 6.5 * 32, 8),
        (8, 6.3 * 32, 6),
        (8, math.inf, 64),
        (8, 0.0, 2),
        (8, math.nan, 8),
        (1, 1.0, 2),  # Outside of the bounds.
        (100, math.nan, 64),
        (3, np.float32(320.0), 10),
    ],
)
def test_the_next_k(k, scale, want):
    """Catches a K that leaves its bounds, that follows every fluctuation, or that NaN sets."""
    found = AdaptiveAccumulation(2, 64).next_k(k, scale, micro_step_size=32)
    assert found == want and type(found) is int


def test_without_hysteresis_every_change_is_followed():
    """Catches a hysteresis that is always there."""
    assert AdaptiveAccumulation(1, 99, hysteresis=0).next_k(8, 8.6, micro_step_size=1.0) == 9


@pytest.mark.parametrize(("rule", "want"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_the_learning_rate(rule, want):
    """Catches a factor upside down."""
    assert AdaptiveAccumulation(1, 64, learning_rate=rule).learning_rate_factor(32, reference_k=8) == want


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"min_k": 4, "max_k": 2}, ValueError, "max_k must be at least min_k, got min_k=4 and max_k=2"),
        ({"min_k": 0, "max_k": 2}, ValueError, "min_k must be an integer from 1"),
        ({"min_k": 1, "max_k": 2.5}, TypeError, "max_k must be an integer"),
        ({"min_k": 1, "max_k": 2, "hysteresis": -0.1}, ValueError, "hysteresis must be"),
        ({"min_k": 1, "max_k": 2, "hysteresis": math.nan}, ValueError, "hysteresis must be"),
        ({"min_k": 1, "max_k": 2, "hysteresis": None}, ValueError, "hysteresis must be"),
        ({"min_k": 1, "max_k": 2, "learning_rate": "square"}, ValueError, "learning_rate must be one of"),
    ],
)
def test_bad_arguments(options, error, match):
    """Catches bounds the wrong way round."""
    with pytest.raises(error, match=match):
        AdaptiveAccumulation(**options)


@pytest.mark.parametrize("size", [0, -1.0, math.nan, math.inf])
def test_bad_sizes(size):
    """Catches a division by 0."""
    with pytest.raises(ValueError, match="micro_step_size must be"):
        AdaptiveAccumulation(1, 2).next_k(1, 1.0, size)


def test_a_negative_scale():
    """Catches a ratio of one's own, whose negative |G|² says that K is too small, and which would shrink it."""
    with pytest.raises(ValueError, match=r"noise_scale must be .* got -1\.0"):
        AdaptiveAccumulation(1, 2).next_k(1, -1.0, 1.0)
