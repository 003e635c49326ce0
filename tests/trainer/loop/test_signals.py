"""Exit signals during fit: the first one saves and ends the run, the second one ends it at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from training import assert_same, loader, single, task

from jaxaccum.callbacks import Callback, ModelCheckpoint
from jaxaccum.trainer.loop.signals import EXIT_SIGNALS

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them"),
]


@pytest.fixture(autouse=True)
def listening():
    """SIGINT interrupts, as it does at a terminal; a shell starts its background jobs with SIGINT ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


class Sends(Callback):
    """Sends this process signals in a hook of a micro-step or of a validation."""

    def __init__(self, *numbers, hook="on_train_batch_start", at=2):
        self.numbers, self.at, self.after = numbers, at, None
        self.hook = hook

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.send("on_train_batch_start", batch_idx)

    def on_validation_start(self, trainer, task):
        self.send("on_validation_start", self.at)

    def on_train_end(self, trainer, task):
        self.send("on_train_end", self.at)

    def send(self, hook, i):
        if hook == self.hook and i == self.at:
            for number in self.numbers:
                signal.raise_signal(number)

    def on_exception(self, trainer, task, error):
        self.after = error


def handlers():
    return [signal.getsignal(number) for number in EXIT_SIGNALS]


def fit(folder, *callbacks, exit_signals=EXIT_SIGNALS, **options):
    batches = loader(*[4] * 7)
    saves = ModelCheckpoint(folder)
    t = single(accumulate_grad_batches=4, callbacks=[saves, *callbacks], exit_signals=exit_signals)
    return t.fit(task(dropout=0.3), batches, batches[:3], **options)


def left_with(error, folder, *callbacks):
    before = handlers()
    with pytest.raises(error) as caught:
        fit(folder, *callbacks)
    assert handlers() == before
    return caught.value


@pytest.mark.parametrize("number", EXIT_SIGNALS)
@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("on_train_batch_start", "epoch=0-micro_step=3"),
        ("on_validation_start", "epoch=0-micro_step=7"),
        ("on_train_end", "epoch=1-micro_step=7"),
    ],
)
def test_the_first_signal_ends_the_run_after_a_save(tmp_path, number, hook, name):
    """Catches a signal that is swallowed, a micro-step cut in two, and handlers that outlive the fit."""
    sends = Sends(number, hook=hook)
    left = left_with(KeyboardInterrupt if number == signal.SIGINT else SystemExit, tmp_path, sends)
    assert sends.after is left and getattr(left, "code", 128 + number) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same(fit(tmp_path, ckpt_path="last"), fit(tmp_path / "unbroken"))


def test_a_second_signal_is_not_waited_for(tmp_path):
    """Catches a run that saves all the same, or goes on to the end of its micro-step."""
    sends = Sends(signal.SIGTERM, signal.SIGINT)
    left_with(KeyboardInterrupt, tmp_path, sends)
    assert not list(tmp_path.glob("*")) and isinstance(sends.after, KeyboardInterrupt)


@pytest.mark.parametrize("kind", ["ignored", "the user's"])
def test_a_signal_with_another_handler_is_left_alone(tmp_path, kind):
    """Catches a run under nohup that ends with its terminal, and a user's handler that is not called."""
    seen = []
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN if kind == "ignored" else lambda *args: seen.append(args[0]))
    try:
        before = handlers()
        fit(tmp_path, Sends(signal.SIGHUP))
        assert handlers() == before and seen == ([] if kind == "ignored" else [signal.SIGHUP])
    finally:
        signal.signal(signal.SIGHUP, former)


def test_exit_signals_says_which(tmp_path):
    """Catches signals that are taken all the same, and one that is given and not taken."""
    sends = Sends(signal.SIGUSR2)
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, sends, exit_signals=(signal.SIGUSR2,))
    assert caught.value.code == 128 + signal.SIGUSR2

    class Looks(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            assert handlers() == before

    before = handlers()
    fit(tmp_path, Looks(), exit_signals=())


@pytest.mark.parametrize("bad", [(signal.SIGKILL,), (0,), (999,), ("SIGTERM",), (True,), None])
def test_bad_exit_signals_are_refused_at_construction(bad):
    """Catches an OSError of the first fit, and a name that is never received."""
    with pytest.raises(ValueError, match=r"exit_signals must be .*\(signal.SIGTERM, .*, or \(\) for none, got "):
        single(exit_signals=bad)


def test_a_signal_in_a_validation_does_not_wait_for_its_end(tmp_path):
    """Catches a process that is killed while it validates, before it has saved."""
    ended = []

    class Ends(Callback):
        def on_validation_end(self, trainer, task):
            ended.append(trainer.micro_step)

    left_with(SystemExit, tmp_path, Sends(signal.SIGTERM, hook="on_validation_start"), Ends())
    assert not ended


def test_a_run_that_no_signal_ends_leaves_no_handlers(tmp_path):
    """Catches a signal after the run that a handler of the run swallows."""
    before = handlers()
    fit(tmp_path)
    assert handlers() == before


def test_another_thread_sets_no_handlers(tmp_path):
    """Catches Python's ValueError where fit runs in a worker thread."""
    before, ended = handlers(), []
    thread = threading.Thread(target=lambda: ended.append(fit(tmp_path)))
    thread.start()
    thread.join()
    assert len(ended) == 1 and handlers() == before


HANGS = """
import os, signal, sys, jax.numpy as jnp, numpy as np, optax, jaxaccum
from jaxaccum.callbacks import Callback, ModelCheckpoint
mode, folder = sys.argv[1:]

class Fails:
    def write_scalars(self, step, scalars):
        raise OSError("full")

    def flush(self):
        raise OSError("full")

class Ends(Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.micro_step == 3 and mode == "signals":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        if trainer.micro_step == 3 and mode == "raises":
            raise ZeroDivisionError

task = jaxaccum.Task(
    lambda key, batch: jnp.zeros((4096, 2048)), lambda w, batch, key: jnp.mean(w[0, 0] * batch), optax.adam(1.0)
)
trainer = jaxaccum.Trainer(
    max_epochs=1, strategy="single", enable_progress_bar=False, logger=Fails(), log_every_n_steps=1,
    callbacks=[Ends(), ModelCheckpoint(folder, every_n_micro_steps=1)],
)
signal.signal(signal.SIGINT, signal.default_int_handler)
trainer.fit(task, [np.ones(2, np.float32)] * 4)
"""


@pytest.mark.parametrize(("mode", "code"), [("ends", 0), ("raises", 1), ("signals", -signal.SIGINT)])
def test_the_process_ends_whatever_fails_at_a_runs_end(tmp_path, mode, code):
    """Catches a thread that writes a large checkpoint for ever, and one that is never joined."""
    command = [sys.executable, "-W", "ignore", "-c", HANGS, mode, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if mode != "signals":
        (path,) = tmp_path.iterdir()
        assert path.name == f"epoch=0-micro_step={4 if mode == 'ends' else 3}"
