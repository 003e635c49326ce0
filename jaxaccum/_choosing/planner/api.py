"""`plan`: its arguments, their checks, and the order in which sizes are compiled, timed and compared."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum import _calls
from jaxaccum._choosing.planner import search, target, timing
from jaxaccum._choosing.planner import step as _step
from jaxaccum._choosing.planner.result import Memory, Plan, Trial
from jaxaccum._choosing.planner.step import Step
from jaxaccum._devices import placement
from jaxaccum._devices.topology import MeshAxis, Sync
from jaxaccum._integers import as_int, positive_int
from jaxaccum._sums import modules, norms, numeric
from jaxaccum._types import Tree
from jaxaccum._window.api import value_and_grad
from jaxaccum.task import Task, is_transformation

# The part of a device's memory that a plan uses by default: the runtime needs some besides the program.
SHARE = 0.98
TIMED = 4  # The largest sizes that fit are timed.
# Options of `value_and_grad`, besides positions of arguments.
_REFUSED = ("num_micro_batches", "stacked", "axis_name")


def plan(
    task_or_loss: Any,
    params: Tree,
    batch: Tree,
    optimizer: Any = None,
    target_batch_size: int = 512,
    mesh: Any = None,
    memory_limit: float | None = None,
    *,
    data_axis: Any = "data",
    reduce: str = "mean",
    alternatives: bool = False,
    measure: bool = False,
    **options: Any,
) -> Plan:
    """Finds the largest micro-batch that fits in memory, and the K that makes a window of the target size.

    It compiles the step below for up to 6 sizes, and adds up the memory that the compiler plans for each. Nothing runs
    and no array is allocated, so that it can't run out of memory:

        value, grads = jaxaccum.value_and_grad(loss, every_k, mesh=mesh, ...)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    in one jit that donates `params` and `opt_state`, with `target_batch_size` examples in `batch`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxaccum
      >>> def loss(params, x):
      ...     for matrix in params:
      ...         x = jnp.tanh(x @ matrix)
      ...     return jnp.mean(x**2)
      >>> params = [jax.ShapeDtypeStruct((64, 64), jnp.float32)] * 4
      >>> batch = jax.ShapeDtypeStruct((1, 64), jnp.float32)
      >>> plan = jaxaccum.plan(loss, params, batch, optax.adam(1e-3), target_batch_size=512, memory_limit=480_000)
      >>> plan.micro_batch_size, plan.every_k
      (32, 16)
      >>> plan.memory.parameters, plan.memory.optimizer, plan.memory.sums
      (65536, 131076, 65536)
      >>> [trial.micro_batch_size for trial in plan.trials if not trial.fits]
      [64]

    Args:
      task_or_loss: `loss(params, batch)`, as for `value_and_grad`, or a `Task`.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`s), or a whole equinox module, whose floating
        arrays are trained. For a `Task` None means what its `init` makes. With `mesh`, they are replicated, except for
        those that have a `NamedSharding`.
      batch: an example batch, arrays or shapes with any one leading length.
      optimizer: an optax transformation; None for the one of a `Task`, made for 1,000,000 `total_steps` if it is a
        function of them. Its state lies as the parameters do, or with `reduce="scatter"` as `zero_sharding` says.
      target_batch_size: the examples of a window, P·N·K with `mesh`, else N·K.
      mesh: a `jax.sharding.Mesh`, as for `value_and_grad`. N and all memory are then those of one device.
      memory_limit: bytes of one device, such as 16e9. None means 98% of the least `bytes_limit` that the devices'
        `memory_stats()` report.
      data_axis: the mesh's data axis, as for `value_and_grad`; P is its size.
      reduce: "mean" or "scatter", as for `value_and_grad`.
      alternatives: whether to compile the chosen size with each of these changes, for `Plan.alternatives`:
        `jax.checkpoint` of the loss, which saves products with parameters and recomputes everything else (policy
        `dots_with_no_batch_dims_saveable`); `prepare="auto"`; `accumulator_dtype=bfloat16`; and with `mesh`, if its
        data axes don't shard the parameters, `reduce="scatter"`.
      measure: whether to time windows on the devices, and to choose the fastest size instead of the largest. It
        compiles, and runs for 3 windows, the 4 largest sizes that fit, and those that were compiled before. Arrays of
        zeros are allocated for that. Sizes for which there is no room beside other arrays are not timed.
      **options: further options of `value_and_grad`, for example `prepare`, `accumulator_dtype` and `has_aux`. With
        `gradient_norms="noise"` on one device K is at least 2.

    Returns:
      A `Plan` with `micro_batch_size` (N), `every_k` (K), `devices` (P), `memory_limit`, `memory` (the peak's bytes by
      kind: `parameters`, `optimizer`, `batch`, `sums`, `activations`; `total`), `trials` (each size that was compiled)
      and `alternatives`. `str(plan)` is a table, and `plan.plot(path)` draws it with matplotlib. The next larger size
      was compiled too and does not fit, unless the target has more than 32 divisors and the search ended before.

    Raises:
      TypeError, ValueError: for an invalid argument; for a target that is not a multiple of the devices; for batch
        leaves of different lengths; if there is no `memory_limit` and the devices don't report theirs (CPUs don't); and
        if even N = 1 does not fit, with the bytes by kind.
    """
    sync = placement.select_sync(None, mesh, data_axis, reduce=reduce)
    _calls.check_keywords("plan", options, value_and_grad)
    _check_loss(task_or_loss, params, optimizer, options)
    examples = positive_int(target_batch_size, "target_batch_size", note="")
    each = target.split(examples, sync.size(), "the number of devices")
    limit = _limit(memory_limit, sync)
    _check_batch(batch)
    step = _step.of(task_or_loss, params, batch, optimizer, examples, sync, options)
    sizes = target.divisors(each)
    if options.get("gradient_norms") == "noise" and sync.size() == 1:
        norms.check_two_sizes("target_batch_size", each, devices=1)
        sizes.remove(each)
    planner = _Planner(lambda n: (step, each // n), sizes, limit)
    chosen = planner.largest()
    if measure:
        chosen = planner.fastest(chosen, batch)
    return Plan(
        micro_batch_size=chosen,
        every_k=each // chosen,
        devices=sync.size(),
        memory_limit=limit,
        trials=tuple(trial for _, trial in sorted(planner.trials.items())),
        alternatives=planner.alternatives(chosen) if alternatives else {},
    )


def check_loader(task: Task, batch: Tree, n: int, window: int, sync: Sync, sharing: int, most: int) -> None:
    """Raises ValueError if a step of a loader's batches of `n` examples needs more memory than a device has.

    A window has `window` examples of the loader, and up to `most` of its batches are on the devices at once. `sharing`
    devices share a batch. It compiles once. Nothing is checked if a device doesn't report its memory, or if the leaves
    of the batch differ in length.
    """
    limit = _device_limit(sync)
    if limit is None or not _has_one_length(batch):
        return

    def sized(n: int) -> tuple[Step, int]:
        every_k = min(window // n, most)
        examples = -(-n // sharing) * sync.size() * every_k
        return _step.of(task, None, batch, None, examples, sync, {}), every_k

    planner = _Planner(sized, [size for size in target.divisors(window) if size <= n], limit)
    if planner.fits(n):
        return
    raise ValueError(
        f"a micro-step of the loader's N = {n} examples takes {_said(planner.trials[n].memory)} on each device, and "
        f"the memory limit is {limit:,} bytes; the largest N that fits and makes target_batch_size is "
        f"{planner.largest()}: pass a loader of such batches."
    )


class _Planner:
    """Compiles steps of some sizes; `sized` returns the step of a size, and its K."""

    def __init__(self, sized: Callable[[int], tuple[Step, int]], sizes: Sequence[int], limit: int):
        self._sized, self._sizes, self._limit = sized, sizes, limit
        self._compiled: dict[int, jax.stages.Compiled] = {}
        self.trials: dict[int, Trial] = {}

    def largest(self) -> int:
        """Returns the largest size that fits, or raises ValueError."""
        smallest = self._sizes[0]
        fixed = self._sized(smallest)[0].fixed()
        arguments = fixed._replace(sums=0)
        if arguments.total > self._limit:
            raise ValueError(
                f"the arguments of a step take {_said(arguments)} {self._of_limit}; a smaller target_batch_size or "
                "more devices may take less."
            )
        found = search.largest(self._sizes, self._limit, fixed.total, self._peak)
        if found is None:
            memory = self.trials[smallest].memory
            raise ValueError(
                f"a step with N = {smallest} takes {_said(memory)} {self._of_limit}; jax.checkpoint of the loss, a "
                "smaller accumulator_dtype or more devices may take less."
            )
        return found

    def fits(self, n: int) -> bool:
        """Compiles size `n`."""
        self._peak(n)
        return self.trials[n].fits

    def fastest(self, largest: int, batch: Tree) -> int:
        """Times sizes up to `largest` and returns the fastest; `largest` if there is room for none of them."""
        fitting = [n for n in self._sizes if n <= largest]
        for n in sorted({*fitting[-TIMED:], *self.trials}):
            if self.fits(n):
                timed = functools.partial(timing.seconds, self._sized(n)[0], self._compiled[n], batch)
                self.trials[n] = self.trials[n]._replace(seconds=_step.if_there_is_memory(timed))
        times = {n: trial.seconds for n, trial in self.trials.items() if trial.seconds is not None}
        return min(times, key=times.__getitem__, default=largest)

    def alternatives(self, n: int) -> dict[str, Memory | None]:
        """Returns the memory of size `n` with other options."""
        step, every_k = self._sized(n)
        with_options = lambda **options: step._replace(options=step.options | options)
        others = {
            "jax.checkpoint": _step.rematerialised(step),
            'prepare="auto"': with_options(prepare="auto"),
            "accumulator_dtype=bfloat16": with_options(accumulator_dtype=jnp.bfloat16),
        }
        if "mesh" in step.options and not step.is_sharded_over_data():
            others['reduce="scatter"'] = _step.scattered(step)
        return {name: other.memory(other.compiled(every_k)) for name, other in others.items()}

    def _peak(self, n: int) -> int | None:
        """Compiles size `n`, once, and returns its peak; None if the compiler runs out of memory."""
        if n not in self.trials:
            step, every_k = self._sized(n)
            compiled = step.compiled(every_k)
            memory = step.memory(compiled)
            if compiled is not None:
                self._compiled[n] = compiled
            fits = memory is not None and memory.total <= self._limit
            self.trials[n] = Trial(n, every_k, memory, fits)
        memory = self.trials[n].memory
        return None if memory is None else memory.total

    @property
    def _of_limit(self) -> str:
        return f"on each device, and the memory limit is {self._limit:,} bytes"


def _limit(memory_limit: Any, sync: Sync) -> int:
    """Returns the bytes that a step may take on each device."""
    if memory_limit is not None:
        whole = isinstance(memory_limit, float) and memory_limit.is_integer()  # 16e9 is valid.
        limit = as_int(int(memory_limit) if whole else memory_limit, "memory_limit", "a whole number of bytes")
        if limit < 1:
            raise ValueError(f"memory_limit must be a number of bytes above 0, got {limit}.")
        return limit
    limit = _device_limit(sync)
    if limit is None:
        raise ValueError("the devices do not report how much memory they have: pass memory_limit, in bytes.")
    return limit


def _device_limit(sync: Sync) -> int | None:
    """Returns the bytes that a step may take on each device by default; None if a device doesn't report its memory."""
    devices = sync.mesh.local_devices if isinstance(sync, MeshAxis) else jax.local_devices()[:1]
    stats = [device.memory_stats() or {} for device in devices]
    known = all("bytes_limit" in x for x in stats)
    return int(SHARE * min(x["bytes_limit"] for x in stats)) if known else None


def _check_batch(batch: Tree) -> None:
    if not _has_one_length(batch):
        shapes = {jax.tree_util.keystr(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
        raise ValueError(f"the leaves of batch must have one leading length, got shapes {shapes}.")


def _has_one_length(batch: Tree) -> bool:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    return len(lengths) == 1 and lengths != {()}


def _check_loss(task_or_loss: Any, params: Tree, optimizer: Any, options: dict[str, Any]) -> None:
    is_task = isinstance(task_or_loss, Task)
    if params is None and not is_task:
        raise TypeError(
            "params=None is for a Task, which makes its own: pass the parameters or their shapes, or "
            "for a flax model a linen_task or an nnx_task."
        )
    if not is_task:
        _calls.positional("task_or_loss", task_or_loss, "params", "batch")
    if not (is_transformation(optimizer) or (optimizer is None and is_task)):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {numeric.kind(optimizer)}. The batch is one "
            "argument: pass several arrays as one tree, such as {'x': x, 'y': y}."
        )
    refused = [name for name in options if name.endswith("argnums") or name in _REFUSED]
    if refused:
        raise TypeError(
            f"plan takes no {', '.join(refused)}: it chooses K, and the loss is loss(params, batch). Close over other "
            "arguments, such as a key, put several arrays of a batch in one tree, and pass mesh for several devices."
        )
    if is_task:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(modules.trained(params)):
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)):
            raise TypeError(
                f"params{numeric.path_name(path)} is no floating array but {leaf!r:.60}: close over it in the loss. "
                "For a flax model pass a linen_task or an nnx_task, and None for params."
            )


def _said(memory: Memory | None) -> str:
    if memory is None:
        return "more than the compiler could get"
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in memory._asdict().items() if size)
    return f"{memory.total:,} bytes ({kinds})"
