"""Where a run stands, as the host counts it."""

import dataclasses


@dataclasses.dataclass
class Counters:
    """All that a run's state has besides its arrays; `dataclasses.asdict` makes it a dict of ints.

    Attributes:
      epoch: the epoch, from 0.
      batch_idx: the micro-steps made in it.
      micro_step: the micro-steps made.
      global_step: the windows closed: the optimizer steps made.
      samples_seen: the examples in them.
      window_step: the micro-steps in the open window.
      window_samples: the examples in it.
      effective_batch: the examples in the last window that was closed.
      every_k: K.
    """

    epoch: int = 0
    batch_idx: int = 0
    micro_step: int = 0
    global_step: int = 0
    samples_seen: int = 0
    window_step: int = 0
    window_samples: int = 0
    effective_batch: int = 0
    every_k: int = 1
