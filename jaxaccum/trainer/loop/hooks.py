"""Calls the callbacks' hooks."""

import functools
from collections.abc import Sequence
from typing import Any

from jaxaccum.callbacks import Callback, TrainerView
from jaxaccum.callbacks.monitor import Monitor
from jaxaccum.callbacks.scheduler import offered_schedule
from jaxaccum.task import Task


class Hooks:
    """The hooks that callbacks override, by name and in order. A hook that no callback overrides costs nothing.

    Args:
      trainer: the trainer, passed to each hook.
      task: the task, passed to each hook.
      callbacks: the callbacks, in the order in which they run.

    Attributes:
      warn_of_no_validation: whether a callback itself warns if there was no validation.
      may_set_k: whether a callback may set K at an epoch's start, other than by the Trainer's schedule.
    """

    def __init__(self, trainer: TrainerView, task: Task, callbacks: Sequence[Callback]):
        filling = {
            name: [callback for callback in callbacks if _function(callback, name) is not getattr(Callback, name)]
            for name in vars(Callback)
            if name.startswith("on_")
        }
        self._filled = {
            name: [functools.partial(getattr(callback, name), trainer, task) for callback in those]
            for name, those in filling.items()
        }
        monitors = [monitor for monitor in map(Monitor.of, callbacks) if monitor is not None]
        self.warn_of_no_validation = any(monitor.needs_validation and monitor.warns for monitor in monitors)
        self.may_set_k = any(offered_schedule(callback) is None for callback in filling["on_train_epoch_start"])

    def call(self, name: str, *args: Any) -> None:
        """Calls a hook on all callbacks that override it."""
        for hook in self._filled[name]:
            hook(*args)

    def call_on_exception(self, error: BaseException) -> None:
        """Calls `on_exception` on all callbacks; an exception in one is added to `error` as a note."""
        for hook in self._filled["on_exception"]:
            try:
                hook(error)
            except Exception as failure:
                error.add_note(f"{hook.func!r} raised {failure!r} when it was called with this error.")


def _function(callback: Callback, name: str) -> Any:
    """Returns the function of a hook, defined on the callback's class or on the instance."""
    hook = getattr(callback, name)
    return getattr(hook, "__func__", hook)
