"""`coupled_value_and_grad` against `jax.value_and_grad` of the whole batch, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

TOTAL, WIDTH = 64, 4
assert_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def params():
    """Two towers that share a layer, and what the losses learn of their own."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2)
    own = {"temperature": jnp.asarray(0.3), "bias": jnp.asarray(-1.0)}
    return {"image": draw(3, WIDTH), "text": draw(2, WIDTH), "shared": draw(WIDTH, WIDTH), **own}


def batch(total=TOTAL):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    return {"image": draw(total, 3), "text": draw(total, 2), "label": jnp.asarray(rng.integers(0, 3, total))}


def encode(p, data, key=None):
    """A dict of two floating leaves and one of labels; with a key, the first one after dropout."""
    image, text = (jnp.tanh(data[name] @ p[name].astype(data[name].dtype)) for name in ("image", "text"))
    if key is not None:
        image = image * jax.random.bernoulli(key, 0.7, image.shape)
    unit = lambda x: x / jnp.linalg.norm(x + 1e-3, axis=-1, keepdims=True)
    shared = p["shared"].astype(image.dtype)
    return {"image": unit(image @ shared), "text": unit(text @ shared), "label": data["label"]}


def similarities(p, rows):
    return jnp.exp(p["temperature"]) * rows["image"] @ rows["text"].T


def info_nce(p, rows):
    scores = similarities(p, rows)
    return -sum(jnp.mean(jnp.diag(jax.nn.log_softmax(x))) for x in (scores, scores.T)) / 2


def siglip(p, rows):
    signs = 2 * jnp.eye(len(rows["image"])) - 1
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * (similarities(p, rows) + p["bias"])), axis=1))


def barlow_twins(p, rows):
    a, b = ((x - x.mean(0)) / x.std(0) for x in (rows["image"], rows["text"]))
    correlations = a.T @ b / len(a)
    return jnp.sum((jnp.diag(correlations) - 1) ** 2) + 0.01 * jnp.sum(correlations**2) + p["bias"] ** 2


def triplet(p, rows):
    """Each example's farthest positive and nearest negative."""
    distances = jnp.sum((rows["image"][:, None] - rows["text"]) ** 2, axis=-1)
    same = rows["label"][:, None] == rows["label"]
    positive = jnp.max(jnp.where(same, distances, -jnp.inf), axis=1)
    negative = jnp.min(jnp.where(same, jnp.inf, distances), axis=1)
    return jnp.mean(jax.nn.softplus(positive - negative + p["bias"]))


LOSSES = [info_nce, siglip, barlow_twins, triplet]


def in_order(p, data, devices, k, key=None):
    """The representations by definition: of each micro-batch on its own, in the batch's order."""

    def rows(device, i):
        own = jax.tree.map(lambda x: x.reshape(devices, -1, k, *x.shape[1:])[device, :, i], data)
        return encode(p, own, None if key is None else jax.random.fold_in(key, device * k + i))

    stacked = lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:])
    on_each = [jax.tree.map(stacked, *(rows(device, i) for i in range(k))) for device in range(devices)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *on_each)


def alone(loss, p, data, devices=1, k=1, key=None, has_aux=False):
    """What jax alone gives."""
    whole = lambda p: loss(p, in_order(p, data, devices, k, key))
    return jax.jit(jax.value_and_grad(whole, has_aux=has_aux))(p)


def on_devices(way, devices, loss, k, p, data, *key, **options):
    """The jitted function and its arguments, on `devices` devices."""
    kind = "explicit" if way == "explicit mesh" else "auto"
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(KINDS[kind],), devices=jax.devices()[:devices])
    options |= {"key_argnums": 2} if key else {}
    options |= {"mesh": mesh} if way.endswith("mesh") else {} if way == "jit" else {"axis_name": "data"}
    fun = jaxaccum.coupled_value_and_grad(encode, loss, k, **options)
    if way.startswith("shard_map"):
        specs = (P(), P("data"), *[P() for _ in key])
        fun = jax.shard_map(fun, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=way == "shard_map")
    return jax.jit(fun), (p, jax.device_put(data, NamedSharding(mesh, P("data"))), *key), mesh


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_window_is_the_whole_batch(x64, loss, k):
    """Catches negatives that are not seen, a lost gradient of the loss's own parameters, and rows out of order."""
    got = jax.jit(jaxaccum.coupled_value_and_grad(encode, loss, k))(params(), batch())
    assert_close(got, alone(loss, params(), batch()))


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize(
    ("way", "k", "loss"),
    [
        ("mesh", 1, triplet),
        ("mesh", 8, info_nce),
        ("explicit mesh", 2, siglip),
        ("shard_map", 2, triplet),
        ("shard_map", 8, info_nce),
        ("shard_map without vma", 2, siglip),
        ("jit", 2, siglip),
        ("jit", 8, barlow_twins),
    ],
)
def test_devices_see_all_examples(x64, way, devices, k, loss):
    """Catches negatives of one device alone, and a loss that counts once a device: its temperature shows it."""
    fun, args, _ = on_devices(way, devices, loss, k, params(), batch())
    assert_close(fun(*args), alone(loss, params(), batch()))


