"""A loader's batches, epoch by epoch, from the start or from where a checkpoint left them."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxaccum import _limits, _plain
from jaxaccum._counters import Counters
from jaxaccum._options import Options
from jaxaccum._processes import Processes, said

Tree = Any

ONE_SHOT = (
    "It is an iterator, which gives its batches once, but there are several epochs: pass something that can be "
    "iterated again, such as a list, or set limit_train_batches, max_steps or max_epochs=1."
)
_NOTHING = object()


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
        self._state = batches if keeps_state and _has_state(batches) else None

    def __iter__(self) -> Iterator[Tree]:
        return self._batches

    def get_state(self) -> str | None:
        """Where the loader's iterator stands, before it fetches its next batch: its state as text, None without one."""
        # As text at once: what it returns may be its very own, which the next fetch changes.
        return None if self._state is None else _plain.dumps(self._state.get_state(), type(self._state).__name__)


class TrainLoader:
    """What a run trains on, one epoch after another.

    Args:
      loader: an iterable of batches.
      options: of the run.

    Attributes:
      first: its first batch.
      epoch_batches: how many batches an epoch takes; None where that is all, and their number is not known.

    Raises:
      ValueError: if there is no batch, or there would be none in the next epoch.
    """

    def __init__(self, loader: Iterable[Tree], options: Options):
        self._loader = loader
        self.epoch_batches = _limits.batches(loader, options.limit_train_batches, "limit_train_batches")
        self._batches: Any = iter(loader)
        self._is_stream = self._batches is loader  # Then all epochs are one iterator's.
        if self._is_stream and self.epoch_batches is None and options.epochs != 1 and math.isinf(options.steps):
            raise ValueError(f"train_loader={loader!r} would be empty in epoch 1. {ONE_SHOT}")
        self.first = next(self._batches, _NOTHING)
        if self.first is _NOTHING:
            raise ValueError(f"train_loader={loader!r} is empty: it gave no batch.")
        self._rest = functools.partial(Reader, self._batches, [self.first], limit=self.epoch_batches)

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

    def go_on(self, at: Counters, state: str | None, own: Callable[[int], int]) -> None:
        """The first epoch has the batches after those that a run was trained on.

        Args:
          at: the place in the run.
          state: what `get_state` gave there.
          own: of so many loader batches of all processes, how many this process' loader gave.
        """
        in_epoch = at.batch_idx > 0 and not at.ends_epoch
        if not (in_epoch or self._is_stream):
            return
        limit = self.epoch_batches
        if in_epoch and limit is not None:
            limit = max(limit - own(at.batches), 0)
        if state is not None and _has_state(self._batches):
            self._batches.set_state(_plain.loads(state))
            self._rest = functools.partial(Reader, self._batches, limit=limit)
        else:
            taken = own(at.all_batches if self._is_stream else at.batches)
            self._rest = functools.partial(Reader, self._batches, [self.first], taken=taken, limit=limit)

    def epochs(self, keeps_state: bool) -> Iterator[Reader]:
        """The batches of each epoch, of the first those to come; `keeps_state` is as for `Reader`."""
        yield self._rest(keeps_state=keeps_state)
        while True:
            yield Reader(iter(self._loader), limit=self.epoch_batches, keeps_state=keeps_state)


def _has_state(batches: Iterator[Tree]) -> bool:
    """Whether an iterator can tell its state and take it back, as those of grain can."""
    return hasattr(batches, "get_state") and hasattr(batches, "set_state")
