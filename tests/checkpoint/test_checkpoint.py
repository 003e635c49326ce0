"""Checkpoints: when they are saved, which are kept, what they contain, and failures to write or read one."""

import datetime
import errno
import functools
import json
import math
import re
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint._src.metadata.checkpoint as metadata
import pytest
from training import Recorder, assert_same, loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum import checkpoint
from jaxaccum.callbacks import EMA, Callback, EarlyStopping, ModelCheckpoint
from jaxaccum.checkpoint import orbax_io
from jaxaccum.distributed import process_group
from jaxaccum.distributed.process_group import Processes
from jaxaccum.loggers import JSONLLogger


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def micro_steps(folder):
    return sorted(int(name.rpartition("=")[2].partition("-")[0]) for name in names(folder))


class Breaks(Callback):
    """Raises after a micro-step, or does something else then."""

    def __init__(self, at, error=None, do=None):
        self.at, self.error, self.do = at, error, do

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.micro_step == self.at:
            if self.do is not None:
                self.do(trainer)
            if self.error is not None:
                raise self.error


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"every_n_micro_steps": 3}, [3, 6, 9, 10]),
        ({"every_n_train_steps": 2}, [4, 7, 10]),
        ({"every_n_epochs": 2}, [10]),
        ({}, [5, 10]),
    ],
)
def test_checkpoints_are_saved_at_their_interval_and_at_the_end(tmp_path, options, want):
    """Catches an interval in other units, a save for every micro-step of a window, and an end that is not saved."""
    saves = ModelCheckpoint(tmp_path, save_top_k=-1, **options)
    single(accumulate_grad_batches=2, max_epochs=2, callbacks=saves).fit(slope(), ones(*[2] * 5))
    assert micro_steps(tmp_path) == want
    assert saves.last_model_path == saves.best_model_path and saves.last_model_path.is_dir()


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        # A micro-step takes 7 s: 21 s and 42 s after the start, 20 s have passed.
        (20, [3, 6, 8]),
        (7, [1, 2, 3, 4, 5, 6, 7, 8]),
        (70, [8]),
    ],
)
def test_checkpoints_are_saved_as_time_passes(tmp_path, monkeypatch, seconds, want):
    """Catches a time that is not counted from the last save, and one that a validation or an epoch's end counts."""
    clock = [1000.0]
    monkeypatch.setattr(process_group, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    class Ticks(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            clock[0] += 7

    def run(folder, **options):
        saves = ModelCheckpoint(folder, train_time_interval=datetime.timedelta(seconds=seconds), save_top_k=-1)
        t = single(accumulate_grad_batches=2, max_epochs=2, callbacks=[saves, Ticks()])
        return t.fit(the_task, batches, batches[:1], **options)

    the_task, batches = task(dropout=0.3), loader(4, 4, 4, 4)
    end = run(tmp_path)
    assert micro_steps(tmp_path) == want
    assert_same(run(tmp_path / "resumed", ckpt_path=tmp_path / names(tmp_path)[0]), end)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [2, 5]),
        ({"save_top_k": 2}, [2, 3, 5]),
        ({"save_top_k": 2, "mode": "max"}, [1, 5]),
        ({"save_top_k": 0}, [5]),
        ({"save_top_k": -1}, [1, 2, 3, 4, 5]),
        ({"save_top_k": 1, "save_last": False}, [2, 5]),
        ({"save_top_k": 0, "save_last": False}, []),
    ],
)
def test_the_best_are_kept_and_the_newest(tmp_path, options, want):
    """Catches the worst kept for the best, the newest lost, a NaN that is the best of all, and what is not kept."""
    values = [4.0, 1.0, 3.0, math.nan, 9.0]
    table = jnp.array(values)
    loss = lambda w, batch, key: 0 * w + jnp.mean(batch) if key is not None else table[jnp.int32(w)] + 0 * batch.mean()
    count = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (jnp.ones(()), ()))
    the_task = jaxaccum.Task(lambda key, batch: -jnp.ones(()), loss, count)
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", **options)
    single(max_epochs=5, callbacks=saves).fit(the_task, ones(2), ones(2))
    assert sorted(set(micro_steps(tmp_path))) == want
    if options.get("save_top_k") != 0:
        best = max if options.get("mode") == "max" else min
        assert saves.state_dict()["saved"][saves.best_model_path.name] == best(v for v in values if not math.isnan(v))


def test_the_newest_of_equals_is_the_best():
    """Catches a run that improves on nothing, and keeps where it began."""
    policy = ModelCheckpoint("run", monitor="score", save_top_k=2)
    assert policy.ranked({"a": 1.0, "b": 2.0, "c": 1.0}) == ["c", "a"]


def test_what_is_saved_in_mid_epoch_has_no_rank(tmp_path):
    """Catches a checkpoint that ranks by the value of an earlier one."""
    saves, stop = ModelCheckpoint(tmp_path, monitor="score"), Breaks(3, do=lambda t: setattr(t, "should_stop", True))
    single(max_epochs=2, callbacks=[saves, Ranks([1.0, 0.0]), stop]).fit(slope(), ones(2, 2))
    assert [path.name.rpartition("=")[2] for path in (saves.best_model_path, saves.last_model_path)] == ["2", "3"]


def test_what_is_outdated_goes_only_when_the_new_one_is_complete(tmp_path, monkeypatch):
    """Catches a moment without any checkpoint, and folders that pile up."""
    start, seen = checkpoint.Writer.start, []

    def started(self, path, *args):
        start(self, path, *args)
        seen.append([name for name in names(tmp_path) if checkpoint.CUT_OFF not in name])

    monkeypatch.setattr(checkpoint.Writer, "start", started)
    single(callbacks=ModelCheckpoint(tmp_path, every_n_micro_steps=1)).fit(slope(), ones(*[2] * 5))
    assert all(1 <= len(there) <= 2 for there in seen[1:]) and len(names(tmp_path)) == 1


