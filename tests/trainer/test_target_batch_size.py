"""`accumulate_grad_batches="auto"`: K from a target and from the loader's batches."""

import jax
import numpy as np
import optax
import pytest
from training import loader, ones, single, slope, task, trainer

import jaxaccum


@pytest.mark.parametrize(("strategy", "k"), [("single", 6), ("ddp", 3), ("dp", 6)])
def test_a_window_has_the_target(strategy, k):
    """Catches a window of another number of examples, and a K that the estimate does not know."""
    options = {"strategy": strategy, "devices": 1 if strategy == "single" else 2, "max_epochs": 2}
    auto = trainer(accumulate_grad_batches="auto", target_batch_size=24, **options)
    given = trainer(accumulate_grad_batches=k, **options)
    problem, batches = task(), loader(*[4] * 12)
    states = [x.fit(problem, batches) for x in (auto, given)]
    assert auto.accumulate_grad_batches == k and auto.effective_batch_size == 24
    assert auto.global_step == auto.estimated_stepping_batches == given.global_step == 4
    jax.tree.map(np.testing.assert_array_equal, *[state.params for state in states])
    # Another loader makes another K.
    auto.fit(problem, loader(*[12] * 4))
    assert auto.effective_batch_size == 24


def test_errors():
    """Catches a target that is not met, or not told what to do."""
    with pytest.raises(ValueError, match=r"examples of a micro-step, 8; nearest: 16 and 24\."):
        trainer(accumulate_grad_batches="auto", target_batch_size=20, strategy="ddp", devices=2).fit(task(), loader(4))
    for options in ({"accumulate_grad_batches": "auto"}, {"target_batch_size": 8}):
        with pytest.raises(ValueError, match="target_batch_size"):
            trainer(**options)
    scheduler = jaxaccum.callbacks.GradientAccumulationScheduler({0: 2})
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        trainer(accumulate_grad_batches="auto", target_batch_size=8, callbacks=scheduler)
    with pytest.raises(ValueError, match="target_batch_size"):
        trainer(accumulate_grad_batches="auto", target_batch_size=0)


def test_an_optimizer_of_total_steps_knows_the_k_of_the_target():
    """Catches a schedule that was made before the loader's batch was seen."""
    seen = []
    chosen = lambda total_steps: seen.append(total_steps) or optax.sgd(1.0)
    t = single(accumulate_grad_batches="auto", target_batch_size=8, max_epochs=3)
    t.fit(slope(chosen), ones(2, 2, 2, 2))
    assert seen[-1] == t.global_step == 3
    with pytest.raises(ValueError, match=r'accumulate_grad_batches="auto" needs the first batch'):
        t.estimate_optimizer_steps(ones(2))
    t = single(accumulate_grad_batches=jaxaccum.AccumulationSchedule({0: 1, 4: 2}, by="samples"), max_epochs=2)
    t.fit(slope(chosen), ones(2, 2, 2, 2))
    assert seen[-1] == t.global_step == 5
