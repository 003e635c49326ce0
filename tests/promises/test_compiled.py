"""What the compiled programs hold, counted: compiles, traces, copies, conditionals, memory. Nothing is timed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles

import jaxaccum

PARAMS = {f"layer{i}": {"w": jnp.ones((64, 64)), "b": jnp.ones(64)} for i in range(4)}


def marked(opt):
    """`opt` with an operation in it that nothing else has."""
    mark = optax.stateless(lambda updates, params: jax.tree.map(jnp.tanh, updates))
    return optax.chain(mark, opt)


def compiled(fun, *args, **options):
    return jax.jit(fun, **options).lower(*args).compile()


def count(program, operation):
    """How many of an HLO operation the compiled program has, fusions and branches included."""
    return len(re.findall(rf"[\s\]}})]{operation}\(", program.as_text()))


def drives(tx):
    step = lambda boundary: lambda p, s, g: tx.apply(p, s, g, boundary=boundary)
    return {"counter": step(None), "accumulate": step(False), "boundary": step(True)}


def test_the_static_programs_have_no_conditional_and_the_counter_has_one():
    """Catches a conditional that is a selection in disguise, or one where the host has decided."""
    tx = jaxaccum.MultiSteps(marked(optax.adam(1e-3)), 4)
    state = tx.init(PARAMS)
    conditionals = {
        name: count(compiled(step, PARAMS, state, PARAMS), "conditional") for name, step in drives(tx).items()
    }
    assert conditionals == {"counter": 1, "accumulate": 0, "boundary": 0}


@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("method", ["apply", "update"])
def test_the_accumulating_program_holds_nothing_of_the_optimizer(method, weight):
    """Catches an inner optimizer that runs at every micro-step and is thrown away."""
    tx = jaxaccum.MultiSteps(marked(optax.adam(1e-3)), 4)
    state = tx.init(PARAMS)

    def step(params, state, grads, boundary, weight):
        if method == "apply":
            return tx.apply(params, state, grads, boundary=boundary, weight=weight)
        updates, state = tx.update(grads, state, params, boundary=boundary, weight=weight)
        return optax.apply_updates(params, updates), state

    programs = {b: compiled(step, PARAMS, state, PARAMS, b, weight, static_argnums=3) for b in (False, True)}
    assert count(programs[False], "tanh") == 0 and count(programs[False], "sqrt") == 0
    assert count(programs[True], "tanh") > 0 and count(programs[True], "sqrt") > 0
    assert count(programs[False], "conditional") == 0
    assert count(programs[True], "conditional") == (0 if weight is None else 1)  # A window may weigh nothing.


@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("drive", ["counter", "accumulate", "boundary"])
def test_a_donated_micro_step_copies_no_array(drive, weight):
    """Catches trees copied because a conditional could not write in place; the step counters are scalars."""
    tx = jaxaccum.MultiSteps(optax.adamw(1e-3), 4)
    boundary = {"counter": None, "accumulate": False, "boundary": True}[drive]
    step = lambda p, s, g, w: tx.apply(p, s, g, weight=w, boundary=boundary)
    program = compiled(step, PARAMS, tx.init(PARAMS), PARAMS, weight, donate_argnums=(0, 1))
    copied = re.findall(r"= (\S+) copy\(", program.as_text())
    assert all("[]" in shape for shape in copied)
    if drive == "counter" and weight is None:
        assert len(copied) <= 1


def test_an_optimizer_step_needs_no_memory_for_the_mean():
    """Catches a mean that is written out before the optimizer reads it: as much memory as the parameters take."""
    opt = optax.adamw(1e-3)
    tx = jaxaccum.MultiSteps(opt, 4)

    def bare(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    temporary = lambda step, state: (
        compiled(step, PARAMS, state, PARAMS, donate_argnums=(0, 1)).memory_analysis().temp_size_in_bytes
    )
    ours = temporary(lambda p, s, g: tx.apply(p, s, g, boundary=True), tx.init(PARAMS))
    assert ours <= temporary(bare, opt.init(PARAMS)) + 1024


def test_a_window_needs_no_more_memory_with_more_micro_batches():
    """Catches gradients or activations kept for every micro-batch."""
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["layer0"]["w"] + p["layer0"]["b"]) ** 2)

    def temporary(k):
        program = compiled(jaxaccum.value_and_grad(loss, k), PARAMS, jnp.ones((k * 16, 64)))
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(64) == temporary(2)


def test_no_k_set_by_the_host_compiles_again():
    """Catches a K of another type, sharding or weak type than the one compiled for."""
    tx = jaxaccum.MultiSteps(optax.adam(1e-3), 8)
    step = jax.jit(tx.apply, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    params, state = step(params, state, PARAMS)
    updates = 0
    for k in (8, 3, 1, 5):
        state = jaxaccum.set_every_k(state, k)
        for _ in range(k):
            params, state = step(params, state, PARAMS)
            updates += int(tx.has_updated(state))
    assert step._cache_size() == 1
    assert updates == 4


@pytest.mark.parametrize("is_on_mesh", [False, True])
def test_host_driven_compiles_each_program_once(is_on_mesh):
    """Catches a state that is read or cleared, or a K, with which a program compiles again."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data" if x.ndim > 1 else "model")))
    tx = jaxaccum.MultiSteps(optax.adam(1e-3), 3, **({"mesh": mesh} if is_on_mesh else {}))
    params, batch = jnp.ones(6), jnp.ones((8, 6))
    if is_on_mesh:
        params, batch = place(params), place(batch)

    def train(step, starts):
        for k, (params, state) in zip((3, 1, 2), starts, strict=True):
            step.every_k = k
            now = params, state
            for _ in range(4):
                _, *now = step(*now, batch)

    loss = lambda params, x: jnp.mean((x @ params) ** 2)
    first, second = ([(jnp.copy(params), tx.init(params)) for _ in range(3)] for _ in range(2))
    train(jaxaccum.HostDriven(tx, loss), first)  # Compiles all else.
    with counted_compiles() as compiles:
        train(jaxaccum.HostDriven(tx, loss), second)
    assert len(compiles) == 2