def test_a_removal_that_is_cut_off_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Catches a checkpoint that lost a part of its files, and is read."""
    path = tmp_path / "epoch=0-micro_step=1"
    (path / "notes").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **options: None)
        orbax_io.remove(path)
    assert not path.exists()
    assert orbax_io.newest([tmp_path], Processes()) is None
    orbax_io.remove(path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["at once", "in the background"])
def test_a_full_disk_costs_a_warning_that_names_the_path(tmp_path, monkeypatch, where):
    """Catches a run that a failed save ends, a silent failure, and good checkpoints lost with the bad one."""
    full = OSError(errno.ENOSPC, "No space left on device")
    owner, method = (
        (ocp.AsyncCheckpointer, "save") if where == "at once" else (ocp.CompositeCheckpointHandler, "finalize")
    )
    whole = getattr(owner, method)

    def breaks(self, path, *args, **kwargs):
        if "micro_step=4" in str(path) or "micro_step=5" in str(path):
            raise full
        return whole(self, path, *args, **kwargs)

    monkeypatch.setattr(owner, method, breaks)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1)
    batches, the_task = loader(*[4] * 5), task()
    with pytest.warns(UserWarning, match=f"{tmp_path}.* could not be written.*No space left.*make room") as caught:
        got = single(callbacks=saves).fit(the_task, batches)
    assert "micro_step=4" in str(caught[0].message) and len(caught) == 1  # The end fails likewise.
    want = single().fit(the_task, batches)
    assert_same(got, want)
    assert micro_steps(tmp_path) == [3] and saves.last_model_path.name == "epoch=0-micro_step=3"
    monkeypatch.undo()
    assert_same(single(callbacks=saves).fit(the_task, batches, ckpt_path="last"), want)


# Orbax reads all arrays at once, and gives up at the first that fails: the errors of the others are lost.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_last_passes_over_what_is_cut_off_or_broken(tmp_path):
    """Catches a resume that fails on a damaged checkpoint, uses it, or silently starts afresh."""
    batches, the_task = loader(*[4] * 6), task()
    fit = lambda **options: single(
        callbacks=ModelCheckpoint(tmp_path, every_n_micro_steps=2, save_top_k=-1), accumulate_grad_batches=4
    ).fit(the_task, batches, **options)
    with pytest.warns(UserWarning, match=f"finds no checkpoint in {tmp_path}.*afresh"):
        want = fit(ckpt_path="last")
    (tmp_path / "epoch=0-micro_step=6.orbax-checkpoint-tmp").mkdir()
    for data in (tmp_path / "epoch=0-micro_step=6").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    (tmp_path / "epoch=0-micro_step=4" / "notes" / "notes.json").write_text('{"counters"')
    with pytest.warns(UserWarning) as caught:
        got = fit(ckpt_path="last")
    assert_same(got, want)
    cut_off, truncated, broken = (str(warning.message) for warning in caught)
    assert "tmp was cut off while it was written" in cut_off and "passed over" in cut_off
    assert "micro_step=4 can't be read" in truncated and "passed over" in truncated
    assert "micro_step=6 can't be read" in broken and "passed over" in broken
    assert not list(tmp_path.glob("*tmp"))


def test_an_older_runs_checkpoints_are_neither_overwritten_nor_taken_for_the_newest(tmp_path):
    """Catches the furthest checkpoint taken for the newest, and a name that can't be used twice."""
    saves = ModelCheckpoint(tmp_path, save_top_k=-1)
    single(max_epochs=3, callbacks=saves).fit(slope(), ones(2))
    for _ in range(2):
        single(max_epochs=1, callbacks=saves).fit(slope(), ones(4))
    versions = [(1, ""), (1, "-v1"), (1, "-v2"), (2, ""), (3, "")]
    assert names(tmp_path) == [f"epoch={i}-micro_step={i}{v}" for i, v in versions]
    t = single(max_epochs=1, callbacks=saves)
    t.fit(slope(), ones(4), ckpt_path="last")
    assert t.samples_seen == 4


def test_a_checkpoint_of_another_task_names_the_path_and_the_leaf(tmp_path):
    """Catches an error of orbax's or XLA's, and arrays that are taken for others."""
    saves = ModelCheckpoint(tmp_path)
    single(callbacks=saves).fit(task(), loader(4))
    path = saves.last_model_path
    wider = [{"x": np.ones((4, 7), np.float32), "y": np.ones((4, 2), np.float32)}]
    for the_task, batches, options, words in [
        (task(), wider, {}, r"\.params\['w'\] is float32\[3, 2\] there and float32\[7, 2\] here"),
        (task(optax.sgd(1.0)), loader(4), {}, r"\.opt_state\[0\].count is int32\[\] there and missing here"),
        (task(), loader(4), {"gradient_clip_val": 1.0}, r"opt_state.* is missing there"),
        (task(model_state=True), loader(4), {}, r"\.model_state\['seen'\] is missing there and float32\[\] here"),
    ]:
        with pytest.raises(ValueError, match=f"{path} is not of this task: .*{words}.*another ckpt_path"):
            single(**options).fit(the_task, batches, ckpt_path=path)


