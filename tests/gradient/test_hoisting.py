"""`prepare="auto"`: what a loss computes from its parameters alone is found and hoisted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import linear_call

import jaxaccum
from jaxaccum._gradient import hoisting

LAYERS, WIDTH, K, N = 3, 8, 4, 2


def params():
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda i, *shape: 0.3 * jax.random.normal(keys[i], shape)
    return {
        "embedding": normal(0, 16, WIDTH),
        "layers": {"kernel": normal(1, LAYERS, WIDTH, WIDTH), "bias": normal(2, LAYERS, WIDTH)},
        "base": normal(3, WIDTH, WIDTH),
        "low": normal(4, WIDTH, 2),
        "up": normal(5, 2, WIDTH),
    }


def batch():
    return jax.random.randint(jax.random.key(1), (K * N, 5), 0, 16)


def half(x):
    return x.astype(jnp.bfloat16)


def layer(x, layer):
    return jnp.tanh(x @ half(layer["kernel"]) + half(layer["bias"])), None


def language_model(wrap):
    """Tied embedding, scanned layers that cast for themselves, a merge of low rank; `wrap`s each layer."""

    def loss(p, tokens):
        x = half(p["embedding"][tokens])
        x, _ = jax.lax.scan(wrap(layer), x, p["layers"])
        x = x @ half(p["base"] + p["low"] @ p["up"])
        logits = (x @ half(p["embedding"]).T).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    return loss


WRAPS = {
    "plain": lambda f: f,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "both": lambda f: jax.jit(jax.checkpoint(f)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_split(wrap):
    """A cast left in, one taken out that belongs in, or another result."""
    loss = language_model(wrap)
    prepare, rest = hoisting.split(loss, params(), batch()[:N], in_place=False)
    kept, made = prepare(params())
    # The embedding is gathered from, and a bias is a vector; all else is read in half precision alone.
    assert [x.shape for x in jax.tree.leaves(kept)] == [(16, WIDTH), (LAYERS, WIDTH)]
    assert {(x.shape, str(x.dtype)) for x in made} == {
        ((16, WIDTH), "bfloat16"),
        ((LAYERS, WIDTH, WIDTH), "bfloat16"),
        ((WIDTH, WIDTH), "bfloat16"),
    }
    np.testing.assert_allclose(rest((kept, made), batch()[:N]), loss(params(), batch()[:N]), rtol=1e-3)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_gradients(wrap):
    """A gradient that is lost on the way back, or comes twice."""
    loss = language_model(wrap)
    f = lambda prepare: jax.jit(jaxaccum.value_and_grad(loss, K, prepare=prepare))(params(), batch())
    for x, y in zip(jax.tree.leaves(f("auto")), jax.tree.leaves(f(None)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.03, atol=2e-4)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_product_of_parameters(wrap):
    """Catches a body that is hoisted row by row, as only a scan's is."""
    w, x = jax.random.normal(jax.random.key(0), (4, 4)), jnp.ones((2, 4))
    loss = wrap(lambda w, x: jnp.sum(x @ (w @ w.T)))
    prepare, rest = hoisting.split(loss, w, x, in_place=False)
    kept, made = prepare(w)
    assert not jax.tree.leaves(kept)
    np.testing.assert_allclose(made, [w @ w.T], rtol=1e-6)
    np.testing.assert_allclose(rest((kept, made), x), loss(w, x), rtol=1e-5)


def made(loss, *args):
    """Shapes and dtypes of what is taken out of `loss`."""
    prepare, _ = hoisting.split(loss, *args, in_place=False)
    return [(x.shape, str(x.dtype)) for x in jax.eval_shape(prepare, args[0])[1]]


@pytest.mark.parametrize(("in_place", "stack_is_made"), [(None, False), (True, False), (False, True)])
def test_casts_of_stacks_that_are_added_to_in_place(in_place, stack_is_made):
    """Catches a half-precision copy of all layers among what is hoisted, although the stack receives the gradients."""
    p = {"base": jnp.eye(4), "stack": jnp.stack([jnp.eye(4)] * 3)}

    def loss(p, x):
        layers = jax.lax.scan(lambda c, w: (c @ half(w), None), half(x) @ half(p["base"]), p["stack"])[0]
        return jnp.sum(layers.astype(jnp.float32))

    prepare, rest = hoisting.split(loss, p, jnp.ones((2, 4)), in_place=in_place)
    kept, made = prepare(p)
    assert [x.shape for x in made] == [(4, 4), (3, 4, 4)][: 1 + stack_is_made]
    assert len(jax.tree.leaves(kept)) == (not stack_is_made)
    np.testing.assert_array_equal(rest((kept, made), jnp.ones((2, 4))), loss(p, jnp.ones((2, 4))))