def test_a_traced_k_runs_every_window_length_with_one_program():
    """Catches a K that leaks into shapes."""
    f = jax.jit(lambda p, x, k: jaxaccum.value_and_grad(lambda p, x: jnp.mean((x @ p) ** 2), k, stacked=True)(p, x))
    x = jax.random.normal(jax.random.key(0), (8, 4, 3))
    for k in (8, 3, 1, 5):
        value, grad = f(jnp.ones(3), x, k)
        want = jax.value_and_grad(lambda p, x: jnp.mean((x @ p) ** 2))(jnp.ones(3), x[:k].reshape(-1, 3))
        np.testing.assert_allclose(value, want[0], rtol=1e-6)
        np.testing.assert_allclose(grad, want[1], rtol=1e-6)
    assert f._cache_size() == 1


def test_absent_micro_batches_are_not_run():
    """Catches a loop that computes all K_max micro-batches and selects some."""
    ran = []

    def loss(p, x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.mean((x @ p) ** 2)

    f = jax.jit(lambda p, x, k: jaxaccum.value_and_grad(loss, k, stacked=True)(p, x))
    jax.block_until_ready(f(jnp.ones(3), jnp.ones((8, 4, 3)), 3))
    jax.effects_barrier()
    assert len(ran) == 3


@pytest.mark.parametrize("options", [{}, {"has_aux": True}, {"stacked": True}, {"stacked": True, "has_aux": True}])
def test_the_loss_is_traced_once(options):
    """Catches losses traced again to learn shapes: doubled trace time, and side effects that happen twice."""
    traces = []

    def loss(p, x):
        traces.append(1)
        value = jnp.mean((x @ p) ** 2)
        return (value, {"n": x.sum()}) if options.get("has_aux") else value

    x = jnp.ones((8, 3)) if not options.get("stacked") else jnp.ones((4, 2, 3))
    k = 4 if not options.get("stacked") else jnp.int32(3)
    run = lambda p, x, k: jaxaccum.value_and_grad(loss, k if options.get("stacked") else 4, **options)(p, x)
    jax.jit(run).lower(jnp.ones(3), x, k)
    assert len(traces) == 1


def test_micro_step_traces_its_loss_once():
    """Catches a conditional with a backward pass on either side."""
    traces = []

    def loss(p, x):
        traces.append(1)
        return jnp.mean((x @ p) ** 2)

    tx = jaxaccum.MultiSteps(optax.adam(1e-3), 4)
    jax.jit(lambda p, s, x: tx.micro_step(loss, p, s, x)).lower(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones((2, 3)))
    assert len(traces) == 1


@pytest.mark.parametrize("method", ["update", "apply"])
def test_a_micro_step_outside_jit_compiles_nothing_the_second_window(method):
    """Catches closures that are compiled anew at each eager call, as a conditional's are."""
    tx = jaxaccum.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), 3)
    params = {"w": jnp.ones((3, 2))}
    state = tx.init(params)

    def window(state):
        for _ in range(3):
            if method == "update":
                _, state = tx.update(params, state, params, weight=2.0)
            else:
                _, state = tx.apply(params, state, params, weight=2.0)
        return state

    state = window(window(state))
    with counted_compiles() as compiles:
        window(state)
    assert compiles == []


def test_the_counted_compiles_are_counted():
    """Catches a counter of compiles that counts nothing."""
    with counted_compiles() as compiles:
        jax.jit(lambda x: jnp.sin(x) + 41)(jnp.ones(7))
    assert compiles
