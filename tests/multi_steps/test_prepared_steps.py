"""`MultiSteps(prepare=...)`: once a window forward and backward, with one call per micro-batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxaccum

K = 4
XS = jax.random.normal(jax.random.key(2), (3 * K, 4, 8))
PARAMS = {
    "low": jax.random.normal(jax.random.key(0), (8, 2)),
    "up": jax.random.normal(jax.random.key(1), (2, 8)),
    "head": jax.random.normal(jax.random.key(3), (8,)),
}
OPT = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))


def prepare(params):
    """A low-rank merge, a pair in place of a dict, and a leaf as it is."""
    return 2 * params["low"] @ params["up"], params["head"]


def loss(seen, x):
    matrix, head = seen
    return jnp.mean((jnp.tanh(x @ matrix) @ head) ** 2)


def plain(params, x):
    return loss(prepare(params), x)


def weighted(seen, x):
    return jaxaccum.Weighted(loss(seen, x) * (x[0, 0] > 0), x[0, 0] > 0)


def train(tx, fun, xs=XS, static=True):
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(tx.micro_step, static_argnums=0, static_argnames="boundary")
    for i, x in enumerate(xs):
        _, params, state = step(fun, params, state, x, boundary=(i % K == K - 1) if static else None)
    return params, state


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("mean", [True, False])
def test_training_is_that_of_preparing_in_the_loss(static, mean):
    """A transpose left out or taken twice, or prepared parameters that lag behind."""
    options = dict(every_k_schedule=K, use_grad_mean=mean)
    params, state = train(jaxaccum.MultiSteps(OPT, **options, prepare=prepare), loss, static=static)
    equal(params, train(jaxaccum.MultiSteps(OPT, **options), plain)[0])
    equal(state.prepared, [prepare(params)[0]])  # What is a parameter as it is is not kept twice.


def test_weights_that_are_zero():
    """A window that weighs nothing and yet prepares anew, or a micro-batch that counts."""
    xs = XS.at[K : 2 * K, 0, 0].set(-1.0)
    tx = jaxaccum.MultiSteps(OPT, K, prepare=prepare)
    params, state = train(tx, weighted, xs)
    equal(params, train(jaxaccum.MultiSteps(OPT, K), lambda p, x: weighted(prepare(p), x), xs)[0])
    equal(state.prepared, [prepare(params)[0]])


def test_flush():
    """A partial window whose sum is not carried back to the parameters."""
    tx = jaxaccum.MultiSteps(OPT, K, prepare=prepare)
    params, state = train(tx, loss, XS[: K + 2])
    updates, state = jax.jit(tx.flush)(state, params)
    params = optax.apply_updates(params, updates)
    other = jaxaccum.MultiSteps(OPT, K)
    before, other_state = train(other, plain, XS[: K + 2])
    expected, _ = other.flush(other_state, before)
    equal(params, optax.apply_updates(before, expected))
    equal(state.prepared, [prepare(params)[0]])
    with pytest.raises(TypeError, match="params"):
        tx.flush(state)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_on_a_mesh(axis_type, reduce):
    """A sum carried back on each device, or laid out as nothing can take it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
    tx = jaxaccum.MultiSteps(OPT, K, mesh=mesh, reduce=reduce, prepare=prepare)
    put = lambda tree, spec: jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))
    params, state = put(PARAMS, P()), tx.init(put(PARAMS, P()))
    step = jax.jit(tx.micro_step, static_argnums=0, static_argnames="boundary")
    for i, x in enumerate(XS):
        _, params, state = step(loss, params, state, put(x, P("data")), boundary=i % K == K - 1)
    equal(params, train(jaxaccum.MultiSteps(OPT, K), plain)[0])


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_mapped_function(check_vma):
    """A state whose prepared parameters vary over the devices, or a gradient reduced twice."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    tx = jaxaccum.MultiSteps(OPT, K, axis_name="data", prepare=prepare)

    def run(params, xs):
        state = tx.init(params)
        for i in range(K):
            _, params, state = tx.micro_step(loss, params, state, xs[i], boundary=i == K - 1)
        return params

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P(), check_vma=check_vma)
    equal(jax.jit(mapped)(PARAMS, XS[:K]), train(jaxaccum.MultiSteps(OPT, K), plain, XS[:K])[0])


def test_cast_sums_in_float32():
    """Half-precision gradients summed in half precision."""
    p = {"w": jnp.ones((2, 2))}
    small = lambda p, x: jnp.sum(p["w"].astype(jnp.float32) * x) * 2**-9 + jnp.sum(p["w"].astype(jnp.float32))
    cast = jaxaccum.cast(jnp.bfloat16).seeing(small, p, jnp.ones(()))
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 256, use_grad_mean=False, prepare=cast)
    state = tx.init(p)
    assert state.prepared[0].dtype == jnp.bfloat16
    assert state.acc_grads["w"].dtype == jnp.float32
    with pytest.raises(TypeError, match=r"where=.*seeing"):
        jaxaccum.MultiSteps(optax.sgd(1.0), 2, prepare=jaxaccum.cast(jnp.bfloat16)).init(p)


def test_gradients_from_elsewhere_are_refused():
    """A gradient of the parameters added to sums of what prepare returns."""
    tx = jaxaccum.MultiSteps(OPT, K, prepare=prepare)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match="micro_step"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match="micro_step"):
        tx.apply(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match="prepare"):
        jaxaccum.MultiSteps(OPT, K, prepare=3)
