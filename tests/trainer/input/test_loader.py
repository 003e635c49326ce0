"""Loaders: when each is told the epoch and iterated over, how far it is read, and where a resume puts it."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
from training import Recorder, Unsized, assert_same, loader, ones, single, slope, task

import jaxaccum
from jaxaccum.callbacks import Callback, ModelCheckpoint
from jaxaccum.checkpoint import json_state
from jaxaccum.trainer.input.loader import Start, TrainLoader, ValLoader

BATCHES = [np.full(2, value, np.float32) for value in range(7)]


class Tells(Callback):
    """Writes down when an epoch's hook is called."""

    def __init__(self, events):
        self.events = events

    def on_fit_start(self, trainer, task):
        self.events.append("fit")

    def on_train_epoch_start(self, trainer, task):
        self.events.append(("hook", trainer.current_epoch))


class Shuffles:
    """Batches in an order that `iter` fixes by the epoch; writes down what it is asked for."""

    def __init__(self, batches, events=None):
        self.batches, self.epoch, self.events = batches, 0, [] if events is None else events

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.events.append(("set_epoch", epoch))

    def __iter__(self):
        self.events.append("iter")
        order = np.random.default_rng(self.epoch).permutation(len(self.batches))
        return iter([self.batches[i] for i in order])


class Sampler:
    """A sampler or a dataset, to be found on a loader."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_a_loader_is_told_the_epoch_before_each_iterator():
    """Catches epoch 0 given twice, an iterator made to peek, and one made before the epoch's hook."""
    events = []
    single(max_epochs=3, callbacks=Tells(events)).fit(slope(), Shuffles(BATCHES, events))
    later = [event for epoch in (1, 2) for event in (("hook", epoch), ("set_epoch", epoch), "iter")]
    assert events == [("set_epoch", 0), "iter", "fit", ("hook", 0), *later]


@pytest.mark.parametrize("place", ["sampler", "batch_sampler", "batch_sampler.sampler", "dataset"])
def test_a_part_of_a_loader_is_told_the_epoch(place):
    """Catches the samplers of torch's loaders, and datasets that shuffle themselves, left at epoch 0."""

    class Loader(list):
        pass

    told, batches = Sampler(), Loader(BATCHES)
    first, _, second = place.partition(".")
    setattr(batches, first, Sampler() if second else told)
    if second:
        setattr(getattr(batches, first), second, told)
    single(max_epochs=2).fit(slope(), batches)
    assert told.epochs == [0, 1]


def test_the_first_batch_is_initialised_with_and_trained_on():
    """Catches a batch that only `init` sees."""
    seen, batches = [], iter(BATCHES)
    the_task = jaxaccum.Task(
        lambda key, batch: seen.append(float(batch[0])) or jax.numpy.zeros(()), slope().loss, slope().optimizer
    )
    t = single()
    t.fit(the_task, batches)
    assert seen == [0] and t.micro_step == 7


@pytest.mark.parametrize("at", [3, 7, 10])
def test_a_resume_tells_the_epoch_of_the_checkpoint(tmp_path, at):
    """Catches a resume on the batches of epoch 0, and a loader asked for batches before the checkpoint is read."""
    events = []
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    options = {"accumulate_grad_batches": 2, "max_epochs": 3}
    whole, rest = Order(), Order()
    want = single(**options, callbacks=[saves, whole]).fit(slope(), Shuffles(BATCHES))
    assert len({tuple(whole.seen[i : i + 7]) for i in (0, 7, 14)}) == 3
    (path,) = tmp_path.glob(f"*micro_step={at}")
    got = single(**options, callbacks=rest).fit(slope(), Shuffles(BATCHES, events), ckpt_path=path)
    assert rest.seen == whole.seen[at:]
    assert_same(got.params, want.params)
    assert events[:2] == [("set_epoch", 1 if at == 10 else 0), "iter"]


def test_a_checkpoint_that_cannot_be_read_leaves_the_loader_alone(tmp_path):
    """Catches a stream that has lost its first batch to a wrong path."""
    batches = iter(BATCHES)
    with pytest.raises(FileNotFoundError):
        single().fit(slope(), batches, ckpt_path=tmp_path / "nothing")
    assert next(batches)[0] == 0


class Stateful:
    """A loader with a position of its own, shuffled by a generator that goes on from epoch to epoch."""

    def __init__(self, batches, forgets=False):
        self.batches, self.rng, self.order, self.at, self.forgets = batches, 1, [], 0, forgets
        self.restored = False

    def __iter__(self):
        if not self.restored or (self.forgets and self.at == len(self.order)):
            self.rng = self.rng * 5 % 7919
            self.order = [int(i) for i in np.random.default_rng(self.rng).permutation(len(self.batches))]
            self.at = 0
        self.restored = False
        while self.at < len(self.order):
            self.at += 1
            yield self.batches[self.order[self.at - 1]]

    def state_dict(self):
        return {"rng": self.rng, "order": self.order, "at": self.at}

    def load_state_dict(self, state):
        self.rng, self.order, self.at = state["rng"], state["order"], state["at"]
        self.restored = True


