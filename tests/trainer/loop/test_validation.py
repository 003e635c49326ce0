"""Validation: when it is due, what is refused before training, and what it leaves behind."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, Recorder, Unsized, assert_same, loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum.callbacks import Callback, EarlyStopping, ModelCheckpoint


class Validations(Callback):
    """Writes down after which micro-steps there was a validation, and keeps that in checkpoints."""

    def __init__(self):
        self.at = []

    def on_validation_end(self, trainer, task):
        self.at.append(trainer.micro_step)

    def state_dict(self):
        return {"at": list(self.at)}

    def load_state_dict(self, state_dict):
        self.at = state_dict["at"]


def validations(batches, **options):
    seen = Validations()
    callbacks = [seen, *options.pop("callbacks", ())]
    single(callbacks=callbacks, **options).fit(slope(), batches, ones(2))
    return seen.at


@pytest.mark.parametrize(
    ("sizes", "options", "want"),
    [
        (10, {"val_check_interval": 4, "max_epochs": 2}, [4, 8, 14, 18]),
        (10, {"val_check_interval": 4, "max_epochs": 2, "check_val_every_n_epoch": None}, [4, 8, 12, 16, 20]),
        (6, {"val_check_interval": 10, "max_epochs": 5}, [10, 20, 30]),
        (6, {"val_check_interval": 6, "max_epochs": 2}, [6, 12]),
        (6, {"val_check_interval": 0.5, "max_epochs": 2}, [3, 6, 9, 12]),
        (3, {"max_epochs": 4, "check_val_every_n_epoch": 2}, [6, 12]),
        (2, {"max_epochs": 6, "check_val_every_n_epoch": 3}, [6, 12]),
        (4, {"max_epochs": 4, "check_val_every_n_epoch": 2, "val_check_interval": 2}, [6, 8, 14, 16]),
    ],
)
@pytest.mark.parametrize("form", ["list", "unsized", "lies"])
def test_a_validation_falls_due_in_epochs_of_any_length(sizes, options, want, form):
    """Catches an interval longer than an epoch that is never reached, and one that believes the loader's length."""
    batches = ones(*[2] * sizes)
    if form != "list":
        if isinstance(options.get("val_check_interval"), float):
            pytest.skip("a fraction needs the length")
        batches = Unsized(batches, None if form == "unsized" else 10_000)
    assert validations(batches, **options) == want


def test_what_is_counted_towards_a_validation_survives_a_resume(tmp_path):
    """Catches a count that begins again where a run goes on."""
    options = {"val_check_interval": 10, "max_epochs": 4, "accumulate_grad_batches": 4}
    whole, rest = Validations(), Validations()
    batches, the_task = ones(*[2] * 6), slope()
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    single(callbacks=[whole, saves], **options).fit(the_task, batches, ones(2))
    assert whole.at == [10, 20]
    resumed = single(callbacks=rest, **options)
    for at in (1, 6, 9, 10, 12, 13, 19, 20, 24):
        (path,) = tmp_path.glob(f"*micro_step={at}")
        resumed.fit(the_task, batches, ones(2), ckpt_path=path)
        assert rest.at == [10, 20]


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        (ones(*[2] * 6), {"val_check_interval": 10}),
        (ones(*[2] * 6), {"val_check_interval": 4, "max_steps": 3}),
        (ones(*[2] * 6), {"max_steps": 5, "max_epochs": None}),
        (ones(*[2] * 6), {"check_val_every_n_epoch": 3, "max_epochs": 2}),
        (ones(*[2] * 6), {"check_val_every_n_epoch": 2, "max_epochs": 4, "max_steps": 11}),
        (itertools.repeat(np.ones(2, np.float32)), {"max_steps": 9, "max_epochs": None}),
        (itertools.repeat(np.ones(2, np.float32)), {"max_steps": 9, "max_epochs": -1, "val_check_interval": 10}),
        (Unsized(ones(*[2] * 6)), {"overfit_batches": 1, "val_check_interval": 10, "max_epochs": 4}),
        (Unsized(ones(2)), {"limit_train_batches": 6, "val_check_interval": 13, "max_epochs": 2}),
    ],
)
def test_what_can_never_fall_due_is_refused_before_training(batches, options):
    """Catches a run whose validations are all to come."""
    seen = Recorder(lambda t: t.micro_step)
    with pytest.raises(ValueError, match=r"no validation can fall due: val_check_interval=.*limit_val_batches=0"):
        single(callbacks=seen, **options).fit(slope(), batches, ones(2))
    assert not seen.seen
    single(limit_val_batches=0, **options).fit(slope(), ones(*[2] * 6), ones(2))


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        (ones(*[2] * 6), {"val_check_interval": 4, "max_steps": 3, "accumulate_grad_batches": 2}),
        (iter(ones(*[2] * 6)), {"max_epochs": 1, "max_steps": 9}),
        (iter(ones(*[2] * 6)), {"max_epochs": None, "max_steps": 6, "val_check_interval": 3}),
        (iter(ones(*[2] * 6)), {"max_epochs": 2, "limit_train_batches": 3}),
        (Unsized(ones(2, 2)), {"max_epochs": None, "max_steps": 5}),
    ],
)
def test_what_may_fall_due_is_not_refused(batches, options):
    """Catches a refusal on the strength of an estimate."""
    assert validations(batches, **options)


