"""A loader's batches, epoch by epoch, from the start or from where a checkpoint left them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxaccum._types import Tree
from jaxaccum.checkpoint import json_state
from jaxaccum.distributed.process_group import Processes, said
from jaxaccum.trainer.input import batch_limits
from jaxaccum.trainer.input.options import Options
from jaxaccum.trainer.input.progress import Counters

ONE_SHOT = (
    "It is an iterator, which gives its batches once, but there are several epochs: pass something that can be "
    "iterated again, such as a list, or set limit_train_batches, max_steps or max_epochs=1."
)
_NOTHING = object()


class Position(NamedTuple):
    """How to read and set the position of a loader or of its iterator.

    Attributes:
      get: returns the state.
      put: takes it back.
      owner: the name of the class that they are methods of.
    """

    get: Callable[[], Any]
    put: Callable[[Any], None]
    owner: str

    @classmethod
    def of(cls, owner: Any) -> "Position | None":
        """That of `owner`: grain's `get_state` and `set_state`, or `state_dict` and `load_state_dict`; None without."""
        for names in (("get_state", "set_state"), ("state_dict", "load_state_dict")):
            get, put = (getattr(owner, name, None) for name in names)
            if callable(get) and callable(put):
                return cls(get, put, type(owner).__name__)
        return None


class Reader:
    """The batches of an epoch, to be iterated over once.

    Args:
      batches: the loader's iterator.
      ahead: batches that were taken from it before.
      taken: how many of all these to pass over.
      limit: how many to give at most; None is all.
      position: of the loader, if `get_state` will be called.

    Attributes:
      given: how many batches it has given.
      is_over: whether the loader's iterator has said that it has no more.
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
        self.given, self.is_over = 0, False
        self._batches = itertools.islice(itertools.chain(ahead, self._rest(batches)), taken, _plus(taken, limit))

    def __iter__(self) -> Iterator[Tree]:
        for batch in itertools.islice(self._batches, self._stop):
            self.given += 1
            yield batch

    def _rest(self, batches: Iterator[Tree]) -> Iterator[Tree]:
        yield from _rest(batches)
        self.is_over = True

    def stop_after(self, batches: int | float) -> None:
        """Takes no more than so many batches, though the epoch may have more."""
        if batches < (math.inf if self._limit is None else self._limit):
            self._stop = int(batches)

    @property
    def was_stopped(self) -> bool:
        """Whether it ended as `stop_after` says: it is not known whether the epoch has further batches."""
        return self.given == self._stop

    def get_state(self) -> str | None:
        """The loader's position before it fetches its next batch, as text; None without one."""
        if self._position is None:
            return None
        # As text at once: what the loader returns may be its own, which the next fetch changes.
        return json_state.dumps({"state": self._position.get(), "is_over": self.is_over}, self._position.owner)


