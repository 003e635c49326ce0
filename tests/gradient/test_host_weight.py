"""`HostDriven` runs micro-batches that the host knows to count without a selection, and all others as before."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles
from devices import KINDS, MESHES, make, on_data, placed
from devices import batch as rows_of_devices
from devices import loss as masked_loss
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import Weighted
from jaxaccum._devices.topology import OneDevice
from jaxaccum._gradient.host_weight import HostWeight
from jaxaccum._gradient.roles import Roles
from jaxaccum._multi_steps import host_driven

K, N, WIDTH, LAYERS = 3, 6, 16, 3
CAREFUL, FAST = False, True


def params(dtype=jnp.float32, layers=LAYERS):
    draw = lambda i, *shape: (0.3 * jax.random.normal(jax.random.key(i), shape)).astype(dtype)
    return {"layers": draw(0, layers, WIDTH, WIDTH), "head": draw(1, WIDTH, WIDTH), "bias": draw(2, WIDTH)}


def forward(p, x):
    h = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x.astype(p["bias"].dtype), p["layers"])[0]
    return (h @ p["head"] + p["bias"]).astype(jnp.float32)


def plain(p, b):
    return jnp.mean(forward(p, b["x"]) ** 2)


def loss(p, b):
    """The sum of squares over examples, and the number that count."""
    mask = jnp.where(b["mask"] > 0.5, 1.0, 0.0)
    return Weighted(jnp.sum(forward(p, b["x"]) ** 2 * mask[:, None]), jnp.sum(jnp.clip(mask, 0, 1)))


def batch(i, counts=True, n=N):
    """Micro-batch i, of numpy arrays; its rows are NaN if it doesn't count."""
    rng = np.random.default_rng(i)
    x = rng.standard_normal((n, WIDTH)).astype(np.float32)
    mask = (np.arange(n) % 3 < 2).astype(np.float32)
    return {"x": x, "mask": mask} if counts else {"x": np.full_like(x, np.nan), "mask": 0 * mask}


def multi_steps(**options):
    return jaxaccum.MultiSteps(optax.adamw(1e-2), K, **options)


def told(state):
    """All but the sums, which mean nothing after a boundary."""
    return state._replace(acc_grads=None, weight=None)


def assert_equal(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, **{"atol": 0} | tolerance)
        assert np.isfinite(np.asarray(y, np.float64)).all()


def programs(step):
    """How many programs were compiled: {of which kind: (accumulating, closing)}."""
    return {kind: tuple(program._cache_size() for program in pair) for kind, pair in step._programs.items()}


def ran(loss, *args, p=None, **options):
    """The kind of program that one micro-step runs."""
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2, **options)
    p = jnp.ones(3) if p is None else p
    step = jaxaccum.HostDriven(tx, loss)
    step(p, tx.init(p), *args)
    (kind,) = [kind for kind, pair in programs(step).items() if any(pair)]
    return kind


def train(step, tx, p, batches):
    """The losses, parameters and state after the micro-batches."""
    p = jax.tree.map(jnp.copy, p)
    state, losses = tx.init(p), []
    for b in batches:
        value, p, state = step(p, state, b)
        losses.append(value)
    return losses, p, told(state)


CAST = jaxaccum.cast(jnp.bfloat16, where=lambda path, leaf: leaf.ndim >= 2)
OPTIONS = [
    {},
    {"in_place": True},
    {"in_place": False},
    {"nonfinite": "drop"},
    {"accumulator_dtype": jnp.bfloat16},
    {"prepare": CAST},
]
OUT = [(), (0,), (1,), (2,), (3, 4, 5), (0, 5, 6, 7, 8)]


CASES = [*((options, jnp.float32) for options in OPTIONS), ({}, jnp.bfloat16), ({"nonfinite": "drop"}, jnp.bfloat16)]


