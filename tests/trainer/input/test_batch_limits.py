"""Limits and lengths, in batches or as a fraction of an epoch."""

import itertools
import sys

import pytest

from jaxaccum.trainer.input import batch_limits


class Sized:
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        return itertools.repeat(0)


@pytest.mark.parametrize(
    ("length", "value", "limit", "expected"),
    [
        (10, 0.55, 5, 5),
        (10, 0.01, 1, 1),
        (10, 1.0, None, 10),
        (10, 0.0, 0, 0),
        (10, 12, 12, 10),
        (0, 1.0, None, None),
        (sys.maxsize, 1.0, None, None),
        (sys.maxsize, 3, 3, 3),
    ],
)
def test_how_many_batches(length, value, limit, expected):
    """Catches a part of an epoch without a batch, a length that limits, and one of a loader that never ends."""
    assert batch_limits.limit(Sized(length), value, "limit") == limit
    assert batch_limits.expected(Sized(length), value, "limit") == expected


@pytest.mark.parametrize("loader", [iter([]), Sized(sys.maxsize)], ids=["iterator", "endless"])
def test_a_fraction_needs_a_length(loader):
    """Catches half of 2**63 batches."""
    with pytest.raises(ValueError, match=r"limit=0\.5 is a fraction of a loader without a length"):
        batch_limits.limit(loader, 0.5, "limit")
