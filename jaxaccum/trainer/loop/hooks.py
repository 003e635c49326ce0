"""Calls the callbacks' hooks."""

import functools
from collections.abc import Sequence
from typing import Any

from jaxaccum.callbacks import Callback, TrainerView
from jaxaccum.callbacks.monitor import Monitor
from jaxaccum.task import Task


class Hooks:
    """The hooks that callbacks override, by name and in order. A hook that no callback overrides costs nothing."""

    def __init__(self, trainer: TrainerView, task: Task, callbacks: Sequence[Callback]):
        self._filled = {
            name: [
                functools.partial(getattr(callback, name), trainer, task)
                for callback in callbacks
                if _overrides(callback, name)
            ]
            for name in vars(Callback)
            if name.startswith("on_")
        }
        monitors = filter(None, map(Monitor.of, callbacks))
        # Whether a callback itself warns if there was no validation.
        self.warn_of_no_validation = any(monitor.needs_validation and monitor.warns for monitor in monitors)
        # Whether a callback may set K at an epoch's start, other than by the Trainer's schedule.
        self.may_set_k = any(_overrides(callback, "on_train_epoch_start") for callback in callbacks)

    def call(self, name: str, *args: Any) -> None:
        for hook in self._filled[name]:
            hook(*args)

    def call_on_exception(self, error: BaseException) -> None:
        """Calls `on_exception` on all callbacks; an exception in one is added to `error` as a note."""
        for hook in self._filled["on_exception"]:
            try:
                hook(error)
            except Exception as failure:
                error.add_note(f"{hook.func!r} raised {failure!r} when it was called with this error.")


def _overrides(callback: Callback, name: str) -> bool:
    """Whether a hook is defined on the callback's class or on the instance."""
    hook = getattr(callback, name)
    return getattr(hook, "__func__", hook) is not getattr(Callback, name)
