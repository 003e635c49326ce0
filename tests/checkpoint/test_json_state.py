"""The state of loaders and callbacks: stored exactly, as JSON text, never as a pickle."""

import math
import random
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxaccum.checkpoint import json_state

KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
MARKERS = st.sampled_from(["__bytes__", "__tuple__", "__dict__", "__array__", "__tensor__", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
DTYPES = hnp.scalar_dtypes() | hnp.unicode_string_dtypes() | hnp.byte_string_dtypes()
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
STATES = st.recursive(
    LEAVES | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(MARKERS, inner, max_size=2)
    ),
    max_leaves=8,
)


def assert_same(got, want):
    """One value and the other in all but identity: types, orders of keys, dtypes, bits."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert_same(list(got.items()), list(want.items()))
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, np.ndarray):
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())
        assert got.flags.writeable
    elif isinstance(want, float) and not math.isnan(want):
        assert got == want and math.copysign(1, got) == math.copysign(1, want)
    elif isinstance(want, float):
        assert math.isnan(got)
    else:
        assert got == want


def returned(value):
    return json_state.loads(json_state.dumps(value, "it"))


@given(STATES)
def test_a_state_comes_back_as_it_was(value):
    """Catches a key that becomes a string, a tuple that becomes a list, and a dict that is taken for a marker."""
    assert_same(returned(value), value)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ">f4", "<u2", "M8[ns]"])
def test_arrays_of_any_dtype_come_back(dtype):
    """Catches a dtype whose short name is not its own, and a byte order that is lost."""
    value = np.arange(6).reshape(2, 3).astype(dtype)
    for array in (value, value.T, value[:, ::2], np.asarray(value[0, 0])):
        assert_same(returned([array]), [array])


def test_the_states_of_generators_come_back():
    """Catches a state that its own generator refuses."""
    generators = [np.random.Generator(bits(3)) for bits in (np.random.PCG64, np.random.MT19937, np.random.Philox)]
    states = returned([generator.bit_generator.state for generator in generators])
    want = [generator.integers(1 << 40, size=4).tolist() for generator in generators]
    for generator, state in zip(generators, states, strict=True):
        generator.bit_generator.state = state
    assert [generator.integers(1 << 40, size=4).tolist() for generator in generators] == want
    python = random.Random(3)
    state, want = returned(python.getstate()), python.random()
    python.setstate(state)
    assert python.random() == want
    legacy = np.random.RandomState(3)
    state, want = returned(legacy.get_state()), legacy.rand()
    legacy.set_state(state)
    assert legacy.rand() == want


def test_numpy_scalars_come_back_as_numbers():
    """Catches a count that NumPy made, refused as a value or as a key."""
    value = {np.int64(3): np.float32(0.5), "b": np.bool_(True), "i": [np.uint8(7)], "s": np.str_("s")}
    assert_same(returned(value), {3: 0.5, "b": True, "i": [7], "s": "s"})


def test_texts_of_earlier_versions_are_read():
    """Catches a checkpoint that the version before has written, and this one can't go on from."""
    text = '{"a": [1, NaN, {"__bytes__": "YWI="}], "b": null}'
    assert_same(json_state.loads(text), {"a": [1, math.nan, b"ab"], "b": None})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({1, 2}, "set"),
        (object(), "object"),
        ({object(): 1}, "object"),
        (1j, "complex"),
        (np.array([{}]), "ndarray of dtype object"),
        (np.ones(2, "f4,f4"), "ndarray of dtype"),
        (np.ma.masked_array([1, 2], [0, 1]), "MaskedArray"),
        (np.datetime64("2020-01-01"), "datetime64"),
        (lambda: None, "function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_named(value, what):
    """Catches a pickle, a mask that is lost, and an error that does not say whose state it is."""
    with pytest.raises(TypeError, match=rf"the state of Mine can't be kept in a checkpoint: it holds a {what}"):
        json_state.dumps({"a": [(value,)]}, "Mine")


def test_torch_is_imported_only_for_a_text_that_holds_a_tensor(monkeypatch):
    """Catches an import that every resume pays for, and words of Python for a package that is missing."""
    monkeypatch.setitem(sys.modules, "torch", None)  # An import of it raises.
    assert_same(returned([b"a", np.ones(2)]), [b"a", np.ones(2)])
    with pytest.raises(ImportError, match=r"holds a torch tensor.*install torch"):
        json_state.loads('{"__tensor__": ["uint8", [1], "AA=="]}')


def test_torch_tensors_come_back_as_tensors():
    """Catches a generator's state that comes back as a list or an array, which torch refuses."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    state = returned({"sampler": [generator.get_state()]})["sampler"][0]
    want = torch.rand(4, generator=generator)
    assert torch.equal(torch.rand(4, generator=generator.set_state(state)), want)
    names = ("uint8", "bool", "int64", "float32", "bfloat16", "float8_e4m3fn", "complex64", "uint16")
    for dtype in (getattr(torch, name) for name in names):
        ones = torch.ones(2, 3).to(dtype)
        for tensor in (ones, ones.T, ones[:, ::2], ones[0, 0], ones[:0]):
            got = returned(tensor)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.float(), tensor.float()) if not dtype.is_complex else torch.equal(got, tensor)
    assert returned(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    with pytest.raises(TypeError, match="the state of it can't be kept in a checkpoint: it holds a Tensor"):
        returned(torch.ones(2).to_sparse())


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_goes_on_where_it_was(workers):
    """Catches a state of torchdata's that comes back as something else."""
    pytest.importorskip("torch")
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    options = {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None}
    make = lambda: stateful.StatefulDataLoader(list(range(20)), batch_size=2, shuffle=True, **options)
    loader = make()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    want = [batch.tolist() for batch in batches]
    other = make()
    other.load_state_dict(returned(state))
    assert [batch.tolist() for batch in other] == want


def test_a_data_set_of_hugging_face_goes_on_where_it_was():
    """Catches a state of datasets' that comes back as something else."""
    datasets = pytest.importorskip("datasets")
    make = lambda: datasets.Dataset.from_dict({"x": list(range(20))}).to_iterable_dataset(num_shards=4)
    data = make()
    examples = iter(data)
    for _ in range(7):
        next(examples)
    state = data.state_dict()
    want = list(examples)
    other = make()
    other.load_state_dict(returned(state))
    assert list(other) == want
