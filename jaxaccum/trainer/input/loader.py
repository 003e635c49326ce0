"""Reads a loader's batches epoch by epoch, from the start or from a checkpoint's position."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxaccum._types import Tree
from jaxaccum.checkpoint import json_state
from jaxaccum.distributed.process_group import Processes, said
from jaxaccum.trainer.input import batch_limits

ONE_SHOT = (
    "It is an iterator, which gives its batches once, but there are several epochs: pass something that can be "
    "iterated again, such as a list, or set limit_train_batches, max_steps or max_epochs=1."
)
_NOTHING = object()


class Position(NamedTuple):
    """Accessors for the position of a loader or its iterator."""

    get: Callable[[], Any]
    put: Callable[[Any], None]
    owner: str  # The class name of the loader or iterator.

    @classmethod
    def of(cls, owner: Any) -> "Position | None":
        """Finds `get_state`/`set_state` (grain) or `state_dict`/`load_state_dict` on `owner`; None without them."""
        for names in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
            get, put = (getattr(owner, name, None) for name in names)
            if callable(get) and callable(put):
                return cls(get, put, type(owner).__name__)
        return None


class Reader:
    """The batches of one epoch; iterate over it once.

    They are those in `ahead`, which were already taken from the loader's iterator, and then those left in `batches`,
    that iterator. The first `taken` of them are skipped and at most `limit` yielded. `get_state` needs `position`.
    """

    def __init__(
        self,
        batches: Iterator[Tree],
        ahead: Iterable[Tree] = (),
        *,
        taken: int = 0,
        limit: int | None = None,
        position: Position | None = None,
    ):
        self._limit, self._position = limit, position
        self._stop: int | None = None
        self.given, self.is_over = 0, False  # Batches yielded; whether the loader's iterator is exhausted.
        self._batches = itertools.islice(itertools.chain(ahead, self._rest(batches)), taken, _plus(taken, limit))

    def __iter__(self) -> Iterator[Tree]:
        for batch in itertools.islice(self._batches, self._stop):
            self.given += 1
            yield batch

    def _rest(self, batches: Iterator[Tree]) -> Iterator[Tree]:
        yield from _rest(batches)
        self.is_over = True

    def stop_after(self, batches: int | float) -> None:
        """Limits the number of batches, even if the epoch has more."""
        if batches < (math.inf if self._limit is None else self._limit):
            self._stop = int(batches)

    @property
    def was_stopped(self) -> bool:
        """Whether `stop_after` ended the iteration, so that it is unknown whether the epoch has more batches."""
        return self.given == self._stop

    def get_state(self) -> str | None:
        """Returns the loader's position before its next fetch, as text; None without a position."""
        if self._position is None:
            return None
        # Serialised immediately: the loader may return a mutable state that the next fetch changes.
        return json_state.dumps({"state": self._position.get(), "is_over": self.is_over}, self._position.owner)


class Start(NamedTuple):
    """Where in a run to start reading. Batches are loader batches, counted over all processes."""

    epoch: int = 0
    batches: int = 0  # Already read in this epoch.
    all_batches: int = 0  # Already read in the run.
    ends_epoch: bool = False  # Whether the epoch has no more batches.


