"""The small sums of a window as one vector: the same sums, where no part of them lies on another device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import _packing

K, N = 4, 2


def params():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    draw = lambda *shape: 0.5 * jax.random.normal(next(keys), shape)
    return {
        "in": {"kernel": draw(3, 4), "bias": draw(4)},
        "none": None,
        "out": {"kernel": draw(4, 2), "bias": draw(2)},
        "scale": draw(),
    }


def loss(p, x):
    """Micro-batches whose first entry is negative weigh nothing, and have a NaN."""
    hidden = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
    squared = (p["scale"] * (hidden @ p["out"]["kernel"] + p["out"]["bias"])) ** 2
    count = jnp.maximum(x[0, 0], 0)
    return jaxaccum.Weighted(jnp.sum(squared) * jnp.where(count > 0, 1, jnp.nan), count)


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine that has one."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
def test_what_is_packed():
    """A leaf in the place of another one, or one that is large, of another kind, or has to stay."""
    rows = lambda *shape, dtype=jnp.float32: jnp.arange(float(np.prod(shape, dtype=int)), dtype=dtype).reshape(shape)
    tree = [rows(3), None, rows(2, 2), rows(4, dtype=jnp.bfloat16), rows(), rows(2**16 + 1), rows(5), rows(2)]
    packing = _packing.of(tree, stay=[False] * 6 + [True])
    vector, others = packed = packing.pack(tree)
    np.testing.assert_array_equal(vector, [0, 1, 2, 0, *range(5)])
    assert [x if x is None else x.shape for x in others] == [None, None, (2, 2), (4,), None, (2**16 + 1,), None, (2,)]
    for x, y in zip(packing.unpack(packed), tree, strict=True):
        assert x is y or (x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y))


@pytest.mark.parametrize("tree", [[], [jnp.ones(3)], [jnp.ones((2, 2))] * 2], ids=["empty", "one", "matrices"])
@pytest.mark.usefixtures("one_device")
def test_nothing_to_pack(tree):
    """A vector of nothing, or a copy for nothing."""
    packing = _packing.of(tree, stay=[False] * len(tree))
    assert packing.pack(tree) == (None, tree)
    assert packing.unpack((None, tree)) == tree


def test_gradients_are_the_same(monkeypatch):
    """A sum that is read from another's place, or one of a micro-batch without weight."""
    x = jax.random.normal(jax.random.key(1), (K * N, 3)).at[::N, 0].set(jnp.array([1.0, -1.0, 3.0, 2.0]))
    window = lambda: jax.jit(jaxaccum.value_and_grad(loss, K))
    apart = window()(params(), x)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    together = window()
    assert "concatenate" in together.lower(params(), x).as_text()
    jax.tree.map(np.testing.assert_array_equal, together(params(), x), apart)


@pytest.mark.parametrize(
    ("shape", "names", "packs"), [((8,), ("data",), True), ((4, 2), ("data", "model"), False), (None, None, False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_gathered(shape, names, packs, kind):
    """A vector of what lies split over a model axis, or may: it would be gathered in every micro-step."""
    x = jnp.ones((8 * K * N, 3))
    if shape is None:
        assert "concatenate" not in jax.jit(jaxaccum.value_and_grad(loss, K)).lower(params(), x).as_text()
        return
    mesh = jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))
    place = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        f = jax.jit(jaxaccum.value_and_grad(loss, K, mesh=mesh))
        text = f.lower(jax.tree.map(place, params()), place(x, "data")).as_text()
    assert ("concatenate" in text) == packs
