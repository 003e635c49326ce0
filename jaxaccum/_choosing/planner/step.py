"""The step that is planned: a window's gradient and the optimizer's update, compiled for shapes of arrays."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum import task as _task
from jaxaccum._choosing.planner.result import Memory
from jaxaccum._devices.topology import MeshAxis, Sync
from jaxaccum._devices.zero import zero_sharding
from jaxaccum._multi_steps import checks, inner_update
from jaxaccum._sums import modules, weighted_sum
from jaxaccum._types import Tree
from jaxaccum._window.api import value_and_grad
from jaxaccum.task import Task

T = TypeVar("T")

_TOTAL_STEPS = 1_000_000  # For optimizers that are functions of them; their states don't depend on the number.


class Step(NamedTuple):
    """A step of K micro-batches, as a function of K. Trees hold shapes, with shardings if there is a mesh."""

    fun: Callable[..., Any]  # fun(params, *args)
    optimizer: optax.GradientTransformation
    params: Tree
    opt_state: Tree
    rest: Tree  # The leaves of an equinox module that are not trained; None if there are none.
    args: tuple[Tree, ...]  # (batch,), or (model state, batch, key) of a task.
    options: dict[str, Any]  # Of `value_and_grad`.

    def compiled(self, every_k: int) -> jax.stages.Compiled | None:
        """Compiles the step; None if the compiler runs out of memory."""
        window = value_and_grad(modules.whole(self.fun), every_k, **self.options)
        optimizer = inner_update.without_refused(optax.with_extra_args_support(self.optimizer), ["value"])

        def step(params, opt_state, rest, *args):
            args, others = modules.arguments(rest, args, {})
            value, grads, *_ = window(params, *args, **others)
            loss, *_ = jax.tree.leaves(value)
            updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
            return optax.apply_updates(params, updates), opt_state, value

        held = self.params, self.opt_state
        kept = jax.tree.map(lambda x: x.sharding, held)
        # The arrays exist whether or not the loss uses them.
        jitted = jax.jit(step, donate_argnums=(0, 1), keep_unused=True, out_shardings=(*kept, None))
        lowered = jitted.lower(*held, self.rest, *self.args)
        return if_there_is_memory(lowered.compile)  # A compiler for GPUs runs kernels, to time them.

    def fixed(self) -> Memory:
        """Returns the memory of one device that doesn't depend on K."""
        *state, batch = self.args[: self.options["batch_argnums"]]
        return Memory(
            *map(_bytes, ((self.params, self.rest, *state), self.opt_state, batch, self._sums())), activations=0
        )

    def memory(self, compiled: jax.stages.Compiled | None) -> Memory | None:
        """Returns the peak memory of one device; activations are what the other kinds leave of it."""
        if compiled is None:
            return None
        sizes, fixed = compiled.memory_analysis(), self.fixed()
        assert sizes is not None
        new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        peak = sizes.argument_size_in_bytes + new + sizes.temp_size_in_bytes
        # K = 1 needs no sums, and may hold less than the gradient at once.
        fixed = fixed._replace(sums=min(fixed.sums, sizes.temp_size_in_bytes))
        return fixed._replace(activations=peak - fixed.total)

    def is_sharded_over_data(self) -> bool:
        """Whether the data axes shard parameters, as with FSDP."""
        return _bytes(self._whole_params()) > _bytes(self.params)

    def _sums(self) -> Tree:
        """Returns the shapes of one device's sums."""
        dtype = self.options.get("accumulator_dtype", jnp.float32)
        leaf = lambda x: x.update(dtype=weighted_sum.sum_dtype(x.dtype, dtype))
        return jax.tree.map(leaf, self._whole_params())

    def _whole_params(self) -> Tree:
        """Returns the shapes of the parameters, gathered over the data axes."""
        data_axes = self.options.get("data_axis", ())

        def leaf(x):
            if x.sharding is None:
                return x
            entries = [entry if isinstance(entry, tuple) else (entry,) for entry in x.sharding.spec]
            others = [tuple(name for name in entry if name and name not in data_axes) for entry in entries]
            return x.update(sharding=NamedSharding(x.sharding.mesh, P(*[names or None for names in others])))

        return jax.tree.map(leaf, self.params)