class TrainLoader:
    """The training batches of a run, epoch by epoch. Nothing is fetched before `begin`.

    `epochs` and `steps` are the maximum numbers of epochs and optimizer steps in the run, or infinity. `keeps_state`
    says whether checkpoints will save the loader's position.
    """

    first: Tree  # The first batch, for the initialisation of the parameters.

    def __init__(
        self,
        loader: Iterable[Tree],
        *,
        limit_train_batches: int | float,
        overfit_batches: int | float,
        epochs: int | float,
        steps: int | float,
        keeps_state: bool,
    ):
        _check_iterable(loader, "train_loader")
        if overfit_batches:
            loader = FirstBatches(loader, overfit_batches)
        self._loader, self._limit_train_batches, self._keeps_state = loader, limit_train_batches, keeps_state
        self._epochs, self._steps = epochs, steps
        self._position = Position.of(loader)
        self._begun: Reader | None = None
        self._stream: Iterator[Tree] | None = None
        self._old_pass: bool | None = None  # For a state from an epoch's end: was the iterator exhausted?
        _ = self.epoch_batches  # Raises for a fraction of a loader without a length.

    @property
    def is_stream(self) -> bool:
        """Whether all epochs share one iterator."""
        return self._stream is not None

    @property
    def epoch_batches(self) -> int | None:
        """The expected number of batches per epoch; None if unknown."""
        return batch_limits.expected(self._loader, self._limit_train_batches, "limit_train_batches")

    @property
    def _limit(self) -> int | None:
        return batch_limits.limit(self._loader, self._limit_train_batches, "limit_train_batches")

    def epoch_bounds(self, group: int) -> tuple[int | float, int | float]:
        """Returns lower and upper bounds on the micro-steps per epoch, with `group` batches per micro-step."""
        limit, loader = self._limit, self._loader
        if self.is_stream and limit is None and self._epochs != 1:
            return math.inf, math.inf  # Only `max_steps` ends the run.
        if isinstance(loader, FirstBatches):
            loader = loader.batches
        most = math.inf if limit is None else limit
        least = 1
        if isinstance(loader, Sequence):
            least = most = min(len(loader), most)
        return -(-least // group), most if math.isinf(most) else -(-most // group)

    def agree(self, processes: Processes) -> None:
        """Checks that the known epoch lengths are equal in all processes; otherwise raises in all of them."""
        lengths = dict(enumerate(processes.gather("the length of an epoch", self.epoch_batches)))
        known = {process: batches for process, batches in lengths.items() if batches is not None}
        if len(set(known.values())) > 1:
            raise ValueError(
                f"an epoch of train_loader has another number of batches on another process: {said(known)}. Give all "
                f"processes equally many, for example with limit_train_batches={min(known.values())}."
            )

    def begin(self, at: Start, state: str | None = None, own: Callable[[int], int] = int) -> None:
        """Creates the iterator for the epoch in which the run starts or resumes, and fetches `first`.

        `state` is the saved result of `Reader.get_state`, or None. `own` maps a number of loader batches over all
        processes to the number from this process's loader. Raises ValueError if there is no batch, or if there would be
        none in the next epoch.
        """
        set_epoch(self._loader, at.epoch)
        is_in_epoch = at.batches > 0 and not at.ends_epoch
        saved = _position(state)
        # A loader's state is restored before `iter`, an iterator's state after it.
        loader = None if saved is None or isinstance(self._loader, Iterator) else self._position
        if loader is not None and saved is not None and not at.ends_epoch:
            self._put(loader, saved, is_in_epoch)
        batches, self.first = self._iterated()
        self._check_first(at)
        if loader is not None and saved is not None and at.ends_epoch:
            self._put(loader, saved, is_in_epoch)
        if at.ends_epoch and not self.is_stream:
            return  # The next epoch creates a new iterator.
        limit, ahead, taken = self._limit, [self.first], 0
        if is_in_epoch:
            limit = _plus(limit, -own(at.batches))
        if (is_in_epoch or self.is_stream) and loader is None:
            position = Position.of(batches)
            if saved is not None and position is not None:
                position.put(saved["state"])
                ahead = []
            elif self.is_stream:
                ahead = self._passed_over(own(at.all_batches))
            else:
                taken = own(at.batches)
            if self.is_stream and not is_in_epoch and not ahead:
                ahead = [batch for batch in [self._next_of_stream()] if batch is not _NOTHING]
        self._begun = self._reader(batches, ahead, taken, limit)

    def _put(self, loader: Position, saved: dict[str, Any], is_in_epoch: bool) -> None:
        loader.put(saved["state"])
        self._old_pass = None if is_in_epoch else saved["is_over"]

    def _passed_over(self, batches: int) -> list[Tree]:
        """Skips this many batches of a stream whose first has been taken; returns the first if it isn't skipped."""
        for _ in range(batches - 1):
            self._next_of_stream()
        return [] if batches else [self.first]

    def _next_of_stream(self) -> Tree:
        """Returns the stream's next batch, calling `iter` again at its end for iterators that restart."""
        batch = next(self._stream, _NOTHING) if self._stream is not None else _NOTHING
        return next(iter(self._loader), _NOTHING) if batch is _NOTHING else batch

    def epoch(self, number: int) -> Reader:
        """Returns the batches of the next epoch; on resume, the remaining batches of the current one."""
        begun, self._begun = self._begun, None
        if begun is None:
            set_epoch(self._loader, number)
            batches, first = (self._stream, self._next_of_stream()) if self._stream is not None else self._iterated()
            begun = self._reader(batches, [] if first is _NOTHING else [first], 0, self._limit)
        return begun

    def _iterated(self) -> tuple[Iterator[Tree], Tree]:
        """Returns a new iterator and its first batch, or `_NOTHING` if it is empty.

        A loader whose state was saved at an epoch's end resumes there. If the epoch ended because the loader was
        exhausted, the next iterator starts the next epoch, or is empty and the one after it does. If a limit ended the
        epoch, the next iterator continues the previous epoch, at the latest when its first batch is requested.
        """
        was_over, self._old_pass = self._old_pass, None
        batches = iter(self._loader)
        if was_over is False:
            next(batches, None)
            batches = iter(self._loader)
        if batches is self._loader and batch_limits.size(self._loader) is None:
            self._stream = batches  # One with a length restarts on `iter`.
        first = next(batches, _NOTHING)
        if first is _NOTHING and was_over is not None:
            batches = iter(self._loader)
            first = next(batches, _NOTHING)
        return batches, first

    def _check_first(self, at: Start) -> None:
        """Raises ValueError if there is no first batch, or if the next epoch would have none."""
        if self.is_stream and self._limit is None and self._epochs != 1 and math.isinf(self._steps):
            raise ValueError(f"train_loader={self._loader!r} would be empty in epoch 1. {ONE_SHOT}")
        if self.first is _NOTHING:
            after = f" after the {at.batches} that the checkpoint was trained on" if at.batches else ""
            raise ValueError(f"train_loader={self._loader!r} is empty: it gave no batch in epoch {at.epoch}{after}.")

    def _reader(self, batches: Iterator[Tree], ahead: list[Tree], taken: int, limit: int | None) -> Reader:
        position = None
        if self._keeps_state:
            position = self._position or Position.of(batches)
        return Reader(batches, ahead, taken=taken, limit=limit, position=position)


class FirstBatches:
    """The first batches of a loader, read once and repeated every epoch; `limit` may be a fraction of its length."""

    def __init__(self, loader: Iterable[Tree], limit: int | float):
        self._loader, self._limit = loader, limit
        self._batches: list[Tree] | None = None
        self._expected = batch_limits.expected(loader, limit, "overfit_batches")

    def __len__(self) -> int:
        return self._expected or 0

    @property
    def batches(self) -> list[Tree]:
        """The batches, read on first access."""
        if self._batches is None:
            set_epoch(self._loader, 0)
            limit = batch_limits.limit(self._loader, self._limit, "overfit_batches")
            self._batches = list(itertools.islice(self._loader, limit))
        return self._batches

    def __iter__(self) -> Iterator[Tree]:
        return iter(self.batches)


class ValLoader:
    """The validation batches of a run; each validation starts from the beginning."""

    def __init__(self, loader: Iterable[Tree], limit: int | float, name: str):
        _check_iterable(loader, name)
        self.name = name
        self._loader, self._limit = loader, limit
        self._looked_at: tuple[Any, list[Tree]] = None, []
        batch_limits.limit(loader, limit, "limit_val_batches")  # Raises for a fraction of a loader without a length.

    @property
    def lasts_for_one(self) -> bool:
        """Whether the loader is an iterator that one validation exhausts."""
        return isinstance(self._loader, Iterator) and self._batches_limit is None

    @property
    def _batches_limit(self) -> int | None:
        return batch_limits.limit(self._loader, self._limit, "limit_val_batches")

    def first(self, batches: int | None) -> Iterator[Tree]:
        """Yields the first `batches` batches (None for all); the next validation yields them again."""
        iterator, kept = iter(self._loader), []
        self._looked_at = iterator, kept
        limits = [limit for limit in (batches, self._batches_limit) if limit is not None]
        for batch in itertools.islice(iterator, min(limits, default=None)):
            kept.append(batch)
            yield batch

    def __iter__(self) -> Iterator[Tree]:
        (former, kept), self._looked_at = self._looked_at, (None, [])
        iterator = former if former is self._loader else iter(self._loader)
        # If `iter` returned the same iterator, it won't yield its first batches again.
        batches = itertools.chain(kept, _rest(iterator)) if iterator is former else iterator
        return itertools.islice(batches, self._batches_limit)


def val_loaders(loaders: Any, limit: int | float, argument: str = "val_loader") -> dict[str, ValLoader]:
    """Returns the loaders of a dict by name, or a single one by the name ""."""
    if not isinstance(loaders, Mapping):
        return {"": ValLoader(loaders, limit, argument)}
    if not loaders or not all(isinstance(name, str) and name for name in loaders):
        raise TypeError(f"{argument} must be a loader or a dict of loaders by name, got the keys {list(loaders)}.")
    return {name: ValLoader(loader, limit, f"{argument}[{name!r}]") for name, loader in loaders.items()}


def set_epoch(loader: Any, epoch: int) -> None:
    """Calls `set_epoch` on a loader, its samplers and its dataset, if they define it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    parts.append(getattr(loader, "dataset", None))
    for part in {id(part): part for part in parts}.values():
        tell = getattr(part, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def _check_iterable(loader: Any, name: str) -> None:
    if isinstance(loader, Mapping):
        raise TypeError(
            f"{name} must be an iterable of batches, got a {type(loader).__name__} with the keys {list(loader)}: pass "
            "one of its values."
        )
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")) or isinstance(loader, type):
        raise TypeError(f"{name} must be an iterable of batches, got {loader!r}.")


def _rest(batches: Iterator[Tree]) -> Iterator[Tree]:
    """Yields the remaining batches without calling `iter`, which may restart the iterator."""
    while (batch := next(batches, _NOTHING)) is not _NOTHING:
        yield batch


def _position(text: str | None) -> dict[str, Any] | None:
    """Parses the result of `Reader.get_state`. Checkpoints of version 0.1 hold the bare loader state."""
    saved = None if text is None else json_state.loads(text)
    is_bare = not isinstance(saved, dict) or saved.keys() != {"state", "is_over"}
    return saved if saved is None or not is_bare else {"state": saved, "is_over": True}


def _plus(a: int | None, b: int | None) -> int | None:
    """Returns a + b, at least 0, or None (no limit) if either is None."""
    return None if a is None or b is None else max(a + b, 0)
