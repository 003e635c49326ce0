"""A run that kills itself, when it is told to: `resume_worker.py FOLDER DEVICES EPOCHS [MOMENT COUNT DELAY]`.

Some DELAY seconds after the COUNT-th MOMENT it is gone. Else it prints what it ended with.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
from training import loader, task, trainer

from jaxaccum import checkpoint
from jaxaccum.callbacks import Callback, ModelCheckpoint


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


class Slow(list):
    """Batches that take their time, so that there is some to be killed in."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.004)
            yield batch


def main(folder, devices, epochs, *death):
    dies = Dies(*death)
    start = checkpoint.Writer.start
    checkpoint.Writer.start = lambda *args: (dies.met("save"), start(*args))
    saves = ModelCheckpoint(every_n_micro_steps=3)
    t = trainer(
        strategy="single" if devices == "1" else "ddp",
        accumulate_grad_batches={0: 3, 1: 2, 2: 4},
        max_epochs=int(epochs),
        callbacks=[dies, saves],
        default_root_dir=folder,
        val_check_interval=4,
    )
    batches = loader(*[4] * (7 * int(devices) - 1), 3)
    state = t.fit(task(dropout=0.3, model_state=True), batches, Slow(batches[: 3 * int(devices)]), ckpt_path="last")
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
    print(json.dumps({"digest": digest.hexdigest(), "counts": dies.counts, "counters": vars(t._at)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