def of(
    task_or_loss: Any,
    params: Tree,
    batch: Tree,
    optimizer: Any,
    examples: int,
    sync: Sync,
    options: Any,
) -> Step:
    """Returns the step for windows of `examples` examples, given an example batch of any length."""
    mesh = sync.mesh if isinstance(sync, MeshAxis) else None
    common = None if mesh is None else NamedSharding(mesh, P())
    split = None if mesh is None else NamedSharding(mesh, P(sync.names))
    rows = lambda x: x.update(shape=(examples, *x.shape[1:]))
    whole = jax.tree.map(rows, shaped(batch, split))
    args = (whole,)
    options = {"batch_argnums": 1, **options, **sync.options()}
    if isinstance(task_or_loss, Task):
        task, key = task_or_loss, jax.eval_shape(lambda: jax.random.key(0))
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch)):
            made = jax.eval_shape(functools.partial(_task.initial, task), key, batch)
        else:  # As in a run, `init` may read the numbers.
            made = jax.eval_shape(functools.partial(_task.initial, task, batch=batch), key)
        params, model_state = made if params is None else (params, made[1])
        args = shaped(model_state, common), whole, shaped(key, common)
        options |= {"batch_argnums": 2, "carry_argnums": 1, "key_argnums": 3}
        if optimizer is None:
            optimizer = _task.optimizer(task, _TOTAL_STEPS if _task.needs_total_steps(task) else None)
        task_or_loss = functools.partial(_loss_and_state, task)
    params, rest = (shaped(tree, common) for tree in modules.parted(params))
    initial = jax.eval_shape(optimizer.init, params)
    checks.inner_state(initial)
    opt_state = _like_params(initial, params, common)
    step = Step(task_or_loss, optimizer, params, opt_state, rest, args, options)
    return scattered(step) if options.get("reduce") == "scatter" else step


def scattered(step: Step) -> Step:
    """Returns the step with `reduce="scatter"`, whose optimizer state is sharded over the data axes."""
    mesh, data_axis = step.options["mesh"], step.options["data_axis"]
    shardings = zero_sharding(step.opt_state, mesh, data_axis)
    opt_state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), step.opt_state, shardings)
    return step._replace(opt_state=opt_state, options=step.options | {"reduce": "scatter"})


def rematerialised(step: Step) -> Step:
    """Returns the step with `jax.checkpoint` of the loss, which saves products with parameters."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def fun(params, *args):
        trained, rest = modules.parted(params)
        of_trained = lambda trained, *args: step.fun(modules.combined(trained, rest), *args)
        return jax.checkpoint(of_trained, policy=policy)(trained, *args)

    return step._replace(fun=fun)


def shaped(tree: Tree, default: NamedSharding | None) -> Tree:
    """Returns the shapes of arrays with their shardings; arrays that are not on a mesh get `default`."""

    def leaf(x, aval):
        own = getattr(x, "sharding", None)
        is_on_mesh = isinstance(own, NamedSharding) and isinstance(own.mesh, Mesh)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=own if is_on_mesh else default)

    return jax.tree.map(leaf, tree, jax.eval_shape(lambda tree: tree, tree))


def if_there_is_memory(fun: Callable[[], T]) -> T | None:
    """Returns `fun()`, or None if the device runs out of memory."""
    try:
        return fun()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _like_params(state: Tree, params: Tree, default: NamedSharding | None) -> Tree:
    """Gives arrays of the optimizer's state the sharding of the parameter whose path theirs ends with."""
    known = dict(jax.tree_util.tree_leaves_with_path(params))

    def leaf(path, x):
        ends = (known.get(path[start:]) for start in range(len(path) + 1))
        like = next((end for end in ends if end is not None), None)
        sharding = like.sharding if like is not None and like.shape == x.shape else default
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map_with_path(leaf, state)


def _loss_and_state(task, params, model_state, batch, key):
    """A task's loss in the form that `value_and_grad` takes, without its metrics."""
    value, model_state, _ = _task.evaluate(task, params, model_state, batch, key)
    return value, model_state


def _bytes(tree: Tree) -> int:
    """Returns the bytes that one device holds of `tree`."""

    def leaf(x):
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(leaf, jax.tree.leaves(tree)))
