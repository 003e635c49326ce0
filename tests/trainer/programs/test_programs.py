"""The Trainer runs what it knows to count without a selection, and everything else with one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, Recorder, trainer

import jaxaccum
from jaxaccum._gradient.host_weight import HostWeight
from jaxaccum.callbacks import Callback

WIDTH, K = 4, 3


def masked(model_state=False):
    """Layers in a loop; the masked examples' squared error and their number."""

    def init(key, batch):
        params = {"layers": 0.5 * jax.random.normal(key, (2, WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
        return (params, {"seen": jnp.zeros(())}) if model_state else params

    def loss(params, batch):
        y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"], params["layers"])[0] + params["bias"]
        return jaxaccum.Weighted(jnp.sum((y**2).sum(axis=1) * batch["mask"]), jnp.sum(batch["mask"]))

    if not model_state:
        return jaxaccum.Task(init, lambda params, batch, key: loss(params, batch), optax.adamw(0.05))

    def stateful(params, state, batch, key):
        return loss(params, batch), {"seen": state["seen"] + jnp.mean(batch["x"])}, {}

    return jaxaccum.Task(init, stateful, optax.adamw(0.05), model_state=True)


def batches(count, empty=(), n=8):
    """Batches; those of the numbers in `empty` have an empty mask and are NaN."""
    rng = np.random.default_rng(0)
    made = [
        {"x": rng.standard_normal((n, WIDTH)).astype(np.float32), "mask": np.ones(n, np.float32)} for _ in range(count)
    ]
    for i in empty:
        made[i] = {"x": np.full_like(made[i]["x"], np.nan), "mask": np.zeros(n, np.float32)}
    return made


def variants(t):
    """The numbers of programs compiled for accumulation and for boundaries."""
    programs = t._running.setup.programs
    return programs._accumulate._cache_size(), programs._step._cache_size(), programs._window._cache_size()


@pytest.mark.parametrize("strategy", ["single", "ddp", "dp", "zero"])
@pytest.mark.parametrize("fuse_windows", [False, True])
def test_weights_from_the_data_compile_one_program(strategy, fuse_windows):
    """Catches the selection, or a second program, where all micro-batches are known to count."""
    devices = 1 if strategy == "single" else 2
    group = 1 if strategy in ("single", "dp") else devices
    t = trainer(strategy=strategy, devices=devices, accumulate_grad_batches=K, fuse_windows=fuse_windows)
    t.fit(masked(), batches(2 * K * group))
    assert variants(t) == ((0, 0, 1) if fuse_windows else (1, 1, 0))


@pytest.mark.parametrize(("strategy", "devices"), [("single", 1), ("ddp", 2)])
def test_the_host_knows_which_batches_count(strategy, devices, monkeypatch):
    """Catches a run that never knows, and so always runs the program with a selection."""
    found, is_positive = [], HostWeight.is_positive
    monkeypatch.setattr(HostWeight, "is_positive", lambda *args: found.append(is_positive(*args)) or found[-1])
    groups = [[batch] * devices for batch in batches(3, empty=(1,))]
    trainer(strategy=strategy, devices=devices).fit(masked(), [batch for group in groups for batch in group])
    assert found == [True, False, True]


STRATEGIES, EMPTY = ["single", "ddp", "dp", "zero"], [(0,), (1, 5), (2, 3), (0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("strategy", "fuse_windows", "model_state", "empty"),
    [
        (strategy, (i + j) % 2 == 0, j >= 2, empty)  # Each pair of values occurs.
        for i, strategy in enumerate(STRATEGIES)
        for j, empty in enumerate(EMPTY)
    ],
)
def test_a_batch_of_weight_zero_is_left_out(strategy, fuse_windows, model_state, empty):
    """Catches a NaN from a batch that the host took to count, in every position of a window and on each device."""
    devices = 1 if strategy == "single" else 2
    options = {"strategy": strategy, "devices": devices, "accumulate_grad_batches": K, "max_epochs": 2}
    t = trainer(fuse_windows=fuse_windows, **options)
    state = t.fit(masked(model_state), batches(12, empty))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, state.model_state)))
    if strategy == "single":  # Each window's mean is that of its other batches.
        reference = jaxaccum.Trainer(**options, callbacks=[], enable_progress_bar=False)
        full = [{**batch, "x": np.nan_to_num(batch["x"])} for batch in batches(12, empty)]
        want = reference.fit(masked(model_state), full)
        if not model_state:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.params, want.params)


