"""The three places of local sums, method by method: each against numpy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice, averaged
from jaxaccum._jax import varying
from jaxaccum._sums import overwrites

SIZE = 4
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, shape=(SIZE,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))


def on_axis(sync, kind="auto", scatter=False):
    """A `MeshAxis` over 4 devices, or (2, 2) of them with a model axis."""
    shape, names = ((SIZE,), ("data",)) if sync == "data" else ((2, 2), ("data", "model"))
    return MeshAxis(make(kind, shape, names), ("data",), scatter)


def mapped(fun, *args, names=("data",), check_vma=True):
    """The result of `fun` on each device, stacked: its arguments are rows (P, ...)."""
    mesh = make("auto", (SIZE,) if len(names) == 1 else (2, 2), names)

    def body(*args):
        results = fun(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], MappedAxis(names).local(results))

    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(names), out_specs=P(names), check_vma=check_vma))(*args)


def rows(seed=0, shape=(3,), dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((SIZE, *shape)).astype(dtype)


def assert_close(got, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, want)


def statistics(x):
    return {overwrites.NAME: x}


def test_one_device():
    """Catches a method that does something where there is nothing to do."""
    sync, tree = OneDevice(), {"x": jnp.ones(3)}
    assert (sync.size(), sync.index(), sync.shape, sync.names, sync.options()) == (1, 0, (), (), {})
    assert not sync.varies(tree["x"]) and not sync.is_reduced(tree["x"])
    for name in (
        "local",
        "joined",
        "averaged",
        "gathered",
        "part",
        "once",
        "common",
        "one",
        "spread",
        "settled",
        "own",
    ):
        assert getattr(sync, name)(tree) is tree
    assert sync.unchanged(tree) is tree and sync.each(lambda x: [x], tree) == [tree]
    assert sync.whole(tree, None) is tree and sync.like(tree, 1) is tree and sync.aligned(tree, 2) == (tree, 2)
    assert_close(sync.norm({"x": jnp.array([3.0, 4.0]), **statistics(jnp.ones(3))}), 5.0)


@pytest.mark.parametrize("check_vma", [True, False])
def test_sums_over_a_mapped_axis(check_vma):
    """Catches statistics that are summed, and a sum in half precision: 4 times 30,000 is beyond float16."""
    sync = MappedAxis(("data",))
    with jax.enable_x64(True):
        tree = {"x": rows(), "half": np.full((SIZE, 2), 3e4, np.float16), **statistics(rows(1))}
        got = mapped(lambda tree: sync.joined({**tree, "same": jnp.ones(1)}), tree, check_vma=check_vma)
        assert got["half"].dtype == np.float32
        want = {
            "x": tree["x"].sum(0),
            "half": np.full(2, 1.2e5),
            "same": np.full(1, 4.0),
            **statistics(tree[overwrites.NAME].max(0)),
        }
        assert_close(got, jax.tree.map(lambda x: np.tile(x, (SIZE, 1)), want))


def test_sums_of_leaves_that_are_reduced_in_part():
    """Catches an axis over which a leaf is summed twice, or never, and its norm."""
    sync, names = MappedAxis(("a", "b")), ("a", "b")
    reduced = {"whole": ("a", "b"), "part": ("a",), "none": ()}
    with jax.enable_x64(True):
        tree = {name: rows(seed) for seed, name in enumerate(reduced)}
        got = mapped(lambda tree: sync.joined(tree, reduced), tree, names=names)
        assert_close(got["whole"], tree["whole"])
        part = tree["part"].reshape(2, 2, 3)  # Device (a, b); summed over b.
        assert_close(got["part"], np.repeat(part.sum(1), 2, axis=0))
        assert_close(got["none"], np.tile(tree["none"].sum(0), (SIZE, 1)))

        # A norm: each device along a leaf's own axes has another part of it.
        norm = mapped(lambda tree: sync.norm(tree, reduced), tree, names=names)
        squares = np.stack([(tree["whole"] ** 2).sum()] * SIZE)
        squares += [(part[:, b] ** 2).sum() for _ in range(2) for b in range(2)]
        assert_close(norm, np.sqrt(squares + (tree["none"] ** 2).sum(1)))
        assert_close(mapped(sync.norm, {"x": tree["none"]}, names=names), np.linalg.norm(tree["none"], axis=1))


@pytest.mark.parametrize("check_vma", [True, False])
def test_means_over_a_mapped_axis(check_vma):
    """Catches a mean that is a sum or overflows, and keys, flags and counters that are averaged."""
    sync = MappedAxis(("data",))
    with jax.enable_x64(True):
        tree = {
            "x": rows(),
            "half": np.float16([[3e4], [3e4], [3e4], [-3e4]]),
            "key": jax.random.split(jax.random.key(0), SIZE),
            "flag": np.array([True] * SIZE),
            "off": np.array([False] * SIZE),
            "count": np.array([7] * SIZE),
        }
        got = mapped(sync.averaged, tree, check_vma=check_vma)
        assert {name: x.dtype for name, x in got.items()} == {name: x.dtype for name, x in tree.items()}
        assert_close(got["x"], np.tile(tree["x"].mean(0), (SIZE, 1)))
        assert np.all(np.float32(got["half"]) == 15e3)
        first = np.asarray(jax.random.key_data(tree["key"]))[0]
        assert np.all(np.asarray(jax.random.key_data(got["key"])) == first)
        assert np.all(got["flag"]) and not np.any(got["off"]) and np.all(got["count"] == 7)


@pytest.mark.parametrize("names", [("data",), ("a", "b")])
def test_rows_over_a_mapped_axis(names):
    """Catches rows that are gathered in another order than that in which devices take theirs back."""
    sync = MappedAxis(names)
    x = np.arange(SIZE * 6.0, dtype=np.float32).reshape(SIZE, 2, 3)

    def both(x):
        gathered = sync.gathered(x)
        return gathered, sync.part(gathered), sync.index(), sync.once(jnp.ones(2)), jnp.int32(sync.size())

    gathered, part, index, once, size = mapped(both, x, names=names)
    assert_close(gathered, np.tile(x.reshape(-1, 3), (SIZE, 1, 1)))
    assert_close(part, x)
    assert np.all(index == np.arange(SIZE)) and np.all(size == SIZE)
    assert_close(once, [[1, 1], [0, 0], [0, 0], [0, 0]])


def test_what_varies_over_a_mapped_axis():
    """Catches a gradient that is reduced already and taken for local, and a common value that varies, or overflows."""
    sync, found = MappedAxis(("a", "b")), {}

    def body(x, key):
        one, both = jax.lax.psum(x, "a"), jax.lax.psum(x, ("a", "b"))
        largest = jnp.full((), 3e38, jnp.float32)
        equal = {"x": both, "i": jnp.int32(3), "largest": largest, "key": key}
        common = sync.common(sync.local(equal))
        found["varies"] = [sync.varies(y) for y in (x, one, both)]
        found["is reduced"] = [sync.is_reduced(y) for y in (x, one, both)]
        found["local"] = [varying.axes(sync.local(y)) for y in (x, one, both)]
        found["common"] = jax.tree.leaves(jax.tree.map(varying.axes, common))
        found["is same"] = sync.common(both) is both and sync.local(x) is x
        numbers = lambda tree: {**tree, "key": jax.random.key_data(tree["key"])}
        return jax.tree.map(jnp.subtract, numbers(common), numbers(equal))

    mesh = make("auto", (2, 2), ("a", "b"))
    differences = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(P(("a", "b")), P()), out_specs=P()))(
        rows(dtype=np.float32), jax.random.key(3)
    )
    assert found["varies"] == [True, True, False] and found["is reduced"] == [False, False, True]
    assert found["local"] == [{"a", "b"}] * 3 and found["common"] == [set()] * 4 and found["is same"]
    assert all(not np.any(x) for x in jax.tree.leaves(differences))
    assert sync.local(3) == 3  # Outside of the map.

    def untracked(x):
        found["untracked"] = sync.is_reduced(x), sync.varies(x)
        return x

    jax.eval_shape(jax.shard_map(untracked, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False), jnp.ones(2))
    assert found["untracked"] == (False, False)


@every_kind
@pytest.mark.parametrize("scatter", [False, True])
def test_sums_over_a_mesh(kind, scatter):
    """Catches statistics that are summed, a sum in half precision, and a device's copy that is not there."""
    sync = on_axis("data", kind, scatter)
    assert (sync.size(), sync.shape, sync.index()) == (SIZE, (SIZE,), 0)
    over = NamedSharding(sync.mesh, P("data"))
    with jax.enable_x64(True):
        tree = {"x": rows(), "half": np.full((SIZE, 4), 3e4, np.float16), **statistics(rows(1))}
        tree = jax.device_put(tree, over)
        got = sync.joined(tree)
        assert got["half"].dtype == np.float32 and not np.any(got["half"] - 1.2e5)
        assert got["half"].sharding.is_equivalent_to(NamedSharding(sync.mesh, P("data" if scatter else None)), 1)
        assert_close(got["x"], np.sum(tree["x"], 0))
        assert_close(got[overwrites.NAME], np.max(tree[overwrites.NAME], 0))
        one = sync.one(tree)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(lambda x: (x.shape[1:], x.dtype), tree)
        assert_close(sync.each(jnp.sum, tree["x"]), np.sum(tree["x"], 1))
        local = sync.local(jnp.arange(3.0))
        assert_close(local, np.tile(np.arange(3.0), (SIZE, 1)))
        assert local.sharding.is_equivalent_to(over, 2)
        zeros = jax.device_put(jnp.zeros((SIZE, 3)), NamedSharding(sync.mesh, P()))
        assert jax.jit(sync.own)(zeros).sharding.is_equivalent_to(over, 2)


