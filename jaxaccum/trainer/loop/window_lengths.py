"""K of each window, decided at the window's start."""

from typing import Any

import jax

from jaxaccum._schedule import AccumulationSchedule
from jaxaccum.callbacks import AdaptiveAccumulation
from jaxaccum.loggers import records
from jaxaccum.trainer.loop.counters import Counters


class WindowLengths:
    """Decides K by a schedule or adaptively, and holds what windows measured on the devices.

    K of window w follows from the measurements of windows 0 to w - 2. Reading them leaves window w - 1 to the devices,
    so that they don't wait for the host, and the lag is the same in every process and after a resume.
    """

    def __init__(self, schedule: AccumulationSchedule, adaptive: AdaptiveAccumulation | None = None):
        self._schedule, self._adaptive = schedule, adaptive
        self._weight = 0.0  # Σ w of the windows that decide.
        # For each later window, oldest first: Σ w, or what `adaptive` measured; numbers or device scalars.
        self._undecided: list[Any] = []
        self._kind = "undecided" if adaptive is None else "estimates"  # Of these, in a checkpoint.
        if adaptive is not None:
            adaptive.start(schedule(0))

    @property
    def change_with_windows(self) -> bool:
        """Whether K may change within an epoch."""
        return self._adaptive is not None or self._schedule.by != "epoch"

    def close(self, weight: jax.Array, micro_steps: int) -> None:
        """Takes what the window measured that was just closed, without waiting for it."""
        measured = weight if self._adaptive is None else self._adaptive.measured(weight, micro_steps)
        for x in jax.tree.leaves(measured):
            if hasattr(x, "copy_to_host_async"):
                x.copy_to_host_async()
        self._undecided.append(measured)

    def every_k(self, at: Counters) -> int:
        """Returns K of the window that starts at `at`."""
        while len(self._undecided) > 1:
            measured = jax.tree.map(records.number, self._undecided.pop(0))
            if self._adaptive is None:
                self._weight += measured
            else:
                self._adaptive.follow(at.global_step, *measured)
        if self._adaptive is not None:
            return self._adaptive.every_k
        counts = {"epoch": at.epoch, "step": at.global_step, "samples": at.samples_seen, "tokens": self._weight}
        return self._schedule(counts[self._schedule.by])

    def most_micro_steps(self, at: Counters, steps: int | float) -> int | float:
        """Returns the most micro-steps after `at` in a run of `steps` windows, or in the epoch if K is by epoch.

        By "samples" and "tokens", or adaptively, there may be fewer.
        """
        schedule, later = self._schedule, steps - at.global_step - 1
        every_k = at.every_k if at.window_step or not self.change_with_windows else self.every_k(at)
        if self._adaptive is not None:
            return every_k - at.window_step + later * self._adaptive.rule.max_k
        if schedule.by == "step" and isinstance(steps, int):
            return every_k - at.window_step + sum(map(schedule, range(at.global_step + 1, steps)))
        largest = every_k if schedule.by == "epoch" else max(1, *schedule.values())
        return every_k - at.window_step + later * largest

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint. Waits for the last window."""
        return {"weight": self._weight, self._kind: jax.tree.map(records.number, self._undecided)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight, self._undecided = state["weight"], list(state.get(self._kind, []))
