"""From a loader to micro-steps: grouped, on their way to the devices ahead of time, the last of an epoch marked."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxaccum._strategy import Piece, Strategy, length, signature

Tree = Any

AHEAD = 2  # micro-steps that are on their way to the devices while one runs


class MicroStep(NamedTuple):
    """What one micro-step runs on.

    Attributes:
      pieces: what the programs take, one call for each.
      batches: the loader batches in it.
      examples: how many examples they hold.
      last: whether it is the epoch's last.
      loader_state: what the batches' `get_state` gave before the next one was fetched; None where they have none.
    """

    pieces: list[Piece]
    batches: list[Tree]
    examples: int
    last: bool
    loader_state: Any


def micro_steps(batches: Iterable[Tree], strategy: Strategy) -> Iterator[MicroStep]:
    """The micro-steps of an epoch.

    One is held back until it is known whether another follows, so that the last is known where a loader has no
    length. If the loader raises, what it gave before comes first, and none of that is the last.

    Args:
      batches: the epoch's loader batches.
      strategy: groups them and puts them on the devices.
    """
    groups = _Groups(iter(batches), strategy.group)
    ahead: collections.deque[tuple[list[Piece], list[Tree], Any]] = collections.deque()
    for group, loader_state in groups:
        if len(ahead) > AHEAD:
            yield _micro_step(*ahead.popleft(), last=False)
        ahead.append((strategy.pieces(group), group, loader_state))
    while ahead:
        step = ahead.popleft()
        yield _micro_step(*step, last=not ahead and groups.error is None)
    if groups.error is not None:
        raise groups.error


def _micro_step(pieces: list[Piece], batches: list[Tree], loader_state: Any, last: bool) -> MicroStep:
    return MicroStep(pieces, batches, sum(map(length, batches)), last, loader_state)


def fused(micro_steps: Iterable[MicroStep], every_k: int, pending: int) -> Iterator[list[MicroStep]]:
    """The micro-steps of an epoch in lists, each for one call: a window where it can be stacked, else one by one.

    If `micro_steps` raises, what the open window has of it comes first, one by one: the window is not whole.

    Args:
      micro_steps: as the function of that name gives them.
      every_k: K.
      pending: how many micro-steps the open window has already.
    """
    window: list[MicroStep] = []
    try:
        for micro_step in micro_steps:
            window.append(micro_step)
            if micro_step.last or pending + len(window) >= every_k:
                yield from [window] if _can_be_stacked(window) else ([one] for one in window)
                window, pending = [], 0
    except Exception:
        yield from ([one] for one in window)
        raise


def _can_be_stacked(window: list[MicroStep]) -> bool:
    """Whether each micro-step is one piece, and all pieces are alike."""
    first, *others = window
    if any(len(micro_step.pieces) != 1 for micro_step in window):
        return False
    shape = signature(first.pieces[0].batch)
    return all(signature(other.pieces[0].batch) == shape for other in others)


class _Groups:
    """The batches of an iterator in lists of up to `size`, each with the iterator's state after it, if it tells one.

    What the iterator raises is kept as `error`, and ends them.

    A group that the error cut short is given up: its batches are not a whole micro-step.
    """

    def __init__(self, batches: Iterator[Tree], size: int):
        self._batches, self._size = batches, size
        self._state: Callable[[], Any] = getattr(batches, "get_state", lambda: None)
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[list[Tree], Any]]:
        while True:
            try:
                group = list(itertools.islice(self._batches, self._size))
            except Exception as error:
                self.error = error
                return
            if not group:
                return
            yield group, self._state()
