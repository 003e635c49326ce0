"""What a batch may contain: anything that NumPy makes a numeric array of. Errors name anything else."""

import array
import collections
import dataclasses
import datetime
import enum
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from training import Recorder, assert_same, loader, task, trainer

import jaxaccum
from jaxaccum.trainer.input import batches, process_shards
from jaxaccum.trainer.input.strategies import Strategy

STRATEGIES = [("single", 1), ("ddp", 2), ("dp", 2), ("zero", 2)]


class Tensor:
    """An array of another library, which NumPy can read or can't."""

    def __init__(self, values, error=None):
        self.values, self.error = values, error

    @property
    def shape(self):
        return self.values.shape

    def __array__(self, dtype=None, copy=None):
        if self.error is not None:
            raise self.error
        return np.array(self.values, dtype, copy=copy)


def test_a_wider_float_than_jax_has_is_named():
    """Catches jax's words for it, and values that are rounded unasked."""
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("it is a float64 on this machine")
    with pytest.raises(TypeError, match=r"batch\['x'\] is a ndarray.*gives dtype float"):
        batches.arrays({"x": np.ones(4, np.longdouble)})


@dataclasses.dataclass
class Example:
    x: np.ndarray


class Colour(enum.IntEnum):
    RED = 1


def run(name, devices, batches, val=None, **options):
    """A Trainer that has trained on `batches`, in windows of two micro-steps."""
    t = trainer(strategy=name, devices=devices, accumulate_grad_batches=2, **options)
    t.fit(task(), batches, val)
    return t


@pytest.mark.parametrize(("name", "devices"), STRATEGIES)
@pytest.mark.parametrize("fuse", [False, True])
def test_arrays_of_another_library_train_as_those_of_numpy(name, devices, fuse):
    """Catches a leaf that only some strategies can put on a device, in training, validation or `init`."""
    batches, val = loader(*[4] * 5, seed=1), loader(4, 4)
    of_another = lambda batches: [jax.tree.map(Tensor, batch) for batch in batches]
    want = run(name, devices, batches, val, fuse_windows=fuse)
    got = run(name, devices, of_another(batches), of_another(val), fuse_windows=fuse)
    assert_same(got.state, want.state)
    assert got.callback_metrics == want.callback_metrics
    assert got.samples_seen == want.samples_seen == 20
    assert got.validate(task(), of_another(val)) == want.validate(task(), val)


@pytest.mark.parametrize(("name", "devices"), STRATEGIES)
def test_torch_tensors_train_as_arrays(name, devices):
    """Catches a library that hands its arrays to NumPy in a way of its own."""
    torch = pytest.importorskip("torch")
    batches = loader(*[4] * 4)
    tensors = [{leaf: torch.from_numpy(x) for leaf, x in batch.items()} for batch in batches]
    assert_same(run(name, devices, tensors).state, run(name, devices, batches).state)
    with pytest.raises(TypeError, match=r"batch\['x'\] is a Tensor, .*BFloat16.*\.float\(\)"):
        run(name, devices, [{"x": batch["x"].bfloat16(), "y": batch["y"]} for batch in tensors])


# A leaf, and what is said of it.
NO_NUMBERS = {
    "str": ("a word", r"is a str.*gives dtype <U6"),
    "strings": (np.array(["a", "b", "c", "d"]), r"is a ndarray.*gives dtype <U1"),
    "objects": (np.array([{}] * 4), r"is a ndarray.*gives dtype object"),
    "datetimes": (np.array(["2020-01-01"] * 4, "M8[D]"), r"is a ndarray.*gives dtype datetime64\[D\]"),
    "timedeltas": (np.ones(4, "m8[s]"), r"is a ndarray.*gives dtype timedelta64\[s\]"),
    "records": (np.ones(4, "u1,u2"), r"is a ndarray.*gives dtype \[\('f0'"),
    "date": (datetime.date(2020, 1, 1), r"is a date.*gives dtype object"),
    "NumPy's str": (np.str_("a word"), r"is a str_.*gives dtype <U6"),
    "a dataclass": (Example(np.ones(4)), r"is a Example.*gives dtype object.*jax\.tree_util\.register_dataclass"),
    "an array that can't be read": (
        Tensor(np.ones(4), ValueError("it lies on the moon")),
        r"is a Tensor.*raises.*it lies on the moon",
    ),
    "a masked array": (np.ma.masked_array(np.ones(4), [0, 0, 1, 0]), r"is a MaskedArray.*filled"),
}


