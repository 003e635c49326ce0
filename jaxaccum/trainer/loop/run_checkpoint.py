"""Converts a run to the arrays and notes of a checkpoint, and restores it on any number of devices."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._devices import topology
from jaxaccum._devices.topology import OneDevice
from jaxaccum._multi_steps import redistribution
from jaxaccum._multi_steps.state import with_cleared_sums
from jaxaccum._sums import weighted_sum
from jaxaccum._types import Tree
from jaxaccum.callbacks import Callback
from jaxaccum.callbacks.policy import CheckpointPolicy
from jaxaccum.checkpoint import Checkpoint, json_state, named_arrays
from jaxaccum.trainer.input.loader import TrainLoader
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.programs.compiled import FitState, Pending, Programs

_AVERAGE = ".average"  # Where an array's path starts with ".params".
_NORMS = ".pending.sums.norms.pending"


def arrays(run: Run) -> dict[str, Any]:
    """Returns the arrays of a run by their path in its state, and the average of its parameters."""
    average = {} if run.average is None else named_arrays.arrays(run.average.average)
    return {**named_arrays.arrays(run.state), **{_AVERAGE + name: x for name, x in average.items()}}


def notes(run: Run, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Returns everything in a run that is not an array, as JSON types. Waits for the last window's means."""
    strategy, metrics = run.setup.strategy, run.metrics
    options, processes = run.setup.options, run.setup.processes
    number = lambda x: np.asarray(x).item()
    told = [(callback.state_key, callback.state_dict()) for callback in callbacks]
    return {
        "counters": dataclasses.asdict(run.at),
        "lengths": run.lengths.state_dict(),
        "seed": run.setup.programs.seed,
        "devices": strategy.size,
        "group": strategy.batches,
        "micro_step_examples": run.setup.examples * strategy.group,
        "loaders": processes.gather("a checkpoint's notes", run.loader_state),
        "means": {name: number(mean) for name, mean in metrics.window.items()},
        "epoch_sums": dict(metrics.epoch.all()),  # Written later, by another thread.
        "metrics": {name: number(result) for name, result in metrics.results.items()},
        "logged": {name: number(value) for name, value in metrics.logged.items()},
        # Until a run may stop, the wish for it is part of its state.
        "stop": processes.wishes.stop and not options.may_stop(run.at),
        "callbacks": [(name, json_state.dumps(state, name)) for name, state in told if state],
    }


def place(checkpoint: Checkpoint, strategy: Strategy) -> Counters:
    """Returns the counters of `checkpoint`, converted to the strategy's micro-steps."""
    noted = checkpoint.notes["counters"]
    # Version 0.1 counted towards a validation within each epoch only.
    at = Counters(**{"toward_validation": noted["batch_idx"], **noted})
    before = checkpoint.notes["group"]
    return at if before == strategy.batches else at.regrouped(before, strategy.batches)


def examples(checkpoint: Checkpoint, strategy: Strategy) -> int | None:
    """Returns the examples in the run's first loader batch, over all processes; None if they are not noted."""
    noted = checkpoint.notes.get("micro_step_examples")  # Not in version 0.1.
    return None if noted is None else noted * strategy.batches // checkpoint.notes["group"] // strategy.group


