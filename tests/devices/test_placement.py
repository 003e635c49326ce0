"""The arguments that say where local sums are, and arrays that are elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice


def make(devices=2, names=("data",), shape=None):
    kinds = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(shape or (devices,), names, axis_types=kinds, devices=jax.devices()[:devices])


def test_the_place_that_arguments_select():
    """Catches an axis of another name, a scatter that is not one, and a mesh that takes the axis's place."""
    mesh, both = make(), make(4, ("data", "model"), (2, 2))
    assert placement.select_sync(None, None, "data") == OneDevice()
    assert placement.select_sync("i", None, "data") == MappedAxis(("i",))
    assert placement.select_sync(("i", "j"), None, "data") == MappedAxis(("i", "j"))
    assert placement.select_sync(None, mesh, "data") == MeshAxis(mesh, ("data",), scatter=False)
    assert placement.select_sync(None, mesh, "data", reduce="scatter") == MeshAxis(mesh, ("data",), scatter=True)
    assert placement.select_sync(None, both, ("model", "data")) == MeshAxis(both, ("model", "data"))
    assert placement.select_sync(None, None, "data", lambda *_: False) == OneDevice()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, "mesh", "data"), {"reduce": "sum"}, ValueError, "reduce must be 'mean' or 'scatter' .ZeRO., got 'sum'"),
        ((None, None, "data"), {"reduce": "scatter"}, ValueError, "reduce='scatter' needs mesh="),
        (("i", None, "data"), {"reduce": "scatter"}, ValueError, "reduce='scatter' needs mesh="),
        (("i", "mesh", "data"), {}, ValueError, "axis_name='i' is for pmap and shard_map, mesh for jit"),
        (("i", None, "data", lambda *_: False), {}, ValueError, "should_skip_update_fn can't be used on several"),
        ((None, "mesh", "data", lambda *_: False), {}, ValueError, "should_skip_update_fn can't be used on several"),
        ((1, None, "data"), {}, TypeError, "axis_name must be a name or a tuple of names, got 1"),
        (((), None, "data"), {}, TypeError, "axis_name must be a name or a tuple of names"),
        ((("i", 1), None, "data"), {}, TypeError, "axis_name must be a name or a tuple of names"),
        ((None, "mesh", None), {}, TypeError, "data_axis must be a name or a tuple of names, got None"),
        ((None, 3, "data"), {}, TypeError, "mesh must be a jax.sharding.Mesh, .* got 3"),
        ((None, "mesh", ("data", "model")), {}, ValueError, "the mesh has no axis 'model', only .'data',."),
    ],
)
def test_arguments_that_select_no_place(arguments, options, error, message):
    """Catches an argument that is ignored, and an error of jax's own, deep in a program."""
    arguments = [make() if argument == "mesh" else argument for argument in arguments]
    with pytest.raises(error, match=message):
        placement.select_sync(*arguments, **options)


def test_parameters_on_other_devices():
    """Catches a copy from device to device in each step, and parameters that are refused where jax may move them."""
    sync, mesh = MeshAxis(make(), ("data",)), make()
    here = jax.device_put(np.ones(2), NamedSharding(mesh, P("data")))
    part = jax.device_put(np.ones(2), jax.devices()[1])
    elsewhere = jax.device_put(np.ones(2), jax.devices()[5])
    wider = jax.device_put(np.ones(4), NamedSharding(make(4), P("data")))
    placement.placed({"here": here, "part": part, "free": jnp.ones(2), "host": np.ones(2), "number": 1.0}, sync)
    placement.placed(elsewhere, OneDevice())
    for leaf, device in [(elsewhere, 5), (wider, 2)]:
        where = rf"the parameter \['w'\] lies on {jax.devices()[device]}, which is not among the mesh's 2 devices"
        with pytest.raises(ValueError, match=where):
            placement.placed({"a": here, "w": leaf}, sync)
    with pytest.raises(ValueError, match="the parameter given lies on"):
        placement.placed(elsewhere, sync)
    jax.eval_shape(lambda w: placement.placed(w, sync), elsewhere)


def test_an_axis_outside_of_its_map():
    """Catches jax's message, which names no argument."""
    placement.in_map(OneDevice())
    with pytest.raises(NameError, match=r"axis_name=\('i',\) names no axis here: call this inside"):
        placement.in_map(MappedAxis(("i",)))


def test_gradients_that_are_reduced_already():
    """Catches a gradient that is summed twice, and an integer's taken for one."""
    sync = MappedAxis(("i",))

    def body(x):
        local = {"x": x, "n": jnp.int32(1)}
        placement.local_gradients(local, sync)
        with pytest.raises(ValueError, match=r"grads\['y'\] does not vary over axis_name=\('i',\)"):
            placement.local_gradients({**local, "y": jax.lax.psum(x, "i")}, sync)
        return x

    jax.eval_shape(jax.shard_map(body, mesh=make(names=("i",)), in_specs=P("i"), out_specs=P("i")), jnp.ones(2))
    placement.local_gradients({"y": jnp.ones(2)}, OneDevice())
