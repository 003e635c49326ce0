"""Local sums for another number of devices, in mid-window: the window ends as if nothing had happened."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import assert_close, inner, loss, params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

COUNTS = [1, 2, 4, 8]


def transformation(devices, opt=None, use_grad_mean=True, **options):
    """A transformation on a mesh of the first `devices` devices; on one device without a mesh."""
    mesh = None if devices == 1 else jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return jaxaccum.MultiSteps(opt or inner(), 16, use_grad_mean, mesh=mesh, **options)


@functools.cache
def program(devices):
    """(the transformation for so many devices, its jitted micro-step)."""
    tx = transformation(devices)
    return tx, jax.jit(lambda p, s, x, b: tx.micro_step(loss, p, s, x, boundary=b)[1:], static_argnums=3)


def train(devices, p, state, seeds, last=None):
    """A micro-step for each seed; a boundary at `last`."""
    for seed in seeds:
        p, state = program(devices)[1](p, state, rows(seed), seed == last)
    return p, state


@functools.cache
def begun(devices):
    """(parameters, state) in mid-window, on the host."""
    p, state = train(devices, params(), program(devices)[0].init(params()), range(3))
    return jax.device_get((p, state))


@functools.cache
def ended():
    """(parameters, state) after the whole window on one device."""
    return train(1, params(), program(1)[0].init(params()), range(6), last=5)


def rows(seed):
    """A micro-batch of 16 examples, of which a quarter counts for nothing."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((16, 3)),
        "y": rng.standard_normal((16, 4)),
        "mask": (rng.random(16) < 0.75).astype(float),
    }


def moved(tree):
    """Arrays as a checkpoint would bring them: from the host, on no particular device."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


@pytest.mark.parametrize("after", COUNTS)
@pytest.mark.parametrize("before", COUNTS)
def test_training_goes_on_with_another_number_of_devices(before, after):
    """Catches a micro-batch lost, counted twice, or weighed anew."""
    with jax.enable_x64(True):
        p, state = moved(begun(before))
        p, state = train(after, p, program(after)[0].redistribute(state), range(3, 6), last=5)
        want, want_state = ended()
        assert_close((p, state.inner_opt_state), (want, want_state.inner_opt_state))


@pytest.mark.parametrize(("before", "after"), [(1, 16), (8, 16), (2, 3), (16, 8), (6, 4)])
def test_sums_are_moved_whole_by_numbers_that_need_no_devices(before, after):
    """Catches a sum divided among its heirs, which would round."""
    state = transformation(1).init(params())
    mapped = jaxaccum.MultiSteps(inner(), 16, axis_name="data")
    rng = np.random.default_rng(0)
    stacked = jax.tree.map(lambda x: np.asarray(rng.integers(0, 99, (before, *x.shape)), x.dtype), state)
    got = mapped.redistribute(stacked, devices=after)
    for name in ("acc_grads", "weight", "averages", "dropped"):
        sums, old = getattr(got, name), getattr(stacked, name)
        assert all(x.shape[0] == after for x in jax.tree.leaves(sums))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.sum(0), y.sum(0)), sums, old)
        held = {x.tobytes() for y in jax.tree.leaves(old) for x in y}
        if after >= before:
            assert all(x.tobytes() in held or not x.any() for y in jax.tree.leaves(sums) for x in np.asarray(y))
    assert got.mini_step.tolist() == [stacked.mini_step[0]] * after


def test_the_sum_mode_stays_the_mean_over_devices():
    """Catches a sum that counts for more devices than it came from."""
    old, new = (transformation(n, optax.sgd(1.0), use_grad_mean=False) for n in (8, 4))
    state = old.init(jnp.zeros(()))
    _, state = jax.jit(lambda g, s: old.update(g, s, boundary=False))(jnp.arange(8.0), state)
    state, p = moved((state, jnp.zeros(())))
    updates, _ = jax.jit(lambda g, s: new.update(g, s, p, boundary=True))(jnp.ones(4), new.redistribute(state))
    assert updates == -(3.5 + 1.0)


def test_local_sums_lie_on_the_new_mesh():
    """Catches sums of every device on one, and a model axis' split that is lost."""
    old = jaxaccum.MultiSteps(inner(), 4, mesh=jax.make_mesh((4, 2), ("data", "model")))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    new = jaxaccum.MultiSteps(inner(), 4, mesh=mesh)
    p = {"w": jax.device_put(jnp.ones((8, 4)), NamedSharding(old._config.sync.mesh, P("model")))}
    got = new.redistribute(jax.jit(old.init)(p)).acc_grads["w"]
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 3)


@pytest.mark.parametrize(
    ("options", "devices", "error", "message"),
    [
        ({}, 4, ValueError, "devices=4 is for axis_name= alone; here there are 1"),
        ({"axis_name": "data"}, None, TypeError, "devices must be an integer"),
        ({"axis_name": "data"}, 0, ValueError, "devices must be an integer from 1.*got 0"),
    ],
)
def test_a_number_of_devices_that_can_not_be_is_refused(options, devices, error, message):
    """Catches a state for devices that the transformation does not have."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, **options)
    with pytest.raises(error, match=message):
        tx.redistribute(jaxaccum.MultiSteps(optax.sgd(1.0), 2).init(jnp.ones(())), devices)
