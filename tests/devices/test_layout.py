"""How an array's dimensions are sharded over a mesh's data axes: what jax's types say, with few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import layout
from jaxaccum._jax import varying


def make(kind="explicit", shape=(2, 2), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names))


def placed(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def spec_of(x):
    return jax.typeof(x).sharding.spec


@pytest.mark.parametrize(
    ("shape", "spec", "names", "want"),
    [
        ((3, 4), (), ("data",), 1),
        ((4, 4), (), ("data",), 0),
        ((0, 4), (), ("data",), 1),
        ((3, 3), (), ("data",), None),
        ((), (), ("data",), None),
        ((2, 3), (), ("data", "model"), None),
        ((2, 4), (), ("data", "model"), 1),
        ((4, 4), ("model", None), ("data",), 1),
        ((4, 4), ("data", None), ("data",), 0),
        ((4, 3), (("data", "model"), None), ("data",), None),
        ((4, 3), (("data", "model"), None), ("data", "model"), 0),
    ],
)
def test_the_dimension_to_shard(shape, spec, names, want):
    """Catches a dimension that doesn't divide, or is another axis's, or is empty."""
    mesh = make()
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    assert layout.dimension(leaf, mesh, names) == want
    on_auto = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(make("auto"), P(*spec)))
    fits = [d for d, n in enumerate(shape) if n and n % 2 ** len(names) == 0]
    assert layout.dimension(on_auto, make("auto"), names) == next(iter(fits), None)  # Types record nothing.


@pytest.mark.parametrize(
    ("shape", "spec", "names", "want"),
    [
        ((4, 4), (), ("data",), ("data", None)),
        ((4,), (), ("data", "model"), (("data", "model"),)),
        ((3, 4), (), ("data",), (None, "data")),
        ((3,), (), ("data",), (None,)),
        ((4, 4), (None, "model"), ("data",), ("data", "model")),
        ((4, 4), ("model",), ("data",), (("data", "model"), None)),
        ((2, 4), ("model",), ("data",), ("data", None)),
        ((4, 4), (None, "data"), ("data",), ("data", None)),
        ((3, 2), (None, ("data", "model")), ("data",), (None, "data")),
        ((3, 4), (None, ("data", "model")), ("data",), (None, ("data", "model"))),
    ],
)
def test_a_sharding_over_the_data_axes(shape, spec, names, want):
    """Catches another axis that is lost, or kept where both don't divide, and a data axis that is used twice."""
    mesh = make("auto")
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    assert layout.sharding(leaf, mesh, names) == NamedSharding(mesh, P(*want))
    here = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    bare = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert layout.sharding(here, mesh, names) == layout.sharding(bare, mesh, names)


def test_a_layout_is_laid():
    """Catches another axis that is gathered on the way, a scalar that is sharded, and a dimension that isn't."""
    mesh, x = make(), np.arange(16.0).reshape(4, 4)
    both = placed(x, mesh, None, "model")
    split = layout.lay(both, mesh, ("data",), 0)
    assert spec_of(split) == P("data", "model")
    assert spec_of(layout.lay(split, mesh, ("data",), None)) == P(None, "model")
    assert spec_of(layout.lay(placed(x, mesh), mesh, ("data",), 1)) == P(None, "data")
    auto = make("auto")
    split = layout.lay(placed(x, auto, None, "model"), auto, ("data",), 0)
    assert split.sharding.is_equivalent_to(NamedSharding(auto, P("data", "model")), 2)
    gathered = layout.lay(split, auto, ("data",), None)
    assert gathered.sharding.is_equivalent_to(NamedSharding(auto, P(None, "model")), 2)
    scalar = jnp.ones(())
    assert layout.lay(scalar, mesh, ("data",), None) is layout.lay(scalar, auto, ("data",), None) is scalar
    odd = placed(np.ones(3), auto)
    assert layout.lay(odd, auto, ("data",), None).sharding.is_equivalent_to(NamedSharding(auto, P()), 1)


def test_resharding_keeps_other_axes():
    """Catches an axis that is not among the names and changes, and a program where nothing does."""
    mesh = make()
    x = placed(np.ones((4, 4)), mesh, ("data", "model"), None)
    assert spec_of(layout.reshard(x, mesh, ("data",), P())) == P("model", None)
    assert spec_of(layout.reshard(x, mesh, ("data",), P(None, "data"))) == P("model", "data")
    assert spec_of(layout.reshard(x, mesh, ("data", "model"), P("data"))) == P("data", None)
    assert layout.reshard(x, mesh, ("data",), P(("data", "model"))) is x
    y = placed(np.ones((4, 4)), mesh, "data", "model")
    assert layout.reshard(y, mesh, ("data",), P("data")) is y
    assert layout.reshard(y, mesh, (), P()) is y


