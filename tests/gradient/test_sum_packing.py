"""The small sums of a window in stacks: the same sums, and no part of them moves between devices."""

import os
import subprocess
import sys

import flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._gradient import sum_packing

K, N = 4, 2


def params():
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *shape: 0.5 * jax.random.normal(next(keys), shape)
    return {
        "in": {"kernel": draw(3, 4), "bias": draw(4)},
        "none": None,
        "gain": draw(4),
        "out": {"kernel": draw(4, 2), "bias": draw(2)},
        "scale": draw(),
    }


def loss(p, x):
    """Micro-batches whose first entry is negative weigh nothing, and have a NaN."""
    hidden = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"])
    squared = (p["scale"] * ((p["gain"] * hidden) @ p["out"]["kernel"] + p["out"]["bias"])) ** 2
    count = jnp.maximum(x[0, 0], 0)
    return jaxaccum.Weighted(jnp.sum(squared) * jnp.where(count > 0, 1, jnp.nan), count)


def test_what_is_packed():
    """A leaf in place of another one, or one that is large, of another kind, or has to stay."""
    rows = lambda *shape, dtype=jnp.float32: jnp.arange(float(np.prod(shape, dtype=int)), dtype=dtype).reshape(shape)
    half = rows(4, dtype=jnp.bfloat16)
    tree = [rows(3), None, rows(2, 2), rows(), half, 2 * rows(3), rows(2**16 + 1), 3 * rows(3), half + 1, half, rows(5)]
    tree.append(rows(3, dtype=jnp.bfloat16))
    packing = sum_packing.of(tree, stay=[False] * 6 + [True] + [False] * 4)
    stacks, others = packed = packing.pack(tree)
    assert [(x.shape, x.dtype) for x in stacks] == [((2, 3), jnp.float32), ((3, 4), jnp.bfloat16)]
    assert [i for i, x in enumerate(others) if x is not None] == [2, 3, 6, 7, 10, 11]
    for x, y in zip(packing.unpack(packed), tree, strict=True):
        assert x is y or (x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y))


@pytest.mark.parametrize("tree", [[], [jnp.ones(3)], [jnp.ones((2, 2))] * 2], ids=["empty", "one", "matrices"])
def test_nothing_to_pack(tree):
    """A stack of nothing, or a copy for nothing."""
    packing = sum_packing.of(tree, stay=[False] * len(tree))
    assert packing.pack(tree) == ([], tree)
    assert packing.unpack(([], tree)) == tree


def test_gradients_are_the_same(monkeypatch):
    """A sum that is read from another's place, or one of a micro-batch without weight."""
    x = jax.random.normal(jax.random.key(1), (K * N, 3)).at[:K, 0].set(jnp.array([1.0, -1.0, 3.0, 2.0]))
    window = lambda: jax.jit(jaxaccum.value_and_grad(loss, K))
    together = window()
    assert "concatenate" in together.lower(params(), x).as_text()
    monkeypatch.setattr(sum_packing, "_SMALL", 0)
    apart = window()
    assert "concatenate" not in apart.lower(params(), x).as_text()
    jax.tree.map(np.testing.assert_array_equal, together(params(), x), apart(params(), x))


@pytest.mark.parametrize("where", ["plain jit", "mesh"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_gathered(where, kind, monkeypatch):
    """A stack whose parts would have to come together first, or lie in different ways."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
    place = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    p = {"w": place(jnp.ones((3, 8)), None, "model"), "b": [place(jnp.ones(8), "model")] * 2, "c": place(jnp.ones(8))}
    x = place(jnp.ones((4 * K * N, 3)), "data")

    def fun(p, x):
        return jnp.mean((x @ p["w"] * p["b"][0] + p["b"][1] + p["c"]) ** 2)

    def lower():
        with jax.set_mesh(mesh):
            return jax.jit(jaxaccum.value_and_grad(fun, K, mesh=mesh if where == "mesh" else None)).lower(p, x)

    together = lower()
    monkeypatch.setattr(sum_packing, "_SMALL", 0)
    assert "concatenate" in together.as_text() and "concatenate" not in lower().as_text()
    moved = lambda lowered: [
        (one.kind, one.axes, one.where, one.num_bytes)
        for one in jaxaccum.collectives(lowered.compile(), mesh=mesh).all
        if one.kind != "all-reduce"
    ]
    assert moved(together) == moved(lower())


def test_a_program_does_not_know_how_many_devices_there_are():
    """A program for one device that differs on a machine with more."""
    script = (
        "import jax, jax.numpy as jnp, jaxaccum\n"
        "p = {'w': jnp.ones((3, 4)), 'a': jnp.ones(4), 'b': jnp.ones(4)}\n"
        "loss = lambda p, x: jnp.mean((x @ p['w'] * p['a'] + p['b']) ** 2)\n"
        "print(jax.jit(jaxaccum.value_and_grad(loss, 4)).lower(p, jnp.ones((8, 3))).as_text())"
    )
    text = lambda devices: (
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "XLA_FLAGS": flags.forced(devices)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert text(1) == text(8)
