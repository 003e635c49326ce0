"""The call of the inner optimizer: on the exact mean, with the types that it would have had without accumulation."""

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
    """`opt.update` on `mean`, which may be wider than the gradients that it is the mean of.

    Statistics that are overwritten (`_overwrites`) don't reach the optimizer: their update is `New`, their mean.

    Where the mean is wider, the optimizer's floating state and the parameters are lifted to `wide` for the call, so
    that the mean is not rounded on its way, and the results are cast back: the state to its own dtypes, the updates to
    those that `opt` would have given for `grads`.

    Args:
      opt: the inner optimizer.
      mean: the window's mean gradient.
      grads: arrays or shapes with the dtypes that the optimizer would see without accumulation.
      state: the inner optimizer's state.
      params: the parameters, or None.
      extra_args: the inner optimizer's extra arguments; it sees `mean` in place of an argument `grad`.
      wide: the dtype to lift to.

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
    """`opt`, called without those of the extra args `names` that it, or an optimizer inside it, does not take.

    optax's containers take any extra arg and pass it on, so that only a call can tell.
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
    """A tree with the dtypes of the gradients of `params`: its own, and float0 where there is no gradient."""
    return jax.tree.map(lambda p: p if is_inexact(p) else np.zeros(jnp.shape(p), jax.dtypes.float0), params)


def update_shapes(opt, grads: Tree, state: Tree, params: Tree | None, extra_args: dict[str, Any]) -> Tree:
    """Shapes and dtypes of the updates that `opt` gives for `grads`; nothing is computed."""
    shapes = _shapes(opt, overwrites.optimized(grads), state, overwrites.optimized(params), extra_args)
    is_new = lambda x: isinstance(x, New)
    updates = overwrites.with_new(shapes, overwrites.only(grads))
    return jax.tree.map(lambda x: x.value if is_new(x) else x, updates, is_leaf=is_new)


def _shapes(opt, grads, state, params, extra_args):
    return jax.eval_shape(lambda g, s, p: opt.update(g, s, p, **_with_grad(extra_args, g))[0], grads, state, params)


def zeros(shapes: Tree) -> Tree:
    """Updates that change nothing."""
    numpy_or_jax = lambda dtype: np if dtype == jax.dtypes.float0 else jnp
    return jax.tree.map(lambda x: numpy_or_jax(x.dtype).zeros(x.shape, x.dtype), shapes)


def differences(updates: Tree, params: Tree | None) -> Tree:
    """`updates` with what to add to the parameter in place of each `New`.

    Raises:
      TypeError: if there is one and no parameters.
    """
    is_new = lambda x: isinstance(x, New)
    if not any(map(is_new, jax.tree.leaves(updates, is_leaf=is_new))):
        return updates
    if params is None:
        raise TypeError(f"update needs params here: those under {overwrites.NAME!r} are overwritten. Pass params.")
    return jax.tree.map(lambda u, p: u.value - p if is_new(u) else u, updates, params, is_leaf=is_new)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`optax.apply_updates`; a parameter without gradient (float0, None) stays as it is, `New` is its new value."""

    def leaf(param, update):
        if isinstance(update, New):
            return update.value.astype(param.dtype)
        if update is None or update.dtype == jax.dtypes.float0:
            return param
        return optax.apply_updates(param, update)

    return jax.tree.map(leaf, params, updates, is_leaf=lambda leaf: leaf is None)


def unshared(state: Tree, params: Tree) -> Tree:
    """`state` with a copy of every array that appears twice in it or in `params`, so that both can be donated."""
    seen = {id(leaf) for leaf in jax.tree.leaves(params)}

    def leaf(x):
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(leaf, state)


def beside_params(fun: Callable[[Any, Any], Any], state: Tree, params: Tree) -> Tree:
    """`state` with `fun(leaf, param)` for each leaf that has a parameter's shape, and its path's last part its path."""
    param_at = dict(jax.tree_util.tree_leaves_with_path(params))

    def leaf(path, x):
        owners = (param_at[path[i:]] for i in range(len(path) + 1) if path[i:] in param_at)
        owner = next(owners, None)
        return fun(x, owner) if owner is not None and jnp.shape(owner) == jnp.shape(x) else x

    return jax.tree.map_with_path(leaf, state)


def branch(pred: Any, close: Callable[[], Tree], stay: Callable[[], Tree]) -> Tree:
    """`close()` where `pred`, else `stay()`: decided now if `pred` is a Python bool, in a conditional if it is traced.

    The barrier keeps XLA:GPU from turning the conditional into selections, which would run both sides.
    """
    if isinstance(pred, bool):
        return close() if pred else stay()
    return jax.lax.cond(pred, lambda: jax.lax.optimization_barrier(close()), stay)


def _with_grad(extra_args: dict[str, Any], grads: Tree) -> dict[str, Any]:
    """`extra_args` with `grads` in place of `grad`, where that is given: a line search needs the window's mean."""
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
