"""Shows that the tests can fail: plants bugs in a copy of the package, one at a time, and runs the tests on each.

    python tests/planted_bugs.py            # all of them
    python tests/planted_bugs.py "sum mode" # those whose name contains these words

Exits with 1 if a bug goes unnoticed. Not collected by pytest; test_planted_bugs.py keeps the list applicable.
"""

import ast
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Test files by name, in the order in which they run.
CORE = (
    "multi_steps value_and_grad compiled compose mapped redistribution zero exact prepared_steps rounding reduction "
    "splitting prng overwrites varying_weight"
)
TRAINER = "prefetch callbacks loader validation checkpoint trainer resume signals fuse_windows"


class Bug(NamedTuple):
    """A change of the source that must not go unnoticed.

    `old` and `new` are code, two expressions or some statements each. They are compared as syntax trees, so neither
    layout nor comments count, and `where` is found by its name, in whichever file it is.
    """

    name: str  # What goes wrong.
    where: str  # `function`, `Class`, `Class.method`, each with `module.` before it if need be, or `module`.
    old: str  # Occurs once in there.
    new: str
    tests: str  # The names of the files that could notice it, without "test_": the core knows nothing of the Trainer.

    @property
    def test_files(self) -> list[pathlib.Path]:
        """The files of `tests`, from whichever folder."""
        return [file for name in self.tests.split() for file in (ROOT / "tests").rglob(f"test_{name}.py")]