class StatefulIterator:
    """An iterator of the same kind, under either pair of names."""

    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class GivesStateful:
    """Makes such an iterator in each epoch, and counts what it fetches."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return StatefulIterator(self.batches)


class Order(Callback):
    """Keeps the first number of every batch that was trained on, in a tuple for each micro-step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.seen.append(tuple(float(one[0]) for one in (batch if isinstance(batch, list) else [batch])))


def at_epochs_ends(folder):
    """The checkpoints at the ends of epochs, and the last and the first micro-step's beside them."""
    at = lambda path: int(path.name.rpartition("=")[2])
    ends = list((folder / "epochs").glob("*"))
    return [*ends, *(path for path in folder.glob("epoch=*") if any(abs(at(path) - at(end)) < 2 for end in ends))]


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Stateful(BATCHES),
        lambda: Stateful(BATCHES, forgets=True),
        lambda: GivesStateful(BATCHES),
    ],
    ids=["loader", "loader that begins the next epoch at once", "iterator"],
)
def test_a_position_that_a_loader_tells_is_gone_on_from(tmp_path, make, limit):
    """Catches an epoch that is begun again, one in another order, and one cut short after a resume at its edge."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 3}
    if limit is not None:
        options["limit_train_batches"] = limit
    whole = Order()
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(tmp_path / "epochs", save_top_k=-1)
    want = single(**options, callbacks=[saves, epochs, whole]).fit(slope(), make())
    size = limit or 7
    assert len(whole.seen) == 3 * size
    for path in at_epochs_ends(tmp_path):
        rest = Order()
        got = single(**options, callbacks=rest).fit(slope(), make(), ckpt_path=path)
        assert rest.seen == whole.seen[int(path.name.rpartition("=")[2]) :], path
        assert_same(got.params, want.params)


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (0, 3)])
def test_a_length_is_no_limit(lengths):
    """Catches a length that is read once and taken for ever."""

    class Loader:
        epoch = -1

        def __len__(self):
            return lengths[max(self.epoch, 0)]

        def __iter__(self):
            self.epoch += 1
            return iter(BATCHES[: lengths[self.epoch] or 1])

    t = single(max_epochs=2)
    t.fit(slope(), Loader())
    assert t.micro_step == sum(lengths) + (0 in lengths)


def test_a_length_of_validation_is_no_limit():
    """Catches a validation on as many batches as its loader says that it has."""

    class Loader(list):
        def __len__(self):
            return 1

    for limit, mean in ((1.0, 3.0), (5, 2.0)):
        assert single(limit_val_batches=limit).validate(
            jaxaccum.Task(
                lambda key, batch: jax.numpy.zeros(()), lambda w, batch, key: batch.mean(), slope().optimizer
            ),
            Loader(BATCHES),
            state=single().fit(slope(), ones(2)),
        ) == {"val_loss": mean}


def test_an_explicit_limit_holds_whatever_the_length():
    """Catches a limit that a length overrules."""

    class Loader(list):
        def __len__(self):
            return 1

    t = single(limit_train_batches=4)
    t.fit(slope(), Loader(BATCHES))
    assert t.micro_step == 4


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("k", "steps"), [(1, 3), (2, 3), (3, 2), (2, 1)])
def test_max_steps_takes_no_more_from_a_stream_than_it_trains_on(k, steps, fuse):
    """Catches batches that are fetched ahead and lost to whoever goes on with the stream."""
    stream = (np.full(2, i, np.float32) for i in itertools.count())
    t = single(max_epochs=None, max_steps=steps, accumulate_grad_batches=k, fuse_windows=fuse)
    t.fit(slope(), stream)
    assert t.micro_step == k * steps and next(stream)[0] == k * steps


def test_max_steps_at_the_end_of_what_there_is_ends_the_epoch():
    """Catches an epoch that is not counted, or is counted where the stream goes on."""
    ended, goes_on = (single(max_epochs=1, max_steps=3) for _ in range(2))
    ended.fit(slope(), BATCHES[:3])
    goes_on.fit(slope(), iter(BATCHES))
    assert (ended.current_epoch, goes_on.current_epoch) == (1, 0)
    limited = single(max_epochs=2, max_steps=6, limit_train_batches=3)
    limited.fit(slope(), iter(BATCHES))
    assert limited.current_epoch == 2


def test_a_stream_may_end_before_max_steps():
    """Catches a last window that waits for batches which will never come."""
    t = single(max_epochs=1, max_steps=9, accumulate_grad_batches=2)
    t.fit(slope(), iter(BATCHES[:5]))
    assert (t.micro_step, t.global_step, t.current_epoch) == (5, 3, 1)


def test_an_iterator_that_begins_anew_has_epochs():
    """Catches a loader that returns itself from `iter`, and has a length, taken for a stream that is over."""

    class Again:
        def __len__(self):
            return 3

        def __iter__(self):
            self.left = iter(BATCHES[:3])
            return self

        def __next__(self):
            return next(self.left)

    t = single(max_epochs=2)
    t.fit(slope(), Again())
    assert (t.micro_step, t.current_epoch) == (6, 2)


def test_overfitting_trains_and_validates_on_the_first_batches():
    """Catches other batches in the next epoch, and a loader that is read again."""
    events, order = [], Order()
    vals = []

    class Val(list):
        def __iter__(self):
            return (vals.append(i) or batch for i, batch in enumerate(super().__iter__()))

    t = single(max_epochs=3, overfit_batches=2, callbacks=order, num_sanity_val_steps=0)
    t.fit(slope(), Shuffles(BATCHES, events), Val(BATCHES))
    assert order.seen == order.seen[:2] * 3 and events == [("set_epoch", 0), "iter"]
    assert vals == [0, 1] * 3
    part = single(max_epochs=1, overfit_batches=0.5)
    part.fit(slope(), BATCHES)
    assert part.micro_step == 3
    with pytest.raises(ValueError, match=r"overfit_batches must be .*got -1"):
        single(overfit_batches=-1)


def test_the_numbers_of_batches_are_those_of_the_epoch_at_hand():
    """Catches an estimate that is the first epoch's for ever."""

    class Grows:
        size = 1

        def set_epoch(self, epoch):
            self.size = epoch + 1

        def __len__(self):
            return self.size

        def __iter__(self):
            return iter(BATCHES[: self.size])

    numbers = Recorder(lambda t: t.num_training_batches)
    t = single(max_epochs=3, callbacks=numbers)
    t.fit(slope(), Grows())
    assert numbers.seen == [1, 2, 2, 3, 3, 3]