def test_a_plain_loss_of_several_devices_has_no_selection():
    """Catches a share of a batch that is taken for one that may be missing."""
    task = jaxaccum.Task(
        lambda key, batch: jnp.ones(WIDTH), lambda p, batch, key: jnp.mean((batch["x"] @ p) ** 2), optax.sgd(0.1)
    )
    t = trainer(strategy="ddp", devices=2, accumulate_grad_batches=2)
    t.fit(task, batches(8))
    assert variants(t) == (1, 1, 0)
    (piece,) = t._strategy.pieces(batches(2))
    programs, state = t._running.setup.programs, t.state

    def selects(counts):
        """How many selections have the size of both devices' gradients."""
        add = functools.partial(programs._add_piece, counts=counts)
        text = str(jax.make_jaxpr(add)(state.params, state.pending, *piece.inputs))
        return len(re.findall(rf"f32\[2,{WIDTH}\]\S* = select_n", text))

    assert selects(True) == 0 < selects(False)


@pytest.mark.parametrize("strategy", ["ddp", "dp", "zero"])
def test_sums_stay_on_their_devices(strategy):
    """Catches a micro-step that gathers what each device has summed: its gradients, weights, norms and counts."""
    layouts = Recorder(lambda t: t.state.pending.sums)
    monitor = jaxaccum.callbacks.NoiseScaleMonitor()
    options = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": 2, "nonfinite": "drop"}
    trainer(**options, callbacks=[monitor, layouts]).fit(masked(), batches(4))
    sums = layouts.seen[0]
    own = jax.tree.leaves((sums.acc_grads, sums.weight, sums.averages, sums.dropped, sums.norms))
    assert len(own) > 5 and not any(x.is_fully_replicated for x in own)


def test_devices_without_a_share_are_left_out():
    """Catches an incomplete group that runs as if every device had a share of it."""
    run = lambda strategy, devices, k: (
        trainer(strategy=strategy, devices=devices, accumulate_grad_batches=k, max_epochs=2)
        .fit(masked(), batches(10))
        .params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run("ddp", 4, 2), run("single", 1, 8)
    )


def test_a_loader_batch_has_its_own_key_on_any_device():
    """Catches keys that two batches share where the batches of one micro-step differ in shape."""
    loss = lambda p, batch, key: p * jnp.mean(batch) * jax.random.uniform(key)
    task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))
    data = [np.full(n, i + 1.0, np.float32) for i, n in enumerate((2, 2, 3, 3, 3, 2, 2, 4))]
    run = lambda strategy, devices, k: (
        trainer(strategy=strategy, devices=devices, accumulate_grad_batches=k).fit(task, data).params
    )
    np.testing.assert_allclose(run("ddp", 4, 1), run("single", 1, 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "devices", "fuse_windows"),
    [("single", 1, False), ("single", 1, True), ("ddp", 2, False), ("zero", 2, True)],
)
def test_a_plain_loss_of_no_examples_is_left_out(strategy, devices, fuse_windows):
    """Catches a batch without rows that counts because the loss has no weight of its own: 0 / 0, and a step of Adam."""
    task = jaxaccum.Task(lambda key, x: jnp.ones(2), lambda p, x, key: jnp.mean(x, axis=0) @ p, optax.adam(0.1))
    options = {"strategy": strategy, "devices": devices, "accumulate_grad_batches": 2, "fuse_windows": fuse_windows}
    full, empty = [[np.ones((n, 2), np.float32)] * devices for n in (4, 0)]
    want = trainer(**options).fit(task, full)
    got = trainer(**options).fit(task, [*full, *empty, *empty, *empty])
    np.testing.assert_array_equal(got.params, want.params)
    assert np.all(np.isfinite(got.params))


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_the_loss_of_nothing_is_nan(strategy):
    """Catches a loss of 0 where nothing was counted: of a window, of a micro-step, of a validation."""
    outputs, seen = [], Callback()
    seen.on_train_batch_end = lambda trainer, task, out, batch, i: outputs.append(out["loss"])
    log = Logged()
    options = {"strategy": strategy, "devices": 1 if strategy == "single" else 2, "accumulate_grad_batches": 2}
    t = trainer(**options, log_every_n_steps=1, logger=log, callbacks=seen)
    per_window = 2 if strategy == "single" else 4
    data = batches(2 * per_window, range(per_window))
    t.fit(masked(), data, data[:2])
    assert [np.isnan(record["train_loss"]) for record in log.records if "train_loss" in record] == [True, False]
    assert [np.isnan(loss) for loss in outputs] == [True] * 2 + [False] * 2
    assert np.isnan(t.callback_metrics["val_loss"])
