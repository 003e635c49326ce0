"""A window whose weights come from the data: exact as with a selection, at the speed and in the memory of a plain loss.

A micro-batch of weight 0 repeats another under the cotangent 0. No gradient is selected, and nothing of it is added.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._gradient import substitution

K, N, WIDTH, LAYERS = 4, 2, 16, 3
KEY = jax.random.key(7)


def params(layers=LAYERS):
    draw = lambda i, *shape: 0.3 * jax.random.normal(jax.random.key(i), shape)
    return {"layers": draw(0, layers, WIDTH, WIDTH), "head": draw(1, WIDTH, WIDTH), "bias": draw(2, WIDTH)}


def forward(p, x):
    h = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, p["layers"])[0]
    return h @ p["head"] + p["bias"]


def plain(p, b):
    return jnp.mean(forward(p, b["x"]) ** 2)


def loss(p, b):
    """Each example's squares, where its mask is 1."""
    squares = jnp.sum(forward(p, b["x"]) ** 2, axis=1)
    return jaxaccum.Weighted(jnp.sum(jnp.where(b["valid"], squares, 0) * b["mask"]), jnp.sum(b["mask"]))


def batch(out=(), k=K, n=N):
    """Leaves (n·k, ...); micro-batches `out` have weight 0 and hold NaN, numbers out of range and flags that lie."""
    rows = jnp.arange(n * k)
    is_out = jnp.isin(rows % k, jnp.array(out, int))
    x = jnp.where(is_out[:, None], jnp.nan, jax.random.normal(jax.random.key(3), (n * k, WIDTH)))
    tokens = jnp.where(is_out, 2**30, rows % WIDTH)
    return {"x": x, "valid": rows >= 0, "mask": jnp.where(is_out, 0.0, rows % 3 + 0.5), "tokens": tokens}


def without(b, out, k=K):
    """The batch of the other micro-batches."""
    return jax.tree.map(lambda x: jnp.delete(x, np.flatnonzero(np.isin(np.arange(len(x)) % k, out)), axis=0), b)


def stack(b, k=K, i=slice(None)):
    """The micro-batches, as rows; or micro-batch i."""
    return jax.tree.map(lambda x: x.reshape(-1, k, *x.shape[1:]).swapaxes(0, 1)[i], b)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * 1e-2)


def mesh_of(devices, kind="auto"):
    return jax.make_mesh((devices,), ("data",), axis_types=(KINDS[kind],), devices=jax.devices()[:devices])


def of_window(loss, *args, options=None, wrap=lambda f: f):
    """The compiled program of a window."""
    return jax.jit(wrap(jaxaccum.value_and_grad(loss, K, **(options or {})))).lower(*args).compile()


def selects(program, shapes):
    """How many selections a program has, fused or not, of arrays of these shapes."""
    listed = "|".join(",".join(map(str, shape)) for shape in shapes)
    return len(re.findall(rf"\[({listed})\]\S* select\(", program.as_text()))


def conditionals(program):
    return len(re.findall(r" conditional\(", program.as_text()))


def selecting(f, *args):
    """Whether a window selects gradients in its loop: it has a selection of a parameter's shape there."""
    shapes = {x.shape for x in jax.tree.leaves(params())} - {(WIDTH,)}

    def has(jaxpr, inside):
        for eqn in jaxpr.eqns:
            bodies = [
                getattr(x, "jaxpr", x) for p in eqn.params.values() for x in (p if isinstance(p, tuple) else (p,))
            ]
            loops = (
                inside or (eqn.primitive.name == "scan" and eqn.params["length"] == K) or eqn.primitive.name == "while"
            )
            if inside and eqn.primitive.name == "select_n" and eqn.outvars[0].aval.shape in shapes:
                return True
            if any(has(body, loops) for body in bodies if hasattr(body, "eqns")):
                return True
        return False

    return has(jax.make_jaxpr(f)(*args).jaxpr, False)


