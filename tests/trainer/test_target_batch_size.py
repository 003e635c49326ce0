"""`accumulate_grad_batches="auto"`: K from a target and from the loader's batches, and whether these fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles
from training import loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum._choosing.planner import api, step


class Stateful(list):
    """A loader with a state, which goes on where it was when it is iterated."""

    at = 0

    def __iter__(self):
        while self.at < len(self):
            self.at += 1
            yield self[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


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


@pytest.mark.parametrize("by", ["auto", "samples"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_resume_before_a_smaller_batch_knows_the_first_one(tmp_path, by, devices):
    """Catches a K, or a number of optimizer steps, from the first batch after the resume, not from the run's first."""
    batches = ones(*[8] * 4 * devices, *[4] * devices)
    options = {"strategy": "single" if devices == 1 else "ddp", "devices": devices, "max_epochs": 2}
    if by == "auto":
        options |= {"accumulate_grad_batches": "auto", "target_batch_size": 16 * devices}
    else:
        schedule = jaxaccum.AccumulationSchedule({0: 1, 16 * devices: 2}, by="samples")
        options["accumulate_grad_batches"] = schedule
    problem = slope(lambda total_steps: optax.sgd(1 / total_steps))
    saves = jaxaccum.callbacks.ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    want = trainer(callbacks=saves, **options)
    state = want.fit(problem, Stateful(batches))
    got = trainer(**options)
    resumed = got.fit(problem, Stateful(batches), ckpt_path=tmp_path / "epoch=0-micro_step=4")
    assert (got.global_step, got.effective_batch_size) == (want.global_step, 16 * devices)
    np.testing.assert_array_equal(resumed.params, state.params)


@pytest.mark.parametrize(
    ("strategy", "n", "fits", "fuse"),
    [("single", 8, 4, False), ("single", 16, 8, True), ("ddp", 8, 4, False), ("dp", 16, 8, False)],
)
def test_a_micro_batch_that_does_not_fit_is_refused(monkeypatch, strategy, n, fits, fuse):
    """Catches a run that ends for want of memory, a size of other devices, and a largest size that is not."""
    devices = 1 if strategy == "single" else 2
    options = {"strategy": strategy, "devices": devices, "fuse_windows": fuse}
    t = trainer(accumulate_grad_batches="auto", target_batch_size=64, **options)
    loss = lambda w, batch, key: jnp.mean(jnp.tanh(batch["x"] @ w) ** 2)
    problem = jaxaccum.Task(lambda key, batch: jnp.ones((3, 64)), loss, optax.adamw(0.1))
    batches, limits = loader(*[n] * (8 * devices)), []
    monkeypatch.setattr(api, "_device_limit", lambda sync: limits[-1])

    def peak(n):
        """The bytes that a step of the loader's batches of `n` examples needs."""
        every_k, own = 64 // n if fuse else 2, n // 2 if strategy == "dp" else n
        made = step.of(problem, None, batches[0], None, devices * own * every_k, t._strategy.sync, {})
        return made.memory(made.compiled(every_k)).total

    limits.append(peak(fits))
    message = rf"N = {n} examples takes [\d,]+ bytes \(parameters .* limit is {limits[-1]:,} bytes.* is {fits}: pass"
    with pytest.raises(ValueError, match=message):
        t.fit(problem, batches)
    assert t._run is None
    compiles = []
    for limits[-1] in (10**9, 10**9, None):  # The first compiles what all runs share.
        t = trainer(accumulate_grad_batches="auto", target_batch_size=64, **options)
        with counted_compiles() as compiled:
            t.fit(dataclasses.replace(problem), batches)
        compiles.append(len(compiled))
    assert compiles[1] == compiles[2] + 1


def test_errors():
    """Catches a target that is not met, or not told what to do."""
    with pytest.raises(ValueError, match=r"examples of a micro-step, 8; nearest: 16 and 24\."):
        trainer(accumulate_grad_batches="auto", target_batch_size=20, strategy="ddp", devices=2).fit(task(), loader(4))
    with pytest.raises(ValueError, match=r"target_batch_size=8 .* examples of a micro-step are 0"):
        single(accumulate_grad_batches="auto", target_batch_size=8).fit(task(), loader(0))
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