@pytest.mark.parametrize(
    ("way", "devices", "k"), [("jit", 1, 1), ("jit", 1, 4), ("jit", 4, 2), ("mesh", 4, 2), ("shard_map", 8, 2)]
)
def test_both_passes_draw_the_same_masks(x64, way, devices, k):
    """Catches a second pass with keys of its own, a mask that micro-batches or devices share, and a wrong number."""
    fun, args, _ = on_devices(way, devices, info_nce, k, params(), batch(), jax.random.key(7))
    numbers = (1, k) if way == "jit" else (devices, k)
    assert_close(fun(*args), alone(info_nce, params(), batch(), *numbers, jax.random.key(7)))


def test_pmap(x64):
    """Catches a result that differs between devices."""
    data = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch())
    fun = jaxaccum.coupled_value_and_grad(encode, triplet, 2, axis_name="data")
    got = jax.pmap(fun, axis_name="data", in_axes=(None, 0))(params(), data)
    for device in (0, 7):
        assert_close(jax.tree.map(lambda x, device=device: x[device], got), alone(triplet, params(), batch()))


def with_rows(p, rows):
    """A loss with aux: the representations, a bool and a number of the loss's own."""
    return info_nce(p, rows), {"rows": rows, "is_first": rows["label"] == 0, "scale": 2 * p["temperature"]}


@pytest.mark.parametrize(
    ("way", "prepare"), [("jit", None), ("mesh", None), ("shard_map", None), ("shard_map", "twice")]
)
def test_the_loss_sees_representations_in_the_batchs_order(x64, way, prepare):
    """Catches rows in the order of the micro-batches, and aux that is summed over the devices."""
    twice = lambda p: jax.tree.map(lambda x: 2 * x, p)
    options = {"prepare": twice} if prepare else {}
    fun, args, _ = on_devices(way, 4, with_rows, 4, params(), batch(), has_aux=True, **options)
    loss = (lambda p, rows: with_rows(twice(p), rows)) if prepare else with_rows
    encoded = in_order(twice(params()) if prepare else params(), batch(), 1, 1)
    (value, aux), grads = fun(*args)
    assert_close(aux["rows"], encoded)
    if not prepare:
        assert_close(((value, aux), grads), alone(loss, params(), batch(), has_aux=True))


def test_argnums_name_several_arguments_in_their_order(x64):
    """Catches gradients of the wrong argument, and a loss that gets the arguments of the encoder."""
    own = ("temperature", "bias")
    towers = {name: x for name, x in params().items() if name not in own}
    head = {name: params()[name] for name in own}
    encode_by = lambda towers, scale, data, head, *, shift: encode(
        {**towers, **head}, {**data, "image": data["image"] * scale + shift * head["bias"]}
    )
    loss = lambda head, towers, rows: info_nce(head, rows) + jnp.sum(towers["shared"] ** 2)
    options = {"argnums": (3, 0), "batch_argnums": 2}
    args = towers, jnp.asarray([1.0, 2.0, 3.0]), batch(), head
    got = jaxaccum.coupled_value_and_grad(encode_by, loss, 4, **options)(*args, shift=0.5)
    whole = lambda *args: loss(args[3], args[0], encode_by(*args, shift=0.5))
    assert_close(got, jax.value_and_grad(whole, argnums=(3, 0))(*args))


def normalised(p):
    """Parameters that are computed from others, once a window."""
    return {**p, "shared": jnp.tanh(p["shared"] @ p["shared"].T), "temperature": p["temperature"] ** 2}