@pytest.mark.parametrize(("options", "dtype"), CASES, ids=[f"{'-'.join(o)} {d.__name__}" for o, d in CASES])
def test_it_trains_as_the_counter_does(options, dtype):
    """Catches NaN from a micro-batch of weight 0, at each place of a window, and one that counts and is left out."""
    tx = multi_steps(**options)
    counter = jax.jit(functools.partial(tx.micro_step, loss))
    step = jaxaccum.HostDriven(tx, loss)
    for out in OUT:
        batches = [batch(i, i not in out) for i in range(3 * K)]
        got, want = (train(f, tx, params(dtype), batches) for f in (step, counter))
        # The programs differ, hence what XLA fuses.
        assert_equal(got, want, atol=2e-2 if dtype == jnp.bfloat16 or len(options) else 2e-5)


@pytest.mark.parametrize("out", OUT, ids=str)
def test_sums_of_integers_are_exact(out):
    """Catches one bit: a gradient in whole numbers has no rounding."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K)
    exact = lambda w, b: Weighted(jnp.sum(w * b["x"] * b["mask"]), jnp.sum(b["mask"]))
    step = jaxaccum.HostDriven(tx, exact)
    p, state, want = jnp.zeros(()), tx.init(jnp.zeros(())), 0.0
    for window in range(3):
        total = weight = 0
        for i in range(window * K, window * K + K):
            b = {"x": np.arange(4.0) + i, "mask": np.array([1.0, 0, 1, 2])}
            if i in out:
                b = {"x": b["x"] * np.nan, "mask": 0 * b["mask"]}
            else:
                total, weight = total + np.sum(b["x"] * b["mask"]), weight + 4
            _, p, state = step(p, state, b)
        want = np.float32(want - np.float32(total) / np.float32(weight)) if weight else want
        assert p == want
    counts = {kind: sum(pair) for kind, pair in programs(step).items()}
    assert (counts[CAREFUL] > 0, counts[FAST]) == (bool(out), 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh(name, kind):
    """Catches a device whose own weight is 0 in the program without a selection, and the careful one for all others."""
    mesh, axis, devices = make(name, kind)
    data = jax.tree.map(np.asarray, rows_of_devices(devices=devices))
    data["x"] = np.where(data["mask"][:, None] > 0, data["x"], np.nan)  # Device 3 has no row that counts.
    full = data | {"mask": np.ones_like(data["mask"]), "x": np.nan_to_num(data["x"])}

    def guarded(p, b):
        return masked_loss(p, b | {"x": jnp.where(b["mask"][:, None] > 0, b["x"], 0)})

    def unguarded(p, b):
        """NaN on device 3."""
        return guarded(p, b)._replace(total=guarded(p, b).total / jnp.minimum(jnp.sum(b["mask"]), 1.0))

    tx = jaxaccum.MultiSteps(optax.adam(0.01), 2, mesh=mesh, data_axis=axis)
    for context in (contextlib.nullcontext, lambda: jax.set_mesh(mesh))[: 2 if name == "data" else 1]:
        with context():
            step = jaxaccum.HostDriven(tx, unguarded)
            p, state = placed(mesh), tx.init(placed(mesh))
            for b in (full, on_data(mesh, axis, full)):
                _, p, state = step(p, state, b)
            assert (any(programs(step)[CAREFUL]), all(programs(step)[FAST])) == (False, True)
            for b in (data, full, full, on_data(mesh, axis, data)):
                _, p, state = step(p, state, b)
            assert all(programs(step)[CAREFUL])

    opt, q = optax.adam(0.01), placed(make(name, "auto")[0])
    inner = opt.init(q)
    for window in ((full, full), (data, full), (full, data)):
        parts = lambda q, window=window: [guarded(q, b) for b in window]
        mean = lambda q, parts=parts: sum(x.total for x in parts(q)) / sum(x.weight for x in parts(q))
        updates, inner = opt.update(jax.grad(mean)(q), inner, q)
        q = optax.apply_updates(q, updates)
    assert_equal(p, q, atol=1e-5)


def test_a_loss_that_names_the_mesh():
    """Catches a loss that is traced without its axes, and runs the careful program for ever."""
    mesh, axis, devices = make("data x fsdp x model", "auto")

    def loss(w, b):
        index = jax.lax.axis_index(("data", "fsdp"))
        x = jax.lax.with_sharding_constraint(b["x"], P(None, "model"))
        return Weighted(jnp.sum(x @ w) * (1 + index), jnp.sum(jnp.where(b["mask"] > 0.5, 1.0, 0.0)))

    b = {"x": np.ones((2 * devices, 2), np.float32), "mask": np.ones(2 * devices, np.float32)}
    p = jax.device_put(jnp.ones(2), NamedSharding(mesh, P()))
    assert ran(loss, b, p=p, mesh=mesh, data_axis=axis) is FAST
    b["mask"][:2] = 0
    assert ran(loss, b, p=p, mesh=mesh, data_axis=axis) is CAREFUL


def test_an_argument_beside_the_batch_is_whole_on_each_device():
    """Catches a number that is divided over the devices with the batch, so that no weight can be told."""
    mesh, _, devices = make("data", "auto")
    fun = lambda w, x, scale: Weighted(SQUARE(w, x), jnp.sum(x) * jnp.max(scale))
    p, x = jax.device_put(jnp.ones(3), NamedSharding(mesh, P())), np.ones((2 * devices, 3), np.float32)
    for scale in (2.0, np.ones(3, np.float32)):
        assert ran(fun, x, scale, p=p, mesh=mesh) is FAST
        assert ran(fun, x, 0 * scale, p=p, mesh=mesh) is CAREFUL


SQUARE = lambda w, x: jnp.sum((x @ w) ** 2)
X = np.ones((4, 3), np.float32)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("fun", "args", "kind"),
    [
        (SQUARE, (X,), FAST),
        (lambda w, x: Weighted(SQUARE(w, x), None), (X,), FAST),
        (lambda w, x: Weighted(SQUARE(w, x), 2), (X,), FAST),
        (lambda w, x: Weighted(SQUARE(w, x), x.shape[0]), (X,), FAST),
        (lambda w, x: Weighted(SQUARE(w, x), jnp.float32(2)), (X,), FAST),
        (lambda w, x: Weighted(SQUARE(w, x), jnp.sum(jnp.arange(3))), (X,), FAST),
        (lambda w, x: Weighted(SQUARE(w, x), jnp.sum(x)), (X,), FAST),
        (lambda w, x, n: Weighted(SQUARE(w, x), n), (X, 3), FAST),
        (lambda w, x, n: Weighted(SQUARE(w, x), n), (X, 3.0), FAST),
        (lambda w, x, n: Weighted(SQUARE(w, x), n), (X, True), FAST),
        (lambda w, x, key: Weighted(SQUARE(w, x) * jax.random.uniform(key), jnp.sum(x)), (X, KEY), FAST),
        (lambda w, x, n: Weighted(SQUARE(w, x), n), (X, 0), CAREFUL),
        (lambda w, x, n: Weighted(SQUARE(w, x), n), (X, False), CAREFUL),
        (lambda w, x: Weighted(SQUARE(w, x), 0), (X,), CAREFUL),
        (lambda w, x: Weighted(SQUARE(w, x), 0.0), (X,), CAREFUL),
        (lambda w, x: Weighted(SQUARE(w, x), jnp.zeros(())), (X,), CAREFUL),
        (lambda w, x: Weighted(SQUARE(w, x), jnp.sum(x)), (X[:0],), CAREFUL),
        (lambda w, x: Weighted(SQUARE(w, x), jax.lax.stop_gradient(w[0])), (X,), CAREFUL),
        (lambda w, x: Weighted(SQUARE(w, x), jnp.sum(x @ x.T)), (X,), CAREFUL),
        (lambda w, x, key: Weighted(SQUARE(w, x), 1 + jax.random.uniform(key)), (X, KEY), CAREFUL),
    ],
)
def test_which_program_runs(fun, args, kind):
    """Catches a weight that may be 0 in the program without a selection, and a selection for one that can't be."""
    assert ran(fun, *args) is kind


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, jnp.bfloat16, np.float16, np.int32, np.int8, np.uint32, bool]
)
@pytest.mark.parametrize(("x64", "promotion"), [(False, "standard"), (True, "strict")])
def test_masks_of_each_dtype(dtype, x64, promotion):
    """Catches a test that promotes dtypes, or that raises for arrays of another type than the loss was traced with."""

    def fun(w, b):
        valid = b["nested"][1]
        weight = jnp.any(valid) if valid.dtype == bool else jnp.sum(jnp.where(valid > valid[0] - valid[0], valid, 0))
        return Weighted(SQUARE(w, b["x"]), weight)

    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        p = jnp.ones(3, jnp.float32)
        for form in (np.asarray, jnp.asarray):
            b = lambda mask, form=form: {"x": X, "nested": (None, form(np.array(mask, dtype)))}
            assert ran(fun, b([1, 1, 0, 0]), p=p) is FAST
            assert ran(fun, b([0, 0, 0, 0]), p=p) is CAREFUL