def test_errors_name_argument_value_and_remedy(tmp_path, monkeypatch):
    """Catches what is found out late, or not at all."""
    with pytest.raises(ValueError, match=r"ckpt_path='last' is .*add one, or pass the path"):
        single().fit(slope(), ones(2), ckpt_path="last")
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path / 'nothing'}"):
        single().fit(slope(), ones(2), ckpt_path=tmp_path / "nothing")
    with pytest.raises(OSError, match=f"{tmp_path} can't be read as a checkpoint"):
        single().fit(slope(), ones(2), ckpt_path=tmp_path)
    single(callbacks=ModelCheckpoint(tmp_path)).fit(slope(), ones(2))
    with pytest.raises(OSError, match=f"{tmp_path} holds checkpoints, the newest 'epoch=1-.*': pass the path of one"):
        single().fit(slope(), ones(2), ckpt_path=tmp_path)
    for options, match in [
        ({"train_time_interval": 60}, "train_time_interval must be .*timedelta.*got 60"),
        ({"train_time_interval": datetime.timedelta(0)}, "train_time_interval must be .*above 0.*timedelta\\(0\\)"),
        ({"train_time_interval": datetime.timedelta(1), "every_n_epochs": 1}, "one interval, got .*add another"),
        ({"every_n_epochs": 1, "every_n_micro_steps": 2}, "one interval, got .*every_n_epochs.*add another"),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be .*0"),
        ({"mode": "least"}, "mode must be .*'least'"),
        ({"save_top_k": 2}, "save_top_k must be .*monitor.* got 2"),
        ({"save_top_k": -2}, "save_top_k must be .* got -2"),
    ]:
        with pytest.raises(ValueError, match=match):
            ModelCheckpoint(tmp_path, **options)
    monkeypatch.setitem(__import__("sys").modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'ModelCheckpoint needs orbax: pip install "jaxaccum\[training\]"'):
        ModelCheckpoint()


def test_any_array_of_a_state_comes_back(tmp_path):
    """Catches what orbax refuses or mixes up: arrays without elements, typed keys, names with signs of their own."""
    shape = lambda key, batch: (
        {"a/b.c": jnp.ones(3, jnp.bfloat16), "a": {"b.c": jnp.full((), 2.0)}, "empty": jnp.ones((0, 2)), "é'": None},
        {"key": key, "count": jnp.zeros((), jnp.uint8)},
    )

    def loss(params, state, batch, key):
        new = {"key": jax.random.split(state["key"])[0], "count": state["count"] + 1}
        return sum(jnp.sum(p).astype(jnp.float32) for p in jax.tree.leaves(params)) * jnp.mean(batch), new

    the_task = jaxaccum.Task(shape, loss, optax.adam(0.1), model_state=True)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=2, save_top_k=-1)
    t = trainer(strategy="ddp", devices=2, accumulate_grad_batches=3, callbacks=saves)
    want = t.fit(the_task, ones(*[2] * 12))
    path = tmp_path / "epoch=0-micro_step=2"
    got = t.fit(the_task, ones(*[2] * 12), ckpt_path=path)
    assert_same(*(jax.tree.map(_plain, state) for state in (got, want)))
    got = single().fit(the_task, ones(*[2] * 12), ckpt_path=path)
    assert jnp.issubdtype(got.model_state["key"].dtype, jax.dtypes.prng_key)


def _plain(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


class Stream:
    """An endless iterator that tells where it is, as grain's do."""

    def __init__(self, batches, fetched):
        self.batches, self.fetched, self.place = batches, fetched, {"next": 0}

    def __iter__(self):
        return self

    def __next__(self):
        i, self.place["next"] = self.place["next"], self.place["next"] + 1
        self.fetched.append(i)
        return self.batches[i % len(self.batches)]

    def get_state(self):
        return self.place  # Its own: what comes later changes it.

    def set_state(self, state):
        self.place = state


class Again:
    """A loader of such iterators, one for each epoch."""

    def __init__(self, batches, fetched):
        self.batches, self.fetched = batches, fetched

    def __iter__(self):
        return Stream(self.batches, self.fetched)


@pytest.mark.parametrize("epochs", ["again", "one stream"])
@pytest.mark.parametrize("stateful", [True, False])
def test_the_next_batch_is_the_first_that_was_not_trained_on(tmp_path, epochs, stateful):
    """Catches a state taken after the look-ahead, batches of earlier epochs passed over or not, and a state ignored."""
    batches, the_task = loader(*[4] * 7), task(dropout=0.3)
    stream = epochs == "one stream"

    def source(fetched=None):
        if stateful:
            return (Stream if stream else Again)(batches, fetched if fetched is not None else [])
        return (batch for _ in range(9) for batch in batches) if stream else batches

    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    t = single(accumulate_grad_batches=2, max_epochs=3, callbacks=saves, limit_train_batches=5)
    want = t.fit(the_task, source())
    saves.every_n_micro_steps = None
    for name in ("epoch=0-micro_step=4", "epoch=1-micro_step=8", "epoch=1-micro_step=10", "epoch=3-micro_step=15"):
        fetched = []
        assert_same(t.fit(the_task, source(fetched), ckpt_path=tmp_path / name), want)
        if stateful and name == "epoch=1-micro_step=8":
            assert fetched[:3] == ([0, 8, 9] if stream else [0, 3, 4])


def test_a_loader_with_a_state_that_cannot_be_kept_is_named(tmp_path):
    """Catches a pickle, and an error that is met only by the resume."""

    class Bad(Stream):
        def get_state(self):
            return {object(): 2}

    fit = functools.partial(single, limit_train_batches=2)
    with pytest.raises(TypeError, match=r"state of Bad can't be kept.*holds a object"):
        fit(callbacks=ModelCheckpoint(tmp_path)).fit(slope(), Bad(ones(2, 2), []))
    Bad.get_state = lambda self: [{1, 2}]
    with pytest.raises(TypeError, match=r"state of Bad can't be kept.*holds a set"):
        fit(callbacks=ModelCheckpoint(tmp_path)).fit(slope(), Bad(ones(2, 2), []))
    fit().fit(slope(), Bad(ones(2, 2), []))  # Without checkpoints its state is not asked for.


@pytest.mark.parametrize("who", ["loader", "callback"])
def test_an_error_is_the_users_and_the_run_is_saved(tmp_path, who):
    """Catches a run lost to an error in mid-window, and the error lost to the save."""
    batches, the_task, error = loader(*[4] * 6), task(dropout=0.2), OSError("mine")

    def broken():
        yield from batches[:3]
        raise error

    breaks = Breaks(3, None if who == "loader" else error)
    t = single(accumulate_grad_batches=4, callbacks=[ModelCheckpoint(tmp_path), breaks])
    with pytest.raises(OSError, match="mine") as caught:
        t.fit(the_task, broken() if who == "loader" else batches)
    assert caught.value is error
    assert names(tmp_path) == ["epoch=0-micro_step=3"]
    breaks.error = None
    assert_same(t.fit(the_task, batches, ckpt_path="last"), t.fit(the_task, batches))


def test_an_error_of_a_program_is_raised_as_it_is(tmp_path):
    """Catches a save of arrays that went with the program that failed, in place of its error."""
    delete = lambda t: jax.tree.map(lambda x: x.delete(), t.state)
    with pytest.raises(RuntimeError, match="mine"):
        single(callbacks=[ModelCheckpoint(tmp_path), Breaks(2, RuntimeError("mine"), delete)]).fit(slope(), ones(2, 2))
    assert not tmp_path.exists() or not names(tmp_path)


def test_a_stop_in_mid_window_is_kept_in_the_checkpoint_even_if_it_is_flushed(tmp_path):
    """Catches (row 17) a partial window that a stop drops, and a resume from the flushed window."""
    batches, the_task = loader(*[4] * 6), task()
    want = single(accumulate_grad_batches=4).fit(the_task, batches)
    for flush in (False, True):
        saves = ModelCheckpoint(tmp_path / str(flush))
        stop = Breaks(2, do=lambda t: setattr(t, "should_stop", True))
        t = single(accumulate_grad_batches=4, callbacks=[saves, stop], flush_on_stop=flush)
        t.fit(the_task, batches)
        assert t.global_step == flush and micro_steps(tmp_path / str(flush)) == [2]
        again = single(accumulate_grad_batches=4, callbacks=ModelCheckpoint(tmp_path / str(flush)))
        assert_same(again.fit(the_task, batches, ckpt_path="last"), want)


def test_early_stopping_stays_stopped_and_goes_on_with_more_patience(tmp_path):
    """Catches a stopped run that a resume takes further, and a count that starts again."""
    loss = lambda w, batch, key: jnp.mean(batch) + 0 * w
    the_task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))

    def fit(patience, **options):
        callbacks = [EarlyStopping("val_loss", patience=patience), ModelCheckpoint(tmp_path)]
        t = single(max_epochs=9, callbacks=callbacks)
        t.fit(the_task, ones(2), ones(2), **options)
        return t.current_epoch

    assert fit(2) == 3
    assert fit(2, ckpt_path="last") == 3
    assert fit(4, ckpt_path="last") == 5


