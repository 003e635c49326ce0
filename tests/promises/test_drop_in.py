"""Where jax has no error we have none: parameters, carries, layouts and dtypes as users have them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import KINDS
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.flax

K = 4


def squared(w, x):
    return jnp.mean((w * x) ** 2)


def test_a_number_is_a_parameter():
    """Catches an attribute that a Python float doesn't have."""
    x = jnp.arange(8.0)
    np.testing.assert_allclose(jaxaccum.value_and_grad(squared, K)(2.0, x), jax.value_and_grad(squared)(2.0, x))
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 1)
    _, w, _ = tx.micro_step(squared, 2.0, tx.init(2.0), x)
    np.testing.assert_allclose(w, 2.0 - 0.1 * jax.grad(squared)(2.0, x), rtol=1e-6)


class Incomparable:
    """A node whose structure is equal to no other, as classes without `__eq__` in it are."""

    def __init__(self, value):
        self.value = value


jax.tree_util.register_pytree_node(
    Incomparable, lambda node: ((node.value,), object()), lambda _, children: Incomparable(*children)
)


@pytest.mark.parametrize("form", ["eager", "jit", "traced"])
def test_a_carry_whose_structure_can_not_be_compared(form):
    """Catches an error that shows two equal descriptions."""
    fun = lambda w, x, count: (jnp.mean(w * x), Incomparable(count.value + 1))
    f = lambda k: jaxaccum.value_and_grad(fun, k, carry_argnums=2, stacked=form == "traced")
    start, x = Incomparable(jnp.int32(0)), jnp.arange(8.0)
    if form == "traced":
        count = jax.jit(lambda k: f(k)(jnp.ones(()), x.reshape(K, 2), start)[0][1].value)(jnp.int32(K))
    else:
        run = lambda: f(K)(jnp.ones(()), x, start)[0][1].value
        count = run() if form == "eager" else jax.jit(run)()
    assert count == K


def test_a_carry_of_another_tree_is_refused():
    """Catches leaves of one name taken for another's."""
    fun = lambda w, x, state: (jnp.mean(w * x), {"b": state["a"]})
    with pytest.raises(ValueError, match="fun must return a new carry of the same tree"):
        jaxaccum.value_and_grad(fun, K, carry_argnums=2)(jnp.ones(()), jnp.ones(8), {"a": jnp.zeros(())})


class Normalised(eqx.Module):
    """A layer with batch statistics in equinox's way."""

    layer: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.layer = eqx.nn.Linear(2, 3, key=jax.random.key(0))
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.layer(x), state)


def test_the_state_of_an_equinox_model():
    """Catches a State, which has no `__eq__`, refused as a carry."""
    model, state = eqx.nn.make_with_state(Normalised)()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fun(params, x, state):
        call = jax.vmap(eqx.combine(params, static), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = call(x, state)
        return jnp.mean(y**2), state

    x = jax.random.normal(jax.random.key(1), (2 * K, 2))
    (_, new), _ = jaxaccum.value_and_grad(fun, K, carry_argnums=2)(params, x, state)
    want = state
    for i in range(K):
        _, want = fun(params, x[i::K], want)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def strict_drivers():
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 1)
    return {
        "window": jaxaccum.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), K),
        "micro-step": lambda w, x: tx.micro_step(lambda w, x: jnp.mean((x @ w) ** 2), w, tx.init(w), x)[1],
        "update": lambda w, x: tx.update(jnp.ones_like(w), tx.init(w), w)[0],
        "host driven": lambda w, x: jaxaccum.HostDriven(tx, lambda w, x: jnp.mean((x @ w) ** 2))(w, tx.init(w), x)[1],
    }


@pytest.mark.parametrize("driver", strict_drivers())
def test_strict_promotion(driver):
    """Catches sums in float32 that are promoted with parameters in bfloat16."""
    with jax.numpy_dtype_promotion("strict"):
        result = strict_drivers()[driver](jnp.ones((3, 3), jnp.bfloat16), jnp.ones((2 * K, 3), jnp.bfloat16))
    assert jax.tree.leaves(result)[-1].dtype == jnp.bfloat16


def model_mesh(kind="auto"):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)


