"""Typed random keys: each micro-batch and device draws its own masks, or the call is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import KINDS, mesh_of
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.flax

K, N = 4, 8


def noisy(w, x, key):
    return jnp.mean(w * x) + w * jax.random.uniform(key)


W, X = jnp.ones(()), jnp.zeros(K * 8)
SHARED = r"random key that all (micro-batches|devices) would share.*key_argnums.*jax\.random\.key_data"

WINDOWS = {
    "eager": lambda fun, **options: jaxaccum.value_and_grad(fun, K, **options),
    "jit": lambda fun, **options: jax.jit(jaxaccum.value_and_grad(fun, K, **options)),
    "mesh": lambda fun, **options: jax.jit(jaxaccum.value_and_grad(fun, K, mesh=mesh_of(), **options)),
    "explicit mesh": lambda fun, **options: jax.jit(
        jaxaccum.value_and_grad(fun, K, mesh=mesh_of("explicit"), **options)
    ),
    "local": lambda fun, **options: jaxaccum.local_value_and_grad(fun, mesh=mesh_of(), **options),
    "nnx": lambda fun, **options: (
        lambda w, *args, **kwargs: jaxaccum.flax.value_and_grad(
            lambda model, *args, **kwargs: fun(jnp.mean(model.kernel[...]), *args, **kwargs), K, **options
        )(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), *args, **kwargs)
    ),
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_shared_key_is_refused(window):
    """Catches one dropout mask for all micro-batches: by position, by keyword, in a tree, as an array of keys."""
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=rf"args\[2\] is a {SHARED}"):
        WINDOWS[window](noisy)(W, X, key)
    with pytest.raises(ValueError, match=rf"args\[2\]\['rng'\]\[1\] is a {SHARED}"):
        WINDOWS[window](lambda w, x, rngs: noisy(w, x, rngs["rng"][1]))(W, X, {"rng": (1.0, key)})
    with pytest.raises(ValueError, match=rf"kwargs\['key'\] is a {SHARED}"):
        WINDOWS[window](noisy)(W, X, key=key)
    with pytest.raises(ValueError, match=rf"args\[2\] is a {SHARED}"):
        WINDOWS[window](lambda w, x, keys: noisy(w, x, keys[0]))(W, X, jax.random.split(key))


def test_inside_of_a_mapped_function_and_stacked():
    """Catches a placement or a form that forgets to look."""
    key = jax.random.key(0)
    f = jaxaccum.value_and_grad(noisy, K, axis_name="data")
    with pytest.raises(ValueError, match=SHARED):
        jax.jit(jax.shard_map(f, mesh=mesh_of(), in_specs=(P(), P("data"), P()), out_specs=P()))(W, X, key)
    for k in (K, 2, jnp.int32(2)):
        with pytest.raises(ValueError, match=SHARED):
            jax.jit(lambda k=k: jaxaccum.value_and_grad(noisy, k, stacked=True)(W, X.reshape(K, -1), key))()


def test_remedies():
    """Catches a remedy that the message names and that doesn't work."""
    key = jax.random.key(0)
    draws = lambda w, x, key: (noisy(w, x, key), jax.random.uniform(key))
    (_, own), _ = jaxaccum.value_and_grad(draws, K, key_argnums=2, has_aux=True)(W, X, key)
    assert len(set(own.tolist())) == K
    wrapped = lambda w, x, data: draws(w, x, jax.random.wrap_key_data(data))
    (_, shared), _ = jaxaccum.value_and_grad(wrapped, K, has_aux=True)(W, X, jax.random.key_data(key))
    assert set(shared.tolist()) == {float(jax.random.uniform(key))}


def test_keys_in_the_batch_and_the_carry_are_left_alone():
    """Catches keys that are refused where each micro-batch has its own."""
    keys = jax.random.split(jax.random.key(0), 2 * K)
    draws = lambda w, data: (jnp.mean(w * data["x"]), jax.vmap(jax.random.uniform)(data["keys"]))
    (_, drawn), _ = jaxaccum.value_and_grad(draws, K, has_aux=True)(W, {"x": jnp.zeros(2 * K), "keys": keys})
    np.testing.assert_array_equal(drawn.T.ravel(), jax.vmap(jax.random.uniform)(keys))

    def chained(w, x, key):
        key, own = jax.random.split(key)
        return jnp.mean(w * x), (key, jax.random.uniform(own))

    f = jax.jit(jaxaccum.value_and_grad(chained, K, carry_argnums=2, has_aux=True))
    (_, (_, drawn)), _ = f(W, X, jax.random.key(0))
    assert len(set(drawn.tolist())) == K


def test_an_array_of_keys_is_folded_key_by_key():
    """Catches keys of a shape that fold_in doesn't take."""
    keys = jax.random.split(jax.random.key(0), (2, 3))
    draws = lambda w, x, keys: (jnp.mean(w * x), jax.vmap(jax.vmap(jax.random.uniform))(keys))
    (_, drawn), _ = jaxaccum.value_and_grad(draws, K, key_argnums=2, has_aux=True)(W, X, keys)
    want = [[[jax.random.uniform(jax.random.fold_in(key, i)) for key in row] for row in keys] for i in range(K)]
    np.testing.assert_array_equal(drawn, jnp.array(want))


