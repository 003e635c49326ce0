"""A micro-step's loss and metrics, left on the device until someone reads them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxaccum._sums.weighted_sum import Weighted


class Outputs(Mapping[str, float]):
    """Names to numbers: "loss", and the names of the metrics.

    Reading one waits for the device. It is the weighted mean over the micro-step's examples, whatever devices they
    were on, but for those of other processes; NaN where nothing has weight.

    Args:
      parts: the weighted sums of each call that the micro-step took, () or (P,) each; (K,) or (P, K) of a call for K
        micro-steps.
      index: of the micro-step in each of those arrays.
    """

    __slots__ = ("_index", "_parts")

    def __init__(self, parts: Sequence[dict[str, Weighted]], index: Any = ...):
        self._parts, self._index = parts, index

    def __getitem__(self, name: str) -> float:
        return mean([part[name] for part in self._parts], self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])

    def __repr__(self) -> str:
        return repr(dict(self))


def mean(sums: Sequence[Weighted], index: Any = ...) -> float:
    """Σ total / Σ weight over the parts and their devices, of what is at `index`; NaN where nothing has weight."""
    total, weight = summed(sums, index)
    return total / weight if weight else float("nan")


def summed(sums: Sequence[Weighted], index: Any = ...) -> Weighted:
    """Σ total and Σ weight, as numbers, over the parts and this process' devices, of what is at `index`."""
    # On the host: to cut an array on the device would be a program of its own.
    at_index = lambda x: own(x).astype(np.float64)[index]
    return Weighted(*(float(sum(np.sum(at_index(x)) for x in parts)) for parts in zip(*sums, strict=True)))


def own(x: jax.Array) -> np.ndarray:
    """What this process has of an array that is split over the devices along its first axis."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.concatenate([np.asarray(shard.data) for shard in x.addressable_shards])
