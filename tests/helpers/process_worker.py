"""One process of test_processes.py: runs every case in turn and prints its result as a line of JSON.

python process_worker.py ADDRESS NUM_PROCESSES PROCESS FOLDER
"""

import datetime
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from training import Logged, loader, task, trainer

import jaxaccum
import jaxaccum.distributed
from jaxaccum.callbacks import EMA, AdaptiveAccumulation, Callback, ModelCheckpoint
from jaxaccum.distributed import process_group
from jaxaccum.trainer.programs.compiled import FitState

SCHEDULE = {0: 3, 1: 2}
TOKENS = jaxaccum.AccumulationSchedule({0: 1, 40: 2, 90: 3}, by="tokens")
SIZES = [4] * 16 + [4, 4, 3, 3]  # Of all processes: 5 micro-steps of 4 devices, the last of several shapes.


ZERO = {"strategy": "zero", "fuse_windows": True, "accumulate_grad_batches": 2}


def of_process(batches, process, processes=2, own=2):
    """A process' part of the loader batches of all, in the order that the Trainer defines: by device."""
    return [batch for i, batch in enumerate(batches) if i // own % processes == process]


def mine(batches):
    return of_process(batches, jax.process_index(), jax.process_count(), jax.local_device_count())


class Positioned:
    """A loader whose iterators tell where they are."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return Position(self.batches)


class Position:
    def __init__(self, batches):
        self.batches, self.i = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.i == len(self.batches):
            raise StopIteration
        self.i += 1
        return self.batches[self.i - 1]

    def get_state(self):
        return {"i": self.i, "first": float(self.batches[0]["x"][0, 0])}

    def set_state(self, state):
        assert state["first"] == float(self.batches[0]["x"][0, 0]), "the state of another process' loader"
        self.i = state["i"]


class At(Callback):
    """Calls `act(trainer)` on one process, in a hook of one micro-step."""

    def __init__(self, process, micro_step, act, hook="on_train_batch_end"):
        self.process, self.micro_step, self.act, self.hook = process, micro_step, act, hook

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.do(trainer, "on_train_batch_end")

    def on_train_epoch_start(self, trainer, task):
        self.do(trainer, "on_train_epoch_start")

    def do(self, trainer, hook):
        if (jax.process_index(), trainer.micro_step, hook) == (self.process, self.micro_step, self.hook):
            self.act(trainer)


class Clock(Callback):
    """Stands in for `time`: a micro-step takes a second on process 0, and the clock of process 1 stands still."""

    now = 0.0

    def monotonic(self):
        return self.now

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.now += jax.process_index() == 0


def raises(error):
    raise error


def fit(folder, callbacks=(), batches=None, val=None, ckpt_path=None, dropout=0.3, twice=False, **options):
    """What a run ended with, or the error that it ended by; with `twice`, that of a run from the first one's state."""
    options = {"accumulate_grad_batches": SCHEDULE, "max_epochs": 2, "log_every_n_steps": 1, **options}
    t = trainer(default_root_dir=folder, callbacks=callbacks, gradient_clip_val=0.5, **options)
    batches = mine(loader(*SIZES)) if batches is None else batches
    try:
        the_task = task(dropout=dropout)
        state = t.fit(the_task, batches, val, ckpt_path=ckpt_path)
        if twice:
            state = t.fit(the_task, batches, val, init_from=state)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}", "micro_step": t.micro_step if t._run else None}
    params = {name: np.asarray(x).tolist() for name, x in state.params.items()}
    names = ("samples_seen", "global_step", "micro_step", "effective_batch_size")
    told = {name: getattr(t, name) for name in names}
    return {"digest": digest(state.params), "params": params, **told}


def fit_adaptively(folder, **options):
    """The same of a run with an adaptive K, and its schedule."""
    adaptive = AdaptiveAccumulation(1, 4, scale=jaxaccum.NoiseScale(decay=0.9))
    ended = fit(folder, adaptive, accumulate_grad_batches=1, max_epochs=4, **options)
    return ended | {"chosen": [list(change) for change in adaptive.chosen.items()]}


def digest(params):
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))).hexdigest()


def predictions():
    """The predictions of this process: 5 loader batches of all with "ddp", its share of a batch with "dp"."""
    line = jaxaccum.Task(
        lambda key, batch: np.ones(()), lambda w, x, key: w, optax.sgd(1.0), predict=lambda w, x: w * x
    )
    state = FitState(np.float32(2), (), (), None)
    ddp = trainer(strategy="ddp").predict(line, mine([np.full(n, n, np.float32) for n in (1, 2, 2, 2, 3)]), state)
    share = np.arange(3, dtype=np.float32) + 3 * jax.process_index()
    dp = trainer(strategy="dp").predict(line, [share, share + 6], state)
    return {"ddp": [x.tolist() for x in ddp], "dp": [x.tolist() for x in dp]}