BUGS = [
    Bug("extra args are not passed to the inner optimizer", "closing.close", "call.extra_args | means", "{}", CORE),
    Bug(
        "averaged extra args are the last micro-batch's values",
        "closing.close",
        "call.extra_args | means",
        "call.extra_args",
        CORE,
    ),
    Bug(
        "the sum mode divides by the total weight",
        "closing.close",
        "weight if config.use_grad_mean else jnp.full_like(weight, sync.size())",
        "weight",
        CORE,
    ),
    Bug("a window starts with the sums of the previous window", "add", "new = jnp.where(first, x, new)", "pass", CORE),
    Bug(
        "a skipped micro-batch closes the window",
        "accumulation.add",
        "conditions.both(reached, accepted)",
        "reached",
        CORE,
    ),
    Bug(
        "gradients are rounded to bfloat16 before they are added",
        "add",
        "jnp.asarray(x)",
        "jnp.asarray(x).astype(jnp.bfloat16 if wide == jnp.float32 else wide)",
        CORE,
    ),
    Bug(
        "the mean is rounded to the gradients' dtype",
        "weighted_sum.mean",
        "_wider(total.dtype, jnp.result_type(x))",
        "x.dtype",
        CORE,
    ),
    Bug(
        "the sum is four times the last gradient",
        "add",
        "total.astype(wide) + x",
        "x if first is None else x * 4",
        CORE,
    ),
    Bug(
        "the inner optimizer's state changes in every micro-step",
        "branch",
        "jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)",
        "jax.lax.cond(pred, close, lambda: (stay()[0], close()[1]))",
        CORE,
    ),
    Bug(
        "the optimizer runs in every micro-step",
        "branch",
        "jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)",
        "jax.tree.map(lambda a, b: jnp.where(pred, a, b), close(), stay())",
        CORE,
    ),
    Bug(
        "a schedule's K keeps its first value",
        "Boundary.reached",
        "checks.scheduled_k(config.every_k(state.gradient_step)) if callable(config.every_k) else state.every_k",
        "config.every_k(0) if callable(config.every_k) else config.every_k",
        CORE,
    ),
    Bug(
        "the inner optimizer receives zeros for the parameters",
        "_optimizer_step",
        "InnerOptimizer(config.tolerant_inner_opt, state.inner_opt_state, call.params, call.extra_args)",
        "InnerOptimizer(config.tolerant_inner_opt, state.inner_opt_state, jax.tree.map(jnp.zeros_like, call.params), "
        "call.extra_args)",
        CORE,
    ),
    Bug(
        "old sums are multiplied by 0, which keeps their NaNs",
        "add",
        "jnp.where(first, x, new)",
        "total.astype(wide) * (1 - first.astype(wide)) + x",
        CORE,
    ),
    Bug(
        "a left-out gradient is multiplied by 0, which keeps its NaNs",
        "add",
        "jnp.where(_beside(x, keep), x, jnp.zeros_like(x))",
        "x * keep",
        CORE,
    ),
    Bug(
        "a K lowered below the pending micro-steps does not close the window",
        "Boundary.reached",
        "state.mini_step + 1 >= every_k",
        "state.mini_step + 1 == every_k",
        CORE,
    ),
    Bug("flush divides by K", "flush", "state.weight", "state.every_k.astype(jnp.float32)", CORE),
    Bug("flush runs the optimizer on an empty window", "flush", "state.mini_step > 0", "state.mini_step >= 0", CORE),
    Bug(
        "the divisor ignores the weights",
        "accumulation.add",
        "weighted_sum.add(state.weight, one, weight, keep=keep, first=first)",
        "weighted_sum.add(state.weight, one, first=first)",
        CORE,
    ),
    Bug(
        "the optimizer runs on a window of total weight 0",
        "closing.close",
        "conditions.known(weight != 0)",
        "True",
        CORE,
    ),
    Bug(
        "all micro-batches of a device draw from the same key",
        "Window.call",
        "device.index() * self.k + index",
        "device.index() * self.k",
        CORE,
    ),
    Bug("all devices draw from the same keys", "Window.call", "device.index() * self.k + index", "index", CORE),
    Bug("sums are averaged over the devices", "MappedAxis.joined", "jax.lax.psum", "jax.lax.pmean", CORE),
    Bug("bfloat16 sums are all-reduced in bfloat16", "MappedAxis.joined", "layout.wide(x)", "x", CORE),
    Bug(
        "bfloat16 sums are reduce-scattered in bfloat16",
        "reduce_scatter",
        "local = wide(local)",
        "",
        "reduction zero mesh",
    ),
    Bug(
        "redistribution rounds after every addition",
        "folded",
        "jnp.sum(wide[heirs == i], axis=0)",
        "functools.reduce(lambda a, b: (a + b).astype(x.dtype), wide[heirs == i], jnp.zeros_like(wide[0]))",
        "redistribution reduction",
    ),
    Bug(
        "the transpose of a gather sums over the devices in half precision",
        "once_per_window._evaluate",
        "eqn.primitive.name in _GATHERS",
        "False",
        "reduction once_per_window prepared_steps",
    ),
    Bug(
        "a micro-batch of weight 0 changes the model state",
        "Window._sum",
        "new_carry if keep is None else weighted_sum.select(keep, new_carry, carry)",
        "new_carry",
        CORE,
    ),
    Bug(
        "micro-batches are blocks of consecutive rows",
        "splitting.split",
        "x.reshape((length // k, k, *x.shape[1:]))",
        "x.reshape((k, length // k, *x.shape[1:])).swapaxes(0, 1)",
        "splitting",
    ),
    Bug(
        "a batch layout that needs a gather is accepted",
        "_check_layout",
        "n is not None and n % devices",
        "False",
        "splitting",
    ),
    Bug(
        "the host: one device that counts is enough",
        "HostWeight._test",
        "jnp.all(weights >= jnp.asarray(least, weights.dtype))",
        "jnp.any(weights >= jnp.asarray(least, weights.dtype))",
        "host_weight",
    ),
    Bug(
        "the host: a weight that may round to 0 counts",
        "HostWeight._test",
        "jnp.finfo(weights.dtype).eps ** 0.5",
        "jnp.finfo(weights.dtype).smallest_subnormal",
        "host_weight",
    ),
    Bug(
        "the host: a trace that failed is remembered",
        "HostWeight.is_positive",
        "return False",
        "return self._known.setdefault(signature, False)",
        "host_weight",
    ),
    Bug("the host: the mesh of the trace", "_evaluated", "np.asarray(x, jax.typeof(x).dtype)", "x", "host_weight"),
    Bug(
        "the host: every weight counts",
        "HostDriven._programs_for",
        "self._weight.is_positive(params, *args, **kwargs)",
        "True",
        "host_weight",
    ),
    Bug(
        "the host: what counts is selected",
        "_kept",
        "None if micro_batch.counts else traced_loss.keep(weight)",
        "traced_loss.keep(weight)",
        "host_weight",
    ),
    Bug("the host: what counts is added afterwards", "on_each", "False if counts else None", "None", "host_weight"),
    Bug("sums from outside of the mesh", "Gradient.__call__", "layout.in_context(x)", "x", "host_weight"),
    Bug("the gradient lacks the derivative of the weight", "Window.sums", "traced.weight_varies()", "False", CORE),
    Bug(
        "a micro-step accepts a weight that depends on the parameters",
        "Traced.refuse_varying_weight",
        "self.weight_varies()",
        "False",
        "varying_weight",
    ),
    Bug(
        "a weight from a comparison counts as dependent on the parameters",
        "Traced.weight_varies",
        "if not jaxprs.reached(jax.make_jaxpr(tangent)(varied, varied).jaxpr, "
        "[False] * count + [True] * count)[0]: return False",
        "if not jaxprs.reached(jax.make_jaxpr(tangent)(varied, varied).jaxpr, "
        "[False] * count + [True] * count)[0]: return True",
        "varying_weight",
    ),
    Bug("a random key shared by all micro-batches is accepted", "refuse_shared", "is_typed(leaf)", "False", "prng"),
    Bug(
        "the device index is not folded into typed keys",
        "fold_typed",
        "fold(x, number) if is_typed(x) else x",
        "x",
        "prng",
    ),
    Bug(
        "all devices share the carried key",
        "fold_beyond_first",
        "jnp.where(device == 0, x, fold(x, device))",
        "x",
        "prng",
    ),
    Bug(
        "overwritten statistics are added over micro-batches",
        "add",
        "jnp.maximum(total.astype(wide), x) if is_overwritten else total.astype(wide) + x",
        "total.astype(wide) + x",
        CORE,
    ),
    Bug(
        "overwritten statistics are added over devices",
        "MappedAxis.joined",
        "jax.lax.pmax(x, names) if overwrites.holds(path) else jax.lax.psum(layout.wide(x), names)",
        "jax.lax.psum(layout.wide(x), names)",
        CORE,
    ),
    Bug(
        "a window of total weight 0 overwrites the statistics",
        "_window_of",
        "grads = overwrites.kept(grads, params, sums.weight == 0)",
        "pass",
        CORE,
    ),
    Bug("a traced K runs the micro-batches beyond K", "_loop", "jnp.minimum(k, length)", "length", CORE),
    Bug(
        "a gradient that is already reduced is reduced again",
        "MappedAxis.joined",
        "() if reduced is None else (reduced,)",
        "()",
        CORE,
    ),
    Bug("ZeRO all-reduces the gradients", "MeshAxis.joined", "self.scatter", "False", CORE),
    Bug("ZeRO replicates the optimizer's state", "dimension", "next(fits, None)", "None", "reduction zero mesh"),
    Bug(
        "redistribution copies the first device's sum to the added devices",
        "folded",
        "jnp.sum(wide[heirs == i], axis=0)",
        "jnp.sum(wide[heirs == i if i in heirs else slice(1)], axis=0)",
        "redistribution reduction",
    ),
    Bug(
        "redistribution does not scale the gradients in the sum mode",
        "redistribute",
        'batch == "global" or not config.use_grad_mean',
        'batch == "global"',
        "redistribution reduction",
    ),
    Bug(
        "redistribution scales the sums twice",
        "folded",
        "total * scale",
        "total * scale * scale",
        "redistribution reduction",
    ),
    Bug(
        "redistribution of a global batch does not scale the weights",
        "redistribute",
        "{'acc_grads': ratio if batch == 'global' or not config.use_grad_mean else 1, "
        "'weight': ratio if batch == 'global' else 1, 'averages': ratio if batch == 'global' else 1, 'dropped': 1, "
        "'norms': 1}",
        "{'acc_grads': ratio if batch == 'global' or not config.use_grad_mean else 1, "
        "'weight': 1, 'averages': ratio if batch == 'global' else 1, 'dropped': 1, "
        "'norms': 1}",
        "redistribution reduction",
    ),
    Bug(
        "redistribution of an open window does not require the argument batch",
        "redistribute",
        'batch is None and before != devices and np.any(shared.mini_step) and np.any(local["weight"])',
        'False and np.any(shared.mini_step) and np.any(local["weight"])',
        "redistribution reduction",
    ),
    Bug(
        "an epoch uses the K of the next epoch",
        "WindowLengths.every_k",
        "at.epoch",
        "at.epoch + 1",
        "trainer",
    ),
    Bug(
        "an epoch's end does not close the window",
        "Loop._run_on_devices",
        "call[-1].last or window_step >= at.every_k",
        "window_step >= at.every_k",
        TRAINER,
    ),
    Bug("max_steps counts micro-steps", "Loop._is_over", "at.global_step", "at.micro_step", "trainer"),
    Bug(
        "a validation clears the pending sums",
        "Loop._validate_if_due",
        "run.metrics.results |= results",
        "run.metrics.results |= results\n"
        "sums = jax.tree.map(jax.numpy.zeros_like, run.state.pending.sums)\n"
        "run.state = run.state._replace(pending=run.state.pending._replace(sums=sums))",
        "trainer",
    ),
    Bug("prefetching repeats a batch", "micro_steps", "yield ahead.popleft()", "yield ahead[0]", TRAINER),
    Bug("logged means ignore the number of examples", "_logs", "_examples(batch)", "1", TRAINER),
    Bug(
        "logged means include devices without a batch",
        "_logs",
        "jnp.where(present, wide(entry.weight), 0)",
        "wide(entry.weight)",
        TRAINER,
    ),
    Bug("all devices of the Trainer draw from the same key", "_key", "index + device - first", "index", TRAINER),
    Bug(
        "the Trainer numbers keys by micro-step instead of loader batch",
        "Programs._add",
        "place[2].astype(jnp.uint32)",
        "1",
        TRAINER,
    ),
    Bug(
        "logged means include all earlier windows",
        "Programs._add",
        "weighted_sum.add(total, x, keep=keep, first=first)",
        "weighted_sum.add(total, x, keep=keep)",
        TRAINER,
    ),
    Bug(
        "a Trainer's batch of weight 0 changes the model state",
        "Programs._add",
        "weighted_sum.select(keep, model_state, pending.model_state)",
        "model_state",
        TRAINER,
    ),
    Bug(
        "a fused window ignores division by K",
        "Programs._scan",
        "self._close_with(state, batch, place, share, counts)",
        "self._close_with(state, batch, place, None, counts)",
        TRAINER,
    ),
    Bug(
        "all micro-steps of a fused window report the first one's loss", "Programs.run", "(..., i)", "(..., 0)", TRAINER
    ),
    Bug(
        "batches of different shapes are fused",
        "_can_be_stacked",
        "all(signature(other.pieces[0].batch) == shape for other in others)",
        "True",
        TRAINER,
    ),
    Bug(
        "fusing drops the open window when the loader raises",
        "fused",
        "yield from ([one] for one in window)",
        "",
        TRAINER,
    ),
    Bug(
        "a checkpoint due inside a fused window is not saved",
        "_divides",
        "count % interval < last",
        "count % interval == 0",
        TRAINER,
    ),
    Bug(
        "a validation due inside a fused window does not run",
        "Interval.count",
        "at.validated &= not is_due or (at.epoch + 1) % every_n_epochs != 0",
        "at.validated = not is_due or (at.epoch + 1) % every_n_epochs != 0",
        "fuse_windows",
    ),
    Bug(
        "the loader's position counts micro-steps",
        "Counters.count",
        "self.batches += batches",
        "self.batches += bool(batches)",
        "resume",
    ),
    Bug(
        "a resumed run has K = 1",
        "run_checkpoint.place",
        'checkpoint.notes["counters"]',
        'checkpoint.notes["counters"] | {"every_k": 1}',
        TRAINER,
    ),
    Bug("a resumed run ignores the checkpoint's seed", "Trainer._start", 'seed = found.notes["seed"]', "pass", TRAINER),
    Bug(
        "programs are reused for another task",
        "Programs.fits",
        "self._task is task",
        "True",
        "trainer",
    ),
    Bug(
        "programs are reused for a model with other shardings",
        "Programs.initial",
        "kind != self._kind",
        "self._kind is None",
        TRAINER,
    ),
    Bug(
        "a resumed stream repeats batches of earlier epochs",
        "TrainLoader.begin",
        "at.all_batches",
        "at.batches",
        TRAINER,
    ),
    Bug(
        "a resumed epoch counts its limit from 0",
        "TrainLoader.begin",
        "limit = _plus(limit, -own(at.batches))",
        "pass",
        TRAINER,
    ),
    Bug("set_epoch is never called", "set_epoch", "tell(epoch)", "pass", TRAINER),
    Bug(
        "set_epoch is not called before the run's first epoch",
        "TrainLoader.begin",
        "set_epoch(self._loader, at.epoch)",
        "pass",
        TRAINER,
    ),
    Bug("a stream is read beyond the run's end", "Reader.stop_after", "self._stop = int(batches)", "pass", TRAINER),
    Bug(
        "an epoch that the run's end cuts off counts as complete",
        "micro_steps",
        'not getattr(batches, "was_stopped", False)',
        "True",
        TRAINER,
    ),
    Bug(
        "a loader saved at an epoch's end always counts as exhausted",
        "TrainLoader._put",
        'saved["is_over"]',
        "True",
        TRAINER,
    ),
    Bug(
        "a loader's length limits the number of batches",
        "limit",
        "None if value else 0",
        "size(loader) if value else 0",
        "loader validation",
    ),
    Bug(
        "the validation interval restarts in each epoch",
        "Interval.end_epoch",
        "at.batch_idx >= self.micro_steps",
        "True",
        "validation",
    ),
    Bug(
        "the validation interval never restarts", "Interval.end_epoch", "at.toward_validation = 0", "pass", "validation"
    ),
    Bug(
        "the sanity check's batches are missing from the first validation",
        "ValLoader.__iter__",
        "itertools.chain(kept, _rest(iterator))",
        "iterator",
        TRAINER,
    ),
    Bug(
        "the sanity check runs on all batches",
        "Loop.check_validation",
        "count * setup.strategy.group",
        "None",
        "validation",
    ),
    Bug(
        "each policy writes its own copy of the same state",
        "FolderCheckpoints.save",
        "at.arrays == self._at.arrays",
        "at == self._at",
        TRAINER,
    ),
    Bug(
        "a checkpoint is removed although another policy keeps it",
        "FolderCheckpoints._prune",
        "outdated.difference(self._others, *(policy.names for policy in self.policies))",
        "outdated.difference(self._others)",
        TRAINER,
    ),
    Bug(
        "checkpoints are ordered by a clock that may go backwards",
        "FolderCheckpoints._noted",
        "max(time.time_ns(), self._date + 1)",
        "time.time_ns()",
        TRAINER,
    ),
    Bug(
        "the best checkpoint is taken from the oldest ranking",
        "best",
        "(names for _, notes in found if (names := ranked(notes)) is not None)",
        "(names for _, notes in found[::-1] if (names := ranked(notes)) is not None)",
        TRAINER,
    ),
    Bug(
        "a failed write makes the next checkpoint raise its error",
        "Writer.wait",
        "try:\n    self._checkpointer.wait_until_finished()\nexcept Exception:\n    self.close()\n    raise",
        "try:\n    self._checkpointer.wait_until_finished()\nexcept ZeroDivisionError:\n    raise",
        TRAINER,
    ),
    Bug(
        "policies with different monitors share one list of checkpoints",
        "ModelCheckpoint.state_key",
        '["monitor", "mode", "every_n_micro_steps", "every_n_train_steps", "every_n_epochs"]',
        '["every_n_micro_steps", "every_n_train_steps", "every_n_epochs"]',
        TRAINER,
    ),
    Bug("windows are not recorded", "Loop._close_window", "run.at.recorded = not run.record_is_due", "pass", "loggers"),
    Bug(
        "checkpoints with unreadable notes are skipped without a warning",
        "orbax_io._found",
        "broken.append",
        "str",
        TRAINER,
    ),
    Bug(
        "a run starts afresh although all checkpoints are unreadable",
        "_first_readable",
        "result is None and broken",
        "False",
        TRAINER,
    ),
    Bug(
        "EarlyStopping is not reset by a new fit",
        "EarlyStopping.on_fit_start",
        "not (trainer.is_resuming and self._is_restored)",
        "False",
        TRAINER,
    ),
    Bug("a logger's exception ends the run", "Records._call", "Exception", "ZeroDivisionError", "loggers trainer"),
    Bug(
        "the first window is not recorded",
        "Run.record_is_due",
        "at.global_step == 1 or at.ends_epoch or at.global_step >= options.steps",
        "at.ends_epoch or at.global_step >= options.steps",
        "loggers",
    ),
    Bug("a resumed run repeats records", "_before", "record.get(name, 0) > place[name]", "False", "loggers"),
    Bug("an old metrics file is overwritten", "_set_aside", "path.rename", "print", "loggers"),
    Bug(
        "the first leaf alone determines the number of examples",
        "batches._examples",
        "collections.Counter(lengths).most_common(1)[0]",
        "lengths",
        "batches prefetch trainer",
    ),
    Bug("the worst checkpoints are kept", "ModelCheckpoint.ranked", '1 if self.mode == "min" else -1', "0", TRAINER),
    Bug(
        "the newest checkpoint is not kept",
        "ModelCheckpoint.outdated",
        "{*self.ranked(self._saved), *list(self._saved)[-1:]}",
        "{*self.ranked(self._saved)}",
        TRAINER,
    ),
    Bug(
        "a monitor with an unknown prefix raises no error",
        "Monitor._may_come",
        'kind in ("train", "val") and not any(name.startswith(f"{kind}_") for name in metrics)',
        'not any(name.startswith(f"{kind}_") for name in metrics)',
        TRAINER,
    ),
    Bug("thinning the history ignores the kinds of records", "_every_other", "tuple(record)", "()", "loggers trainer"),
    Bug(
        "a micro-batch of weight 0 is added in place",
        "Gradient._rewritten",
        "jax.lax.cond(jnp.asarray(loss.weight).astype(bool), backward, none, pending)",
        "backward(pending)",
        "in_place_sums wide_products",
    ),
    Bug(
        "sums added in place include the previous window",
        "on_each",
        "sums = weighted_sum.select(starts, jax.tree.map(jnp.zeros_like, sums), sums)",
        "pass",
        "in_place_sums wide_products",
    ),
    Bug(
        "a program with a callback is reused for another callback",
        "_can_be_told",
        '"callback" not in eqn.primitive.name and not is_large',
        "not is_large",
        "eager",
    ),
    Bug(
        "a program is reused for a different one of the same types",
        "_compiled",
        "hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))",
        "types, tuple(_places(closed.jaxpr))",
        "eager",
    ),
    Bug(
        "a program is reused on other devices",
        "_compiled",
        "hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))",
        "hashlib.sha256(text.encode()).digest(), types",
        "eager",
    ),
    Bug(
        "a program is reused for other types of random keys",
        "_compiled",
        "hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))",
        "hashlib.sha256(text.encode()).digest(), tuple(_places(closed.jaxpr))",
        "eager",
    ),
    Bug(
        "rebuilt equations lose their named scopes",
        "located",
        "source_info_util.current_name_stack() + eqn.source_info.name_stack",
        "source_info_util.current_name_stack()",
        "jaxprs",
    ),
    Bug(
        "a stack that does not fit its sum is added in place",
        "walked",
        "(stack for stack in _stacks(jaxpr) if stack <= fits)",
        "(stack for stack in _stacks(jaxpr))",
        "in_place_sums wide_products",
    ),
    Bug(
        "a stack that is used twice is added in place",
        "_stacks",
        "atom in inputs and uses[atom] == 1",
        "atom in inputs",
        "in_place_sums wide_products",
    ),
    Bug(
        "a layer's slice of its sum loses an axis",
        "sliced",
        "is_chosen and (not layout.is_explicitly_sharded(jax.typeof(x)))",
        "False",
        "in_place_sums",
    ),
    Bug(
        "a cast of a computed value stands for the parameter",
        "_copying",
        "not is_cast or eqn.invars[0] not in inputs",
        "False",
        "in_place_sums",
    ),
    Bug(
        "a cast of a cast stands for the parameter",
        "_copying",
        "not is_cast or eqn.invars[0] not in inputs",
        "not is_cast",
        "in_place_sums",
    ),
    Bug(
        "calls of one jitted function share a program whatever is hoisted",
        "_call_after",
        '("after", id(plan))',
        '"after"',
        "hoisting in_place_sums",
    ),
    Bug(
        "what stands for a parameter keeps its own derivative",
        "_jvp",
        "tangents[0].astype(x.dtype)",
        "tangents[1]",
        "in_place_sums hoisting",
    ),
    Bug(
        "half-precision copies are made where no gradient is added in place",
        "Window._prepared",
        "traced.has_weight and substitution.of(traced, micro_batches, self.k, carry).weights is None",
        "False",
        "in_place_sums",
    ),
    Bug("a scan's constant operands are hoisted", "_walked", "is_known and i >= whole", "is_known", "hoisting"),
    Bug(
        "results larger than their inputs are hoisted",
        "_gains",
        "not widens and not moves and matrices and size(var) <= sum(map(size, origins))",
        "not widens and not moves and matrices",
        "hoisting",
    ),
    Bug(
        "a K assigned to HostDriven is not written into the state",
        "HostDriven._read",
        "state = set_every_k(state, assigned.every_k)",
        "pass",
        "host_driven",
    ),
    Bug(
        "the host assumes that an unknown state has an empty window",
        "HostDriven._read",
        "_on_host(state.mini_step)",
        "0",
        "host_driven",
    ),
    Bug(
        "the host assumes its own K for an unknown state",
        "HostDriven._read",
        "_on_host(state.every_k)",
        "self._every_k",
        "host_driven",
    ),
    Bug(
        "an assigned K reaches only the first unknown state",
        "HostDriven._read",
        "self._built if is_as_built else assigned",
        "assigned",
        "host_driven",
    ),
    Bug(
        "an assigned K replaces the K of a restored state",
        "HostDriven._read",
        "position is None and every_k == self._built.every_k",
        "position is None",
        "host_driven",
    ),
    Bug(
        "an assigned K replaces a K from set_every_k",
        "HostDriven._read",
        "position is None and every_k == self._built.every_k",
        "every_k == self._built.every_k",
        "host_driven",
    ),
    Bug(
        "a K assigned during a call is lost",
        "HostDriven._remember",
        "k.written",
        "self._assigned",
        "host_driven",
    ),
    Bug(
        "an assigned K reaches only the next state",
        "HostDriven._read",
        "k is None or k.written is not assigned",
        "self._last_written is not assigned",
        "host_driven",
    ),
    Bug(
        "the host reads every state's counter from the device",
        "HostDriven._read",
        "position or _Position(_on_host(state.mini_step), ())",
        "_Position(_on_host(state.mini_step), ())",
        "host_driven",
    ),
    Bug(
        "the host keeps facts about deleted states",
        "_Facts.add",
        "functools.partial(self._facts.pop, key)",
        "None",
        "host_driven",
    ),
    Bug(
        "a nonlinear backward rule is hoisted",
        "_may_run_once",
        "is_pure and not jaxprs.axes(eqn) and linearity.unproved_in(eqn) is None",
        "is_pure and not jaxprs.axes(eqn)",
        "hoisting",
    ),
    Bug(
        "a nonlinear backward rule inside a loop is not found",
        "unproved_in",
        "jaxprs.bodies(eqn)",
        "()",
        "hoisting once_per_window",
    ),
    Bug(
        "a backward rule with a constant offset counts as linear",
        "linearity",
        "_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 1, 2, 3",
        "_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 0, 2, 3",
        "hoisting once_per_window",
    ),
    Bug(
        "HostDriven adds to the sums that another driver left",
        "HostDriven._run",
        "state = with_cleared_sums(state, self._clear)",
        "pass",
        "host_driven",
    ),
    Bug(
        "HostDriven takes replaced sums for cleared ones",
        "_Position.holds_cleared",
        "ref() is x",
        "True",
        "host_driven",
    ),
    Bug(
        "HostDriven clears the sums before a call that fails to compile",
        "HostDriven._run",
        "program.lower(*given, state, *args, **kwargs).compile()",
        "pass",
        "host_driven",
    ),
    Bug(
        "HostDriven takes a program for compiled whatever the types",
        "HostDriven._run",
        "(program, signature) not in self._compiled",
        "program not in dict(self._compiled)",
        "host_driven",
    ),
    Bug(
        "HostDriven takes a program for compiled whatever the shardings",
        "_signature",
        "(x.aval, x.sharding, x.committed)",
        "x.aval",
        "host_driven",
    ),
    Bug(
        "HostDriven.flush does not clear the sums",
        "HostDriven.__init__",
        "with_cleared_sums(state)",
        "state",
        "host_driven",
    ),
    Bug(
        "a weight's gradient has permuted dimensions",
        "_weight_gradient",
        "(dimension for _, dimension in pairs)",
        "contracted[side]",
        "wide_products",
    ),
    Bug(
        "a gradient that a selection follows is computed in float32",
        "micro_gradient.of",
        "not drops and not replaces and wide_products.occur(jaxpr)",
        "True and wide_products.occur(jaxpr)",
        "in_place_sums wide_products",
    ),
    Bug(
        "the half-precision cast of a parameter is dropped",
        "wide_products._results",
        "_Value(results[0], wide[0])",
        "_Value(*wide * 2)",
        "wide_products",
    ),
    Bug(
        "second derivatives lack the weight's contribution",
        "_product",
        "product(operands[1 - side].array, *operands[side])",
        "product(operands[1 - side].array, jax.lax.stop_gradient(operands[side].array), operands[side].wide)",
        "wide_products",
    ),
    Bug(
        "packed sums are unpacked in reverse order",
        "Packing.unpack",
        "zip(numbers, stack, strict=True)",
        "zip(numbers[::-1], stack, strict=True)",
        "sum_packing overwrites",
    ),
    Bug(
        "overwritten statistics are packed with the sums",
        "sum_packing.of",
        "x is None or next(stays) or x.ndim > 1 or x.size > _SMALL or overwrites.holds(path)",
        "x is None or next(stays) or x.ndim > 1 or x.size > _SMALL",
        "sum_packing overwrites",
    ),
    Bug("sums of different dtypes are packed together", "sum_packing.of", "x.dtype", "0", "sum_packing overwrites"),
    Bug(
        "prepared parameters are not updated by the optimizer step",
        "_optimizer_step",
        "_, prepared = once_per_window.compute(config.prepare, new_params)",
        "prepared = state.prepared",
        "prepared_steps",
    ),
    Bug(
        "a misspelt argument is accepted as an extra arg",
        "misspelling.check",
        "near is not None",
        "False",
        "errors flax",
    ),
    Bug("an extra arg that a chained optimizer reads is refused", "_held", "return value", "return ()", "errors flax"),
    Bug(
        "an extra arg that an inject_hyperparams optimizer reads is refused",
        "_captured",
        'held["inner"] = factory(**others, **dict.fromkeys(numbers, jnp.ones(())))',
        "factory(**others, **dict.fromkeys(numbers, jnp.ones(())))",
        "errors flax",
    ),
    Bug(
        "hyperparameters of an inject_hyperparams factory are accepted as extra args",
        "_captured",
        'held.pop("inner_factory")',
        'held["inner_factory"]',
        "errors flax",
    ),
    Bug(
        "an extra arg named 'eight' or 'weighted' is refused",
        "_nearest",
        "name.lower() in _OWN_WORDS or name[-1:].isdigit()",
        "name[-1:].isdigit()",
        "errors flax",
    ),
    Bug(
        "a MultiSteps inside a MultiSteps is accepted",
        "inner_state",
        "any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating)))",
        "False and any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating)))",
        "compose errors",
    ),
    Bug("stochastic rounding is biased", "_stochastic", "jnp.uint32(0xFFFF)", "jnp.uint32(0x7FFF)", CORE),
    Bug(
        "a hook's exception leaves dispatched micro-steps uncounted",
        "Loop._run_on_devices",
        "while run.uncounted:\n    self._count(of_window)",
        "while False:\n    self._count(of_window)",
        "fuse_windows",
    ),
    Bug(
        "micro-batches beyond a traced K are repeated",
        "substitution.of",
        "weights.astype(bool) & (numbers < jnp.minimum(k, length))",
        "weights.astype(bool)",
        "substitution",
    ),
    Bug(
        "a repeated micro-batch sees the carry as it stands",
        "Substitution.step",
        "weighted_sum.select(kept, carry, self.start)",
        "carry",
        "substitution",
    ),
    Bug(
        "a window in which nothing counts keeps its sums",
        "Substitution.sums",
        "jnp.any(self.kept)",
        "jnp.asarray(True)",
        "substitution",
    ),
    Bug(
        "a weight from parameters or keys counts as one from the data",
        "substitution.data_weight",
        "needs_more or not _is_cheap(closed.jaxpr)",
        "not _is_cheap(closed.jaxpr)",
        "substitution",
    ),
    Bug(
        "a weight from a matrix product is computed twice",
        "substitution.data_weight",
        "needs_more or not _is_cheap(closed.jaxpr)",
        "needs_more",
        "substitution",
    ),
    Bug(
        "a micro-batch is repeated under a custom_vjp that is not linear",
        "substitution._may_repeat",
        "not is_solver and linearity.unproved(jaxpr) is None",
        "not is_solver",
        "substitution",
    ),
    Bug(
        "a loss that communicates is repeated",
        "substitution._may_repeat",
        "linearity.communicates(jaxpr) or jax.tree.leaves(overwrites.only(loss.args[0]))",
        "jax.tree.leaves(overwrites.only(loss.args[0]))",
        "substitution",
    ),
    Bug(
        "a repeated micro-batch adds its total",
        "traced_loss.counted",
        "weighted_sum.only_if(kept, (total, loss.weight))",
        "(total, weighted_sum.only_if(kept, loss.weight))",
        "substitution",
    ),
    Bug(
        "a repeated micro-batch adds its weight",
        "traced_loss.counted",
        "weighted_sum.only_if(kept, (total, loss.weight))",
        "(weighted_sum.only_if(kept, total), loss.weight)",
        "substitution",
    ),
    Bug(
        "a micro-batch of weight 0 returns the aux of another",
        "Window._sum",
        "jax.lax.cond(kept, lambda: aux, own)",
        "aux",
        "substitution",
    ),
    Bug(
        "a repeated micro-batch has another key",
        "Window._sum",
        "(device.local(step.number), micro_batches.take(step.number), step.carry)",
        "(device.local(i), micro_batches.take(step.number), step.carry)",
        "substitution",
    ),
    Bug(
        "a micro-batch of weight 0 runs on its own rows",
        "Window._sum",
        "(device.local(step.number), micro_batches.take(step.number), step.carry)",
        "(device.local(step.number), micro_batches.take(i), step.carry)",
        "substitution",
    ),
    Bug(
        "gradients of a window with weights from the data are selected",
        "Window._sum",
        "keep if kept is None or self.observed.transform is not None else None",
        "keep",
        "substitution",
    ),
    Bug(
        "a window with weights from the data adds nothing in place",
        "Window.sums",
        "None if substituted.weights is None else False",
        "None",
        "substitution",
    ),
    Bug(
        "in-place addition takes a conditional though the weight is known",
        "Gradient._rewritten",
        "kept is not None or not self.loss.has_weight",
        "not self.loss.has_weight",
        "substitution",
    ),
    Bug(
        "attention in a cuDNN kernel counts as not linear",
        "linearity._of_operation",
        "name in _ATTENTION",
        "name in ()",
        "substitution",
    ),
    Bug("a device without a share counts", "Strategy.sent", "place.present == self.size", "True", "programs"),
    Bug(
        "a fused window counts if one of its micro-batches does",
        "Programs.run",
        "all(map(counts, pieces))",
        "any(map(counts, pieces))",
        "programs",
    ),
    Bug(
        "the host takes each batch to count",
        "Programs.run",
        "piece.is_full and self._weight.is_positive(held, piece.host)",
        "piece.is_full",
        "programs",
    ),
    Bug("a share that is known to count is selected", "Programs._micro_step", "counts", "False", "programs"),
    Bug("the host: a plain loss of no examples counts", "objective.returned", "_examples(batch)", "1", "programs"),
    Bug(
        "a coupled loss counts once a device",
        "MappedAxis.once",
        "jnp.where(is_first, x, jnp.zeros_like(x))",
        "x",
        "coupled",
    ),
    Bug(
        "all devices apply the cotangents of the first one's rows",
        "MappedAxis.part",
        "self.index() * rows",
        "0",
        "coupled",
    ),
    Bug(
        "the two passes of a coupled window draw different masks",
        "Encoder.rows",
        "device.local(i)",
        "device.local(i + 1)",
        "coupled",
    ),
    Bug(
        "a coupled loss sees its examples in the order of the micro-batches",
        "Encoder.rows",
        "x.swapaxes(0, 1).reshape(-1, *x.shape[2:])",
        "x.reshape(-1, *x.shape[2:])",
        "coupled",
    ),
    Bug(
        "the gradient of a coupled loss by what prepare returns is lost",
        "Coupled.run",
        "prepared.transpose(weighted_sum.add(grads, direct), window.k)",
        "prepared.transpose(grads, window.k)",
        "coupled",
    ),
    Bug(
        "a coupled loss sees parameters that are not prepared",
        "Coupled.run",
        "prepared.params if callable(prepare) else params",
        "params",
        "coupled",
    ),
    Bug(
        "cast does not look at a coupled loss",
        "Coupled._seeing",
        "(call(params, *first), self._returned(params, rows))",
        "call(params, *first)",
        "coupled",
    ),
    Bug(
        "a coupled loss gathers representations a second time",
        "Coupled._gradient",
        "jaxprs.names_axis(traced.closed.jaxpr, device.names)",
        "False",
        "coupled",
    ),
    Bug(
        "a micro-batch that is left out changes the carry",
        "loss_step.micro_step",
        "carry.leaves and counted is not True",
        "False",
        "model_state",
    ),
    Bug(
        "a micro-batch that is dropped changes the carry",
        "accumulation.add",
        "conditions.both(accepted, True if keep is None else keep)",
        "accepted if micro_batch.weight is None else conditions.both(accepted, True if keep is None else keep)",
        "model_state",
    ),
    Bug(
        "the carry's key is the same on all devices",
        "Carry.local",
        "prng.fold_beyond_first(device.local(self.leaves), device.index())",
        "device.local(self.leaves)",
        "model_state",
    ),
    Bug(
        "a key by keyword is the same on all devices",
        "loss_step.micro_step",
        "kwargs = fold(kwargs)",
        "pass",
        "model_state",
    ),
    Bug(
        "the carry is split over the mesh in place of the batch",
        "Roles.of",
        "next(i for i in itertools.count() if i not in owners)",
        "1",
        "model_state",
    ),
    Bug(
        "a micro-batch's norm is that of w·g",
        "norms.of_micro_batch",
        "square / jnp.where(weight == 0, 1, weight) ** 2",
        "square",
        "gradient_norms",
    ),
    Bug("norms count what is left out", "norms.of_micro_batch", "counted is not True", "False", "gradient_norms"),
    Bug(
        "the norms of a window are added to the next one's",
        "norms.reopened",
        "weighted_sum.select(closes, jnp.zeros_like(new.pending), new.pending)",
        "new.pending",
        "gradient_norms",
    ),
    Bug(
        "the norm of gathered parameters is that of one device's part",
        "MappedAxis.norm",
        "jax.lax.psum(norms.total(part), names) if names else norms.total(part)",
        "norms.total(part)",
        "gradient_norms",
    ),
    Bug(
        "a function of micro-batches' gradients sees w·g",
        "observed._transformed",
        "traced_loss.mean_gradient(Weighted(None, weight), grads)",
        "grads",
        "gradient_norms",
    ),
    Bug(
        "a micro-batch of weight 0 is transformed and added",
        "Window._sum",
        "keep if kept is None or self.observed.transform is not None else None",
        "keep if kept is None else None",
        "gradient_norms",
    ),
    Bug(
        "layers in reverse run from the first to the last once their casts are hoisted",
        "rescanned",
        '("length", "reverse", "unroll")',
        '("length", "unroll")',
        "hoisting",
    ),
    Bug(
        "parameters gathered over two axes are known by the last of them",
        "_ways",
        "tuple(sorted({*done, *axes}))",
        "tuple(sorted(axes))",
        "mapped",
    ),
    Bug(
        "averages go on after a flush",
        "closing.flush",
        "config.sync.own(jax.tree.map(jnp.zeros_like, state.averages))",
        "state.averages",
        "compose",
    ),
    Bug(
        "a NaN value with a finite gradient is not dropped",
        "accumulation.add",
        "_kept(config, state, micro_batch, (grads, averaged))",
        "_kept(config, state, micro_batch, grads)",
        "multi_steps",
    ),
    Bug(
        "all micro-steps of a window round alike",
        "accumulation.add",
        "(state.gradient_step, state.mini_step, config.sync.index())",
        "(state.gradient_step, config.sync.index())",
        "rounding",
    ),
    Bug(
        "all windows of a stream round alike",
        "accumulation.add",
        "(state.gradient_step, state.mini_step, config.sync.index())",
        "(state.mini_step, config.sync.index())",
        "rounding",
    ),
    Bug(
        "all devices of a mapped axis round alike",
        "accumulation.add",
        "(state.gradient_step, state.mini_step, config.sync.index())",
        "(state.gradient_step, state.mini_step)",
        "rounding",
    ),
    Bug(
        "all micro-batches of a call round alike",
        "Window._sum",
        "(device.index(), i, bits)",
        "(device.index(), bits)",
        "rounding",
    ),
    Bug("all devices of a call round alike", "Window._sum", "(device.index(), i, bits)", "(i, bits)", "rounding"),
    Bug("all calls round alike", "Window._sum", "(device.index(), i, bits)", "(device.index(), i)", "rounding"),
    Bug("all leaves round alike", "add", "(number, *counters)", "counters", "rounding"),
    Bug(
        "stochastic rounding has no derivative",
        "weighted_sum",
        "tangents[0].astype(jnp.bfloat16)",
        "jnp.zeros_like(tangents[0], jnp.bfloat16)",
        "rounding",
    ),
    Bug(
        "devices are numbered along the last of several data axes",
        "MappedAxis.index",
        "jax.lax.axis_index(self.names)",
        "jax.lax.axis_index(self.names[-1])",
        "mapped",
    ),
    Bug(
        "the rest of a batch draws from the first share's key",
        "_key",
        "precede + device",
        "device",
        "trainer",
    ),
    Bug(
        "a traced K beyond the stack repeats the last micro-batch",
        "_loop",
        "jnp.minimum(k, length)",
        "k",
        "value_and_grad",
    ),
    Bug(
        "a weight's gradient passes through integers",
        "wide_products._results",
        'eqn.primitive.name == "convert_element_type" and _is_half(results[0].dtype)',
        'eqn.primitive.name == "convert_element_type"',
        "wide_products",
    ),
    Bug(
        "the optimizer's state stays in low precision for a step in float32",
        "InnerOptimizer.update",
        "_lift(self.state, wide)",
        "self.state",
        "multi_steps",
    ),
    Bug(
        "a callback on parameters is hoisted",
        "_may_run_once",
        'not eqn.effects and eqn.primitive.name != "rng_uniform"',
        'eqn.primitive.name != "rng_uniform"',
        "hoisting",
    ),
    Bug(
        "a callback without a result is dropped",
        "_made_plan",
        "not wanted and not eqn.effects",
        "not wanted",
        "hoisting",
    ),
    Bug(
        "a rewritten product is not rematerialised",
        "wide_products._results",
        "jaxprs.checkpointed(eqn, body)(operands)",
        "body(operands)",
        "hoisting",
    ),
    Bug(
        "what remains of a hoisted layer is not rematerialised",
        "_call_after",
        "jaxprs.checkpointed(eqn, body)(operands, made)",
        "body(operands, made)",
        "hoisting",
    ),
    Bug(
        "a rebuilt checkpoint loses its policy",
        "checkpointed",
        'jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])',
        "jax.checkpoint(body)",
        "jaxprs hoisting",
    ),
    Bug(
        "optimizer state of another shape is laid out like its parameter",
        "_like_params",
        "owner is not None and jnp.shape(owner) == jnp.shape(x)",
        "owner is not None",
        "mesh",
    ),
    Bug(
        "the loss of an empty window is 0",
        "Programs._window_logs",
        "jnp.where(sums.weight == 0, jnp.nan, weighted_sum.mean(sums, sums.total))",
        "weighted_sum.mean(sums, sums.total)",
        "programs",
    ),
    Bug(
        "the loss of an empty micro-step is 0",
        "step_outputs.mean",
        'total / weight if weight else float("nan")',
        "total / (weight or 1)",
        "programs",
    ),
    Bug(
        "the loss of an empty validation is 0",
        "evaluation._mean",
        'total / weight if weight else float("nan")',
        "total / (weight or 1)",
        "programs",
    ),
    Bug(
        "a flushed window ignores division by K",
        "Loop._flush_if_asked",
        "self._share(run.at.window_step)",
        "None",
        "trainer",
    ),
    Bug(
        "what was logged before a checkpoint is not in the next record",
        "run_checkpoint.restore",
        'noted["metrics"], noted["logged"]',
        'noted["metrics"], {}',
        "loggers",
    ),
    Bug(
        "a resumed run forgets the logged values",
        "run_checkpoint.restore",
        'noted["metrics"], noted["logged"]',
        '{}, noted["logged"]',
        "loggers",
    ),
    Bug(
        "a resumed run forgets its last window's loss",
        "run_checkpoint.restore",
        '{name: on_device(mean) for name, mean in noted["means"].items()}',
        "{}",
        "loggers",
    ),
    Bug(
        "a record waits beyond a checkpoint", "RunCheckpoints._notes", "run.metrics.records.write()", "pass", "loggers"
    ),
    Bug(
        "a value that was logged once is in all later records",
        "Metrics.record",
        "logged, self.logged = self.logged, {}",
        "logged = self.logged",
        "loggers",
    ),
    Bug(
        "the third checkpoint of a name overwrites the second",
        "FolderCheckpoints._free",
        'while path.exists():\n    version += 1\n    path = self.folder / f"{name}-v{version}"',
        'if path.exists():\n    path = self.folder / f"{name}-v1"',
        "checkpoint",
    ),
    Bug(
        "a scan's constants count as carries",
        "scan_operands",
        "whole(scan.invars, body.invars) - carries",
        "whole(scan.invars, body.invars)",
        "jaxprs",
    ),
    Bug(
        "bodies in a tuple are passed over",
        "parts",
        "param if isinstance(param, (tuple, list)) else (param,)",
        "(param,)",
        "jaxprs",
    ),
    Bug(
        "only an equation's first result depends on its operands", "reached", "eqn.outvars", "eqn.outvars[:1]", "jaxprs"
    ),
    Bug(
        "collectives in a body are not found",
        "axes",
        "found.union(*(axes(inner) for body in bodies(eqn) for inner in body.eqns))",
        "found",
        "jaxprs",
    ),
    Bug(
        "a jit with explicit shardings is rebuilt without them",
        "is_plain_jit",
        "not any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)",
        "True",
        "jaxprs",
    ),
    Bug(
        "an optimizer state from elsewhere is not laid out without a step",
        "closing.close",
        "sync.spread(state.inner_opt_state)",
        "state.inner_opt_state",
        "zero",
    ),
    Bug(
        "from_optax takes a mean for a sum",
        "_converted",
        "weight if config.use_grad_mean else None",
        "None",
        "from_optax",
    ),
    Bug(
        "from_optax takes a sum for a mean",
        "_converted",
        "weight if config.use_grad_mean else None",
        "weight",
        "from_optax",
    ),
    Bug("from_optax keeps the NaN of a window that ended", "_converted", "mini_step > 0", "True", "from_optax"),
    Bug(
        "from_optax says that a new state was updated",
        "_converted",
        "(mini_step == 0) & (gradient_step > 0)",
        "mini_step == 0",
        "from_optax",
    ),
    Bug(
        "XLA chooses the layout of parameters that lie on no mesh",
        "MeshAxis.unchanged",
        "jax.tree.map(lambda x: layout.onto(x, self.mesh), params) if layout.is_explicit(self.mesh) else params",
        "params",
        "zero",
    ),
    Bug(
        "integer arrays of a module are trained",
        "modules.parted",
        "map(_is_inexact, leaves)",
        "map(_is_array, leaves)",
        "equinox",
    ),
    Bug(
        "a module's flag of 1 runs the program of True",
        "_Wrapped.of",
        "(type(x), None if _is_array(x) else x)",
        "(None, None if _is_array(x) else x)",
        "equinox",
    ),
    Bug(
        "HostDriven returns the trained leaves of a module alone",
        "HostDriven.__call__",
        "modules.combined(params, rest)",
        "params",
        "equinox",
    ),
    Bug(
        "the optimizer's state is made of the whole module",
        "initial_state.init",
        "params = modules.trained(params)",
        "params = params",
        "equinox",
    ),
    Bug(
        "a module that the loss returns stays unwrapped",
        "modules.whole",
        "return _wrapped(fun(params, *args, **kwargs))",
        "return fun(params, *args, **kwargs)",
        "equinox",
    ),
    Bug(
        "flush hands the optimizer a whole module",
        "MultiSteps.flush",
        "modules.trained(params)",
        "params",
        "equinox",
    ),
    Bug(
        "a cast is chosen by a loss of the trained leaves alone",
        "Cast.seeing",
        "modules.combined(params, rest)",
        "params",
        "equinox",
    ),
    Bug(
        "a plan has a trial less than it counts on",
        "search.largest",
        "range(TRIALS - 2, -1, -1)",
        "range(TRIALS - 2, 0, -1)",
        "planner",
    ),
    Bug(
        "a plan follows predictions until its trials run out",
        "search.largest",
        "high - low <= 2 * reach",
        "False",
        "planner",
    ),
    Bug(
        "a plan counts donated results twice",
        "Step.memory",
        "sizes.output_size_in_bytes - sizes.alias_size_in_bytes",
        "sizes.output_size_in_bytes",
        "planner",
    ),
    Bug(
        "a plan counts the shards of sums that are whole",
        "Step._whole_params",
        "name and name not in data_axes",
        "name",
        "planner",
    ),
    Bug(
        "a planned optimizer state is replicated where parameters are in shards",
        "step._like_params",
        "like.sharding if like is not None and like.shape == x.shape else default",
        "default",
        "planner",
    ),
    Bug(
        "a compiler that runs out of memory ends the plan",
        "if_there_is_memory",
        "return None",
        "raise",
        "planner",
    ),
    Bug(
        "a plan chooses the slowest size",
        "_Planner.fastest",
        "min(times, key=times.__getitem__, default=largest)",
        "max(times, key=times.__getitem__, default=largest)",
        "planner",
    ),
    Bug(
        "an alternative is compiled without its option",
        "_Planner.alternatives",
        "step._replace(options=step.options | options)",
        "step",
        "planner",
    ),
    Bug(
        "a target counts the batch of one device alone",
        "Trainer._start",
        "examples * self._strategy.group",
        "examples",
        "target_batch_size",
    ),
    Bug(
        "noise: the size of a small batch is that of all of them",
        "GradientNorms.two_sizes",
        "divided(parts.weight, self.count)",
        "parts.weight",
        "noise_scale",
    ),
    Bug(
        "noise: every window weighs as much as the first",
        "NoiseScale.update",
        "self.decay * state.weight + 1",
        "state.weight + 1",
        "noise_scale",
    ),
    Bug("noise: NaN stays for ever", "NoiseScale.update", "jnp.where(is_told, new, old)", "new", "noise_scale"),
    Bug(
        "noise: the interval of a window is that of the mean",
        "NoiseScale.estimate",
        "state.scatter * state.weight_squared / (weight * rest)",
        "state.scatter * state.weight / rest",
        "noise_scale",
    ),
    Bug(
        "noise: a later micro-step overwrites the first norm",
        "norms.started",
        "conditions.branch(starts, lambda: norms.of_part(sums, config.sync.shape), lambda: old.pending)",
        "norms.of_part(sums, config.sync.shape)",
        "two_sizes",
    ),
    Bug(
        "noise: the host measures every micro-step",
        "HostDriven._programs_for",
        "starts and self._starting",
        "self._starting",
        "two_sizes",
    ),
    Bug(
        "noise: half a window is the whole one",
        "Window._loop",
        "jnp.stack([parts[0], parts[-1]])",
        "jnp.stack([parts[-1], parts[-1]])",
        "two_sizes",
    ),
    Bug("noise: K = 1 on one device", "check_two_sizes", "every_k * devices == 1", "False", "two_sizes"),
    Bug("noise: sums that are reduced", "refuse_reduced", "any(jax.tree.leaves(reduced))", "False", "two_sizes"),
    Bug(
        "noise: the norm of the mean in the sum mode",
        "norms.at_step",
        "joined.weight if config.use_grad_mean else sync.size()",
        "joined.weight",
        "two_sizes",
    ),
    Bug(
        "K follows a noise scale that falls, without hysteresis",
        "AdaptiveAccumulation.next_k",
        "wanted < present / (1 + self.hysteresis)",
        "wanted < present",
        "adaptive",
    ),
    Bug(
        "a stop does not wait for the minimum of steps",
        "Options.may_stop",
        "at.global_step >= (self.min_steps or 0)",
        "True",
        "run_length",
    ),
    Bug(
        "a stop that waits is forgotten on a resume",
        "run_checkpoint.restore",
        'run.setup.processes.own.stop = noted.get("stop", False)',
        "pass",
        "run_length",
    ),
    Bug(
        "a resume has all of max_time again",
        "TimeLimit.on_fit_start",
        "self._earlier if trainer.is_resuming else 0.0",
        "0.0",
        "run_length",
    ),
    Bug(
        "a fast run counts loader batches",
        "Trainer._limit",
        "self._options.fast_dev_run * self._strategy.group",
        "self._options.fast_dev_run",
        "run_length",
    ),
    Bug(
        "a threshold is forgotten on a resume",
        "EarlyStopping.on_train_start",
        "self._is_over(self.best)",
        "self.wait >= self.patience",
        "callbacks",
    ),
    Bug(
        "results of one validation loader take another's place",
        "Evaluation.run",
        'f"/{name}" if name else ""',
        '""',
        "validation evaluation",
    ),
    Bug(
        "predictions of what fills up a micro-step are returned",
        "Prediction._fetched",
        "first % strategy.size <= device < first % strategy.size + present",
        "True",
        "evaluation",
    ),
    Bug(
        "an optimizer is reused for another number of steps",
        "Programs.fits",
        "(self.seed, self._total_steps) == (seed, total_steps)",
        "self.seed == seed",
        "total_steps",
    ),
    Bug(
        "the norm of a window of weight 0 is 0",
        "Programs._with_step",
        "jnp.full_like(x, jnp.nan)",
        "x",
        "window_end",
    ),
    Bug(
        "clipping by value is by norm",
        "of_window",
        'optax.clip if algorithm == "value" else optax.clip_by_global_norm',
        "optax.clip_by_global_norm",
        "window_end",
    ),
    Bug(
        "the hook before an optimizer step misses a flush",
        "Loop._flush_if_asked",
        'self._hooks.call("on_before_optimizer_step")',
        "",
        "window_end",
    ),
    Bug(
        "the sums of an epoch go on in the next one",
        "Loop._end_epoch",
        "run.metrics.epoch.begin({})",
        "",
        "window_end",
    ),
    Bug(
        "a resumed epoch's means lack its first windows",
        "run_checkpoint.restore",
        'noted.get("epoch_sums", {})',
        "{}",
        "window_end",
    ),
    Bug(
        "an optimizer step meets parameters over explicit data axes in their own layout",
        "MeshAxis.aligned",
        "self.spread(params)",
        "params",
        "zero",
    ),
    Bug(
        "parameters over explicit data axes come back gathered",
        "MeshAxis.whole",
        "self._as(tree, params)",
        "jax.tree.map(lambda x: layout.lay(x, self.mesh, self.names, None), tree)",
        "zero",
    ),
    Bug(
        "K by tokens follows from the window that may still run",
        "WindowLengths.every_k",
        "len(self._undecided) > 1",
        "self._undecided",
        "window_lengths",
    ),
    Bug(
        "a resumed run counts tokens from zero",
        "run_checkpoint.restore",
        "'lengths' in noted",
        "False",
        "window_lengths",
    ),
    Bug(
        "K by tokens is decided in mid-window",
        "Loop._in_windows",
        "not at.window_step",
        "True",
        "window_lengths",
    ),
    Bug(
        "dropped micro-batches count as tokens",
        "Programs._add",
        "jnp.logical_and(weight != 0, sums.dropped == pending.sums.dropped)",
        "weight != 0",
        "window_lengths",
    ),
    Bug(
        "a signal with a handler of the user's is taken",
        "Signals.__enter__",
        "handler in defaults",
        "handler is not None",
        "signals",
    ),
    Bug(
        "each process saves by its own clock",
        "Processes.seconds",
        "self.count == 1",
        "True",
        "processes",
    ),
    Bug(
        "a time that has passed does not begin again",
        "RunCheckpoints._overdue",
        "self._began |= dict.fromkeys(overdue, now)",
        "pass",
        "checkpoint",
    ),
    Bug(
        "an average lacks the step that a hook cut off",
        "EMA.on_fit_start",
        "self._follow(trainer)",
        "self._step = trainer.global_step",
        "ema",
    ),
    Bug("an average follows micro-steps", "EMA._follow", "trainer.global_step != self._step", "True", "ema"),
    Bug(
        "validations use the parameters in place of their average",
        "Run.evaluated_params",
        "self.average is None",
        "True",
        "ema",
    ),
    Bug(
        "a resume starts the average anew",
        "run_checkpoint.restore",
        "if average:\n"
        "    run.average.average = _placed_average(average, run.average.average, strategy, checkpoint.path)",
        "pass",
        "ema",
    ),
    Bug(
        "a warm start drops the optimizer state",
        "WarmStart.opt_state",
        "not self._has_state",
        "True",
        "warm_start",
    ),
    Bug(
        "a run resumes from weights alone",
        "saving.find",
        "not (to_resume and notes.get('weights_only'))",
        "True",
        "checkpoint",
    ),
    Bug(
        "a resumed run takes its size from the first batch that it reads",
        "run_checkpoint.examples",
        "noted is None",
        "True",
        "target_batch_size",
    ),
    Bug(
        "a mean of the first epoch is missed before its end",
        "Monitor._may_come",
        "self.name.endswith('_epoch')",
        "False",
        "callbacks",
    ),
    Bug(
        "the best weights are taken for the best run",
        "saving.find",
        "to_resume and policy.save_weights_only",
        "False",
        "checkpoint",
    ),
    Bug(
        "a validation after fit forgets its limit",
        "Trainer._val_limit",
        "self._options.overfit_batches or self._options.limit_val_batches",
        "self._options.limit_val_batches",
        "evaluation",
    ),
]


