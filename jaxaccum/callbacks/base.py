"""The `Callback` base class and the `Trainer` interface that callbacks see."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxaccum.task import Task


class TrainerView(Protocol):
    """The part of `Trainer` that callbacks may use; see `Trainer` for the members."""

    @property
    def should_stop(self) -> bool: ...
    @should_stop.setter
    def should_stop(self, stop: bool) -> None: ...
    @property
    def accumulate_grad_batches(self) -> int: ...
    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, k: int) -> None: ...
    @property
    def state(self) -> Any: ...
    @property
    def is_resuming(self) -> bool: ...
    @property
    def current_epoch(self) -> int: ...
    @property
    def micro_step(self) -> int: ...
    @property
    def window_step(self) -> int: ...
    @property
    def global_step(self) -> int: ...
    @property
    def samples_seen(self) -> int: ...
    @property
    def effective_batch_size(self) -> float: ...
    @property
    def num_training_batches(self) -> float: ...
    @property
    def estimated_stepping_batches(self) -> float: ...
    @property
    def callback_metrics(self) -> dict[str, float]: ...
    @property
    def progress_bar_metrics(self) -> dict[str, float]: ...
    @property
    def should_log(self) -> bool: ...
    def copy_state(self) -> Any: ...
    def log(self, name: str, value: Any) -> None: ...


class Callback:
    """Base class for callbacks. Hooks have Lightning's names and receive the `Task` in place of Lightning's module.

    Hooks run in the order of the callbacks, in every process. The next micro-step donates the arrays of
    `trainer.state`; use `trainer.copy_state()` to keep them longer.
    """

    def on_fit_start(self, trainer: TrainerView, task: Task) -> None:
        """Called before all other hooks, after the parameters are initialised."""

    def on_fit_end(self, trainer: TrainerView, task: Task) -> None:
        """Called after all other hooks, unless an exception was raised."""

    def on_train_start(self, trainer: TrainerView, task: Task) -> None:
        """Called before the first epoch."""

    def on_train_end(self, trainer: TrainerView, task: Task) -> None:
        """Called after the last epoch, even if it is incomplete."""

    def on_train_epoch_start(self, trainer: TrainerView, task: Task) -> None:
        """Called before an epoch's first batch. `trainer.accumulate_grad_batches` may only be set here.

        It is not called when a run resumes in the middle of an epoch.
        """

    def on_train_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        """Called after an epoch's last batch and the validation that follows, or when training stops mid-epoch."""

    def on_train_batch_start(self, trainer: TrainerView, task: Task, batch: Any, batch_idx: int) -> None:
        """Called before a micro-step, whose index in its epoch is `batch_idx`.

        `batch` is the loader's batch; with strategy "ddp" or "zero" a list of batches, at most one per device of this
        process.
        """

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        """Called after a micro-step has been dispatched; the counters include it.

        `outputs` has the micro-step's "loss", not divided by K, and its metrics, over this process's devices. Reading a
        value waits for the devices. `batch` and `batch_idx` are as in `on_train_batch_start`.
        """

    def on_before_optimizer_step(self, trainer: TrainerView, task: Task) -> None:
        """Called once per optimizer step, before the call on the devices that ends the window and runs it.

        The state and the counters are those before that call: before the window's last micro-step, or before all of the
        window with `fuse_windows`.
        """

    def on_validation_start(self, trainer: TrainerView, task: Task) -> None:
        """Called before a validation."""

    def on_validation_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        """Called after a validation's last batch; `trainer.callback_metrics` has the results."""

    def on_validation_end(self, trainer: TrainerView, task: Task) -> None:
        """Called after a validation."""

    def on_exception(self, trainer: TrainerView, task: Task, error: BaseException) -> None:
        """Called before an exception is re-raised; `trainer.state` is the state after the last complete micro-step."""

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; by default the class name."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to save in a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned."""
