"""A run that kills itself on request: `resume_worker.py FOLDER DEVICES EPOCHS [MOMENT COUNT DELAY]`.

Its loader is shuffled by the epoch, two policies save to one folder, and one of its loggers fails. Some DELAY seconds
after the COUNT-th MOMENT it is gone. Else it prints what it ended with.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from training import loader, task, trainer

from jaxaccum import checkpoint
from jaxaccum.callbacks import Callback, ModelCheckpoint
from jaxaccum.loggers import JSONLLogger


class Dies(Callback):
    """Counts what happens, keeps the counts in checkpoints, and kills the process at a moment of this life."""

    def __init__(self, moment=None, count=0, delay=0.0):
        self.moment, self.left, self.delay = moment, int(count), float(delay)
        self.counts = {"micro_step": 0, "validation": 0, "epoch_end": 0}

    def met(self, moment):
        if moment in self.counts:
            self.counts[moment] += 1
        if moment == self.moment:
            self.left -= 1
            if self.left == 0:
                threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.met("micro_step")
        time.sleep(0.004)

    def on_validation_start(self, trainer, task):
        self.met("validation")

    def on_train_epoch_end(self, trainer, task):
        self.met("epoch_end")

    def state_dict(self):
        return dict(self.counts)

    def load_state_dict(self, state_dict):
        self.counts = state_dict


class Seen(Callback):
    """Keeps the numbers of the batches that each epoch was trained on, in checkpoints too."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, task):
        self.epochs.append([])

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.epochs[-1] += [int(one["number"][0]) for one in (batch if isinstance(batch, list) else [batch])]

    def state_dict(self):
        return {"epochs": [list(epoch) for epoch in self.epochs]}

    def load_state_dict(self, state_dict):
        self.epochs = state_dict["epochs"]


class Shuffled:
    """Numbered batches, in an order that `iter` fixes by the epoch."""

    def __init__(self, batches):
        self.batches = [{**batch, "number": np.full(len(batch["x"]), i)} for i, batch in enumerate(batches)]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(len(self.batches))
        return iter([self.batches[i] for i in order])


class Fails:
    """A logger that can't write."""

    def write_scalars(self, step, scalars):
        raise OSError("the disk of the logs is full")

    def flush(self):
        raise ConnectionError("nobody is there")


class Slow(list):
    """Batches that take their time, so that there is some to be killed in."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.004)
            yield batch


def main(folder, devices, epochs, *death):
    dies, seen = Dies(*death), Seen()
    start = checkpoint.Writer.start
    checkpoint.Writer.start = lambda *args: (dies.met("save"), start(*args))
    saves = [
        ModelCheckpoint(every_n_micro_steps=3),
        ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=False),
    ]
    path = f"{folder}/metrics.jsonl"
    t = trainer(
        strategy="single" if devices == "1" else "ddp",
        accumulate_grad_batches={0: 3, 1: 2, 2: 4},
        max_epochs=int(epochs),
        callbacks=[dies, seen, *saves],
        default_root_dir=folder,
        logger=[Fails(), JSONLLogger(path)],
        log_every_n_steps=2,
        val_check_interval=4,
    )
    batches = loader(*[4] * (7 * int(devices) - 1), 3)
    val_loader = Slow(batches[: 3 * int(devices)])
    state = t.fit(task(dropout=0.3, model_state=True), Shuffled(batches), val_loader, ckpt_path="last")
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
    scores = saves[1].state_dict()["saved"]
    ended = {
        "digest": digest.hexdigest(),
        "counts": dies.counts,
        "counters": vars(t._at),
        "epochs": seen.epochs,
        "metrics": Path(path).read_text(),
        "best": [scores[name] for name in saves[1].ranked(scores)],
        "paths": [policy.last_model_path.is_dir() and policy.best_model_path.is_dir() for policy in saves],
    }
    print(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