class TrainLoader:
    """What a run trains on, one epoch after another. Nothing is fetched before `begin`.

    Args:
      loader: an iterable of batches. A `set_epoch` of it, its sampler or its dataset is called before each epoch.
      options: of the run.
      keeps_state: whether checkpoints will ask for the loader's position.

    Attributes:
      first: the first batch that it gave, for the parameters' initialisation.

    Raises:
      ValueError: if a limit is a fraction of a length that is not known.
    """

    first: Tree

    def __init__(self, loader: Iterable[Tree], options: Options, keeps_state: bool):
        _check_iterable(loader, "train_loader")
        if options.overfit_batches:
            loader = FirstBatches(loader, options.overfit_batches)
        self._loader, self._options, self._keeps_state = loader, options, keeps_state
        self._position = Position.of(loader)
        self._begun: Reader | None = None
        self._stream: Iterator[Tree] | None = None
        self._old_pass: bool | None = None  # Of a state at an epoch's end: whether its pass was over.
        _ = self.epoch_batches  # Raises, if it does, before training.

    @property
    def is_stream(self) -> bool:
        """Whether all epochs are one iterator's."""
        return self._stream is not None

    @property
    def epoch_batches(self) -> int | None:
        """How many batches an epoch is expected to have, as far as the loader says; None where it doesn't."""
        return batch_limits.expected(self._loader, self._options.limit_train_batches, "limit_train_batches")

    @property
    def _limit(self) -> int | None:
        return batch_limits.limit(self._loader, self._options.limit_train_batches, "limit_train_batches")

    def epoch_bounds(self, group: int) -> tuple[int | float, int | float]:
        """The fewest and the most micro-steps, of `group` batches each, that an epoch can have for certain."""
        limit, loader = self._limit, self._loader
        if self.is_stream and limit is None and self._options.epochs != 1:
            return math.inf, math.inf  # Only `max_steps` ends it.
        if isinstance(loader, FirstBatches):
            loader = loader.batches
        most = math.inf if limit is None else limit
        least = 1
        if isinstance(loader, Sequence):
            least = most = min(len(loader), most)
        return -(-least // group), most if math.isinf(most) else -(-most // group)

    def agree(self, processes: Processes) -> None:
        """Checks that an epoch is as long in all processes, as far as they know.

        Raises:
          ValueError: on all of them, if not.
        """
        lengths = dict(enumerate(processes.gather("the length of an epoch", self.epoch_batches)))
        known = {process: batches for process, batches in lengths.items() if batches is not None}
        if len(set(known.values())) > 1:
            raise ValueError(
                f"an epoch of train_loader has another number of batches on another process: {said(known)}. Give all "
                f"processes equally many, for example with limit_train_batches={min(known.values())}."
            )

    def begin(self, at: Counters, state: str | None = None, own: Callable[[int], int] = int) -> None:
        """Makes the iterator of the epoch that a run starts in, or goes on in, and fetches `first`.

        Args:
          at: the place in the run.
          state: what `Reader.get_state` gave there; None without one.
          own: of so many loader batches of all processes, how many this process' loader gave.

        Raises:
          ValueError: if there is no batch, or there would be none in the next epoch.
        """
        set_epoch(self._loader, at.epoch)
        is_in_epoch = at.batch_idx > 0 and not at.ends_epoch
        saved = _position(state)
        # A loader takes its state before it is iterated over, an iterator afterwards.
        loader = None if saved is None or isinstance(self._loader, Iterator) else self._position
        if loader is not None and saved is not None and not at.ends_epoch:
            self._put(loader, saved, is_in_epoch)
        batches, self.first = self._iterated()
        self._check_first(at)
        if loader is not None and saved is not None and at.ends_epoch:
            self._put(loader, saved, is_in_epoch)
        if at.ends_epoch and not self.is_stream:
            return  # The next epoch has an iterator of its own.
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
        """Takes so many batches from a stream, the first of which has been taken, and gives back what is too much."""
        for _ in range(batches - 1):
            self._next_of_stream()
        return [] if batches else [self.first]

    def _next_of_stream(self) -> Tree:
        """The next batch of an iterator; one that begins anew where it is iterated over again does so at its end."""
        batch = next(self._stream, _NOTHING) if self._stream is not None else _NOTHING
        return next(iter(self._loader), _NOTHING) if batch is _NOTHING else batch

    def epoch(self, number: int) -> Reader:
        """The batches of an epoch, which is the next one; of the first, those that are still to come."""
        begun, self._begun = self._begun, None
        if begun is None:
            set_epoch(self._loader, number)
            batches, first = (self._stream, self._next_of_stream()) if self._stream is not None else self._iterated()
            begun = self._reader(batches, [] if first is _NOTHING else [first], 0, self._limit)
        return begun

    def _iterated(self) -> tuple[Iterator[Tree], Tree]:
        """A new iterator, and its first batch; `_NOTHING` where there is none.

        The state of a loader that was saved at an epoch's end puts it there. If the epoch ended because the loader had
        no more, its next iterator begins the next epoch, or has nothing and the one after it does. If it ended by a
        limit, the next iterator goes on with the former epoch, at the latest when its first batch is asked for.
        """
        was_over, self._old_pass = self._old_pass, None
        batches = iter(self._loader)
        if was_over is False:
            next(batches, None)
            batches = iter(self._loader)
        if batches is self._loader and batch_limits.size(self._loader) is None:
            self._stream = batches  # One with a length begins anew where it is iterated over again.
        first = next(batches, _NOTHING)
        if first is _NOTHING and was_over is not None:
            batches = iter(self._loader)
            first = next(batches, _NOTHING)
        return batches, first

    def _check_first(self, at: Counters) -> None:
        """Whether there is a batch, and will be one in the next epoch."""
        options = self._options
        if self.is_stream and self._limit is None and options.epochs != 1 and math.isinf(options.steps):
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
    """The first batches of a loader, read once, then the same in every epoch.

    Args:
      loader: an iterable of batches.
      limit: how many, or which fraction of them.
    """

    def __init__(self, loader: Iterable[Tree], limit: int | float):
        self._loader, self._limit = loader, limit
        self._batches: list[Tree] | None = None
        self._expected = batch_limits.expected(loader, limit, "overfit_batches")

    def __len__(self) -> int:
        return self._expected or 0

    @property
    def batches(self) -> list[Tree]:
        """They themselves."""
        if self._batches is None:
            set_epoch(self._loader, 0)
            limit = batch_limits.limit(self._loader, self._limit, "overfit_batches")
            self._batches = list(itertools.islice(self._loader, limit))
        return self._batches

    def __iter__(self) -> Iterator[Tree]:
        return iter(self.batches)


class ValLoader:
    """What a run validates on, from its start in each validation.

    Args:
      loader: an iterable of batches.
      limit: as the Trainer's `limit_val_batches`.

    Raises:
      ValueError: if `limit` is a fraction of a length that is not known.
    """

    def __init__(self, loader: Iterable[Tree], limit: int | float):
        _check_iterable(loader, "val_loader")
        self._loader, self._limit = loader, limit
        self._looked_at: tuple[Any, list[Tree]] = None, []
        batch_limits.limit(loader, limit, "limit_val_batches")

    @property
    def lasts_for_one(self) -> bool:
        """Whether one validation takes all that there is: the loader is an iterator, and is read to its end."""
        return isinstance(self._loader, Iterator) and self._batches_limit is None

    @property
    def _batches_limit(self) -> int | None:
        return batch_limits.limit(self._loader, self._limit, "limit_val_batches")

    def first(self, batches: int | None) -> Iterator[Tree]:
        """The first batches of the next validation, which will have them too; None is all."""
        iterator, kept = iter(self._loader), []
        self._looked_at = iterator, kept
        limits = [limit for limit in (batches, self._batches_limit) if limit is not None]
        for batch in itertools.islice(iterator, min(limits, default=None)):
            kept.append(batch)
            yield batch

    def __iter__(self) -> Iterator[Tree]:
        (former, kept), self._looked_at = self._looked_at, (None, [])
        iterator = former if former is self._loader else iter(self._loader)
        # An iterator, or a loader that always gives the same one, doesn't give its first batches again.
        batches = itertools.chain(kept, _rest(iterator)) if iterator is former else iterator
        return itertools.islice(batches, self._batches_limit)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells a loader, its samplers and its dataset which epoch comes next, where they have `set_epoch`."""
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
    """What an iterator has yet to give; its `iter`, which may begin anew, is not called."""
    while (batch := next(batches, _NOTHING)) is not _NOTHING:
        yield batch


def _position(text: str | None) -> dict[str, Any] | None:
    """What `Reader.get_state` put into text. In checkpoints of version 0.1 that is the loader's state alone."""
    saved = None if text is None else json_state.loads(text)
    is_bare = not isinstance(saved, dict) or saved.keys() != {"state", "is_over"}
    return saved if saved is None or not is_bare else {"state": saved, "is_over": True}


def _plus(a: int | None, b: int | None) -> int | None:
    """The sum, at least 0; None, which is no limit, if either is None."""
    return None if a is None or b is None else max(a + b, 0)
