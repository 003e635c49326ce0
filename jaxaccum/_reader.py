"""The batches of an epoch, from its start or from where a checkpoint left it."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxaccum import _plain
from jaxaccum._counters import Counters

Tree = Any


class Reader:
    """An epoch's batches, to be iterated over once.

    Args:
      batches: the loader's iterator.
      ahead: batches that it has given already.
      taken: how many of all these to pass over.
      limit: how many to give at most; None is all.
      keeps_state: whether `get_state` will be asked for the iterator's own state.
    """

    def __init__(
        self,
        batches: Any,
        ahead: Iterable[Tree] = (),
        *,
        taken: int = 0,
        limit: int | None = None,
        keeps_state: bool = False,
    ):
        self._batches = itertools.islice(
            itertools.chain(ahead, batches), taken, None if limit is None else taken + limit
        )
        self._state = batches if keeps_state and has_state(batches) else None

    def __iter__(self) -> Iterator[Tree]:
        return self._batches

    def get_state(self) -> str | None:
        """Where the loader's iterator stands, before it fetches its next batch: its state as text, None without one."""
        # As text at once: what it returns may be its very own, which the next fetch changes.
        return None if self._state is None else _plain.dumps(self._state.get_state(), type(self._state).__name__)


def rest(
    batches: Any,
    first: Tree,
    at: Counters,
    state: str | None,
    *,
    is_stream: bool,
    own: Callable[[int], int],
    limit: int | None,
    keeps_state: bool,
) -> Reader:
    """The batches of an epoch after those that a run was trained on.

    Args:
      batches: the loader's iterator, from its start.
      first: the batch that it has given already.
      at: the place in the run.
      state: what `get_state` gave there.
      is_stream: whether all epochs are one iterator's.
      own: of so many loader batches of all processes, how many this process' loader gave.
      limit: how many batches an epoch has at most; None is all.
      keeps_state: as for `Reader`.
    """
    in_epoch = at.batch_idx > 0 and not at.ends_epoch
    if in_epoch and limit is not None:
        limit = max(limit - own(at.batches), 0)
    if not (in_epoch or is_stream):
        return Reader(batches, [first], limit=limit, keeps_state=keeps_state)
    if state is not None and has_state(batches):
        batches.set_state(_plain.loads(state))
        return Reader(batches, limit=limit, keeps_state=keeps_state)
    taken = own(at.all_batches if is_stream else at.batches)
    return Reader(batches, [first], taken=taken, limit=limit, keeps_state=keeps_state)


def has_state(batches: Iterator[Tree]) -> bool:
    """Whether an iterator can tell its state and take it back, as those of grain can."""
    return hasattr(batches, "get_state") and hasattr(batches, "set_state")
