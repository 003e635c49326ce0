"""The backward pass that adds into the sums: the same numbers, in less memory, where the rule says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._gradient import in_place_sums
from jaxaccum._jax import jaxprs, refs
from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.input import strategies
from jaxaccum.trainer.programs import compiled

LAYERS, WIDTH, K, N = 3, 16, 4, 2


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": {
            "kernel": 0.1 * jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)),
            "bias": 0.1 * jax.random.normal(keys[1], (LAYERS, WIDTH)),
        },
        "head": jax.random.normal(keys[2], (WIDTH,)),
    }


# jax 0.9 adds what is under a checkpoint afterwards.
rematerialised = jax.checkpoint if refs.REACH_CHECKPOINTS else lambda fun: fun


def layer(x, layer):
    return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None


def scanned(p, x):
    return jnp.mean((jax.lax.scan(rematerialised(layer), x, p["layers"])[0] @ p["head"]) ** 2)


def jitted(p, x):
    return jax.jit(scanned)(p, x)


def unrolled(p, x):
    for i in range(LAYERS):
        x, _ = layer(x, {name: leaf[i] for name, leaf in p["layers"].items()})
    return jnp.mean((x @ p["head"]) ** 2)


def decayed(p, x):
    """Uses the stack twice: its gradient has two terms, one of them whole."""
    return scanned(p, x) + 0.01 * jnp.sum(p["layers"]["kernel"] ** 2)


def beside_others(p, x):
    """Walks along what is none of its parameters, too, and of a layer's shape."""
    step = lambda x, rows: (layer(x, rows[1])[0] + jnp.sum(rows[0] ** 2), None)
    own = jnp.stack([p["head"]] * LAYERS) * x[0]
    return jnp.mean((jax.lax.scan(step, x, (own, p["layers"]))[0] @ p["head"]) ** 2)


def in_halves(p, x):
    """Reads a part of the stack in half precision from the start: its gradient is none that fits its sum."""
    half = p["layers"] | {"kernel": p["layers"]["kernel"].astype(jnp.bfloat16)}
    return scanned(p | {"layers": half}, x)


def weighted(p, x):
    """0/0 where nothing counts, in the loss and in its gradient."""
    count = jnp.sum(x[:, 0] > 0).astype(jnp.float32)
    squared = (jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]) ** 2
    return jaxaccum.Weighted(jnp.sum(squared) * (count / count), count)


def batch():
    x = jax.random.normal(jax.random.key(1), (K * N, WIDTH))
    # Even micro-batches have weight 0, on one device and on two.
    return x.at[:, 0].set(jnp.where(jnp.arange(K * N) % 2 == 0, -1.0, 1.0))


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@functools.cache
def added_afterwards(loss):
    """The window's loss and gradient, without references and on one device."""
    return jax.jit(jaxaccum.value_and_grad(loss, K, in_place=False))(params(), batch())


def adds(fun, p, *args):
    """How many parameters are added to inside of the backward pass: its loop over the layers carries their sums."""
    return carried_sums(jax.make_jaxpr(fun)(p, *args).jaxpr)


def carried_sums(jaxpr):
    count = 0
    for eqn in jaxpr.eqns:
        bodies = [getattr(x, "jaxpr", x) for p in eqn.params.values() for x in (p if isinstance(p, tuple) else (p,))]
        bodies = [body for body in bodies if hasattr(body, "eqns")]
        if eqn.primitive.name == "scan" and eqn.params["length"] == LAYERS:
            # Carries come out whole; what the loop stacks gains an axis.
            outer, inner = eqn.outvars, bodies[0].outvars
            carries = [x.aval for x, y in zip(outer, inner, strict=True) if x.aval.ndim == y.aval.ndim]
            count += sum(aval.ndim > 1 and aval.shape[0] == LAYERS for aval in carries)
        count += sum(map(carried_sums, bodies))
    return count


@pytest.mark.parametrize("loss", [scanned, jitted, unrolled, decayed, beside_others, in_halves, weighted])
@pytest.mark.parametrize("in_place", [True, None])
def test_gradients_are_those_added_afterwards(loss, in_place):
    """Adding twice, into the wrong slice, or before the weight is known to be 0."""
    want = added_afterwards(loss)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(want))
    equal(jax.jit(jaxaccum.value_and_grad(loss, K, in_place=in_place))(params(), batch()), want)


