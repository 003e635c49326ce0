"""`prepare` runs once a window and rounds nothing on its way back; `cast` casts what can be cast, and nothing else."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxaccum
import jaxaccum.flax
from jaxaccum._gradient import once_per_window

K = 8
BF16 = jnp.bfloat16
EPS = float(jnp.finfo(BF16).eps)


def window(loss, **options):
    return jax.jit(jaxaccum.value_and_grad(loss, K, **options))


def to_bf16(tree):
    return jax.tree.map(lambda x: x.astype(BF16), tree)


@jax.custom_vjp
def marked(x):
    """Leaves one tan in a program for each time it runs forward, and one cbrt for each time it runs backward."""
    return jnp.tan(x)


marked.defvjp(lambda x: (marked(x), x), lambda x, cotangent: (cotangent * jnp.cbrt(x),))


def occurrences(program, operation):
    """How often an operation stands in a compiled program: (outside of its loops, inside them)."""
    functions = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*{\n(.*?)^}", program.as_text(), re.M | re.S))
    inside, todo = set(), re.findall(r"body=%?([\w.-]+)", program.as_text())
    while todo:
        name = todo.pop()
        inside.add(name)
        todo += set(re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", functions[name])) - inside
    count = lambda names: sum(len(re.findall(rf" {operation}\(", functions[name])) for name in names)
    return count(functions.keys() - inside), count(inside)


@pytest.mark.parametrize("traced_k", [False, True], ids=["static K", "traced K"])
def test_prepare_runs_once_a_window_forward_and_backward(traced_k):
    """Catches a prepare or its transpose inside the loop, and a prepare that runs once more for the way back."""
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w))

    def step(w, x, k):
        k = k if traced_k else K
        return jaxaccum.value_and_grad(loss, k, prepare=lambda w: to_bf16(marked(w)), stacked=True)(w, x)

    program = jax.jit(step).lower(jnp.ones((5, 3)), jnp.ones((K, 4, 5)), K).compile()
    assert occurrences(program, "tan") == (1, 0)
    assert occurrences(program, "cbrt") == (1, 0)
    assert occurrences(program, "tanh") == (0, 1)  # so the counting does see the loop


W = np.random.default_rng(0).standard_normal((6, 5))
FACTORS = {"a": W[:, :2], "b": W[:2] / 3}


def weight_norm(p):
    return {"w": p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True), "b": p["b"]}


PREPARES = {
    "weight norm": (weight_norm, {"g": W[:1], "v": W, "b": W[0]}),
    "low-rank merge": (lambda p: {"w": jnp.asarray(W) + p["a"] @ p["b"], "b": jnp.zeros(5)}, FACTORS),
    "dequantisation": (lambda p: {"w": p["q"] * p["scale"], "b": jnp.zeros(5)}, {"q": np.round(9 * W), "scale": W[:1]}),
    "another tree": (lambda p: {"w": jnp.stack(p[:6]), "b": p[6]["bias"]}, [*W, {"bias": W[1], "unused": W[2]}]),
    "truncation": (lambda p: {"w": 2 * p, "b": p[0].astype(int).astype(p.dtype)}, W),  # has no gradient
    "shared": (lambda p: {"w": jnp.concatenate([p, p]), "b": p[0]}, W[:3]),
    "jitted": (jax.jit(jax.jit(weight_norm)), {"g": W[:1], "v": W, "b": W[0]}),
    "a conditional": (lambda p: jax.lax.cond(p["w"][0, 0] > 9, jnp.sin, jnp.cos, p["w"]), {"w": W}),
}


@pytest.mark.parametrize("name", PREPARES)
def test_the_gradient_is_that_of_the_loss_composed_with_prepare(name):
    """Catches a transpose of the wrong function, a permuted tree, and a leaf used twice that counts once."""
    prepare, params = PREPARES[name]

    def loss(seen, x):
        w, b = (seen["w"], seen["b"]) if isinstance(seen, dict) else (seen, jnp.zeros(5))
        return jnp.mean(jnp.tanh(x @ w + b[None]) ** 2)

    with jax.enable_x64(True):
        params, x = jax.tree.map(jnp.asarray, (params, np.random.default_rng(1).standard_normal((4 * K, 6))))
        value, grads = window(loss, prepare=prepare)(params, x)
        want_value, want = jax.value_and_grad(lambda p, x: loss(prepare(p), x))(params, x)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
        jax.tree.map(close, (value, grads), (want_value, want))


def test_what_prepare_closes_over_may_be_traced():
    """Catches constants of prepare that leak from their trace or are lost: a frozen base beside trained factors."""

    def step(base, factors, x):
        padding = jnp.zeros((2, 5), BF16)  # never wider than it is, unlike what it is joined with
        prepare = lambda p: jnp.concatenate([to_bf16(base + p["a"] @ p["b"]), padding])[:6]
        return jaxaccum.value_and_grad(lambda w, x: jnp.sum(w.astype(x.dtype) * x), K, prepare=prepare)(factors, x)[1]

    x = jnp.asarray(np.resize(W, (K * 6, 5)), jnp.float32)
    factors = jax.tree.map(jnp.float32, FACTORS)
    grads = jax.jit(step)(jnp.float32(W), factors, x)
    mean = x.reshape(6, K, 5).mean(1)
    np.testing.assert_allclose(grads["a"], mean @ factors["b"].T, rtol=1e-2, atol=1e-2)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def quantised(backward):
    """Rounds to quarters, with a backward pass of its own: `backward(weights, cotangent)`."""

    @jax.custom_vjp
    def quantise(w):
        return jnp.round(4 * w) / 4

    quantise.defvjp(lambda w: (quantise(w), w), lambda w, cotangent: (backward(w, cotangent),))
    return quantise


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda w: jax.lax.map(f, w)])
@pytest.mark.parametrize("backward", [lambda w, ct: ct, lambda w, ct: jnp.where(abs(w) < 1, ct, 0), jnp.multiply])
def test_a_straight_through_estimator_is_a_prepare(backward, wrap):
    """Catches fake quantisation refused, or run with the gradient of its rounding."""
    prepare = wrap(quantised(backward))
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((4 * K, 6)))
        value, grads = window(loss, prepare=prepare)(jnp.asarray(W), x)
        want_value, want = jax.value_and_grad(lambda w, x: loss(prepare(w), x))(jnp.asarray(W), x)
        np.testing.assert_allclose(value, want_value, rtol=1e-12)
        np.testing.assert_allclose(grads, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: lambda w: jax.lax.map(f, w)])
@pytest.mark.parametrize(
    "backward", [lambda w, ct: jnp.clip(ct, -1, 1), lambda w, ct: ct**2, lambda w, ct: ct / jnp.linalg.norm(ct)]
)
def test_a_backward_pass_that_is_not_linear_is_refused(backward, wrap):
    """Catches gradients that are clipped once a window in place of once a micro-batch, in silence."""
    prepare = wrap(quantised(backward))
    loss = lambda w, x: jnp.mean(x @ w)
    message = "prepare calls quantise.*custom_vjp.*linear in its cotangents.*Call it in the loss"
    with pytest.raises(ValueError, match=message):
        window(loss, prepare=prepare)(jnp.ones((6, 5)), jnp.ones((K, 6)))
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, prepare=prepare)
    with pytest.raises(ValueError, match=message):
        tx.init(jnp.ones((6, 5)))
    state = jaxaccum.MultiSteps(optax.sgd(1.0), K, prepare=jnp.sin).init(jnp.ones((6, 5)))
    with pytest.raises(ValueError, match=message):
        tx.micro_step(loss, jnp.ones((6, 5)), state, jnp.ones((1, 6)), boundary=True)


def test_a_solve_is_a_prepare():
    """Catches a rule of jax's own, as that of a linear solve, taken for a user's."""
    cayley = lambda w: jnp.linalg.solve(jnp.eye(5) + w - w.T, jnp.eye(5) - w + w.T)
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((4 * K, 5)))
        _, grads = window(loss, prepare=cayley)(jnp.asarray(W[:5]), x)
        np.testing.assert_allclose(grads, jax.grad(lambda w: loss(cayley(w), x))(jnp.asarray(W[:5])), atol=1e-12)


MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
REPLICATED = NamedSharding(MESH, PartitionSpec())
CASTS = {
    "a cast": to_bf16,
    "cast": jaxaccum.cast(BF16, where=lambda path, leaf: True),
    "after other work": lambda w: to_bf16(jnp.sin(w) + w),
    "jitted": jax.jit(to_bf16),
    "jitted in a jitted one": jax.jit(lambda w: jax.jit(lambda w: to_bf16(w + w))(w / 2)),
    "twice": lambda w: to_bf16(w.astype(jnp.float16)),
    "and back": lambda w: to_bf16(w).astype(jnp.float32),
    "transposed": lambda w: to_bf16(w).T,
    "cut up": lambda w: jnp.split(to_bf16(w), 2),
    "stacked": lambda w: jnp.stack([to_bf16(w[:4]), to_bf16(w[4:])]),
    "replicated": lambda w: jax.lax.with_sharding_constraint(to_bf16(w), REPLICATED),
}


def scaled_sum(tree, x):
    return jnp.sum(x) * sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", CASTS)
def test_a_last_cast_does_not_round_the_summed_gradient(name):
    """Catches the transpose of a cast, which rounds the window's sum to bfloat16 behind a float32 accumulator."""
    x = 1 + EPS * jnp.arange(K)  # each is a number of bfloat16, their mean is not
    w = jnp.linspace(-1, 1, 64).reshape(8, 8) if name == "after other work" else jnp.ones((8, 8))
    # Not jitted: XLA may leave out a rounding between two operations, and hide the bug on some backends.
    _, grads = jaxaccum.value_and_grad(scaled_sum, K, prepare=CASTS[name])(w, x)
    want = jnp.mean(x) * (jnp.cos(w) + 1 if name == "after other work" else jnp.ones_like(w))
    np.testing.assert_allclose(grads, want, rtol=1e-6)