W, X = jnp.ones((4, 4)), jnp.ones((2, 4))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda w, x: (x @ half(w)).sum(), [((4, 4), "bfloat16")]),
        (lambda w, x: (x @ half(w).T).sum(), [((4, 4), "bfloat16")]),
        (lambda w, x: (x @ half(w).astype(w.dtype)).sum(), [((4, 4), "bfloat16")]),
        (lambda w, x: (x @ w.T).sum(), []),
        (lambda w, x: (x @ w[:2].T).sum(), []),
        (lambda w, x: (x @ jnp.concatenate([w, w], axis=1)).sum(), []),
        (lambda w, x: (x @ jnp.exp(jnp.concatenate([w, w], axis=1))).sum(), []),
        (lambda w, x: (x @ (w / jnp.linalg.norm(w, axis=0))).sum(), [((4, 4), "float32")]),
        (lambda w, x: (x @ w).sum() + (w**2).sum(), [((), "float32")]),
        (
            lambda w, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ half(w)).astype(w.dtype), None), x, length=3)[0].sum(),
            [],
        ),
        (lambda w, x: jax.lax.cond(x.sum() > 0, lambda w: (x @ half(w)).sum(), lambda w: jnp.float32(0), w), []),
    ],
    ids=[
        *("cast", "cast-transpose", "cast-back", "transpose", "slice", "larger", "larger-work"),
        *("norm", "penalty", "loop", "cond"),
    ],
)
def test_rule(loss, expected):
    """What saves nothing, makes something larger, or would be summed over a loop in half precision."""
    assert made(loss, W, X) == expected


def test_vectors():
    """A cast of a bias, which costs nothing where it is added; not one that a matrix has a part in."""
    b = jnp.ones(4)
    assert made(lambda p, x: (half(x) + half(p)).sum(), b, X) == []
    assert made(lambda p, x: (x * (p[0] @ p[1])).sum(), (W, b), X) == [((4,), "float32")]


def ruled(backward):
    """The sine of a matrix, with a backward pass of its own: `backward(matrix, cotangent)`."""

    @jax.custom_vjp
    def fun(w):
        return jnp.sin(w)

    fun.defvjp(lambda w: (jnp.sin(w), w), lambda w, cotangent: (backward(w, cotangent),))
    return fun


@jax.custom_vjp
def squared_backward(x):
    return x


squared_backward.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent**2,))

# tests/jax/test_linearity.py says which backward passes are linear.
NONLINEAR = {
    "clip": lambda w, ct: jnp.clip(ct, -0.02, 0.02),
    "square": lambda w, ct: ct**2,
    "norm": lambda w, ct: ct / jnp.linalg.norm(ct),
    "sign": lambda w, ct: jnp.sign(ct),
}
LINEAR = {
    "straight through": lambda w, ct: ct,
    "products": lambda w, ct: w @ (w.T @ ct) - ct.mean(),
    # It is run here, and not differentiated.
    "through another rule": lambda w, ct: squared_backward(ct),
}
PLACES = {
    "plain": lambda fun: fun,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda fun: lambda w: jax.lax.scan(lambda c, w: (c, fun(w)), 0, w[None])[1][0],
    "nested": lambda fun: jax.jit(jax.checkpoint(lambda w: jax.lax.map(jax.jit(fun), w[None])[0])),
    "cond": lambda fun: lambda w: jax.lax.cond(w[0, 0] > 9, jnp.cos, fun, w),
}
every_rule = pytest.mark.parametrize("rule", NONLINEAR.values(), ids=NONLINEAR)
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@every_rule
def test_a_backward_pass_that_is_not_linear_stays_in_the_loss(rule):
    """Catches a rule that is run on the sum of the micro-batches' cotangents."""
    assert made(lambda w, x: (x @ ruled(rule)(w)).sum(), W, X) == []


@pytest.mark.parametrize("rule", LINEAR.values(), ids=LINEAR)
@every_place
def test_a_linear_backward_pass_is_taken_out(rule, place):
    """Catches a straight-through estimator that runs in every micro-batch."""
    ((shape, dtype),) = made(lambda w, x: (x @ place(ruled(rule))(w)).sum(), W, X)
    assert shape[-2:] == (4, 4) and dtype == "float32"


@every_place
def test_it_stays_wherever_it_stands(place):
    """Catches a rule that a jit, a loop or a checkpoint hides; the cast before it may go."""
    fun = place(ruled(NONLINEAR["clip"]))
    assert "float32" not in [dtype for _, dtype in made(lambda w, x: (x @ fun(w)).sum(), W, X)]
    assert ((4, 4), "bfloat16") in made(lambda w, x: (x @ fun(half(w)).astype(x.dtype)).sum(), W, X)


