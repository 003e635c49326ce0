"""The hooks of a run, and which of its callbacks fill them."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxaccum.callbacks import Callback
from jaxaccum.task import Task

if TYPE_CHECKING:
    from jaxaccum.trainer import Trainer


class Hooks:
    """The callbacks' own methods, by name and in order: a hook that nobody fills costs nothing.

    Args:
      trainer: is passed to each of them.
      task: likewise.
      callbacks: in the order in which they run.
    """

    def __init__(self, trainer: "Trainer", task: Task, callbacks: Sequence[Callback]):
        self._filled = {
            name: [
                functools.partial(getattr(callback, name), trainer, task)
                for callback in callbacks
                if getattr(type(callback), name) is not getattr(Callback, name)
            ]
            for name in vars(Callback)
            if name.startswith("on_")
        }

    def call(self, name: str, *args: Any) -> None:
        """Calls all that fill the hook of that name."""
        for hook in self._filled[name]:
            hook(*args)