def test_a_gradient_gathered_once_is_scattered_unrounded():
    """Catches a reduce-scatter in bfloat16 behind `all_gather(cast(params))`, fsdp's prepare."""
    gather = lambda w: jax.lax.all_gather(to_bf16(w), "data", tiled=True)
    f = jaxaccum.value_and_grad(scaled_sum, K, prepare=gather)
    specs = dict(in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=(PartitionSpec(), PartitionSpec("data")))
    x = 1 + EPS * jnp.arange(K)
    _, grads = jax.shard_map(f, mesh=MESH, check_vma=False, **specs)(jnp.ones((8, 3)), x)
    np.testing.assert_allclose(grads, 8 * jnp.mean(x) * jnp.ones((8, 3)), rtol=1e-6)


@pytest.mark.parametrize("prepare", [lambda w: w, jnp.transpose, lambda w: w.astype(jnp.float32)])
def test_bfloat16_parameters_can_have_a_float32_gradient(prepare):
    """Catches a mean that is rounded to the parameters' dtype before `grad_dtype` can have its say."""
    x = 1 + EPS * jnp.arange(K)
    f = jaxaccum.value_and_grad(scaled_sum, K, prepare=prepare, grad_dtype=jnp.float32)
    np.testing.assert_allclose(f(jnp.ones((8, 8), BF16), x)[1], jnp.mean(x) * jnp.ones((8, 8)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_gradients_come_back_in_the_parameters_dtype(dtype):
    """Catches a prepare that leaves its own dtype, or the sum's, on the gradient."""
    loss = lambda w, x: jnp.sum(jnp.abs(w)) * jnp.sum(x)
    _, grads = window(loss, prepare=lambda p: p["w"] * 2)({"w": jnp.ones(3, dtype)}, jnp.ones(K))
    assert grads["w"].dtype == dtype
    np.testing.assert_allclose(grads["w"], 2.0)


def casts_of(loss, params, *args, **options):
    """The names of the leaves that `cast` shows the loss in bfloat16, and how often it traced the loss."""
    seen = []

    def spy(params, *args):
        seen.append({k: v.dtype for k, v in params.items()})
        return loss(params, *args)

    jax.eval_shape(jaxaccum.value_and_grad(spy, K, **options), params, *args)
    return {name for name, dtype in seen[-1].items() if dtype == BF16}, len(seen)


PARAMS = {"e": jnp.ones((10, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4)}
TOKENS = jnp.zeros((2 * K, 3), jnp.int32)
layer = lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None])
of_rows = lambda p, x: jnp.mean(layer(p, x.reshape(-1, 4)))


def embedded(p, tokens):
    return of_rows(p, p["e"][tokens])


@jax.custom_vjp
def with_own_gradient(p, tokens):
    return embedded(p, tokens)


with_own_gradient.defvjp(lambda p, t: (embedded(p, t), p), lambda p, g: (jax.tree.map(jnp.zeros_like, p), None))

GATHERING = {
    "indexing": embedded,
    "take": lambda p, t: of_rows(p, jnp.take(p["e"], t, axis=0)),
    "take_along_axis": lambda p, t: of_rows(p, jnp.take_along_axis(p["e"], t.reshape(-1, 1).repeat(4, 1), axis=0)),
    "nnx's Embed": lambda p, t: of_rows(p, jnp.asarray(nnx_embed(p["e"])(t))),
    "linen's Embed": lambda p, t: of_rows(p, nn.Embed(10, 4).apply({"params": {"embedding": p["e"]}}, t)),
    "tied": lambda p, t: jnp.mean(layer(p, p["e"][t].reshape(-1, 4)) @ p["e"].T),
    "from a bfloat16 copy": lambda p, t: of_rows(p, (2 * to_bf16(p["e"]))[t]),
    "from a masked copy": lambda p, t: of_rows(p, jnp.where(jnp.arange(10)[:, None] > 0, p["e"], 0.0)[t]),
    "with a padding row": lambda p, t: of_rows(p, p["e"].at[0].set(0.0)[t]),
    "in jit": jax.jit(embedded),
    "in remat": jax.checkpoint(embedded),
    "in vmap": lambda p, t: jnp.mean(jax.vmap(embedded, (None, 0))(p, t)),
    "in a branch": lambda p, t: jax.lax.cond(t[0, 0] > 0, lambda: embedded(p, t), lambda: of_rows(p, p["w"])),
    "in custom_vjp": with_own_gradient,
    "in a scan": lambda p, t: of_rows(p, jax.lax.map(lambda t: p["e"][t], t)),
    "row by row": lambda p, t: of_rows(p, jax.lax.map(lambda t: p["e"][t], t.reshape(-1))),
}


def nnx_embed(embedding):
    embed = nnx.Embed(*embedding.shape, rngs=nnx.Rngs(0))
    embed.embedding[...] = embedding
    return embed


@pytest.mark.parametrize("name", GATHERING)
def test_cast_leaves_vectors_and_gathered_leaves_and_casts_matrices(name):
    """Catches an embedding whose gradient is a scatter-add in bfloat16, and a choice that is blind in a nested call."""
    assert casts_of(GATHERING[name], PARAMS, TOKENS, prepare=jaxaccum.cast(BF16))[0] == {"w"}


X = jnp.ones((2 * K, 3, 4))
steps = lambda f, carry, xs: jax.lax.scan(lambda carry, x: (f(carry, x), None), carry, xs)[0]
IN_LOOPS = {
    "a recurrent kernel": (lambda p, x: jnp.mean(steps(lambda h, x: layer(p, h) + x, x[:, 0], x.swapaxes(0, 1))), {}),
    "a head in chunks": (lambda p, x: jnp.mean(jax.lax.map(lambda x: jnp.mean(layer(p, x)), x)), {}),
    "layers": (lambda p, x: jnp.mean(steps(lambda x, p: layer(p, x), x[:, 0], p)), {"w"}),
    "layers with remat": (lambda p, x: jnp.mean(steps(jax.checkpoint(lambda x, p: layer(p, x)), x[:, 0], p)), {"w"}),
    "layers in chunks": (
        lambda p, x: jnp.mean(jax.lax.map(lambda x: steps(lambda x, p: layer(p, x), x, p), x)),
        {},
    ),
}


@pytest.mark.parametrize("name", IN_LOOPS)
def test_cast_leaves_what_a_loop_uses_in_each_iteration_and_casts_layers(name):
    """Catches a kernel whose gradient is summed over a loop in bfloat16, and stacked biases taken for a matrix."""
    loss, want = IN_LOOPS[name]
    stacked = {"w": jnp.ones((5, 4, 4)), "b": jnp.ones((5, 4))}
    params = stacked if name.startswith("layers") else {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    assert casts_of(loss, params, X, prepare=jaxaccum.cast(BF16))[0] == set(want)


def test_products_and_activations_do_not_keep_a_leaf_from_its_cast():
    """Catches a head that stays wide because its logits are gathered from, and a kernel that a product hides."""
    params = {
        "embed": jnp.ones((10, 4)),
        "conv": jnp.ones((3, 4, 4)),
        "head": jnp.ones((4, 10)),
        "twice": jnp.ones((4, 4)),
    }

    def loss(p, tokens):
        x = jax.nn.one_hot(tokens, 10) @ p["embed"]
        x = jax.lax.conv_general_dilated(
            x.astype(p["conv"].dtype), p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        logits = jnp.tanh(jnp.tanh(x @ p["twice"]) @ p["twice"]) @ p["head"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1))

    assert casts_of(loss, params, TOKENS, prepare=jaxaccum.cast(BF16))[0] == params.keys()


def test_where_alone_decides_and_only_the_default_traces_the_loss_again():
    """Catches a `where` that is asked and overruled, integers or names it cannot know, and a needless trace."""
    asked = []
    where = lambda path, leaf: asked.append((path, leaf.shape)) or path in ("e", "b")
    assert casts_of(embedded, PARAMS, TOKENS, prepare=jaxaccum.cast(BF16, where)) == ({"e", "b"}, 1)
    assert sorted(asked) == [("b", (4,)), ("e", (10, 4)), ("w", (4, 4))]
    assert casts_of(embedded, PARAMS, TOKENS) == (set(), 1)
    assert casts_of(embedded, PARAMS, TOKENS, prepare=to_bf16) == ({"e", "w", "b"}, 1)
    assert casts_of(embedded, PARAMS, TOKENS, prepare=jaxaccum.cast(BF16)) == ({"w"}, 2)


VOCABULARY, WIDTH, LENGTH = 512, 32, 32


def language_model(params, tokens, dtype):
    """A language model's loss, computed in `dtype`: 2 layers of attention and perceptron, float32 (or wider) logits.

    The layers are stacked and scanned; the embedding is tied, and a second head goes over chunks of the tokens. Each
    parameter is cast where it is used, as flax's layers do: `window(loss)` casts inside the loss.
    """
    cast = lambda x: x.astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    norm = lambda x: cast(x / jnp.sqrt(jnp.mean(jnp.square(x.astype(wide)), -1, keepdims=True) + 1e-6))

    def layer(x, p):
        q, k, v = jnp.split(norm(x) * cast(p["scale"])[None, None] @ cast(p["qkv"]), 3, axis=-1)
        scores = (q @ k.swapaxes(1, 2)).astype(wide) / WIDTH**0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(LENGTH, dtype=bool)[None], scores, -jnp.inf))
        x = x + cast(weights) @ v @ cast(p["out"])
        return x + jax.nn.gelu(norm(x) @ cast(p["up"])) @ cast(p["down"]), None

    def cross_entropy(head, x, targets):
        logits = jax.nn.log_softmax((x @ cast(head).T).astype(wide))
        return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], -1))

    x, _ = jax.lax.scan(layer, cast(params["embed"][tokens[:, :-1]]), params["layers"])
    x, targets = norm(x).reshape(32, -1, WIDTH), tokens[:, 1:].reshape(32, -1)
    in_chunks = jax.lax.map(lambda chunk: cross_entropy(params["head"], *chunk), (x, targets))
    return cross_entropy(params["embed"], x, targets) + jnp.mean(in_chunks)