def test_the_seed_of_a_resume_is_the_checkpoints(tmp_path):
    """Catches other masks after the resume, and its masks in a later run of the same Trainer."""
    batches, the_task = loader(*[4] * 4), task(dropout=0.5)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    want = single(seed=3, callbacks=saves).fit(the_task, batches)
    other, own = single(seed=4), single(seed=4).fit(the_task, batches)
    got = other.fit(the_task, batches, ckpt_path=tmp_path / "epoch=0-micro_step=2")
    assert_same(got.params, want.params)
    assert_same(other.fit(the_task, batches).params, own.params)


def test_a_resumed_run_may_be_made_longer(tmp_path):
    """Catches a run that thinks itself over, and an epoch's end that comes twice."""
    batches, the_task = loader(*[4] * 5), task()
    saves = ModelCheckpoint(tmp_path)
    for options in ({"max_epochs": 1}, {"max_epochs": 4, "max_steps": 5}, {"max_epochs": 4}):
        t = single(accumulate_grad_batches=2, callbacks=saves, **options)
        got = t.fit(the_task, batches, ckpt_path="last" if options["max_epochs"] > 1 else None)
    assert_same(got, t.fit(the_task, batches))


def test_a_loader_that_ends_before_the_checkpoint_does_is_refused(tmp_path):
    """Catches an epoch that never ends, or ends in mid-window, because the loader is another."""
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=3, save_top_k=-1)
    single(callbacks=saves).fit(slope(), ones(*[2] * 5))
    path = tmp_path / "epoch=0-micro_step=3"
    for batches, options in [(ones(2, 2, 2), {}), (ones(*[2] * 5), {"limit_train_batches": 2})]:
        with pytest.raises(ValueError, match="no batch in epoch 0 after the 3 that the checkpoint was trained on"):
            single(**options).fit(slope(), batches, ckpt_path=path)


@pytest.mark.parametrize("strategy", ["single", "zero"])
def test_a_copy_of_the_state_outlives_the_next_micro_step(strategy):
    """Catches a copy that shares its buffers with what is donated, or lies elsewhere."""
    kept = Recorder(lambda t: (t.copy_state(), jax.tree.map(np.array, t.state)))
    t = trainer(strategy=strategy, callbacks=kept)
    state = t.fit(task(), loader(*[4] * 24))
    for copy, want in kept.seen:
        assert_same(copy, want)
        assert jax.tree.map(lambda x: x.sharding, copy) == jax.tree.map(lambda x: x.sharding, state)


def test_the_state_of_a_callback_is_its_own(tmp_path):
    """Catches states that are mixed up where one class comes twice, and bytes or infinities lost on the way."""

    class Keeps(Callback):
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state_dict):
            self.value = state_dict["value"]

    values = [{"a": [1, None]}, b"\x00\xff", math.inf, np.float32(0.5), ""]
    single(callbacks=[ModelCheckpoint(tmp_path), *map(Keeps, values)]).fit(slope(), ones(2))
    again = [Keeps(None) for _ in range(6)]
    single(callbacks=[ModelCheckpoint(tmp_path), *again]).fit(slope(), ones(2), ckpt_path="last")
    assert [keeps.value for keeps in again] == [*values, None]


