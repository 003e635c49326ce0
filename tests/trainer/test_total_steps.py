"""An optimizer that needs the number of optimizer steps, and the estimate of it before `fit`."""

import dataclasses

import optax
import pytest
from training import Unsized, assert_same, ones, single, slope, trainer

import jaxaccum
from jaxaccum.callbacks import ModelCheckpoint

BY_TOKENS = jaxaccum.AccumulationSchedule({0: 1, 8: 2}, by="tokens")
LINEAR = dataclasses.replace(slope(), optimizer=lambda total_steps: optax.sgd(1 / total_steps))


@pytest.mark.parametrize("devices", [1, 4])
def test_an_optimizer_may_need_the_number_of_steps(tmp_path, devices):
    """Catches micro-steps, loader batches or one epoch taken for the steps, also where a run goes on in mid-window.

    With K = 4, 4, 2, an epoch of 6 micro-steps has 2, 2 and 3 windows. Each of the 7 steps takes 1/7 from w.
    """
    batches = ones(*[2] * 6 * devices)
    options = {"strategy": "single" if devices == 1 else "ddp", "devices": devices, "max_epochs": 3}
    options["accumulate_grad_batches"] = {0: 4, 2: 2}
    t = trainer(callbacks=ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1), **options)
    assert t.estimate_optimizer_steps(batches) == 7
    want = t.fit(LINEAR, batches)
    assert t.global_step == t.estimated_stepping_batches == 7 and float(want.params) == pytest.approx(-1)
    resumed = trainer(**options)
    assert_same(resumed.fit(LINEAR, batches, ckpt_path=tmp_path / "epoch=1-micro_step=9"), want)


def test_another_number_of_steps_makes_another_optimizer():
    """Catches the schedule of an earlier fit, and programs that are compiled anew for the same number."""
    t = single()
    assert float(t.fit(LINEAR, ones(2, 2)).params) == -1
    made = t._running.setup.programs
    assert float(t.fit(LINEAR, ones(2, 2, 2, 2)).params) == -1
    assert t._running.setup.programs is not made
    made = t._running.setup.programs
    t.fit(LINEAR, ones(2, 2, 2, 2))
    assert t._running.setup.programs is made


@pytest.mark.parametrize(
    ("options", "batches", "want"),
    [
        ({"max_epochs": 2}, ones(2, 2, 2), 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, ones(2, 2, 2), 4),
        ({"max_epochs": None, "max_steps": 5}, Unsized(ones(2)), 5),
        ({"max_epochs": 2, "max_steps": 5}, ones(2, 2, 2), 5),
        ({"max_epochs": 2, "limit_train_batches": 2}, Unsized(ones(2)), 4),
        ({"max_epochs": 2, "overfit_batches": 2}, ones(2, 2, 2), 4),
        ({"max_epochs": 2, "fast_dev_run": 2}, ones(2, 2, 2), 2),
        ({"max_steps": 9, "fast_dev_run": 2, "accumulate_grad_batches": BY_TOKENS}, ones(2, 2, 2), 2),
        ({"max_epochs": None, "max_time": {"hours": 1}, "max_steps": 9}, ones(2), 9),
        ({"max_epochs": 2}, Unsized(ones(2)), None),
        ({"max_epochs": -1}, ones(2), None),
        ({"max_epochs": None, "max_time": {"hours": 1}}, ones(2), None),
    ],
)
def test_the_number_of_steps_is_known_before_fit_or_refused(options, batches, want):
    """Catches an infinite number of steps that reaches a schedule, and a loader that is read for its length."""
    t = single(**options)
    if want is not None:
        assert t.estimate_optimizer_steps(batches) == want
        return
    for ask in (t.estimate_optimizer_steps, lambda loader: t.fit(LINEAR, loader)):
        with pytest.raises(ValueError, match=r"number of optimizer steps is not known.*pass max_steps, or max_epochs"):
            ask(batches)
