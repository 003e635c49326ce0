"""Local sums for another number of devices, in mid-window: the window ends as if nothing had happened."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import assert_close, inner, loss, params
from jax.sharding import AxisType, NamedSharding
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
        moved_on = program(after)[0].redistribute(state, batch="weighted")
        p, state = train(after, p, moved_on, range(3, 6), last=5)
        want, want_state = ended()
        assert_close((p, state.inner_opt_state), (want, want_state.inner_opt_state))


@pytest.mark.parametrize(("before", "after"), [(1, 16), (8, 16), (2, 3), (16, 8), (6, 4)])
def test_sums_are_moved_whole_by_numbers_that_need_no_devices(before, after):
    """Catches a sum divided among its heirs, which would round."""
    state = transformation(1).init(params())
    mapped = jaxaccum.MultiSteps(inner(), 16, axis_name="data")
    rng = np.random.default_rng(0)
    stacked = jax.tree.map(lambda x: np.asarray(rng.integers(0, 99, (before, *x.shape)), x.dtype), state)
    got = mapped.redistribute(stacked._replace(mini_step=np.full(before, 3)), devices=after, batch="weighted")
    for name in ("acc_grads", "weight", "averages", "dropped"):
        sums, old = getattr(got, name), getattr(stacked, name)
        assert all(x.shape[0] == after for x in jax.tree.leaves(sums))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.sum(0), y.sum(0)), sums, old)
        held = {x.tobytes() for y in jax.tree.leaves(old) for x in y}
        if after >= before:
            assert all(x.tobytes() in held or not x.any() for y in jax.tree.leaves(sums) for x in np.asarray(y))
    assert got.mini_step.tolist() == [3] * after


PLACEMENTS = ["auto", "explicit", "pmap"]


def mean_loss(p, data):
    """A plain mean: each device's micro-batch weighs 1, however many examples it has."""
    return jnp.mean((jnp.tanh(data["x"] @ p["w"] + p["b"]) - data["y"]) ** 2)


def example_loss(p, data):
    """The same, with its examples as the weight."""
    return jaxaccum.Weighted(mean_loss(p, data) * len(data["x"]), len(data["x"]))


def stage(devices, placement):
    """(the transformation for so many devices, its micro-step on as many times some examples, whether by pmap)."""
    mesh = None
    if devices == 1:
        tx = jaxaccum.MultiSteps(inner(), 4)
    elif placement == "pmap":
        tx = jaxaccum.MultiSteps(inner(), 4, axis_name="data")
    else:
        kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[placement]
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
        tx = jaxaccum.MultiSteps(inner(), 4, mesh=mesh)

    def step(fun, p, state, data):
        if devices > 1 and placement == "pmap":
            data = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), data)
            mapped = jax.pmap(functools.partial(tx.micro_step, fun), "data", devices=jax.devices()[:devices])
            return mapped(p, state, data)[1:]
        if mesh is not None:
            data = jax.device_put(data, NamedSharding(mesh, P("data")))
            p = jax.device_put(p, NamedSharding(mesh, P()))
        return jax.jit(functools.partial(tx.micro_step, fun))(p, state, data)[1:]

    return tx, step


def replicated(tree, devices):
    return jax.tree.map(lambda x: jnp.stack([x] * devices), tree)


def one_of(tree, is_stacked):
    return jax.tree.map(lambda x: x[0], tree) if is_stacked else tree


# Each pair of two of them occurs.
MOVES = [(4, 1), (4, 2), (2, 4), (1, 4)]
WAYS = ["per_device", "global", "weighted"]


