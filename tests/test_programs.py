"""What compiles is the user's program: its scopes, its jitted functions, its size; once, if it is called eagerly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import compiler

import jaxaccum
from jaxaccum._jax import eager

K, LAYERS = 4, 24


@functools.partial(jax.jit, static_argnums=2)
def layer(x, w, dtype):
    with jax.named_scope("attention"):
        return jnp.tanh(x.astype(dtype) @ w.astype(dtype))


def loss(p, x, dtype=jnp.float32):
    for i, w in enumerate(p):
        with jax.named_scope(f"block{i}"):
            x = layer(x, w, dtype)
    return jnp.mean(x.astype(jnp.float32) ** 2)


half = functools.partial(loss, dtype=jnp.bfloat16)


def params():
    return [jnp.eye(8)] * LAYERS


def by_hand(fun):
    def window(p, x):
        def micro_step(sums, i):
            value, grads = jax.value_and_grad(fun)(p, x[i])
            return jax.tree.map(jnp.add, sums, grads), value

        return jax.lax.scan(micro_step, jax.tree.map(jnp.zeros_like, p), jnp.arange(K))

    return window


def micro_step(fun, **options):
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, **options)
    return lambda p, x: tx.micro_step(fun, p, tx.init(p), x, boundary=False)[2].acc_grads


WINDOWS = {
    "plain": (jaxaccum.value_and_grad, loss, {}),
    "not in place": (jaxaccum.value_and_grad, loss, {"in_place": False}),
    "half precision": (jaxaccum.value_and_grad, half, {}),
    "auto": (jaxaccum.value_and_grad, half, {"prepare": "auto"}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_scopes_and_jitted_functions_stay(name):
    """Catches profiles without layers, and one jitted layer that is lowered 24 times: 318 kB of StableHLO for 63."""
    driver, fun, options = WINDOWS[name]
    x = jnp.ones((2 * K, 8))
    lowered = jax.jit(driver(fun, K, **options)).lower(params(), x)
    hand = jax.jit(by_hand(fun)).lower(params(), x.reshape(K, 2, 8))
    functions = lambda lowered: lowered.as_text().count("func.func private @")
    # With "auto" a layer's casts and the rest of it are two functions.
    assert functions(lowered) <= functions(hand) + (4 if name == "auto" else 1)
    assert len(lowered.as_text()) <= 1.6 * len(hand.as_text())
    text = lowered.as_text(debug_info=True)
    assert all(scope in text for scope in ("attention", *(f"block{i}" for i in range(LAYERS))))
    assert "@layer" in lowered.as_text()


@pytest.mark.parametrize("fun", [loss, half])
def test_so_they_do_in_micro_steps(fun):
    """Catches the same in a stream."""
    lowered = jax.jit(micro_step(fun)).lower(params(), jnp.ones((2, 8)))
    assert "block17" in lowered.as_text(debug_info=True) and "@layer" in lowered.as_text()
    hand = jax.jit(jax.value_and_grad(fun)).lower(params(), jnp.ones((2, 8)))
    assert lowered.as_text().count("func.func private @") <= hand.as_text().count("func.func private @") + 1


def compiles(monkeypatch):
    """A list that grows by each compilation."""
    seen = []
    backend_compile = compiler.backend_compile_and_load
    monkeypatch.setattr(
        compiler, "backend_compile_and_load", lambda *args, **kwargs: seen.append(1) or backend_compile(*args, **kwargs)
    )
    return seen


def scanned(w, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] ** 2)


EAGER = {
    "window": lambda scale: lambda w, x: jaxaccum.value_and_grad(lambda w, x: scale * scanned(w, x), K)(w, x)[1],
    "with a mesh": lambda scale: (
        lambda w, x: jaxaccum.value_and_grad(
            lambda w, x: scale * scanned(w, x), K, mesh=jax.make_mesh((8,), ("data",))
        )(w, x)[1]
    ),
    "micro-step": lambda scale: micro_step(lambda w, x: scale * scanned(w, x)),
}


@pytest.mark.parametrize("name", EAGER)
def test_an_eager_call_compiles_once(name, monkeypatch):
    """Catches a compilation in every call, and a number that is frozen in the compiled program."""
    w, x = jax.random.normal(jax.random.key(0), (3, 8, 8)), jnp.ones((8 * K, 8))
    first = EAGER[name](1.0)(w, x)
    EAGER[name](jnp.float32(2.0))(w, x)
    seen = compiles(monkeypatch)
    again = EAGER[name](1.0)(w, x)
    assert not seen
    np.testing.assert_array_equal(first, again)
    for closed_over in (3.0, jnp.float32(3.0), jnp.float32(4.0)):
        got = EAGER[name](closed_over)(w, x)
        np.testing.assert_allclose(got, closed_over * first, rtol=1e-5)
    assert len(seen) <= 2 * 8  # The two numbers' own; an array that is closed over is an input.


def test_an_eager_call_runs_its_own_callbacks():
    """Catches a Python function of an earlier call that runs in the place of this call's."""
    for factor in (2.0, 3.0):
        scale = lambda x, factor=factor: np.float32(factor) * x
        fun = lambda w, x, scale=scale: w * jax.pure_callback(scale, jax.ShapeDtypeStruct((), x.dtype), jnp.mean(x))
        assert jaxaccum.value_and_grad(fun, K)(jnp.float32(1.0), jnp.ones(2 * K))[1] == factor


