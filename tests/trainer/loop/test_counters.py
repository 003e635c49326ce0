"""The counters of a run, where a run goes on with other micro-steps."""

import pytest

from jaxaccum.trainer.loop.counters import Counters


@pytest.mark.parametrize(
    ("before", "now", "want"),
    [(8, 2, (12, 12, 16, 20)), (2, 4, (6, 2, 2, 3)), (8, 8, (3, 3, 4, 5)), (1, 3, (8, 1, 2, 2))],
)
def test_micro_steps_of_another_number_of_batches(before, now, want):
    """Catches a count that stays in the micro-steps of before, or that loses a part of one."""
    at = Counters(batch_idx=3, micro_step=9, window_step=3, every_k=4, batches=24, toward_validation=5)
    then = at.regrouped(before, now)
    assert (then.batch_idx, then.window_step, then.every_k, then.toward_validation) == want
    assert (then.batches, then.micro_step) == (24, 9)