def encode_normalised(p, data):
    return encode({**p, "shared": jnp.tanh(p["shared"] @ p["shared"].T)}, data)


@pytest.mark.parametrize("way", ["jit", "mesh", "shard_map"])
def test_prepare_runs_once_for_both_functions(x64, way):
    """Catches a loss that gets parameters that are not prepared, and one whose gradient does not pass `prepare`."""
    fun, args, _ = on_devices(way, 4, siglip, 2, params(), batch(), prepare=normalised)
    want = jax.value_and_grad(lambda p: siglip(normalised(p), encode(normalised(p), batch())))(params())
    assert_close(fun(*args), want)


def test_prepare_auto_hoists_from_the_encoder(x64):
    """Catches a loss that loses the parameters that hoisting leaves out, here `shared` as it is."""
    loss = lambda p, rows: siglip(p, rows) + jnp.sum(p["shared"] ** 2)
    fun = jaxaccum.coupled_value_and_grad(encode_normalised, loss, 4, prepare="auto")
    want = jax.value_and_grad(lambda p: loss(p, encode_normalised(p, batch())))(params())
    assert_close(fun(params(), batch()), want)
    counts = [
        str(jax.make_jaxpr(fun)(params(), batch())).count("f64[4,4] = tanh")
        for fun in (fun, jaxaccum.coupled_value_and_grad(encode_normalised, loss, 4))
    ]
    assert counts == [1, 2]  # Without hoisting it is in both loops.


