"""Turns loader batches into micro-steps: groups them, prefetches them to the devices and marks an epoch's last one."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxaccum._types import Tree
from jaxaccum.distributed.process_group import Processes, said
from jaxaccum.trainer.input import process_shards
from jaxaccum.trainer.input.batches import Loaded, signature
from jaxaccum.trainer.input.strategies import Piece, Strategy

AHEAD = 2  # Number of micro-steps to prefetch while one runs.


class MicroStep(NamedTuple):
    """The input of one micro-step."""

    pieces: list[Piece]  # The inputs of the compiled programs, one per call.
    batch: Tree  # For hooks: the loader's batch, or a list of this process's if a micro-step has several.
    count: int  # The number of loader batches, over all processes.
    examples: int  # The number of examples in them.
    last: bool  # Whether this is known to be the epoch's last micro-step.
    loader_state: Any  # The result of the batches' `get_state` before the next fetch; None without one.


def micro_steps(
    batches: Iterable[Tree], strategy: Strategy, processes: Processes, *, may_differ: bool = False
) -> Iterator[MicroStep]:
    """Yields the micro-steps of an epoch.

    Each one is held back until it is known whether another follows, so that the last one is known even if the loader
    has no length. If the loader raises or yields an invalid batch, the earlier micro-steps are yielded first, and none
    of them is marked as the last.

    Several processes synchronise before each micro-step. They therefore all end together when a loader ends or raises,
    and `Processes.wishes` is the same in all of them before a micro-step. Different numbers of micro-steps are an error
    unless `may_differ`.
    """
    groups = _Groups(batches, strategy)
    met = _Met(groups, strategy, processes, may_differ) if processes.count > 1 else None
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
            step = step._replace(last=True, loader_state=groups.state())  # The state after the loader was exhausted.
        yield step
        if ahead:
            processes.gather("a micro-step")
    if groups.error is not None:
        processes.fail(groups.error)


def fused(micro_steps: Iterable[MicroStep], every_k: Callable[[], int], pending: int) -> Iterator[list[MicroStep]]:
    """Yields an epoch's micro-steps in lists, one per call: a whole window if it can be stacked, else single ones.

    `every_k()` is K of the window that is read, and `pending` the number of micro-steps already in the open window. If
    `micro_steps` raises, those of the incomplete window are yielded first, one by one.
    """
    window: list[MicroStep] = []
    try:
        for micro_step in micro_steps:
            window.append(micro_step)
            if micro_step.last or pending + len(window) >= every_k():
                yield from [window] if _can_be_stacked(window) else ([one] for one in window)
                window, pending = [], 0
    except Exception:
        yield from ([one] for one in window)
        raise


def _can_be_stacked(window: list[MicroStep]) -> bool:
    """Whether each micro-step is in one piece and all pieces have the same shapes."""
    first, *others = window
    if any(len(micro_step.pieces) != 1 for micro_step in window):
        return False
    shape = signature(first.pieces[0].batch)
    return all(signature(other.pieces[0].batch) == shape for other in others)


class _Met:
    """Yields this process's groups while any process has one; unless `may_differ`, the processes must end together."""

    def __init__(self, groups: "_Groups", strategy: Strategy, processes: Processes, may_differ: bool):
        self._groups, self._strategy, self._processes, self._may_differ = groups, strategy, processes, may_differ
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
            self._offers = self._processes.gather("a loader batch", own)
            if not self._goes_on(number):
                return
            yield self._group, loader_state

    def _goes_on(self, number: int) -> bool:
        """Whether there is a micro-step `number`; sets an error if the processes don't end together."""
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
        """Returns the pieces of the current micro-step."""
        make = lambda: process_shards.pieces(self._strategy, self._arrays(), self._offers, self._like)
        return self._processes.together(make)

    def _arrays(self) -> list[Tree]:
        return [batch.arrays for batch in self._group]

    def count(self) -> int:
        """Returns its number of loader batches over all processes; with "dp" these are shares of one batch."""
        return min(self._strategy.batches, sum(offer["batches"] for offer in self._offers))

    def examples(self) -> int:
        """Returns its number of examples over all processes."""
        return sum(offer["examples"] for offer in self._offers)


class _Groups:
    """Yields lists of up to `strategy.group` batches, each with the result of `get_state` after it, or None.

    An exception from the loader or from an invalid batch is stored as `error` and ends the iteration. The incomplete
    group is dropped.
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
