"""Calls the inner optimizer on the exact mean and returns the dtypes it would have without accumulation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxaccum._devices import layout
from jaxaccum._sums import overwrites, weighted_sum
from jaxaccum._sums.overwrites import New
from jaxaccum._sums.weighted_sum import is_inexact
from jaxaccum._types import Tree


class InnerOptimizer(NamedTuple):
    """The inner optimizer with the arguments of its `update`, except the gradients.

    Statistics that are overwritten (see `overwrites`) bypass it.
    """

    opt: optax.GradientTransformationExtraArgs
    state: Tree
    params: Tree | None
    # `grad`, if given, is replaced by the gradients, because a line search needs the window's.
    extra_args: dict[str, Any]

    def update(self, mean: Tree, grads: Tree, wide: Any) -> tuple[Tree, Tree]:
        """Calls the optimizer on `mean`: (updates, new state). The update of a statistic is a `New` with its mean.

        If the dtypes of `mean` are wider than those of `grads`, the gradients without accumulation, floating state and
        the parameters are cast to `wide` for the call, so that the mean is not rounded. The results are cast back: the
        state to its own dtypes, the updates to those that the optimizer returns for `grads`.
        """
        statistics = overwrites.only(mean)
        mean, grads, params = map(overwrites.optimized, (mean, grads, self.params))
        if all(jax.tree.leaves(jax.tree.map(lambda m, g: m.dtype == g.dtype, mean, grads))):
            updates, state = self._call(mean, self.state, params)
        else:
            shapes = self._shapes(grads)
            updates, state = self._call(mean, _lift(self.state, wide), _lift(params, wide))
            updates = _cast_like(updates, shapes)
        return overwrites.with_new(updates, statistics), _cast_like(state, self.state)

    def zero_updates(self, grads: Tree) -> Tree:
        """Zeros like the updates for `grads`, which are not computed."""
        shapes = overwrites.with_new(self._shapes(overwrites.optimized(grads)), overwrites.only(grads))

        def zeros(x):
            x = x.value if _is_new(x) else x
            return (np if x.dtype == jax.dtypes.float0 else jnp).zeros(x.shape, x.dtype)

        return jax.tree.map(zeros, shapes, is_leaf=_is_new)

    def _call(self, grads, state, params):
        replaced = {"grad": grads} if self.extra_args.get("grad") is not None else {}
        return self.opt.update(grads, state, params, **self.extra_args | replaced)

    def _shapes(self, grads):
        """Shapes and dtypes of the updates for `grads`, which explicit axes may shard otherwise than the parameters."""
        args = jax.tree.map(layout.unplaced, (grads, self.state, overwrites.optimized(self.params)))
        return jax.eval_shape(lambda *args: self._call(*args)[0], *args)


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


def differences(updates: Tree, params: Tree | None) -> Tree:
    """Replaces each `New` in `updates` by its difference from the parameter. If there is any, `params` is required."""
    if not any(map(_is_new, jax.tree.leaves(updates, is_leaf=_is_new))):
        return updates
    if params is None:
        raise TypeError(f"update needs params here: those under {overwrites.NAME!r} are overwritten. Pass params.")
    return jax.tree.map(lambda u, p: u.value - p if _is_new(u) else u, updates, params, is_leaf=_is_new)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`optax.apply_updates` that keeps parameters without a gradient (float0, None) and overwrites those with `New`."""

    def leaf(param, update):
        if _is_new(update):
            return update.value.astype(param.dtype)
        if update is None or update.dtype == jax.dtypes.float0:
            return param
        return optax.apply_updates(param, update)

    return jax.tree.map(leaf, params, updates, is_leaf=lambda leaf: leaf is None)


def _is_new(update: Any) -> bool:
    return isinstance(update, New)


def _lift(tree: Tree, wide: Any) -> Tree:
    def leaf(x):
        x = jnp.asarray(x)
        return x.astype(weighted_sum.promoted(x.dtype, wide)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def _cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(
        lambda x, y: x if jnp.result_type(x) == jnp.result_type(y) else jnp.astype(x, y.dtype), tree, like
    )