@pytest.mark.parametrize(
    ("name", "devices", "leaf", "words"),
    [(*STRATEGIES[i % 4], *case) for i, case in enumerate(NO_NUMBERS.values())],
    ids=NO_NUMBERS,
)
def test_a_leaf_that_is_no_array_of_numbers_is_named(name, devices, leaf, words):
    """Catches jax's words for it, which name neither the leaf nor what to do, and a mask that is dropped."""
    batch = loader(4)[0]
    match = rf"batch\['more'\]\[0\] {words}"
    with pytest.raises(TypeError, match=match):
        run(name, devices, [batch | {"more": [leaf]}])
    seen = Recorder(lambda t: t.micro_step)
    bad = [batch | {"more": [np.ones(4, np.float32)]}] * 4 + [batch | {"more": [leaf]}] * 2
    with pytest.raises(TypeError, match=match):
        run(name, devices, bad, callbacks=seen)
    assert seen.seen == list(range(1, 1 + 4 // (devices if name in ("ddp", "zero") else 1)))  # What came before it.
    t = run(name, devices, [batch] * 2)
    with pytest.raises(TypeError, match=match):
        t.validate(task(), [batch | {"more": [leaf]}] * 2)


def test_a_validation_batch_in_fit_is_named_too():
    """Catches a check of what is trained on alone."""
    with pytest.raises(TypeError, match=r"batch\['text'\] is a str"):
        run("single", 1, loader(4, 4), [loader(4)[0] | {"text": "a word"}])


def test_init_sees_arrays_and_hooks_the_loaders_own_batch():
    """Catches an `init` that is given what no loss ever sees, and a hook that is given a copy."""
    seen, given = [], [{"x": Tensor(np.ones((4, 3), np.float32))} for _ in range(4)]

    class Sees(jaxaccum.callbacks.Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            seen.append(batch)

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append(batch)

    def init(key, batch):
        assert isinstance(batch["x"], np.ndarray)
        return jnp.zeros(batch["x"].shape[1])

    mean = jaxaccum.Task(init, lambda w, batch, key: jnp.mean(batch["x"] @ w), optax.sgd(1.0))
    trainer(strategy="single", callbacks=Sees()).fit(mean, given)
    assert [id(batch) for batch in seen] == [id(batch) for batch in given for _ in range(2)]
    seen.clear()
    trainer(strategy="ddp", devices=2, callbacks=Sees()).fit(mean, given)
    assert [[id(batch) for batch in group] for group in seen] == [[*map(id, given[i : i + 2])] for i in (0, 0, 2, 2)]


@pytest.mark.parametrize(
    "leaf",
    [
        np.ones(4, np.float32),
        np.ones(4, np.bool_),
        np.ones(4, np.complex64),
        np.ones(4, np.float16),
        np.ones(4, ml_dtypes.bfloat16),
        np.ones(4, ml_dtypes.int4),
        np.float32(1),
        ml_dtypes.bfloat16(1),
        np.ones(4, np.float32).view(np.memmap),
        jnp.ones(4),
        jax.random.split(jax.random.key(0), 4),
        jax.random.key(0),
        True,
        1,
        1.5,
        2j,
        Colour.RED,
    ],
    ids=lambda leaf: f"{type(leaf).__name__} of {getattr(leaf, 'dtype', 'no dtype')}",
)
def test_what_jax_takes_stays_as_it_is(leaf):
    """Catches a copy, a Python number that takes on a strong type, and a key that NumPy can't read."""
    batch = {"x": (leaf, np.ones(4, np.float32))}
    assert batches.arrays(batch) is batch
    jax.block_until_ready(jax.jit(lambda batch: batch)(batch))


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (Tensor(np.ones(4, np.int16)), np.int16),
        (Tensor(np.ones(4, np.bool_)), np.bool_),
        (Tensor(np.ones(4, ml_dtypes.bfloat16)), ml_dtypes.bfloat16),
        (array.array("f", [1.0] * 4), np.float32),
        (np.ones(4, ">f4"), np.float32),
        (np.ones(4, ">i2"), np.int16),
        (Tensor(np.ones(4, ">u4")), np.uint32),
    ],
    ids=["int16", "bool", "bfloat16", "array.array", "big-endian float", "big-endian int", "another big-endian int"],
)
def test_what_numpy_makes_numbers_of_is_converted(leaf, dtype):
    """Catches an array in the other byte order, which jax refuses, and values or dtypes that change on the way."""
    other = np.ones(4, np.float32)
    got = batches.arrays({"x": leaf, "other": other})
    assert type(got["x"]) is np.ndarray and got["x"].dtype == dtype and got["x"].dtype.isnative
    assert got["x"].astype(np.float32).tolist() == [1.0] * 4
    assert got["other"] is other
    jax.block_until_ready(jax.jit(lambda batch: batch)(got))


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        ([(), (6,), (6, 2)], 6),
        ([(2,), (6,), (6, 2), (3,)], 6),
        ([(3,), (6,)], 3),
        ([(6, 3), (3,), (3, 2), (6,)], 6),
        ([(), ()], 1),
        ([(0, 2), (0,), ()], 0),
    ],
)
def test_the_length_of_a_batch_is_that_of_most_leaves(shapes, want):
    """Catches a first leaf that is a class weight, a key or a scalar, and a tie that the order does not settle."""
    assert batches.length([np.zeros(shape) for shape in shapes]) == want
    assert batches.length([Tensor(np.zeros(shape)) for shape in shapes]) == want


