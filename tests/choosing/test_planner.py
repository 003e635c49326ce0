"""`plan`: the largest micro-batch that fits, beside the programs that a script compiles."""

import dataclasses
import sys
import types

import compiles
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import __main__ as command
from jaxaccum._choosing.planner import api, result, search, step, timing
from jaxaccum._devices.topology import MeshAxis, OneDevice

WIDTH, TARGET = 32, 64
MATRIX = WIDTH * WIDTH * 4  # Bytes.
PARAMS = {"w": jax.ShapeDtypeStruct((3, WIDTH, WIDTH), jnp.float32), "b": jax.ShapeDtypeStruct((WIDTH,), jnp.float32)}
BATCH = np.zeros((2, WIDTH), np.float32)
OPT = optax.adamw(1e-3)


def loss(params, x):
    for matrix in params["w"]:
        x = jnp.tanh(x @ matrix + params["b"])
    return jnp.mean(x**2)


def program(every_k, params=PARAMS, opt_state=None, batch=None, fun=loss, optimizer=OPT, layouts=None, **options):
    """The peak of a step that a script compiles for shapes of arrays."""
    window = jaxaccum.value_and_grad(fun, every_k, **options)

    def step(params, opt_state, x):
        value, grads = window(params, x)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = jax.eval_shape(optimizer.init, params) if opt_state is None else opt_state
    batch = jax.ShapeDtypeStruct((TARGET, WIDTH), jnp.float32) if batch is None else batch
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=layouts)
    sizes = step.lower(params, opt_state, batch).compile().memory_analysis()
    kept = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return kept + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def plan(limit, params=PARAMS, batch=BATCH, target=TARGET, **options):
    return jaxaccum.plan(loss, params, batch, OPT, target, memory_limit=limit, **options)


