"""The extra args that the inner optimizer receives as the window's weighted mean."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._multi_steps import checks
from jaxaccum._multi_steps.config import Config
from jaxaccum._sums import weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


def zero_sums(config: Config) -> dict[str, Weighted]:
    """The sums of an empty window."""
    zeros = lambda shape, dtype: jnp.zeros(shape, weighted_sum.promoted(dtype, weighted_sum.weight_dtype()))
    totals = {name: zeros((), jnp.float32) for name in config.averaged_extra_args}
    for name, shapes in config.averaged_shapes:
        totals[name] = jax.tree.map(lambda x: zeros(x.shape, x.dtype), shapes.tree)
    return {name: Weighted(total, zeros((), jnp.float32)) for name, total in totals.items()}


def given(config: Config, extra_args: dict[str, Any]) -> dict[str, Tree]:
    """Those in `extra_args`."""
    return {name: extra_args[name] for name in config.averaged_extra_args if extra_args.get(name) is not None}


def check(config: Config, values: dict[str, Tree]) -> None:
    """Checks this micro-step's values against `averaged_extra_args`."""
    shapes = dict(config.averaged_shapes)
    for name, value in values.items():
        if name in shapes:
            checks.averaged_tree(name, value, shapes[name].tree, config.sync.shape)
        else:
            checks.averaged(name, value, config.sync.shape)


def mean(sums: Weighted, value: Tree) -> Tree:
    """The window's mean of an extra arg, at least as wide as `value`; NaN if the total weight is 0."""
    leaf = lambda mean, x: jnp.where(sums.weight == 0, jnp.nan, mean).astype(_mean_dtype(x))
    return jax.tree.map(leaf, weighted_sum.mean(sums, sums.total), value)


def zero_means(config: Config, extra_args: dict[str, Any]) -> dict[str, Tree]:
    """Zeros like the means of those in `extra_args`."""
    trees = {name: shapes.tree for name, shapes in config.averaged_shapes}

    def zeros(name, value):
        like = trees[name] if name in trees else jax.ShapeDtypeStruct((), jnp.result_type(value))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, _mean_dtype(x)), like)

    return {name: zeros(name, value) for name, value in given(config, extra_args).items()}


def _mean_dtype(value: Any) -> Any:
    return weighted_sum.promoted(jnp.result_type(value), jnp.float32)
