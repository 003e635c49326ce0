"""What a callback is, and what it sees of a `Trainer`."""

from collections.abc import Mapping
from typing import Any, Protocol

from jaxaccum.task import Task


class TrainerView(Protocol):
    """What a callback sees of a `Trainer`, which documents these members."""

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
    """Hooks of a run, under Lightning's names; where Lightning passes its module, the `Task` is passed.

    Hooks run in the order of the callbacks, in every process. The arrays of `trainer.state` are donated by the next
    micro-step: to keep them longer, ask for `trainer.copy_state()`.
    """

    def on_fit_start(self, trainer: TrainerView, task: Task) -> None:
        """Before anything else; the parameters exist."""

    def on_fit_end(self, trainer: TrainerView, task: Task) -> None:
        """After everything else, if nothing was raised."""

    def on_train_start(self, trainer: TrainerView, task: Task) -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: TrainerView, task: Task) -> None:
        """After the last epoch, whether it was complete or not."""

    def on_train_epoch_start(self, trainer: TrainerView, task: Task) -> None:
        """Before an epoch's first batch. Here and nowhere else `trainer.accumulate_grad_batches` may be set.

        It is not called where a run goes on in the middle of an epoch.
        """

    def on_train_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        """After an epoch's last batch and the validation that follows it, or where training stops in mid-epoch."""

    def on_train_batch_start(self, trainer: TrainerView, task: Task, batch: Any, batch_idx: int) -> None:
        """Before a micro-step.

        Args:
          trainer: the trainer.
          task: the task.
          batch: what the loader gave; with strategy "ddp" or "zero" a list of such batches, up to one for each device
            of this process.
          batch_idx: the micro-step's number in its epoch.
        """

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        """After a micro-step has been dispatched; the counters include it.

        Args:
          trainer: the trainer.
          task: the task.
          outputs: the micro-step's "loss", not divided by K, and its metrics, on this process' devices. Reading one
            waits for them.
          batch: as for `on_train_batch_start`.
          batch_idx: likewise.
        """

    def on_validation_start(self, trainer: TrainerView, task: Task) -> None:
        """Before a validation."""

    def on_validation_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        """After its last batch; `trainer.callback_metrics` has its results."""

    def on_validation_end(self, trainer: TrainerView, task: Task) -> None:
        """After a validation."""

    def on_exception(self, trainer: TrainerView, task: Task, error: BaseException) -> None:
        """Something was raised, and will go on its way; `trainer.state` is that of the last whole micro-step."""

    @property
    def state_key(self) -> str:
        """Which callback's state a checkpoint's is: by default the class' name."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
