"""Converts the state of `optax.MultiSteps`."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices.topology import MeshAxis, Sync
from jaxaccum._multi_steps import checks, initial_state
from jaxaccum._multi_steps.api import MultiSteps, config_of
from jaxaccum._multi_steps.config import Config
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import numeric, overwrites, weighted_sum
from jaxaccum._types import Tree


def from_optax(tx: MultiSteps, state: Any) -> MultiStepsState:
    """Converts a state of `optax.MultiSteps` to one of `tx`, in mid-window too.

    Training then goes on as `optax.MultiSteps` would have, if `tx` has the same optimizer, K, `use_grad_mean` and
    `should_skip_update_fn`. optax keeps the running mean of a window's gradients, or with `use_grad_mean=False` their
    sum; `tx` keeps the sum and its weight. Each pending micro-batch has weight 1. To give the others weights of another
    scale, such as numbers of tokens, convert at a window's end.

    What optax does not keep starts at 0: averaged extra args and `gradient_norms="all"` are those of the window's other
    micro-batches.

    Example:
      >>> import jax.numpy as jnp, optax, jaxaccum
      >>> old = optax.MultiSteps(optax.sgd(1.0), 4)
      >>> params = jnp.array(0.0)
      >>> updates, state = old.update(jnp.array(2.0), old.init(params), params)
      >>> tx = jaxaccum.MultiSteps(optax.sgd(1.0), 4)
      >>> state = jaxaccum.from_optax(tx, state)
      >>> for grad in (4.0, 6.0, 8.0):
      ...     params, state = tx.apply(params, state, jnp.array(grad))
      >>> print(params)
      -5.0

    Args:
      tx: on one device, with `mesh=` or with `axis_name=`. The gradients in `state` must be those of all devices, as a
        script that reduces them in every micro-step accumulates them: each device continues with a copy. With
        `axis_name=` pass the state of one device and replicate the result as that of `init`. `prepare=` is not
        supported, because its sums are of other gradients.
      state: an `optax.MultiStepsState`; or a tuple or a dict with its fields, as orbax and `flax.serialization` restore
        it without a target, if the parameters are nested dicts; or the `opt_state` of an `nnx.Optimizer`.

    Returns:
      The state of `tx`. It shares arrays with `state`: donate one of the two. It holds no variables of nnx. Write it to
      a new `nnx.Optimizer` with `nnx.update(optimizer.opt_state, nnx.state(state))`; for `jaxaccum.flax.HostDriven`
      pass `jax.tree.unflatten(jax.tree.structure(step.init(model)), jax.tree.leaves(state))`. Sums have the dtype that
      `init` gives to parameters with the dtypes of `state.acc_grads`.

    Raises:
      TypeError: if `tx` is not a `jaxaccum.MultiSteps`, or `state` not a state of `optax.MultiSteps`.
      ValueError: if the inner state or the skip state is not of the structure and shapes that `tx` has, if
        `state.mini_step` is not below K, if the state is replicated, or if `tx` has `prepare=`.
    """
    if not isinstance(tx, MultiSteps):
        raise TypeError(
            f"tx must be a jaxaccum.MultiSteps, got a {type(tx)}: build it as the optax.MultiSteps was, with "
            "jaxaccum.MultiSteps(opt, every_k_schedule)."
        )
    config = config_of(tx)
    if config.prepare is not None:
        raise ValueError(
            f"tx has prepare={config.prepare!r}, whose sums are of gradients with respect to what it returns; those in "
            "state are of the parameters. Build tx without prepare=."
        )
    return _converted(config, jax.tree.map(_on_devices(config.sync), _optax_state(_without_variables(state))))


def _converted(config: Config, state: optax.MultiStepsState) -> MultiStepsState:
    mini_step, gradient_step = (jnp.asarray(x, jnp.int32) for x in (state.mini_step, state.gradient_step))
    _check_counter(config, mini_step, gradient_step)
    acc_grads = state.acc_grads
    numeric.available("accumulator_dtype", config.accumulator_dtype)
    like = jax.eval_shape(lambda acc: config.opt.init(overwrites.optimized(acc)), acc_grads)
    checks.inner_state(like)
    inner = _in_tree_of(like, state.inner_opt_state, "inner_opt_state", "opt")

    empty = weighted_sum.zeros(acc_grads, config.accumulator_dtype)
    weight = mini_step.astype(weighted_sum.weight_dtype())
    # A mean is the sum of one micro-batch that weighs as much as all.
    sums = weighted_sum.add(empty, acc_grads, weight if config.use_grad_mean else None, keep=mini_step > 0)
    new = initial_state.around(config, acc_grads, inner, sums)
    skip_state = new.skip_state
    if jax.tree.leaves(state.skip_state) and config.should_skip_update_fn is not None:
        skip_state = _in_tree_of(skip_state, state.skip_state, "skip_state", "should_skip_update_fn")
    new = new._replace(
        mini_step=mini_step,
        gradient_step=gradient_step,
        skip_state=skip_state,
        weight=config.sync.local(weight),
        updated=(mini_step == 0) & (gradient_step > 0),
    )
    return initial_state.settled(config, new, ())


def _without_variables(state: Any) -> Any:
    """`state` with the values of nnx's variables in their places. Flax itself is not imported."""
    variable = getattr(sys.modules.get("flax.nnx"), "Variable", ())
    is_variable = lambda node: isinstance(node, variable)
    return jax.tree.map(lambda x: jax.tree.leaves(x)[0] if is_variable(x) else x, state, is_leaf=is_variable)


