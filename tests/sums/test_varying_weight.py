"""A `Weighted` loss whose weight depends on the parameters: the gradient of the quotient, or a refusal."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import KINDS
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.flax

K = 4


def params():
    return {"p": jnp.array([0.3, -0.2, 0.5]), "b": jnp.array(0.1)}


def batch(n=32):
    return jax.random.normal(jax.random.key(0), (n, 3))


def loss(p, x):
    """The mean of squares under weights that the parameters give."""
    score = x @ p["p"] + p["b"]
    return jaxaccum.Weighted(jnp.sum(jnp.exp(score) * score**2), jnp.sum(jnp.exp(score)))


def quotient(p, x):
    return loss(p, x).total / loss(p, x).weight


def assert_close(a, b, rtol=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-14)


def stack(x, k=K):
    return x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1)


def test_the_example_of_the_docstring():
    """Catches a derivative that is dropped: [1.71 0.38 1.43]."""
    x, p = jax.random.normal(jax.random.key(0), (8, 3)), jnp.array([0.3, -0.2, 0.5])
    fun = lambda p, x: jaxaccum.Weighted(jnp.sum(jnp.exp(x @ p) * (x @ p) ** 2), jnp.sum(jnp.exp(x @ p)))
    _, grad = jaxaccum.value_and_grad(fun, 4)(p, x)
    np.testing.assert_allclose(grad, [1.29, 0.19, 1.23], atol=0.005)


def in_a_scan(p, x):
    """Both sums come out of one loop, beside each other."""
    step = lambda sums, row: (jax.tree.map(jnp.add, sums, loss(p, row[None])), None)
    return jax.lax.scan(step, jaxaccum.Weighted(jnp.zeros(()), jnp.zeros(())), x)[0]


WRAPS = {
    "plain": loss,
    "jit": jax.jit(loss),
    "checkpoint": jax.checkpoint(loss),
    "scan": in_a_scan,
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > -9, loss, loss, p, x),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("options", [{}, {"prepare": "auto"}, {"in_place": True}, {"in_place": False}], ids=str)
def test_the_gradient_of_the_quotient(wrap, options):
    """Catches the derivative of the weight dropped, or counted twice."""
    with jax.enable_x64(True):
        p, x = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch()))
        got = jax.jit(jaxaccum.value_and_grad(WRAPS[wrap], K, **options))(p, x)
        assert_close(got, jax.value_and_grad(quotient)(p, x))


@pytest.mark.parametrize("form", ["stacked", "room", "traced", "unrolled"])
def test_every_form_of_the_window(form):
    """Catches a first pass over other micro-batches than the second's."""
    with jax.enable_x64(True):
        p, x = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch()))
        f = lambda k, **options: jaxaccum.value_and_grad(loss, k, **options)
        room = jnp.concatenate([stack(x), jnp.full_like(stack(x), jnp.nan)])
        got = {
            "stacked": lambda: jax.jit(f(K, stacked=True))(p, stack(x)),
            "room": lambda: jax.jit(f(K, stacked=True))(p, room),
            "traced": lambda: jax.jit(lambda k: f(k, stacked=True)(p, room))(jnp.int32(K)),
            "unrolled": lambda: jax.jit(f(K, unroll=2))(p, x),
        }[form]()
        assert_close(got, jax.value_and_grad(quotient)(p, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_on_a_mesh(kind, reduce):
    """Catches a quotient of one device's own."""
    with jax.enable_x64(True):
        p, x = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch(64)))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS[kind],))
        f = jax.jit(jaxaccum.value_and_grad(loss, K, mesh=mesh, reduce=reduce))
        assert_close(f(p, x), jax.value_and_grad(quotient)(p, x))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_mapped_function(check_vma):
    """Catches a mean that doesn't vary as the sums do."""
    with jax.enable_x64(True):
        p, x = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch(64)))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        f = jaxaccum.value_and_grad(loss, K, axis_name="data")
        mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
        assert_close(jax.jit(mapped)(p, x), jax.value_and_grad(quotient)(p, x))


def test_it_can_be_differentiated_again():
    """Catches a mean that is a constant to the second derivative."""
    with jax.enable_x64(True):
        p, x = jax.tree.map(lambda x: x.astype(jnp.float64), (params(), batch()))
        f = jaxaccum.value_and_grad(loss, K)
        assert_close(jax.grad(lambda p: f(p, x)[0])(p), jax.grad(quotient)(p, x))
        norm = lambda grads: sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
        got = jax.grad(lambda p: norm(f(p, x)[1]))(p)
        assert_close(got, jax.grad(lambda p: norm(jax.grad(quotient)(p, x)))(p), rtol=1e-10)


def test_weight_zero_leaves_a_micro_batch_out():
    """Catches a NaN of padding in the first pass, and padding that changes the carry there."""

    def padded(p, x, count):
        present = x[:, 0] < 9
        total, weight = loss(p, x)
        total = total * (1 + count) / present.all()
        return jaxaccum.Weighted(total, jnp.where(present.all(), weight, 0.0)), count + 1

    def by_hand(p):
        parts = [padded(p, x[i::K], count)[0] for count, i in enumerate((0, 2, 3))]
        return sum(part.total for part in parts) / sum(part.weight for part in parts)

    x = batch().at[1::K].set(99.0)
    (value, count), grads = jaxaccum.value_and_grad(padded, K, carry_argnums=2)(params(), x, jnp.float32(0))
    assert count == K - 1
    assert_close((value, grads), jax.value_and_grad(by_hand)(params()), 1e-5)