@pytest.mark.parametrize("weight", [1e-45, 1e-7, 1e-4, 0.0, -0.0, -1.0, np.nan])
def test_weights_that_may_not_count(weight):
    """Catches a weight that may be a rounding error, of which a device may make 0, and one that hides a 0."""
    fun = lambda w, x, weight: Weighted(SQUARE(w, x), weight)
    assert ran(fun, X, np.float32(weight)) is CAREFUL
    assert ran(fun, X, np.float32(1e-3)) is ran(fun, X, np.float32(np.inf)) is FAST


@jax.tree_util.register_pytree_node_class
class Rows:
    """A batch that only holds leaves with a shape."""

    def __init__(self, x, mask):
        assert x.shape[:1] == mask.shape
        self.x, self.mask = x, mask

    def tree_flatten(self):
        return (self.x, self.mask), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        del aux
        return cls(*children)


def test_a_batch_of_a_class():
    """Catches a batch that is rebuilt from what is no array."""
    mesh, _, devices = make("data", "auto")
    fun = lambda w, rows: Weighted(SQUARE(w, rows.x), jnp.sum(rows.mask))
    rows = lambda n: Rows(np.ones((n, 3), np.float32), np.ones(n, np.float32))
    assert ran(fun, rows(4)) is FAST
    p = jax.device_put(jnp.ones(3), NamedSharding(mesh, P()))
    assert ran(fun, rows(devices), p=p, mesh=mesh) is FAST


