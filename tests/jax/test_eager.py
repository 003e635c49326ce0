"""A call outside of jit compiles its program once, and its own: no other call's numbers, devices, keys or functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles

import jaxaccum
from jaxaccum._jax import eager

K = 4


def micro_step(fun, **options):
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, **options)
    return lambda p, x: tx.micro_step(fun, p, tx.init(p), x, boundary=False)[2].acc_grads


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
def test_an_eager_call_compiles_once(name):
    """Catches a compilation in every call, and a number that is frozen in the compiled program."""
    w, x = jax.random.normal(jax.random.key(0), (3, 8, 8)), jnp.ones((8 * K, 8))
    first = EAGER[name](1.0)(w, x)
    EAGER[name](jnp.float32(2.0))(w, x)
    with counted_compiles() as compiles:
        again = EAGER[name](1.0)(w, x)
    assert not compiles
    np.testing.assert_array_equal(first, again)
    with counted_compiles() as compiles:
        for closed_over in (3.0, jnp.float32(3.0), jnp.float32(4.0)):
            got = EAGER[name](closed_over)(w, x)
            np.testing.assert_allclose(got, closed_over * first, rtol=1e-5)
    assert len(compiles) <= 2 * 8  # The two numbers' own; an array that is closed over is an input.


def test_an_eager_call_runs_its_own_callbacks():
    """Catches a Python function of an earlier call that runs in place of this call's."""
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


def test_a_parameter_that_is_a_number_compiles_once():
    """Catches each value taken for a program of its own."""
    f = jaxaccum.value_and_grad(lambda w, x: jnp.mean((w * x) ** 2), 2)
    f(1.0, jnp.ones(4))
    with counted_compiles() as compiles:
        assert f(3.0, jnp.ones(4))[1] == 6.0
    assert not compiles


def test_the_program_that_ran_last_is_kept(monkeypatch):
    """Catches a cache that forgets the newest once it is full, so that each call compiles again."""
    monkeypatch.setattr(eager, "_PROGRAMS", type(eager._PROGRAMS)())
    monkeypatch.setattr(eager, "_MOST", 2)
    double = jax.jit(lambda x: 2 * x)
    call = lambda length: eager.call_compiled(lambda x: double(x) + 1, jnp.ones(length))
    for length in (3, 4, 5):
        call(length)
    with counted_compiles() as compiles:
        call(4), call(5)
    assert not compiles and len(eager._PROGRAMS) == 2