class Ranks(Callback):
    """Has `score` be each of some values in turn, epoch by epoch."""

    def __init__(self, values):
        self.values = values

    def on_train_epoch_end(self, trainer, task):
        trainer.log("score", self.values[trainer.current_epoch])


def slow_writes(monkeypatch, seconds=0.05):
    """Has every checkpoint take its time."""
    finalize = ocp.CompositeCheckpointHandler.finalize
    monkeypatch.setattr(
        ocp.CompositeCheckpointHandler, "finalize", lambda *args: (time.sleep(seconds), finalize(*args))[1]
    )


@pytest.mark.parametrize("order", [1, -1])
def test_policies_of_one_folder_share_their_checkpoints(tmp_path, monkeypatch, order):
    """Catches two that take one name, one that deletes the other's end, and a state that is written twice."""
    slow_writes(monkeypatch)
    starts, start = [], checkpoint.Writer.start
    monkeypatch.setattr(
        checkpoint.Writer, "start", lambda self, path, *args: (starts.append(path), start(self, path, *args))[1]
    )
    best = ModelCheckpoint(tmp_path, monitor="score", save_last=False)
    last = ModelCheckpoint(tmp_path / ".." / tmp_path.name, every_n_micro_steps=2)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    batches, the_task = loader(*[4] * 8), task()
    t = single(max_epochs=5, callbacks=[Ranks([3, 1, 2, 5, 4]), *[best, last, every][::order]])
    state = t.fit(the_task, batches)
    assert len(set(starts)) == len(starts) == 20  # each even micro-step, and no epoch's or run's end besides
    name = "epoch=1-micro_step=16"
    assert best.best_model_path.name == name and best.state_dict()["saved"][name] == 1
    assert micro_steps(tmp_path) == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    for policy in (best, last, every):
        assert policy.last_model_path.name == "epoch=4-micro_step=40" and policy.last_model_path.is_dir()
    again = single(max_epochs=5, callbacks=[Ranks([0] * 5), best, last, every])
    assert_same(again.fit(the_task, batches, ckpt_path="last"), state)
    assert again.current_epoch == 5 and len(starts) == 20


def test_policies_of_the_default_folder_share_it(tmp_path):
    """Catches policies that don't know that their default folder is the same, also after a change of directory."""
    saves = [ModelCheckpoint(monitor="score"), ModelCheckpoint(every_n_micro_steps=1)]
    t = single(max_epochs=3, callbacks=[Ranks([2, 1, 3]), *saves], default_root_dir=tmp_path)
    t.fit(slope(), ones(2, 2))
    assert [policy.last_model_path.is_dir() for policy in saves] == [True, True]
    assert micro_steps(tmp_path / "checkpoints") == [4, 6]


def test_the_last_state_is_written_once(tmp_path):
    """Catches one state under two epochs' names, and a checkpoint of it that lacks the end of the epoch."""
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    t = single(max_epochs=2, callbacks=[saves, Ranks([1, 2])])
    t.fit(slope(), ones(2, 2), ones(2))
    assert names(tmp_path) == [f"epoch={epoch}-micro_step={2 * epoch + i}" for epoch in (0, 1) for i in (1, 2)]
    last = checkpoint.load(saves.last_model_path)
    assert last.notes["counters"]["epoch"] == 2 and last.notes["metrics"]["score"] == 2
    seen = Recorder(lambda t: t.micro_step)
    t = single(max_epochs=3, callbacks=[seen, Ranks([1, 2, 3])])
    t.fit(slope(), ones(2, 2), ones(2), ckpt_path=saves.last_model_path)
    assert seen.seen == [5, 6] and t.current_epoch == 3


def test_notes_that_cannot_be_written_anew_cost_a_warning(tmp_path, monkeypatch):
    """Catches a good checkpoint lost because an epoch's end could not be noted in it."""

    def full(path, notes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(orbax_io, "annotate", full)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1)
    with pytest.warns(UserWarning, match="notes of checkpoint .*micro_step=2.*No space left") as caught:
        want = single(callbacks=saves).fit(slope(), ones(2, 2))
    assert len(caught) == 1 and names(tmp_path) == ["epoch=0-micro_step=2"]
    monkeypatch.undo()
    t = single(callbacks=saves)
    assert_same(t.fit(slope(), ones(2, 2), ckpt_path=tmp_path / "epoch=0-micro_step=2"), want)
    assert t.current_epoch == 1


def test_what_fails_is_told_again_once_something_has_been_written(tmp_path, monkeypatch):
    """Catches a warning for every checkpoint of a full disk, and silence on the second time that it fills up."""
    start = checkpoint.Writer.start

    def breaks(self, path, *args):
        if int(path.name.rpartition("=")[2]) in (2, 3, 5):
            raise OSError(errno.ENOSPC, "No space left on device")
        start(self, path, *args)

    monkeypatch.setattr(checkpoint.Writer, "start", breaks)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1)
    with pytest.warns(UserWarning, match="could not be written") as caught:
        single(callbacks=saves).fit(slope(), ones(*[2] * 6))
    assert [re.search(r"micro_step=(\d)", str(warning.message))[1] for warning in caught] == ["2", "5"]
    assert micro_steps(tmp_path) == [6]


@pytest.mark.parametrize("part", ["notes", "arrays", "both"])
def test_checkpoints_none_of_which_can_be_read_are_an_error(tmp_path, part):
    """Catches a run that starts afresh beside its own checkpoints, and an error that doesn't say why."""
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=2, save_top_k=-1)
    single(callbacks=saves).fit(slope(), ones(*[2] * 4))
    for path in tmp_path.iterdir():
        if part in ("notes", "both"):
            (path / "notes" / "notes.json").write_text('{"counters"')
        if part in ("arrays", "both"):
            shutil.rmtree(path / "arrays")
    for ckpt_path in ("last", "best"):
        policy = ModelCheckpoint(tmp_path, monitor="train_loss")
        if ckpt_path == "best" and part == "arrays":
            continue  # None of them has a score.
        with pytest.raises(OSError, match=r"none of the 2 checkpoints in .* can be used") as error:
            single(callbacks=policy).fit(slope(), ones(2), ckpt_path=ckpt_path)
        assert all(f"epoch=0-micro_step={step} can't be read" in str(error.value) for step in (2, 4))


