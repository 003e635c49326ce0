"""The configuration of a `MultiSteps`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxaccum._devices.topology import Sync
from jaxaccum._multi_steps import inner_update
from jaxaccum._types import Tree


class Shapes(NamedTuple):
    """A tree's structure, shapes and dtypes, comparable and hashable."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: Tree) -> "Shapes":
        """From a tree of arrays, numbers or `jax.ShapeDtypeStruct`s."""
        leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda tree: tree, tree))
        return cls(treedef, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))

    @property
    def tree(self) -> Tree:
        """A tree of `jax.ShapeDtypeStruct`s."""
        return self.treedef.unflatten(self.leaves)

    @property
    def is_scalar(self) -> bool:
        """Whether the tree is a single scalar."""
        return self.treedef == jax.tree.structure(0) and self.leaves[0].shape == ()


class Config(NamedTuple):
    """The configuration of a `MultiSteps`, which documents the fields."""

    opt: optax.GradientTransformation
    every_k: int | Callable[[Any], Any]
    use_grad_mean: bool
    should_skip_update_fn: Callable[..., Any] | None
    accumulator_dtype: Any
    nonfinite: str
    averaged_extra_args: tuple[str, ...]
    sync: Sync
    prepare: Callable[[Tree], Tree] | None
    in_place: bool | None
    averaged_shapes: tuple[tuple[str, Shapes], ...] = ()
    """Of those in `averaged_extra_args` that are no scalars."""
    gradient_norms: str | None = None

    # Not fields, because each access makes new closures, which would break equality.

    @property
    def inner_opt(self) -> optax.GradientTransformationExtraArgs:
        """`opt` with support for extra args."""
        return optax.with_extra_args_support(self.opt)

    @property
    def tolerant_inner_opt(self) -> optax.GradientTransformationExtraArgs:
        """`inner_opt`, which ignores averaged extra args and `grad` if it does not take them."""
        return inner_update.without_refused(self.inner_opt, (*self.averaged_extra_args, "grad"))
