"""Statistics of fp8 layers, whose "gradient" is their new value: a window keeps the largest, never an average."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import KINDS, mesh_of
from flax.linen import fp8_ops
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.flax

NAME = fp8_ops.OVERWRITE_WITH_GRADIENT
K = 3


@jax.custom_vjp
def observed(x, amax):
    """`x`; the gradient with respect to `amax` is the largest of `x`."""
    del amax
    return x


observed.defvjp(lambda x, amax: (x, jnp.max(jnp.abs(x))), lambda largest, g: (g, largest))


def params():
    return {"params": {"w": jnp.array(2.0)}, NAME: {"layer": {"amax": jnp.array(7.0)}}}


X = jnp.array([9.0, 5.0, 1.0])  # One example a micro-batch: the mean is 5, the last one 1.


def loss(p, x):
    return jnp.mean(observed(x, p[NAME]["layer"]["amax"]) * p["params"]["w"])


def counted(p, x):
    """Leaves micro-batches of negative numbers out."""
    return jaxaccum.Weighted(len(x) * loss(p, x), jnp.sum(x > 0))


def amax(tree):
    return tree[NAME]["layer"]["amax"]


@pytest.mark.parametrize(
    "options", [{}, {"prepare": "auto"}, {"in_place": True}, {"in_place": False}, {"accumulator_dtype": None}], ids=str
)
@pytest.mark.parametrize("form", ["split", "stacked", "traced", "eager"])
def test_windows(form, options):
    """Catches an average: 5.0 for 9.0."""
    f = lambda k=K, **form: jaxaccum.value_and_grad(loss, k, **options, **form)
    value, grads = {
        "split": lambda: jax.jit(f())(params(), X),
        "stacked": lambda: jax.jit(f(stacked=True))(params(), X[:, None]),
        "traced": lambda: jax.jit(lambda k: f(k, stacked=True)(params(), X[:, None]))(jnp.int32(K)),
        "eager": lambda: f()(params(), X),
    }[form]()
    assert amax(grads) == 9.0 and grads["params"]["w"] == 5.0 and value == 10.0


def test_statistics_in_a_field():
    """Catches statistics that are known in a dict alone, and not in a dataclass."""
    kind = dataclasses.make_dataclass("Params", ["w", NAME])
    kind = jax.tree_util.register_dataclass(kind, ["w", NAME], [])
    fun = lambda p, x: jnp.mean(observed(x, getattr(p, NAME)) * p.w)
    _, grads = jaxaccum.value_and_grad(fun, K)(kind(jnp.array(2.0), jnp.array(7.0)), X)
    assert (grads.w, getattr(grads, NAME)) == (5.0, 9.0)


@pytest.mark.parametrize("weights", ["all", "some", "none"])
def test_micro_batches_of_weight_zero(weights):
    """Catches the amax of padding, and statistics that a window of nothing resets."""
    x = {"all": X, "some": jnp.array([-9.0, 5.0, 1.0]), "none": -X}[weights]
    _, grads = jax.jit(jaxaccum.value_and_grad(counted, K))(params(), x)
    assert amax(grads) == {"all": 9.0, "some": 5.0, "none": 7.0}[weights]
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K)
    p, state = params(), tx.init(params())
    for i in range(K):
        _, p, state = tx.micro_step(counted, p, state, x[i : i + 1])
    assert amax(p) == {"all": 9.0, "some": 5.0, "none": 7.0}[weights]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_keep_their_dtype(dtype):
    """Catches a statistic in the dtype of its sums, so that the next step compiles again."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1)
    p = params() | {NAME: {"layer": {"amax": jnp.asarray(7.0, dtype)}}}
    new, _ = tx.apply(p, tx.init(p), jax.grad(loss)(params(), X))
    assert amax(new).dtype == dtype and amax(new) == 9.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["mean", "scatter"])
@pytest.mark.parametrize("prepare", [None, "auto"])
def test_windows_on_a_mesh(kind, reduce, prepare):
    """Catches a sum over the devices, or one device's own."""
    f = jaxaccum.value_and_grad(loss, K, mesh=mesh_of(kind), reduce=reduce, prepare=prepare)
    _, grads = jax.jit(f)(params(), jnp.arange(24.0))
    assert amax(grads) == 23.0 and grads["params"]["w"] == 11.5


