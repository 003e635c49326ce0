"""Calls the inner optimizer on the exact mean and returns the dtypes it would have without accumulation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum._sums import overwrites, weighted_sum
from jaxaccum._sums.overwrites import New
from jaxaccum._sums.weighted_sum import is_inexact
from jaxaccum._types import Tree


def update(
    opt: optax.GradientTransformationExtraArgs,
    mean: Tree,
    grads: Tree,
    state: Tree,
    params: Tree | None,
    extra_args: dict[str, Any],
    wide: Any,
) -> tuple[Tree, Tree]:
    """Calls `opt.update` on `mean`, whose dtypes may be wider than the gradients'.

    Statistics that are overwritten (see `overwrites`) bypass the optimizer: their update is a `New` with their mean.

    If the mean is wider, the optimizer's floating state and the parameters are cast to `wide` for the call, so that the
    mean is not rounded. The results are cast back: the state to its own dtypes, and the updates to those that `opt`
    returns for `grads`.

    Args:
      opt: the inner optimizer.
      mean: the window's mean gradient.
      grads: arrays or shapes with the dtypes of the gradients without accumulation.
      state: the inner optimizer's state.
      params: the parameters, or None.
      extra_args: the inner optimizer's extra args; an extra arg `grad` is replaced by `mean`.
      wide: the dtype to cast to.

    Returns:
      (updates, new inner state).
    """
    statistics = overwrites.only(mean)
    mean, grads, params = map(overwrites.optimized, (mean, grads, params))
    if all(jax.tree.leaves(jax.tree.map(lambda m, g: m.dtype == g.dtype, mean, grads))):
        updates, new_state = opt.update(mean, state, params, **_with_grad(extra_args, mean))
    else:
        shapes = _shapes(opt, grads, state, params, extra_args)
        extra_args = _with_grad(extra_args, mean)
        updates, new_state = opt.update(mean, _lift(state, wide), _lift(params, wide), **extra_args)
        updates = _cast_like(updates, shapes)
    return overwrites.with_new(updates, statistics), _cast_like(new_state, state)


def without_refused(
    opt: optax.GradientTransformationExtraArgs, names: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """`opt`, called without those extra args in `names` that it, or an optimizer inside it, does not accept.

    optax's containers accept any extra arg and pass it on, so the only way to find out is to call `opt`.
    """

    def update(updates, state, params=None, **extra_args):
        try:
            return opt.update(updates, state, params, **extra_args)
        except TypeError as error:
            refused = [name for name in names if f"unexpected keyword argument {name!r}" in str(error)]
            taken = {name: value for name, value in extra_args.items() if name not in refused}
            if len(taken) == len(extra_args):
                raise
            return update(updates, state, params, **taken)

    return optax.GradientTransformationExtraArgs(opt.init, update)


def like_gradients(params: Tree) -> Tree:
    """A tree with the dtypes of the gradients of `params`; leaves without a gradient are float0."""
    return jax.tree.map(lambda p: p if is_inexact(p) else np.zeros(jnp.shape(p), jax.dtypes.float0), params)


def update_shapes(opt, grads: Tree, state: Tree, params: Tree | None, extra_args: dict[str, Any]) -> Tree:
    """Shapes and dtypes of the updates that `opt` returns for `grads`, without computing them."""
    shapes = _shapes(opt, overwrites.optimized(grads), state, overwrites.optimized(params), extra_args)
    is_new = lambda x: isinstance(x, New)
    updates = overwrites.with_new(shapes, overwrites.only(grads))
    return jax.tree.map(lambda x: x.value if is_new(x) else x, updates, is_leaf=is_new)


def _shapes(opt, grads, state, params, extra_args):
    return jax.eval_shape(lambda g, s, p: opt.update(g, s, p, **_with_grad(extra_args, g))[0], grads, state, params)


def zeros(shapes: Tree) -> Tree:
    """Zero updates."""
    numpy_or_jax = lambda dtype: np if dtype == jax.dtypes.float0 else jnp
    return jax.tree.map(lambda x: numpy_or_jax(x.dtype).zeros(x.shape, x.dtype), shapes)


def differences(updates: Tree, params: Tree | None) -> Tree:
    """Replaces each `New` in `updates` by its difference from the parameter.

    Raises:
      TypeError: if there is a `New` and `params` is None.
    """
    is_new = lambda x: isinstance(x, New)
    if not any(map(is_new, jax.tree.leaves(updates, is_leaf=is_new))):
        return updates
    if params is None:
        raise TypeError(f"update needs params here: those under {overwrites.NAME!r} are overwritten. Pass params.")
    return jax.tree.map(lambda u, p: u.value - p if is_new(u) else u, updates, params, is_leaf=is_new)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`optax.apply_updates` that keeps parameters without a gradient (float0, None) and overwrites those with `New`."""

    def leaf(param, update):
        if isinstance(update, New):
            return update.value.astype(param.dtype)
        if update is None or update.dtype == jax.dtypes.float0:
            return param
        return optax.apply_updates(param, update)

    return jax.tree.map(leaf, params, updates, is_leaf=lambda leaf: leaf is None)


def unshared(state: Tree, params: Tree) -> Tree:
    """Copies every array in `state` that is also elsewhere in it or in `params`, so that both can be donated."""
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def leaf(x):
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(leaf, state)


def beside_params(fun: Callable[[Any, Any], Any], state: Tree, params: Tree) -> Tree:
    """Maps `fun(leaf, param)` over the leaves of `state` with a parameter's shape and a path that ends in its path."""
    param_at = dict(jax.tree_util.tree_leaves_with_path(params))

    def leaf(path, x):
        owners = (param_at[path[i:]] for i in range(len(path) + 1) if path[i:] in param_at)
        owner = next(owners, None)
        return fun(x, owner) if owner is not None and jnp.shape(owner) == jnp.shape(x) else x

    return jax.tree.map_with_path(leaf, state)


def branch(pred: Any, close: Callable[[], Tree], stay: Callable[[], Tree]) -> Tree:
    """`close()` if `pred`, else `stay()`; a traced `pred` makes a conditional.

    The barrier prevents XLA:GPU from turning the conditional into selects, which would run both branches.
    """
    if isinstance(pred, bool):
        return close() if pred else stay()
    return jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)


def _with_grad(extra_args: dict[str, Any], grads: Tree) -> dict[str, Any]:
    """Replaces the extra arg `grad`, if given, by `grads`: a line search needs the window's mean gradient."""
    return extra_args | {"grad": grads} if extra_args.get("grad") is not None else extra_args


def _lift(tree: Tree, wide: Any) -> Tree:
    def leaf(x):
        x = jnp.asarray(x)
        return x.astype(weighted_sum.promoted(x.dtype, wide)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def _cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(
        lambda x, y: x if jnp.result_type(x) == jnp.result_type(y) else jnp.astype(x, y.dtype), tree, like
    )