OPTIONS = [{}, {"prepare": "auto"}, {"prepare": jaxaccum.cast(jnp.bfloat16)}, {"unroll": 2}, {"in_place": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_program_is_that_of_a_plain_loss(options):
    """Catches a selection of gradients in each micro-batch, and a conditional around a backward pass."""
    matrices = [(LAYERS, WIDTH, WIDTH), (1, WIDTH, WIDTH), (WIDTH, WIDTH)]
    programs = [of_window(fun, params(), batch(), options=options) for fun in (plain, loss)]
    assert [conditionals(program) for program in programs] == [0, 0]
    # Once a window the sums are selected, for one in which nothing counts.
    assert selects(programs[1], matrices) - selects(programs[0], matrices) <= 2
    assert not selecting(jaxaccum.value_and_grad(loss, K, **options), params(), batch())


def test_the_sums_of_nothing_are_cleared_in_place():
    """Catches a selection on a GPU of either kind, or a conditional elsewhere, which copy the sums once a window."""
    cleared = jax.jit(lambda kept, sums: substitution.Substitution(kept, kept).sums(sums))
    traced = cleared.trace(jnp.ones(K, bool), jnp.ones(WIDTH))
    text = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text()
    cpu, tpu, cuda, rocm = (text(platform).count("stablehlo.case") for platform in ("cpu", "tpu", "cuda", "rocm"))
    assert cuda == rocm == cpu + 1 == tpu + 1


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_memory(options):
    """Catches room for a second gradient, or for copies of the sums that a conditional takes."""
    temporary = lambda fun: of_window(fun, params(64), batch(), options=options).memory_analysis().temp_size_in_bytes
    assert temporary(loss) <= 1.05 * temporary(plain)


@pytest.mark.parametrize("options", [{}, {"prepare": "auto"}], ids=str)
def test_products_add_to_their_sums(options):
    """Catches products that are rounded, since a selection would follow."""
    half = lambda w, x: jnp.sum((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)
    fun = lambda w, x: jaxaccum.Weighted(half(w, x), jnp.sum(x[:, 0] > 0))
    lowered = jax.jit(jaxaccum.value_and_grad(fun, K, **options)).trace(jnp.ones((16, 24)), jnp.ones((K * 8, 16)))
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert "(tensor<8x16xbf16>, tensor<8x24xbf16>) -> tensor<16x24xf32>" in text


FORMS = {
    "split": lambda fun, k, b, **options: jaxaccum.value_and_grad(fun, k, **options)(params(), b),
    "stacked": lambda fun, k, b, **options: jaxaccum.value_and_grad(fun, k, stacked=True, **options)(
        params(), stack(b, k)
    ),
    "traced": lambda fun, k, b, **options: jax.jit(
        lambda k, b: jaxaccum.value_and_grad(fun, k, stacked=True, **options)(params(), b)
    )(k, jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), stack(b, k))),
}


@pytest.mark.parametrize("out", [(0,), (1,), (K - 1,), (0, 1), (1, 3), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_micro_batch_of_weight_zero_changes_nothing(form, out):
    """Catches one bit of a micro-batch that doesn't count, or the first one counted twice."""
    b = batch(out)
    got, want = FORMS[form](loss, K, b), FORMS[form](loss, K - len(out), without(b, out))
    assert np.isfinite(got[0])
    assert_equal(got, want) if len(out) < K - 1 else assert_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_under_each_option(options, dtype):
    """Catches an option under which what doesn't count is added, and sums in bfloat16 that 0 would change."""
    if dtype == jnp.bfloat16 and options.get("unroll"):
        pytest.skip("the stochastic rounding is seeded by the micro-step's number")
    window = lambda k, b: jaxaccum.value_and_grad(loss, k, accumulator_dtype=dtype, **options)(params(), b)
    if options.get("unroll"):
        got, want = window(K, batch((1, 3))), jaxaccum.value_and_grad(loss, 2)(params(), without(batch((1, 3)), (1, 3)))
        return assert_close(got, want, rtol=1e-5)
    return assert_equal(window(K, batch((K - 1,))), window(K - 1, without(batch((K - 1,)), (K - 1,))))


@pytest.mark.parametrize("form", FORMS)
def test_a_window_in_which_nothing_counts(form):
    """Catches 0 times NaN."""
    value, grads = FORMS[form](loss, K, batch(range(K)))
    assert_equal((value, grads), jax.tree.map(jnp.zeros_like, (value, grads)))


def test_beyond_a_traced_k():
    """Catches a micro-batch that is borrowed from behind the window's end."""
    b = stack(batch((2, 3)))
    b["mask"] = b["mask"].at[:2].set(0.0).at[2:].set(1.0)
    f = jax.jit(lambda k: jaxaccum.value_and_grad(loss, k, stacked=True)(params(), b))
    value, grads = f(2)
    assert_equal((value, grads), jax.tree.map(jnp.zeros_like, (value, grads)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [(1,), (0, 1, 2, 3), (0, 1, 2, 3, 5)], ids=str)
def test_on_a_mesh(kind, out):
    """Catches NaN from a device on which nothing counts, and a micro-batch borrowed from another device."""
    mesh = mesh_of(2, kind)
    # Micro-batch i of device p is number p·K + i here.
    rows = [batch([i - p * K for i in out if p * K <= i < p * K + K]) for p in range(2)]
    b = jax.tree.map(lambda *x: jnp.concatenate(x), *rows)
    b["x"] = b["x"] * jnp.where(jnp.arange(2 * K * N) < K * N, 1, 2)[:, None]
    counts = np.flatnonzero(np.asarray(b["mask"]) > 0)
    big = lambda p: (lambda w: w.total / w.weight)(loss(p, jax.tree.map(lambda x: x[counts], b)))
    placed = jax.device_put(b, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        f = jax.jit(jaxaccum.value_and_grad(loss, K, mesh=mesh))
        got = f(params(), placed)
        assert not selecting(jaxaccum.value_and_grad(loss, K, mesh=mesh), params(), placed)
    assert_close(got, jax.value_and_grad(big)(params()), rtol=1e-4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("is_split", [True, False], ids=["split", "replicated"])
def test_in_a_mapped_function(check_vma, is_split):
    """Catches a micro-batch's number or a flag that varies otherwise over the devices than what it selects."""
    b, spec = batch((0, 2), n=2 * N), P("data") if is_split else P()

    def fun(p, b):
        total = jnp.sum(jnp.sum(jnp.tanh(b["x"] @ p["head"] + p["bias"]) ** 2, axis=1) * b["mask"])
        return jaxaccum.Weighted(total, jnp.sum(b["mask"])), {"rows": b["x"][:, 0], "constant": jnp.ones(())}

    f = jaxaccum.value_and_grad(fun, K, axis_name="data", has_aux=True)
    out_specs = (P(), {"rows": P(None, "data") if is_split else P(), "constant": P()}), P()
    mapped = jax.shard_map(f, mesh=mesh_of(2), in_specs=(P(), spec), out_specs=out_specs, check_vma=check_vma)
    assert not selecting(mapped, params(), b)
    (value, aux), grads = jax.jit(mapped)(params(), b)
    big = lambda p: (lambda w: w.total / w.weight)(fun(p, without(b, (0, 2)))[0])
    assert_close((value, grads), jax.value_and_grad(big)(params()), rtol=1e-4)
    assert np.isnan(aux["rows"]).all(axis=1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("out", [((1,), (0, 3)), ((2, 3), tuple(range(K)))], ids=["some", "a device's all"])
def test_keys_carry_and_aux_on_devices(check_vma, out):
    """Catches a key, a model state or aux of another device or micro-batch, and of a device on which nothing counts."""

    def fun(p, b, key, mean):
        x = b["x"] * jax.random.bernoulli(key, 0.5, b["x"].shape) + mean
        total = jnp.sum(jnp.sum(jnp.tanh(x @ p["head"] + p["bias"]) ** 2, axis=1) * b["mask"])
        return jaxaccum.Weighted(total, jnp.sum(b["mask"])), (0.5 * mean + jnp.mean(x), (jnp.sum(x), mean))

    halves, mean = [batch(own) for own in out], jnp.float32(0.25)
    options = {"axis_name": "data", "key_argnums": 2, "carry_argnums": 3, "has_aux": True}
    f = jaxaccum.value_and_grad(fun, K, **options)
    specs = {"in_specs": (P(), P("data"), P(), P()), "out_specs": ((P(), (P(), P("data"))), P())}
    mapped = jax.jit(jax.shard_map(f, mesh=mesh_of(2), check_vma=check_vma, **specs))
    (value, (new, aux)), grads = mapped(params(), jax.tree.map(lambda *x: jnp.concatenate(x), *halves), KEY, mean)

    def by_hand(p):
        parts, means, rows = [], [], []
        for device, half in enumerate(halves):
            own = mean
            for i in range(K):
                part, (changed, row) = fun(p, stack(half, K, i), jax.random.fold_in(KEY, device * K + i), own)
                rows.append(row)
                if i not in out[device]:
                    parts.append(part)
                    own = changed
            means.append(own)
        return sum(x.total for x in parts) / sum(x.weight for x in parts), (sum(means) / 2, rows)

    (want, (mean, rows)), expected = jax.value_and_grad(by_hand, has_aux=True)(params())
    assert_close((value, new, grads), (want, mean, expected))
    assert_close(aux, jax.tree.map(lambda *x: jnp.stack(x), *rows))


def test_a_repeated_micro_batch_has_its_own_key():
    """Catches valid rows under another key, with which they may be NaN, and masks that move."""

    def fun(p, b, key):
        drawn = jax.random.bernoulli(key, 0.5, b["x"].shape[:1])  # Maybe none: the norm of 0 has no derivative.
        norm = jnp.sqrt(jnp.sum((forward(p, b["x"]) * drawn[:, None]) ** 2))
        return jaxaccum.Weighted(norm, jnp.sum(b["mask"]))

    k = 8
    drawn = [bool(jax.random.bernoulli(jax.random.fold_in(KEY, i), 0.5, (N,)).any()) for i in range(k)]
    out = tuple(i for i in range(k) if not drawn[i])
    assert 0 < len(out) < k
    b = batch(out, k)
    got = jaxaccum.value_and_grad(fun, k, key_argnums=2)(params(), b, KEY)

    def by_hand(p):
        parts = [fun(p, stack(b, k, i), jax.random.fold_in(KEY, i)) for i in range(k) if drawn[i]]
        return sum(part.total for part in parts) / sum(part.weight for part in parts)

    assert_close(got, jax.value_and_grad(by_hand)(params()), rtol=1e-4)


def test_the_carry():
    """Catches a carry that a repeated micro-batch changes, and one that it doesn't see as the first time: 1 / 0."""

    def fun(p, b, carry):
        total, weight = loss(p, b)
        new = {"count": carry["count"] + 1, "mean": 0.9 * carry["mean"] + jnp.mean(b["x"]), "key": carry["key"]}
        return jaxaccum.Weighted(total / (1 - carry["count"]), weight), new

    carry = {"count": jnp.float32(0), "mean": jnp.float32(0.5), "key": KEY}
    b = batch((0, 2, 3))
    (value, new), grads = jaxaccum.value_and_grad(fun, K, carry_argnums=2)(params(), b, carry)
    (want, kept), expected = jaxaccum.value_and_grad(fun, 1, carry_argnums=2)(params(), without(b, (0, 2, 3)), carry)
    assert_close((value, grads), (want, expected), rtol=1e-5)
    data = lambda carry: carry | {"key": jax.random.key_data(carry["key"])}
    assert_close(data(new), data(kept), rtol=1e-6)


@pytest.mark.parametrize("form", ["split", "traced"])
def test_aux_is_of_a_micro_batchs_own_rows(form):
    """Catches the rows of the micro-batch that was repeated, or the carry that it saw."""

    def fun(p, b, key, count):
        rows = b["tokens"]
        aux = {"rows": rows, "count": count, "key": jax.random.bits(key), "max": jnp.max(forward(p, b["x"]))}
        return loss(p, b), (count + 1, aux)

    options = {"has_aux": True, "key_argnums": 2, "carry_argnums": 3}
    b = batch((1, 3))
    if form == "split":
        (_, (count, aux)), grads = jaxaccum.value_and_grad(fun, K, **options)(params(), b, KEY, 5)
    else:
        f = lambda k: jaxaccum.value_and_grad(fun, k, stacked=True, **options)(params(), stack(b), KEY, 5)
        (_, (count, aux)), grads = jax.jit(f)(K)
    assert count == 7
    assert_equal(aux["rows"], stack(b)["tokens"])
    assert aux["count"].tolist() == [5, 6, 6, 7]
    assert aux["key"].tolist() == [int(jax.random.bits(jax.random.fold_in(KEY, i))) for i in range(K)]
    assert np.isnan(aux["max"]).tolist() == [False, True, False, True]
    assert_close(grads, jaxaccum.value_and_grad(loss, 2)(params(), without(b, (1, 3)))[1])
    assert not selecting(jaxaccum.value_and_grad(fun, K, **options), params(), b, KEY, 5)


def in_double(fun):
    """`fun(params, x, mask)` in float64, of a batch whose micro-batch 1 has weight 0."""
    with jax.enable_x64(True):
        p = {name: params()[name][..., :3, :3].astype(jnp.float64) for name in ("layers", "head")}
        mask = jnp.where(jnp.arange(K * N) % K == 1, 0.0, batch()["mask"].astype(jnp.float64))
        return fun(p, batch()["x"][:, :3].astype(jnp.float64), mask)


def small(p, x, mask):
    h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
    return jaxaccum.Weighted(jnp.sum(jnp.sum((h @ p["head"]) ** 2, axis=1) * mask), jnp.sum(mask))


def quotient(p, x, mask):
    return small(p, x, mask).total / small(p, x, mask).weight


@pytest.mark.parametrize("way", [jax.jacfwd, jax.jacrev], ids=["jacfwd", "jacrev"])
@pytest.mark.parametrize("argnum", [0, 1, 2], ids=["params", "x", "mask"])
def test_derivatives_of_a_gradient(way, argnum):
    """Catches a derivative through what was computed before the loop, or of a row that was repeated."""
    options = {"prepare": "auto"} if (way is jax.jacfwd) == (argnum == 0) else {}

    def both(p, x, mask):
        f = jaxaccum.value_and_grad(small, K, batch_argnums=(1, 2), **options)
        got, want = (way(f, argnum)(p, x, mask) for f in (f, jax.value_and_grad(quotient)))
        if argnum == 2:  # The weight of what is left out has no derivative, as where it is selected.
            want = jax.tree.map(lambda leaf: jnp.where(jnp.arange(K * N) % K == 1, 0, leaf), want)
        assert_close(got, want, rtol=1e-9)

    in_double(both)


def test_under_vmap():
    """Catches micro-batches that are borrowed across the examples of a vmap."""
    batches = [batch(out) for out in ((), (0,), (1, 3), range(K))]
    f = jaxaccum.value_and_grad(lambda p, b: (loss(p, b), b["tokens"]), K, has_aux=True)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    got = jax.vmap(f, (None, 0))(params(), stacked)
    want = jax.tree.map(lambda *x: jnp.stack(x), *(f(params(), b) for b in batches))
    assert_close(got, want, rtol=1e-4)


TOTAL = lambda p, b: jnp.sum(forward(p, b["x"]) ** 2)


@jax.custom_vjp
def normalised(x):
    return x


normalised.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.sqrt(jnp.sum(g**2)),))


def printed(p, b):
    jax.debug.callback(lambda x: None, b["x"])
    return loss(p, b)


# Weights and losses for which the gradient of a micro-batch of weight 0 is left out by selection.
SELECTED = {
    "parameters": lambda p, b: jaxaccum.Weighted(TOTAL(p, b), jnp.sum(b["mask"]) * (p["bias"][0] < 9)),
    "a product": lambda p, b: jaxaccum.Weighted(TOTAL(p, b), jnp.dot(b["mask"], b["mask"])),
    "a loop": lambda p, b: jaxaccum.Weighted(TOTAL(p, b), jax.lax.fori_loop(0, 2, lambda i, w: w + b["mask"][i], 0.0)),
    "custom_vjp": lambda p, b: jaxaccum.Weighted(
        jnp.sum(jnp.where(jnp.any(b["mask"] > 0), normalised(forward(p, b["x"])), 0) ** 2), jnp.sum(b["mask"])
    ),
    "effects": printed,
}


@pytest.mark.parametrize("name", SELECTED)
def test_what_is_selected(name):
    """Catches 0 / 0 from a rule that normalises, and a weight that can't be known before the loop."""
    fun, b = SELECTED[name], batch((1,))
    f = jaxaccum.value_and_grad(fun, K)
    assert selecting(f, params(), b)
    got = f(params(), b)
    assert_close(got, jaxaccum.value_and_grad(fun, K - 1)(params(), without(b, (1,))), rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))


def test_weights_of_keys_and_of_the_carry_are_selected():
    """Catches weights that are computed before the loop, under another key or carry than the micro-batch's."""

    def fun(p, b, key, count):
        weight = jnp.sum(b["mask"]) * jax.random.bernoulli(key)
        return jaxaccum.Weighted(jnp.where(weight > 0, TOTAL(p, b), jnp.nan), weight), count + 1

    def counted(p, b, key, count):
        weight = jnp.sum(b["mask"]) * (count % 2 == 0)
        return jaxaccum.Weighted(jnp.where(weight > 0, TOTAL(p, b), jnp.nan), weight), count + 1

    options = {"key_argnums": 2, "carry_argnums": 3}
    for of in (fun, counted):
        f = jaxaccum.value_and_grad(of, K, **options)
        assert selecting(f, params(), batch(), KEY, 0)
        (value, count), grads = f(params(), batch(), KEY, 0)
        parts, number = [], 0
        for i in range(K):
            own = stack(batch(), K, i), jax.random.fold_in(KEY, i)
            if of(params(), *own, number)[0].weight > 0:
                parts.append((own, number))
                number += 1
        assert 0 < len(parts) < K and count == number

        def by_hand(p, of=of, parts=tuple(parts)):
            done = [of(p, *own, number)[0] for own, number in parts]
            return sum(part.total for part in done) / sum(part.weight for part in done)

        assert_close((value, grads), jax.value_and_grad(by_hand)(params()), rtol=1e-4)


def test_a_loss_that_communicates_is_selected():
    """Catches a device that normalises by the rows that another one repeats."""
    halves = [batch(out) | {"x": batch()["x"] + shift} for out, shift in (((1,), 3), ((), 0))]

    def fun(p, b, centre=lambda x: jax.lax.pmean(x, "data")):
        x = b["x"] - centre(jnp.mean(b["x"], 0))
        return jaxaccum.Weighted(jnp.sum(jnp.sum(x @ p["head"], 1) ** 2 * b["mask"]), jnp.sum(b["mask"]))

    f = jaxaccum.value_and_grad(fun, K, axis_name="data")
    mapped = jax.shard_map(f, mesh=mesh_of(2), in_specs=(P(), P("data")), out_specs=P())
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *halves)
    assert selecting(mapped, params(), rows)
    centres = [sum(jnp.mean(stack(half, K, i)["x"], 0) for half in halves) / 2 for i in range(K)]
    done = [fun(params(), stack(half, K, i), lambda _, i=i: centres[i]) for half in halves for i in range(K)]
    want = sum(x.total for x in done) / sum(x.weight for x in done)
    np.testing.assert_allclose(jax.jit(mapped)(params(), rows)[0], want, rtol=1e-5)


# Weights that are known before the loop.
KNOWN = {
    "integers": lambda p, b: jnp.sum(b["tokens"] < WIDTH),
    "flags": lambda p, b: jnp.sum(b["valid"] & (b["mask"] > 0)),
    "jit": lambda p, b: jax.jit(lambda p, b: (p["head"] @ p["head"], jnp.sum(jnp.where(b["mask"] > 0, 1, 0))))(p, b)[1],
    "relu": lambda p, b: jnp.sum(jax.nn.relu(b["mask"])),
    "cond": lambda p, b: jax.lax.cond(b["tokens"][0] < WIDTH, lambda: jnp.sum(b["mask"]), lambda: 0.0),
    "mean": lambda p, b: jnp.mean(b["mask"]) * len(b["mask"]) * jnp.ones((), p["head"].dtype),
    "gather": lambda p, b: jnp.sum(jnp.array([1.0, *[0.5] * 31])[b["tokens"] % 32] * (b["mask"] > 0)),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_what_is_known_before_the_loop(name, wrap):
    """Catches a loss that is selected though its weight needs no more than its data."""
    fun = wrap(lambda p, b: jaxaccum.Weighted(TOTAL(p, b), KNOWN[name](p, b)))
    b = batch((0, 2))
    f = jaxaccum.value_and_grad(fun, K)
    assert not selecting(f, params(), b)
    assert_equal(f(params(), b), jaxaccum.value_and_grad(fun, 2)(params(), without(b, (0, 2))))


@pytest.mark.parametrize("weight", [0, jnp.float32(0), jnp.float32(3)], ids=["0", "array 0", "array 3"])
def test_a_weight_of_other_arguments(weight):
    """Catches a map over no batch leaf at all."""
    fun = lambda p, b, w: jaxaccum.Weighted(jnp.mean(forward(p, b["x"]) ** 2), w)
    f = jaxaccum.value_and_grad(fun, K)
    assert not selecting(f, params(), batch(), weight)
    value, grads = f(params(), batch(), weight)
    want = jax.value_and_grad(plain)(params(), batch())
    assert_close((value, grads), jax.tree.map(lambda x: x * (0 if weight == 0 else 1 / 3), want))


def test_a_loss_in_half_precision():
    """Catches a cotangent of another dtype than the total's."""
    fun = lambda p, b: jaxaccum.Weighted(loss(p, b).total.astype(jnp.float16), loss(p, b).weight)
    got = jaxaccum.value_and_grad(fun, K)(params(), batch((1,)))
    assert got[0].dtype == jnp.float16
    assert_equal(got, jaxaccum.value_and_grad(fun, K - 1)(params(), without(batch((1,)), (1,))))


def test_attention_in_a_kernel(monkeypatch):
    """Catches a language model whose gradients are selected, since its attention has a backward pass of its own."""
    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{name}", lambda *_: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.is_cuda_compute_capability_equal", lambda _: False)

    def fun(p, b):
        x = (b["x"] @ p["head"]).reshape(1, N, 2, WIDTH // 2).astype(jnp.bfloat16)
        mixed = jax.nn.dot_product_attention(x, x, x, implementation="cudnn").astype(jnp.float32)
        return jaxaccum.Weighted(jnp.sum(mixed**2), jnp.sum(b["mask"]))

    assert not selecting(jaxaccum.value_and_grad(fun, K), params(), batch())


@pytest.mark.parametrize("options", [{}, {"prepare": "auto"}], ids=str)
def test_a_rule_that_calls_its_own_function(options):
    """Catches a recursion without end into the rule of a `jax.custom_jvp`."""
    fun = lambda p, b: jaxaccum.Weighted(jnp.sum((b["x"] @ jax.nn.relu(p["head"])) ** 2), jnp.sum(b["mask"]))
    got = jaxaccum.value_and_grad(fun, K, **options)(params(), batch())
    assert_close(got, jax.value_and_grad(lambda p: fun(p, batch()).total / fun(p, batch()).weight)(params()))


def test_the_weight_is_computed_once():
    """Catches a weight that is computed again in the loop, where it may round to the other side of a threshold."""
    rows = np.arange(K * 16) % K
    conf = jnp.asarray(np.where(rows == 0, 0.9, 0.1)[:, None] * np.ones((1, 64)), jnp.float32)

    def tied(w, b):
        counts = jnp.where(jnp.mean(b["conf"]) > jnp.float32(0.1), 1.0, 0.0)
        return jaxaccum.Weighted(jnp.sum((w * b["x"]) ** 2), counts * b["conf"].size)

    value, grad = jax.jit(jaxaccum.value_and_grad(tied, K))(jnp.float32(1), {"x": jnp.ones(K * 16), "conf": conf})
    # Which micro-batches count is a matter of rounding. The mean of those that do is not.
    assert float(value) == pytest.approx(1 / 64) and float(grad) == pytest.approx(2 / 64)


def test_a_solver_is_not_run_on_zeros():
    """Catches a linear solver of a fixed number of steps, which divides 0 by 0 under the cotangent 0."""
    matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])

    def solve(matvec, b):
        x, r = jnp.zeros_like(b), b
        p = r
        for _ in range(2):
            step = (r @ r) / (p @ matvec(p))
            new = r - step * matvec(p)
            x, p, r = x + step * p, new + (new @ new) / (r @ r) * p, new
        return x

    def solved(w, b):
        y = jax.lax.custom_linear_solve(lambda u: matrix @ u + w * u, b["x"][0], solve, symmetric=True)
        return jaxaccum.Weighted(jnp.sum(y**2), jnp.sum(b["mask"]))

    b = {"x": jnp.array([[1.0, 2.0], [3.0, 5.0]]), "mask": jnp.array([1.0, 0.0])}
    got = jaxaccum.value_and_grad(solved, 2)(jnp.float32(0.7), b)
    want = jax.value_and_grad(lambda w: solved(w, jax.tree.map(lambda x: x[:1], b)).total)(jnp.float32(0.7))
    assert_close(got, want, rtol=1e-5)


def test_a_replicated_batch_argument_beside_a_split_mask():
    """Catches a micro-batch's number that varies over the devices, and makes what is the same on all of them vary."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    fun = lambda w, b: jaxaccum.Weighted(jnp.sum(w * (b["x"] * b["mask"])), jnp.sum(b["mask"]))
    f = jax.shard_map(
        jaxaccum.value_and_grad(fun, 2, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), {"x": P(), "mask": P("data")}),
        out_specs=P(),
    )
    got = jax.jit(f)(1.0, {"x": jnp.arange(2.0), "mask": jnp.array([1.0, 0.0, 1.0, 1.0])})
    assert_close(got, (jnp.float32(1 / 3), jnp.float32(1 / 3)), rtol=1e-6)


def test_a_rule_that_jax_never_calls():
    """Catches an analysis that traces a custom_jvp's rule for operands that have no derivative."""

    @jax.custom_jvp
    def double(x):
        return 2 * x

    @double.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError("double is not differentiable")

    fun = lambda w, b: jaxaccum.Weighted(jnp.sum((w * double(b["x"])) ** 2 * b["mask"]), jnp.sum(b["mask"]))
    value, grad = jaxaccum.value_and_grad(fun, 2)(1.0, {"x": jnp.arange(4.0), "mask": jnp.ones(4)})
    assert (float(value), float(grad)) == (14.0, 28.0)


def test_communication_in_a_rule():
    """Catches a repeated micro-batch that other devices receive in the derivative alone."""

    @jax.custom_jvp
    def f(w, x):
        return w * x

    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * jax.lax.pmean(primals[1], "data")))
    fun = lambda w, b: jaxaccum.Weighted(jnp.sum(f(w, b["x"]) * b["mask"]), jnp.sum(b["mask"]))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    g = jax.shard_map(
        jaxaccum.value_and_grad(fun, 2, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    b = {"x": jnp.arange(1.0, 9.0), "mask": jnp.array([1.0, 0, 1, 0, 1, 1, 1, 1])}
    assert float(jax.jit(g)(0.7, b)[1]) == pytest.approx(13 / 3)


def test_an_axis_whose_name_is_no_string():
    """Catches a collective over an axis that is named by any other hashable."""

    class Name:
        pass

    def fun(w, b, axis):
        centred = b["x"] - jax.lax.pmean(b["x"], axis)
        return jaxaccum.Weighted(jnp.sum((w * centred) ** 2 * b["mask"]), jnp.sum(b["mask"]))

    b = {"x": jnp.array([[1.0, 2.0], [3.0, 7.0]]), "mask": jnp.array([[1.0, 0.0], [1.0, 1.0]])}

    for axis in ("axis", Name()):
        window = lambda b, axis=axis: jaxaccum.value_and_grad(lambda w, b: fun(w, b, axis), 2)(jnp.float32(1), b)
        value, grad = jax.vmap(window, axis_name=axis)(b)
        assert_close((value, grad), (jnp.array([1, 3.625]), jnp.array([2, 7.25])), rtol=1e-6)


def test_a_weight_with_large_intermediate_results():
    """Catches the intermediate results of all weights at once, which take K times the memory of one."""

    def temporary(weight):
        fun = lambda w, b: jaxaccum.Weighted(jnp.sum((w * b["x"]) ** 2), weight(b))
        args = jnp.float32(1), {"x": jnp.ones((32 * 8,)), "tokens": jnp.ones((32 * 8, 16), jnp.int32)}
        compiled = jax.jit(jaxaccum.value_and_grad(fun, 32)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    largest = 8 * 16 * 1000 * 4  # One micro-batch's tokens as vectors.
    assert temporary(lambda b: jnp.sum(jax.nn.one_hot(b["tokens"], 1000).max(-1))) < 4 * largest