@pytest.mark.parametrize(
    ("loss", "in_place", "leaves"),
    [
        (scanned, None, 2),
        (jitted, None, 2),
        (unrolled, True, 0),
        (decayed, None, 0),
        (beside_others, None, 0),
        (in_halves, None, 0),
        (weighted, None, 2),
        (weighted, True, 2),
        (scanned, False, 0),
    ],
)
def test_rule(loss, in_place, leaves):
    """A rule that takes what it makes slower, or leaves what would gain."""
    assert adds(jaxaccum.value_and_grad(loss, K, in_place=in_place), params(), batch()) == leaves


def over(*stacks):
    """A scan that adds up the rows of `stacks`."""
    row = lambda total, rows: (total + sum(jnp.sum(x) for x in rows), None)
    return jax.lax.scan(row, 0.0, stacks)[0]


ROWS = jnp.ones((LAYERS, 2))
# What a function of the stacks `a` and `b` and of data `x` does, and which stacks one scan alone uses, and whole.
WALKED = {
    "one scan": (lambda a, b, x: over(a, b), "ab"),
    "two scans": (lambda a, b, x: over(a) + over(b), "ab"),
    "beside integers": (lambda a, b, x: over(a, x.astype(int)), "a"),
    "beside a constant": (lambda a, b, x: over(a, ROWS), "a"),
    "beside data": (lambda a, b, x: over(a, x) + over(b), "b"),
    "beside a computed stack": (lambda a, b, x: over(a, b + 1), ""),
    "one of them again": (lambda a, b, x: over(a, b) + jnp.sum(b), ""),
    "one of them returned": (lambda a, b, x: (over(a), over(b), b), "a"),
    "twice in one scan": (lambda a, b, x: over(a, a), ""),
    "in two scans": (lambda a, b, x: over(a, b) + over(a), ""),
    "whole in each iteration": (lambda a, b, x: jax.lax.scan(lambda c, a: (c + a @ b.T, None), jnp.zeros(3), a), "a"),
    "as a carry": (lambda a, b, x: jax.lax.scan(lambda c, a: (c + a, None), b, a), "a"),
    "no layers": (lambda a, b, x: over(a[:0]), ""),
    "in a jit": (lambda a, b, x: jax.jit(lambda x, b, a: over(a) + jnp.sum(b))(x, b, a), "a"),
    "in a jit and outside": (lambda a, b, x: jax.jit(over)(a, b) + jnp.sum(b), ""),
    "in a checkpoint": (lambda a, b, x: jax.checkpoint(over)(a) + over(b), "b"),
}


@pytest.mark.parametrize("name", WALKED)
def test_stacks_that_one_scan_uses(name):
    """Catches a stack of whose gradient a part is not added to its sum, and one that is not seen."""
    fun, want = WALKED[name]
    jaxpr = jax.make_jaxpr(fun)(*[jnp.ones((LAYERS, 2))] * 3).jaxpr
    found = in_place_sums.walked(jaxpr, set(jaxpr.invars[:2]))
    assert "".join(name for name, var in zip("ab", jaxpr.invars, strict=False) if var in found) == want


@pytest.mark.parametrize("reaches", [True, False])
def test_layers_under_a_checkpoint(reaches, monkeypatch):
    """Catches references where jax doesn't transpose to them, and an empty loop that has none."""
    monkeypatch.setattr(refs, "REACH_CHECKPOINTS", reaches)
    loop = lambda length: jax.make_jaxpr(lambda a: jax.lax.map(jax.checkpoint(jnp.sin), a))(jnp.ones((length, 2))).jaxpr
    assert [len(in_place_sums.walked(jaxpr, set(jaxpr.invars))) for jaxpr in map(loop, (3, 0))] == [reaches, 0]


def test_a_stack_in_part_of_another_dtype_than_its_sums():
    """References beside values in one scan, which jax 0.10 takes for each other."""
    p = params()
    p["layers"]["kernel"] = p["layers"]["kernel"].astype(jnp.bfloat16)
    assert adds(jaxaccum.value_and_grad(scanned, K), p, batch()) == 0
    # Sums in the parameters' own dtypes are such that a ref would fit, but of too few digits to be added to so.
    assert adds(jaxaccum.value_and_grad(scanned, K, accumulator_dtype=None), p, batch()) == 0