def test_what_another_process_cannot_read_is_passed_over(tmp_path):
    """Catches processes that go on from different checkpoints."""

    class Another(Processes):
        def gather(self, about, value=None):
            return [value, "not on this machine" if about == "a checkpoint" else value]

    single(callbacks=ModelCheckpoint(tmp_path)).fit(slope(), ones(2, 2))
    with pytest.raises(OSError, match=r"none of the 1 checkpoints in .* can be used: not on this machine"):
        orbax_io.newest([tmp_path], Another())


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path):
    """Catches a folder of something else taken for a broken checkpoint."""
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "notes").write_text("mine")
    with pytest.warns(UserWarning, match="finds no checkpoint"):
        single(callbacks=ModelCheckpoint(tmp_path)).fit(slope(), ones(2), ckpt_path="last")


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_is_found_on_disk(tmp_path, mode):
    """Catches a best that only the process which made it knows, an older run's, and one that a validation lacks."""
    policy = lambda: ModelCheckpoint(tmp_path, monitor="score", mode=mode, save_top_k=2)
    fit = lambda values, **options: single(max_epochs=len(values), callbacks=[policy(), Ranks(values)], **options)
    fit([-9.0, 9.0]).fit(slope(), ones(2))  # A run before, better in every way.
    values = [3.0, 1.0, 5.0, 2.0]
    t = fit(values)
    t.fit(slope(), ones(2, 2))
    at = Recorder(lambda t: t.micro_step)
    t = single(max_epochs=5, callbacks=[policy(), at, Ranks([0.0] * 5)])
    t.fit(slope(), ones(2, 2), ckpt_path="best")
    best = (min if mode == "min" else max)(values)
    assert t.is_resuming and at.seen[0] == 2 * (values.index(best) + 1) + 1
    with pytest.raises(ValueError, match="'best' needs a ModelCheckpoint with a monitor"):
        single(callbacks=ModelCheckpoint(tmp_path)).fit(slope(), ones(2), ckpt_path="best")
    with pytest.raises(FileNotFoundError, match=r"'best' finds no checkpoint of ModelCheckpoint\(monitor='other'"):
        single(callbacks=ModelCheckpoint(tmp_path, monitor="other")).fit(slope(), ones(2), ckpt_path="best")


def test_the_next_best_is_taken_for_one_that_is_gone(tmp_path):
    """Catches an error for a checkpoint that someone removed."""
    policy = lambda: ModelCheckpoint(tmp_path, monitor="score", save_top_k=2)
    single(max_epochs=3, callbacks=[policy(), Ranks([1.0, 2.0, 3.0])]).fit(slope(), ones(2, 2))
    shutil.rmtree(*tmp_path.glob("*micro_step=2"))
    at = Recorder(lambda t: t.micro_step)
    single(max_epochs=3, callbacks=[policy(), at, Ranks([0.0] * 3)]).fit(slope(), ones(2, 2), ckpt_path="best")
    assert at.seen == [5, 6]


def test_the_newest_is_the_newest_whatever_the_clock_says(tmp_path, monkeypatch):
    """Catches an older checkpoint gone on from because a clock was set back."""
    clock = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    policy = lambda: ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    single(callbacks=policy()).fit(slope(), ones(2, 2, 2))
    single(callbacks=policy()).fit(slope(), ones(4, 4))
    t = single(callbacks=policy())
    t.fit(slope(), ones(4, 4), ckpt_path="last")
    assert t.samples_seen == 8


def test_paths_stay_where_they_were_meant(tmp_path, monkeypatch):
    """Catches a folder named "~", and one that moves with the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    relative, home = ModelCheckpoint(), ModelCheckpoint("~/saved")
    t = single(callbacks=[relative, home], default_root_dir="run", logger=True)
    monkeypatch.chdir(tmp_path / "b")
    t.fit(slope(), ones(2))
    assert relative.last_model_path.parent == tmp_path / "a" / "run" / "checkpoints"
    assert home.last_model_path.parent == tmp_path / "home" / "saved"
    assert not list((tmp_path / "b").iterdir()) and (tmp_path / "a/run/metrics.jsonl").is_file()
    single(callbacks=home).fit(slope(), ones(2), ckpt_path=f"~/saved/{home.last_model_path.name}")


def test_a_first_save_that_fails_costs_nothing_but_itself(tmp_path):
    """Catches a folder that can't be made ending the run, at its construction or at its first save."""
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be written"):
        t = single(callbacks=ModelCheckpoint(tmp_path / "file" / "checkpoints"))
        t.fit(slope(), ones(2, 2))
    assert t.micro_step == 2


def test_a_state_that_fails_leaves_no_name(tmp_path):
    """Catches a checkpoint that was never written, and is known as the last."""

    class Fails(Callback):
        is_broken = False

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.is_broken = trainer.micro_step == 2

        def state_dict(self):
            if self.is_broken:
                raise RuntimeError("mine")
            return {}

    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1)
    with pytest.raises(RuntimeError, match="mine"), pytest.warns(UserWarning, match="could not be saved"):
        single(callbacks=[saves, Fails()]).fit(slope(), ones(2, 2))
    assert names(tmp_path) == saves.names == ["epoch=0-micro_step=1"]


