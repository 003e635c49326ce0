"""Random runs of the `Trainer`: what each ends with, resumed or not, and what jax alone gives in float64."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training import trainer

import jaxaccum
from jaxaccum.callbacks import Callback, ModelCheckpoint

TRAINER = {
    "strategy": ["single", "ddp", "dp", "zero"],
    "devices": [2, 1, 4],
    "fused": [False, True],
    "weighted": [False, True],
    "batches": [4, 1, 3, 5, 9],  # Of the loader.
    "n": [4, 1, 3],
    "last": [0, 1, 2],  # How many rows the last batch of an epoch lacks.
    "empty": [0, 1, 2],  # How many batches of an epoch weigh nothing, with a Weighted loss.
    "every_k": ["2", "1", "3", "1 3", "3 1 2"],  # By epoch.
    "epochs": [1, 2, 3],
    "partial": ["exact", "divide_by_k"],
    "clip": [None, 0.05],
    "stop": [0, 1, 2, 4, 7],  # The micro-step at which the first run ends; 0: it doesn't.
    "seed": list(range(8)),
}


def why_refused(c):
    """Why the library can't do this, or None."""
    sizes = _sizes(c)
    rules = {
        "one device": c["strategy"] == "single" and c["devices"] > 1,
        "a batch without rows": sizes[-1] < 1,
        "a plain loss weighs": c["empty"] and not c["weighted"],
        "something must count": c["empty"] >= c["batches"],
        "several micro-steps in one call": c["fused"] and c["stop"],
    }
    return next((reason for reason, holds in rules.items() if holds), None)


class _StopError(Exception):
    pass


class _Stops(Callback):
    """Ends a run at a micro-step."""

    def __init__(self, micro_step):
        self.micro_step = micro_step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.micro_step == self.micro_step:
            raise _StopError


def _sizes(c):
    return [c["n"]] * (c["batches"] - 1) + [c["n"] - c["last"]]


def _loader(c):
    rng = np.random.default_rng(c["seed"])
    batches = []
    for i, n in enumerate(_sizes(c)):
        mask = np.maximum(rng.integers(0, 2, n), np.arange(n) == 0) * (i >= c["empty"])
        batches.append({"x": rng.standard_normal((n, 3)), "y": rng.standard_normal((n, 2)), "mask": mask * 1.0})
    return batches


def _params(c):
    return {"w": np.random.default_rng(c["seed"] + 50).standard_normal((3, 2)), "b": np.zeros(2)}


def _losses(params, batch):
    return jnp.sum((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2, axis=-1)


def _optimizer():
    return optax.sgd(0.25, momentum=0.5)


def _got(c, folder):
    def loss(params, batch, key):
        losses = _losses(params, batch)
        if c["weighted"]:
            return jaxaccum.Weighted(jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"]))
        return jnp.mean(losses)

    single = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    task = jaxaccum.Task(lambda key, batch: jax.tree.map(jnp.asarray, single(_params(c))), loss, _optimizer())
    batches = single(_loader(c))

    def fit(*callbacks, **options):
        run = trainer(
            strategy=c["strategy"],
            devices=c["devices"],
            accumulate_grad_batches=dict(enumerate(map(int, c["every_k"].split()))),
            max_epochs=c["epochs"],
            partial_window=c["partial"],
            gradient_clip_val=c["clip"],
            fuse_windows=c["fused"],
            callbacks=callbacks,
        )
        return run, run.fit(task, batches, **options)

    if c["stop"]:
        saves = ModelCheckpoint(folder, every_n_micro_steps=c["stop"])
        try:
            run, state = fit(saves, _Stops(c["stop"]))
        except _StopError:
            run, state = fit(saves, ckpt_path="last")
    else:
        run, state = fit()
    return {"params": state.params, "steps": run.global_step, "micro": run.micro_step, "samples": run.samples_seen}


def _want(c):
    batches = _loader(c)
    group = c["devices"] if c["strategy"] in ("ddp", "zero") else 1
    weigh = lambda batch: batch["mask"] if c["weighted"] else np.ones(len(batch["x"]))
    every_k = dict(enumerate(map(int, c["every_k"].split())))
    clip = optax.identity() if c["clip"] is None else optax.clip_by_global_norm(c["clip"])
    optimizer = optax.chain(clip, _optimizer())
    params, steps = _params(c), 0
    state = optimizer.init(params)
    for epoch in range(c["epochs"]):
        k = every_k[max(at for at in every_k if at <= epoch)]
        for first in range(0, len(batches), k * group):
            window = batches[first : first + k * group]
            rows = {name: np.concatenate([batch[name] for batch in window]) for name in window[0]}
            weights = np.concatenate([weigh(batch) for batch in window])
            steps += 1  # A window counts, even if its weight is 0.
            if not weights.sum():
                continue
            total = lambda p, rows=rows, weights=weights: jnp.sum(_losses(p, rows) * weights) / weights.sum()
            share = 1.0
            if c["partial"] == "divide_by_k":
                share = -(-len(window) // group) / k
            grads = jax.tree.map(lambda g, share=share: g * share, jax.grad(total)(params))
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    micro = c["epochs"] * -(-len(batches) // group)
    return {"params": params, "steps": steps, "micro": micro, "samples": c["epochs"] * sum(_sizes(c))}


def run(c):
    """(what the Trainer ends with, what jax does)."""
    with tempfile.TemporaryDirectory() as folder:
        got = _got(c, folder)
    with jax.enable_x64(True):
        return got, _want(c)