def test_samples_seen_counts_the_examples_of_most_leaves():
    """Catches a count of the first leaf, in the counters, in what is estimated and in what is logged."""
    first = {"a": np.ones(2, np.float32), "b": np.float32(1), "x": np.ones((6, 3), np.float32), "y": np.ones(6)}
    one = jaxaccum.Task(
        lambda key, batch: jnp.zeros(3),
        lambda w, batch, key: jaxaccum.Weighted(jnp.sum(batch["x"] @ w), 6.0),
        optax.sgd(1.0),
    )
    t = trainer(strategy="single", accumulate_grad_batches=2)
    t.fit(one, [first] * 4)
    assert (t.samples_seen, t.effective_batch_size) == (24, 12)


@pytest.mark.parametrize("entries", [0, 2, 3, 5])
def test_dp_refuses_a_leaf_of_another_length(entries):
    """Catches a leaf that is cut where the others are, or is shorter than they are and runs out."""
    good = {"x": np.ones((4, 3), np.float32), "y": np.ones((4, 2), np.float32), "a": np.ones(4, np.float32)}
    bad = good | {"a": np.ones(entries, np.float32)}
    match = rf"batch\['a'\] has {entries} entries.*the batch has 4 examples"
    with pytest.raises(ValueError, match=match):
        run("dp", 2, [bad])
    t = run("dp", 2, [good])
    with pytest.raises(ValueError, match=match):
        t.validate(task(), [bad])
    seen = Recorder(lambda t: t.micro_step)
    with pytest.raises(ValueError, match=match):
        run("dp", 2, [good] * 4 + [bad], callbacks=seen)
    assert seen.seen == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["ddp", "dp"])
def test_processes_tell_each_other_of_random_keys(name):
    """Catches a description that only dtypes of NumPy have, and zeros in place of keys."""
    strategy, keys = Strategy(name, 2), jax.random.split(jax.random.key(0, impl="rbg"), 4)
    batch = {"key": keys, "x": np.ones((4, 3), np.float32)}
    offered = json.loads(json.dumps(process_shards.offer(strategy, [batch])))
    piece = process_shards.pieces(strategy, [batch], [offered], batch)[0]
    data = jax.random.key_data(piece.batch["key"])
    np.testing.assert_array_equal(data[:4], jax.random.key_data(keys))
    zeros = process_shards._zeros(offered["kinds"][0], batch)
    assert jax.tree.map(lambda x: (x.dtype, x.shape[1:]), zeros) == jax.tree.map(
        lambda x: (x.dtype, x.shape[1:]), batch
    )


def test_ddp_keeps_a_leaf_of_another_length_whole():
    """Catches a check that refuses what needs no split."""
    (piece,) = Strategy("ddp", 2).pieces([{"a": np.full(3, i), "x": np.full(4, i)} for i in range(2)])
    assert piece.batch["a"].tolist() == [0] * 3 + [1] * 3 and piece.batch["x"].tolist() == [0] * 4 + [1] * 4


def test_a_batch_of_scalars_counts_as_one_example():
    """Catches an error for a batch that has no axis of examples."""
    mean = jaxaccum.Task(
        lambda key, batch: jnp.zeros(()), lambda w, batch, key: jaxaccum.Weighted(w * batch["x"], 1.0), optax.sgd(1.0)
    )
    t = trainer(strategy="single")
    t.fit(mean, [{"x": 2.0, "n": 3}] * 3)
    assert t.samples_seen == 3


@pytest.mark.parametrize("strategy", ["single", "ddp", "dp"])
def test_a_mapping_of_another_class_is_read_as_a_dict(strategy):
    """Catches the batches of Hugging Face's collators refused, or made text of their keys."""
    batches = loader(*[8] * 8)
    wrapped = [collections.UserDict(batch) for batch in batches]
    run = lambda batches: trainer(strategy=strategy).fit(task(), batches, batches[:2])
    assert_same(run(wrapped).params, run(batches).params)


def test_ddp_takes_batches_whose_leaves_have_lengths_of_their_own():
    """Catches a graph's nodes and edges refused on several devices, though no device gets a part of them."""
    graphs = [{"nodes": np.full(4, i, np.float32), "edges": np.full(7, i, np.float32)} for i in range(8)]
    loss = lambda w, batch, key: jaxaccum.Weighted(w * (batch["nodes"].sum() + batch["edges"].sum()), 4)
    the_task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))
    single_state = trainer(strategy="single", accumulate_grad_batches=4).fit(the_task, graphs)
    ddp_state = trainer(strategy="ddp", devices=4).fit(the_task, graphs)
    np.testing.assert_allclose(ddp_state.params, single_state.params, rtol=1e-6)
