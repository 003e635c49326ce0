"""Times compiled steps on the devices."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._choosing.planner.step import Step
from jaxaccum._types import Tree

WINDOWS = 2


def seconds(step: Step, compiled: jax.stages.Compiled, batch: Tree) -> float:
    """Returns the time of a window.

    Parameters and state are zeros, and the batch repeats the examples of `batch`, unless those are shapes.
    """
    *held, rest = jax.tree.map(_zeros, (step.params, step.opt_state, step.rest))
    *state, whole = step.args[: step.options["batch_argnums"]]
    args = [*jax.tree.map(_zeros, state), jax.tree.map(_repeated, whole, batch)]
    args += [jax.device_put(jax.random.key(0), key.sharding) for key in step.args[len(args) :]]
    times = []
    for _ in range(1 + WINDOWS):  # The first is slower.
        start = time.perf_counter()
        *held, _ = jax.block_until_ready(compiled(*held, rest, *args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)


def _repeated(shape: jax.ShapeDtypeStruct, example: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> jax.Array:
    if isinstance(example, jax.ShapeDtypeStruct):
        return _zeros(shape)
    return jax.device_put(np.resize(np.asarray(example, shape.dtype), shape.shape), shape.sharding)
