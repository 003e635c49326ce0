"""ZeRO: the gradient and the optimizer's state split over the data axis, against one device with the big batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import K, assert_close, batch, big_batch, big_loss, inner, loss, params, split
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
MESHES = {"data": ((8,), ("data",)), "data x model": ((4, 2), ("data", "model"))}
every_mesh = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in MESHES for kind in KINDS])


def make(name, kind):
    """(mesh, number of devices of its data axis)."""
    shape, names = MESHES[name]
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(names)), shape[0]


def wide(p):
    """The problem's parameters with 16 more inputs that are always 0, so that the data axis divides them."""
    return {"w": jnp.zeros((16, 4), p["w"].dtype).at[:3].set(p["w"]), "b": p["b"]}


def wide_loss(p, data):
    return loss(p, {**data, "x": jnp.pad(data["x"], ((0, 0), (0, 13)))})


def narrow(p):
    """The first 3 inputs of `wide` parameters or gradients."""
    return {"w": np.asarray(p["w"])[:3], "b": p["b"]}


def placed(mesh):
    matrix = P(None, "model") if "model" in mesh.axis_names else P()
    return jax.device_put(wide(params()), {"w": NamedSharding(mesh, matrix), "b": NamedSharding(mesh, P())})


def on_data(mesh, data):
    return jax.device_put(data, NamedSharding(mesh, P("data")))


@every_mesh
def test_a_scattered_gradient_is_the_big_batchs(name, kind):
    """Catches a part of the gradient that lies on the wrong device, is one device's own, or is not split at all."""
    with jax.enable_x64(True):
        mesh, devices = make(name, kind)
        f = jaxaccum.value_and_grad(wide_loss, K, mesh=mesh, reduce="scatter")
        p, data = placed(mesh), batch(0, devices)
        value, grads = jax.jit(f)(p, on_data(mesh, data))
        assert_close((value, narrow(grads)), jax.value_and_grad(big_loss)(params(), data))
        assert grads["w"].sharding.is_equivalent_to(jaxaccum.zero_sharding(p["w"], mesh), 2)
        assert grads["w"].addressable_shards[0].data.shape[0] == 16 // devices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "drive"), [("data", "counter"), ("data x model", "static")])
def test_micro_steps_with_split_state_are_the_big_batch(name, kind, drive):
    """Catches clipping by the norm of one device's part, and parameters or state that are laid out anew."""
    with jax.enable_x64(True):
        mesh, devices = make(name, kind)
        tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh, reduce="scatter")
        start = placed(mesh)
        p, state = start, tx.init(start)
        step = jax.jit(lambda p, s, x, b: tx.micro_step(wide_loss, p, s, x, boundary=b), static_argnums=3)
        windows = [batch(seed, devices) for seed in (0, 1)]
        for i in range(2 * K):
            rows = jax.tree.map(
                lambda x, i=i: split(x, devices, K)[:, i % K].reshape(-1, *x.shape[1:]), windows[i // K]
            )
            boundary = None if drive == "counter" else i % K == K - 1
            _, p, state = step(p, state, on_data(mesh, rows), boundary)
        assert_close(narrow(p), big_batch(windows))
        assert p["w"].sharding.is_equivalent_to(start["w"].sharding, 2)
        for moment in (state.inner_opt_state[1][0].mu["w"], state.inner_opt_state[1][0].nu["w"]):
            assert moment.addressable_shards[0].data.shape[0] == 16 // devices


@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_parameters_that_lie_on_no_mesh_are_replicated_over_explicit_axes(reduce):
    """Catches a layout that XLA chooses in the first micro-step, whose type the second can't have or compiles for."""
    with jax.enable_x64(True):
        mesh, devices = make("data", "explicit")
        tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh, reduce=reduce)
        p = wide(params())
        state = tx.init(p)
        step = jax.jit(lambda p, s, x: tx.micro_step(wide_loss, p, s, x))
        window = batch(0, devices)
        for i in range(K):
            rows = jax.tree.map(lambda x, i=i: split(x, devices, K)[:, i].reshape(-1, *x.shape[1:]), window)
            _, p, state = step(p, state, on_data(mesh, rows))
            assert p["w"].sharding == NamedSharding(mesh, P(None, None))
        assert_close(narrow(p), big_batch([window]))
        assert step._cache_size() == 2  # For the parameters as they are given, and on the mesh.


@every_mesh
def test_the_update_in_global_code_clips_by_the_true_norm(name, kind):
    """Catches an update that each device makes of its own part."""
    with jax.enable_x64(True):
        mesh, devices = make(name, kind)
        opt, p, data = inner(), placed(mesh), batch(0, devices)
        f = jaxaccum.value_and_grad(wide_loss, K, mesh=mesh, reduce="scatter")
        state = opt.init(p)
        shardings = jaxaccum.zero_sharding(state, mesh), jax.tree.map(lambda x: x.sharding, p)
        state = jax.device_put(state, shardings[0])

        def step(state, p, data):
            _, grads = f(p, data)
            updates, state = opt.update(grads, state, p)
            return state, optax.apply_updates(p, updates)

        state, new = jax.jit(step, out_shardings=shardings)(state, p, on_data(mesh, data))
        assert_close(narrow(new), big_batch([data]))