def begin(checkpoint: Checkpoint, loader: TrainLoader, strategy: Strategy) -> None:
    """Starts a loader at the position of `checkpoint`; raises ValueError if that has weights only."""
    if checkpoint.notes.get("weights_only"):
        raise ValueError(
            f"{checkpoint.path} has weights only, so no run can resume from it: pass fit "
            "init_from=jaxaccum.checkpoint.load(path, like=params) in place of ckpt_path, or save_weights_only=False "
            "to ModelCheckpoint."
        )
    processes = strategy.process_count
    is_as_it_was = (len(checkpoint.notes["loaders"]), checkpoint.notes["group"]) == (processes, strategy.batches)

    def own_batches(batches: int) -> int:
        """Converts a number of batches over all processes to that of this one; raises in all if it doesn't divide."""
        if processes == 1 or strategy.name == "dp":
            return batches
        if batches % strategy.batches and not is_as_it_was:
            raise ValueError(
                f"{checkpoint.path} was saved after {batches} loader batches, which are not equally many of each of "
                f"the {strategy.batches} devices of {processes} processes. Go on with one process, with as many "
                f"processes and devices as before, or from a checkpoint after a multiple of {strategy.batches}."
            )
        return -(-batches // processes)

    loader.begin(place(checkpoint, strategy).start, _loader_state(checkpoint, strategy), own_batches)


def _loader_state(checkpoint: Checkpoint, strategy: Strategy) -> str | None:
    """Returns the state of this process's loader; None without one, or if the number of processes changed."""
    states = checkpoint.notes["loaders"]
    return states[strategy.process_index] if len(states) == strategy.process_count else None


def restore(checkpoint: Checkpoint, run: Run, callbacks: Sequence[Callback]) -> list[tuple[str, Any]]:
    """Restores a fresh run and its callbacks from `checkpoint`. The loader has been started there already.

    Callbacks with the same `state_key` get their states in order. Returns the (key, state) pairs left over.

    Raises:
      ValueError: if the checkpoint is of another task; the message names the first array that differs.
    """
    noted, strategy, metrics = checkpoint.notes, run.setup.strategy, run.metrics
    state, average = _apart(checkpoint.arrays)
    run.state = _placed(checkpoint._replace(arrays=state), run.state, strategy, run.setup.programs)
    if run.average is not None:
        run.average.begin(run.state.params, noted["counters"]["global_step"])
        if average:
            run.average.average = _placed_average(average, run.average.average, strategy, checkpoint.path)
    # Dtypes and shardings match the programs' outputs, so that nothing recompiles.
    on_device = lambda number: strategy.placed(np.asarray(number, weighted_sum.weight_dtype()), strategy.common)
    metrics.window = {name: on_device(mean) for name, mean in noted["means"].items()}
    if "loss" in metrics.window:  # Version 0.1 named them without the prefix.
        metrics.window = {f"train_{name}": mean for name, mean in metrics.window.items()}
    metrics.epoch.begin(noted.get("epoch_sums", {}))
    metrics.results, metrics.logged = noted["metrics"], noted["logged"]
    run.loader_state = _loader_state(checkpoint, strategy)
    waiting = [(name, json_state.loads(text)) for name, text in noted["callbacks"]]
    for callback in callbacks:
        own = next((entry for entry in waiting if entry[0] == callback.state_key), None)
        if own is not None:
            waiting.remove(own)
            callback.load_state_dict(own[1])
    if "lengths" in noted:  # Not in version 0.1.
        run.lengths.load_state_dict(noted["lengths"])
    run.at, run.is_resuming = place(checkpoint, strategy), True
    run.setup.processes.own.stop = noted.get("stop", False)
    return waiting


def ranked(policy: CheckpointPolicy, notes: Mapping[str, Any]) -> list[str] | None:
    """Returns the checkpoints that a policy with this key had kept, best first; None if `notes` have none."""
    states = (json_state.loads(text) for key, text in notes["callbacks"] if key == policy.state_key)
    state = next(states, None)
    return None if state is None else policy.ranked(state["saved"])


def weights(checkpoint: Checkpoint, params: Tree, model_state: Tree, averaged: bool) -> FitState:
    """Returns the checkpoint's parameters and model state, on the host, in trees like these; raises as `restore`.

    If `averaged`, the parameters are their average, if the checkpoint has one.
    """
    like = FitState(params, None, model_state, None)  # pyrefly: ignore[bad-argument-type]
    state, average = _apart(weights_of(checkpoint.arrays))
    for name, x in average.items() if averaged else ():
        state[f".params{name}"] = x.astype(state[f".params{name}"].dtype)
    return _filled(checkpoint._replace(arrays=state), like, 1, 1)


def weights_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters, their average and the model state among the arrays of a run."""
    return {name: x for name, x in arrays.items() if name.startswith((".params", _AVERAGE, ".model_state"))}


def _apart(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a run's state by their path there, and those of the average by their path in it."""
    average = {name.removeprefix(_AVERAGE): x for name, x in arrays.items() if name.startswith(_AVERAGE)}
    return {name: x for name, x in arrays.items() if not name.startswith(_AVERAGE)}, average


def _placed_average(average: Mapping[str, Any], like: Tree, strategy: Strategy, path: Path) -> Tree:
    """Returns the arrays of a saved average in the tree of `like`, on its devices."""
    kinds = named_arrays.kinds(average), named_arrays.kinds(named_arrays.arrays(like))
    named_arrays.check_same(*kinds, source=str(path), remedy="Its EMA is of other parameters.")
    return jax.tree.map(lambda x, old: strategy.placed(x, old.sharding), named_arrays.unnamed(average, like), like)


def _filled(checkpoint: Checkpoint, like: FitState, before: int, now: int) -> FitState:
    """Returns the checkpoint's arrays in the tree of `like`, on the host; they were saved on `before` devices."""
    _check(checkpoint, like, before, now)
    return named_arrays.unnamed(checkpoint.arrays, like)


def _placed(checkpoint: Checkpoint, like: FitState, strategy: Strategy, programs: Programs) -> FitState:
    """Returns the checkpoint's arrays as a state like `like`, on the strategy's devices."""
    before = checkpoint.notes["devices"]
    state = _filled(_with_norms(checkpoint, like, before), like, before, strategy.size)
    if not checkpoint.notes["counters"]["window_step"]:
        # The programs expect zero sums at the start of a window; version 0.1 saved those of the last window.
        sums = with_cleared_sums(state.pending.sums, functools.partial(jax.tree.map, np.zeros_like))
        state = state._replace(pending=state.pending._replace(sums=sums))
    if before != strategy.size:
        state = state._replace(pending=_redistributed(state.pending, before, strategy, programs))
    if strategy.process_count == 1:
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, like), may_alias=False)
    return jax.tree.map(lambda x, lies: strategy.placed(x, lies.sharding), state, like)