def test_means_over_a_mesh():
    """Catches keys that are mixed, a mean that overflows, and counters that are averaged."""
    keys = jax.random.split(jax.random.key(0), SIZE)
    half = jnp.float16([[3e4], [3e4], [3e4], [-3e4]])
    x, key, mean, count, flag = averaged(
        (rows(dtype=np.float32), keys, half, jnp.int32([[7, 8]] * SIZE), jnp.ones(SIZE, bool))
    )
    np.testing.assert_allclose(x, rows().mean(0), rtol=1e-5, atol=1e-6)
    assert np.all(jax.random.key_data(key) == jax.random.key_data(keys[0])) and key.dtype == keys.dtype
    assert mean.dtype == half.dtype and float(mean[0]) == 15e3
    assert count.tolist() == [7, 8] and flag and flag.dtype == bool
    assert_close(on_axis("data").averaged(rows(dtype=np.float32)), x)


def spec(x):
    return jax.typeof(x).sharding.spec


def test_layouts_of_joined_sums_on_explicit_axes():
    """Catches an optimizer that gets sums and parameters in two layouts, and parameters that leave theirs."""
    plain, zero = on_axis("model", "explicit"), on_axis("model", "explicit", scatter=True)
    put = lambda *names: jax.device_put(jnp.ones((4, 4)), NamedSharding(plain.mesh, P(*names)))
    p, sums = put(None, "model"), put()
    for sync, want in [(plain, P(None, "model")), (zero, P("data", "model"))]:
        aligned, params = sync.aligned(sums, p)
        assert spec(params) == want and spec(sync.spread(p)) == want
        assert spec(aligned) == (want if sync is plain else P(None, None))
    assert plain.aligned(sums, None) == (sums, None)
    assert spec(plain.like(sums, p)) == P(None, "model") and zero.like(sums, p) is sums
    assert plain.whole(sums, p) is sums
    assert spec(zero.whole(put("data"), p)) == P(None, "model")
    assert spec(zero.whole(put("data", "model"), None)) == P(None, "model")
    updates = zero.whole({"x": put("data"), "i": None}, {"x": p, "i": 3})
    assert spec(updates["x"]) == P(None, "model") and updates["i"] is None
    assert spec(plain.unsplit(put("data", "model"))) == P(None, "model")
    local = plain.local(put("data", "model"))
    assert spec(local) == P("data", None, "model")
    outside = jax.eval_shape(plain.unchanged, jnp.ones(2))
    assert outside.sharding.mesh == plain.mesh.abstract_mesh and outside.sharding.spec == P(None)