def test_on_exception_does_not_take_the_errors_place(tmp_path):
    """Catches a callback's own trouble raised for the user's, other callbacks left out, and a save that is lost."""

    class Fails(Callback):
        def on_exception(self, trainer, task, error):
            raise RuntimeError("mine")

    class Notes(Callback):
        def on_exception(self, trainer, task, error):
            self.error = error

    notes, saves = Notes(), ModelCheckpoint(tmp_path)
    with pytest.raises(ZeroDivisionError, match="theirs") as caught:
        single(callbacks=[Fails(), Breaks(2, ZeroDivisionError("theirs")), notes, saves]).fit(slope(), ones(2, 2, 2))
    assert notes.error is caught.value and "RuntimeError('mine')" in caught.value.__notes__[0]
    assert micro_steps(tmp_path) == [2]


def test_a_failed_write_takes_no_other_checkpoint_with_it(tmp_path, monkeypatch):
    """Catches errors of one checkpoint that are raised for the next one, or for the whole run."""
    full = OSError(errno.ENOSPC, "No space left on device")
    for name in ("write", "update"):
        whole = getattr(metadata._MetadataStoreImpl, name)

        def breaks(self, path, *args, whole=whole, **kwargs):
            if "micro_step=2" in str(path) or "micro_step=6" in str(path):
                raise full
            return whole(self, path, *args, **kwargs)

        monkeypatch.setattr(metadata._MetadataStoreImpl, name, breaks)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=2, save_top_k=-1)
    with pytest.warns(UserWarning, match="micro_step=.* could not be written") as caught:
        single(callbacks=saves).fit(slope(), ones(*[2] * 6))
    assert len(caught) == 2 and names(tmp_path) == ["epoch=0-micro_step=4"]
    with pytest.warns(UserWarning, match="micro_step=2 could not be written"), pytest.raises(KeyError, match="theirs"):
        single(callbacks=[saves, Breaks(3, KeyError("theirs"))]).fit(slope(), ones(*[2] * 6))
    assert names(tmp_path) == ["epoch=0-micro_step=3", "epoch=0-micro_step=4"]


@pytest.mark.parametrize("change", ["order", "one less", "monitor", "mode"])
def test_what_one_policy_kept_is_not_for_another_to_remove(tmp_path, change):
    """Catches the best checkpoints removed by a resume with another list of policies."""
    best = lambda monitor="score", mode="max": ModelCheckpoint(
        tmp_path, monitor=monitor, mode=mode, save_top_k=2, save_last=False
    )
    last = lambda: ModelCheckpoint(tmp_path, every_n_micro_steps=3)
    values = [1, 9, 8, 2, 3, 4]
    first, batches = best(), ones(2, 2)
    single(max_epochs=3, callbacks=[first, last(), Ranks(values)]).fit(slope(), batches)
    kept = set(first.names)
    callbacks = {
        "order": [last(), best()],
        "one less": [last()],
        "monitor": [best("train_loss"), last()],
        "mode": [best(mode="min"), last()],
    }[change]
    single(max_epochs=6, callbacks=[*callbacks, Ranks(values)]).fit(slope(), batches, ckpt_path="last")
    assert kept <= set(names(tmp_path))
    if change == "order":
        assert callbacks[1].best_model_path.name == first.best_model_path.name


def test_best_is_of_the_branch_that_was_gone_on_with(tmp_path):
    """Catches the best of a run that was left for one from an earlier checkpoint of it."""
    policy = lambda: ModelCheckpoint(tmp_path, monitor="score", save_top_k=-1)
    first = policy()
    single(max_epochs=4, callbacks=[first, Ranks([4, 3, 2, 1])]).fit(slope(), ones(2))
    second = policy()
    t = single(max_epochs=3, callbacks=[second, Ranks([4, 3, 5])])
    t.fit(slope(), ones(2), ckpt_path=tmp_path / "epoch=1-micro_step=1")
    assert second.best_model_path.name == "epoch=2-micro_step=2-v1"
    state = t.fit(slope(), ones(2), ckpt_path="best")
    assert t.micro_step == 3 and float(state.params) == -3


@pytest.mark.parametrize(
    ("interval", "scores"),
    [
        ({"every_n_micro_steps": 2}, {2: 1.0, 4: 1.0, 6: 0.5}),
        ({"every_n_train_steps": 3}, {3: 1.0, 6: 0.5}),
        ({"every_n_epochs": 100}, {6: 0.5}),
    ],
)
def test_a_checkpoint_has_the_value_of_its_own_state(tmp_path, interval, scores):
    """Catches a score of the validation before, where one is due, and an end whose score is known without any."""
    table = jnp.array([1.0, 0.5])
    loss = lambda w, batch, key: jnp.mean(batch) + 0 * w if key is not None else table[jnp.int32(w)] + 0 * batch.mean()
    count = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (jnp.ones(()) / 3, ()))
    the_task = jaxaccum.Task(lambda key, batch: -jnp.ones(()) + 0.01, loss, count)
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, **interval)
    single(max_epochs=2, callbacks=saves).fit(the_task, ones(2, 2, 2), ones(2))
    got = {int(name.rpartition("=")[2]): score for name, score in saves.state_dict()["saved"].items()}
    assert got.keys() == scores.keys() and got[6] == 0.5 and saves.best_model_path.name.endswith("6")


def test_a_folder_removed_before_the_end_is_made_again(tmp_path):
    """Catches a last checkpoint that is only believed to be there."""

    class Removes(Callback):
        def on_train_epoch_end(self, trainer, task):
            while not saves.last_model_path.is_dir():
                time.sleep(0.001)
            shutil.rmtree(tmp_path)

    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1)
    state = single(callbacks=[saves, Removes()]).fit(slope(), ones(2, 2))
    assert float(state.params) == checkpoint.load(saves.last_model_path).arrays[".params"]