def test_types_on_explicit_axes():
    """Catches a layout that is read where types hold none, or is not where they do."""
    mesh, auto = make(), make("auto")
    mixed = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    assert [layout.is_explicit(m) for m in (mesh, auto, mixed, mesh.abstract_mesh)] == [True, False, True, True]
    x = placed(np.ones((4, 4)), mesh, ("data", "model"), None)
    assert layout.layout(x) == (("data", "model"), None) and layout.layout(jax.typeof(x)) == layout.layout(x)
    assert layout.layout(placed(np.ones((4, 4)), auto, "data")) == layout.layout(np.ones((4, 4))) == (None, None)
    assert [layout.count(x, d) for d in (0, 1)] == [4, 1] and layout.count(jnp.ones(4), 0) == 1
    assert layout.count(placed(np.ones((4, 4)), mesh, None, "model"), 1) == 2
    found = []
    jax.eval_shape(lambda x: found.append((layout.layout(x), layout.unplaced(x))), x)
    assert found == [(layout.layout(x), layout.unplaced(x))]
    assert layout.is_explicitly_sharded(jax.typeof(x)) and not layout.is_explicitly_sharded(jax.typeof(jnp.ones(4)))
    assert not layout.is_explicitly_sharded(jax.typeof(placed(np.ones(4), mesh)))
    weak = placed(jnp.asarray(1.0), mesh)
    assert layout.unplaced(x) == jax.ShapeDtypeStruct((4, 4), x.dtype)
    assert layout.unplaced(jax.typeof(weak)).weak_type and not layout.unplaced(jax.typeof(x)).weak_type
    assert layout.unplaced(2.0) == 2.0 and layout.unplaced(weak := jnp.ones(3)) is weak


def test_arrays_from_outside_of_a_mesh():
    """Catches an array without the mesh's type, beside which a conditional's branches differ."""
    mesh, outside, inside = make(), jnp.ones((2, 2)), placed(np.ones((2, 2)), make(), "data")
    assert layout.in_context(outside) is outside and layout.onto(outside, mesh) is outside
    found = {}

    def body(x, y):
        found["onto"] = [layout.onto(z, mesh) for z in (x, y)]
        found["is same"] = found["onto"][1] is y
        return x

    jax.eval_shape(body, outside, inside)
    assert [spec_of(z) for z in found["onto"]] == [P(None, None), P("data", None)] and found["is same"]
    assert jax.typeof(found["onto"][0]).sharding.mesh == mesh.abstract_mesh
    with jax.set_mesh(mesh):
        assert jax.typeof(layout.in_context(outside)).sharding.mesh == mesh.abstract_mesh
        assert layout.in_context(inside) is inside
    with jax.set_mesh(make("auto")):
        assert layout.in_context(outside) is outside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "names", "spec"),
    [((4,), ("data",), ()), ((2, 2), ("data", "model"), ("model",)), ((4, 1), ("data", "model"), ())],
)
def test_a_reduce_scatter(kind, shape, names, spec):
    """Catches a sum that is rounded to its own dtype, or not sharded, or another device's."""
    mesh = make(kind, shape, names)
    size = shape[0]
    x = np.linspace(1, 2, size * 32).reshape(size, 8, 4).astype(jnp.bfloat16)
    got = layout.reduce_scatter(placed(x, mesh, "data", *spec), mesh, ("data",))
    split = 1 if spec and kind == "explicit" else 0
    assert got.dtype == jnp.float32
    program = jax.make_jaxpr(lambda x: layout.reduce_scatter(x, mesh, ("data",)))(placed(x, mesh, "data", *spec))
    assert ("reduce_scatter" in str(program)) == (kind == "explicit" or not spec)
    np.testing.assert_allclose(got, x.astype(np.float64).sum(0), rtol=1e-6)
    wanted = P(*spec, "data") if split else P("data", *spec) if not spec else None
    assert wanted is None or got.sharding.is_equivalent_to(NamedSharding(mesh, wanted), 2)
    odd = layout.reduce_scatter(placed(x[:, :3, :3], mesh, "data"), mesh, ("data",))
    np.testing.assert_allclose(odd, x[:, :3, :3].astype(np.float64).sum(0), rtol=1e-6)


def test_zeros_like_a_row():
    """Catches zeros of a loop's carry whose type differs from what the loop adds."""
    mesh, found = make(), []

    def stacked(row):
        found.append(layout.zeros(3, jax.typeof(row)))
        return found[-1]

    jax.eval_shape(stacked, placed(np.ones((2, 4), np.int32), mesh, None, "model"))
    assert spec_of(found[0]) == P(None, None, "model") and found[0].shape == (3, 2, 4) and found[0].dtype == np.int32
    assert not np.any(layout.zeros(3, jax.typeof(np.ones(2))))

    def body(x):
        stacked(x), stacked(jax.lax.psum(x, "data"))
        return x

    jax.eval_shape(jax.shard_map(body, mesh=make("auto"), in_specs=P("data"), out_specs=P("data")), jnp.ones(2))
    assert [varying.axes(x) for x in found[-2:]] == [{"data"}, set()]


def test_dtypes_for_reductions():
    """Catches integers and doubles that are rounded, and a float8 that is not widened."""
    with jax.enable_x64(True):
        narrow = [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn]
        for dtype in (jnp.float32, jnp.float64, jnp.complex64, jnp.int8, jnp.bool_):
            assert layout.wide(jnp.ones(2, dtype)).dtype == dtype
        assert {layout.wide(jnp.ones(2, dtype)).dtype for dtype in narrow} == {np.dtype(np.float32)}