def test_an_eager_call_leaves_what_is_no_array_alone():
    """Catches Python values that become tracers, and code that branches on them."""

    def fun(w, x, power, *, name, double=False):
        assert name == "loss" and isinstance(power, int)
        return jnp.mean((w * x) ** power) * (2 if double else 1)

    f = jaxaccum.value_and_grad(fun, K)
    value, _ = f(jnp.float32(1.0), jnp.ones(2 * K), 3, name="loss", double=True)
    assert value == 2.0


@pytest.mark.parametrize("options", [{}, {"in_place": True}, {"has_aux": True}], ids=str)
def test_one_micro_batch_needs_no_sums(options):
    """Catches a loop of one iteration, sums in float32 of parameters in bfloat16, and a conditional."""

    def fun(w, x):
        value = jaxaccum.Weighted(jnp.sum((x @ w) ** 2), jnp.sum(x[:, 0] > 0))
        return (value, x[0]) if "has_aux" in options else value

    w, x = jnp.ones((8, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    f = jaxaccum.value_and_grad(fun, 1, **options)
    text = jax.jit(f).lower(w, x).as_text()
    assert not any(word in text for word in ("stablehlo.while", "stablehlo.case", "stablehlo.if"))
    hand = jax.value_and_grad(lambda w, x: jnp.sum((x @ w) ** 2) / 4)
    got, want = f(w, x), hand(w, x)
    np.testing.assert_allclose(jax.tree.leaves(got[0])[0], want[0], rtol=1e-2)
    np.testing.assert_allclose(got[1].astype(jnp.float32), want[1].astype(jnp.float32), rtol=1e-2)
    value, grads = f(w, x * jnp.nan)
    assert jax.tree.leaves(value)[0] == 0 and not grads.any()


def test_an_eager_call_is_for_its_own_devices():
    """Catches a program of another mesh of the same shape, whose text is the same."""
    w, x = np.ones(2, np.float32), np.ones((8, 2), np.float32)
    fun = lambda w, x: jnp.mean((x @ w) ** 2)
    for devices in (jax.devices()[:2], jax.devices()[2:4]):
        mesh = jax.sharding.Mesh(np.array(devices), ("data",))
        _, grads = jaxaccum.value_and_grad(fun, 2, mesh=mesh)(w, x)
        assert grads.devices() == set(devices)
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh)
        placed = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.P()))
        _, _, state = tx.micro_step(fun, placed, tx.init(placed), x)
        assert state.acc_grads.devices() == set(devices)


def test_an_eager_call_returns_keys_of_its_own_kind():
    """Catches keys of another implementation, whose data look the same."""
    for impl in ("rbg", "unsafe_rbg"):
        key = jax.random.key(0, impl=impl)
        f = jaxaccum.value_and_grad(lambda w, x, key=key: (jnp.mean(w * x), key), 2, has_aux=True)
        assert f(jnp.ones(()), jnp.ones(4))[0][1].dtype == key.dtype


@pytest.mark.parametrize("flag", [np.array(True), jnp.array(True)], ids=["numpy", "jax"])
def test_an_eager_call_may_branch_on_what_is_neither_parameter_nor_batch(flag):
    """Catches arguments that jax's own eager gradient leaves as they are, made tracers."""
    fun = lambda w, x, flag: jnp.mean((x @ w) ** 2) if flag else jnp.mean(x @ w)
    w, x = jnp.ones(2), jnp.ones((4, 2))
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
    values = [jaxaccum.value_and_grad(fun, k)(w, x, flag)[0] for k in (1, 2)]
    assert [*values, tx.micro_step(fun, w, tx.init(w), x, flag)[0]] == [4.0] * 3


def test_large_constants_are_not_kept():
    """Catches memory that grows by every call whose loss holds an array in a jitted function."""
    before = len(eager._PROGRAMS)
    table = np.ones((600, 600), np.float32)
    fun = lambda w, x: jnp.mean((x @ jax.jit(lambda w: table @ w)(w)) ** 2)
    jaxaccum.value_and_grad(fun, 2)(jnp.ones(600), jnp.ones((4, 600)))
    assert len(eager._PROGRAMS) == before


def test_a_parameter_that_is_a_number_compiles_once(monkeypatch):
    """Catches each value taken for a program of its own."""
    f = jaxaccum.value_and_grad(lambda w, x: jnp.mean((w * x) ** 2), 2)
    f(1.0, jnp.ones(4))
    seen = compiles(monkeypatch)
    assert f(3.0, jnp.ones(4))[1] == 6.0 and not seen
