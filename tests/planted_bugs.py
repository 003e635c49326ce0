"""Shows that the tests can fail: plants bugs in a copy of the package, one at a time, and runs the tests on each.

    python tests/planted_bugs.py            # all of them
    python tests/planted_bugs.py "sum mode" # those whose name holds these words

Exits with 1 if a bug goes unnoticed. Not collected by pytest; test_planted_bugs.py keeps the list applicable.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORE = (
    "test_multi_steps.py",
    "test_value_and_grad.py",
    "test_compiled.py",
    "test_compose.py",
    "test_mapped.py",
    "test_redistribution.py",
    "test_zero.py",
    "test_exact.py",
    "test_prepared_steps.py",
    "test_rounding.py",
    "test_reduction.py",
    "test_splitting.py",
    "test_prng.py",
    "test_overwrites.py",
    "test_varying_weight.py",
)
EXTRA_ARGS = ("test_errors.py", "test_flax.py")
TRAINER = (
    "test_prefetch.py",
    "test_callbacks.py",
    "test_loader.py",
    "test_validation.py",
    "test_checkpoint.py",
    "test_trainer.py",
    "test_fuse_windows.py",
)
TRAINER_FILES = ("trainer/", "callbacks/", "checkpoint/", "loggers/")


# What one part of the package's tests alone look at.
OWN = {
    "_gradient/in_place_sums.py": ("test_in_place_sums.py", "test_wide_products.py"),
    "_gradient/micro_gradient.py": ("test_in_place_sums.py", "test_wide_products.py"),
    "_gradient/hoisting.py": ("test_hoisting.py",),
    "_multi_steps/misspelling.py": EXTRA_ARGS,
    "_multi_steps/checks.py": ("test_compose.py", "test_errors.py"),
    "_jax/eager.py": ("test_eager.py",),
    "_jax/jaxprs.py": ("test_jaxprs.py",),
    "_jax/prng.py": ("test_prng.py",),
    "_gradient/splitting.py": ("test_splitting.py",),
    "_sums/traced_loss.py": ("test_varying_weight.py",),
    "_jax/linearity.py": ("test_hoisting.py", "test_once_per_window.py"),
    "_multi_steps/host_driven.py": ("test_host_driven.py",),
    "trainer/input/batch_limits.py": ("test_loader.py", "test_validation.py"),
    "trainer/input/strategies.py": ("test_batches.py", "test_prefetch.py", "test_trainer.py"),
    "loggers/__init__.py": ("test_loggers.py",),
    "loggers/records.py": ("test_loggers.py", "test_trainer.py"),
    "_gradient/sum_packing.py": ("test_sum_packing.py", "test_overwrites.py"),
    "_gradient/wide_products.py": ("test_wide_products.py",),
    "_gradient/once_per_window.py": ("test_reduction.py", "test_once_per_window.py", "test_prepared_steps.py"),
    "_multi_steps/redistribution.py": ("test_redistribution.py", "test_reduction.py"),
    "_devices/layout.py": ("test_reduction.py", "test_zero.py", "test_mesh.py"),
}


class Bug(NamedTuple):
    """A change of the source that must not go unnoticed."""

    name: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> tuple[str, ...]:
        """Those that could see it: the core knows nothing of the Trainer."""
        if self.file in OWN:
            return OWN[self.file]
        return TRAINER if self.file.startswith(TRAINER_FILES) else CORE


BUGS = [
    Bug("extra args dropped", "_multi_steps/stepping.py", "extra_args | means, wide", "{}, wide"),
    Bug("averaged args are the boundary's", "_multi_steps/stepping.py", "extra_args | means", "extra_args"),
    Bug(
        "sum mode ignored",
        "_multi_steps/stepping.py",
        " if config.use_grad_mean else jnp.full_like(weight, config.sync.size())",
        "",
    ),
    Bug("accumulator not cleared", "_sums/weighted_sum.py", "new = jnp.where(first, x, new)", "pass"),
    Bug("a skip closes the window", "_multi_steps/stepping.py", "closed = _both(closed, accepted)", "pass"),
    Bug(
        "gradients rounded to bfloat16",
        "_sums/weighted_sum.py",
        "x = jnp.asarray(x).astype(wide)",
        "x = jnp.asarray(x).astype(jnp.bfloat16 if wide == jnp.float32 else wide).astype(wide)",
    ),
    Bug(
        "mean rounded to the gradients' dtype",
        "_sums/weighted_sum.py",
        "_wider(total.dtype, jnp.result_type(x))",
        "x.dtype",
    ),
    Bug(
        "only the last gradient counted, K times",
        "_sums/weighted_sum.py",
        "else total.astype(wide) + x",
        "else (x if first is None else x * 4)",
    ),
    Bug(
        "inner state advanced every micro-step",
        "_multi_steps/inner_update.py",
        "return jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)",
        "return jax.lax.cond(pred, close, lambda: (stay()[0], close()[1]))",
    ),
    Bug(
        "conditional turned into a selection",
        "_multi_steps/inner_update.py",
        "return jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)",
        "return jax.tree.map(lambda a, b: jnp.where(pred, a, b), close(), stay())",
    ),
    Bug(
        "K fixed at its first value",
        "_multi_steps/stepping.py",
        "checks.scheduled_k(config.every_k(state.gradient_step)) if callable(config.every_k) else state.every_k",
        "config.every_k(0) if callable(config.every_k) else config.every_k",
    ),
    Bug(
        "zeroed parameters handed to the inner optimizer",
        "_multi_steps/stepping.py",
        "(mean, grads, state.inner_opt_state, params,",
        "(mean, grads, state.inner_opt_state, jax.tree.map(jnp.zeros_like, params),",
    ),
    Bug(
        "NaN reset by multiply",
        "_sums/weighted_sum.py",
        "new = jnp.where(first, x, new)",
        "new = total.astype(wide) * (1 - first.astype(wide)) + x",
    ),
    Bug(
        "weight 0 by multiply",
        "_sums/weighted_sum.py",
        "x = jnp.where(_beside(x, keep), x, jnp.zeros_like(x))",
        "x = x * keep",
    ),
    Bug(
        "K read before its change",
        "_multi_steps/stepping.py",
        "closed = numeric.known(state.mini_step + 1 >= every_k)",
        "closed = numeric.known(state.mini_step + 1 == every_k)",
    ),
    Bug(
        "flush divides by K",
        "_multi_steps/stepping.py",
        "_Window(Weighted(state.acc_grads, state.weight), state",
        "_Window(Weighted(state.acc_grads, state.every_k.astype(jnp.float32)), state",
    ),
    Bug(
        "flush of an empty window steps",
        "_multi_steps/stepping.py",
        "numeric.known(state.mini_step > 0)",
        "numeric.known(state.mini_step >= 0)",
    ),
    Bug(
        "weights ignored in the divisor",
        "_multi_steps/stepping.py",
        "weighted_sum.add(state.weight, one, weight, keep=keep, first=first)",
        "weighted_sum.add(state.weight, one, first=first)",
    ),
    Bug(
        "an empty window steps",
        "_multi_steps/stepping.py",
        "filled = numeric.known(weight != 0)",
        "filled = True",
    ),
    Bug(
        "same key in every micro-batch",
        "_window/loop.py",
        "number = device.index() * self.k + index",
        "number = device.index() * self.k",
    ),
    Bug("same keys on every device", "_window/loop.py", "number = device.index() * self.k + index", "number = index"),
    Bug("a mean of means over the devices", "_devices/topology.py", "jax.lax.psum(layout", "jax.lax.pmean(layout"),
    Bug(
        "stored sums reduced as they are",
        "_devices/topology.py",
        "jax.lax.psum(layout.wide(x), names)",
        "jax.lax.psum(x, names)",
    ),
    Bug("stored sums scattered as they are", "_devices/layout.py", "    local = wide(local)\n", ""),
    Bug(
        "merged sums rounded seven times",
        "_multi_steps/redistribution.py",
        "jnp.sum(wide[heirs == i], axis=0)",
        "functools.reduce(lambda a, b: (a + b).astype(x.dtype), wide[heirs == i], jnp.zeros_like(wide[0]))",
    ),
    Bug(
        "a gather carried back as it is",
        "_gradient/once_per_window.py",
        "if eqn.primitive.name in _GATHERS else",
        "if False else",
    ),
    Bug(
        "model state of padding kept",
        "_window/loop.py",
        "new_carry if keep is None else weighted_sum.select(keep, new_carry, carry)",
        "new_carry",
    ),
    Bug(
        "micro-batches that are runs of rows",
        "_gradient/splitting.py",
        "x.reshape((length // k, k, *x.shape[1:]))",
        "x.reshape((k, length // k, *x.shape[1:])).swapaxes(0, 1)",
    ),
    Bug(
        "a layout that would be gathered taken",
        "_gradient/splitting.py",
        "if n is not None and n % devices:",
        "if False:",
    ),
    Bug("a weight's derivative left out", "_window/loop.py", "if traced.weight_varies():", "if False:"),
    Bug("a weight's derivative lost in a stream", "_sums/traced_loss.py", "if self.weight_varies():", "if False:"),
    Bug(
        "a derivative seen in a comparison",
        "_sums/traced_loss.py",
        "            return False\n        # To jvp",
        "            return True\n        # To jvp",
    ),
    Bug(
        "a key that micro-batches share",
        "_jax/prng.py",
        "            if is_typed(leaf):\n                raise",
        "            if False:\n                raise",
    ),
    Bug("one mask on all devices", "_jax/prng.py", "fold(x, number) if is_typed(x) else x", "x"),
    Bug("a carried key that devices share", "_jax/prng.py", "jnp.where(device == 0, x, fold(x, device))", "x"),
    Bug(
        "statistics added up", "_sums/weighted_sum.py", "jnp.maximum(total.astype(wide), x) if is_overwritten else ", ""
    ),
    Bug(
        "statistics added over devices",
        "_devices/topology.py",
        "jax.lax.pmax(x, names) if overwrites.holds(path) else ",
        "",
    ),
    Bug(
        "statistics of nothing",
        "_window/api.py",
        "grads = overwrites.kept(grads, params, sums.weight == 0)",
        "pass",
    ),
    Bug("absent micro-batches run", "_window/loop.py", "jnp.minimum(k, length)", "length"),
    Bug(
        "a gathered gradient summed twice",
        "_devices/topology.py",
        "*(() if reduced is None else (reduced,))",
        "*()",
    ),
    Bug(
        "an all-reduce under ZeRO",
        "_devices/topology.py",
        "if self.scatter:\n                return layout",
        "if False:\n                return layout",
    ),
    Bug("ZeRO's optimizer state whole on every device", "_devices/layout.py", "return next(fits, None)", "return None"),
    Bug(
        "a sum given to both of its heirs",
        "_multi_steps/redistribution.py",
        "merged = [jnp.sum(wide[heirs == i]",
        "merged = [jnp.sum(wide[heirs == i if i in heirs else slice(1)]",
    ),
    Bug("the sum mode grows with merging", "_multi_steps/redistribution.py", " or not config.use_grad_mean", ""),
    Bug(
        "the sum mode scaled twice",
        "_multi_steps/redistribution.py",
        "else total * scale",
        "else total * scale * scale",
    ),
    Bug(
        "a plain loss that weighs the devices of before",
        "_multi_steps/redistribution.py",
        '"weight": ratio if batch == "global" else 1',
        '"weight": 1',
    ),
    Bug(
        "a batch that nobody asks for",
        "_multi_steps/redistribution.py",
        "if batch is None and before != devices",
        "if False",
    ),
    Bug("K of the next epoch", "trainer/loop/loop.py", "batches(run.at.epoch)", "batches(run.at.epoch + 1)"),
    Bug(
        "an epoch's last window left open",
        "trainer/loop/windows.py",
        "boundary = micro_steps[-1].last or window_step >= at.every_k",
        "boundary = window_step >= at.every_k",
    ),
    Bug(
        "max_steps in micro-steps",
        "trainer/loop/loop.py",
        "at.global_step >= self._steps",
        "at.micro_step >= self._steps",
    ),
    Bug(
        "a validation clears what is pending",
        "trainer/loop/validation.py",
        "run.metrics |= results",
        "import jax\n"
        "        run.metrics |= results\n"
        "        sums = jax.tree.map(jax.numpy.zeros_like, run.state.pending.sums)\n"
        "        run.state = run.state._replace(pending=run.state.pending._replace(sums=sums))",
    ),
    Bug(
        "a batch given twice by the look-ahead",
        "trainer/input/prefetch.py",
        "yield ahead.popleft()",
        "yield ahead[0]",
    ),
    Bug("examples not counted", "trainer/programs/objective.py", "wide(_examples(batch) if", "wide(1 if"),
    Bug(
        "a device without a batch counts",
        "trainer/programs/objective.py",
        "jnp.where(present, wide(entry.weight), 0)",
        "wide(entry.weight)",
    ),
    Bug(
        "the same key on every device of the Trainer",
        "trainer/programs/objective.py",
        "jax.random.fold_in(key, index + device - first)",
        "jax.random.fold_in(key, index)",
    ),
    Bug(
        "keys by the micro-step",
        "trainer/programs/compiled.py",
        "index=pending.index + place[2].astype(jnp.uint32)",
        "index=pending.index + 1",
    ),
    Bug(
        "logs of all windows so far",
        "trainer/programs/compiled.py",
        "weighted_sum.add(total, x, keep=counts, first=first)",
        "weighted_sum.add(total, x, keep=counts)",
    ),
    Bug(
        "model state of weight-0 copies kept",
        "trainer/programs/compiled.py",
        "weighted_sum.select(counts, model_state, pending.model_state)",
        "model_state",
    ),
    Bug(
        "a fused window without its share of K",
        "trainer/programs/compiled.py",
        "unpack(pending)), batch, place, share)",
        "unpack(pending)), batch, place, None)",
    ),
    Bug(
        "a fused window's first loss for all",
        "trainer/programs/compiled.py",
        "Outputs([logs], (..., i))",
        "Outputs([logs], (..., 0))",
    ),
    Bug(
        "a fused window of unequal batches",
        "trainer/input/prefetch.py",
        "return all(signature(other.pieces[0].batch) == shape for other in others)",
        "return True",
    ),
    Bug(
        "an open window lost with its loader",
        "trainer/input/prefetch.py",
        "except Exception:\n        yield from ([one] for one in window)\n",
        "except Exception:\n",
    ),
    Bug(
        "a checkpoint that a fused window jumps over",
        "callbacks/model_checkpoint.py",
        "count % interval < last",
        "count % interval == 0",
    ),
    Bug(
        "a validation that a fused window jumps over",
        "trainer/loop/validation.py",
        "at.validated &= not",
        "at.validated = not",
    ),
    Bug(
        "the loader's place by the window's number",
        "trainer/loop/windows.py",
        "at.batches += micro_step.count",
        "at.batches += bool(micro_step.count)",
    ),
    Bug(
        "K forgotten by a checkpoint",
        "trainer/loop/run_checkpoint.py",
        'Counters.of_notes(checkpoint.notes["counters"])',
        'Counters.of_notes(checkpoint.notes["counters"] | {"every_k": 1})',
    ),
    Bug("a resume with another seed", "trainer/trainer.py", 'seed = found.notes["seed"]', "pass"),
    Bug(
        "another task's programs",
        "trainer/loop/run_state.py",
        "last.task is task and last.seed == seed",
        "last.seed == seed",
    ),
    Bug(
        "a model's programs for another",
        "trainer/programs/compiled.py",
        "if kind != self._kind:",
        "if self._kind is None:",
    ),
    Bug(
        "batches of earlier epochs given again",
        "trainer/input/loader.py",
        "ahead = self._passed_over(own(at.all_batches))",
        "ahead = self._passed_over(own(at.batches))",
    ),
    Bug(
        "a limit that starts anew in a resume",
        "trainer/input/loader.py",
        "limit = _plus(limit, -own(at.batches))",
        "pass",
    ),
    Bug(
        "a loader that is never told the epoch",
        "trainer/input/loader.py",
        "            tell(epoch)",
        "            pass",
    ),
    Bug("a loader told the epoch too late", "trainer/input/loader.py", "set_epoch(self._loader, at.epoch)\n", "pass\n"),
    Bug("a stream read beyond the run's end", "trainer/input/loader.py", "self._stop = int(batches)", "pass"),
    Bug(
        "an open epoch taken for a whole one",
        "trainer/input/prefetch.py",
        'not getattr(batches, "was_stopped", False)',
        "True",
    ),
    Bug("a loader's state of an epoch's end forgotten", "trainer/input/loader.py", 'saved["is_over"]', "True"),
    Bug(
        "a length taken for a limit",
        "trainer/input/batch_limits.py",
        "return None if value else 0",
        "return size(loader) if value else 0",
    ),
    Bug(
        "an interval that begins anew with each epoch",
        "trainer/loop/validation.py",
        "at.batch_idx >= self._interval",
        "True",
    ),
    Bug("an interval that never begins anew", "trainer/loop/validation.py", "at.toward_validation = 0", "pass"),
    Bug(
        "a look before training that takes batches away",
        "trainer/input/loader.py",
        "itertools.chain(kept, _rest(iterator))",
        "iterator",
    ),
    Bug(
        "a look before training that is too long",
        "trainer/loop/validation.py",
        "micro_steps * run.strategy.group",
        "None",
    ),
    Bug(
        "one state written for each policy", "trainer/loop/saving.py", "at.arrays == self._at.arrays", "at == self._at"
    ),
    Bug(
        "a checkpoint removed that another policy keeps",
        "trainer/loop/saving.py",
        ", *(policy.names for policy in self.policies))",
        ")",
    ),
    Bug(
        "the newest by a clock that is set back",
        "trainer/loop/saving.py",
        "max(time.time_ns(), self._date + 1)",
        "time.time_ns()",
    ),
    Bug(
        "the best of another branch",
        "checkpoint/orbax_io.py",
        "for _, notes in found if (names",
        "for _, notes in found[::-1] if (names",
    ),
    Bug(
        "errors of one checkpoint raised for the next",
        "checkpoint/orbax_io.py",
        "        except Exception:\n            self.close()\n            raise\n\n    def close",
        "        except ZeroDivisionError:\n            raise\n\n    def close",
    ),
    Bug(
        "a policy's list taken by another", "callbacks/model_checkpoint.py", 'names = ("monitor", "mode", ', "names = ("
    ),
    Bug("a window that no record has", "trainer/loop/windows.py", "at.recorded = not run.record_is_due", "pass"),
    Bug(
        "broken notes passed over in silence",
        "checkpoint/orbax_io.py",
        "broken.append(f\"{path} can't",
        "str(f\"{path} can't",
    ),
    Bug("a fresh start beside ruins", "checkpoint/orbax_io.py", "if result is None and broken:", "if False:"),
    Bug(
        "callbacks that never begin anew",
        "callbacks/early_stopping.py",
        "if not (trainer.is_resuming and self._is_restored):",
        "if False:",
    ),
    Bug(
        "a logger's failure that ends the run",
        "loggers/records.py",
        "            except Exception as error:\n                failures.append((i, error))",
        "            except ZeroDivisionError as error:\n                failures.append((i, error))",
    ),
    Bug("a first window that is not recorded", "trainer/loop/run_state.py", "at.global_step == 1 or ", ""),
    Bug(
        "records made once more after a resume",
        "loggers/__init__.py",
        "if any(record.get(name, 0) > place[name]",
        "if any(False",
    ),
    Bug("an old file of metrics overwritten", "loggers/__init__.py", "path.rename(", "print("),
    Bug(
        "examples of the first leaf",
        "trainer/input/strategies.py",
        "collections.Counter(lengths).most_common(1)[0][0]",
        "lengths[0]",
    ),
    Bug(
        "the worst checkpoints kept",
        "callbacks/model_checkpoint.py",
        'sign = 1 if self.mode == "min" else -1',
        "sign = 0",
    ),
    Bug("the newest checkpoint not kept", "callbacks/model_checkpoint.py", ", *list(self._saved)[-1:]}", "}"),
    Bug(
        "a misspelt monitor waited for",
        "callbacks/monitor.py",
        'if kind in ("train", "val") and not any(',
        "if not any(",
    ),
    Bug("a history without its validations", "loggers/records.py", "kind = tuple(record)", "kind = ()"),
    Bug(
        "a weight of 0 added in place",
        "_gradient/micro_gradient.py",
        "jax.lax.cond(jnp.asarray(loss.weight) != 0, backward, none, pending)",
        "backward(pending)",
    ),
    Bug(
        "sums of the window before gone on with",
        "_gradient/micro_gradient.py",
        "sums = weighted_sum.select(starts, jax.tree.map(jnp.zeros_like, sums), sums)",
        "pass",
    ),
    Bug("another call's callback", "_jax/eager.py", '"callback" not in eqn.primitive.name and ', ""),
    Bug(
        "a program of other numbers",
        "_jax/eager.py",
        "hashlib.sha256(text.encode()).digest(), types",
        "types",
    ),
    Bug("a program of other devices", "_jax/eager.py", ", tuple(_places(closed.jaxpr))", ""),
    Bug("a program of other keys", "_jax/eager.py", "digest(), types, tuple", "digest(), tuple"),
    Bug("profiles without layers", "_jax/jaxprs.py", " + eqn.source_info.name_stack", ""),
    Bug("references beside values", "_gradient/in_place_sums.py", "if stack <= fits", ""),
    Bug(
        "a stack used twice added in place", "_gradient/in_place_sums.py", " and uses[atom] == 1 for atom", " for atom"
    ),
    Bug("a loop's constant made beforehand", "_gradient/hoisting.py", "is_known and i >= whole", "is_known"),
    Bug("larger things made beforehand", "_gradient/hoisting.py", " and size(var) <= sum(map(size, origins))", ""),
    Bug(
        "the host's K kept from the state",
        "_multi_steps/host_driven.py",
        "state = set_every_k(state, assigned.every_k)",
        "pass",
    ),
    Bug("a host that counts from 0", "_multi_steps/host_driven.py", "_on_host(state.mini_step)", "0"),
    Bug("a host that ignores the state's K", "_multi_steps/host_driven.py", "_on_host(state.every_k)", "self._every_k"),
    Bug("a K that only one new state receives", "_multi_steps/host_driven.py", "self._built if is_as_built else ", ""),
    Bug("a K that overrules a checkpoint's", "_multi_steps/host_driven.py", " and every_k == self._built.every_k", ""),
    Bug(
        "a K that overrules the state's", "_multi_steps/host_driven.py", "position is None and every_k ==", "every_k =="
    ),
    Bug(
        "an assignment lost that comes during a call",
        "_multi_steps/host_driven.py",
        "self._last_written = mini_step, k.every_k, k.written",
        "self._last_written = mini_step, k.every_k, self._assigned",
    ),
    Bug("a K that only the next state receives", "_multi_steps/host_driven.py", "if k is None or k.", "if self._last_"),
    Bug("a host that reads every state", "_multi_steps/host_driven.py", "position or _Position(", "_Position("),
    Bug(
        "a host that forgets no state", "_multi_steps/host_driven.py", "functools.partial(self._facts.pop, key)", "None"
    ),
    Bug(
        "a rule that is not linear made beforehand",
        "_gradient/hoisting.py",
        " and linearity.unproved_in(eqn) is None",
        "",
    ),
    Bug("a rule hidden by a loop", "_jax/linearity.py", "else jaxprs.bodies(eqn)", "else ()"),
    Bug(
        "an offset taken for linear",
        "_jax/linearity.py",
        "_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 1, 2, 3",
        "_ZERO, _CONSTANT, _LINEAR, _OTHER = 0, 0, 2, 3",
    ),
    Bug(
        "another drive's sums taken over",
        "_multi_steps/host_driven.py",
        "state = stepping.cleared(state, self._clear)",
        "pass",
    ),
    Bug("replaced sums taken for cleared ones", "_multi_steps/host_driven.py", "ref() is x", "True"),
    Bug(
        "sums cleared before a call that raises",
        "_multi_steps/host_driven.py",
        "program.lower(*given, state, *args).compile()",
        "pass",
    ),
    Bug(
        "a program taken for compiled whatever the types",
        "_multi_steps/host_driven.py",
        "(program, signature) not in self._compiled",
        "program not in dict(self._compiled)",
    ),
    Bug(
        "a program taken for compiled wherever arrays lie",
        "_multi_steps/host_driven.py",
        "(x.aval, x.sharding, x.committed)",
        "x.aval",
    ),
    Bug("a flush that leaves its sums", "_multi_steps/host_driven.py", "stepping.cleared(state)\n", "state\n"),
    Bug(
        "a weight's dimensions in the order of the activation's",
        "_gradient/wide_products.py",
        "*(dimension for _, dimension in pairs)",
        "*contracted[side]",
    ),
    Bug(
        "a selected gradient in float32",
        "_gradient/micro_gradient.py",
        "not loss.has_weight and not replaces and",
        "True and",
    ),
    Bug(
        "a cast that is lost where a table is read",
        "_gradient/wide_products.py",
        "_Value(results[0], wide[0])",
        "_Value(*wide * 2)",
    ),
    Bug(
        "a second derivative that forgets the weight",
        "_gradient/wide_products.py",
        "*operands[side])",
        "jax.lax.stop_gradient(operands[side].array), operands[side].wide)",
    ),
    Bug(
        "small sums read from the wrong place",
        "_gradient/sum_packing.py",
        "zip(numbers, stack, strict",
        "zip(numbers[::-1], stack, strict",
    ),
    Bug("statistics packed with sums", "_gradient/sum_packing.py", " or overwrites.holds(path)", ""),
    Bug(
        "sums of several dtypes in a stack",
        "_gradient/sum_packing.py",
        "x.shape, x.dtype, varying",
        "x.shape, 0, varying",
    ),
    Bug(
        "prepared parameters that lag behind",
        "_multi_steps/stepping.py",
        "_, prepared = once_per_window.made(",
        "_ = once_per_window.made(",
    ),
    Bug(
        "a misspelt weight taken for an extra arg",
        "_multi_steps/misspelling.py",
        "if near is not None and",
        "if False and",
    ),
    Bug("an extra arg refused that a chain asks for", "_multi_steps/misspelling.py", "return value\n", "return ()\n"),
    Bug(
        "an extra arg refused that a factory's optimizer asks for",
        "_multi_steps/misspelling.py",
        'held["inner"] = ',
        "",
    ),
    Bug(
        "a factory's hyperparameters taken for extra args",
        "_multi_steps/misspelling.py",
        'held.pop("inner_factory")',
        'held["inner_factory"]',
    ),
    Bug(
        "a word of its own taken for a misspelling", "_multi_steps/misspelling.py", "name.lower() in _OWN_WORDS or", ""
    ),
    Bug(
        "a window of windows",
        "_multi_steps/checks.py",
        "if any(map(is_accumulating,",
        "if False and any(map(is_accumulating,",
    ),
    Bug("rounded up as often as not", "_sums/weighted_sum.py", "& jnp.uint32(0xFFFF)\n", "& jnp.uint32(0x7FFF)\n"),
    Bug(
        "a window that a hook's error leaves uncounted",
        "trainer/loop/windows.py",
        "while run.uncounted:  #",
        "while False:  #",
    ),
]


def plant(bug: Bug, folder: pathlib.Path) -> None:
    """Copies the package to `folder` with the bug in it."""
    shutil.copytree(ROOT / "jaxaccum", folder / "jaxaccum")
    path = folder / "jaxaccum" / bug.file
    source = path.read_text()
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: {bug.old!r} stands {source.count(bug.old)} times in {bug.file}, not once")
    path.write_text(source.replace(bug.old, bug.new))


def caught_by(bug: Bug) -> str | None:
    """The first test that fails on the bug, or None."""
    with tempfile.TemporaryDirectory() as folder:
        plant(bug, pathlib.Path(folder))
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                *(str(next((ROOT / "tests").rglob(t))) for t in bug.tests),
            ],
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
