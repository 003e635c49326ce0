"""`value_and_grad`, option by option, against `jax.value_and_grad` of the big batch or a loop written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum

assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6))


def params():
    return {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.array([0.5, -0.5])}


def batch(n=12):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {"x": draw(n, 3), "y": draw(n, 2)}


def loss(p, data):
    return jnp.mean((jnp.tanh(data["x"] @ p["w"] + p["b"]) - data["y"]) ** 2)


def stack(tree, k):
    """The micro-batches of a batch: number i is rows i, i + k, ..."""
    return jax.tree.map(lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1), tree)


def windows(fun, k, data, **options):
    """`fun` over `data` in k micro-batches, in each way to say so: split, stacked, stacked with room, traced."""
    static = jaxaccum.value_and_grad(fun, k, **options)
    stacked = jaxaccum.value_and_grad(fun, k, stacked=True, **options)
    room = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x, jnp.nan)]), stack(data, k))
    traced = lambda k, p, *args: jaxaccum.value_and_grad(fun, k, stacked=True, **options)(p, *args)
    return {
        "split": lambda p, *args: jax.jit(static)(p, data, *args),
        "stacked": lambda p, *args: jax.jit(stacked)(p, stack(data, k), *args),
        "room": lambda p, *args: jax.jit(stacked)(p, room, *args),
        "traced": lambda p, *args: jax.jit(traced)(jnp.int32(k), p, room, *args),
        "eager": lambda p, *args: static(p, data, *args),
    }


FORMS = ["split", "stacked", "room", "traced", "eager"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_window_is_the_big_batch(form, k):
    """Catches micro-batches lost or doubled, and a mean taken twice."""
    got = windows(loss, k, batch())[form](params())
    assert_close(got, jax.value_and_grad(loss)(params(), batch()))


@pytest.mark.parametrize("form", FORMS)
def test_ragged_tokens_are_weighted_exactly(form):
    """Catches a mean of means: micro-batches of 1, 4, 0 and 7 tokens; the one without holds a NaN."""
    mask = np.zeros((4, 8), np.float32)
    for row, tokens in enumerate((1, 4, 0, 7)):
        mask[row, :tokens] = 1
    clean = {"x": jax.random.normal(jax.random.key(0), (4, 8)), "mask": jnp.asarray(mask)}
    data = {**clean, "x": clean["x"].at[2].set(jnp.nan)}
    total = lambda w, data: jaxaccum.Weighted(jnp.sum((data["x"] * w - 1) ** 2 * data["mask"]), data["mask"].sum())
    got = windows(total, 4, data)[form](jnp.array(0.7))
    assert_close(got, jax.value_and_grad(lambda w: total(w, clean).total / 12)(jnp.array(0.7)))


def test_a_window_without_tokens_has_loss_and_gradient_zero():
    """Catches 0/0."""
    empty = lambda w, x: jaxaccum.Weighted(jnp.sum(x * w) / 0.0, 0)
    value, grad = jaxaccum.value_and_grad(empty, 2)(jnp.array(1.0), jnp.ones(4))
    assert value == 0 and grad == 0


@pytest.mark.parametrize("form", FORMS)
def test_aux_comes_back_for_every_micro_batch(form):
    """Catches aux that is averaged, lost, or of the wrong dtype: integers stay integers."""
    data = batch()
    fun = lambda p, data: (loss(p, data), {"first": data["x"][0], "n": jnp.int32(data["x"].shape[0])})
    (value, aux), _ = windows(fun, 3, data, has_aux=True)[form](params())
    assert_close(value, loss(params(), data))
    assert aux["n"].dtype == jnp.int32 and aux["n"][:3].tolist() == [4, 4, 4]
    assert_close(aux["first"][:3], data["x"][:3])
    assert np.all(aux["first"][3:] == 0)


def test_argnums_may_name_several_arguments():
    """Catches gradients of the wrong argument, or out of order."""
    fun = lambda w, data, b: loss({"w": w, "b": b}, data)
    got = jaxaccum.value_and_grad(fun, 3, argnums=(2, 0))(params()["w"], batch(), params()["b"])
    assert_close(got, jax.value_and_grad(fun, (2, 0))(params()["w"], batch(), params()["b"]))


def test_batches_may_come_in_several_arguments_and_kwargs_pass_through():
    """Catches an argument that is split, or a keyword argument that is not passed on."""
    fun = lambda p, x, scale, y, *, shift: loss(p, {"x": x * scale, "y": y + shift})
    data = batch()
    args = (params(), data["x"], jnp.arange(1.0, 4.0), data["y"])
    got = jaxaccum.value_and_grad(fun, 3, batch_argnums=(1, 3))(*args, shift=jnp.ones(2))
    assert_close(got, jax.value_and_grad(fun)(*args, shift=jnp.ones(2)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_every_micro_batch_has_a_key_of_its_own(form, make_key):
    """Catches the same dropout mask in every micro-batch."""

    def fun(p, data, key):
        keep = jax.random.bernoulli(key, 0.5, data["x"].shape)
        return loss(p, {**data, "x": data["x"] * keep}), keep

    key = make_key(7)
    (value, kept), grads = windows(fun, 3, batch(), has_aux=True, key_argnums=2)[form](params(), key)
    parts = [jax.tree.map(lambda x, i=i: x[i], stack(batch(), 3)) for i in range(3)]
    each = [
        jax.value_and_grad(fun, has_aux=True)(params(), part, jax.random.fold_in(key, i))
        for i, part in enumerate(parts)
    ]
    assert_close(value, sum(v for (v, _), _ in each) / 3)
    assert_close(grads, jax.tree.map(lambda *g: sum(g) / 3, *[g for _, g in each]))
    assert not np.array_equal(kept[0], kept[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_aux", [False, True])
def test_model_state_goes_from_micro_batch_to_micro_batch(form, has_aux):
    """Catches statistics that see only the first or the last micro-batch, or that are not returned."""

    def fun(p, data, stats):
        new = {"mean": 0.9 * stats["mean"] + 0.1 * data["x"].mean(), "n": stats["n"] + 1}
        value = loss(p, data) + stats["mean"] * p["b"][0]
        return (value, (new, new["n"])) if has_aux else (value, new)

    stats = {"mean": jnp.array(0.5), "n": jnp.int32(0)}
    got = windows(fun, 3, batch(), carry_argnums=2, has_aux=has_aux)[form](params(), stats)
    values, grads, carry = [], [], stats
    for i in range(3):
        part = jax.tree.map(lambda x, i=i: x[i], stack(batch(), 3))
        (value, rest), grad = jax.value_and_grad(fun, has_aux=True)(params(), part, carry)
        carry = rest[0] if has_aux else rest
        values.append(value)
        grads.append(grad)
    (value, rest), grad = got
    assert_close((value, grad), (sum(values) / 3, jax.tree.map(lambda *g: sum(g) / 3, *grads)))
    assert_close(rest[0] if has_aux else rest, carry)
    if has_aux:
        assert rest[1][:3].tolist() == [1, 2, 3]


def test_a_micro_batch_of_weight_zero_leaves_the_model_state_alone():
    """Catches statistics of padding, in a window of one micro-batch too."""

    def fun(w, x, stats):
        return jaxaccum.Weighted(jnp.sum(w * x), (x > 0).sum()), stats + x.sum()

    (value, stats), grad = jaxaccum.value_and_grad(fun, 2, carry_argnums=2)(
        jnp.array(2.0), jnp.array([1.0, -5.0, 3.0, -7.0]), jnp.array(10.0)
    )
    assert (value, stats, grad) == (4.0, 14.0, 2.0)
    (value, stats), grad = jaxaccum.value_and_grad(fun, 1, carry_argnums=2)(
        jnp.array(2.0), -jnp.ones(2), jnp.array(3.0)
    )
    assert (value, stats, grad) == (0.0, 3.0, 0.0)


def test_a_list_is_a_pair_as_for_jax():
    """Catches a loss that jax takes, and that returns its aux in a list."""
    fun = lambda w, x: [jnp.mean(w * x), x.sum()]
    (value, aux), grad = jaxaccum.value_and_grad(fun, 2, has_aux=True)(jnp.ones(()), jnp.arange(4.0))
    assert (value, grad, aux.tolist()) == (1.5, 1.5, [2.0, 4.0])


def test_several_carries_come_back_in_order():
    """Catches carries that change places."""
    fun = lambda w, x, a, b: (jnp.mean(w * x), (a + 1, b * 2))
    (_, (a, b)), _ = jaxaccum.value_and_grad(fun, 3, carry_argnums=(2, 3))(jnp.ones(()), jnp.ones(6), 0, 1.0)
    assert (a, b) == (3, 8.0)


@pytest.mark.parametrize("k", [1, 2])
def test_a_number_as_carry_keeps_its_dtype(k):
    """Catches a Python number whose weak type yields to bfloat16, so that the new carry seems to have another dtype."""
    fun = lambda w, x, total: (jnp.mean(x * w), total + jnp.sum(x.astype(jnp.bfloat16)))
    (_, total), _ = jaxaccum.value_and_grad(fun, k, carry_argnums=2)(1.0, jnp.ones(4), 0.0)
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), k)
    (_, of_micro_step), *_ = tx.micro_step(fun, jnp.ones(()), tx.init(jnp.ones(())), jnp.ones(4), 0.0, carry_argnums=2)
    assert total == of_micro_step == 4 and total.dtype == of_micro_step.dtype == jnp.float32


def test_gradients_are_summed_in_float32_and_returned_in_the_parameters_dtype():
    """Catches sums in bfloat16: 1,024 ones give 256 there."""
    fun = lambda w, x: jnp.sum(w * x)
    w, x = jnp.ones((), jnp.bfloat16), jnp.ones(1024, jnp.bfloat16)
    _, grad = jaxaccum.value_and_grad(fun, 1024)(w, x)
    assert grad == 1 and grad.dtype == jnp.bfloat16
    x = x.at[0].set(1 + 2**-7).at[1].set(3.0)
    _, grad = jaxaccum.value_and_grad(fun, 1024, grad_dtype=jnp.float32)(w, x)
    assert grad == 1 + (2**-7 + 2) / 1024 and grad.dtype == jnp.float32


def test_double_precision_stays():
    """Catches float64 losses and gradients rounded to the default accumulator dtype."""
    with jax.enable_x64(True):
        data = jax.tree.map(lambda x: x.astype(jnp.float64), batch())
        p = jax.tree.map(lambda x: x.astype(jnp.float64), params())
        got = jax.jit(jaxaccum.value_and_grad(loss, 3))(p, data)
        want = jax.value_and_grad(loss)(p, data)
        assert got[0].dtype == got[1]["w"].dtype == jnp.float64
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-14, atol=1e-16), got, want)


def test_complex_parameters_have_jaxs_gradient():
    """Catches conjugates and real parts lost."""
    fun = lambda w, x: jnp.mean(jnp.abs(w * x) ** 2 + w.imag * x)
    w, x = jnp.complex64(1 + 2j), jnp.arange(8.0)
    assert_close(jaxaccum.value_and_grad(fun, 4)(w, x), jax.value_and_grad(fun)(w, x))


def test_the_window_is_differentiable_again():
    """Catches a loop that reverse mode can't pass, as a dynamic one can't."""
    inner = lambda w, x: jaxaccum.value_and_grad(lambda w, x: jnp.mean((w * x) ** 3), 4)(w, x)[1]
    got = jax.grad(inner)(jnp.array(2.0), jnp.arange(8.0))
    want = jax.grad(jax.grad(lambda w, x: jnp.mean((w * x) ** 3)))(jnp.array(2.0), jnp.arange(8.0))
    assert_close(got, want)


def test_batches_may_hold_keys_and_none():
    """Catches leaves that only arrays of numbers survive."""
    keys = jax.random.split(jax.random.key(0), 6)
    fun = lambda w, data: jnp.mean(w * jax.vmap(jax.random.normal)(data["keys"]))
    assert_close(
        jaxaccum.value_and_grad(fun, 3)(jnp.ones(()), {"keys": keys, "none": None}),
        jax.value_and_grad(fun)(jnp.ones(()), {"keys": keys, "none": None}),
    )


def test_parameters_may_be_prepared_in_eight_bits():
    """Catches a promotion that jax does not do."""
    loss = lambda w, x: jnp.sum(w.astype(jnp.float32) * x)
    f = jaxaccum.value_and_grad(loss, 4, prepare=lambda w: w.astype(jnp.float8_e4m3fn))
    value, grad = f(jnp.ones(3), jnp.ones((4, 3)))
    assert value == 3 and grad.dtype == jnp.float32
    assert_close(grad, jnp.ones(3))


@pytest.mark.parametrize("k", [1, 3, 4])
def test_unrolled(k):
    """A rest of the loop left out, or run twice."""
    x = jax.random.normal(jax.random.key(0), (12, 3))
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    for a, b in zip(
        jaxaccum.value_and_grad(loss, k, unroll=2)(jnp.ones(3), x),
        jaxaccum.value_and_grad(loss, k)(jnp.ones(3), x),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    scans = [
        e
        for e in jax.make_jaxpr(jaxaccum.value_and_grad(loss, k, unroll=2))(jnp.ones(3), x).eqns
        if "scan" in str(e.primitive)
    ]
    assert [e.params["unroll"] for e in scans] == [2] * (k > 1)  # One micro-batch needs no loop.


def test_unrolled_loops_are_those_of_a_known_length():
    """An option that is silently not heeded."""
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    x = jnp.ones((4, 2, 3))
    with pytest.raises(ValueError, match=r"unroll=2.*traced"):
        jax.jit(lambda k: jaxaccum.value_and_grad(loss, k, stacked=True, unroll=2)(jnp.ones(3), x))(3)
    with pytest.raises(ValueError, match=r"unroll=2.*holds 4"):
        jaxaccum.value_and_grad(loss, 3, stacked=True, unroll=2)(jnp.ones(3), x)
    with pytest.raises(ValueError, match="unroll"):
        jaxaccum.value_and_grad(loss, 3, unroll=0)


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


def test_a_traced_k_beyond_the_stack_is_all_of_it():
    """Catches the last micro-batch counted once more for each one that there is not."""
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    w, x = jnp.arange(3.0), jnp.arange(24.0).reshape(4, 2, 3)
    run = jax.jit(lambda k: jaxaccum.value_and_grad(loss, k, stacked=True)(w, x))
    jax.tree.map(np.testing.assert_array_equal, run(9), run(4))
