"""Gradients of weights in half precision, formed in float32: exact where jax rounds, the same wherever it doesn't."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._gradient import wide_products

K, N = 4, 2
HALF = jnp.bfloat16


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def error(x, reference):
    x, reference = (np.asarray(leaf, np.float64) for leaf in (x, reference))
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


def mean_gradient(fun, *args, **options):
    """That of a window."""
    return jax.jit(jaxaccum.value_and_grad(fun, **options))(*args)[1]


# The product, the weight's shape, and that of an example.
PRODUCTS = {
    "weight right": ("btk,kh->bth", (3, 5), (7, 3)),
    "weight left": ("kh,btk->hbt", (3, 5), (7, 3)),
    "transposed": ("btk,hk->bth", (5, 3), (7, 3)),
    "two contracted": ("bthd,hdm->btm", (2, 3, 5), (7, 2, 3)),
    "two contracted, weight left": ("dmh,bthd->mbt", (3, 5, 2), (7, 2, 3)),
    "batched": ("bti,tio->bto", (7, 3, 5), (7, 3)),
    "batched, weight left": ("oti,bti->bot", (5, 7, 3), (7, 3)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_is_not_rounded(name):
    """Dimensions that are taken for others, a gradient in bfloat16, a value that is another."""
    formula, weight, example = PRODUCTS[name]
    w, x = draw(0, *weight), draw(1, K * N, *example)
    product = lambda w, x: jnp.einsum(formula, *((x, w) if formula.index("b") == 0 else (w, x)))
    cotangent = draw(2, *jax.eval_shape(product, w, x[:N]).shape).astype(HALF)
    loss = lambda w, x: jnp.sum((product(w.astype(HALF), x.astype(HALF)) * cotangent).astype(jnp.float32))
    half = lambda x: np.asarray(x.astype(HALF), np.float64)
    with jax.enable_x64(True):
        micro_batches = [jnp.asarray(half(x[i::K])) for i in range(K)]
        exact = lambda w: sum(jnp.sum(product(w, part) * half(cotangent)) for part in micro_batches)
        reference = jax.grad(exact)(jnp.asarray(half(w))) / K
    value, gradient = jax.jit(jaxaccum.value_and_grad(loss, K))(w, x)
    plain_value, plain = jax.jit(jaxaccum.value_and_grad(loss, K, in_place=False))(w, x)
    assert value == plain_value
    assert error(gradient, reference) < 1e-6 < 1e-4 < error(plain, reference)


def called(p, x):
    """Through a jit and a checkpoint, moved about, in parts, and with a head that is given in half precision."""
    x = jax.jit(lambda w, x: x @ w.astype(HALF))(p["a"], x.astype(HALF))
    x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w.astype(HALF).T))(p["b"], x)
    left, right = jnp.split(p["c"].reshape(8, 6).astype(HALF), 2)
    x = jnp.concatenate([x[:, :4] @ left, x[:, 4:] @ right], axis=1)
    return jnp.mean((x @ p["head"]).astype(jnp.float32) ** 2)


def used_elsewhere(p, x):
    """Its cast is a factor too, a table that rows are taken from, and an operand of a product with a parameter."""
    w = p["a"].astype(HALF)
    x = x.astype(HALF) @ (w * 2) + x.astype(HALF) @ w + w[3]
    return jnp.mean((x @ p["b"].astype(HALF)).astype(jnp.float32) ** 2) + jnp.sum((w @ p["d"].astype(HALF)) ** 2)


def looped(p, x):
    """In a loop, where nothing is changed."""
    step = lambda x, _: (jnp.tanh(x @ p["d"].astype(HALF)), None)
    return jnp.mean((jax.lax.scan(step, x.astype(HALF), None, length=3)[0]).astype(jnp.float32) ** 2)


def parameters():
    leaves = {"a": (6, 8), "b": (8, 8), "c": (2, 4, 6), "d": (8, 8)}
    return {name: draw(i, *shape) / 2 for i, (name, shape) in enumerate(leaves.items())} | {
        "head": draw(9, 12).astype(HALF)
    }


def lowered_for_a_gpu(fun, *args):
    """StableHLO; a CPU computes in float32 in any case."""
    return jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("loss", "width", "products"), [(called, 6, 5), (used_elsewhere, 6, 2), (looped, 8, 0)])
def test_gradients_are_those_of_jax_but_for_rounding(loss, width, products):
    """A use that is lost or counted twice; a loop that is taken for a product, a product that is not found."""
    p, x = parameters(), draw(10, K * N, width)
    options = {"num_micro_batches": K, "grad_dtype": jnp.float32}
    text = lowered_for_a_gpu(jaxaccum.value_and_grad(loss, **options), p, x)
    assert len(re.findall(r"dot_general .*xbf16>\) -> tensor<\S*xf32>", text)) == products
    plain = mean_gradient(loss, p, x, in_place=False, **options)
    for name, leaf in mean_gradient(loss, p, x, **options).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, plain[name], rtol=0.05, atol=0.02 * np.abs(plain[name]).max())


# The gradient of a weight (16, 24), from 8 examples.
IN_FLOAT32 = "(tensor<8x16xbf16>, tensor<8x24xbf16>) -> tensor<16x24xf32>"


def half_loss(w, x):
    return jnp.mean((x.astype(HALF) @ w.astype(HALF)).astype(jnp.float32) ** 2)


@pytest.mark.parametrize(
    ("options", "is_wide"),
    [
        ({}, True),
        ({"prepare": "auto"}, True),
        ({"prepare": jaxaccum.cast(HALF)}, True),
        ({"in_place": False}, False),
        ({"accumulator_dtype": HALF}, False),
    ],
)
def test_where_it_is_done(options, is_wide):
    """A rule that finds too much or too little, and what a matrix unit could not add as it is."""
    w, x = draw(0, 16, 24), draw(1, K * 8, 16)
    text = lowered_for_a_gpu(jaxaccum.value_and_grad(half_loss, K, **options), w, x)
    assert (IN_FLOAT32 in text) == is_wide


@pytest.mark.parametrize("boundary", [None, False])
def test_what_is_selected_is_no_products_to_add(boundary):
    """A gradient in float32 that something must still be added to elsewhere: twice the memory for nothing."""
    w, x = draw(0, 16, 24), draw(1, 8, 16)
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), K)
    step = functools.partial(tx.micro_step, half_loss, boundary=boundary)
    assert IN_FLOAT32 not in lowered_for_a_gpu(step, w, tx.init(w), x)
    weighted = lambda w, x: jaxaccum.Weighted(half_loss(w, x), x[0, 0])
    assert IN_FLOAT32 not in lowered_for_a_gpu(jaxaccum.value_and_grad(weighted, 1), w, x)


def test_the_host_driven_program_adds():
    """A selection that came between the sum and the product."""
    w, x = draw(0, 16, 24), draw(1, 8, 16)
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), K)
    step = jaxaccum.HostDriven(tx, half_loss)
    pending = tx.init(w)._replace(inner_opt_state=None)
    text = step._programs[True][0].trace(w, (), pending, x).lower(lowering_platforms=("cuda",)).as_text()
    assert IN_FLOAT32 in text
    assert "stablehlo.select" not in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepare", [None, "auto"])
def test_on_a_mesh(kind, prepare):
    """A gradient that varies where its weight does not, or the other way round."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
    w, x = draw(0, 16, 24), draw(1, 4 * K * N, 16)
    one = jaxaccum.value_and_grad(half_loss, 4 * K, prepare=prepare)(w, x)
    place = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        f = jax.jit(jaxaccum.value_and_grad(half_loss, K, mesh=mesh, prepare=prepare))
        value, gradient = f(place(w, None, "model"), place(x, "data"))
    np.testing.assert_allclose(value, one[0], rtol=1e-2)
    assert gradient.sharding.spec == P(None, "model")
    assert error(gradient, one[1]) < 1e-2