def test_the_largest_that_fits():
    """Catches a peak that is not the program's, a size too small or too large, a compile too many, and an array."""
    peaks = {n: program(TARGET // n) for n in (1, 2, 4, 8, 16, 32, 64)}
    before = {id(x) for x in jax.live_arrays()}
    with compiles.counted_compiles() as compiled:
        plans = [plan(peaks[16] + slack) for slack in (0, -1)]
    assert {id(x) for x in jax.live_arrays()} == before
    assert [(found.micro_batch_size, found.every_k) for found in plans] == [(16, 4), (8, 8)]
    assert len(compiled) == sum(len(found.trials) for found in plans)
    for found, size_over in zip(plans, (32, 16), strict=True):
        assert len(found.trials) <= 6
        assert size_over in [trial.micro_batch_size for trial in found.trials if not trial.fits]
        for trial in found.trials:
            assert trial.memory.total == peaks[trial.micro_batch_size]
            assert trial.fits == (trial.memory.total <= found.memory_limit)
        parameters = 3 * MATRIX + 4 * WIDTH
        assert found.memory[:4] == (parameters, 2 * parameters + 4, TARGET * WIDTH * 4, parameters)
        assert found.memory.activations > 0


@given(st.integers(1, 10_000), st.integers(0, 50), st.integers(0, 5000), st.integers(1, 20_000))
def test_search(target, slope, flat, limit):
    """Catches a prediction that is trusted untried, and one that is so far off that trials run out."""
    sizes = [n for n in range(1, target + 1) if target % n == 0]
    peak = lambda n: max(flat, slope * n)
    tried = []

    def measured(n):
        tried.append(n)
        return peak(n) if peak(n) <= 2 * limit else None

    found = search.largest(sizes, limit, 0, measured)
    fits = [n for n in sizes if peak(n) <= limit]
    assert len(tried) == len(set(tried)) <= 6
    if len(sizes) <= 32:
        assert found == max(fits, default=None)
        assert not fits or fits == sizes or sizes[len(fits)] in tried
    else:
        assert found in fits or not fits


@pytest.mark.parametrize("over", [None, 101, 10**9])
def test_each_of_32_sizes_is_found_where_predictions_tell_nothing(over):
    """Catches a trial too few, and a reach that leaves sizes out: all that fit take the same."""
    sizes = range(1, 33)
    for want in sizes:
        tried = []
        peak = lambda n, want=want, tried=tried: tried.append(n) or (100 if n <= want else over)
        assert search.largest(sizes, 100, 100, peak) == want
        assert len(tried) <= 6


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_per_device_with_fsdp(kind):
    """Catches memory of all devices, sums counted in shards, and a state that does not lie as parameters do."""
    axes = ("data", "fsdp")
    mesh = jax.make_mesh((4, 2), axes, axis_types=(kind,) * 2)
    lies = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    params = {"w": lies((3, WIDTH, WIDTH), None, None, "fsdp"), "b": lies((WIDTH,))}
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    opt_state = (optax.ScaleByAdamState(count, params, params), optax.EmptyState(), optax.EmptyState())
    kept = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    inputs = {"params": params, "opt_state": opt_state, "batch": lies((8 * TARGET, WIDTH), axes)}
    script = lambda n: program(TARGET // n, **inputs, layouts=(*kept, None), mesh=mesh, data_axis=axes)
    limit = script(8)
    found = plan(limit, params, target=8 * TARGET, mesh=mesh, data_axis=axes)
    assert (found.micro_batch_size, found.every_k, found.devices) == (8, 8, 8)
    assert found.memory.total == limit and script(16) > limit
    shard, bias = 3 * MATRIX // 2, 4 * WIDTH
    assert found.memory[:4] == (shard + bias, 2 * (shard + bias) + 4, TARGET * WIDTH * 4, 2 * shard + bias)


@pytest.mark.parametrize("tree", [lambda p: p, lambda p: {"w": p}, lambda p: {"a": [p]}], ids=["leaf", "dict", "deep"])
def test_moments_are_planned_where_their_parameters_lie(tree):
    """Catches a moment of a shallow tree that is planned whole on each device, and a row laid out like a matrix."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded, whole = NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P())
    params = tree(jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=sharded))
    state = {"m": params, "rows": tree(jax.ShapeDtypeStruct((3,), jnp.float32)), "count": jnp.int32(0)}
    lies = jax.tree.map(lambda x: x.sharding, step._like_params(state, params, whole))
    assert lies == {"m": tree(sharded), "rows": tree(whole), "count": whole}


def test_parameters_that_are_given_for_a_task_keep_their_layout():
    """Catches the parameters of `init` in their place, which lie whole on each device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    task = jaxaccum.Task(lambda *_: jnp.zeros((WIDTH, WIDTH)), lambda p, x, key: jnp.mean((x @ p) ** 2), optax.sgd(0.1))
    params = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(None, "model")))
    sizes = [jaxaccum.plan(task, p, BATCH, None, 4, mesh, 10**6).memory.parameters for p in (params, None)]
    assert sizes == [MATRIX // 2, MATRIX]


def test_a_leaf_that_the_loss_does_not_use_takes_memory():
    """Catches a program that is compiled without an argument, as arrays that are there are never counted."""
    batch = {"x": BATCH, "unused": np.zeros((2, 1000), np.float32)}
    of = lambda fun, batch: jaxaccum.plan(fun, PARAMS, batch, OPT, TARGET, memory_limit=10**7).memory
    memory, without = of(lambda p, batch: loss(p, batch["x"]), batch), of(loss, BATCH)
    assert memory == without._replace(batch=without.batch + 4 * 1000 * TARGET)


@pytest.mark.parametrize(("temporary", "sums", "activations"), [(50, 50, 100), (20_000, 12_416, 7684)])
def test_the_peak_by_kind(temporary, sums, activations):
    """Catches an output that is counted twice or not at all, and sums of a window that holds no gradient at once."""
    planned = step.of(loss, PARAMS, BATCH, OPT, TARGET, OneDevice(), {})
    *arguments, _, _ = planned.fixed()
    sizes = types.SimpleNamespace(
        argument_size_in_bytes=sum(arguments),
        output_size_in_bytes=700,
        alias_size_in_bytes=600,
        temp_size_in_bytes=temporary,
    )
    memory = planned.memory(types.SimpleNamespace(memory_analysis=lambda: sizes))
    assert memory == (*arguments, sums, activations)
    assert memory.total == sum(arguments) + 100 + temporary


def test_alternatives():
    """Catches an option that is compiled without its change, or at another size."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)
    found = plan(program(4, batch=batch), alternatives=True, target=8)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    assert found.every_k == 4
    assert {name: memory.total for name, memory in found.alternatives.items()} == {
        "jax.checkpoint": program(4, batch=batch, fun=jax.checkpoint(loss, policy=policy)),
        'prepare="auto"': program(4, batch=batch, prepare="auto"),
        "accumulator_dtype=bfloat16": program(4, batch=batch, accumulator_dtype=jnp.bfloat16),
    }
    assert found.alternatives["accumulator_dtype=bfloat16"].sums == found.memory.sums // 2
    both = plan(10**9, mesh=mesh, alternatives=True)
    scattered = both.alternatives['reduce="scatter"']
    # Moments of the matrices lie in eighths, the bias's too.
    assert scattered.optimizer == (both.memory.optimizer - 4) // 8 + 4
    assert scattered == plan(10**9, mesh=mesh, reduce="scatter").memory
    assert str(found).count("bfloat16") == 1


def test_which_alternatives_there_are(monkeypatch):
    """Catches ZeRO for what lies in shards over the data axes, and a checkpoint that recomputes products too."""
    monkeypatch.setattr(step.Step, "compiled", lambda self, every_k: None)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    sync = MeshAxis(mesh, ("data", "fsdp"))
    for axis, can_scatter in (("fsdp", False), ("model", True), (None, True)):
        lies = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
        params = {"w": lies((3, WIDTH, WIDTH), None, None, axis), "b": lies((WIDTH,))}
        planned = step.of(loss, params, BATCH, OPT, TARGET, sync, {})
        found = api._Planner(lambda n, planned=planned: (planned, 1), [1], 1).alternatives(1)
        assert ('reduce="scatter"' in found) == can_scatter
    (remat,) = jax.make_jaxpr(step.rematerialised(planned).fun)(planned.params, *planned.args).eqns
    assert remat.params["policy"] is jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def test_a_task():
    """Catches model state that is lost, and parameters of another shape than `init` makes."""

    def init(key, batch):
        return {name: jnp.zeros(x.shape) for name, x in PARAMS.items()}, {"seen": jnp.zeros(WIDTH)}

    def with_state(params, state, batch, key):
        noise = jax.random.normal(key, batch["x"].shape)
        return loss(params, batch["x"] + noise), {"seen": state["seen"] + batch["x"].mean(0)}, {"metric": jnp.ones(())}

    task = jaxaccum.Task(init, with_state, OPT, model_state=True)
    found = jaxaccum.plan(task, None, {"x": BATCH, "unused": BATCH}, target_batch_size=TARGET, memory_limit=10**9)
    bare = plan(10**9).memory
    assert found.every_k * found.micro_batch_size == TARGET
    assert found.memory.parameters == bare.parameters + 4 * WIDTH
    assert found.memory.batch == 2 * bare.batch and found.memory.optimizer == bare.optimizer
    given = jaxaccum.plan(task, PARAMS, {"x": BATCH, "unused": BATCH}, None, TARGET, None, 10**9)
    assert given == found
    needs_steps = dataclasses.replace(task, optimizer=lambda total_steps: OPT)
    assert jaxaccum.plan(needs_steps, PARAMS, {"x": BATCH, "unused": BATCH}, None, TARGET, None, 10**9) == found


def test_an_init_that_reads_its_batch():
    """Catches a batch of tracers where a run has arrays, such as one that holds the number of classes."""
    init = lambda key, batch: jnp.zeros((WIDTH, 1 + int(np.max(batch))))
    task = jaxaccum.Task(init, lambda w, x, key: jnp.mean((x @ w) ** 2), OPT)
    found = jaxaccum.plan(task, None, BATCH + 4, None, 8, None, 10**9)
    assert found.memory.parameters == WIDTH * 5 * 4


def test_a_whole_equinox_module():
    """Catches leaves that are not trained counted as trained, or lost: a function, a number, and an array of ints."""
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        matrix: jax.Array
        kept: jax.Array
        scale: float
        activation: object = jax.nn.tanh

        def __call__(self, x):
            return self.scale * self.activation(x @ self.matrix)[:, self.kept]

    def make():
        return Model(jnp.zeros((WIDTH, WIDTH)), jnp.arange(8), 2.0)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    loss = lambda model, x: jnp.mean(model(x) ** 2)
    arrays, rest = eqx.partition(make(), eqx.is_inexact_array)
    for options in ({"measure": True}, {"mesh": mesh, "alternatives": True}):
        found = jaxaccum.plan(loss, make(), BATCH, OPT, 8, memory_limit=10**9, **options)
        bare = jaxaccum.plan(lambda p, x: loss(eqx.combine(p, rest), x), arrays, BATCH, OPT, 8, memory_limit=10**9)
        assert found.memory.parameters == bare.memory.parameters + 8 * 4
        assert found.memory.optimizer == bare.memory.optimizer and found.memory.sums <= bare.memory.sums
    assert jaxaccum.plan(loss, eqx.filter_eval_shape(make), BATCH, OPT, 8, mesh, 10**9).memory == found.memory


def test_a_window_that_tells_the_noise_has_two_sizes():
    """Catches a K of 1 where the norms need two sizes, and its refusal where several devices make them."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    found = plan(10**9, target=8, gradient_norms="noise")
    assert (found.micro_batch_size, found.every_k) == (4, 2)
    assert plan(10**9, target=8, gradient_norms="noise", mesh=mesh).every_k == 1
    with pytest.raises(ValueError, match="target_batch_size=1 on one device"):
        plan(10**9, target=1, gradient_norms="noise")


def test_the_fastest(monkeypatch):
    """Catches the largest size where another is faster, and sizes that are not timed or do not fit."""
    times = [5.0, 4.0, 2.0, 3.0, None]
    left = iter(times)

    def seconds(*args):
        time = next(left)
        if time is None:  # There is no room for the arrays.
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate.")
        return time

    monkeypatch.setattr(timing, "seconds", seconds)
    found = plan(program(4), measure=True)
    assert found.micro_batch_size == 4 and found.every_k == 16
    timed = {trial.micro_batch_size: trial.seconds for trial in found.trials if trial.fits}
    assert timed == dict(zip([1, 2, 4, 8, 16], times, strict=True))
    assert "5000" in str(found)


def test_measured_windows():
    """Catches arguments that a compiled step does not take, on a mesh and with a key."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    task = jaxaccum.Task(
        lambda key, batch: jnp.zeros(WIDTH), lambda params, x, key: jnp.mean((x @ params) ** 2), optax.sgd(0.1)
    )
    shapes = jax.ShapeDtypeStruct(BATCH.shape, BATCH.dtype)
    for batch in (BATCH, shapes):
        found = jaxaccum.plan(task, None, batch, None, 8, mesh, 10**6, measure=True)
        assert all(trial.seconds > 0 for trial in found.trials)


def test_the_largest_sizes_that_fit_are_timed(monkeypatch):
    """Catches the smallest sizes in their place, and one that is over the limit."""
    memory = lambda every_k: result.Memory(0, 0, 0, 0, activations=64 // every_k)
    sized = types.SimpleNamespace(compiled=lambda every_k: every_k, memory=memory)
    monkeypatch.setattr(timing, "seconds", lambda step, every_k, batch: 1.0 / every_k)
    planner = api._Planner(lambda n: (sized, 64 // n), [1, 2, 4, 8, 16, 32, 64], limit=32)
    assert not planner.fits(64)
    assert planner.fastest(32, BATCH) == 4
    assert {n: trial.seconds for n, trial in planner.trials.items()} == {
        64: None,
        4: 1 / 16,
        8: 1 / 8,
        16: 1 / 4,
        32: 1 / 2,
    }


def test_the_first_window_is_not_timed(monkeypatch):
    """Catches the time of the first window, the longest of the others, and another batch than the example's rows."""
    ticks, batches = iter([0.0, 1.0, 1.0, 6.0, 6.0, 10.0]), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    example = np.arange(2.0 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    planned = step.of(loss, PARAMS, example, OPT, 5, OneDevice(), {})

    def compiled(params, opt_state, rest, batch):
        batches.append(batch)
        return params, opt_state, None

    assert timing.seconds(planned, compiled, example) == 4.0
    np.testing.assert_array_equal(batches, [example[[0, 1, 0, 1, 0]]] * 3)


def test_a_compiler_without_memory_is_over(monkeypatch):
    """Catches a compile that ends the plan because the compiler's own trials ran out of memory."""
    compile_ = jax.stages.Lowered.compile
    calls = []

    def limited(self):
        calls.append(self)
        if len(calls) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate.")
        return compile_(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", limited)
    found = plan(10**9)
    assert found.micro_batch_size == 1 and 1 < len(found.trials) <= 6
    assert all(trial.memory is None and not trial.fits for trial in found.trials[1:])
    assert "–" in str(found)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: compile_(self, {"no_such_option": 1}))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        plan(10**9)


def test_the_limit_is_that_of_the_device(monkeypatch):
    """Catches another part of the memory, or another device's."""
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10**6})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert plan(None, target=1).memory_limit == 980_000
    monkeypatch.undo()
    with pytest.raises(ValueError, match="pass memory_limit"):
        plan(None)


def test_errors():
    """Catches an invalid argument that is accepted, or named without what helps."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"target_batch_size=60 is not a multiple .* 8; nearest: 56 and 64\."):
        plan(10**9, target=60, mesh=mesh)
    with pytest.raises(ValueError, match=r"nearest: 8\."):
        plan(10**9, target=3, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"parameters 12,416, optimizer 24,836, batch 8,192\) .* limit is 45,000 bytes"
    ):
        plan(45_000)
    with pytest.raises(ValueError, match=r"N = 1 takes [\d,]+ bytes \(.*sums 12,416.*limit is 50,000 bytes"):
        plan(50_000)
    with pytest.raises(ValueError, match="one leading length"):
        jaxaccum.plan(lambda params, x: 0.0, PARAMS, (BATCH, BATCH[:1]), OPT, memory_limit=1)
    with pytest.raises(ValueError, match="one leading length"):
        plan(1, batch=np.float32(1.0))
    for optimizer in (None, BATCH):
        with pytest.raises(TypeError, match=r"optimizer must be .* got .* one tree, such as"):
            jaxaccum.plan(loss, PARAMS, BATCH, optimizer, memory_limit=10**9)
    with pytest.raises(ValueError, match="accumulates by itself"):
        jaxaccum.plan(loss, PARAMS, BATCH, jaxaccum.MultiSteps(OPT, 8), memory_limit=10**9)
    with pytest.raises(TypeError, match="params=None is for a Task"):
        jaxaccum.plan(loss, None, BATCH, OPT, memory_limit=10**9)
    with pytest.raises(TypeError, match=r"plan got .* 'accumulate_dtype': did you mean 'accumulator_dtype'"):
        plan(10**9, accumulate_dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"target_batch_size .* got 0\.$"):
        plan(10**9, target=0)
    with pytest.raises(
        TypeError, match=r"task_or_loss is called as task_or_loss\(params, batch\), got <lambda>\(p, x, y"
    ):
        jaxaccum.plan(lambda p, x, y: 0.0, PARAMS, BATCH, OPT, memory_limit=10**9)
    for limit, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="memory_limit"):
            plan(limit)
    with pytest.raises(TypeError, match="target_batch_size"):
        plan(1, target=1.5)


def test_plot(tmp_path):
    """Catches bars that are not the memory of the sizes, or hide each other, and another limit."""
    pytest.importorskip("matplotlib")
    found = plan(program(4))
    (axes,) = found.plot(tmp_path / "plan.svg").axes
    heights = [sum(bar.get_height() for bar in bars) for bars in zip(*axes.containers, strict=True)]
    assert [round(height * 2**30) for height in heights] == [trial.memory.total for trial in found.trials]
    tops = [max(bar.get_y() + bar.get_height() for bar in bars) for bars in zip(*axes.containers, strict=True)]
    np.testing.assert_allclose(tops, heights)  # One kind lies on another.
    np.testing.assert_allclose(axes.lines[0].get_ydata(), found.memory_limit / 2**30)
    assert (tmp_path / "plan.svg").stat().st_size


def test_the_command(tmp_path, monkeypatch, capsys):
    """Catches an argument of the command that does not reach the plan, and a plan that is not printed."""
    source = "task, batch, made, other = object(), [1], lambda: task, lambda: [2]"
    (tmp_path / "planned.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(command, "plan", lambda *args, **options: (args, options))
    planned = __import__("planned")
    command.main(["plan", "planned:task"])
    off, on = ({"alternatives": x, "measure": x} for x in (False, True))
    assert capsys.readouterr().out == f"{((planned.task, None, [1], None, 512, None, None), off)}\n"
    flags = ["--target-batch-size", "16", "--memory-limit", "2e3", "--alternatives", "--measure", "--batch", "other"]
    command.main(["plan", "planned:made", *flags])
    assert capsys.readouterr().out == f"{((planned.task, None, [2], None, 16, None, 2000.0), on)}\n"
    for name in ("planned", "planned:", ":task"):
        with pytest.raises(SystemExit):
            command.main(["plan", name])
        assert f"must be MODULE:TASK, got {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["planned"], "must be MODULE:TASK, got 'planned'; planned has: task, batch"),
        (["planned:nope"], "must be MODULE:TASK, got 'planned:nope'; planned has: task, batch"),
        (
            ["planned:task", "--batch", "planned:batch"],
            "--batch must be a name in planned, got 'planned:batch'; planned has: task, batch",
        ),
        (["nope:task"], "must be MODULE:TASK, got 'nope:task': No module named 'nope'"),
    ],
)
def test_the_command_finds_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    """Catches a traceback."""
    (tmp_path / "planned.py").write_text("import jax\ntask = batch = object()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planned", raising=False)
    with pytest.raises(SystemExit):
        command.main(["plan", *arguments])
    assert words in capsys.readouterr().err


def test_the_help_has_the_defaults(capsys):
    """Catches a default that one must look up in the code."""
    with pytest.raises(SystemExit):
        command.main(["plan", "--help"])
    assert "(default: batch)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("params", "options", "words"),
    [
        ({"w": jnp.ones(3)}, {"key_argnums": 2}, "plan takes no key_argnums: .* Close over"),
        ({"w": jnp.ones(3)}, {"batch_argnums": (1, 2)}, "plan takes no batch_argnums: .* one tree"),
        ({"w": jnp.ones(3)}, {"num_micro_batches": 2}, "plan takes no num_micro_batches: it chooses K"),
        ({"w": jnp.ones(3)}, {"stacked": True}, "plan takes no stacked"),
        ({"w": jnp.ones(3), "f": jnp.tanh}, {}, r"params\['f'\] is no floating array .* close over it .* nnx_task"),
        ({"w": jnp.ones(3), "n": np.arange(3)}, {}, r"params\['n'\] is no floating array"),
        (None, {}, "params=None is for a Task"),
    ],
)
def test_what_is_no_loss_of_params_and_a_batch(params, options, words):
    """Catches an error from inside jax, which names no argument of the caller's."""
    loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    with pytest.raises(TypeError, match=words):
        jaxaccum.plan(loss, params, jnp.ones((1, 3)), optax.sgd(1.0), 4, memory_limit=1e6, **options)


def test_the_least_memory_of_a_meshs_devices():
    """Catches the memory of a device that is not on the mesh, or of one with more; one that reports none."""

    def limit(*stats):
        devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
        return api._device_limit(MeshAxis(types.SimpleNamespace(local_devices=devices), ("data",)))

    assert limit({"bytes_limit": 3000}, {"bytes_limit": 1000}, {"bytes_limit": 2000}) == 980
    assert limit({"bytes_limit": 3000}, None) is limit({}, {"bytes_limit": 3000}) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1024**2 - 1, "1024.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5120.00 GiB"),
    ],
)
def test_units(size, text):
    """Catches a size in the unit beside its own."""
    assert result.in_units(size) == text