def _named(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The classes, methods and functions of a module, by qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _named(node, f"{prefix}{node.name}.")


class _Scope(NamedTuple):
    path: pathlib.Path
    module: ast.Module
    names: tuple[str, ...]
    tree: ast.AST


@functools.cache
def _scopes() -> list[_Scope]:
    """What `Bug.where` can name."""
    scopes = []
    for path in sorted((ROOT / "jaxaccum").rglob("*.py")):
        module = ast.parse(path.read_text())
        stem = path.parent.name if path.stem == "__init__" else path.stem
        scopes.append(_Scope(path, module, (stem,), module))
        scopes += [_Scope(path, module, (name, f"{stem}.{name}"), tree) for name, tree in _named(module)]
    return scopes


def _parsed(*codes: str) -> list[list[ast.AST]]:
    """Each code as statements; as an expression, if all of them are expressions."""
    bodies = [ast.parse(code).body for code in codes]
    are_expressions = all(len(body) == 1 and isinstance(body[0], ast.Expr) for body in bodies)
    return [[body[0].value] for body in bodies] if are_expressions else bodies


def _are_equal(nodes: list[ast.AST], others: list[ast.AST]) -> bool:
    code = lambda nodes: list(map(ast.unparse, nodes))
    return list(map(type, nodes)) == list(map(type, others)) and code(nodes) == code(others)


def _places(tree: ast.AST, old: list[ast.AST]) -> Iterator[tuple[ast.AST, str, slice | None]]:
    """Where `old` occurs: a node, its field, and the part of that if it is a list."""
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                parts = [slice(i, i + len(old)) for i in range(len(value) - len(old) + 1)]
                yield from ((node, field, part) for part in parts if _are_equal(value[part], old))
            elif isinstance(value, ast.expr) and _are_equal([value], old):
                yield node, field, None


def planted(bug: Bug) -> tuple[pathlib.Path, str]:
    """The module that has the bug, and its source with it."""
    old, new = _parsed(bug.old, bug.new)
    found = [(scope, place) for scope in _scopes() if bug.where in scope.names for place in _places(scope.tree, old)]
    if len(found) != 1:
        raise ValueError(f"{bug.name}: {bug.old!r} occurs {len(found)} times in {bug.where}, not once")
    ((path, module, _, _), (node, field, part)) = found[0]
    former = getattr(node, field)
    setattr(node, field, new[0] if part is None else [*former[: part.start], *new, *former[part.stop :]])
    source = ast.unparse(module)
    setattr(node, field, former)
    return path, source


def caught_by(bug: Bug) -> str | None:
    """The first test that fails on the bug in a copy of the package, or None."""
    path, source = planted(bug)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "jaxaccum", pathlib.Path(folder) / "jaxaccum")
        pathlib.Path(folder, path.relative_to(ROOT)).write_text(source)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *bug.test_files],
            env={**os.environ, "PYTHONPATH": folder},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].split("::")[1].split(" - ")[0] if failed else None


def main(words: list[str]) -> int:
    """Runs the bugs whose name contains all `words`."""
    missed = 0
    for bug in BUGS:
        if all(word in bug.name for word in words):
            test = caught_by(bug)
            missed += test is None
            print(f"{bug.name}: {'NOT CAUGHT' if test is None else f'caught by {test}'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
