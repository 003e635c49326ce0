"""Whole equinox modules: windows by `jaxaccum.equinox`, and `MultiSteps` and `HostDriven` as they are."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles

import jaxaccum
from jaxaccum.equinox import filter_value_and_grad

K = 2


class Mixed(eqx.Module):
    """A module with a leaf of each kind."""

    mlp: eqx.nn.MLP
    host: np.ndarray
    number: np.float64
    table: jax.Array
    indices: np.ndarray
    act: Callable[..., Any] = jnp.sin
    dtype: Any = np.float64
    name: str = "mixed"
    rate: float = 0.5
    phase: complex = 1j
    times: int = 3
    flag: bool = True
    nothing: None = None

    def __call__(self, x):
        assert (type(self.rate), type(self.phase), type(self.times)) == (float, complex, int)
        assert self.flag is True and self.act is jnp.sin and self.dtype is np.float64 and self.name == "mixed"
        y = self.mlp(x)[self.table][self.indices] * self.rate * self.times
        return self.act(y * self.host).astype(self.dtype) + self.number


def mixed():
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    return Mixed(mlp, np.array([1.5, 2.0]), np.float64(0.25), jnp.array([1, 0]), np.array([0, 1]))


def loss(model, x):
    return jnp.mean(jax.vmap(model)(x) ** 2)


def data(n=8):
    return jax.random.normal(jax.random.key(1), (n, 3), jnp.result_type(float))


def copied(tree):
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def assert_close(got, want, tolerance=1e-12):
    got, want = (eqx.filter(tree, eqx.is_array) for tree in (got, want))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, want)


def micro_steps(driver, tx, fun, **options):
    """A micro-step by each driver."""
    if driver == "HostDriven":
        return jaxaccum.HostDriven(tx, fun, **options)
    if driver in ("update", "apply"):

        def step(model, state, *args):
            value, grads = eqx.filter_value_and_grad(fun)(model, *args)
            if driver == "apply":
                return value, *tx.apply(model, state, grads)
            updates, state = tx.update(grads, state, model)
            return value, eqx.apply_updates(model, updates), state

        return eqx.filter_jit(step)
    step = lambda model, state, *args, **kwargs: tx.micro_step(fun, model, state, *args, **options, **kwargs)
    return eqx.filter_jit(step) if driver == "filter_jit" else step


def test_a_window_follows_filter_value_and_grad():
    """Catches leaves that are trained, or traced, and should not be, and a gradient of another tree."""
    with jax.enable_x64(True):
        model, x = mixed(), data()
        want = eqx.filter_value_and_grad(loss)(model, x)
        for around in (lambda f: f, eqx.filter_jit):
            got = around(filter_value_and_grad(loss, 4))(model, x)
            assert jax.tree.structure(got) == jax.tree.structure(want)
            assert_close(got, want)
        assert got[1].table is None and got[1].rate is None and got[1].number is not None


@pytest.mark.parametrize("driver", ["update", "apply", "micro_step", "filter_jit", "HostDriven"])
def test_training_is_that_of_equinox(driver):
    """Catches an optimizer that sees other leaves, a leaf that does not come back as it was, and a second compile."""
    with jax.enable_x64(True):
        model, x, opt = mixed(), data(), optax.adamw(0.1)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, _ = opt.update(eqx.filter_grad(loss)(model, x), opt.init(params), params)
        want = eqx.apply_updates(model, updates)
        tx = jaxaccum.MultiSteps(opt, K)
        new, state = copied(model), tx.init(model)
        assert jax.tree.structure(state.inner_opt_state) == jax.tree.structure(opt.init(params))
        step = micro_steps(driver, tx, loss)
        table = new.table
        for i in range(K):
            _, new, state = step(new, state, x[i::K])
        assert_close(new, want, 1e-11)
        kept = ("act", "dtype", "name", "rate", "phase", "times", "flag", "nothing")
        assert all(getattr(new, name) is getattr(model, name) for name in kept)
        if driver in ("micro_step", "HostDriven"):  # filter_jit returns new arrays.
            assert new.table is table and new.indices is model.indices
        for i in range(2 * K):
            with counted_compiles() as compiles:
                _, new, state = step(new, state, x[i % K :: K])
            assert i < K or driver == "micro_step" or not compiles
        _, new, state = step(new, state, x[::K])
        if driver == "HostDriven":
            new, state = step.flush(new, state)
        else:
            updates, state = tx.flush(state, new)
            new = eqx.apply_updates(new, updates)
        assert int(state.gradient_step) == 4 and new.rate is model.rate


class Network(eqx.Module):
    """BatchNorm and Dropout."""

    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.linear = eqx.nn.Linear(3, 4, key=key)
        self.dropout = eqx.nn.Dropout(0.25)

    def __call__(self, x, state, key):
        x, state = self.norm(x, state)
        return self.dropout(self.linear(x), key=key), state


def network_loss(model, batch, state, key):
    x, weight = batch
    call = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    y, state = call(x, state, jax.random.split(key, len(x)))
    return jaxaccum.Weighted(jnp.sum(y**2 * weight[:, None]), jnp.sum(weight)), state


def network_total(*args):
    value, state = network_loss(*args)
    return value.total, state


@pytest.mark.parametrize("driver", ["window", "filter_jit", "HostDriven"])
def test_batch_statistics_and_dropout(driver):
    """Catches shared masks, statistics that stay or that a micro-batch of weight 0 changes, and flags that are traced.

    By hand: each micro-batch in turn, the third without weight and of NaN.
    """
    with jax.enable_x64(True):
        model, start = eqx.nn.make_with_state(Network)(jax.random.key(0))
        x, weight = data(12).at[2::4].set(jnp.nan), jnp.arange(1.0, 13.0).at[2::4].set(0.0)
        keys = [jax.random.fold_in(jax.random.key(2), i) for i in range(4)]
        total, grads, state = 0.0, None, start
        for i in (0, 1, 3):
            batch = x[i::4], weight[i::4]
            (_, state), grad = eqx.filter_value_and_grad(network_total, has_aux=True)(model, batch, state, keys[i])
            total += jnp.sum(weight[i::4])
            grads = grad if grads is None else jax.tree.map(jnp.add, grads, grad)
        want = jax.tree.map(lambda g: g / total, grads)
        if driver == "window":
            f = filter_value_and_grad(network_loss, 4, carry_argnums=2, key_argnums=3)
            (_, carry), got = f(model, (x, weight), start, jax.random.key(2))
        else:
            tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4)
            step = micro_steps(driver, tx, network_loss, carry_argnums=2)
            new, tx_state, carry = copied(model), tx.init(model), start
            for i in range(4):
                (_, carry), new, tx_state = step(new, tx_state, (x[i::4], weight[i::4]), carry, keys[i])
            got = jax.tree.map(jnp.subtract, *(eqx.filter(m, eqx.is_inexact_array) for m in (model, new)))
        assert_close(got, want)
        assert_close(jax.tree.leaves(carry), jax.tree.leaves(state))


def test_flags_and_numbers_are_static():
    """Catches a program that is used for another flag or number, as 1 and True are equal, and one for each call."""

    class Layer(eqx.Module):
        linear: eqx.nn.Linear
        dropout: eqx.nn.Dropout
        scale: Any

    linear, key, x = eqx.nn.Linear(3, 2, key=jax.random.key(0)), jax.random.key(1), data()
    seen = []

    def fun(model, x, key):
        seen.append(model.scale)
        return jnp.mean(model.dropout(jax.vmap(model.linear)(x) * model.scale, key=key) ** 2)

    tx = jaxaccum.MultiSteps(optax.sgd(0.0), 9)
    step = jaxaccum.HostDriven(tx, fun)
    model = Layer(linear, eqx.nn.Dropout(0.5), 1.0)
    value, model, state = step(model, tx.init(model), x, key)
    for scale in (1.0, 3.0, 1, True):
        changed = eqx.tree_at(lambda m: m.scale, model, scale)
        got, changed, state = step(changed, state, x, key)
        np.testing.assert_allclose(got, scale**2 * value, rtol=1e-5)
        assert type(changed.scale) is type(scale) is type(seen[-1])
    traces = len(seen)
    step(model, state, x, key)
    assert len(seen) == traces
    inference = eqx.nn.inference_mode(model)
    got, inference, _ = step(inference, tx.init(model), x, key)
    assert inference.dropout.inference is True
    np.testing.assert_allclose(got, jnp.mean(jax.vmap(linear)(x) ** 2), rtol=1e-5)


def frozen_loss(trained, x, frozen):
    return loss(eqx.combine(trained, frozen), x)


@pytest.mark.parametrize("driver", ["window", "micro_step", "HostDriven"])
def test_frozen_parts(driver):
    """Catches a frozen part, a whole module as another argument, that is refused, trained or decayed.

    Windows get it by position, micro-steps by keyword.
    """
    model, x = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), data()
    spec = eqx.tree_at(lambda m: m.layers[-1].weight, jax.tree.map(lambda _: False, model), True)
    trained, frozen = eqx.partition(model, spec)
    want = eqx.filter_grad(frozen_loss)(trained, x, frozen)
    if driver == "window":
        _, got = filter_value_and_grad(frozen_loss, K)(trained, x, frozen)
    else:
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), K)
        step, new, state = micro_steps(driver, tx, frozen_loss), copied(trained), tx.init(trained)
        for i in range(K):
            _, new, state = step(new, state, x[i::K], frozen=frozen)
        got = jax.tree.map(jnp.subtract, trained, new)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("driver", ["window", "micro_step", "HostDriven"])
def test_a_module_as_carry_and_as_aux(driver):
    """Catches a target network, carried and returned, that is refused or loses its functions."""

    def fun(model, x, target):
        mean = lambda t, m: 0.5 * t + 0.5 * m if eqx.is_inexact_array(t) else t
        value = jnp.mean((jax.vmap(model)(x) - jax.vmap(target)(x) / 2) ** 2)
        return value, (jax.tree.map(mean, target, model), target)

    model, start, x = (
        eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=jax.random.key(0)),
        eqx.nn.MLP(3, 2, 4, 1, jnp.tanh, key=jax.random.key(5)),
        data(),
    )
    want = fun(model, x[1::2], fun(model, x[::2], start)[1][0])[1][0]
    if driver == "window":
        f = filter_value_and_grad(fun, K, has_aux=True, carry_argnums=2)
        (_, (target, aux)), _ = f(model, x, start)
        aux = jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, aux)
    else:
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), K)
        step = micro_steps(driver, tx, fun, has_aux=True, carry_argnums=2)
        (_, (target, aux)), new, state = step(copied(model), tx.init(model), x[::2], start)
        (_, (target, _)), _, _ = step(new, state, x[1::2], target)
    assert target.activation is aux.activation is jnp.tanh
    assert_close(target, want, 1e-6)
    assert_close(aux, start, 0)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    """Catches functions handed to `jax.shard_map`, arrays that are not on the mesh, and a key that devices share."""

    class Keyed(eqx.Module):
        mlp: eqx.nn.MLP
        key: jax.Array

    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, whole) if eqx.is_array(x) else x, tree)
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = data(32)
    want = eqx.filter_grad(loss)(mlp, x)
    rows = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    _, got = eqx.filter_jit(filter_value_and_grad(loss, K, mesh=mesh))(put(mlp), rows)
    assert_close(got, want, 1e-5)
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, mesh=mesh)
    noise = lambda model, x: jnp.mean(jax.vmap(model.mlp)(x) ** 2) * jax.random.uniform(model.key)
    model = put(Keyed(mlp, jax.random.key(3)))
    for step in (functools.partial(tx.micro_step, noise), jaxaccum.HostDriven(tx, noise)):
        values, new, _ = step(copied(model), tx.init(model), rows)
        assert len(set(np.asarray(values).tolist())) == 8
        assert new.key is not None and new.mlp.activation is mlp.activation
        scales = [jax.random.uniform(jax.random.fold_in(jax.random.key(3), p)) for p in range(8)]
        per_device = [loss(mlp, x[4 * p : 4 * p + 4]) * scale for p, scale in enumerate(scales)]
        np.testing.assert_allclose(values, per_device, rtol=1e-5)


def test_the_programs_are_those_of_the_arrays():
    """Catches leaves that pass through the programs, a careful program for weights that count, and lost options."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    fun = lambda model, x: jaxaccum.Weighted(jnp.sum(jax.vmap(model)(x) ** 2), jnp.sum(x != 0))
    tx = jaxaccum.MultiSteps(optax.adam(0.1), K)
    whole, parted = jaxaccum.HostDriven(tx, fun), jaxaccum.HostDriven(tx, lambda a, x: fun(eqx.combine(a, rest), x))
    lowered = zip(
        whole.lower(model, tx.init(model), data()), parted.lower(arrays, tx.init(arrays), data()), strict=True
    )
    assert all(a.as_text() == b.as_text() for a, b in lowered)
    shapes = eqx.filter_eval_shape(lambda: model)
    assert "dot" in whole.lower(shapes, tx.init(model), data())[0].as_text()
    for f in (filter_value_and_grad(fun, K, prepare="auto"), filter_value_and_grad(fun, K, gradient_norms="all")):
        _, grads, *norms = f(model, data())
        mean = lambda model, x: (lambda loss: loss.total / loss.weight)(fun(model, x))
        assert_close(grads, eqx.filter_grad(mean)(model, data()), 1e-5)
    np.testing.assert_allclose(norms[0].window, np.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))), rtol=1e-5)


