"""`Trainer.test` and `Trainer.predict`: what they give, from which state, on which devices."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, ones, single, slope, trainer

import jaxaccum
from jaxaccum.callbacks import ModelCheckpoint

STRATEGIES = pytest.mark.parametrize(
    ("strategy", "devices"), [("single", 1), ("ddp", 4), ("dp", 4), ("zero", 4), ("dp", 1)]
)


def fitted(strategy, devices, the_task, **options):
    """A Trainer after one optimizer step on batches of 4 ones."""
    t = trainer(strategy=strategy, devices=devices, **options)
    t.fit(the_task, ones(*[4] * (1 if strategy == "dp" else devices)))
    return t


@STRATEGIES
def test_a_test_gives_the_weighted_means_and_logs_them(strategy, devices):
    """Catches a mean of means, and names of a validation: w is -1, and (3·1 + 1·5) / 4 = 2."""
    log = Logged()
    t = fitted(strategy, devices, slope(), logger=log)
    batches = [np.ones(3, np.float32), np.full(1, 5, np.float32)]
    before = list(log.records)
    assert t.test(slope(), batches) == {"test_loss": -2}
    place = {"step": 1, "epoch": 1, "micro_step": t.micro_step, "samples_seen": t.samples_seen}
    assert log.records == [*before, {**place, "test_loss": -2}]
    assert t.test(slope(), {"a": batches, "b": batches[1:]}) == {"test_loss/a": -2, "test_loss/b": -5}
    assert t.callback_metrics.keys() == {"train_loss"}


@STRATEGIES
@pytest.mark.parametrize("model_state", [False, True])
def test_predictions_are_those_of_each_batch(strategy, devices, model_state):
    """Catches rows of another batch, of those that fill up a micro-step, or in another order; w is 2, the state 3."""
    init = lambda key, batch: (jnp.full((), 2.0), jnp.full((), 3.0)) if model_state else jnp.full((), 2.0)
    predicted = lambda w, batch: {"y": w * batch, "twice": (batch + 1, batch)}
    if model_state:
        loss, predict = lambda w, s, batch, key: (w, s), lambda w, s, batch: predicted(w * s, batch)
    else:
        loss, predict = lambda w, batch, key: w, predicted
    the_task = jaxaccum.Task(init, loss, optax.sgd(0.0), model_state, predict)
    t = fitted(strategy, devices, the_task)
    batches = [np.arange(n, dtype=np.float32) for n in (4, 4, 4, 5, 5, 4, 1)]
    found = t.predict(the_task, batches)
    assert len(found) == len(batches)
    for got, batch in zip(found, batches, strict=True):
        np.testing.assert_array_equal(got["y"], (6 if model_state else 2) * batch)
        np.testing.assert_array_equal(got["twice"], (batch + 1, batch))
        assert type(got["y"]) is np.ndarray


def test_a_prediction_may_be_a_number_where_batches_are_whole():
    """Catches predictions that must have rows, and an error of NumPy's own where they must."""
    the_task = jaxaccum.Task(lambda key, x: jnp.ones(()), lambda w, x, key: w, optax.sgd(0.0), predict=lambda w, x: 3)
    t = fitted("ddp", 2, the_task)
    assert t.predict(the_task, ones(2, 2, 2)) == [3, 3, 3]
    with pytest.raises(ValueError, match=r"predict returned a scalar.*strategy='dp'.*one entry for each example"):
        fitted("dp", 2, the_task).predict(the_task, ones(2))