def test_shapes_that_change():
    """Catches a test of one shape that another shape's arrays are given to."""
    tx = multi_steps()
    step, p = jaxaccum.HostDriven(tx, loss), params()
    state = tx.init(p)
    for n in (6, 3, 6, 9, 3):
        for counts in (True, False):
            value, p, state = step(p, state, batch(n, counts, n))
            assert (float(value) > 0) == counts
    assert programs(step)[FAST] != programs(step)[CAREFUL] != (0, 0)


def test_the_loss_is_traced_once_more():
    """Catches a trace in each call, for each state or for each shape of a Python number."""
    traces = []

    def counted(w, b, scale):
        traces.append(1)
        return Weighted(SQUARE(w, b["x"]) * scale, jnp.sum(b["mask"]))

    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2)
    step = jaxaccum.HostDriven(tx, counted)
    for start in range(3):
        p = jnp.ones(3)
        state = tx.init(p)
        for i in range(4):
            _, p, state = step(p, state, {"x": X, "mask": np.ones(4, np.float32)}, start + i * 0.5 + 0.1)
    assert len(traces) == 3
    with counted_compiles() as compiles:
        p = jnp.ones(3)
        state = tx.init(p)
        compiles.clear()
        _, p, state = step(p, state, {"x": X, "mask": np.ones(4, np.float32)}, 0.25)
    assert compiles == []