def test_a_record_is_made_even_if_a_hook_raises(tmp_path):
    """Catches a window that is in the checkpoint, but in no record, before or after the resume."""
    metrics = tmp_path / "metrics.jsonl"
    run = lambda *callbacks: single(
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        logger=JSONLLogger(metrics),
        callbacks=[*callbacks, ModelCheckpoint(tmp_path)],
    )
    with pytest.raises(KeyError):
        run(Breaks(4, KeyError("theirs"))).fit(slope(), ones(*[2] * 8))
    run().fit(slope(), ones(*[2] * 8), ckpt_path="last")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_no_checkpoint_can_hold_is_met_before_training(tmp_path):
    """Catches an epoch that is trained before its checkpoint can't be made."""

    class Bad(Callback):
        def state_dict(self):
            return {"where": tmp_path}

    seen = Recorder(lambda t: t.micro_step)
    with pytest.raises(TypeError, match=r"state of .*Bad can't be kept"):
        single(callbacks=[ModelCheckpoint(tmp_path), Bad(), seen]).fit(slope(), ones(2))
    assert not seen.seen
    single(callbacks=Bad()).fit(slope(), ones(2))


def test_a_validation_that_is_cut_off_ranks_its_checkpoint_after_the_resume(tmp_path):
    """Catches the best checkpoint that lost its rank to a stop in the validation which would have given it one."""
    table = jnp.array([3.0, 1.0, 2.0])
    loss = lambda w, batch, key: jnp.mean(batch) + 0 * w if key is not None else table[jnp.int32(w)] + 0 * batch.mean()
    count = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (jnp.full((), 0.5), ()))
    the_task = jaxaccum.Task(lambda key, batch: jnp.full((), -0.99), loss, count)

    class Stops(Callback):
        def on_validation_start(self, trainer, task):
            if trainer.micro_step == 4 and not trainer.is_resuming:
                raise KeyError("theirs")

    def run():
        saves = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_micro_steps=2)
        return saves, single(val_check_interval=2, callbacks=[saves, Stops()])

    _, t = run()
    with pytest.raises(KeyError):
        t.fit(the_task, ones(*[2] * 6), ones(2))
    saves, t = run()
    t.fit(the_task, ones(*[2] * 6), ones(2), ckpt_path="last")
    assert saves.best_model_path.name == "epoch=0-micro_step=4"


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("ddp", 4)])
def test_weights_alone_are_saved_beside_whole_runs(tmp_path, strategy, devices):
    """Catches weights that a run resumes from, a whole run that is replaced by them, and one that they remove."""
    batches, the_task = loader(*[4] * 5 * devices), task(model_state=True)

    def run(**options):
        weights = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_micro_steps=2, save_top_k=-1)
        whole = ModelCheckpoint(tmp_path, every_n_micro_steps=2, save_top_k=-1)
        t = trainer(strategy=strategy, devices=devices, accumulate_grad_batches=3, callbacks=[weights, EMA(), whole])
        return t, t.fit(the_task, batches, **options)

    t, end = run()
    at = [f"epoch=0-micro_step={i}" for i in (2, 4)] + ["epoch=1-micro_step=5"]
    assert names(tmp_path) == sorted([*at, *(f"{name}-weights" for name in at)])
    path = tmp_path / f"{at[-1]}-weights"
    saved = checkpoint.load(path)
    assert {re.match(r"\.[a-z_]+", name).group() for name in saved.arrays} == {".params", ".average", ".model_state"}
    assert_same(checkpoint.load(path, like=end.params), end.params)
    assert t.validate(the_task, batches, ckpt_path=path) == t.validate(the_task, batches)
    with pytest.raises(ValueError, match=f"{path} has weights only.*init_from=jaxaccum.checkpoint.load"):
        run(ckpt_path=path)
    for name in at[1:]:
        shutil.rmtree(tmp_path / name)
    resumed, again = run(ckpt_path="last")  # In mid-window, before newer weights.
    assert resumed.is_resuming and resumed.micro_step == 5
    assert_same(again, end)


def test_the_best_to_resume_from_is_a_whole_run(tmp_path):
    """Catches the best weights, from which no run resumes, taken for the best run because they come first."""
    policies = lambda: [ModelCheckpoint(tmp_path, monitor="train_loss", save_weights_only=x) for x in (True, False)]
    single(callbacks=policies()).fit(slope(), ones(2, 2))
    t = single(max_epochs=2, callbacks=policies())
    t.fit(slope(), ones(2, 2), ckpt_path="best")
    assert t.is_resuming and t.micro_step == 4
    with pytest.raises(ValueError, match=r"weights has weights only.*save_weights_only=False"):
        single(callbacks=policies()[:1]).fit(slope(), ones(2, 2), ckpt_path="best")


@pytest.mark.parametrize("weights_first", [True, False])
def test_a_resumed_run_goes_on_with_its_weights(tmp_path, weights_first):
    """Catches weights that are written again, and those of the run before that nobody removes any more."""
    for epochs, ckpt_path in [(2, None), (2, "last"), (3, "last")]:
        saves = [ModelCheckpoint(tmp_path, save_weights_only=only) for only in (weights_first, not weights_first)]
        single(max_epochs=epochs, callbacks=saves).fit(slope(), ones(2, 2), ckpt_path=ckpt_path)
        name = f"epoch={epochs}-micro_step={2 * epochs}"
        assert names(tmp_path) == [name, f"{name}-weights"]


def test_a_folder_of_weights_is_a_fresh_start(tmp_path):
    """Catches weights for a run's end that "last" takes, and an argument that is not a bool."""
    make = lambda: single(callbacks=ModelCheckpoint(tmp_path, save_weights_only=True))
    make().fit(slope(), ones(2))
    assert make().validate(slope(), ones(2), ckpt_path="last") == {"val_loss": -1}
    with pytest.warns(UserWarning, match="finds no checkpoint"):
        assert make().fit(slope(), ones(2), ckpt_path="last").params == -1
    with pytest.raises(TypeError, match="save_weights_only must be True or False, got 1"):
        ModelCheckpoint(tmp_path, save_weights_only=1)