def test_random_numbers_that_are_drawn_anew_stay_in_the_loss():
    """Catches noise that is the same in all micro-batches of a window."""
    assert made(lambda w, x: (x @ (w + jax.lax.rng_uniform(0.0, 1.0, w.shape))).sum(), W, X) == []


MESH = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
DRIVERS = {
    "plain": dict(),
    "no in-place": dict(in_place=False),
    "stacked": dict(stacked=True),
    "mesh": dict(mesh=MESH),
}


@pytest.mark.parametrize(
    ("rule", "driver", "weighted"),
    [
        (rule, driver, (i + j) % 2 == 0)  # Each pair of values occurs.
        for i, rule in enumerate(["clip", "square", "norm", "sign"])
        for j, driver in enumerate(DRIVERS)
    ],
)
def test_every_micro_batch_has_its_own_backward_pass(rule, driver, weighted):
    """Catches gradients clipped, squared or normalised in sum: 0.1 became 0.025."""
    options = DRIVERS[driver]
    rules = [place(ruled(NONLINEAR[rule])) for name, place in PLACES.items() if name != "cond"]

    def loss(w, x):
        errors = sum(jnp.mean(jnp.tanh(x @ fun(w)) ** 2) for fun in rules)
        layers = jax.lax.scan(lambda c, w: (jnp.tanh(c @ rules[0](w)), None), x, jnp.stack([w, 2 * w]))[0]
        total = errors + jnp.mean(layers)
        return jaxaccum.Weighted(total * x[0, 0], x[0, 0]) if weighted else total

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        w, x = jnp.asarray(rng.standard_normal((4, 4))), jnp.asarray(rng.uniform(0.5, 3.0, (4 * K, 4)))
        x = x.reshape(K, 4, 4) if "stacked" in options else x

        def run(prepare, k):
            k = k if "stacked" in options else K
            return jaxaccum.value_and_grad(loss, k, prepare=prepare, **options)(w, x)

        runs = [jax.jit(run, static_argnums=0)(prepare, jnp.int32(K)) for prepare in ("auto", None)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *runs)