def test_a_loader_is_read_once_and_programs_compile_once():
    """Catches a program that is traced in every call, and a generator of which batches are lost."""
    traces = []
    the_task = jaxaccum.Task(
        lambda key, x: jnp.ones(()), lambda w, x, key: w, optax.sgd(0.0), predict=lambda w, x: traces.append(1) or w * x
    )
    t = fitted("single", 1, the_task)
    for _ in range(2):
        assert len(t.predict(the_task, (batch for batch in ones(2, 2, 2, 2, 2)))) == 5
    assert len(traces) == 1 and t.predict(the_task, []) == []


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("which", ["last", "best", "path"])
def test_test_and_predict_take_a_checkpoint_in_a_new_process(tmp_path, devices, which):
    """Catches a checkpoint that its own Trainer alone can find; w is -1, -2, -3, and |w + 2| is least in the second."""
    loss = lambda w, batch, key: w * jnp.mean(batch) if key is not None else jnp.abs(w + 2) + 0 * jnp.mean(batch)
    the_task = jaxaccum.Task(lambda key, x: jnp.zeros(()), loss, optax.sgd(1.0), predict=lambda w, x: w * x)
    saves = lambda: ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    strategy, log = "single" if devices == 1 else "ddp", Logged()
    trainer(strategy=strategy, devices=devices, max_epochs=3, callbacks=saves()).fit(
        the_task, ones(*[2] * devices), ones(2)
    )
    new = single(callbacks=saves(), logger=log)
    path = {"path": tmp_path / "epoch=2-micro_step=3"}.get(which, which)
    w = -2 if which == "best" else -3
    assert new.test(the_task, ones(2), ckpt_path=path) == {"test_loss": abs(w + 2)}
    assert (log.records[0]["step"], log.records[0]["epoch"]) == (-w, (1 if which == "best" else 3))
    (got,) = new.predict(the_task, ones(2), ckpt_path=path)
    np.testing.assert_array_equal(got, [w, w])


def test_init_of_a_new_process_sees_arrays(tmp_path):
    """Catches a batch of another library that reaches `Task.init` as it is; in `fit` it is converted."""

    class Tensor:
        def __init__(self, array):
            self.shape, self._array = array.shape, array

        def __array__(self, dtype=None, copy=None):
            return self._array

    the_task = jaxaccum.Task(lambda key, x: 0 * x.sum(), lambda w, x, key: w * jnp.mean(x), optax.sgd(1.0))
    saves, batches = ModelCheckpoint(tmp_path), [Tensor(x) for x in ones(2)]
    single(callbacks=saves).fit(the_task, batches)
    assert single(callbacks=saves).validate(the_task, batches, ckpt_path="last") == {"val_loss": -1}


def test_a_validation_after_fit_has_the_limit_of_those_in_fit():
    """Catches `overfit_batches` forgotten after `fit`, and an error that advises what caused it."""
    batches = [np.full(2, i, np.float32) for i in (1, 2, 3)]
    t = single(overfit_batches=1)
    t.fit(slope(), batches, batches)
    assert t.validate(slope(), batches) == {"val_loss": t.callback_metrics["val_loss"]} == {"val_loss": -1}
    t = single(limit_val_batches=0)
    t.fit(slope(), batches, batches)
    with pytest.raises(ValueError, match="limit_val_batches=0 means no validation"):
        t.validate(slope(), batches)


def test_errors_name_argument_value_and_remedy(tmp_path):
    """Catches what fails deep inside of jax."""
    t = fitted("single", 1, slope())
    with pytest.raises(ValueError, match=r"task has no predict: pass Task\(predict="):
        t.predict(slope(), ones(2))
    with pytest.raises(ValueError, match=r"test_loader gave no batch: .*such as a list\.$"):
        t.test(slope(), [])
    with pytest.raises(ValueError, match=r"test_loader\['b'\] gave no batch"):
        t.test(slope(), {"a": ones(2), "b": []})
    with pytest.raises(ValueError, match="either state or ckpt_path='last', not both"):
        t.test(slope(), ones(2), t.state, ckpt_path="last")
    with pytest.raises(TypeError, match=r"predict_loader must be an iterable of batches, got a dict with the keys"):
        t.predict(dataclasses.replace(slope(), predict=slope().init), {"a": ones(2)})
    with pytest.raises(TypeError, match=r"predict must be a function, or None.* got 3"):
        jaxaccum.Task(slope().init, slope().loss, optax.sgd(1.0), predict=3)
    with pytest.raises(RuntimeError, match="fit"):
        single().test(slope(), ones(2))
    with pytest.raises(FileNotFoundError, match="ckpt_path='last' finds no checkpoint"):
        single(callbacks=ModelCheckpoint(tmp_path)).test(slope(), ones(2), ckpt_path="last")