def test_a_loss_that_raises_at_first():
    """Catches the careful program for all later calls, where the first trace failed for another reason."""
    broken = True

    def fun(w, x):
        if broken:
            raise RuntimeError("no data")
        return Weighted(SQUARE(w, x), jnp.sum(x))

    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2)
    step, p = jaxaccum.HostDriven(tx, fun), jnp.ones(3)
    state = tx.init(p)
    with pytest.raises(RuntimeError, match="no data"):
        step(p, state, X)
    assert step.mini_step == 0
    broken = False
    step(p, state, X)
    assert programs(step) == {CAREFUL: (0, 0), FAST: (1, 0)}


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        ({"x": X, "mask": 1.0}, ValueError, "is a scalar and can't be split"),
        ({"x": X, "mask": np.float32(1)}, ValueError, "is a scalar and can't be split"),
        ({"x": X, "mask": X[:, 0]}, ValueError, "4 examples can't be split over 8 devices"),
        ({"x": X[:0], "mask": X[:0, 0]}, ValueError, "0 examples can't be split over 8 devices"),
        ({"x": "rows", "mask": X[:, 0]}, TypeError, "abstract array"),
        (None, TypeError, "batch argument"),
    ],
)
def test_errors_are_those_of_the_program(b, error, message):
    """Catches an error about the host's test in place of the one that explains the mistake."""
    mesh, *_ = make("data", "auto")
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2, mesh=mesh)
    fun = lambda w, *b: Weighted(SQUARE(w, b[0]["x"]), jnp.sum(b[0]["mask"]))
    p = jax.device_put(jnp.ones(3), NamedSharding(mesh, P()))
    state = tx.init(p)
    with pytest.raises(error, match=message):
        jaxaccum.HostDriven(tx, fun)(p, state, *(() if b is None else (b,)))
    assert not jax.tree.leaves(state)[0].is_deleted()


def test_a_deleted_batch():
    """Catches another error than jax's, and a state that is lost to it."""
    tx = multi_steps()
    step, p = jaxaccum.HostDriven(tx, loss), params()
    state = tx.init(p)
    b = jax.tree.map(jnp.asarray, batch(0))
    _, p, state = step(p, state, b)
    b["mask"].delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        step(p, state, b)
    _, p, state = step(p, state, batch(0))
    assert int(state.mini_step) == step.mini_step == 2


def test_arrays_that_are_still_computed():
    """Catches a mask that is read before it is there."""
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, y: jnp.tanh(y @ y), x)[:4, 0] * 0)
    fun = lambda w, b: Weighted(SQUARE(w, b["x"]), jnp.sum(b["mask"]))
    assert ran(fun, {"x": X, "mask": slow(jnp.ones((200, 200)))}) is CAREFUL
    assert ran(fun, {"x": X, "mask": 1 + slow(jnp.ones((200, 200)))}) is FAST


@pytest.mark.parametrize("effect", [lambda: jax.debug.print(""), lambda: jax.debug.callback(lambda: None)])
def test_a_loss_with_effects(effect):
    """Catches an effect that the host's test runs once more: of a plain loss and of a `Weighted` one."""
    happened = []

    def fun(w, x, weigh):
        effect()
        jax.debug.callback(lambda: happened.append(1))
        return Weighted(SQUARE(w, x), jnp.sum(x)) if weigh is None else SQUARE(w, x)

    for weigh in (None, 1):
        happened.clear()
        ran(fun, X, weigh)
        jax.effects_barrier()
        assert len(happened) == 1


CONTEXTS = {
    "none": contextlib.nullcontext,
    "default device": lambda: jax.default_device(jax.devices()[3]),
    "no jit": jax.disable_jit,
    "no transfers": lambda: jax.transfer_guard("disallow"),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "auto mesh": lambda: jax.set_mesh(make("data", "auto")[0]),
    "explicit mesh": lambda: jax.set_mesh(make("data", "explicit")[0]),
    "model mesh": lambda: jax.set_mesh(make("data x fsdp x model", "explicit")[0]),
}


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name, is_split):
    """Catches a test that runs on the caller's devices or in their mode, where it raises or is taken for another."""
    b, empty = (jax.tree.map(jnp.asarray, batch(0, counts, n=8)) for counts in (True, False))
    tx = multi_steps()
    p, state = params(), tx.init(params())
    with CONTEXTS[name]():
        if is_split:
            if "mesh" not in name:
                pytest.skip("no mesh")
            if "auto" not in name and jax.__version_info__ < (0, 10):
                pytest.skip("jax 0.9 has no gradient for parameters that are not placed on explicit axes")
            mesh = make("data", "explicit" if "explicit" in name else "auto")[0]
            if "model" in name:
                mesh = make("data x fsdp x model", "explicit")[0]
            b, empty = jax.device_put((b, empty), NamedSharding(mesh, P("data")))
        step = jaxaccum.HostDriven(tx, loss)
        positive = [step._weight.is_positive(p, b), step._weight.is_positive(p, empty)]
        assert positive == [FAST, CAREFUL]
        if name != "no transfers":
            step(p, state, b)