@pytest.mark.parametrize("check_vma", [True, False])
def test_windows_in_a_mapped_function(check_vma):
    """Catches a sum over the devices."""
    f = jaxaccum.value_and_grad(loss, K, axis_name="data")
    options = {"mesh": mesh_of("auto"), "in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    _, grads = jax.jit(jax.shard_map(f, **options))(params(), jnp.arange(24.0))
    assert amax(grads) == 23.0


def streams(driver, tx, x):
    """The parameters after each micro-step on one entry of `x`."""
    p, state = params(), tx.init(params())
    host = jaxaccum.HostDriven(tx, loss)
    seen = []
    for i in range(len(x)):
        part, boundary = x[i : i + 1], (i + 1) % K == 0
        grads = jax.grad(loss)(p, part)
        if driver == "update":
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        elif driver == "apply":
            p, state = tx.apply(p, state, grads)
        elif driver == "host driven":
            _, p, state = host(p, state, part)
        else:
            boundary = {"counter": None, "static": boundary, "traced": jnp.asarray(boundary)}[driver]
            _, p, state = tx.micro_step(loss, p, state, part, boundary=boundary)
        seen.append(float(amax(p)))
    return p, seen


@pytest.mark.parametrize("driver", ["counter", "static", "traced", "host driven", "update", "apply"])
def test_streams(driver):
    """Catches the last micro-batch's, statistics that change within a window, and ones that an optimizer steps on."""
    tx = jaxaccum.MultiSteps(optax.adamw(0.1, weight_decay=0.1), K)
    p, seen = streams(driver, tx, jnp.array([9.0, 5.0, 1.0, 2.0, 4.0, 3.0]))
    assert seen == [7.0, 7.0, 9.0, 9.0, 9.0, 4.0]
    opt = optax.adamw(0.1, weight_decay=0.1)
    want = {"w": jnp.array(2.0)}
    state = opt.init(want)
    for mean in (5.0, 3.0):
        updates, state = opt.update({"w": jnp.array(mean)}, state, want)
        want = optax.apply_updates(want, updates)
    np.testing.assert_allclose(p["params"]["w"], want["w"], rtol=1e-6)


def test_a_partial_window():
    """Catches statistics that flush loses."""
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 8)
    _, p, state = tx.micro_step(loss, params(), tx.init(params()), X)
    updates, state = tx.flush(state, p)
    assert amax(optax.apply_updates(p, updates)) == 9.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_streams_on_a_mesh(kind, reduce):
    """Catches one device's own."""
    tx = jaxaccum.MultiSteps(optax.adam(0.1), 2, mesh=mesh_of(kind), reduce=reduce)
    p, state = params(), tx.init(params())
    for x in (jnp.arange(8.0), jnp.arange(8.0)[::-1] + 10):
        _, p, state = jax.jit(lambda *args: tx.micro_step(loss, *args))(p, state, x)
    assert amax(p) == 17.0


def test_sums_on_another_number_of_devices():
    """Catches statistics that are added up where local sums are merged."""
    many = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh_of("auto"))
    one = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
    _, p, state = many.micro_step(loss, params(), many.init(params()), jnp.arange(8.0))
    p, state = jax.device_put((p, one.redistribute(state, batch="per_device")), jax.devices()[0])
    _, p, _ = one.micro_step(loss, p, state, jnp.arange(4.0))
    assert amax(p) == 7.0


class Fp8(nn.Module):
    """Two layers whose products are in eight bits."""

    @nn.compact
    def __call__(self, x):
        dense = lambda n: nn.Dense(n, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
        return dense(16)(nn.relu(dense(16)(x)))


def fp8_loss(module):
    return lambda variables, x: jnp.mean(module.apply(variables, x) ** 2)


def big_batch(variables, x):
    """What one backward pass of the whole batch makes of the statistics."""
    return jax.grad(fp8_loss(Fp8()))(variables, x)[NAME]


def of_inputs(statistics):
    """The histories of activations and weights; those of gradients belong to micro-batches."""
    flat = jax.tree_util.tree_leaves_with_path(statistics)
    named = {jax.tree_util.keystr(path): x for path, x in flat}
    return {name: x for name, x in named.items() if "history" in name and "grad" not in name}


def fp8_batch():
    x = jax.random.normal(jax.random.key(1), (16, 16)) * jnp.linspace(0.1, 4.0, 16)[:, None]
    return x, Fp8().init(jax.random.key(0), x)


def assert_inputs_are_the_big_batchs(statistics, variables, x):
    got, want = of_inputs(statistics), of_inputs(big_batch(variables, x))
    assert len(want) == 4
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


@pytest.mark.parametrize("prepare", [None, "auto"])
def test_linen_windows(prepare):
    """Catches statistics that are never updated."""
    x, variables = fp8_batch()
    f = jaxaccum.flax.linen_value_and_grad(Fp8(), lambda model, x: jnp.mean(model(x) ** 2), 4, prepare=prepare)
    (_, new), grads = jax.jit(f)(variables, x)
    assert jax.tree.structure(new) == jax.tree.structure(variables) and set(grads) == set(variables["params"])
    assert_inputs_are_the_big_batchs(new[NAME], variables, x)
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])


