"""Sums of several devices are added in float32, however they are stored: 256 and seven ones are 263, not 264."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import DEVICES, FORMS, KINDS, mapped, mesh_of
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

BF16 = jnp.dtype(jnp.bfloat16)
VALUES = np.where(np.arange(DEVICES) == 3, 256.0, 1.0).astype(np.float32)
MEAN = np.float32(263 / 8)
SIZE = 16
REDUCTIONS = ("psum", "psum2", "psum_invariant", "reduce_scatter", "reduce_sum")


def reduced(jaxpr):
    """The floating dtypes that `jaxpr` reduces in, over devices or over an axis."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in REDUCTIONS:
            found |= {var.aval.dtype for var in eqn.invars if jnp.issubdtype(var.aval.dtype, jnp.floating)}
        for value in eqn.params.values():
            for body in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(body, (core.Jaxpr, core.ClosedJaxpr)):
                    found |= reduced(body.jaxpr if isinstance(body, core.ClosedJaxpr) else body)
    return found


def check(fun, *args):
    """`fun(*args)`, after a look at what it reduces in."""
    assert BF16 not in reduced(jax.make_jaxpr(fun)(*args).jaxpr)
    return fun(*args)


def over(mesh, x):
    return jax.device_put(jnp.asarray(x), NamedSharding(mesh, P("data")))


def start(mesh=None, dtype=jnp.float32):
    p = jnp.zeros(SIZE, dtype)
    return p if mesh is None else jax.device_put(p, NamedSharding(mesh, P()))


def transformation(**options):
    return jaxaccum.MultiSteps(optax.sgd(1.0), 4, accumulator_dtype=BF16, **options)


CLOSINGS = {
    "update": lambda tx, p, s, g: tx.update(g, s, p, boundary=True)[0],
    "apply": lambda tx, p, s, g: tx.apply(p, s, g, boundary=True)[0],
    "flush": lambda tx, p, s, g: tx.flush(tx.update(g, s, p, boundary=False)[1], p)[0],
}
every_closing = pytest.mark.parametrize("close", CLOSINGS.values(), ids=CLOSINGS)


@pytest.mark.parametrize("form", FORMS)
@every_closing
def test_the_sums_of_mapped_devices(form, close):
    """Catches an all-reduce in the dtype that the sums are stored in."""
    tx = transformation(axis_name="data")
    train = lambda p, value: (close(tx, p, tx.init(p), jnp.full(SIZE, value)),)
    (got,) = check(mapped(form, train, (None, 0), (None,)), start(), VALUES)
    np.testing.assert_array_equal(got, np.full(SIZE, -MEAN))


@pytest.mark.parametrize("reduce", ["mean", "scatter"])
@pytest.mark.parametrize("kind", KINDS)
@every_closing
def test_the_sums_on_a_mesh(kind, reduce, close):
    """Catches a sum over the device axis, or a reduce-scatter, that ends in the stored dtype."""
    mesh = mesh_of(kind)
    tx = transformation(mesh=mesh, reduce=reduce)
    p = start(mesh)
    grads = over(mesh, np.repeat(VALUES[:, None], SIZE, axis=1))
    got = check(jax.jit(lambda p, s, g: close(tx, p, s, g)), p, tx.init(p), grads)
    np.testing.assert_array_equal(got, np.full(SIZE, -MEAN))


def linear(p, x):
    return jnp.mean(x) * p.sum()


@pytest.mark.parametrize("form", FORMS)
def test_a_window_of_mapped_devices(form):
    """Catches an all-reduce of a window's sums in bfloat16."""
    f = jaxaccum.value_and_grad(linear, 2, accumulator_dtype=BF16, axis_name="data")
    _, got = check(mapped(form, f, (None, 0), (None, None)), start(), np.repeat(VALUES[:, None], 4, axis=1))
    np.testing.assert_array_equal(got, np.full(SIZE, MEAN))