@pytest.mark.parametrize("driver", ["window", "micro-step", "local"])
def test_a_loss_may_constrain_the_layout_over_model_axes(driver):
    """Catches jax's error about an axis that is manual only because of `mesh=`."""
    mesh = model_mesh()
    constrain = lambda h: jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P(None, "model")))
    fun = lambda w, x: jnp.mean(constrain(x @ w) ** 2)
    w = jax.device_put(jax.random.normal(jax.random.key(0), (4, 8)), NamedSharding(mesh, P(None, "model")))
    x = jax.device_put(jax.random.normal(jax.random.key(1), (8 * K, 4)), NamedSharding(mesh, P("data")))
    want = jax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2))(w, x)
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, mesh=mesh)
    got = {
        "window": lambda: jax.jit(jaxaccum.value_and_grad(fun, 2, mesh=mesh))(w, x),
        "micro-step": lambda: (lambda value, new, _: (value.mean(), w - new))(*tx.micro_step(fun, w, tx.init(w), x)),
        "local": lambda: jax.tree.map(
            lambda x: x.mean(axis=0), jax.jit(jaxaccum.local_value_and_grad(fun, mesh=mesh))(w, x)
        ),
    }[driver]()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_shard_map_over_a_model_axis():
    """Catches an error about meshes that the user did not make, and a remedy that doesn't work."""
    mesh = model_mesh()
    specs = {"in_specs": (P(None, "model"), P()), "out_specs": P(None, "model"), "axis_names": {"model"}}
    loss = lambda **where: lambda w, x: jnp.mean(jax.shard_map(lambda w, x: x @ w, **where, **specs)(w, x) ** 2)
    w, x = jax.random.normal(jax.random.key(0), (4, 8)), jax.random.normal(jax.random.key(1), (8 * K, 4))
    with pytest.raises(ValueError, match=r"calls jax\.shard_map with a mesh, but with mesh=.*leave the mesh out"):
        jax.jit(jaxaccum.value_and_grad(loss(mesh=mesh), 2, mesh=mesh))(w, x)
    value, _ = jax.jit(jaxaccum.value_and_grad(loss(), 2, mesh=mesh))(w, x)
    np.testing.assert_allclose(value, jnp.mean((x @ w) ** 2), rtol=1e-5)


class Recurrent(nnx.Module):
    """A cell whose state starts from zeros, as every recurrent network's does."""

    def __init__(self):
        self.rnn = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return self.rnn(x)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_networks_on_a_mesh(kind):
    """Catches a loop in the loss that starts from a constant, which doesn't vary over the devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS[kind],))

    def fun(w, x):
        step = lambda h, row: (jnp.tanh(row @ w + h @ w), None)
        return jnp.mean(jax.lax.scan(step, jnp.zeros((x.shape[0], 3)), x.swapaxes(0, 1))[0] ** 2)

    w, x = jnp.eye(3) / 3, jax.random.normal(jax.random.key(0), (8 * K, 5, 3))
    got = jax.jit(jaxaccum.value_and_grad(fun, K, mesh=mesh))(w, x)
    for a, b in zip(got, jax.value_and_grad(fun)(w, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, mesh=mesh)
    _, new, _ = tx.micro_step(fun, w, tx.init(w), x)
    np.testing.assert_allclose(w - new, jax.grad(fun)(w, x), rtol=1e-4, atol=1e-6)


def test_a_recurrent_nnx_model_in_the_trainer_on_several_devices():
    """Catches the same in ddp."""
    loss = lambda model, batch: jnp.mean(model(batch) ** 2)
    task = jaxaccum.flax.nnx_task(lambda rngs: Recurrent(), loss, optax.sgd(0.1))
    batches = [np.asarray(jax.random.normal(jax.random.key(i), (2, 5, 3))) for i in range(16)]
    options = {"max_epochs": 1, "enable_progress_bar": False}
    many = jaxaccum.Trainer(accumulate_grad_batches=2, strategy="ddp", **options).fit(task, batches)
    one = jaxaccum.Trainer(accumulate_grad_batches=16, strategy="single", **options).fit(task, batches)
    for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [K, 2, "traced", "int64"])
def test_x64(k):
    """Catches int32 beside int64 in the loop over a stack."""
    with jax.enable_x64(True):
        w, x = jnp.array(2.0), jnp.arange(8.0).reshape(K, 2)
        f = lambda k: jaxaccum.value_and_grad(squared, k, stacked=True)(w, x)
        number = 3 if isinstance(k, str) else k
        got = jax.jit(f)(3 if k == "int64" else jnp.int32(3)) if isinstance(k, str) else f(k)
        np.testing.assert_allclose(got, jax.value_and_grad(squared)(w, x[:number]), rtol=1e-14)


@pytest.mark.parametrize("where", ["mesh", "explicit mesh", "vma", "no vma"])
@pytest.mark.parametrize("k", [2, "traced"])
def test_rows_of_aux_that_are_absent(where, k):
    """Catches zeros that don't vary over the devices as the other rows do."""
    fun = lambda w, x: (squared(w, x), x.sum())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS["explicit" if where.startswith("explicit") else "auto"],))
    w, x = jnp.array(2.0), jnp.arange(8.0 * K).reshape(K, 8)

    def run(k):
        if where.endswith("mesh"):
            return jaxaccum.value_and_grad(fun, k, stacked=True, has_aux=True, mesh=mesh)(w, x)[0][1]
        f = jaxaccum.value_and_grad(fun, k, stacked=True, has_aux=True, axis_name="data")
        specs = {"in_specs": (P(), P(None, "data")), "out_specs": P(None, "data"), "check_vma": where == "vma"}
        return jax.shard_map(lambda w, x: f(w, x)[0][1][:, None], mesh=mesh, **specs)(w, x)

    aux = np.asarray(jax.jit(run)(jnp.int32(2)) if k == "traced" else jax.jit(lambda: run(2))())
    np.testing.assert_array_equal(aux[:2], x[:2])
    assert not np.any(aux[2:])