def test_a_hook_may_make_windows_longer():
    """Catches a refusal that takes the Trainer's K for the one that a callback will set."""

    class Sets(Callback):
        def on_train_epoch_start(self, trainer, task):
            trainer.accumulate_grad_batches = 3

    assert validations(ones(*[2] * 6), max_steps=2, callbacks=[Sets()]) == [6]


def test_a_length_by_which_none_falls_due_is_a_warning_and_so_is_a_run_without_any(tmp_path):
    """Catches a length believed in earnest, and a run that ends without a word on the validation it never had.

    `EarlyStopping` has its own word for that; `ModelCheckpoint`, which may look at the same value, has none.
    """
    with pytest.warns(UserWarning) as caught:
        seen = validations(Unsized(ones(*[2] * 6), length=3), val_check_interval=5)
    assert seen == [5] and ["no validation will fall due" in str(w.message) for w in caught] == [True]
    with pytest.warns(UserWarning, match="no validation fell due in the 4 micro-steps of this run") as caught:
        callbacks = [LongWindows(), ModelCheckpoint(tmp_path, monitor="val_loss")]
        validations(Unsized(ones(2, 2)), max_epochs=None, max_steps=4, val_check_interval=5, callbacks=callbacks)
    assert len(caught) == 1


class LongWindows(Callback):
    """Could set K."""

    def on_train_epoch_start(self, trainer, task):
        pass


def test_a_fraction_of_a_length_across_epochs_is_refused():
    """Catches an interval without a meaning."""
    for interval in (0.5, 1.0):
        with pytest.raises(ValueError, match=r"check_val_every_n_epoch=None .*val_check_interval"):
            single(check_val_every_n_epoch=None, val_check_interval=interval)
    with pytest.raises(ValueError, match=r"check_val_every_n_epoch.* 0"):
        single(check_val_every_n_epoch=0)


def broken(message="broken"):
    """A task that can be trained but not validated."""

    def loss(w, batch, key):
        if key is None:
            raise ZeroDivisionError(message)
        return w * jnp.mean(batch)

    return jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_what_is_wrong_with_a_validation_is_met_before_training(strategy, tmp_path):
    """Catches an epoch that is trained in vain, and a checkpoint of a run that never began."""
    saves = ModelCheckpoint(tmp_path)
    for the_task, val_loader, error, words in [
        (broken(), ones(2), ZeroDivisionError, "broken"),
        (slope(), [], ValueError, "val_loader gave no batch"),
        (slope(), iter(ones(2)), ValueError, "val_loader is an iterator, which gives its batches once"),
    ]:
        seen = Recorder(lambda t: t.micro_step)
        with pytest.raises(error, match=words):
            trainer(strategy=strategy, max_epochs=2, callbacks=[saves, seen]).fit(the_task, ones(2, 2), val_loader)
        assert not seen.seen and not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        single(num_sanity_val_steps=0, callbacks=seen).fit(broken(), ones(2, 2), ones(2))
    assert seen.seen == [1, 2]
    with pytest.raises(ValueError, match=r"num_sanity_val_steps must be an int of at least 0.*-2"):
        single(num_sanity_val_steps=-2)


def test_the_first_look_leaves_nothing_behind():
    """Catches a check that is logged, counted, seen by callbacks, or changes the run."""
    taken = []

    class Val(list):
        def __iter__(self):
            return (taken.append(i) or batch for i, batch in enumerate(super().__iter__()))

    states = {}
    for steps, want in ((0, 5), (2, 7), (-1, 10), (3, 8)):
        taken.clear()
        seen, stopping, log = Validations(), EarlyStopping("val_loss"), Logged()
        first = Recorder(lambda t: dict(t.callback_metrics))
        t = single(num_sanity_val_steps=steps, callbacks=[seen, stopping, first], logger=log)
        states[steps] = t.fit(task(dropout=0.5), loader(4, 4), Val(loader(*[4] * 5)))
        assert len(taken) == want and seen.at == [2] and stopping.wait == 0
        assert sum("val_loss" in record for record in log.records) == 1 and "val_loss" not in first.seen[0]
    for steps in (2, -1, 3):
        assert_same(states[steps], states[0])


