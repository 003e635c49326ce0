"""The state of a `MultiSteps` before the first micro-step."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._devices import placement
from jaxaccum._devices.topology import MeshAxis
from jaxaccum._gradient import once_per_window
from jaxaccum._multi_steps import averaged_args, checks, norms
from jaxaccum._multi_steps.config import Config
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import modules, numeric, overwrites, weighted_sum
from jaxaccum._types import Tree


def init(config: Config, params: Tree) -> MultiStepsState:
    """A state with an empty window. No two leaves of the state and `params` share a buffer."""
    params = modules.trained(params)
    numeric.available("accumulator_dtype", config.accumulator_dtype)
    numeric.arrays(params)
    placement.placed(params, config.sync)
    seen, prepared = params, ()
    if config.prepare is not None:
        numeric.differentiable(params)
        once_per_window.check_linear(config.prepare, params)
        seen, prepared = once_per_window.compute(config.prepare, params)
    inner = config.opt.init(overwrites.optimized(params))
    state = around(config, params, inner, weighted_sum.init(seen, config.accumulator_dtype))
    return settled(config, state._replace(prepared=prepared), params)


def around(config: Config, params: Tree, inner: Tree, sums: Tree) -> MultiStepsState:
    """A state with these pending sums and an inner optimizer's state `inner`, in the layouts that steps keep."""
    checks.inner_state(inner)
    gradient_step = jnp.zeros((), jnp.int32)
    if callable(config.every_k):
        checks.scheduled_k(config.every_k(gradient_step))
    skip_state = ()
    if config.should_skip_update_fn is not None:
        optimized = overwrites.optimized(params)
        grads = jax.tree.map(jnp.zeros_like, optimized)
        _, skip_state = config.should_skip_update_fn(grads, gradient_step, optimized)
    local = config.sync.local
    return MultiStepsState(
        mini_step=jnp.zeros((), jnp.int32),
        gradient_step=gradient_step,
        inner_opt_state=_laid_out(config, inner, params),
        acc_grads=local(sums),
        skip_state=skip_state,
        weight=local(jnp.zeros((), weighted_sum.weight_dtype())),
        averages=local(averaged_args.zero_sums(config)),
        every_k=None if callable(config.every_k) else jnp.full((), config.every_k, jnp.int32),
        updated=jnp.zeros((), jnp.bool_),
        dropped=local(jnp.zeros((), jnp.int32)),
        norms=norms.zeros(config),
    )


def settled(config: Config, state: MultiStepsState, params: Tree) -> MultiStepsState:
    """`state` on its devices. No two leaves of it and `params` share a buffer."""
    return config.sync.settled(_unshared(state, params))


def _laid_out(config: Config, inner: Tree, params: Tree) -> Tree:
    """The inner optimizer's state, in the layout that its updates keep."""
    if not isinstance(config.sync, MeshAxis):
        return inner
    # Under jit, optax's zeros lose the parameters' sharding over Explicit axes.
    return config.sync.spread(_like_params(config.sync, inner, overwrites.optimized(params)))


def _like_params(sync: MeshAxis, state: Tree, params: Tree) -> Tree:
    """Lays out each leaf of `state` like the parameter whose shape it has and whose path its own path ends in."""
    param_at = dict(jax.tree_util.tree_leaves_with_path(params))

    def leaf(path, x):
        owners = (param_at[path[i:]] for i in range(len(path) + 1) if path[i:] in param_at)
        owner = next(owners, None)
        return sync.like(x, owner) if owner is not None and jnp.shape(owner) == jnp.shape(x) else x

    return jax.tree.map_with_path(leaf, state)


def _unshared(state: Tree, params: Tree) -> Tree:
    """Copies every array in `state` that is also elsewhere in it or in `params`, so that both can be donated."""
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def leaf(x: Any) -> Any:
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(leaf, state)
