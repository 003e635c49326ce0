"""The noise scale of a run: its numbers, what a checkpoint keeps of it, and where it is refused."""

import jax
import numpy as np
import pytest
from noise import linear, plain, rows, two_sizes
from training import Logged, assert_same, single, trainer

from jaxaccum import NoiseScale
from jaxaccum.callbacks import AdaptiveAccumulation, ModelCheckpoint, NoiseScaleMonitor


@pytest.mark.parametrize(
    ("task", "unit", "devices", "fuse", "sizes"),
    [
        (plain(), 1, 1, False, [4, 6, 4] * 4),
        (linear(3), 3, 1, True, [4] * 12),
        (linear(3), 3, 4, False, [4, 4, 4, 4, 6, 6, 6, 6] * 2 + [4, 4, 4]),  # The last device has no share.
        (plain(), 1, 4, True, [4] * 24),
    ],
)
def test_the_numbers(task, unit, devices, fuse, sizes):
    """Catches the norm of another micro-batch, a window that is left out or added twice, and weights as examples."""
    loader, scale = rows(*sizes), NoiseScale(decay=0.9)
    state = scale.init()
    for start in range(0, len(loader), 3 * devices):
        window = loader[start : start + 3 * devices]
        parts = [window[:1]] if devices == 1 else [window[p::devices] for p in range(devices)]
        squares, sizes = two_sizes(parts, window)
        state = scale.update(state, np.array(squares), unit * np.array(sizes))
    monitor, log = NoiseScaleMonitor(scale), Logged()
    options = {"strategy": "single" if devices == 1 else "ddp", "devices": devices, "fuse_windows": fuse}
    trainer(accumulate_grad_batches=3, callbacks=monitor, logger=log, **options).fit(task, loader)
    want, close = scale.estimate(state), lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3)
    jax.tree.map(close, monitor.estimate, want)
    names = ("noise_scale", "noise_scale_low", "noise_scale_high", "window_weight")
    close([log.records[-1][name] for name in names], [want.scale, want.low, want.high, unit * sizes[1]])


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_what_tells_nothing_is_left_out(nonfinite):
    """Catches a NaN in the means, and the norm of one window's first micro-batch beside the next window."""
    loader, monitor = rows(*[4] * 10), NoiseScaleMonitor()
    loader[3] = np.full_like(loader[3], np.nan)  # The second window's first.
    single(accumulate_grad_batches=3, callbacks=monitor, nonfinite=nonfinite).fit(linear(), loader)
    assert float(monitor._state.weight) == pytest.approx(1 + 0.99)  # The last window is one micro-step.


def test_batches_that_differ_in_shape_lie_on_their_own_devices():
    """Catches a window that runs on one device alone, and so is never measured, because its batches are ragged."""
    monitor = NoiseScaleMonitor()
    trainer(strategy="ddp", devices=2, callbacks=monitor).fit(linear(), rows(*[4, 3] * 3))
    assert float(monitor._state.weight) == pytest.approx(1 + 0.99 + 0.99**2)


@pytest.mark.parametrize("devices", [(1, 1), (4, 4), (1, 4), (4, 1)])
def test_a_resume_at_any_micro_step(tmp_path, devices):
    """Catches a first micro-batch's norm that a checkpoint lacks, and a state that starts anew."""
    before, after = devices
    loader = rows(*[4] * 7 * max(devices))

    def run(devices, callbacks):
        strategy = "single" if devices == 1 else "ddp"
        every_k = 3 * max(before, after) // devices
        return trainer(strategy=strategy, devices=devices, accumulate_grad_batches=every_k, callbacks=callbacks)

    monitor = NoiseScaleMonitor()
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1 if before >= after else 4, save_top_k=-1)
    want = run(before, [monitor, saves]).fit(linear(), loader)
    for path in sorted(tmp_path.iterdir())[: 6 if before == after else 1]:
        resumed = NoiseScaleMonitor()
        got = run(after, [resumed]).fit(linear(), loader, ckpt_path=path)
        if before == after:
            assert_same((got, resumed._state, resumed.estimate), (want, monitor._state, monitor.estimate))
        else:
            np.testing.assert_allclose(got.params, want.params, rtol=1e-5)
            assert float(resumed._state.weight) > 1


def test_a_run_without_it_measures_nothing():
    """Catches norms that are computed, and saved, where nobody asks for them."""
    t = single(accumulate_grad_batches=3)
    state = t.fit(linear(), rows(4, 4, 4))
    assert state.pending.sums.norms == ()
    programs = t._running.setup.programs
    piece, *_ = programs._first_pieces(t._running.setup.strategy.read(rows(4)[0]).arrays, t._processes)
    for program, args in ((programs._accumulate, (state.params, state.pending)), (programs._step, (state,))):
        extra = ({},) if program is programs._step else ()
        assert "sqrt" not in program.lower(*args, *piece.inputs, *extra).as_text()


@pytest.mark.parametrize(
    ("callbacks", "every_k", "message"),
    [
        ([NoiseScaleMonitor()], 1, "NoiseScaleMonitor .* accumulate_grad_batches=1 on one device"),
        ([AdaptiveAccumulation(1, 4)], 2, "AdaptiveAccumulation .* min_k=1 on one device"),
    ],
)
def test_one_size_is_refused(callbacks, every_k, message):
    """Catches a run that would never learn the noise scale, or that would stop to learn it."""
    with pytest.raises(ValueError, match=message):
        single(accumulate_grad_batches=every_k, callbacks=callbacks)
    t = single(accumulate_grad_batches="auto", target_batch_size=4 * every_k, callbacks=callbacks)
    with pytest.raises(ValueError, match=message):
        t.fit(linear(), rows(4, 4))


def test_wrong_arguments():
    """Catches two callbacks that log under one name, and a class in place of its instance."""
    with pytest.raises(ValueError, match="more than one NoiseScaleMonitor"):
        single(callbacks=[NoiseScaleMonitor(), AdaptiveAccumulation(2, 4)])
    with pytest.raises(TypeError, match=r"scale must be a jaxaccum\.NoiseScale"):
        NoiseScaleMonitor(NoiseScale)


def test_plot_draws_it_beside_the_weight_of_a_window(tmp_path):
    """Catches a noise scale in tokens beside a batch size in examples, and an interval that hides the curves."""
    t = single(accumulate_grad_batches=3, callbacks=NoiseScaleMonitor(), log_every_n_steps=1)
    t.fit(linear(unit=10), rows(*[4] * 12))
    axes = t.plot(tmp_path / "run.png").axes[2]
    window, scale = axes.lines
    assert window.get_label() == "window" and list(window.get_data()[1]) == [120] * 4
    assert scale.get_label() == "noise scale" and scale.get_data()[1][-1] == t.callback_metrics["noise_scale"]
    assert len(axes.collections) == 1 and np.isinf(t._running.metrics.records.history[0]["noise_scale_high"])
    assert axes.get_ylim()[1] < 1e6