def test_several_devices_are_told_the_epoch_too():
    """Catches a strategy that has a way of its own to iterate."""
    events = []
    single(strategy="ddp", max_epochs=2).fit(task(), Shuffles(loader(*[4] * 10), events))
    assert events == [("set_epoch", 0), "iter", ("set_epoch", 1), "iter"]


class Rewinds:
    """An iterator without a length that begins anew whenever it is iterated over."""

    def __iter__(self):
        self.left = iter(BATCHES)
        return self

    def __next__(self):
        return next(self.left)


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 4, "max_epochs": 4}, {"max_steps": 16, "max_epochs": None}]
)
def test_an_iterator_that_may_begin_anew_is_gone_on_with_as_it_was(tmp_path, options):
    """Catches one that begins anew in the unbroken run, and goes on in a resume, or the other way round."""
    saves, whole = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1), Order()
    want = single(callbacks=[saves, whole], **options).fit(slope(), Rewinds())
    assert [number for (number,) in whole.seen[:9]] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    for path in tmp_path.iterdir():
        rest = Order()
        got = single(callbacks=rest, **options).fit(slope(), Rewinds(), ckpt_path=path)
        assert rest.seen == whole.seen[int(path.name.rpartition("=")[2]) :], path
        assert_same(got.params, want.params)


class Finishes:
    """A loader whose state at the end of a pass has its next iterator begin the next one, as torchdata's has."""

    def __init__(self, lazy=False):
        self.state, self.epoch, self.at, self.over, self.lazy = None, -1, 0, True, lazy

    def __iter__(self):
        return self.batches() if self.lazy else iter(Eager(self))

    def start(self):
        state, self.state = self.state, None
        if state is not None and not state["over"]:
            self.epoch, self.at = state["epoch"], state["at"]
        else:
            self.epoch, self.at = (self.epoch if state is None else state["epoch"]) + 1, 0
        self.over = False

    def batches(self):
        self.start()
        while self.at < 6:
            self.at += 1
            yield np.full(2, 10 * self.epoch + self.at, np.float32)
        self.over = True

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at, "over": self.over}

    def load_state_dict(self, state):
        self.state = state


class Eager:
    """An iterator that begins its pass when it is made."""

    def __init__(self, loader):
        loader.start()
        self.loader = loader

    def __iter__(self):
        return self

    def __next__(self):
        if self.loader.at == 6:
            self.loader.over = True
            raise StopIteration
        self.loader.at += 1
        return np.full(2, 10 * self.loader.epoch + self.loader.at, np.float32)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("limit", "devices"), [(None, 1), (4, 1), (6, 1), (100, 1), (4, 4), (6, 4)])