def test_without_a_cpu(monkeypatch):
    """Catches an error where JAX_PLATFORMS names no CPU, and a plain loss that needs one."""

    def no_cpu(*args, backend=None, **kwargs):
        raise RuntimeError(f"Unknown backend {backend}")

    fun = lambda w, x: Weighted(SQUARE(w, x), jnp.sum(x))
    assert ran(fun, X) is FAST
    monkeypatch.setattr(jax, "local_devices", no_cpu)
    assert ran(fun, X) is CAREFUL
    assert ran(SQUARE, X) is FAST


def test_constants_of_the_loss():
    """Catches constants that lie on other devices than the host's, and large ones that the weight doesn't need."""
    device = jax.devices()[3]
    mask = jax.device_put(jnp.array([1.0, 0, 0, 0]), device)
    split = jax.device_put(jnp.ones(8), NamedSharding(make("data", "auto")[0], P("data")))
    fun = lambda w, x: Weighted(SQUARE(w, x), jnp.sum(x[:, 0] * mask) * jnp.max(split))
    assert ran(fun, X) is FAST
    assert ran(fun, X * np.array([[0.0], [1], [1], [1]], np.float32)) is CAREFUL
    unread = lambda w, x: Weighted(SQUARE(w, x) * jax.random.uniform(KEY) * split[0], jnp.sum(x))
    assert ran(unread, X) is FAST


@pytest.mark.parametrize("position", [1, 2])
def test_a_weight_beside_a_carry(position):
    """Catches a carry that is taken for data, or that hides a weight of the data."""
    in_order = lambda x, carry: (carry, x) if position == 1 else (x, carry)
    of_data = lambda w, *args: (Weighted(SQUARE(w, args[2 - position]), jnp.sum(args[2 - position])), None)
    of_carry = lambda w, *args: (Weighted(SQUARE(w, args[2 - position]), args[position - 1]), None)
    roles = Roles(params=(0,), batch=(), keys=(), carry=(position,))
    known = lambda fun, x: HostWeight(fun, OneDevice(), roles).is_positive(jnp.ones(3), *in_order(x, jnp.ones(())))
    assert (known(of_data, X), known(of_data, 0 * X), known(of_carry, X)) == (True, False, False)


def test_large_constants_are_not_read(monkeypatch):
    """Catches an array of the loss that is copied to the host, though the weight does not need it."""
    read, asarray, large = [], np.asarray, jnp.ones(1000)
    fun = lambda w, x: (Weighted(SQUARE(w, x) * large[0], jnp.sum(x)), None)
    monkeypatch.setattr(np, "asarray", lambda x, *args, **kw: read.append(np.shape(x)) or asarray(x, *args, **kw))
    assert HostWeight(fun, OneDevice()).is_positive(jnp.ones(3), X)
    assert X.shape in read and large.shape not in read


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("closes_over", [True, False])
def test_inside_of_vmap(closes_over):
    """Catches a weight that is a tracer, and that the host reads."""
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 2)

    def window(x, scale):
        fun = lambda w, x, s: Weighted(SQUARE(w, x), jnp.sum(x) * (scale if closes_over else s))
        step, p = jaxaccum.HostDriven(tx, fun), jnp.ones(3)
        state = tx.init(p)
        for _ in range(2):
            _, p, state = step(p, state, x, scale)
        return p

    xs = jnp.stack([X, 0 * X, 2 * X])
    scales = jnp.array([1.0, 1.0, 0.0])
    got = jax.vmap(window)(xs, scales)
    for x, scale, p in zip(xs, scales, got, strict=True):
        np.testing.assert_allclose(p, window(x, scale), rtol=1e-6)