def test_gathered_parameters_are_gathered_once(x64):
    """Catches a gradient that counts once a device, and a second gather or scatter for the loss's own gradient."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(KINDS["auto"],), devices=jax.devices()[:4])
    gather = lambda p: {**p, "shared": jax.lax.all_gather(p["shared"], "data", tiled=True)}
    loss = lambda p, rows: siglip(p, rows) + jnp.sum(p["shared"] ** 2)
    fun = jaxaccum.coupled_value_and_grad(encode, loss, 2, prepare=gather, axis_name="data")
    specs = dict.fromkeys(params(), P()) | {"shared": P("data")}
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs))
    assert_close(jax.jit(mapped)(params(), batch()), alone(loss, params(), batch()))
    moved = jaxaccum.collectives(jax.jit(mapped).lower(params(), batch()).compile(), mesh=mesh)
    assert moved.count(kind="reduce-scatter") == 1 and moved.count(kind="all-gather") <= 3


@pytest.mark.parametrize("way", ["mesh", "explicit mesh", "shard_map", "jit"])
def test_one_gather_and_the_reduction_of_a_window(way):
    """Catches a gather in a loop, representations that are reduced, and gradients that are reduced twice."""
    fun, args, mesh = on_devices(way, 4, triplet, 4, params(), batch())
    moved = jaxaccum.collectives(fun.lower(*args).compile(), mesh=mesh)
    assert moved.count(kind="all-gather", in_loop=True) == 0
    if way != "jit":
        assert moved.count(in_loop=True) == 0
        assert 1 <= moved.count(kind="all-gather") <= 3
        assert moved.count() == moved.count(kind="all-gather") + moved.count(kind="all-reduce")
        options = {"axis_name": "data"} if way == "shard_map" else {"mesh": mesh}
        plain = jaxaccum.value_and_grad(lambda p, data: jnp.mean(encode(p, data)["image"]), 4, **options)
        if way == "shard_map":
            plain = jax.shard_map(plain, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        reduced = jaxaccum.collectives(jax.jit(plain).lower(*args).compile(), mesh=mesh)
        assert moved.count(kind="all-reduce") <= reduced.count(kind="all-reduce")


def test_transformations(x64):
    """Catches state between the passes that vmap, a second derivative or rematerialisation loses."""
    data = batch(8)
    fun = lambda p: jaxaccum.coupled_value_and_grad(encode, info_nce, 4)(p, data)
    whole = lambda p: alone(info_nce, p, data)
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params())
    assert_close(jax.jit(jax.vmap(fun))(both), jax.vmap(whole)(both))
    square = lambda fun: lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(fun(p)))
    want = jax.grad(square(whole))(params())
    assert_close(jax.jit(jax.grad(square(fun)))(params()), want)
    assert_close(jax.jit(jax.grad(square(jax.checkpoint(fun))))(params()), want)


def test_an_eager_call(x64):
    """Catches a call outside jit that needs one, and parameters that are Python numbers."""
    p = {"scale": 2.0, "temperature": 0.5}
    encode = lambda p, x: (p["scale"] * x, x)
    loss = lambda p, rows: p["temperature"] * jnp.sum(jnp.tanh(rows[0] @ rows[1][::-1].T))
    x = batch()["image"]
    got = jaxaccum.coupled_value_and_grad(encode, loss, 4)(p, x)
    assert_close(got, jax.value_and_grad(lambda p: loss(p, encode(p, x)))(p))


def test_complex_representations_and_trees(x64):
    """Catches a cotangent that is conjugated, and leaves that come back in another order."""
    encode = lambda p, x: (x @ p["w"] + 1j * x @ p["v"], x > 0, {"a": p["v"][0] * x[:, :1]}, None)
    loss = lambda p, rows: jnp.abs(jnp.sum(jnp.exp(1j) * rows[0] @ rows[0].T * rows[1][:, :1] * rows[2]["a"][:, :1].T))
    x, p = batch()["image"], {"w": params()["image"], "v": 2 * params()["image"]}
    got = jaxaccum.coupled_value_and_grad(encode, loss, 4)(p, x)
    assert_close(got, jax.value_and_grad(lambda p: loss(p, encode(p, x)))(p))


def layers(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.astype(h.dtype)), None), x, p["layers"])[0]


def test_half_precision():
    """Catches gradients that are summed in bfloat16: ours are as near to float64 as those of jax alone."""
    rng = np.random.default_rng(0)
    p = {"layers": jnp.asarray(rng.standard_normal((3, 16, 16)) / 4, jnp.float32), "temperature": jnp.float32(0.5)}
    x = jnp.asarray(rng.standard_normal((128, 16)), jnp.bfloat16)

    def loss(p, rows):
        scores = jnp.exp(p["temperature"]) * (rows @ rows[::-1].T).astype(p["temperature"].dtype)
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(scores)))

    want = jax.value_and_grad(lambda p: loss(p, layers(p, x)))(p)
    with jax.enable_x64(True):
        wide_p, wide_x = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (p, x))
        exact = jax.value_and_grad(lambda p: loss(p, layers(p, wide_x)))(wide_p)
    exact = jax.tree.map(np.asarray, exact)
    error = lambda got: max(
        float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    )
    for prepare in (None, "auto", jaxaccum.cast(jnp.bfloat16)):
        value, grads = jaxaccum.coupled_value_and_grad(layers, loss, 16, prepare=prepare)(p, x)
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
        assert error((value, grads)) <= 1.2 * error(want) + 2e-3


def test_cast_looks_at_both_functions():
    """Catches an embedding that only the loss gathers from, cast so that its gradient is summed in bfloat16."""
    p = {"w": jnp.ones((3, 2)), "classes": jnp.ones((3, 2)), "head": jnp.ones((2, 2))}
    seen = []

    def loss(p, rows):
        seen.append(jax.tree.map(lambda x: x.dtype.name, p))
        return jnp.mean(rows @ p["head"].astype(rows.dtype) * p["classes"][jnp.zeros(8, int)].astype(rows.dtype))

    fun = jaxaccum.coupled_value_and_grad(
        lambda p, x: x @ p["w"].astype(x.dtype), loss, 2, prepare=jaxaccum.cast(jnp.bfloat16)
    )
    fun(p, jnp.ones((8, 3)))
    assert seen[-1] == {"w": "bfloat16", "classes": "float32", "head": "bfloat16"}


def test_dtypes(x64):
    """Catches a dtype that is not the parameters' or the one asked for, and sums narrower than float64 gradients."""
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    fun = functools.partial(jaxaccum.coupled_value_and_grad, encode, info_nce, 4)
    dtypes = lambda p, **options: {x.dtype.name for x in jax.tree.leaves(jax.eval_shape(fun(**options), p, batch())[1])}
    assert dtypes(p) == {"bfloat16"}
    assert dtypes(p, grad_dtype=jnp.float32) == {"float32"}
    assert_close(fun(accumulator_dtype=jnp.bfloat16)(params(), batch()), alone(info_nce, params(), batch()))
    p = jax.tree.map(lambda x: x.astype(jnp.float32), params())
    sums = lambda **options: str(jax.make_jaxpr(fun(**options))(p, batch())).count("bf16[3,4]")
    assert sums(accumulator_dtype=jnp.bfloat16) > sums() == 0
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, fun()(p, batch()), alone(info_nce, p, batch()))