# What is computed from the parameters alone, and is no number that a gradient reaches.
INTEGERS = {
    "mask": lambda w, x: jnp.mean((x @ jnp.where(w > 0.1, jnp.mean(x), w)) ** 2),
    "argmax": lambda w, x: jnp.mean((x @ w)[:, jnp.argmax(w, 1)] ** 2),
    "int8": lambda w, x: jnp.mean(jax.lax.dot((x * 9).astype(jnp.int8), (w * 9).astype(jnp.int8)) * (x @ w)),
    "cond": lambda w, x: jnp.mean((x @ jax.lax.cond(w.sum() > 9, jnp.sin, jnp.cos, w * jnp.mean(x))) ** 2),
    "fake quantisation": lambda w, x: jnp.mean(
        (x @ (w + jax.lax.stop_gradient(jnp.round(9 * w).astype(int) / 9 - w))) ** 2
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_the_parameters(name):
    """Catches integers taken out of the loss, which is then differentiated by them."""
    w, x = jax.random.normal(jax.random.key(0), (4, 4)), jax.random.normal(jax.random.key(1), (2 * K, 4))
    f = lambda prepare: jax.jit(jaxaccum.value_and_grad(INTEGERS[name], K, prepare=prepare))(w, x)
    for a, b in zip(f("auto"), f(None), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def through_linear_call(w):
    """Clips gradients in the transpose of a custom_jvp's own rule."""
    clip = lambda t: linear_call(lambda _, t: t, lambda _, g: jnp.clip(g, -0.1, 0.1), (), t)
    f = jax.custom_jvp(lambda w: w)
    f.defjvp(lambda p, t: (p[0], clip(t[0])))
    return f(w)


def in_eight_bits(w):
    """Casts gradients to a dtype in which their sum is NaN."""
    f = jax.custom_vjp(lambda w: w)
    f.defvjp(lambda w: (w, None), lambda _, g: (g.astype(jnp.float8_e4m3fn).astype(g.dtype),))
    return f(w)


def of_low_precision(w):
    """Rounds gradients to a range that their sum is beyond."""
    f = jax.custom_vjp(lambda w: w)
    f.defvjp(lambda w: (w, None), lambda _, g: (jax.lax.reduce_precision(g, 4, 3),))
    return f(w)


@pytest.mark.parametrize("rule", [through_linear_call, in_eight_bits, of_low_precision])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_rules_that_hide_what_is_not_linear(rule, wrap):
    """Catches rules that look linear: 0.1 becomes 0.025, and 144 NaN."""
    w, x, scale = jnp.ones((2, 2)), jnp.ones((2 * K, 2)), 1 if rule is through_linear_call else 150
    loss = lambda w, x: scale * jnp.mean(jnp.sum(x @ wrap(rule)(w), -1))
    want = sum(jax.grad(loss)(w, x[i::K]) for i in range(K)) / K
    np.testing.assert_allclose(jaxaccum.value_and_grad(loss, K, prepare="auto")(w, x)[1], want, rtol=1e-6)
    plain = lambda w, x: scale * jnp.mean(jnp.sum(x @ w, -1))
    with pytest.raises(ValueError, match="can't be shown to be linear"):
        jaxaccum.value_and_grad(plain, K, prepare=wrap(rule))(w, x)


def test_a_scan_in_reverse_stays_one():
    """Catches layers that are run from the first to the last, of which only the casts are taken out."""
    rng = np.random.default_rng(0)
    stack, x = jnp.float32(rng.standard_normal((3, 4, 4))), jnp.float32(rng.standard_normal((2, 4)))

    def loss(stack, x):
        step = lambda c, w: (jnp.tanh(c @ half(w)).astype(c.dtype), jnp.sum(c))
        last, rows = jax.lax.scan(step, x, stack, reverse=True)
        return jnp.mean(last**2) + rows[0]

    prepare, rest = hoisting.split(loss, stack, x, in_place=False)
    assert len(prepare(stack)[1]) == 1
    np.testing.assert_allclose(rest(prepare(stack), x), loss(stack, x), rtol=1e-6)


def test_a_callback_on_parameters_runs_in_every_micro_batch():
    """Catches a print that runs once a window, or never."""
    seen = []

    def loss(w, x):
        jax.debug.callback(lambda total: seen.append(float(total)), half(w).sum())
        return (x @ half(w)).sum()

    jax.block_until_ready(jaxaccum.value_and_grad(loss, K, prepare="auto")(W, jnp.ones((K * N, 4))))
    jax.effects_barrier()
    assert seen == [16.0] * K


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable], ids=["none", "everything"])
@pytest.mark.parametrize("options", [{}, {"prepare": "auto"}], ids=str)
def test_what_is_rematerialised_stays_so(options, policy):
    """Catches a checkpoint, or its policy, that is lost where its body is rebuilt: every activation would be kept."""
    layer = lambda x, w: jnp.tanh(x @ half(w))
    loss = lambda w, x: jnp.sum(jax.checkpoint(layer, policy=policy)(half(x), w).astype(x.dtype))
    tanhs = lambda **options: str(
        jax.make_jaxpr(jaxaccum.value_and_grad(loss, K, **options))(W, jnp.ones((K * N, 4)))
    ).count(" tanh ")
    assert tanhs(**options) == tanhs(in_place=False) == (1 if policy else 2)


def test_a_jitted_function_of_parameters_and_of_data():
    """Catches two calls of one jitted function that share a program, though other arguments are parameters."""

    @jax.jit
    def similarity(a, b):
        return jnp.sum(a * b) / (jnp.sum(a**2) * jnp.sum(b**2))

    loss = lambda w, x: similarity(w, x) + 2 * similarity(x, w)
    w, x = 0.1 * jnp.arange(16.0).reshape(4, 4), jnp.sin(jnp.arange(16.0)).reshape(4, 4)
    got = jaxaccum.value_and_grad(loss, 1, prepare="auto")(w, x)
    for a, b in zip(got, jax.value_and_grad(loss)(w, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_casts_of_layers_are_hoisted_where_no_gradient_is_added_in_place():
    """Catches gradients of layers that are cast one by one for an addition that a weight from a key rules out."""
    layers, x, key = jnp.ones((3, 4, 4)), jnp.ones((4, 4)), jax.random.key(0)
    forward = lambda w, x: jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ half(w)), None), half(x), w)[0])
    by_key = lambda w, x, key: jaxaccum.Weighted(forward(w, x), jax.random.bernoulli(key))
    by_data = lambda w, x, key: jaxaccum.Weighted(forward(w, x), jnp.sum(x > 0))

    def casts(fun):
        window = jaxaccum.value_and_grad(fun, 2, key_argnums=2, prepare="auto")
        return str(jax.make_jaxpr(window)(layers, x, key)).count(":f32[4,4] = convert_element_type")

    assert (casts(by_key), casts(by_data)) == (0, 1)
