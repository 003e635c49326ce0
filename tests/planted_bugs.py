"""Shows that the tests can fail: plants bugs in a copy of the package, one at a time, and runs the tests on each.

    python tests/planted_bugs.py            # all of them
    python tests/planted_bugs.py "sum mode" # those whose name holds these words

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
TRAINER = "prefetch callbacks loader validation checkpoint trainer fuse_windows"


class Bug(NamedTuple):
    """A change of the source that must not go unnoticed.

    `old` and `new` are code, two expressions or some statements each. They are compared as syntax trees, so neither
    layout nor comments count, and `where` is found by its name, in whichever file it is.
    """

    name: str
    where: str  # `function`, `Class`, `Class.method`, each with `module.` before it if need be, or `module`.
    old: str  # Occurs once in there.
    new: str
    tests: str  # The names of the files that could notice it, without "test_": the core knows nothing of the Trainer.

    @property
    def test_files(self) -> list[pathlib.Path]:
        """The files of `tests`, from whichever folder."""
        return [file for name in self.tests.split() for file in (ROOT / "tests").rglob(f"test_{name}.py")]


BUGS = [
    Bug("extra args dropped", "_emit", "extra_args | means", "{}", CORE),
    Bug("averaged args are the boundary's", "_emit", "extra_args | means", "extra_args", CORE),
    Bug(
        "sum mode ignored",
        "_emit",
        "weight if config.use_grad_mean else jnp.full_like(weight, config.sync.size())",
        "weight",
        CORE,
    ),
    Bug("accumulator not cleared", "add", "new = jnp.where(first, x, new)", "pass", CORE),
    Bug("a skip closes the window", "stepping.run", "closed = _both(closed, accepted)", "pass", CORE),
    Bug(
        "gradients rounded to bfloat16",
        "add",
        "jnp.asarray(x)",
        "jnp.asarray(x).astype(jnp.bfloat16 if wide == jnp.float32 else wide)",
        CORE,
    ),
    Bug(
        "mean rounded to the gradients' dtype",
        "weighted_sum.mean",
        "_wider(total.dtype, jnp.result_type(x))",
        "x.dtype",
        CORE,
    ),
    Bug(
        "only the last gradient counted, K times",
        "add",
        "total.astype(wide) + x",
        "x if first is None else x * 4",
        CORE,
    ),
    Bug(
        "inner state advanced every micro-step",
        "branch",
        "jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)",
        "jax.lax.cond(pred, close, lambda: (stay()[0], close()[1]))",
        CORE,
    ),
    Bug(
        "conditional turned into a selection",
        "branch",
        "jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)",
        "jax.tree.map(lambda a, b: jnp.where(pred, a, b), close(), stay())",
        CORE,
    ),
    Bug(
        "K fixed at its first value",
        "_select",
        "checks.scheduled_k(config.every_k(state.gradient_step)) if callable(config.every_k) else state.every_k",
        "config.every_k(0) if callable(config.every_k) else config.every_k",
        CORE,
    ),
    Bug(
        "zeroed parameters handed to the inner optimizer",
        "_emit",
        "(mean, grads, state.inner_opt_state, params, extra_args | means, wide)",
        "(mean, grads, state.inner_opt_state, jax.tree.map(jnp.zeros_like, params), extra_args | means, wide)",
        CORE,
    ),
    Bug(
        "NaN reset by multiply",
        "add",
        "jnp.where(first, x, new)",
        "total.astype(wide) * (1 - first.astype(wide)) + x",
        CORE,
    ),
    Bug("weight 0 by multiply", "add", "jnp.where(_beside(x, keep), x, jnp.zeros_like(x))", "x * keep", CORE),
    Bug(
        "K read before its change", "_select", "state.mini_step + 1 >= every_k", "state.mini_step + 1 == every_k", CORE
    ),
    Bug("flush divides by K", "flush", "state.weight", "state.every_k.astype(jnp.float32)", CORE),
    Bug("flush of an empty window steps", "flush", "state.mini_step > 0", "state.mini_step >= 0", CORE),
    Bug(
        "weights ignored in the divisor",
        "stepping.run",
        "weighted_sum.add(state.weight, one, weight, keep=keep, first=first)",
        "weighted_sum.add(state.weight, one, first=first)",
        CORE,
    ),
    Bug("an empty window steps", "_emit", "numeric.known(weight != 0)", "True", CORE),
    Bug(
        "same key in every micro-batch",
        "Window.run",
        "device.index() * self.k + index",
        "device.index() * self.k",
        CORE,
    ),
    Bug("same keys on every device", "Window.run", "device.index() * self.k + index", "index", CORE),
    Bug("a mean of means over the devices", "MappedAxis.joined", "jax.lax.psum", "jax.lax.pmean", CORE),
    Bug("stored sums reduced as they are", "MappedAxis.joined", "layout.wide(x)", "x", CORE),
    Bug("stored sums scattered as they are", "reduce_scatter", "local = wide(local)", "", "reduction zero mesh"),
    Bug(
        "merged sums rounded seven times",
        "folded",
        "jnp.sum(wide[heirs == i], axis=0)",
        "functools.reduce(lambda a, b: (a + b).astype(x.dtype), wide[heirs == i], jnp.zeros_like(wide[0]))",
        "redistribution reduction",
    ),
    Bug(
        "a gather carried back as it is",
        "once_per_window._evaluate",
        "eqn.primitive.name in _GATHERS",
        "False",
        "reduction once_per_window prepared_steps",
    ),
    Bug(
        "model state of padding kept",
        "Window._sum",
        "new_carry if keep is None else weighted_sum.select(keep, new_carry, carry)",
        "new_carry",
        CORE,
    ),
    Bug(
        "micro-batches that are runs of rows",
        "splitting.split",
        "x.reshape((length // k, k, *x.shape[1:]))",
        "x.reshape((k, length // k, *x.shape[1:])).swapaxes(0, 1)",
        "splitting",
    ),
    Bug(
        "a layout that would be gathered taken", "_check_layout", "n is not None and n % devices", "False", "splitting"
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
        "jnp.finfo(weights.dtype).tiny",
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
        "HostDriven.__call__",
        "self._weight.is_positive(params, *args)",
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
    Bug("a weight's derivative left out", "Window.run", "traced.weight_varies()", "False", CORE),
    Bug(
        "a weight's derivative lost in a stream",
        "Traced.refuse_varying_weight",
        "self.weight_varies()",
        "False",
        "varying_weight",
    ),
    Bug(
        "a derivative seen in a comparison",
        "Traced.weight_varies",
        "if not jaxprs.reached(jax.make_jaxpr(tangent)(varied, varied).jaxpr, "
        "[False] * count + [True] * count)[0]: return False",
        "if not jaxprs.reached(jax.make_jaxpr(tangent)(varied, varied).jaxpr, "
        "[False] * count + [True] * count)[0]: return True",
        "varying_weight",
    ),
    Bug("a key that micro-batches share", "refuse_shared", "is_typed(leaf)", "False", "prng"),
    Bug("one mask on all devices", "fold_typed", "fold(x, number) if is_typed(x) else x", "x", "prng"),
    Bug(
        "a carried key that devices share",
        "fold_beyond_first",
        "jnp.where(device == 0, x, fold(x, device))",
        "x",
        "prng",
    ),
    Bug(
        "statistics added up",
        "add",
        "jnp.maximum(total.astype(wide), x) if is_overwritten else total.astype(wide) + x",
        "total.astype(wide) + x",
        CORE,
    ),
    Bug(
        "statistics added over devices",
        "MappedAxis.joined",
        "jax.lax.pmax(x, names) if overwrites.holds(path) else jax.lax.psum(layout.wide(x), names)",
        "jax.lax.psum(layout.wide(x), names)",
        CORE,
    ),
    Bug(
        "statistics of nothing", "_window_of", "grads = overwrites.kept(grads, params, sums.weight == 0)", "pass", CORE
    ),
    Bug("absent micro-batches run", "_loop", "jnp.minimum(k, length)", "length", CORE),
    Bug("a gathered gradient summed twice", "MappedAxis.joined", "() if reduced is None else (reduced,)", "()", CORE),
    Bug("an all-reduce under ZeRO", "MeshAxis.joined", "self.scatter", "False", CORE),
    Bug("ZeRO's optimizer state whole on every device", "dimension", "next(fits, None)", "None", "reduction zero mesh"),
    Bug(
        "a sum given to both of its heirs",
        "folded",
        "jnp.sum(wide[heirs == i], axis=0)",
        "jnp.sum(wide[heirs == i if i in heirs else slice(1)], axis=0)",
        "redistribution reduction",
    ),
    Bug(
        "the sum mode grows with merging",
        "redistribute",
        'batch == "global" or not config.use_grad_mean',
        'batch == "global"',
        "redistribution reduction",
    ),
    Bug("the sum mode scaled twice", "folded", "total * scale", "total * scale * scale", "redistribution reduction"),
    Bug(
        "a plain loss that weighs the devices of before",
        "redistribute",
        "{'acc_grads': ratio if batch == 'global' or not config.use_grad_mean else 1, "
        "'weight': ratio if batch == 'global' else 1, 'averages': ratio if batch == 'global' else 1, 'dropped': 1}",
        "{'acc_grads': ratio if batch == 'global' or not config.use_grad_mean else 1, "
        "'weight': 1, 'averages': ratio if batch == 'global' else 1, 'dropped': 1}",
        "redistribution reduction",
    ),
    Bug(
        "a batch that nobody asks for",
        "redistribute",
        'batch is None and before != devices and np.any(shared.mini_step) and np.any(local("weight"))',
        'False and np.any(shared.mini_step) and np.any(local("weight"))',
        "redistribution reduction",
    ),
    Bug("K of the next epoch", "Loop._begin", "run.at.epoch", "run.at.epoch + 1", TRAINER),
    Bug(
        "an epoch's last window left open",
        "Windows.train",
        "micro_steps[-1].last or window_step >= at.every_k",
        "window_step >= at.every_k",
        TRAINER,
    ),
    Bug("max_steps in micro-steps", "Loop._are_over", "at.global_step", "at.micro_step", TRAINER),
    Bug(
        "a validation clears what is pending",
        "Validation.run_if_due",
        "run.metrics |= results",
        "import jax\n"
        "run.metrics |= results\n"
        "sums = jax.tree.map(jax.numpy.zeros_like, run.state.pending.sums)\n"
        "run.state = run.state._replace(pending=run.state.pending._replace(sums=sums))",
        TRAINER,
    ),
    Bug("a batch given twice by the look-ahead", "micro_steps", "yield ahead.popleft()", "yield ahead[0]", TRAINER),
    Bug("examples not counted", "_logs", "_examples(batch)", "1", TRAINER),
    Bug(
        "a device without a batch counts",
        "_logs",
        "jnp.where(present, wide(entry.weight), 0)",
        "wide(entry.weight)",
        TRAINER,
    ),
    Bug("the same key on every device of the Trainer", "_key", "index + device - first", "index", TRAINER),
    Bug("keys by the micro-step", "Programs._add", "place[2].astype(jnp.uint32)", "1", TRAINER),
    Bug(
        "logs of all windows so far",
        "Programs._add",
        "weighted_sum.add(total, x, keep=counts, first=first)",
        "weighted_sum.add(total, x, keep=counts)",
        TRAINER,
    ),
    Bug(
        "model state of weight-0 copies kept",
        "Programs._add",
        "weighted_sum.select(counts, model_state, pending.model_state)",
        "model_state",
        TRAINER,
    ),
    Bug(
        "a fused window without its share of K",
        "Programs._scan",
        "self._close_with(state._replace(pending=unpack(pending)), batch, place, share)",
        "self._close_with(state._replace(pending=unpack(pending)), batch, place, None)",
        TRAINER,
    ),
    Bug("a fused window's first loss for all", "Programs.run", "(..., i)", "(..., 0)", TRAINER),
    Bug(
        "a fused window of unequal batches",
        "_can_be_stacked",
        "all(signature(other.pieces[0].batch) == shape for other in others)",
        "True",
        TRAINER,
    ),
    Bug("an open window lost with its loader", "fused", "yield from ([one] for one in window)", "", TRAINER),
    Bug(
        "a checkpoint that a fused window jumps over",
        "_divides",
        "count % interval < last",
        "count % interval == 0",
        TRAINER,
    ),
    Bug(
        "a validation that a fused window jumps over",
        "Validation.count",
        "at.validated &= not is_due or (at.epoch + 1) % every_n_epochs != 0",
        "at.validated = not is_due or (at.epoch + 1) % every_n_epochs != 0",
        TRAINER,
    ),
    Bug(
        "the loader's place by the window's number",
        "Windows._count",
        "at.batches += micro_step.count",
        "at.batches += bool(micro_step.count)",
        TRAINER,
    ),
    Bug(
        "K forgotten by a checkpoint",
        "run_checkpoint.place",
        'checkpoint.notes["counters"]',
        'checkpoint.notes["counters"] | {"every_k": 1}',
        TRAINER,
    ),
    Bug("a resume with another seed", "Trainer._start", 'seed = found.notes["seed"]', "pass", TRAINER),
    Bug(
        "another task's programs",
        "run_state.begin",
        "last is not None and last.task is task and last.seed == seed",
        "last is not None and last.seed == seed",
        TRAINER,
    ),
    Bug("a model's programs for another", "Programs.initial", "kind != self._kind", "self._kind is None", TRAINER),
    Bug("batches of earlier epochs given again", "TrainLoader.begin", "at.all_batches", "at.batches", TRAINER),
    Bug(
        "a limit that starts anew in a resume",
        "TrainLoader.begin",
        "limit = _plus(limit, -own(at.batches))",
        "pass",
        TRAINER,
    ),
    Bug("a loader that is never told the epoch", "set_epoch", "tell(epoch)", "pass", TRAINER),
    Bug("a loader told the epoch too late", "TrainLoader.begin", "set_epoch(self._loader, at.epoch)", "pass", TRAINER),
    Bug("a stream read beyond the run's end", "Reader.stop_after", "self._stop = int(batches)", "pass", TRAINER),
    Bug(
        "an open epoch taken for a whole one",
        "micro_steps",
        'not getattr(batches, "was_stopped", False)',
        "True",
        TRAINER,
    ),
    Bug("a loader's state of an epoch's end forgotten", "TrainLoader._put", 'saved["is_over"]', "True", TRAINER),
    Bug(
        "a length taken for a limit",
        "limit",
        "None if value else 0",
        "size(loader) if value else 0",
        "loader validation",
    ),
    Bug(
        "an interval that begins anew with each epoch",
        "Validation.end_epoch",
        "at.batch_idx >= self._interval",
        "True",
        TRAINER,
    ),
    Bug("an interval that never begins anew", "Validation.end_epoch", "at.toward_validation = 0", "pass", TRAINER),
    Bug(
        "a look before training that takes batches away",
        "ValLoader.__iter__",
        "itertools.chain(kept, _rest(iterator))",
        "iterator",
        TRAINER,
    ),
    Bug(
        "a look before training that is too long",
        "Validation.check",
        "micro_steps * run.strategy.group",
        "None",
        TRAINER,
    ),
    Bug(
        "one state written for each policy",
        "FolderCheckpoints.save",
        "at.arrays == self._at.arrays",
        "at == self._at",
        TRAINER,
    ),
    Bug(
        "a checkpoint removed that another policy keeps",
        "FolderCheckpoints._prune",
        "outdated.difference(self._others, *(policy.names for policy in self.policies))",
        "outdated.difference(self._others)",
        TRAINER,
    ),
    Bug(
        "the newest by a clock that is set back",
        "FolderCheckpoints._noted",
        "max(time.time_ns(), self._date + 1)",
        "time.time_ns()",
        TRAINER,
    ),
    Bug(
        "the best of another branch",
        "best",
        "(names for _, notes in found if (names := ranked(notes)) is not None)",
        "(names for _, notes in found[::-1] if (names := ranked(notes)) is not None)",
        TRAINER,
    ),
    Bug(
        "errors of one checkpoint raised for the next",
        "Writer.wait",
        "try:\n    self._checkpointer.wait_until_finished()\nexcept Exception:\n    self.close()\n    raise",
        "try:\n    self._checkpointer.wait_until_finished()\nexcept ZeroDivisionError:\n    raise",
        TRAINER,
    ),
    Bug(
        "a policy's list taken by another",
        "ModelCheckpoint.state_key",
        '("monitor", "mode", "every_n_micro_steps", "every_n_train_steps", "every_n_epochs")',
        '("every_n_micro_steps", "every_n_train_steps", "every_n_epochs")',
        TRAINER,
    ),
    Bug("a window that no record has", "Windows._close", "at.recorded = not run.record_is_due", "pass", TRAINER),
    Bug("broken notes passed over in silence", "orbax_io._found", "broken.append", "str", TRAINER),
    Bug("a fresh start beside ruins", "_first_readable", "result is None and broken", "False", TRAINER),
    Bug(
        "callbacks that never begin anew",
        "EarlyStopping.on_fit_start",
        "not (trainer.is_resuming and self._is_restored)",
        "False",
        TRAINER,
    ),
    Bug("a logger's failure that ends the run", "Records._call", "Exception", "ZeroDivisionError", "loggers trainer"),
    Bug(
        "a first window that is not recorded",
        "Run.record_is_due",
        "at.global_step == 1 or at.ends_epoch or at.global_step >= self.options.steps",
        "at.ends_epoch or at.global_step >= self.options.steps",
        TRAINER,
    ),
    Bug("records made once more after a resume", "_before", "record.get(name, 0) > place[name]", "False", "loggers"),
    Bug("an old file of metrics overwritten", "_set_aside", "path.rename", "print", "loggers"),
    Bug(
        "examples of the first leaf",
        "strategies._examples",
        "collections.Counter(lengths).most_common(1)[0]",
        "lengths",
        "batches prefetch trainer",
    ),
    Bug("the worst checkpoints kept", "ModelCheckpoint.ranked", '1 if self.mode == "min" else -1', "0", TRAINER),
    Bug(
        "the newest checkpoint not kept",
        "ModelCheckpoint.outdated",
        "{*self.ranked(self._saved), *list(self._saved)[-1:]}",
        "{*self.ranked(self._saved)}",
        TRAINER,
    ),
    Bug(
        "a misspelt monitor waited for",
        "monitored",
        'kind in ("train", "val") and not any(name.startswith(f"{kind}_") for name in metrics)',
        'not any(name.startswith(f"{kind}_") for name in metrics)',
        TRAINER,
    ),
    Bug("a history without its validations", "_every_other", "tuple(record)", "()", "loggers trainer"),
    Bug(
        "a weight of 0 added in place",
        "Gradient._rewritten",
        "jax.lax.cond(jnp.asarray(loss.weight).astype(bool), backward, none, pending)",
        "backward(pending)",
        "in_place_sums wide_products",
    ),
    Bug(
        "sums of the window before gone on with",
        "on_each",
        "sums = weighted_sum.select(starts, jax.tree.map(jnp.zeros_like, sums), sums)",
        "pass",
        "in_place_sums wide_products",
    ),
    Bug(
        "another call's callback",
        "_can_be_told",
        '"callback" not in eqn.primitive.name and not is_large',
        "not is_large",
        "eager",
    ),
    Bug(
        "a program of other numbers",
        "_compiled",
        "hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))",
        "types, tuple(_places(closed.jaxpr))",
        "eager",
    ),
    Bug(
        "a program of other devices",
        "_compiled",
        "hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))",
        "hashlib.sha256(text.encode()).digest(), types",
        "eager",
    ),
    Bug(
        "a program of other keys",
        "_compiled",
        "hashlib.sha256(text.encode()).digest(), types, tuple(_places(closed.jaxpr))",
        "hashlib.sha256(text.encode()).digest(), tuple(_places(closed.jaxpr))",
        "eager",
    ),
    Bug(
        "profiles without layers",
        "located",
        "source_info_util.current_name_stack() + eqn.source_info.name_stack",
        "source_info_util.current_name_stack()",
        "jaxprs",
    ),
    Bug(
        "references beside values",
        "walked",
        "(stack for stack in _stacks(jaxpr) if stack <= fits)",
        "(stack for stack in _stacks(jaxpr))",
        "in_place_sums wide_products",
    ),
    Bug(
        "a stack used twice added in place",
        "_stacks",
        "atom in inputs and uses[atom] == 1",
        "atom in inputs",
        "in_place_sums wide_products",
    ),
    Bug("a loop's constant made beforehand", "_walked", "is_known and i >= whole", "is_known", "hoisting"),
    Bug(
        "larger things made beforehand",
        "_gains",
        "not widens and not moves and matrices and size(var) <= sum(map(size, origins))",
        "not widens and not moves and matrices",
        "hoisting",
    ),
    Bug(
        "the host's K kept from the state",
        "HostDriven._read",
        "state = set_every_k(state, assigned.every_k)",
        "pass",
        "host_driven",
    ),
    Bug("a host that counts from 0", "HostDriven._read", "_on_host(state.mini_step)", "0", "host_driven"),
    Bug(
        "a host that ignores the state's K",
        "HostDriven._read",
        "_on_host(state.every_k)",
        "self._every_k",
        "host_driven",
    ),
    Bug(
        "a K that only one new state receives",
        "HostDriven._read",
        "self._built if is_as_built else assigned",
        "assigned",
        "host_driven",
    ),
    Bug(
        "a K that overrules a checkpoint's",
        "HostDriven._read",
        "position is None and every_k == self._built.every_k",
        "position is None",
        "host_driven",
    ),
    Bug(
        "a K that overrules the state's",
        "HostDriven._read",
        "position is None and every_k == self._built.every_k",
        "every_k == self._built.every_k",
        "host_driven",
    ),
    Bug(
        "an assignment lost that comes during a call",
        "HostDriven._remember",
        "k.written",
        "self._assigned",
        "host_driven",
    ),
    Bug(
        "a K that only the next state receives",
        "HostDriven._read",
        "k is None or k.written is not assigned",
        "self._last_written is not assigned",
        "host_driven",
    ),
    Bug(
        "a host that reads every state",
        "HostDriven._read",
        "position or _Position(_on_host(state.mini_step), ())",
        "_Position(_on_host(state.mini_step), ())",
        "host_driven",
    ),
    Bug("a host that forgets no state", "_Facts.add", "functools.partial(self._facts.pop, key)", "None", "host_driven"),
    Bug(
        "a rule that is not linear made beforehand",
        "_may_run_once",
        "is_pure and not jaxprs.axes(eqn) and linearity.unproved_in(eqn) is None",
        "is_pure and not jaxprs.axes(eqn)",
        "hoisting",
    ),
    Bug("a rule hidden by a loop", "unproved_in", "jaxprs.bodies(eqn)", "()", "hoisting once_per_window"),
    Bug(
        "an offset taken for linear",
        "linearity",
        "_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 1, 2, 3",
        "_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 0, 2, 3",
        "hoisting once_per_window",
    ),
    Bug(
        "another drive's sums taken over",
        "HostDriven._run",
        "state = stepping.cleared(state, self._clear)",
        "pass",
        "host_driven",
    ),
    Bug("replaced sums taken for cleared ones", "_Position.holds_cleared", "ref() is x", "True", "host_driven"),
    Bug(
        "sums cleared before a call that raises",
        "HostDriven._run",
        "program.lower(*given, state, *args).compile()",
        "pass",
        "host_driven",
    ),
    Bug(
        "a program taken for compiled whatever the types",
        "HostDriven._run",
        "(program, signature) not in self._compiled",
        "program not in dict(self._compiled)",
        "host_driven",
    ),
    Bug(
        "a program taken for compiled wherever arrays lie",
        "_signature",
        "(x.aval, x.sharding, x.committed)",
        "x.aval",
        "host_driven",
    ),
    Bug("a flush that leaves its sums", "HostDriven.__init__", "stepping.cleared(state)", "state", "host_driven"),
    Bug(
        "a weight's dimensions in the order of the activation's",
        "_weight_gradient",
        "(dimension for _, dimension in pairs)",
        "contracted[side]",
        "wide_products",
    ),
    Bug(
        "a selected gradient in float32",
        "micro_gradient.of",
        "not loss.has_weight and not replaces and wide_products.occur(jaxpr)",
        "True and wide_products.occur(jaxpr)",
        "in_place_sums wide_products",
    ),
    Bug(
        "a cast that is lost where a table is read",
        "wide_products._results",
        "_Value(results[0], wide[0])",
        "_Value(*wide * 2)",
        "wide_products",
    ),
    Bug(
        "a second derivative that forgets the weight",
        "_product",
        "product(operands[1 - side].array, *operands[side])",
        "product(operands[1 - side].array, jax.lax.stop_gradient(operands[side].array), operands[side].wide)",
        "wide_products",
    ),
    Bug(
        "small sums read from the wrong place",
        "Packing.unpack",
        "zip(numbers, stack, strict=True)",
        "zip(numbers[::-1], stack, strict=True)",
        "sum_packing overwrites",
    ),
    Bug(
        "statistics packed with sums",
        "sum_packing.of",
        "x is None or next(stays) or x.ndim > 1 or x.size > _SMALL or overwrites.holds(path)",
        "x is None or next(stays) or x.ndim > 1 or x.size > _SMALL",
        "sum_packing overwrites",
    ),
    Bug("sums of several dtypes in a stack", "sum_packing.of", "x.dtype", "0", "sum_packing overwrites"),
    Bug(
        "prepared parameters that lag behind",
        "_emit",
        "_, prepared = once_per_window.made(config.prepare, new_params)",
        "_ = once_per_window.made(config.prepare, new_params)",
        CORE,
    ),
    Bug("a misspelt weight taken for an extra arg", "misspelling.check", "near is not None", "False", "errors flax"),
    Bug("an extra arg refused that a chain asks for", "_held", "return value", "return ()", "errors flax"),
    Bug(
        "an extra arg refused that a factory's optimizer asks for",
        "_captured",
        'held["inner"] = factory(**others, **dict.fromkeys(numbers, jnp.ones(())))',
        "factory(**others, **dict.fromkeys(numbers, jnp.ones(())))",
        "errors flax",
    ),
    Bug(
        "a factory's hyperparameters taken for extra args",
        "_captured",
        'held.pop("inner_factory")',
        'held["inner_factory"]',
        "errors flax",
    ),
    Bug(
        "a word of its own taken for a misspelling",
        "_nearest",
        "name.lower() in _OWN_WORDS or name[-1:].isdigit()",
        "name[-1:].isdigit()",
        "errors flax",
    ),
    Bug(
        "a window of windows",
        "inner_state",
        "any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating)))",
        "False and any(map(is_accumulating, jax.tree.leaves(state, is_leaf=is_accumulating)))",
        "compose errors",
    ),
    Bug("rounded up as often as not", "_stochastic", "jnp.uint32(0xFFFF)", "jnp.uint32(0x7FFF)", CORE),
    Bug(
        "a window that a hook's error leaves uncounted",
        "Windows.train",
        "while run.uncounted:\n    self._count(means)",
        "while False:\n    self._count(means)",
        TRAINER,
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
    """Runs the bugs whose name holds all `words`."""
    missed = 0
    for bug in BUGS:
        if all(word in bug.name for word in words):
            test = caught_by(bug)
            missed += test is None
            print(f"{bug.name}: {'NOT CAUGHT' if test is None else f'caught by {test}'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