def test_the_first_look_keeps_to_the_limit():
    """Catches a look at all batches of a loader that limit_val_batches cuts short."""

    class Loader:
        def __iter__(self):
            yield from ones(2, 2)
            raise AssertionError("beyond the limit")

    single(max_epochs=1, num_sanity_val_steps=-1, limit_val_batches=2).fit(slope(), ones(2), Loader())


@pytest.mark.parametrize(("strategy", "devices", "want"), [("single", 1, 2), ("ddp", 2, 4), ("dp", 2, 2)])
def test_the_first_look_counts_micro_steps(strategy, devices, want):
    """Catches a count of loader batches where each device takes one."""
    taken = []

    class Loader:
        def __iter__(self):
            for batch in ones(*[2] * 8):
                taken.append(batch)
                yield batch

    first, looked_at = Callback(), []
    first.on_train_batch_start = lambda *_: looked_at.append(len(taken))
    options = {"strategy": strategy, "devices": devices, "num_sanity_val_steps": 2}
    trainer(**options, callbacks=first).fit(slope(), ones(*[2] * devices), Loader())
    assert looked_at[0] == want


@pytest.mark.parametrize("form", ["iterator", "one iterator for ever", "begins anew"])
def test_the_first_look_takes_nothing_from_the_first_validation(form):
    """Catches a validation without the batches that were looked at before training."""
    values = [np.full(2, value, np.float32) for value in (1, 2, 3, 6)]

    class Same:
        held = iter(values)

        def __iter__(self):
            return self.held

    class Again:
        def __iter__(self):
            self.left = iter(values)
            return self

        def __next__(self):
            return next(self.left)

    val_loader = {"iterator": iter(values), "one iterator for ever": Same(), "begins anew": Again()}[form]
    the_task = jaxaccum.Task(
        lambda key, batch: jnp.zeros(()), lambda w, batch, key: batch.mean() + 0 * w, optax.sgd(1.0)
    )
    t = single(max_epochs=1)
    t.fit(the_task, ones(2), val_loader)
    assert t.callback_metrics["val_loss"] == 3


def test_a_val_loader_that_lasts_for_one_validation_is_refused_where_there_are_more():
    """Catches a run that ends in its second validation."""
    for options in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 9}, {"max_epochs": 1, "val_check_interval": 1}):
        with pytest.raises(ValueError, match="val_loader is an iterator"):
            single(**options).fit(slope(), ones(2, 2, 2), iter(ones(2)))
    assert validations(ones(2, 2), max_epochs=1) == [2]


def test_an_endless_val_loader_needs_a_limit():
    """Catches a validation that never ends, and a stream of validation batches refused."""
    stream = itertools.repeat(np.ones(2, np.float32))
    with pytest.raises(ValueError, match="an int limit_val_batches if it has no end"):
        single(max_epochs=2).fit(slope(), ones(2), stream)
    seen = Validations()
    single(max_epochs=2, limit_val_batches=3, callbacks=seen).fit(slope(), ones(2), stream)
    assert seen.at == [1, 2]


def test_validate_compiles_once():
    """Catches a program that is traced and compiled anew in every call."""
    traces = []

    def loss(w, batch, key):
        traces.append(key is None)
        return w * jnp.mean(batch)

    the_task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))
    t = single()
    state = t.fit(the_task, ones(2, 2), ones(2))
    before = len(traces)
    for _ in range(3):
        t.validate(the_task, ones(2, 2))
        t.validate(the_task, ones(2), state)
    t.fit(the_task, ones(2, 2), ones(2))
    assert len(traces) == before
    fresh = single()
    counts = []
    for _ in range(3):
        fresh.validate(the_task, ones(2, 2), state)
        counts.append(len(traces))
    assert counts[0] == counts[2]