def test_a_cast_sees_a_whole_module():
    """Catches a cast that chooses by a loss which gets the arrays alone."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))

    def fun(model, x):
        x = x.astype(model.layers[0].weight.dtype)
        return jnp.mean(jax.vmap(model)(x).astype(jnp.float32) ** 2)

    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, prepare=jaxaccum.cast(jnp.bfloat16).seeing(fun, model, data()))
    state = tx.init(model)
    assert {x.dtype for x in state.prepared} == {jnp.dtype(jnp.bfloat16)}
    _, new, _ = tx.micro_step(fun, model, state, data())
    got = jax.tree.map(jnp.subtract, *(eqx.filter(m, eqx.is_inexact_array) for m in (model, new)))
    assert_close(got, eqx.filter_grad(fun)(model, data()), 0.02)


def test_a_tree_of_modules_is_a_module():
    """Catches a tuple of modules of which one has functions, or a number beside them that is trained."""
    fun = lambda models, x: jnp.mean((jax.vmap(models["b"])(jax.vmap(models["a"])(x)) * models["scale"]) ** 2)
    with jax.enable_x64(True):
        models = {"a": mixed(), "b": eqx.nn.Linear(2, 1, key=jax.random.key(3)), "scale": 2.0}
        got = filter_value_and_grad(fun, K)(models, data())
        want = eqx.filter_value_and_grad(fun)(models, data())
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert_close(got, want)


def test_what_is_refused():
    """Catches a wrong or a silent answer to what can't be had, and names that the caller did not choose."""

    class Keyed(eqx.Module):
        linear: eqx.nn.Linear
        key: jax.Array

    model = Keyed(eqx.nn.Linear(3, 1, key=jax.random.key(0)), jax.random.key(1))
    fun = lambda model, x: jnp.mean(jax.vmap(model.linear)(x) ** 2 * jax.random.uniform(model.key))
    with pytest.raises(TypeError, match=r"argnums=1: filter_value_and_grad differentiates the first argument"):
        filter_value_and_grad(fun, K, argnums=1)
    with pytest.raises(ValueError, match=r"args\[0\]\.key is a random key that all micro-batches would share"):
        filter_value_and_grad(fun, K)(model, data())
    assert filter_value_and_grad(fun, 1)(model, data())[0] == fun(model, data())  # There is nobody to share it with.
    with pytest.raises(TypeError, match=r"passed by position.*dict\(x=...\)"):
        filter_value_and_grad(loss, K)(eqx.nn.Linear(3, 1, key=jax.random.key(0)), x=data())
    with pytest.raises(TypeError, match=r"filter_value_and_grad"):
        jaxaccum.value_and_grad(loss, K)(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), data())