def over_data(compiled, mesh, data_axis="data"):
    """(kind, axes, whether in a loop) of each collective over a data axis."""
    found = jaxaccum.collectives(compiled, mesh=mesh, data_axis=data_axis)
    return sorted((one.kind, one.axes, one.in_loop) for one in found.all if set(one.axes) & set(found.data_axes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_state_costs_a_reduce_scatter_and_a_gather(kind):
    """Catches an all-reduce, whose other parts are not needed, and a sync off the boundary."""
    mesh, devices = make("data", kind)
    tx = jaxaccum.MultiSteps(optax.adam(1e-3), K, mesh=mesh, reduce="scatter")
    p = placed(mesh)
    rows = on_data(mesh, split(batch(0, devices), devices, K)["x"][:, 0].reshape(-1, 3))
    fun = lambda p, x: jnp.sum((jnp.pad(x, ((0, 0), (0, 13))) @ p["w"]) ** 2)
    step = jax.jit(lambda p, s, x, b: tx.micro_step(fun, p, s, x, boundary=b), static_argnums=3)
    program = lambda boundary: over_data(step.lower(p, tx.init(p), rows, boundary).compile(), mesh)
    assert program(False) == []
    assert [(kind, loop) for kind, _, loop in program(True)] == [
        ("all-gather", False),
        ("all-reduce", False),  # Of the bias, which 8 devices can't share.
        ("reduce-scatter", False),
    ]


def test_the_state_takes_its_share_of_memory():
    """Catches moments that every device keeps whole."""
    mesh, devices = make("data", "auto")
    p = {"w": jnp.ones((64, 32)), "b": jnp.ones(3)}
    state = jaxaccum.MultiSteps(optax.adam(1.0), K, mesh=mesh, reduce="scatter").init(p)
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    whole = 2 * 4 * (64 * 32 + 3)
    assert held(state.inner_opt_state[0][1:]) == 2 * 4 * (64 * 32 // devices + 3)
    assert held(jax.jit(jaxaccum.MultiSteps(optax.adam(1.0), K, mesh=mesh).init)(p).inner_opt_state[0][1:]) == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["mean", "scatter"])
def test_parameters_over_an_fsdp_axis_that_is_a_data_axis_are_gathered_once(kind, reduce):
    """Catches a full local sum over fsdp shards that counts a shard twice, or a gather in every micro-step."""
    with jax.enable_x64(True):
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(KINDS[kind],) * 2)
        axes = ("data", "fsdp")
        f = jaxaccum.value_and_grad(wide_loss, K, mesh=mesh, data_axis=axes, reduce=reduce)
        shardings = {"w": NamedSharding(mesh, P("fsdp")), "b": NamedSharding(mesh, P())}
        p = jax.device_put(wide(params()), shardings)
        data = jax.device_put(batch(), NamedSharding(mesh, P(axes)))
        compiled = jax.jit(f).lower(p, data).compile()
        value, grads = compiled(p, data)
        want = jax.value_and_grad(big_loss)(params(), batch())
        assert_close((value, narrow(grads)), want)
        found = over_data(compiled, mesh, axes)
        assert ("all-gather", ("fsdp",), False) in found and not any(in_loop for _, _, in_loop in found)
        if kind == "explicit" and reduce == "mean":
            assert grads["w"].sharding.is_equivalent_to(shardings["w"], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_over_an_automatic_fsdp_axis_keep_their_layout(kind):
    """Catches accumulators that every device of the fsdp axis holds whole."""
    with jax.enable_x64(True):
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(KINDS[kind],) * 2)
        tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh)
        p = jax.device_put(wide(params()), {"w": NamedSharding(mesh, P("fsdp")), "b": NamedSharding(mesh, P())})
        state = tx.init(p)
        step = jax.jit(lambda p, s, x: tx.micro_step(wide_loss, p, s, x))
        window = batch(0, 4)
        for i in range(K):
            rows = jax.tree.map(lambda x, i=i: split(x, 4, K)[:, i].reshape(-1, *x.shape[1:]), window)
            rows = jax.device_put(rows, NamedSharding(mesh, P("data" if kind == "explicit" else ("data", "fsdp"))))
            _, p, state = step(p, state, rows)
            assert state.acc_grads["w"].addressable_shards[0].data.shape == (1, 8, 4)
        assert_close(narrow(p), big_batch([window]))