def zipf_tokens(rng, *shape):
    """Token k + 1 comes half, a third... as often as token 0, which is every seventh."""
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    return rng.choice(VOCABULARY, shape, p=frequencies / frequencies.sum())


def language_model_inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32) / shape[-2] ** 0.5
    layers = {"qkv": normal(2, WIDTH, 3 * WIDTH), "out": normal(2, WIDTH, WIDTH)}
    layers |= {"up": normal(2, WIDTH, 4 * WIDTH), "down": normal(2, 4 * WIDTH, WIDTH), "scale": 1 + normal(2, WIDTH)}
    params = {"embed": 4 * normal(VOCABULARY, WIDTH), "head": 4 * normal(VOCABULARY, WIDTH), "layers": layers}
    return params, zipf_tokens(rng, 8 * K, LENGTH + 1)


def errors(grads, reference):
    """Relative errors in the norm: of each leaf, and of all of them together."""
    norm = lambda leaves: np.sqrt(sum(np.sum(np.square(x)) for x in leaves))
    difference = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), grads, reference)
    named = lambda tree: {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    difference, reference = named(difference), named(reference)
    each = {name: norm([difference[name]]) / norm([reference[name]]) for name in reference}
    return each | {"all": norm(difference.values()) / norm(reference.values())}


@functools.cache
def exact_gradient():
    params, tokens = language_model_inputs()
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(functools.partial(language_model, dtype=jnp.float64)))
        return jax.tree.map(np.asarray, gradient(jax.tree.map(np.float64, params), tokens))


