"""`AccumulationSchedule`: K by epoch, optimizer step, samples or tokens, on the host. Does not import jax."""

import math
import numbers
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from jaxaccum._integers import as_int, positive_int

UNITS = ("epoch", "step", "samples", "tokens")


class AccumulationSchedule(Mapping[float, int]):
    """The window length K by epoch, in the format of PyTorch Lightning's `{epoch: K}` dictionaries, or by progress.

    Epochs, steps, samples and tokens count from 0. Each K applies from its key until the next one; before the first
    key, K is 1. The schedule is an immutable, hashable mapping that copies the dictionary it receives.

    A `Trainer` changes K only at the start of a window. The units are:

    - "epoch": epochs. K is that of the epoch for all of its windows.
    - "step": optimizer steps, which are windows. The key is the number of a window.
    - "samples": the examples in all windows before this one.
    - "tokens": the weight of all windows but the last one before this one: Σ w of `Weighted` losses, and of plain
      losses the number of examples. The weight is computed on the devices. Since K never depends on the window that
      may still be running, the devices don't wait, and K is the same in every process and after a resume.

    Example:
      >>> schedule = AccumulationSchedule({0: 8, 4: 4, 8: 1})
      >>> [schedule(epoch) for epoch in (0, 3, 4, 7, 8, 100)]
      [8, 8, 4, 4, 1, 1]
      >>> AccumulationSchedule({2: 3})(0)
      1
      >>> schedule
      AccumulationSchedule({0: 8, 4: 4, 8: 1})
      >>> warmup = AccumulationSchedule({0: 1, 1_000_000: 4}, by="tokens")
      >>> warmup(999_999.5), warmup(1e6), warmup.by
      (1, 4, 'tokens')

    Args:
      scheduling: start -> K, keys in any order.
      by: the unit of the keys: "epoch", "step", "samples" or "tokens". None is "epoch", or the unit of `scheduling` if
        it is an `AccumulationSchedule`.

    Raises:
      TypeError: if `scheduling` is not a mapping, is empty, or contains non-integers (a bool is not an integer here).
        Keys by "tokens" may be floats.
      ValueError: if a key is negative, a K is below 1, or `by` is not a unit.
    """

    def __init__(self, scheduling: Mapping[int, int] | Mapping[float, int], by: str | None = None):
        self._by = by or (scheduling.by if isinstance(scheduling, AccumulationSchedule) else "epoch")
        if self.by not in UNITS:
            raise ValueError(f"by must be one of {UNITS}, got {by!r}; it is the unit of the keys.")
        if not isinstance(scheduling, Mapping):
            raise TypeError(
                f"scheduling must map epochs to K, for example {{0: 8, 4: 4}}, got {scheduling!r}; "
                "for one K throughout pass {0: K}."
            )
        if not scheduling:
            raise TypeError("scheduling must not be empty; for no accumulation pass {0: 1}.")
        entries = sorted(
            (_count(start, self.by), positive_int(k, f"K at {self.by} {start!r}")) for start, k in scheduling.items()
        )
        self._entries = MappingProxyType(dict(entries))

    @property
    def by(self) -> str:
        """The unit of the keys: "epoch", "step", "samples" or "tokens"."""
        return self._by

    def __call__(self, at: float) -> int:
        """K at `at`: an epoch, or a number of steps, samples or tokens, of at least 0.

        Raises:
          TypeError: if `at` is not an integer, or by "tokens" not a number.
          ValueError: if it is negative.
        """
        at = _count(at, self.by)
        return max(((start, k) for start, k in self._entries.items() if start <= at), default=(0, 1))[1]

    def optimizer_steps(self, epochs: int, micro_steps: int, examples: int | None = None) -> int:
        """The number of optimizer steps in the first `epochs` epochs of `micro_steps` micro-steps each.

        The last window of an epoch may be partial.

        Example:
          >>> AccumulationSchedule({0: 8, 4: 4, 8: 1}).optimizer_steps(epochs=10, micro_steps=14)
          52
          >>> AccumulationSchedule({0: 1, 4: 2}, by="step").optimizer_steps(epochs=1, micro_steps=10)
          7

        Args:
          epochs: the number of epochs.
          micro_steps: the number of micro-steps in each.
          examples: the number of examples in a micro-step, for a schedule by "samples".

        Raises:
          TypeError: if any is not an integer.
          ValueError: if `epochs` is negative or another one is below 1, or for a schedule by "tokens", whose number is
            known on the devices only.
        """
        micro_steps = positive_int(micro_steps, "micro_steps")
        if self.by == "tokens":
            raise ValueError("the number of optimizer steps by 'tokens' depends on weights that only devices know.")
        size = positive_int(examples, "examples") if self.by == "samples" else 0
        at = steps = 0
        for epoch in range(int(_count(epochs, "epoch"))):
            at, left = epoch if self.by == "epoch" else at, micro_steps
            while left > 0:  # All windows of one K at once.
                k = self(at)
                progress = {"epoch": 0, "step": 1, "samples": k * size}[self.by]  # Of a full window.
                windows, ahead = -(-left // k), [start for start in self if start > at]
                if progress and ahead:
                    windows = min(windows, int(-(-(min(ahead) - at) // progress)))
                at += windows * progress
                left -= windows * k
                steps += windows
            at += left * size  # The last window may be partial.
        return steps

    def __getitem__(self, start: float) -> int:
        return self._entries[start]

    def __iter__(self) -> Iterator[float]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        """Whether `other` maps the same keys, in the same unit, to the same K; the keys of a plain dict are epochs."""
        unit = other.by if isinstance(other, AccumulationSchedule) else "epoch"
        return isinstance(other, Mapping) and unit == self.by and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash((*self._entries.items(), self.by))

    def __repr__(self) -> str:
        by = "" if self.by == "epoch" else f", by={self.by!r}"
        return f"AccumulationSchedule({dict(self._entries)}{by})"

    def __reduce__(self):
        return AccumulationSchedule, (dict(self._entries), self.by)


def _count(value: float, by: str) -> float:
    """Returns `value` as a key in a unit: an int, or by "tokens" an int or a float."""
    name = "an epoch" if by == "epoch" else f"a key by {by!r}"
    wanted = f"{'a number' if by == 'tokens' else 'an integer'} of at least 0"
    is_float = by == "tokens" and isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
    count = float(value) if is_float else as_int(value, name, wanted)
    if not 0 <= count < math.inf:
        raise ValueError(f"{name} must be {wanted}, got {count}; {by}{'' if by.endswith('s') else 's'} count from 0.")
    return count