def test_a_test_is_of_the_types_and_settings_that_it_was_compiled_for():
    """Catches a test that runs on numbers of another type, and one that failed inside `jit` and is not retried."""
    fun = lambda w, x: (Weighted(SQUARE(w, x), jnp.sum(x)), None)
    weight, x = HostWeight(fun, OneDevice()), np.ones((4, 3))
    for x64 in (True, False, True):
        with jax.enable_x64(x64):
            assert weight.is_positive(jnp.ones(3), x) and not weight.is_positive(jnp.ones(3), 0 * x)
    weight, known = HostWeight(fun, OneDevice()), []
    assert weight.is_positive(jnp.ones(3), np.ones((4, 3), int)) and weight.is_positive(jnp.ones(3), x / 2)
    call = lambda w, x: known.append(weight.is_positive(w, x)) or w
    jax.jit(call)(jnp.ones(3), X)
    call(jnp.ones(3), X)
    assert known == [False, True]


def compiled(fun, counts=True, **options):
    """The accumulating and the closing program that a loss runs, compiled."""
    texts = []
    tx = multi_steps(**options)
    step, p = jaxaccum.HostDriven(tx, fun), params(layers=32)
    state = tx.init(p)
    pair = step._programs[step._weight.is_positive(p, batch(0, counts))]
    accumulate, close = pair
    pending = state._replace(inner_opt_state=None, prepared=())
    texts.append(accumulate.lower(p, state.prepared, pending, batch(0)).compile())
    texts.append(close.lower(p, state, batch(0)).compile())
    return texts


def full_size(program):
    """(the selections of arrays like the layers or the head, the conditionals) of a program."""
    shapes = "|".join(re.escape(",".join(map(str, x.shape))) for x in (params(layers=32)["layers"], params()["head"]))
    text = program.as_text()
    return len(re.findall(rf"\[({shapes})\]\S* select\(", text)), len(re.findall(r" conditional\(", text))


@pytest.mark.parametrize("options", [{}, {"in_place": True}, {"prepare": CAST}], ids=["", "in_place", "prepare"])
def test_the_program_is_that_of_a_plain_loss(options):
    """Catches a selection of the gradient, a conditional around it, or room for a second one."""
    if "prepare" in options:
        options = options | {"in_place": None}
    for program, expected in zip(compiled(loss, **options), compiled(plain, **options), strict=True):
        assert full_size(program) == full_size(expected)
        temporary = lambda program: program.memory_analysis().temp_size_in_bytes
        assert temporary(program) <= 1.02 * temporary(expected) + 1024
    careful = compiled(loss, counts=False, **options)
    assert full_size(careful[0]) != full_size(compiled(plain, **options)[0])


def test_products_add_to_their_sums():
    """Catches gradients of half-precision products that are rounded, since a selection might follow."""
    half = lambda w, x: jnp.sum((x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)
    fun = lambda w, x: Weighted(half(w, x), jnp.sum(x[:, 0] > 0))
    tx = multi_steps()
    step, p = jaxaccum.HostDriven(tx, fun), jnp.ones((16, 24))
    pending = tx.init(p)._replace(inner_opt_state=None)
    texts = [
        pair[0].trace(p, (), pending, jnp.ones((8, 16))).lower(lowering_platforms=("cuda",)).as_text()
        for pair in (step._programs[FAST], step._programs[CAREFUL])
    ]
    is_wide = ["(tensor<8x16xbf16>, tensor<8x24xbf16>) -> tensor<16x24xf32>" in text for text in texts]
    assert is_wide == [True, False]


def test_the_state_is_not_read(monkeypatch):
    """Catches a host that waits for the device's counters, and parameters that are flattened for each test."""
    tx = multi_steps()
    step, p = jaxaccum.HostDriven(tx, loss), params()
    _, p, state = step(p, tx.init(p), batch(0))
    monkeypatch.setattr(host_driven, "_on_host", lambda scalar: pytest.fail("read"))
    _, p, state = step(p, state, batch(1))
    _, p, state = step(p, state, batch(2, counts=False))

    class Unreadable:
        """No pytree: a leaf that would be asked for its shape."""

        @property
        def shape(self):
            pytest.fail("asked for its shape")

    assert step._weight.is_positive(Unreadable(), batch(3))