def layers(p, x):
    cast = lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None)
    return jnp.mean(jax.lax.scan(jax.checkpoint(cast), x.astype(jnp.bfloat16), p)[0].astype(jnp.float32) ** 2)


def test_in_place_holds_or_raises():
    """Catches sums that are no longer added in place because of prepare, though both were asked for."""
    p, x, prepare = jnp.ones((3, 8, 8)), jnp.ones((2 * K, 8)), jaxaccum.cast(jnp.bfloat16)
    for holds in (None, "auto"):
        jaxaccum.value_and_grad(layers, K, prepare=holds, in_place=True)(p, x)
    jaxaccum.value_and_grad(layers, K, prepare=prepare)(p, x)
    with pytest.raises(ValueError, match=r"in_place=True: the gradients of .*another dtype.*Leave in_place at None"):
        jaxaccum.value_and_grad(layers, K, prepare=prepare, in_place=True)(p, x)


@pytest.mark.parametrize("k", [1, 2])
def test_a_loss_that_is_a_number(k):
    """Catches literals of a trace, which are no arrays."""
    w, x = jnp.ones(2), jnp.ones((4, 2))
    value, grads = jaxaccum.value_and_grad(lambda w, x: 1.0, k)(w, x)
    assert value == 1.0 and not grads.any()
    value, grads = jaxaccum.value_and_grad(lambda w, x: jaxaccum.Weighted(1.0, 2.0), k)(w, x)
    assert value == 0.5 and not grads.any()


@pytest.mark.parametrize("weight", [-1.0, np.nan])
def test_a_weight_that_is_known_is_checked(weight):
    """Catches a gradient that is negated, by a weight that jax makes an array of."""
    fun = lambda w, x: jaxaccum.Weighted(jnp.sum(w * x), jnp.float32(weight))
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        jaxaccum.value_and_grad(fun, 2)(jnp.ones(()), jnp.ones(4))


def test_a_loss_that_is_reduced_already_is_refused():
    """Catches a gradient that is divided by the number of devices twice."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS["auto"],))
    fun = lambda w, x: jax.lax.pmean(jnp.mean((w * x) ** 2), "data")
    f = jaxaccum.value_and_grad(fun, 2, axis_name="data")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"the loss does not vary over axis_name=.*Return each device's own mean"):
        mapped(jnp.ones(()), jnp.arange(16.0))