def test_a_slice_of_a_sum_keeps_all_axes():
    """A slice without its first axis, which XLA on a GPU copies before it adds to it."""
    jaxpr = jax.make_jaxpr(jaxaccum.value_and_grad(scanned, K))(params(), batch()).jaxpr
    stacks = {x.shape for x in jax.tree.leaves(params()["layers"])}
    made_by = {}
    for eqn in jaxprs.equations(jaxpr):
        made_by |= dict.fromkeys(eqn.outvars, eqn.primitive.name)
    updates = [eqn.invars[1] for eqn in jaxprs.equations(jaxpr) if eqn.primitive.name == "dynamic_update_slice"]
    added = [made_by[x] for x in updates if (LAYERS, *x.aval.shape[1:]) in stacks]
    assert added == ["add"] * len(stacks)


def half(x):
    return x.astype(jnp.bfloat16)


def in_half_precision(x, layer):
    return jnp.tanh((half(x) @ half(layer["kernel"])).astype(jnp.float32) + layer["bias"]), None


def of_half(layer):
    return lambda p, x: jnp.mean((jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]) ** 2)


def doubled(x, layer):
    """A layer whose cast, in a jit of its own, is of a computed value: no copy of a parameter."""
    kernel = jax.jit(half)(2 * layer["kernel"])
    return jnp.tanh((half(x) @ kernel).astype(jnp.float32) + layer["bias"]), None


def in_both_precisions(x, layer):
    y, _ = in_half_precision(x, layer)
    return y + x * layer["kernel"][0], None


HALF = {
    "plain": of_half(in_half_precision),
    "checkpoint": of_half(rematerialised(in_half_precision)),
    "jit": jax.jit(of_half(in_half_precision)),
    "jit in the layer": of_half(jax.jit(in_half_precision)),
    "both precisions": of_half(in_both_precisions),
    "computed": of_half(doubled),
}


@pytest.mark.parametrize("loss", HALF.values(), ids=HALF)
def test_copies_in_half_precision(loss):
    """With "auto", a gradient that goes to a half-precision copy and not to the sum, or to both."""
    f = lambda in_place: jaxaccum.value_and_grad(loss, K, prepare="auto", in_place=in_place)
    assert adds(f(None), params(), batch()) == (0 if loss is HALF["computed"] else 2)
    equal(jax.jit(f(None))(params(), batch()), jax.jit(f(False))(params(), batch()))


@jax.jit
def both_stacks_layers(x, stack):
    step = lambda x, w: (jnp.tanh((half(x) @ half(w)).astype(jnp.float32) + x @ w), None)
    return jax.lax.scan(step, x, stack)[0]


def weakly_typed(x, w):
    w = w.astype(jnp.float32)  # Only drops the weak type.
    return (half(x) @ half(w)).astype(jnp.float32), None


def normalised(x, w):
    return (half(x) @ half(w)).astype(jnp.float32) / jnp.sqrt(jnp.sum(w**2)), None


STACKS = {
    "one of two in a shared jit": (
        lambda p, x: jnp.mean(both_stacks_layers(both_stacks_layers(x, p[0]), p[1]) ** 2) + jnp.sum(p[0] ** 2),
        lambda: [0.3 * jnp.sin(jnp.arange(i, i + 192.0)).reshape(3, 8, 8) for i in (0, 1)],
    ),
    "weakly typed": (lambda p, x: jnp.mean(jax.lax.scan(weakly_typed, x, p)[0] ** 2), lambda: jnp.full((3, 8, 8), 0.1)),
    "no layers": (
        lambda p, x: jnp.mean((jax.lax.scan(lambda x, w: (x @ w, None), x, p)[0]) ** 2),
        lambda: jnp.zeros((0, 8, 8)),
    ),
    "more is hoisted": (lambda p, x: jnp.mean(jax.lax.scan(normalised, x, p)[0] ** 2), lambda: jnp.ones((3, 8, 8))),
}


