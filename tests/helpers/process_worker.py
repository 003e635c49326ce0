"""One process of test_processes.py: runs every case in turn and prints its result as a line of JSON.

python process_worker.py ADDRESS NUM_PROCESSES PROCESS FOLDER
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from training import Logged, loader, task, trainer

import jaxaccum.distributed
from jaxaccum.callbacks import Callback, ModelCheckpoint

SCHEDULE = {0: 3, 1: 2}
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


def raises(error):
    raise error


def fit(folder, callbacks=(), batches=None, val=None, ckpt_path=None, dropout=0.3, **options):
    """(what a run ended with, or the error that it ended by; its Trainer)."""
    options = {"accumulate_grad_batches": SCHEDULE, "max_epochs": 2, "log_every_n_steps": 1, **options}
    t = trainer(default_root_dir=folder, callbacks=callbacks, gradient_clip_val=0.5, **options)
    batches = mine(loader(*SIZES)) if batches is None else batches
    try:
        state = t.fit(task(dropout=dropout), batches, val, ckpt_path=ckpt_path)
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}", "micro_step": t.micro_step if t._run else None}
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)))
    params = {name: np.asarray(x).tolist() for name, x in state.params.items()}
    names = ("samples_seen", "global_step", "micro_step", "effective_batch_size")
    told = {name: getattr(t, name) for name in names}
    return {"digest": digest.hexdigest(), "params": params, **told}


def cases(folder):
    """Each case, by name."""
    batches, val = mine(loader(*SIZES)), mine(loader(4, 4, 4, 4, 4, seed=1))
    log, every = Logged(), ModelCheckpoint(folder / "ddp", every_n_micro_steps=4, save_top_k=-1)
    yield "ddp", fit(folder, every, Positioned(batches), val, logger=log) | {"records": log.records}
    yield "2 to 2", fit(folder, batches=Positioned(batches), ckpt_path=folder / "ddp" / "epoch=0-micro_step=4")
    yield "1 to 2", fit(folder, ckpt_path=folder / "single" / "epoch=0-micro_step=8")
    yield "1 to 2, in the middle of a group", fit(folder, ckpt_path=folder / "single" / "epoch=0-micro_step=10")
    yield "zero", fit(folder, batches=batches[:8], **ZERO)
    rows = [np.arange(n // 2) + n // 2 * jax.process_index() for n in (16, 16, 14)]
    shares = [
        {name: x[part] for name, x in batch.items()} for batch, part in zip(loader(16, 16, 14), rows, strict=True)
    ]
    yield "dp", fit(folder, batches=shares, strategy="dp", dropout=0)

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
    keys = [batch | {"key": jax.random.split(jax.random.key(0), len(batch["x"]))} for batch in batches]
    yield "keys", fit(folder, batches=keys)
    yield "trees", fit(folder, batches=[{**fewer[0], **({"z": fewer[0]["y"]} if jax.process_index() else {})}])


def main(address, num_processes, process, folder):
    jaxaccum.distributed.initialize(address, int(num_processes), int(process), peer_timeout=30.0)
    for name, result in cases(Path(folder)):
        print(json.dumps({"case": name, **result}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
