"""From a loader to micro-steps: grouped, on their way to the devices ahead of time, the last of an epoch marked."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxaccum._types import Tree
from jaxaccum.distributed.process_group import said
from jaxaccum.trainer.input import process_shards
from jaxaccum.trainer.input.strategies import Loaded, Piece, Strategy, signature

AHEAD = 2  # micro-steps that are on their way to the devices while one runs


class MicroStep(NamedTuple):
    """What one micro-step runs on.

    Attributes:
      pieces: what the programs take, one call for each.
      batch: what hooks are given: what the loader gave; where there are several batches in a micro-step, a list of this
        process' own.
      count: how many loader batches are in it.
      examples: how many examples they hold.
      last: whether it is known to be the epoch's last.
      loader_state: what the batches' `get_state` gave before the next one was fetched; None where they have none.
    """

    pieces: list[Piece]
    batch: Tree
    count: int
    examples: int
    last: bool
    loader_state: Any


def micro_steps(batches: Iterable[Tree], strategy: Strategy, *, may_differ: bool = False) -> Iterator[MicroStep]:
    """The micro-steps of an epoch.

    One is held back until it is known whether another follows, so that the last is known where a loader has no
    length. If the loader raises, or gives a batch that can't be read, what it gave before comes first, and none of that
    is the last.

    Several processes tell each other what they have, once before each micro-step. So all of them end together, whether
    a loader ends or raises, and what is in `Processes.wishes` before a micro-step is the same on all.

    Args:
      batches: the epoch's loader batches.
      strategy: groups them and puts them on the devices.
      may_differ: whether a process may have fewer micro-steps than another; else that is an error.
    """
    groups = _Groups(batches, strategy)
    met = _Met(groups, strategy, may_differ) if strategy.processes.count > 1 else None
    ahead: collections.deque[MicroStep] = collections.deque()
    for group, loader_state in met or groups:
        if len(ahead) > AHEAD:
            yield ahead.popleft()
        if met is None:
            pieces = strategy.pieces([batch.arrays for batch in group])
            count, examples = len(group), sum([batch.examples for batch in group])
        else:
            pieces, count, examples = met.pieces(), met.count(), met.examples()
        batch = group[0].given if strategy.batches == 1 else [batch.given for batch in group]
        ahead.append(MicroStep(pieces, batch, count, examples, False, loader_state))
    while ahead:
        step = ahead.popleft()
        if not ahead and groups.error is None and not getattr(batches, "was_stopped", False):
            step = step._replace(last=True, loader_state=groups.state())  # Now that the loader has met the epoch's end.
        yield step
        if ahead:
            strategy.processes.gather("a micro-step")
    if groups.error is not None:
        strategy.processes.fail(groups.error)


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


class _Met:
    """The groups of this process, as long as all processes have one; an end that is not common is an error of all.

    Args:
      groups: of this process.
      strategy: the devices.
      may_differ: whether this process goes on without a group while another has one.
    """

    def __init__(self, groups: "_Groups", strategy: Strategy, may_differ: bool):
        self._groups, self._strategy, self._may_differ = groups, strategy, may_differ
        self._group: list[Loaded] = []
        self._offers: list[dict[str, Any]] = []
        self._like: Tree = None

    def __iter__(self) -> Iterator[tuple[list[Loaded], Any]]:
        groups = iter(self._groups)
        for number in itertools.count():
            self._group, loader_state = next(groups, ([], None))
            self._like = self._group[0].arrays if self._group else self._like
            error = self._groups.error
            own = {
                **process_shards.offer(self._strategy, self._arrays()),
                "examples": sum(batch.examples for batch in self._group),
                "error": None if error is None else repr(error),
            }
            self._offers = self._strategy.processes.gather("a loader batch", own)
            if not self._goes_on(number):
                return
            yield self._group, loader_state

    def _goes_on(self, number: int) -> bool:
        """Whether all processes have micro-step `number`; if they don't end together, there is an error."""
        errors = {i: offer["error"] for i, offer in enumerate(self._offers) if offer["error"] is not None}
        if errors:
            text = f"the loader raised {said(errors)}; see the log of that process."
            self._groups.error = self._groups.error or RuntimeError(text)
            return False
        given = [offer["batches"] for offer in self._offers]
        if not all(given) and any(given) and not (self._may_differ and number):
            before = number * self._strategy.group
            self._groups.error = ValueError(
                f"the processes' loaders have different lengths: after {before} batches each there are "
                f"{said(given)} for the next micro-step. Give all of them equally many, for example with "
                f"limit_train_batches={before}."
            )
            return False
        return any(given)

    def pieces(self) -> list[Piece]:
        """The pieces of the present micro-step."""
        make = lambda: process_shards.pieces(self._strategy, self._arrays(), self._offers, self._like)
        return self._strategy.processes.together(make)

    def _arrays(self) -> list[Tree]:
        return [batch.arrays for batch in self._group]

    def count(self) -> int:
        """How many loader batches all processes have in it; with "dp" they have shares of one."""
        return min(self._strategy.batches, sum(offer["batches"] for offer in self._offers))

    def examples(self) -> int:
        """How many examples they hold."""
        return sum(offer["examples"] for offer in self._offers)


class _Groups:
    """Batches in lists of up to `strategy.group`, each with what their `get_state` gives after it, if they have one.

    What they raise is kept as `error`, and ends them; so is what a batch that can't be read raises.

    A group that the error cut short is given up: its batches are not a whole micro-step.
    """

    def __init__(self, batches: Iterable[Tree], strategy: Strategy):
        self._batches, self._strategy = iter(batches), strategy
        self.state: Callable[[], Any] = getattr(batches, "get_state", lambda: None)
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[list[Loaded], Any]]:
        batches, read, size = self._batches, self._strategy.read, self._strategy.group
        while True:
            try:
                group = [read(batch) for batch in itertools.islice(batches, size)]
            except Exception as error:
                self.error = error
                return
            if not group:
                return
            yield group, self.state()