@pytest.mark.parametrize("in_place", [None, True])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_that_are_no_plain_copies(name, in_place):
    """With "auto", a gradient that is lost or an error, where a scan's stack can't be a copy like any other."""
    if name == "one of two in a shared jit" and in_place:
        pytest.skip("the first stack is used twice, and its cast is hoisted: refused")
    loss, stacks = STACKS[name]
    p, x = stacks(), jnp.cos(jnp.arange(64.0)).reshape(8, 8)
    got = jaxaccum.value_and_grad(loss, 2, prepare="auto", in_place=in_place)(p, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.value_and_grad(loss)(p, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.01 * np.max(np.abs(b), initial=0))


TRANSFORMS = {
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "derivative": lambda f: jax.jacfwd(lambda p, x: f(p, x)[0]),
    "second derivative": lambda f: jax.grad(lambda p, x: sum(jnp.sum(g**2) for g in jax.tree.leaves(f(p, x)[1]))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_copies(name):
    """A copy that is a constant to the window but not to what is around it."""
    p = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params()) if name == "vmap" else params()
    f = lambda **options: TRANSFORMS[name](jaxaccum.value_and_grad(HALF["checkpoint"], K, **options))(p, batch())
    for x, y in zip(jax.tree.leaves(f(prepare="auto")), jax.tree.leaves(f()), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.05, atol=1e-3 * np.max(np.abs(y)))


def test_copies_where_gradients_are_not_added():
    """A float32 gradient of a stack, in place of a half-precision one, where no gradient is added in place."""

    def loss(p, x):  # Its weight is known after its forward pass only.
        weight = jax.lax.stop_gradient(p["head"][0] > 0).astype(jnp.float32)
        return jaxaccum.Weighted(HALF["plain"](p, x) * weight, weight)

    for options in ({}, {"accumulator_dtype": None, "prepare": "auto"}, {"in_place": False}):
        window = jaxaccum.value_and_grad(loss if not options else HALF["plain"], K, **{"prepare": "auto"} | options)
        jaxpr = jax.make_jaxpr(window)(
            jax.tree.map(half, params()) if "accumulator_dtype" in options else params(), batch()
        )
        stacked = [
            var.aval.dtype
            for eqn in jaxprs.equations(jaxpr.jaxpr)
            if eqn.primitive.name == "scan" and eqn.params["length"] == LAYERS
            for var in eqn.outvars
            if var.aval.shape == (LAYERS, WIDTH, WIDTH)
        ]
        assert set(stacked) <= {jnp.dtype(jnp.bfloat16)}, options


def mesh_of(axis_type, shape=(2,), names=("data",)):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=devices)


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("loss", [scanned, weighted])
@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_on_a_mesh(axis_type, loss, reduce):
    """A reference that lies otherwise than what is added to it, or that all devices share."""
    f = jaxaccum.value_and_grad(loss, K // 2, mesh=mesh_of(axis_type), in_place=True, reduce=reduce)
    assert adds(f, params(), batch()) == 2
    equal(jax.jit(f)(params(), batch()), added_afterwards(loss))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
def test_beside_a_model_axis(axis_type):
    """A sum that is laid out otherwise than its layers are."""
    mesh = mesh_of(axis_type, (2, 2), ("data", "model"))
    spec = {"layers": {"kernel": P(None, None, "model"), "bias": P(None, "model")}, "head": P()}
    split = jax.device_put(params(), jax.tree.map(lambda s: NamedSharding(mesh, s), spec))

    def layer(x, layer):
        y = jnp.einsum("ni,ij->nj", x, layer["kernel"], **out("model")) + layer["bias"]
        return jax.sharding.reshard(jnp.tanh(y), P(None, None)) if axis_type is EXPLICIT else jnp.tanh(y), None

    out = lambda axis: {"out_sharding": P(None, axis)} if axis_type is EXPLICIT else {}
    loss = lambda p, x: jnp.mean((jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]) ** 2)
    f = jaxaccum.value_and_grad(loss, K // 2, mesh=mesh)
    with jax.set_mesh(mesh):
        assert adds(f, split, batch()) == 2
        got = jax.jit(f)(split, batch())
    equal(got, added_afterwards(scanned))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_mapped_function(check_vma):
    """A reference that varies otherwise over the devices than what is added to it."""
    mesh = mesh_of(AUTO)
    f = jaxaccum.value_and_grad(weighted, K // 2, axis_name="data", in_place=True)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
    assert adds(mapped, params(), batch()) == 2
    equal(jax.jit(mapped)(params(), batch()), added_afterwards(weighted))


def test_with_a_traced_k_keys_aux_and_a_carry():
    """Loops other than the plain scan, and losses that take and return more."""

    def loss(p, x, key, count):
        x = x * jax.random.bernoulli(key, 0.9, x.shape)
        return scanned(p, x), (count + 1, x[0, 0])

    options = dict(stacked=True, has_aux=True, key_argnums=2, carry_argnums=3)
    f = lambda in_place: jax.jit(
        lambda p, x, key, k: jaxaccum.value_and_grad(loss, k, in_place=in_place, **options)(p, x, key, jnp.array(0))
    )(params(), batch().reshape(K, N, WIDTH), jax.random.key(3), 3)
    equal(f(None), f(False))


def micro_steps(loss, in_place, boundary, axis_name=None):
    """Parameters after two windows of `MultiSteps.micro_step`."""
    tx = jaxaccum.MultiSteps(optax.adam(0.1), K, in_place=in_place, axis_name=axis_name)

    def train(p, x):
        state = tx.init(p)
        for i in range(2 * K):
            rows = x.reshape(K, -1, WIDTH)[i % K]
            _, p, state = tx.micro_step(loss, p, state, rows, boundary=boundary(i))
        return p

    return train


BOUNDARIES = {"static": lambda i: i % K == K - 1, "counter": lambda i: None}


@functools.cache
def micro_steps_added_afterwards(loss, boundary):
    """Parameters after two windows without references, on one device."""
    return jax.jit(micro_steps(loss, False, BOUNDARIES[boundary]))(params(), batch())


@pytest.mark.parametrize("loss", [scanned, weighted])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_micro_steps(loss, boundary):
    """A window that starts from the sums of the one before, or adds twice."""
    train = micro_steps(loss, True, BOUNDARIES[boundary])
    assert adds(train, params(), batch()) == 2 * 2 * K
    equal(jax.jit(train)(params(), batch()), micro_steps_added_afterwards(loss, boundary))


@pytest.mark.parametrize("check_vma", [True, False])
def test_micro_steps_in_a_mapped_function(check_vma):
    """A reference that varies otherwise over the devices than what is added to it."""
    train = micro_steps(scanned, True, BOUNDARIES["static"], axis_name="data")
    mapped = jax.shard_map(train, mesh=mesh_of(AUTO), in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
    rows = jnp.tile(batch(), (2, 1))  # Both devices have the same: the mean of two equal gradients.
    equal(jax.jit(mapped)(params(), rows), micro_steps_added_afterwards(scanned, "static"))


def test_what_can_not_be_taken_out_is_not_added_in_place():
    """A NaN in the sums that was to be dropped."""
    for options in ({"nonfinite": "drop"}, {"should_skip_update_fn": lambda grads, step, params: (False, ())}):
        with pytest.raises(ValueError, match="in_place=True"):
            jaxaccum.MultiSteps(optax.sgd(1.0), 2, in_place=True, **options)
        tx = jaxaccum.MultiSteps(optax.sgd(1.0), 2, **options)
        assert adds(lambda p, x, tx=tx: tx.micro_step(scanned, p, tx.init(p), x)[1], params(), batch()) == 0


def test_memory():
    """Room for a second gradient: what in-place is there to save."""
    many = lambda x: jnp.tile(x, (32, *[1] * (x.ndim - 1)))
    p = params() | {"layers": jax.tree.map(many, params()["layers"])}
    size = sum(x.nbytes for x in jax.tree.leaves(p["layers"]))

    def temporary(fun, *args):
        return jax.jit(fun).lower(p, *args).compile().memory_analysis().temp_size_in_bytes

    gradient = temporary(jax.value_and_grad(scanned), batch()[:N])
    for in_place in (False, None):
        window = temporary(jaxaccum.value_and_grad(scanned, K, in_place=in_place), batch())
        assert (window - gradient > 0.8 * size) == (in_place is False), (in_place, window, gradient, size)
    auto = functools.partial(jaxaccum.value_and_grad, HALF["checkpoint"], K, prepare="auto")
    assert temporary(auto(in_place=False), batch()) - temporary(auto(), batch()) > 0.4 * size


@pytest.mark.parametrize("strategy", ["single", "ddp"])
@pytest.mark.parametrize("loss", [scanned, weighted])
def test_the_trainer(strategy, loss):
    """A Trainer that makes a second tree of gradients where a window makes none."""
    task = jaxaccum.Task(lambda key, batch: params(), lambda p, x, key: loss(p, x), optax.sgd(0.1))
    devices = strategies.Strategy(strategy, "auto")
    programs = compiled.Programs(task, devices, task.optimizer, "propagate", 0)
    state = programs.initial(np.asarray(batch()), Processes())
    (piece,) = devices.pieces([np.asarray(batch())])
    for counts in (False, True):
        add = functools.partial(programs._add_piece, counts=counts)
        # What may not count can't be added inside: a share of weight 0, or on several devices one without examples.
        expected = 2 if counts or (strategy, loss) == ("single", scanned) else 0
        assert adds(add, state.params, state.pending, *piece.inputs) == expected