def test_memory():
    """Catches activations or gradients kept for every micro-batch, and many copies of the representations."""
    p = {"w": jnp.ones((16, 128)), "layers": jnp.ones((4, 128, 128)), "v": jnp.ones((128, 8))}
    encode = lambda p, x: layers(p, x @ p["w"]) @ p["v"]
    loss = lambda p, rows: jnp.sum((rows.T @ rows) ** 2)

    def temporary(k):
        fun = jax.jit(jaxaccum.coupled_value_and_grad(encode, loss, k))
        return fun.lower(p, jnp.ones((k * 16, 16))).compile().memory_analysis().temp_size_in_bytes

    representations = 64 * 16 * 8 * 4
    assert temporary(64) <= temporary(2) + 3 * representations


def test_stacked_layers_are_added_in_place():
    """Catches a loop of its own, that does not use the one gradient of a window."""
    p = {"layers": jnp.ones((16, 64, 64))}
    loss = lambda p, rows: jnp.sum((rows.T @ rows) ** 2)
    fun = jaxaccum.coupled_value_and_grad(layers, loss, 4)
    program = jax.jit(fun).lower(p, jnp.ones((8, 64))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * p["layers"].nbytes


def test_nothing_is_traced_more_than_it_needs():
    """Catches an encoder whose Python code runs once a pass or once a micro-batch."""
    traces = []

    def counted(p, data):
        traces.append(1)
        return encode(p, data)

    jax.jit(jaxaccum.coupled_value_and_grad(counted, info_nce, 4))(params(), batch())
    assert len(traces) == 1


def call(encode=encode, loss=info_nce, k=4, total=TOTAL, args=(), **options):
    return jaxaccum.coupled_value_and_grad(encode, loss, k, **options)(params(), batch(total), *args)


BAD = {
    "no function": (dict(loss=3), TypeError, "loss must be callable, got 3"),
    "K": (dict(k=0), ValueError, "num_micro_batches must be an integer from 1"),
    "rows": (
        dict(encode=lambda p, data: {"a": jnp.mean(data["image"] @ p["image"], axis=0)}),
        ValueError,
        r"encode returned \['a'\] of shape \(4,\) for a micro-batch of N=16 examples: each leaf must lead with N",
    ),
    "two views": (
        dict(encode=lambda p, data: jnp.concatenate([data["image"] @ p["image"]] * 2)),
        ValueError,
        r"encode returned an array of shape \(32, 4\) for a micro-batch of N=16 .* views or towers as separate leaves",
    ),
    "scalar": (
        dict(encode=lambda p, data: jnp.sum(data["image"] @ p["image"]), prepare=jaxaccum.cast(jnp.bfloat16)),
        ValueError,
        r"encode returned an array of shape \(\)",
    ),
    "no parameter": (
        dict(encode=lambda p, data: data["image"], loss=lambda p, rows: jnp.sum(rows)),
        ValueError,
        "no floating representation that encode returned depends on the arguments that argnums names",
    ),
    "labels only": (
        dict(
            encode=lambda p, data: jnp.argmax(data["image"] @ p["image"], axis=1), loss=lambda p, rows: jnp.mean(rows)
        ),
        ValueError,
        "no floating representation",
    ),
    "no scalar": (
        dict(loss=lambda p, rows: rows["image"][:, 0]),
        TypeError,
        r"loss must return one floating scalar, got float32 of shape \(64,\); reduce an array first",
    ),
    "an integer": (
        dict(loss=lambda p, rows: jnp.sum(rows["label"])),
        TypeError,
        r"^loss must return one floating scalar, got int32 of shape \(\); .* has_aux=True",
    ),
    "a complex number": (
        dict(loss=lambda p, rows: 1j * info_nce(p, rows)),
        TypeError,
        r"^loss must return one floating scalar, got complex64 of shape \(\); .* has_aux=True",
    ),
    "aux without has_aux": (dict(loss=lambda p, rows: (info_nce(p, rows), 1)), TypeError, "has_aux=True"),
    "has_aux without aux": (
        dict(has_aux=True),
        TypeError,
        r"with has_aux=True loss must return \(loss, aux\)",
    ),
    "Weighted": (
        dict(loss=lambda p, rows: jaxaccum.Weighted(info_nce(p, rows), 1.0)),
        TypeError,
        "loss returned a Weighted, but .* no micro-batches to weigh. Return total / weight",
    ),
    "Weighted rows": (
        dict(encode=lambda p, data: jaxaccum.Weighted(data["image"] @ p["image"], data["image"][:, 0])),
        TypeError,
        "encode returned a Weighted, but representations have no weight",
    ),
    "fewer than K": (dict(k=128), ValueError, r"sizes that can: 128\.\n"),
    "Weighted with aux": (
        dict(loss=lambda p, rows: (jaxaccum.Weighted(info_nce(p, rows), 1.0), rows), has_aux=True),
        TypeError,
        "loss returned a Weighted",
    ),
    "indivisible": (
        dict(k=5),
        ValueError,
        r"a batch of 64 examples can't be split into num_micro_batches=5 .* 60 and 65. Drop the rest.",
    ),
    "shared key": (dict(args=(jax.random.key(0),)), ValueError, "random key that all micro-batches would share"),
    "prepare of two": (dict(argnums=(0, 2), prepare="auto"), ValueError, "prepare takes one differentiated argument"),
    "a mesh and an axis": (dict(mesh=1, axis_name="data"), ValueError, "give one of them"),
    "no map": (dict(axis_name="data"), NameError, "names no axis here"),
    "dtype": (dict(accumulator_dtype=int), TypeError, "accumulator_dtype must be a floating dtype"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(options, error, message):
    """Catches a number in place of an error, and an error that does not say what to do."""
    with pytest.raises(error, match=message):
        call(**options)


def test_bad_input_on_devices():
    """Catches a batch that can't be split over devices, and a loss that gathers what is gathered already."""
    data = batch(24)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS["auto"],))
    with pytest.raises(ValueError, match="must be a multiple of 16, such as 16 or 32"):
        jaxaccum.coupled_value_and_grad(encode, info_nce, 2, mesh=mesh)(params(), data)
    gather = lambda x: jax.lax.all_gather(x, "data", tiled=True)
    loss = lambda p, rows: info_nce(p, jax.tree.map(gather, rows))
    own = lambda p, rows: info_nce(p, rows) + jax.lax.axis_index("data")
    nested = jax.jit(own)
    for refused in (loss, own, nested):
        with pytest.raises(ValueError, match=r"loss communicates over the data axis \('data',\), or reads its index"):
            jaxaccum.coupled_value_and_grad(encode, refused, 1, mesh=mesh)(params(), data)
    fun = jaxaccum.coupled_value_and_grad(encode, info_nce, 1, axis_name="data")
    with pytest.raises(ValueError, match="the batch does not vary over axis_name"):
        jax.shard_map(fun, mesh=mesh, in_specs=P(), out_specs=P())(params(), data)


def test_aux_of_many_devices_is_that_of_one():
    """Catches aux that is averaged over the devices, which overflows."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS["auto"],))
    loss = lambda p, rows: (info_nce(p, rows), jnp.full(3, jnp.finfo(jnp.float32).min) * rows["image"][0, 0] ** 0)
    fun = jaxaccum.coupled_value_and_grad(encode, loss, 1, axis_name="data", has_aux=True)
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    (_, aux), _ = jax.jit(mapped)(params(), batch(64))
    np.testing.assert_array_equal(aux, np.full(3, np.finfo(np.float32).min))


def test_parameters_gathered_on_a_mesh_are_refused():
    """Catches a gather of whole parameters."""
    data, mesh = batch(24), jax.make_mesh((8,), ("data",), axis_types=(KINDS["auto"],))
    gathered = lambda p: jax.lax.all_gather(p["image"], "data")
    encode_gathered = lambda p, data: data["image"] @ p[0]
    fun = jaxaccum.coupled_value_and_grad(encode_gathered, lambda p, x: jnp.sum(x), 1, mesh=mesh, prepare=gathered)
    with pytest.raises(ValueError, match="with mesh= it sees whole parameters"):
        fun(params(), data)
