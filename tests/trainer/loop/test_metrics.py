"""The sums of a run over an epoch, which are read from the devices as late as possible."""

import numpy as np
import pytest

from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum.trainer.loop.metrics import UNFINISHED, EpochSums


class Scalar:
    """A number on a device that may still be computing it."""

    def __init__(self, value, is_ready):
        self.value, self.ready, self.reads = value, is_ready, 0

    def copy_to_host_async(self):
        pass

    def is_ready(self):
        return self.ready

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return np.asarray(self.value, dtype)


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_window_is_read_once_it_is_finished_or_many_are_not(is_ready):
    """Catches a host that waits for each window, and windows that pile up on the devices."""
    totals = [Scalar(float(i), is_ready) for i in range(UNFINISHED + 2)]
    epoch = EpochSums()
    for total in totals:
        epoch.add({"loss": Weighted(total, Scalar(2.0, is_ready))})
    assert sum(total.reads for total in totals) == (len(totals) if is_ready else 2)
    assert epoch.means() == {"train_loss_epoch": sum(range(len(totals))) / (2 * len(totals))}