@pytest.mark.parametrize("driver", ["counter", "static", "host driven"])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_steps_on_a_mesh_draw_their_own(driver, kind):
    """Catches one mask on all devices: [0.947667] four times on four of them."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh_of(kind))
    key, raw = jax.random.key(0), jnp.uint32([0, 1])
    fun = lambda w, x, keys, data: noisy(w, x, keys["a"][1]) + 0.0 * jnp.sum(data)
    args = X, {"a": [2.0, key]}, raw
    if driver == "host driven":
        values, *_ = jaxaccum.HostDriven(tx, fun)(W, tx.init(W), *args)
    else:
        boundary = None if driver == "counter" else True
        step = jax.jit(lambda p, s, *args: tx.micro_step(fun, p, s, *args, boundary=boundary))
        values, *_ = step(W, tx.init(W), *args)
    np.testing.assert_allclose(values, [jax.random.uniform(jax.random.fold_in(key, p)) for p in range(8)], rtol=1e-6)


def test_local_gradients_draw_their_own():
    """Catches one mask on all devices."""
    values, _ = jaxaccum.local_value_and_grad(noisy, mesh=mesh_of("auto"), key_argnums=2)(W, X, jax.random.key(0))
    want = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), p)) for p in range(8)]
    np.testing.assert_allclose(values, want, rtol=1e-6)


def test_micro_steps_elsewhere_use_a_key_as_it_is():
    """Catches a key that is folded where each call has its own."""
    key = jax.random.key(5)
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
    value, *_ = tx.micro_step(noisy, W, tx.init(W), X, key)
    np.testing.assert_allclose(value, jax.random.uniform(key), rtol=1e-6)
    mapped = jaxaccum.MultiSteps(optax.sgd(1.0), 2, axis_name="data")
    step = lambda x, key: mapped.micro_step(noisy, W, mapped.init(W), x, key[0])[0][None]
    f = jax.jit(jax.shard_map(step, mesh=mesh_of(), in_specs=(P("data"), P("data")), out_specs=P("data")))
    keys = jax.random.split(key, 8)
    np.testing.assert_allclose(f(X, keys), jax.vmap(jax.random.uniform)(keys), rtol=1e-6)


def chained(w, x, key):
    """Carries its key on, and tells what it draws."""
    key, own = jax.random.split(key)
    return jnp.mean(w * x), (key, jax.random.uniform(own))


@pytest.mark.parametrize("form", ["auto", "explicit", "vma", "no vma"])
def test_a_carried_key_draws_anew_on_every_device(form):
    """Catches devices that draw the same masks, and a key that can't come back from them."""
    f = jaxaccum.value_and_grad(chained, K, carry_argnums=2, has_aux=True)
    (_, (want, first)), _ = f(W, jnp.zeros(K), jax.random.key(0))
    options = {"carry_argnums": 2, "has_aux": True}
    if form in KINDS:
        (_, (key, drawn)), _ = jax.jit(jaxaccum.value_and_grad(chained, K, mesh=mesh_of(form), **options))(
            W, X, jax.random.key(0)
        )
    else:
        f = jaxaccum.value_and_grad(chained, K, axis_name="data", **options)
        run = lambda w, x, key: (lambda out: (out[0][1][0], out[0][1][1][:, None]))(f(w, x, key))
        specs = {"in_specs": (P(), P("data"), P()), "out_specs": (P(), P(None, "data"))}
        mapped = jax.shard_map(run, mesh=mesh_of(), check_vma=form == "vma", **specs)
        key, drawn = jax.jit(mapped)(W, X, jax.random.key(0))
    assert len(np.unique(drawn)) == 8 * K
    np.testing.assert_array_equal(np.asarray(drawn)[:, 0], first)
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(want))


@pytest.mark.parametrize("where", ["eager", "jit", "mesh"])
def test_dropout_of_an_nnx_model(where):
    """Catches a model with random streams that can't be called eagerly, and one mask on all devices."""
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    fun = lambda model, x: (jnp.mean(x), model(jnp.ones(16)))
    options = {"mesh": mesh_of()} if where == "mesh" else {}
    f = jaxaccum.flax.value_and_grad(fun, K, wrt=nnx.Param, has_aux=True, **options)
    call = f if where == "eager" else nnx.jit(f)
    before = jax.random.key_data(model.rngs.key[...])
    (_, masks), _ = call(model, X)
    masks = np.asarray(masks).reshape(-1, 16)
    assert len(np.unique(masks, axis=0)) == len(masks) == K * (8 if where == "mesh" else 1)
    np.testing.assert_array_equal(jax.random.key_data(model.rngs.key[...]), before)
    assert model.rngs.count[...] == K


def test_one_micro_batch_shares_its_key_with_none():
    """Catches a sweep over K that breaks at 1."""
    of_model = lambda model, x, key: jnp.sum(model.kernel[...]) * 0 + noisy(W, x, key)
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    for window, first in ((jaxaccum.value_and_grad(noisy, 1), W), (jaxaccum.flax.value_and_grad(of_model, 1), model)):
        value, _ = window(first, X, jax.random.key(0))
        np.testing.assert_allclose(value, jax.random.uniform(jax.random.key(0)), rtol=1e-6)
    with pytest.raises(ValueError, match=SHARED):
        jaxaccum.value_and_grad(noisy, 1, mesh=mesh_of())(W, X, jax.random.key(0))


def test_an_nnx_rngs_is_an_argument_of_keys():
    """Catches a remedy that doesn't work: the counts of its streams are no keys."""
    model, drop = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)
    fun = lambda model, x, rngs: (jnp.mean(model(x) ** 2), drop(jnp.ones(16), rngs=rngs))
    with pytest.raises(ValueError, match=SHARED):
        jaxaccum.flax.value_and_grad(fun, K, has_aux=True)(model, jnp.ones((8, 3)), nnx.Rngs(1))
    f = jaxaccum.flax.value_and_grad(fun, K, has_aux=True, key_argnums=2)
    (_, masks), _ = f(model, jnp.ones((8, 3)), nnx.Rngs(1))
    assert len(np.unique(masks, axis=0)) == K