def test_keys_and_model_state_are_those_of_one_pass():
    """Catches a carry that goes through the window twice, and masks that differ between the passes."""

    def fun(p, x, key, count):
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        weighted = loss(p, x * keep)
        return jaxaccum.Weighted(weighted.total * (1 + count), weighted.weight), count + 1

    key = jax.random.key(3)
    (value, count), grads = jaxaccum.value_and_grad(fun, K, key_argnums=2, carry_argnums=3)(
        params(), batch(), key, jnp.float32(0)
    )

    def by_hand(p):
        parts = [fun(p, batch()[i::K], jax.random.fold_in(key, i), jnp.float32(i))[0] for i in range(K)]
        return sum(part.total for part in parts) / sum(part.weight for part in parts)

    assert count == K
    assert_close((value, grads), jax.value_and_grad(by_hand)(params()), 1e-5)


# What has no derivative, though it is computed from the parameters.
CONSTANT = {
    "data": lambda p, x: jnp.sum(x[:, 0] > 0) + 0.0,
    "comparison": lambda p, x: jnp.sum(x @ p["p"] > 0) + 1.0,
    "integers": lambda p, x: jnp.sum((x @ p["p"]).astype(jnp.int32) ** 2) + 1,
    "argmax": lambda p, x: jnp.argmax(x @ p["p"]) + 1.0,
    "stop_gradient": lambda p, x: jax.lax.stop_gradient(jnp.sum(jnp.exp(x @ p["p"]))),
    "jit": jax.jit(lambda p, x: jnp.sum(x @ p["p"] > 0) + 1.0),
    "scan": lambda p, x: jax.lax.scan(lambda c, row: (c + (row @ p["p"] > 0), None), x[0, 0] * 0 + 1, x)[0],
}


@jax.custom_vjp
def fused(p, x):
    """A sum and a count from one kernel, whose backward pass ignores the latter's cotangent."""
    return jnp.sum((x @ p["p"]) ** 2), jnp.sum(x[:, 0] > 0) + 0.0


def fused_backward(residuals, cotangents):
    p, x = residuals
    return {"p": 2 * cotangents[0] * x.T @ (x @ p["p"]), "b": jnp.zeros(())}, jnp.zeros_like(x)


fused.defvjp(lambda p, x: (fused(p, x), (p, x)), fused_backward)
CONSTANT["custom_vjp"] = lambda p, x: fused(p, x)[1]
CONSTANT["times zero"] = lambda p, x: len(x) + 0.0 * jnp.sum(p["p"])


def of_weight(weight):
    return lambda p, x: jaxaccum.Weighted(jnp.sum((x @ p["p"]) ** 2 + p["b"]), weight(p, x))


@pytest.mark.parametrize("name", CONSTANT)
def test_a_weight_without_derivative_costs_nothing_and_is_taken_everywhere(name):
    """Catches a second pass where none is due, and a refusal of what is right."""
    fun, x = of_weight(CONSTANT[name]), batch(8)
    scans = str(jax.make_jaxpr(jaxaccum.value_and_grad(fun, K))(params(), x)).count(f"length={K}")
    assert scans == 1
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), K)
    jax.jit(lambda p, s, x: tx.micro_step(fun, p, s, x))(params(), tx.init(params()), x)
    jaxaccum.HostDriven(tx, fun)(params(), tx.init(params()), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    jaxaccum.local_value_and_grad(fun, mesh=mesh)(params(), x)


def micro_step(boundary):
    def run(fun):
        tx = jaxaccum.MultiSteps(optax.sgd(0.1), K)
        state = tx.init(params())
        if boundary == "traced":
            return jax.jit(lambda b: tx.micro_step(fun, params(), state, batch(8), boundary=b))(True)
        return tx.micro_step(fun, params(), state, batch(8), boundary=boundary)

    return run


def host_driven(fun):
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), K)
    return jaxaccum.HostDriven(tx, fun)(params(), tx.init(params()), batch(8))


def on_mesh(fun):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), K, mesh=mesh)
    return tx.micro_step(fun, params(), tx.init(params()), batch(8))


def local(fun):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jaxaccum.local_value_and_grad(fun, mesh=mesh)(params(), batch(8))


def trainer(strategy, **options):
    def run(fun):
        task = jaxaccum.Task(lambda key, batch: params(), lambda p, x, key: fun(p, x), optax.sgd(0.1))
        quiet = {"max_epochs": 1, "enable_progress_bar": False}
        return jaxaccum.Trainer(accumulate_grad_batches=2, strategy=strategy, **quiet, **options).fit(task, [batch(8)])

    return run


STREAMS = {
    "counter": micro_step(None),
    "static": micro_step(True),
    "static, not the boundary": micro_step(False),
    "traced": micro_step("traced"),
    "host driven": host_driven,
    "mesh": on_mesh,
    "local": local,
    "trainer": trainer("single"),
    "trainer, ddp": trainer("ddp"),
    "trainer, fused": trainer("single", fuse_windows=True),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_refuse_it(stream):
    """Catches a gradient without the weight's part, from a state that has no room for it."""
    with pytest.raises(
        ValueError, match=r"weight of the Weighted.*depends on the parameters.*jaxaccum\.value_and_grad"
    ):
        STREAMS[stream](loss)


def test_linen_windows():
    """Catches an adapter that drops it."""
    module, x = nn.Dense(1), batch()
    fun = lambda model, x: jaxaccum.Weighted(jnp.sum(jnp.exp(model(x)) * model(x) ** 2), jnp.sum(jnp.exp(model(x))))
    variables = module.init(jax.random.key(0), x)
    _, grads = jaxaccum.flax.linen_value_and_grad(module, fun, K)(variables, x)
    big = lambda p: (lambda w: w.total / w.weight)(fun(lambda x: module.apply({"params": p}, x), x))
    assert_close(grads, jax.grad(big)(variables["params"]), 1e-5)