def test_training_is_that_of_the_window():
    """Host-driven micro-steps and windows that form gradients in another precision, or sums that are not cleared."""
    opt, w, x = optax.adamw(1e-2), draw(0, 16, 24), draw(1, 3, K, 8, 16)
    tx = jaxaccum.MultiSteps(opt, K)
    params, state = jnp.copy(w), tx.init(w)
    step = jaxaccum.HostDriven(tx, half_loss)
    expected, inner = w, opt.init(w)
    window = jax.jit(jaxaccum.value_and_grad(half_loss, K, stacked=True))
    for batches in x:
        for batch in batches:
            _, params, state = step(params, state, batch)
        updates, inner = opt.update(window(expected, batches)[1], inner, expected)
        expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)
        assert not np.any(state.acc_grads)


@pytest.mark.parametrize("prepare", [None, "auto", jaxaccum.cast(HALF)], ids=["plain", "auto", "cast"])
def test_what_is_made_of_gradients(prepare):
    """A product that jax can't differentiate once more, forward or backward, or batch; a weight that is a constant."""
    w, x = draw(0, 16, 24), draw(1, K * 8, 16)

    def products(**options):
        gradient = lambda w: jaxaccum.value_and_grad(half_loss, K, **options)(w, x)[1]
        return (
            jax.jvp(gradient, (w,), (w,))[1],
            jax.grad(lambda w: jnp.sum(gradient(w) ** 2))(w),
            jax.vmap(gradient)(jnp.stack([w, 2 * w])),
        )

    plain = jax.jit(lambda: products(in_place=False))()
    for result, expected in zip(jax.jit(lambda: products(prepare=prepare))(), plain, strict=True):
        assert error(result, expected) < 2e-2