@pytest.mark.parametrize("reduce", ["mean", "scatter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_on_a_mesh(kind, reduce):
    """Catches a reduction of a window's sums in bfloat16."""
    mesh = mesh_of(kind)
    f = jaxaccum.value_and_grad(linear, 2, accumulator_dtype=BF16, mesh=mesh, reduce=reduce)
    _, got = check(jax.jit(f), start(mesh), over(mesh, np.repeat(VALUES, 4)))
    np.testing.assert_array_equal(got, np.full(SIZE, MEAN))


def test_parameters_in_bfloat16_are_updated_by_the_unrounded_mean():
    """Catches a reduction that follows the parameters' dtype, or updates in another dtype than theirs."""
    mesh = mesh_of("auto")
    seen = []

    def update(mean, state, params=None):
        seen.append(mean.dtype)
        return jax.tree.map(jnp.negative, mean), state

    opt = optax.GradientTransformation(lambda p: (), update)
    tx = jaxaccum.MultiSteps(opt, 1, accumulator_dtype=None, mesh=mesh)
    p = start(mesh, BF16)
    grads = over(mesh, np.repeat(VALUES[:, None], SIZE, axis=1).astype(BF16))
    updates, state = check(jax.jit(tx.update), grads, tx.init(p), p)
    assert updates.dtype == BF16 and state.acc_grads.dtype == BF16 and jnp.dtype(jnp.float32) in seen
    np.testing.assert_array_equal(updates, np.full(SIZE, -MEAN).astype(BF16))


@pytest.mark.parametrize("form", [*FORMS, "mesh"])
def test_model_state(form):
    """Catches statistics in bfloat16 averaged over the devices in bfloat16."""
    fun = lambda p, x, stats: (linear(p, x), stats + jnp.mean(x).astype(BF16))
    options = dict(mesh=mesh_of("auto")) if form == "mesh" else dict(axis_name="data")
    f = jaxaccum.value_and_grad(fun, 1, carry_argnums=2, **options)
    values = np.where(VALUES > 1, 256.0, np.where(np.arange(DEVICES) == 0, 2.0, 1.0)).astype(np.float32)  # Σ is 264.
    if form == "mesh":
        call = jax.jit(f)
    else:
        call, values = mapped(form, f, (None, 0, None), (None, None)), values[:, None]
    (_, got), _ = check(call, start(), values, jnp.zeros((), BF16))
    assert got.dtype == BF16 and got == 33.0


GATHERS = {
    "a gather": lambda p: jax.lax.all_gather(p, "data", tiled=True),
    "of a cast": lambda p: jax.lax.all_gather(p.astype(BF16), "data", tiled=True),
    "of a cast, and more": lambda p: 2 * jax.lax.all_gather(p.astype(BF16), "data", tiled=True),
    "in a jit": jax.jit(lambda p: 2 * jax.lax.all_gather(p.astype(BF16), "data", tiled=True).T),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prepare", GATHERS.values(), ids=GATHERS)
@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
def test_a_gathered_parameter(form, prepare, dtype):
    """Catches a gather whose transpose scatters sums in bfloat16."""
    fun = lambda seen, x: jnp.mean(x) * seen.astype(jnp.float32).sum()
    f = jaxaccum.value_and_grad(fun, 1, prepare=prepare, axis_name="data", grad_dtype=jnp.float32)
    call = mapped(form, f, (0, 0), (None, 0))
    # Rounded to bfloat16 after the sum, if at all: the sum over the devices is 264, and so is what each of them gets.
    values = np.where(np.arange(DEVICES) == 0, VALUES + 1, VALUES)
    _, got = check(call, jnp.zeros((DEVICES, 2), dtype), values[:, None])
    factor = 2 if prepare in (GATHERS["of a cast, and more"], GATHERS["in a jit"]) else 1
    np.testing.assert_array_equal(got, np.full((DEVICES, 2), factor * 33.0))


def test_sums_that_are_merged_on_one_device():
    """Catches a merge of eight devices' sums that rounds seven times."""
    state = transformation().init(jnp.zeros(SIZE))
    many = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
    values = np.where(np.arange(DEVICES) == 0, VALUES + 1, VALUES)  # Σ is 264.
    many = many._replace(acc_grads=jnp.asarray(np.repeat(values[:, None], SIZE, axis=1)[::-1], BF16))
    got = transformation().redistribute(many).acc_grads
    assert got.dtype == BF16
    np.testing.assert_array_equal(got.astype(np.float32), np.full(SIZE, 264.0))