@functools.cache
def window_errors(prepare=None):
    """The errors of a window's gradient against float64."""
    f = window(functools.partial(language_model, dtype=BF16), prepare=prepare)
    return errors(f(*language_model_inputs())[1], exact_gradient())


def ratios_to_casting_inside(prepare):
    inside, prepared = window_errors(), window_errors(prepare)
    assert 1e-3 < inside["all"] < 0.02
    ratios = {name: float(prepared[name] / inside[name]) for name in inside}
    print(inside["all"], ratios)
    return ratios


EVERY_MATRIX = jaxaccum.cast(BF16, where=lambda path, leaf: leaf.ndim >= 2)


def test_cast_costs_no_more_precision_than_casting_inside_the_loss():
    """Catches a leaf whose gradient is formed in another dtype than where the loss casts: 1.1 times is the promise."""
    assert max(ratios_to_casting_inside(jaxaccum.cast(BF16)).values()) <= 1.1


def test_casting_what_a_loop_uses_again_breaks_the_promise():
    """Catches a promise that anything keeps: a head's gradient summed over 32 chunks in bfloat16 must show."""
    assert ratios_to_casting_inside(EVERY_MATRIX)["['head']"] > 1.1


def test_casting_an_embedding_before_its_gather_is_badly_wrong():
    """Catches the reason for the default choice gone: 600 equal terms of the commonest token sum to 256."""
    embed, tokens = np.zeros((VOCABULARY, WIDTH), np.float32), zipf_tokens(np.random.default_rng(0), K, 4096)
    loss = lambda p, tokens: jnp.sum((p["embed"][tokens].astype(BF16) - 1).astype(jnp.float32) ** 2)
    exact = {"embed": -2 / K * np.bincount(tokens.ravel())[:, None] * np.ones(WIDTH)}
    error = lambda prepare: errors(window(loss, prepare=prepare)({"embed": embed}, tokens)[1], exact)["all"]
    assert error(None) == error(jaxaccum.cast(BF16)) == 0
    assert error(EVERY_MATRIX) > 0.3