def test_a_position_at_an_epochs_end_begins_the_next_epoch(tmp_path, lazy, limit, devices):
    """Catches an epoch left out or made twice, as the limit or the loader ended the one before it."""

    options = {"strategy": "ddp" if devices > 1 else "single", "devices": devices, "max_epochs": 3}
    if limit is not None:
        options["limit_train_batches"] = limit
    whole, the_task = Order(), slope()
    saves = [
        ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1),
        ModelCheckpoint(tmp_path / "epochs", save_top_k=-1),
    ]
    want = single(callbacks=[*saves, whole], **options).fit(the_task, Finishes(lazy))
    assert len(set(whole.seen)) == len(whole.seen)
    for path in at_epochs_ends(tmp_path):
        rest = Order()
        got = single(callbacks=rest, **options).fit(the_task, Finishes(lazy), ckpt_path=path)
        assert rest.seen == whole.seen[int(path.name.rpartition("=")[2]) :], path
        assert_same(got.params, want.params)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (None, "got None"),
        (3, "got 3"),
        (list, "got <class 'list'>"),
        ({"train": BATCHES}, r"got a dict with the keys \['train'\]: pass one of its values"),
    ],
)
def test_a_loader_is_an_iterable_of_batches(batches, words):
    """Catches an error of Python's own, and a dict of loaders whose keys are taken for batches."""
    with pytest.raises(TypeError, match=f"train_loader must be an iterable of batches, {words}"):
        single().fit(slope(), batches)
    if batches is not None and not isinstance(batches, dict):
        for val_loader, name in [(batches, "val_loader"), ({"a": BATCHES, "b": batches}, r"val_loader\['b'\]")]:
            with pytest.raises(TypeError, match=f"{name} must be an iterable of batches, {words}"):
                single().fit(slope(), BATCHES, val_loader)


@pytest.mark.parametrize("bad", [{}, {"": BATCHES}, {1: BATCHES}])
def test_several_validation_loaders_have_names(bad):
    """Catches a run that validates on nothing, and results without a name of their own."""
    with pytest.raises(TypeError, match=r"val_loader must be a loader or a dict of loaders by name, got the keys \["):
        single().fit(slope(), BATCHES, bad)


def test_a_position_of_version_0_1():
    """Catches a checkpoint that holds the loader's own state alone."""

    class Loader:
        position = 0

        def state_dict(self):
            return {"at": self.position}

        def load_state_dict(self, state):
            self.position = state["at"]

        def __iter__(self):
            return iter(ones(1, 2, 3)[self.position :])

    options = {"limit_train_batches": 1.0, "overfit_batches": 0, "epochs": 1, "steps": math.inf}
    batches = TrainLoader(Loader(), keeps_state=True, **options)
    batches.begin(Start(batches=1, all_batches=1), json_state.dumps({"at": 1}, "Loader"))
    assert [len(batch) for batch in batches.epoch(0)] == [2, 3]


@pytest.mark.parametrize("lengths", [[3, 3], [None, 3], [None, None], [3, 2], [None, 3, 4]])
def test_the_lengths_of_all_processes(lengths):
    """Catches an epoch that one process ends before the others, and a loader without a length that is refused."""
    batches = TrainLoader(
        ones(1, 1, 1), limit_train_batches=1.0, overfit_batches=0, epochs=1, steps=math.inf, keeps_state=False
    )
    told = types.SimpleNamespace(gather=lambda about, own: lengths)
    if len(set(lengths) - {None}) < 2:
        batches.agree(told)
    else:
        with pytest.raises(ValueError, match=rf"on another process: .*limit_train_batches={min(lengths[-2:])}"):
            batches.agree(told)


def test_a_checkpoint_without_a_position_skips_what_was_trained_on():
    """Catches a loader that has a position now, and begins anew because the checkpoint has none."""

    class Loader(list):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise AssertionError("there is no state")

    options = {"limit_train_batches": 1.0, "overfit_batches": 0, "epochs": 1, "steps": math.inf}
    batches = TrainLoader(Loader(ones(1, 2, 3)), keeps_state=True, **options)
    batches.begin(Start(batches=1, all_batches=1))
    assert [len(batch) for batch in batches.epoch(0)] == [2, 3]


def test_batches_to_overfit_of_an_unknown_number():
    """Catches an epoch that is taken to have one batch because the loader has no length."""
    options = {"limit_train_batches": 1.0, "epochs": 2, "steps": math.inf, "keeps_state": False}
    batches = TrainLoader(Unsized(ones(1, 2)), overfit_batches=1.0, **options)
    assert batches.epoch_batches is None


def test_a_fraction_of_a_val_loader_without_a_length_is_refused_at_once():
    """Catches an error that comes with the first validation."""
    with pytest.raises(ValueError, match=r"limit_val_batches=0\.5 is a fraction of a loader without a length"):
        ValLoader(iter(ones(1, 2)), 0.5, "val_loader")