def test_a_weight_that_passes_through_integers_has_no_gradient():
    """Catches a cast to int8 that is left out with the one to half precision."""

    def loss(p, x):
        codes = p["b"].astype(jnp.int8)
        return jnp.mean((x.astype(HALF) @ p["a"].astype(HALF) @ codes.astype(HALF)).astype(jnp.float32) ** 2)

    p, x = {"a": draw(0, 6, 8), "b": 8 * draw(1, 8, 8)}, draw(10, K * N, 6)
    got, want = (mean_gradient(loss, p, x, num_micro_batches=K, in_place=in_place) for in_place in (None, False))
    assert not np.any(got["b"])
    np.testing.assert_allclose(got["a"], want["a"], rtol=0.05, atol=0.02 * np.abs(want["a"]).max())


def test_a_product_with_an_algorithm_stays():
    """Catches a gradient that is formed otherwise than the loss asks for."""

    def occurs(precision):
        product = lambda w, x: jax.lax.dot(x, w, precision=precision, preferred_element_type=HALF)
        return wide_products.occur(jax.make_jaxpr(product)(jnp.ones((3, 5), HALF), jnp.ones((2, 3), HALF)).jaxpr)

    assert occurs(None) and not occurs(jax.lax.DotAlgorithmPreset.BF16_BF16_BF16)


def test_a_function_of_a_weight_is_no_rearrangement():
    """Catches a gradient in float32 that passes through a function whose value is in half precision."""
    loss = lambda w, x: jnp.mean((x.astype(HALF) @ jnp.tanh(w.astype(HALF))).astype(jnp.float32) ** 2)
    w, x = draw(0, 16, 24), draw(1, K * 8, 16)
    assert IN_FLOAT32 not in lowered_for_a_gpu(jaxaccum.value_and_grad(loss, K), w, x)
    got, want = (mean_gradient(loss, w, x, num_micro_batches=K, in_place=in_place) for in_place in (None, False))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("w", "x", "out"),
    [(P(None, "model"), P(), None), (P("model"), P(None, "model"), P()), (P(), P("data"), None), (P(), P(), P())],
)
def test_a_product_of_explicit_shardings_stays(w, x, out):
    """Catches a gradient whose layout is not said, where one operand alone is sharded, or the result's is asked for."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS["explicit"],) * 2)

    def occurs(w, x, out):
        product = lambda w, x: jnp.dot(x, w, out_sharding=out)
        args = (jax.device_put(jnp.ones((4, 4), HALF), NamedSharding(mesh, spec)) for spec in (w, x))
        return wide_products.occur(jax.make_jaxpr(product)(*args).jaxpr)

    with jax.set_mesh(mesh):
        assert occurs(P(), P(), None) and not occurs(w, x, out)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_precision_is_that_of_the_loss(dtype):
    """Catches a weight's gradient formed in the default precision, and float16 left to jax."""
    loss = lambda w, x: jnp.sum(jnp.matmul(x.astype(dtype), w.astype(dtype), precision="highest").astype(jnp.float32))
    text = lowered_for_a_gpu(jaxaccum.value_and_grad(loss, K), draw(0, 16, 24), draw(1, K * 8, 16))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert any("-> tensor<16x24xf32>" in line for line in products)
    assert all("[HIGHEST, HIGHEST]" in line for line in products)
