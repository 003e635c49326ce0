"""`AccumulationSchedule`: K by epoch, on the host. Does not import jax."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from jaxaccum._integers import as_int, positive_int


class AccumulationSchedule(Mapping[int, int]):
    """The window length K for each epoch, in the format of PyTorch Lightning's `{epoch: K}` dictionaries.

    Epochs count from 0. Each K applies from its epoch until the next key; before the first key, K is 1. The schedule is
    an immutable, hashable mapping that copies the dictionary it receives.

    Args:
      scheduling: epoch -> K, keys in any order.

    Raises:
      TypeError: if `scheduling` is not a mapping, is empty, or contains non-integers (a bool is not an integer here).
      ValueError: if an epoch is negative or a K is below 1.

    Example:
      >>> schedule = AccumulationSchedule({0: 8, 4: 4, 8: 1})
      >>> [schedule(epoch) for epoch in (0, 3, 4, 7, 8, 100)]
      [8, 8, 4, 4, 1, 1]
      >>> AccumulationSchedule({2: 3})(0)
      1
      >>> schedule
      AccumulationSchedule({0: 8, 4: 4, 8: 1})
    """

    def __init__(self, scheduling: Mapping[int, int]):
        if not isinstance(scheduling, Mapping):
            raise TypeError(
                f"scheduling must map epochs to K, for example {{0: 8, 4: 4}}, got {scheduling!r}; "
                "for one K throughout pass {0: K}."
            )
        if not scheduling:
            raise TypeError("scheduling must not be empty; for no accumulation pass {0: 1}.")
        entries = sorted((_epoch(epoch), positive_int(k, f"K at epoch {epoch!r}")) for epoch, k in scheduling.items())
        self._entries = MappingProxyType(dict(entries))

    def __call__(self, epoch: int) -> int:
        """K in `epoch`, an integer of at least 0.

        Raises:
          TypeError: if `epoch` is not an integer.
          ValueError: if it is negative.
        """
        epoch = _epoch(epoch)
        return max(((start, k) for start, k in self._entries.items() if start <= epoch), default=(0, 1))[1]

    def optimizer_steps(self, epochs: int, micro_steps: int) -> int:
        """The number of optimizer steps in the first `epochs` epochs of `micro_steps` micro-steps each.

        The last window of an epoch may be partial.

        Raises:
          TypeError: if either is not an integer.
          ValueError: if `epochs` is negative or `micro_steps` is below 1.

        Example:
          >>> AccumulationSchedule({0: 8, 4: 4, 8: 1}).optimizer_steps(epochs=10, micro_steps=14)
          52
        """
        micro_steps = positive_int(micro_steps, "micro_steps")
        return sum(-(-micro_steps // self(epoch)) for epoch in range(_epoch(epochs)))

    def __getitem__(self, epoch: int) -> int:
        return self._entries[epoch]

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(tuple(self._entries.items()))

    def __repr__(self) -> str:
        return f"AccumulationSchedule({dict(self._entries)})"

    def __reduce__(self):
        return AccumulationSchedule, (dict(self._entries),)


def _epoch(value: int) -> int:
    epoch = as_int(value, "an epoch", "an integer of at least 0")
    if epoch < 0:
        raise ValueError(f"an epoch must be an integer of at least 0, got {epoch}; epochs count from 0.")
    return epoch
