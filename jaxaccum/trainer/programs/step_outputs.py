"""A micro-step's loss and metrics, kept on the device until they are read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxaccum._sums.weighted_sum import Weighted


class Outputs(Mapping[str, float]):
    """A mapping from "loss" and the names of the metrics to numbers.

    Reading a value waits for the device. It is the weighted mean over the micro-step's examples on all devices of this
    process; NaN if the weight is 0. `parts` are the weighted sums from each call of the micro-step, () or (P,); from a
    call for K micro-steps they are (K,) or (P, K), and `index` selects the micro-step.
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
    """Returns Σ total / Σ weight at `index` over the parts and this process's devices; NaN if the weight is 0."""
    total, weight = summed(sums, index)
    return total / weight if weight else float("nan")


def summed(sums: Sequence[Weighted], index: Any = ...) -> Weighted:
    """Returns Σ total and Σ weight at `index`, as numbers, over the parts and this process's devices."""
    # On the host: indexing on the device would compile another program.
    at_index = lambda x: own(x).astype(np.float64)[index]
    return Weighted(*(float(sum(np.sum(at_index(x)) for x in parts)) for parts in zip(*sums, strict=True)))


def own(x: jax.Array) -> np.ndarray:
    """Returns this process's part of an array that is sharded along its first axis."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