def test_value_and_grad_of_linen_variables():
    """Catches histories that are averaged."""
    x, variables = fp8_batch()
    _, grads = jax.jit(jaxaccum.value_and_grad(fp8_loss(Fp8()), 4))(variables, x)
    assert_inputs_are_the_big_batchs(grads[NAME], variables, x)


def test_train_state():
    """Catches the last micro-batch's (1.0 for 9.0), and histories that shift within a window."""
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=params(), tx=jaxaccum.MultiSteps(optax.sgd(0.0), K))
    for x in (9.0, 5.0, 1.0):
        assert amax(state.params) == 7.0
        state = state.apply_gradients(grads=jax.grad(loss)(state.params, jnp.array([x])))
    assert amax(state.params) == 9.0
    x, variables = fp8_batch()
    tx = jaxaccum.MultiSteps(optax.sgd(0.1), 4)
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=variables, tx=tx)
    step = jax.jit(lambda state, x: state.apply_gradients(grads=jax.grad(fp8_loss(Fp8()))(state.params, x)))
    for i in range(4):
        state = step(state, x[i::4])
    assert_inputs_are_the_big_batchs(state.params[NAME], variables, x)


def test_train_state_around_a_multi_steps_that_is_not_outermost():
    """Catches statistics that a window would lose."""
    tx = optax.chain(jaxaccum.MultiSteps(optax.sgd(0.0), K), optax.scale(1.0))
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=params(), tx=tx)
    with pytest.raises(ValueError, match=rf"grads hold '{NAME}'.*outermost"):
        state.apply_gradients(grads=params())


@pytest.mark.parametrize("options", [{}, {"fuse_windows": True}], ids=str)
def test_linen_tasks(options):
    """Catches statistics that the Trainer never updates."""
    x, variables = fp8_batch()
    loss = lambda model, batch, train: jnp.mean(model(batch) ** 2)
    task = jaxaccum.flax.linen_task(Fp8(), loss, optax.sgd(0.1))
    trainer = jaxaccum.Trainer(
        accumulate_grad_batches=4, max_epochs=1, strategy="single", enable_progress_bar=False, seed=0, **options
    )
    batches = [np.asarray(x[i::4]) for i in range(4)]
    start, _ = task.init(jax.random.fold_in(jax.random.key(0), np.uint32(2**32 - 1)), batches[0])
    fitted = trainer.fit(task, batches)
    assert_inputs_are_the_big_batchs(fitted.params[NAME], start, x)
    assert variables.keys() == fitted.params.keys()


def test_the_optimizer_sees_what_flaxs_train_state_shows_it():
    """Catches masks and labels by top-level names that miss, and statistics that a rule for gradients judges."""
    _, variables = fp8_batch()
    seen = []
    decay = lambda p: seen.append(set(p)) or jax.tree.map(lambda _: True, p)
    inner = optax.chain(optax.add_decayed_weights(1.0, mask=decay), optax.sgd(0.5))
    tx = jaxaccum.MultiSteps(inner, 1, should_skip_update_fn=optax.skip_not_finite)
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=variables, tx=tx)
    state = state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2), state.params["params"], variables["params"])
    assert seen and all(names == set(variables["params"]) for names in seen)
    skip = lambda g, s, p: optax.skip_large_updates(g, s, p, max_squared_norm=50.0)
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), 1, should_skip_update_fn=skip)
    grads = {"params": {"w": jnp.array(1.0)}, NAME: {"layer": {"amax": jnp.array(10.0)}}}
    p, _ = tx.apply(params(), tx.init(params()), grads)
    assert p["params"]["w"] == 1.0 and amax(p) == 10.0