class Block(nnx.Module):
    """A pre-norm transformer block that computes in bfloat16."""

    def __init__(self, rngs):
        options = dict(dtype=BF16, rngs=rngs)
        self.norm = nnx.LayerNorm(8, **options)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, **options)
        self.up, self.down = nnx.Linear(8, 16, **options), nnx.Linear(16, 8, **options)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class NnxModel(nnx.Module):
    """A tied language model; the dtypes that its parameters were last seen in stand in `seen`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(12, 8, dtype=BF16, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x).astype(jnp.float32)


class LinenModel(nn.Module):
    """The same without attention, its layers scanned and rematerialised."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 8, dtype=BF16)
        layer = lambda module, x, _: (x + nn.gelu(module(x)), None)
        scan = nn.scan(nn.remat(layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(nn.Dense(8, dtype=BF16), embed(tokens), None)
        return embed.attend(x).astype(jnp.float32)


def next_token_loss(model, tokens):
    logits = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))


def paths_asked(params):
    """The paths that `where` is asked about."""
    paths = []
    jaxaccum.cast(BF16, where=lambda path, leaf: paths.append(path))(params)
    return sorted(paths)


def dtypes_by_path(tree):
    named = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    return {named(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_near(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=0.1, atol=2e-3)


FLAX_TOKENS = jax.random.randint(jax.random.key(0), (2 * K, 6), 0, 12)


def test_an_nnx_transformer_is_cast_once_a_window():
    """Catches a choice that nnx's state hides, and paths that end in the field of nnx's box."""
    model, seen = NnxModel(), []

    def loss(model, tokens):
        seen.append(dtypes_by_path(nnx.state(model, nnx.Param)))
        return next_token_loss(model, tokens)

    _, grads = nnx.jit(jaxaccum.flax.value_and_grad(loss, K, prepare=jaxaccum.cast(BF16)))(model, FLAX_TOKENS)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    attention = [f"attention/{name}" for name in ("query/kernel", "key/kernel", "value/kernel", "out/kernel")]
    attention += [f"attention/{name}" for name in ("query/bias", "key/bias", "value/bias")]  # (heads, width) each
    layer = [*attention, "up/kernel", "down/kernel"]
    assert {path for path, dtype in seen[1].items() if dtype == BF16} == {
        f"blocks/{i}/{name}" for i in range(2) for name in layer
    }
    assert paths_asked(nnx.state(model, nnx.Param)) == sorted(seen[0])
    assert {"embed/embedding", "blocks/1/up/kernel"} < seen[0].keys()


def test_a_linen_model_with_scanned_layers_is_cast_once_a_window():
    """Catches a choice that linen's scan and remat hide, and stacked biases taken for a matrix."""
    module, seen = LinenModel(), []
    variables = jax.jit(module.init)(jax.random.key(1), FLAX_TOKENS)

    def loss(model, tokens):
        seen.append(dtypes_by_path(model.variables["params"]))
        return next_token_loss(model, tokens)

    f = lambda prepare: jax.jit(jaxaccum.flax.linen_value_and_grad(module, loss, K, prepare=prepare))
    assert_near(*(f(prepare)(variables, FLAX_TOKENS)[1] for prepare in (jaxaccum.cast(BF16), None)))
    assert {path for path, dtype in seen[1].items() if dtype == BF16} == {"Dense_0/kernel"}
    assert paths_asked(variables["params"]) == ["Dense_0/bias", "Dense_0/kernel", "Embed_0/embedding"]


def fp16(w):
    return jnp.tanh(w.astype(jnp.float16))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("prepare", ["auto", fp16])
def test_a_sum_does_not_overflow_where_no_gradient_does(prepare, traced):
    """Catches inf for 16,224: K cotangents, with a usual loss scale, are together beyond the range of float16."""
    w, x = jnp.full((2, 2), 0.1), jnp.ones((2 * K, 2))
    scaled = lambda w, x: 2.0**15 * jnp.mean((x.astype(jnp.float16) @ w).astype(jnp.float32))
    loss = scaled if callable(prepare) else lambda w, x: scaled(fp16(w), x)
    if traced:
        f = lambda k: jaxaccum.value_and_grad(loss, k, stacked=True, prepare=prepare)(w, x.reshape(K, 2, 2))
        got = jax.jit(f)(jnp.int32(K))
    else:
        got = jaxaccum.value_and_grad(loss, K, prepare=prepare)(w, x)
    want = jax.value_and_grad(lambda w, x: scaled(fp16(w), x))(w, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3), got, want)


def test_a_sum_of_micro_steps_does_not_overflow():
    """Catches the same in a stream."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, prepare=fp16)
    w, x = jnp.full((2, 2), 0.1), jnp.ones((2, 2))
    loss = lambda w, x: 2.0**15 * jnp.mean((x.astype(jnp.float16) @ w).astype(jnp.float32))
    p, state = w, tx.init(w)
    for _ in range(K):
        _, p, state = tx.micro_step(loss, p, state, x)
    np.testing.assert_allclose(w - p, jax.grad(lambda w: loss(fp16(w), x))(w), rtol=2e-3)


def test_what_has_no_gradient_is_refused():
    """Catches jax's own error about an argument that the user did not pass."""
    f = jaxaccum.value_and_grad(lambda s, x: jnp.mean(x @ (s[0] * s[1])), K, prepare=lambda w: (w, w > 0))
    with pytest.raises(TypeError, match=r"what prepare returns holds bool at \[1\]"):
        f(jnp.ones((2, 2)), jnp.ones((2 * K, 2)))


def test_statistics_that_lose_their_name_are_refused():
    """Catches statistics of fp8 layers that are summed because prepare returns them elsewhere."""
    variables = {"params": jnp.ones(()), "_overwrite_with_gradient": jnp.ones(())}
    prepare = lambda v: (v["params"], v["_overwrite_with_gradient"])
    f = jaxaccum.value_and_grad(lambda v, x: jnp.mean(v[0] * v[1] * x), K, prepare=prepare)
    with pytest.raises(ValueError, match="prepare returns 0 of 1 statistics under '_overwrite_with_gradient'"):
        f(variables, jnp.ones(K))


@pytest.mark.parametrize(
    ("value", "auto", "error"),
    [
        (None, False, None),
        (jnp.sin, False, None),
        (None, True, None),
        (jnp.sin, True, None),
        ("auto", True, None),
        ("auto", False, (ValueError, 'None or a function of the parameters, got .auto.; "auto" is an option of')),
        ("all", True, (ValueError, '"auto", None or a function of the parameters, got .all.[.]')),
        ("all", False, (ValueError, "None or a function of the parameters, got .all.; ")),
        (3, True, (TypeError, "None or a function of the parameters, got 3[.]")),
        (3, False, (TypeError, "None or a function of the parameters, got 3[.]")),
    ],
)
def test_what_may_be_a_prepare(value, auto, error):
    """Catches a word that is called, or one that is accepted where nothing is hoisted."""
    if error is None:
        once_per_window.check_argument(value, auto=auto)
    else:
        with pytest.raises(error[0], match=f"prepare must be {error[1]}"):
            once_per_window.check_argument(value, auto=auto)


def test_what_is_kept_between_micro_steps():
    """Catches parameters that are kept twice, and values that are restored in each other's place."""
    params = {"a": jnp.ones(2), "b": jnp.full(3, 2.0)}
    prepare = lambda p: (p["b"], jnp.sin(p["a"]), p["a"], 3.0, p["b"] * 2, p["b"])
    made, kept = once_per_window.compute(prepare, params)
    jax.tree.map(np.testing.assert_array_equal, made, prepare(params))
    jax.tree.map(np.testing.assert_array_equal, kept, (jnp.sin(params["a"]), 3.0, params["b"] * 2))
    restored = once_per_window.restore(prepare, params, tuple(x + 1 for x in kept))
    want = (params["b"], jnp.sin(params["a"]) + 1, params["a"], 4.0, params["b"] * 2 + 1, params["b"])
    jax.tree.map(np.testing.assert_array_equal, restored, want)


OF_AXES = {
    "not": (lambda p: p, ((), ())),
    "one": (lambda p: (jax.lax.all_gather(p[0], "a"), p[1]), (("a",), ())),
    "two": (lambda p: [jax.lax.all_gather(x, ("b", "a")) for x in p], (("a", "b"), ("a", "b"))),
    "in turn": (lambda p: (p[0], jax.lax.all_gather(jax.lax.all_gather(p[1], "b"), "a")), ((), ("a", "b"))),
    "another axis": (lambda p: (jax.lax.all_gather(p[0], "c"), jax.lax.all_gather(p[1], ("c", "a"))), ((), ("a",))),
    "in a jit": (lambda p: jax.jit(lambda x, y: (jax.lax.all_gather(y, "a"), x))(*p), ((), ("a",))),
    "together": (lambda p: jax.lax.all_gather(p[0] + p[1], "b"), (("b",), ("b",))),
    "unused": (lambda p: jax.lax.all_gather(p[1], "a"), ((), ("a",))),
    "beside a constant": (lambda p: (p[0] * 2, jax.lax.all_gather(jnp.ones(2), "a") + p[1].sum()), ((), ())),
    "twice": (lambda p: (jax.lax.all_gather(p[0], "a"), p[0], p[1]), r"hands params\[0\] on gathered over \('a',\)"),
    "over other axes": (lambda p: (p[0], [jax.lax.all_gather(p[1], name) for name in "ab"]), r"hands params\[1\] on"),
    "a sum": (lambda p: jax.lax.psum(p[0], ("a", "b")), r"prepare calls psum\w* over \['a', 'b'\]"),
    "a loop": (lambda p: jax.lax.map(lambda x: jax.lax.all_gather(x, "a"), p[0]), r"prepare calls scan over \['a'\]"),
    "groups": (
        lambda p: jax.lax.all_gather(p[0], "a", axis_index_groups=[[0], [1]]),
        r"prepare calls all_gather over \['a'\]",
    ),
}


@pytest.mark.parametrize("name", OF_AXES)
def test_the_axes_that_parameters_are_gathered_over(name):
    """Catches a gradient that is summed over an axis twice or never, and a collective that has no way back."""
    prepare, want = OF_AXES[name]
    mesh = jax.make_mesh((2, 1, 2), ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    found = []

    def body(x):
        params = [x, 2 * x]
        if isinstance(want, str):
            with pytest.raises((ValueError, NotImplementedError), match=want):
                once_per_window.gathered_axes(prepare, params, ("a", "b"))
        else:
            found.extend(once_per_window.gathered_axes(prepare, params, ("a", "b")))
        return x

    over = PartitionSpec(("a", "b", "c"))
    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=over, out_specs=over, check_vma=False), jnp.ones(8))
    assert isinstance(want, str) or tuple(found) == want


def test_powers_of_two():
    """Catches a scale under which the sum still overflows, or that loses a digit more than it must."""
    got = [float(once_per_window._power_of_two(count)) for count in (1, 2, 3, 4, 5, 8, 9, 1000)]
    assert got == [1, 2, 4, 4, 8, 8, 16, 1024]


@pytest.mark.parametrize("dtype", [jnp.float16, BF16, jnp.float8_e4m3fn, jnp.float64, jnp.complex64, jnp.int8])
def test_sums_are_scaled_for_dtypes_of_a_small_range(dtype):
    """Catches a sum that overflows on its way back through float16, and a product where nothing can."""
    with jax.enable_x64(True):
        prepare = lambda w: jnp.sin(jnp.real(w.astype(dtype).astype(jnp.complex64)).astype(jnp.float32)) + w
        back = lambda w, count: once_per_window.with_transpose(prepare, w)[1](w, count)
        program = str(jax.make_jaxpr(back)(jnp.ones(2, jnp.float32), 3))
    assert ("clz" in program) == (dtype in (jnp.float16, jnp.float8_e4m3fn))