def test_layouts_of_joined_sums_on_automatic_axes():
    """Catches constraints that types don't need, and a state that ZeRO doesn't split, or parameters that stay split."""
    plain, zero = on_axis("model"), on_axis("model", scatter=True)
    x, p = jnp.ones((4, 4)), jnp.ones((4, 4))
    for sync in (plain, zero):
        assert sync.aligned(x, p) == (x, p) and sync.like(x, p) is x and sync.unsplit(x) is x and sync.unchanged(p) is p
    assert plain.spread(x) is x and plain.whole(x, p) is x and jax.make_jaxpr(plain.unchanged)(p).eqns == []
    split = zero.spread(x)
    assert split.sharding.is_equivalent_to(NamedSharding(zero.mesh, P("data")), 2)
    assert zero.whole(split, p).sharding.is_fully_replicated and zero.whole(split, None).sharding.is_fully_replicated


def test_a_state_is_placed_where_a_step_leaves_it():
    """Catches a fresh state for which a step compiles twice, and one that is moved from where it was put."""
    sync = on_axis("model")
    put = jax.device_put(jnp.ones(2), NamedSharding(sync.mesh, P("model")))
    fresh, kept, number = sync.settled((jnp.ones(2), put, 3))
    assert fresh.committed and fresh.sharding == NamedSharding(sync.mesh, P()) and kept is put and number == 3
    assert jax.make_jaxpr(sync.settled)(jnp.ones(2)).eqns == []


def test_the_options_of_a_topology():
    """Catches an error message that names other arguments than the caller's."""
    mesh = make("auto")
    assert MappedAxis(("a", "b")).options() == {"axis_name": ("a", "b")}
    assert MeshAxis(mesh, ("data",)).options() == {"mesh": mesh, "data_axis": ("data",), "reduce": "mean"}
    assert MeshAxis(mesh, ("data",), scatter=True).options()["reduce"] == "scatter"
    assert MeshAxis(make("auto", (2, 2), ("a", "b")), ("a", "b")).size() == 4