class Shuffled(list):
    """Its order depends on the epoch."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(np.stack(list(super().__iter__()))))


@pytest.mark.parametrize("devices", [1, 4])
def test_overfitting_and_validations_of_some_epochs_go_on_in_mid_window(tmp_path, devices):
    """Catches batches of another epoch, batches counted in place of micro-steps, and epochs that are counted anew."""
    batches = Shuffled(np.full(2, x, np.float32) for x in range(5 * devices))
    options = {"overfit_batches": 3 * devices, "max_epochs": 4, "check_val_every_n_epoch": 2}
    options |= {"accumulate_grad_batches": 2, "strategy": "single" if devices == 1 else "ddp", "devices": devices}
    whole, rest = Validations(), Validations()
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    want = trainer(callbacks=[whole, saves], **options).fit(slope(), batches, ones(2))
    batches.set_epoch(0)
    first = list(batches)[: 3 * devices]
    assert float(want.params) == pytest.approx(-4 * (np.mean(first[: 2 * devices]) + np.mean(first[2 * devices :])))
    assert whole.at == [6, 12]
    got = trainer(callbacks=rest, **options).fit(slope(), batches, ones(2), ckpt_path=tmp_path / "epoch=2-micro_step=7")
    assert_same(got, want)
    assert rest.at == [6, 12]


@pytest.mark.parametrize("devices", [1, 4])
def test_several_loaders_have_results_of_their_own(tmp_path, devices):
    """Catches a mean over all loaders, and one that is passed over, or not gone on with in mid-window.

    The slope is 1 and each window of ones takes 1 from w. The means of the loaders are (2·1 + 1·4) / 3 = 2 and 3.
    """
    batches, val = ones(*[2] * 4 * devices), {"a": [np.ones(2), np.full(1, 4.0)], "b": [np.full(1, 3.0)]}
    stopping = EarlyStopping("val_loss/b", mode="max", patience=2)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, monitor="val_loss/a", save_top_k=-1)

    def run(*callbacks):
        log = Logged()
        strategy = "single" if devices == 1 else "ddp"
        options = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 3, "logger": log}
        return trainer(strategy=strategy, devices=devices, callbacks=callbacks, **options), log

    whole, log = run(stopping, saves)
    want = whole.fit(slope(), batches, val)
    found = [(r["val_loss/a"], r["val_loss/b"]) for r in log.records if "val_loss/a" in r]
    assert found == [(-2, -3), (-6, -9)] and stopping.wait == 1 and not any("val_loss" in r for r in log.records)
    assert whole.validate(slope(), val, want) == {"val_loss/a": -8, "val_loss/b": -12}
    resumed, rest = run()
    assert_same(resumed.fit(slope(), batches, val, ckpt_path=tmp_path / "epoch=0-micro_step=3"), want)
    found = [(r["val_loss/a"], r["val_loss/b"]) for r in rest.records if "val_loss/a" in r]
    assert found[-1] == (-6, -9) and resumed.callback_metrics["val_loss/b"] == -9
    with pytest.raises(ValueError, match=r"val_loader\['b'\] gave no batch"):
        single().fit(slope(), batches, val | {"b": []})
    with pytest.raises(ValueError, match=r"val_loader\['b'\] is an iterator"):
        single(max_epochs=2).fit(slope(), batches, val | {"b": iter(ones(2))})


@pytest.mark.parametrize("which", ["last", "best", "path"])
@pytest.mark.parametrize("model_state", [False, True])
def test_validate_takes_a_checkpoint(tmp_path, which, model_state):
    """Catches a checkpoint that can be validated only by the Trainer that made it."""
    the_task, train, val = task(model_state=model_state), loader(4, 4, 4), loader(4, 4)
    saves = lambda: ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    saved, log = saves(), Logged()
    t = single(max_epochs=4, callbacks=saved, logger=log)
    state = t.fit(the_task, train, val)
    want = {"last": state, "path": state}.get(which)
    path = {"path": saved.last_model_path}.get(which, which)
    got = single(callbacks=saves()).validate(the_task, val, ckpt_path=path)
    if want is None:
        assert got["val_loss"] == pytest.approx(min(r["val_loss"] for r in log.records if "val_loss" in r))
    else:
        assert got == t.validate(the_task, val, want)
    with pytest.raises(ValueError, match="either state or ckpt_path='last'"):
        t.validate(the_task, val, state, ckpt_path="last")
    with pytest.raises(ValueError, match=r"is not of this task: \.params"):
        single(callbacks=saves()).validate(slope(), ones(2), ckpt_path="last")
    for name in ("last", "best"):
        with pytest.raises(FileNotFoundError, match=f"ckpt_path='{name}' finds no checkpoint"):
            empty = ModelCheckpoint(tmp_path / "empty", monitor="val_loss")
            single(callbacks=empty).validate(the_task, val, ckpt_path=name)