def cases(folder):
    """Each case, by name."""
    batches, val = mine(loader(*SIZES)), mine(loader(4, 4, 4, 4, 4, seed=1))
    log, every = Logged(), ModelCheckpoint(folder / "ddp", every_n_micro_steps=4, save_top_k=-1)
    yield "ddp", fit(folder, every, Positioned(batches), val, logger=log) | {"records": log.records}
    yield "2 to 2", fit(folder, batches=Positioned(batches), ckpt_path=folder / "ddp" / "epoch=0-micro_step=4")
    yield "1 to 2", fit(folder, ckpt_path=folder / "single" / "epoch=0-micro_step=8")
    yield "1 to 2, in the middle of a group", fit(folder, ckpt_path=folder / "single" / "epoch=0-micro_step=10")
    yield "zero", fit(folder, batches=batches[:8], **ZERO)
    yield "twice", fit(folder, batches=batches[:8], twice=True, **ZERO)
    ema, path = EMA(0.9), folder / "ema" / "epoch=0-micro_step=4"
    yield (
        "ema",
        fit(folder, [ema, ModelCheckpoint(path.parent, every_n_micro_steps=4, save_top_k=-1)], val=val)
        | {"average": digest(ema.params)},
    )
    ema = EMA(0.9)
    yield "ema, resumed", fit(folder, ema, val=val, ckpt_path=path) | {"average": digest(ema.params)}
    rows = [np.arange(n // 2) + n // 2 * jax.process_index() for n in (16, 16, 14)]
    shares = [
        {name: x[part] for name, x in batch.items()} for batch, part in zip(loader(16, 16, 14), rows, strict=True)
    ]
    yield "dp", fit(folder, batches=shares, strategy="dp", dropout=0)

    saves = ModelCheckpoint(folder / "tokens", every_n_micro_steps=1, save_top_k=-1)
    yield "tokens", fit(folder, saves, accumulate_grad_batches=TOKENS)
    path = folder / "tokens" / "epoch=0-micro_step=4"
    yield "tokens, resumed", fit(folder, accumulate_grad_batches=TOKENS, ckpt_path=path)

    yield "adaptive", fit_adaptively(folder)

    process_group.time = Clock()
    timed = ModelCheckpoint(folder / "timed", train_time_interval=datetime.timedelta(seconds=4), save_top_k=-1)
    yield "timed", fit(folder, [timed, process_group.time])
    process_group.time = time
    told = At(1, 2, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))
    yield "SIGUSR1", fit(folder, [told, ModelCheckpoint(folder / "usr1")])
    told = At(1, 2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    saves = lambda: ModelCheckpoint(folder / "told")
    yield "SIGTERM", fit(folder, [told, saves()])
    yield "after SIGTERM", fit(folder, saves(), ckpt_path="last")
    stops = At(1, 2, lambda trainer: setattr(trainer, "should_stop", True))
    yield "should_stop", fit(folder, stops)
    yield (
        "an exception",
        fit(folder, [At(1, 2, lambda trainer: raises(KeyError("luck"))), ModelCheckpoint(folder / "x")]),
    )

    yield "an empty loader", fit(folder, batches=[] if jax.process_index() else batches)

    sets_k = At(1, 0, lambda trainer: setattr(trainer, "accumulate_grad_batches", 7), "on_train_epoch_start")
    yield "K", fit(folder, sets_k)
    yield "options", fit(folder, accumulate_grad_batches=2 + jax.process_index())
    fewer = batches[: 8 - 2 * jax.process_index()]
    yield "lengths", fit(folder, batches=fewer)
    yield "unknown lengths", fit(folder, batches=iter(fewer), max_epochs=1)
    broken = (batch if i != 4 or jax.process_index() == 0 else raises(OSError("disk")) for i, batch in enumerate(fewer))
    yield "a loader's error", fit(folder, ModelCheckpoint(folder / "broken"), broken, max_epochs=1)
    unread = [batch | {"x": "words"} if i == 4 and jax.process_index() else batch for i, batch in enumerate(batches)]
    yield "a batch that can't be read", fit(folder, ModelCheckpoint(folder / "unread"), unread, max_epochs=1)
    yield "predict", predictions()
    keys = [batch | {"key": jax.random.split(jax.random.key(0), len(batch["x"]))} for batch in batches]
    yield "keys", fit(folder, batches=keys)
    yield "trees", fit(folder, batches=[{**fewer[0], **({"z": fewer[0]["y"]} if jax.process_index() else {})}])


def main(address, num_processes, process, folder):
    jaxaccum.distributed.initialize(address, int(num_processes), int(process), peer_timeout=30.0)
    for name, result in cases(Path(folder)):
        print(json.dumps({"case": name, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