BOTH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("reduce", "data_axis", "spec", "drive"),
    [
        ("scatter", BOTH, P("fsdp"), "counter"),
        ("scatter", BOTH, P("fsdp"), "update"),
        ("scatter", BOTH, P(None, "fsdp"), "HostDriven"),
        ("scatter", BOTH, P(BOTH), "counter"),
        ("scatter", BOTH, P(BOTH), "prepare"),
        ("mean", "data", P(BOTH), "update"),
        ("mean", "data", P(BOTH), "HostDriven"),
    ],
)
def test_parameters_over_an_explicit_data_axis_keep_their_layout(reduce, data_axis, spec, drive):
    """Catches an optimizer step on sums and parameters in two layouts, which explicit axes do not add."""
    with jax.enable_x64(True):
        mesh = jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Explicit,) * 2)
        prepare = (lambda p: jax.tree.map(lambda x: 1.0 * x, p)) if drive == "prepare" else None
        tx = jaxaccum.MultiSteps(inner(), K, mesh=mesh, data_axis=data_axis, reduce=reduce, prepare=prepare)
        shardings = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P())}
        p = jax.device_put(wide(params()), shardings)
        state = tx.init(p)
        state_layout = jax.tree.map(lambda x: x.sharding, state.inner_opt_state)
        devices = 4 if data_axis == "data" else 8
        local = jaxaccum.local_value_and_grad(wide_loss, mesh=mesh, data_axis=data_axis)

        def update(p, state, rows):
            value, grads = local(p, rows)
            updates, state = tx.update(grads, state, p, weight=value.weight)
            return value, optax.apply_updates(p, updates), state

        counter = jax.jit(lambda p, state, rows: tx.micro_step(wide_loss, p, state, rows))
        step = {"update": jax.jit(update), "HostDriven": jaxaccum.HostDriven(tx, wide_loss)}.get(drive, counter)
        windows = [batch(seed, devices) for seed in (0, 1)]
        for i in range(2 * K):
            rows = jax.tree.map(
                lambda x, i=i: split(x, devices, K)[:, i % K].reshape(-1, *x.shape[1:]), windows[i // K]
            )
            _, p, state = step(p, state, jax.device_put(rows, NamedSharding(mesh, P(data_axis))))
        assert_close(narrow(p), big_batch(windows))
        assert p["w"].sharding.is_equivalent_to(shardings["w"], 2)
        is_kept = lambda x, layout: x.sharding.is_equivalent_to(layout, x.ndim)
        assert jax.tree.all(jax.tree.map(is_kept, state.inner_opt_state, state_layout))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "sum", "mesh": True}, "reduce must be 'mean' or 'scatter'.*got 'sum'"),
        ({"reduce": "scatter"}, "reduce='scatter' needs mesh="),
        ({"reduce": "scatter", "axis_name": "data"}, "reduce='scatter' needs mesh="),
    ],
)
def test_a_reduction_that_does_not_exist_is_refused(options, message):
    """Catches a typing error that would be taken for the default."""
    options = {**options, **({"mesh": make("data", "auto")[0]} if "mesh" in options else {})}
    with pytest.raises(ValueError, match=message):
        jaxaccum.value_and_grad(loss, K, **options)
    with pytest.raises(ValueError, match=message):
        jaxaccum.MultiSteps(optax.sgd(1.0), K, **options)


def test_shardings_split_the_first_dimension_that_divides():
    """Catches scalars and odd sizes that can't be split, and a split that takes another axis' place."""
    mesh, _ = make("data x model", "auto")
    model, short = jax.device_put((jnp.ones((8, 6)), jnp.ones((4, 6))), NamedSharding(mesh, P("model")))
    spec = lambda x: jaxaccum.zero_sharding(x, mesh).spec
    assert spec(jnp.ones(())) == P()
    assert spec(jnp.ones((3, 8))) == P(None, "data")
    assert spec(jnp.ones((3, 5))) == P(None, None)
    assert spec(model) == P(("data", "model"), None)
    assert spec(short) == P("data", None)
    assert spec(np.ones((4, 4))) == P("data", None)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_state_from_the_host_goes_on(devices):
    """Catches an optimizer state that only a step lays out: on one device, the second micro-step did not trace."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:devices])
    tx = jaxaccum.MultiSteps(optax.sgd(1.0, momentum=0.5), 2, mesh=mesh, reduce="scatter")
    p, data = jax.device_put((wide(params()), batch()), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))))
    step = jax.jit(lambda p, s, data: tx.micro_step(wide_loss, p, s, data)[1:])
    on_host = lambda state: tx.redistribute(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state))
    ends = []
    for passes in (lambda state: state, on_host):
        new, state = p, passes(tx.init(p))
        for _ in range(4):
            new, state = step(new, state, data)
        ends.append((new, state.inner_opt_state))
    jax.tree.map(np.testing.assert_array_equal, *ends)