def _optax_state(state: Any) -> optax.MultiStepsState:
    """`state` with its fields by name."""
    names = optax.MultiStepsState._fields
    if isinstance(state, optax.MultiStepsState):
        return state
    if isinstance(state, Mapping) and {*names} >= {*state} >= {*names} - {"skip_state"}:
        # A checkpoint has no entry for an empty skip_state.
        return optax.MultiStepsState(**state)
    if type(state) in (tuple, list) and len(state) == len(names):
        return optax.MultiStepsState(*state)
    raise TypeError(
        f"state must be an optax.MultiStepsState, or a tuple or dict with its fields {names}, got a {type(state)}. In "
        "a chain's state it is the entry of optax.MultiSteps; a state of jaxaccum.MultiSteps needs no conversion."
    )


def _check_counter(config: Config, mini_step: jax.Array, gradient_step: jax.Array) -> None:
    """Checks that the state is that of one device and that its window is open for K, if they are known."""
    if mini_step.ndim:
        raise ValueError(
            f"state.mini_step must be a scalar, got shape {mini_step.shape}: the state is replicated. Pass that of one "
            "device, jax.tree.map(lambda x: x[0], state), and replicate what from_optax returns."
        )
    if isinstance(mini_step, jax.core.Tracer):
        return
    k = int(config.every_k(gradient_step) if callable(config.every_k) else config.every_k)
    if not 0 <= int(mini_step) < k:
        raise ValueError(
            f"state.mini_step={int(mini_step)} is not a position in a window of every_k_schedule={k}: build tx with "
            "the K of the optax.MultiSteps, and change it afterwards with jaxaccum.set_every_k."
        )


def _in_tree_of(like: Tree, given: Tree, name: str, made_by: str) -> Tree:
    """The leaves of `given` in the tree of `like`, found by their paths, whatever containers are on them."""
    want, got = _by_path(like), _by_path(given)
    shapes, found = ({path: jnp.shape(x) for path, x in leaves.items()} for leaves in (want, got))
    differ = [
        f"{path}: {found.get(path, 'nothing')} in place of {shapes.get(path, 'nothing')}"
        for path in {**shapes, **found}
        if found.get(path) != shapes.get(path)
    ]
    if differ:
        raise ValueError(
            f"state.{name} is not that of the {made_by} of tx, at {name}{differ[0]} ({len(differ)} such leaves): build "
            f"tx with the {made_by} that the optax.MultiSteps had."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [got[path] for path in want])


def _by_path(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths, of which names and numbers count: `x.mu[0]` is x["mu"]["0"] in a checkpoint."""
    part = lambda key: str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"".join(f"/{part(key)}" for key in path): leaf for path, leaf in leaves}


def _on_devices(sync: Sync) -> Any:
    """Makes arrays of leaves, as from a checkpoint, and replicates over a mesh those that lie elsewhere."""

    def leaf(x):
        x = jnp.asarray(x)
        if not isinstance(sync, MeshAxis) or isinstance(x, jax.core.Tracer):
            return x
        is_there = isinstance(x.sharding, NamedSharding) and x.sharding.device_set == set(sync.mesh.devices.flat)
        return x if is_there else jax.device_put(x, NamedSharding(sync.mesh, P()))

    return leaf