def _with_norms(checkpoint: Checkpoint, like: FitState, devices: int) -> Checkpoint:
    """Adds zeros for the norms of the open window, or removes them: only one of the two runs may measure the noise."""
    arrays = {name: x for name, x in checkpoint.arrays.items() if name != _NORMS}
    if like.pending.sums.norms:
        *_, entries = like.pending.sums.norms.pending.shape
        shape = (devices, entries) if devices > 1 else (entries,)
        arrays[_NORMS] = checkpoint.arrays.get(_NORMS, np.zeros(shape, weighted_sum.weight_dtype()))
    return checkpoint._replace(arrays=arrays)


def _redistributed(pending: Pending, before: int, strategy: Strategy, programs: Programs) -> Pending:
    """Converts the pending state of a window from `before` devices to those of the strategy.

    Sums are merged or split. Model states that differ between the devices are averaged, as at a boundary.
    """
    now = strategy.size
    alone = isinstance(strategy.sync, OneDevice)

    folded = lambda x: redistribution.folded(jnp.atleast_1d(x), now)
    logs = lambda x: folded(x)[0] if alone else folded(x)
    local = lambda x: x if alone else jnp.broadcast_to(x, (now, *x.shape))
    model_state = pending.model_state if before == 1 else topology.averaged(pending.model_state)
    if strategy.process_count == 1:
        sums = programs.redistribute(pending.sums)
    else:  # On the host; the sums are placed on the devices later, with the rest.
        names = ("acc_grads", "weight", "averages", "dropped", "norms")
        stacked = lambda x: x if before > 1 else x[None]
        held = {name: jax.tree.map(stacked, getattr(pending.sums, name)) for name in names}
        sums = pending.sums._replace(**redistribution.folded(held, now))
    return pending._replace(
        sums=sums, logs=jax.tree.map(logs, pending.logs), model_state=jax.tree.map(local, model_state)
    )


def _check(checkpoint: Checkpoint, like: FitState, before: int, now: int) -> None:
    """Checks that names, shapes and dtypes match those of `like`, except for the number of devices."""

    def kinds(arrays, devices):
        is_local = lambda name, x: name.startswith(".pending") and devices > 1 and x.ndim
        of_one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return named_arrays.kinds({name: of_one(x) if is_local(name, x) else x for name, x in arrays.items()})

    remedy = "Pass the task, the optimizer and the clipping that it was made with, or another ckpt_path."
    saved, wanted = kinds(checkpoint.arrays, before), kinds(named_arrays.arrays(like), now)
    named_arrays.check_same(saved, wanted, str(checkpoint.path), remedy)