@pytest.mark.parametrize(
    ("before", "after", "placement", "batch"),
    [(*move, PLACEMENTS[i], WAYS[(i + j) % 3]) for j, move in enumerate(MOVES) for i in range(3)],
)
def test_a_window_goes_on_to_the_big_batch(before, after, placement, batch):
    """Catches micro-batches that weigh more before the change than after it, or less, by the number of devices."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)

        def micro_batch(size):
            return {"x": jnp.asarray(rng.standard_normal((size, 3))), "y": jnp.asarray(rng.standard_normal((size, 4)))}

        # Of two examples on each device, or of sixteen in all.
        sizes = [2 * before, 2 * before, 2 * after, 2 * after] if batch == "per_device" else [16] * 4
        data = [micro_batch(size) for size in sizes]
        fun = example_loss if batch == "weighted" else mean_loss
        p, (old, old_step), (new, new_step) = params(), stage(before, placement), stage(after, placement)
        state = old.init(p)
        if before > 1 and placement == "pmap":
            p, state = replicated((p, state), before)
        for micro in data[:2]:
            p, state = old_step(fun, p, state, micro)
        p, state = moved((p, state))
        p = one_of(p, p["b"].ndim == 2)
        if after > 1 and placement == "pmap":
            p, state = replicated(p, after), new.redistribute(state, after, batch=batch)
        else:
            state = new.redistribute(state, batch=batch)
        for micro in data[2:]:
            p, state = new_step(fun, p, state, micro)
        got = one_of(p, p["b"].ndim == 2)

        every = jax.tree.map(lambda *x: jnp.concatenate(x), *data)
        start = params()
        updates, _ = inner().update(jax.grad(mean_loss)(start, every), inner().init(start), start)
        assert_close(got, optax.apply_updates(start, updates))


@pytest.mark.parametrize("batch", ["per_device", "global", "weighted"])
@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 4), (4, 8), (1, 8)])
def test_averages_are_scaled_with_the_sums(before, after, batch):
    """Catches a loss that reaches the optimizer as another mean than its gradient."""
    seen = optax.GradientTransformationExtraArgs(
        lambda p: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    old, new = transformation(before, seen), transformation(after, seen)
    each = lambda devices, x: jnp.full((devices,) if devices > 1 else (), x)
    state = old.init(jnp.zeros(()))
    _, state = old.update(each(before, 1.0), state, boundary=False, value=each(before, 1.0))
    state = new.redistribute(moved(state), batch=batch)
    updates, state = new.update(each(after, 4.0), state, jnp.zeros(()), boundary=True, value=each(after, 4.0))
    weights = (after if batch == "global" else before), after
    np.testing.assert_allclose(updates, np.average([1.0, 4.0], weights=weights), rtol=1e-6)
    np.testing.assert_allclose(state.inner_opt_state, np.average([1.0, 4.0], weights=weights), rtol=1e-6)


@pytest.mark.parametrize("scale", [1, 3])
def test_scaled_sums_are_rounded_once(scale):
    """Catches sums in bfloat16 that are rounded when they are merged, and again when they are scaled."""
    values = scale * np.where(np.arange(8) == 7, 256.0, 1.0)
    mapped = jaxaccum.MultiSteps(optax.sgd(1.0), 2, axis_name="data", accumulator_dtype=jnp.bfloat16)
    state = replicated(mapped.init(jnp.zeros(3)), 8)
    sums = jnp.asarray(np.repeat(values[:, None], 3, axis=1), jnp.bfloat16)
    state = state._replace(acc_grads=sums, mini_step=jnp.ones(8, jnp.int32), weight=jnp.ones(8))
    one = jaxaccum.MultiSteps(optax.sgd(1.0), 2, accumulator_dtype=jnp.bfloat16)
    got = one.redistribute(state, batch="global")
    assert got.acc_grads.dtype == jnp.bfloat16 and got.weight == 1.0
    exact = np.asarray(sums, np.float32).sum(0) / 8
    np.testing.assert_array_equal(got.acc_grads, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (8, 1), (1, 8)])
def test_what_a_plain_loss_weighs_is_asked_for(before, after):
    """Catches a window whose micro-batches before the change silently weigh eight times those after it."""
    old, new = transformation(before), transformation(after)
    state = old.init(params())
    assert new.redistribute(state).mini_step == 0  # Nothing is pending.
    shape = lambda x: (before, *x.shape) if before > 1 else x.shape
    grads = jax.tree.map(lambda x: jnp.ones(shape(x)), params())
    _, state = old.update(grads, state, params(), boundary=False)
    message = f"batch must be given.*{before} devices.*{after}.*'per_device'.*'global'.*'weighted'"
    with pytest.raises(ValueError, match=message):
        new.redistribute(state)
    for wrong in ("mean", "globl", True, 8):
        with pytest.raises(ValueError, match=f"batch must be None, 'per_device', 'global' or 'weighted'.*{wrong!r}"):
            new.redistribute(state, batch=wrong)
    assert old.redistribute(state).mini_step == 1  # The same number of devices.
    _, weightless = old.update(grads, old.init(params()), params(), boundary=False, weight=0.0)
    assert new.redistribute(weightless).mini_step == 1  # Nothing that weighs is pending.


@pytest.mark.parametrize("batch", ["per_device", "global", "weighted"])
def test_the_sum_mode_stays_the_mean_over_devices(batch):
    """Catches a sum that counts for more devices than it came from, or is scaled twice."""
    old, new = (transformation(n, optax.sgd(1.0), use_grad_mean=False) for n in (8, 4))
    state = old.init(jnp.zeros(()))
    _, state = jax.jit(lambda g, s: old.update(g, s, boundary=False))(jnp.arange(8.0), state)
    state, p = moved((state, jnp.zeros(())))
    state = new.redistribute(state, batch=batch)
    updates, _ = jax.jit(lambda g, s: new.update(g, s, p, boundary=True))(jnp.ones(4), state)
    assert updates == -(3.5 + 1.0)


def test_local_sums_lie_on_the_new_mesh():
    """Catches sums of every device on one, and a model axis' split that is lost."""
    before, mesh = (jax.make_mesh(shape, ("data", "model")) for shape in [(4, 2), (2, 4)])
    old = jaxaccum.MultiSteps(inner(), 4, mesh=before)
    new = jaxaccum.MultiSteps(inner(), 4, mesh=mesh)
    p = {"w": jax.device_put(jnp.ones((8, 4)), NamedSharding(before, P("model")))}
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
