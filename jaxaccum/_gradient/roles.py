"""The roles of a loss's positional arguments: parameters, batch, keys, carry."""

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._types import Tree


class Roles(NamedTuple):
    """The positions of the arguments with each role."""

    params: tuple[int, ...]
    batch: tuple[int, ...]
    keys: tuple[int, ...]
    carry: tuple[int, ...]
    own: tuple[int, ...] = ()  # Different per device; with a mesh, leaves (P, ...).

    @classmethod
    def of(cls, argnums, batch_argnums, key_argnums, carry_argnums) -> "Roles":
        """Converts the public arguments to tuples, and checks that they are disjoint and not negative.

        With `batch_argnums=None` the batch is the first argument without another role.
        """
        given = dict(argnums=argnums, batch_argnums=batch_argnums, key_argnums=key_argnums, carry_argnums=carry_argnums)
        owners: dict[int, str] = {}
        roles = []
        for name, value in given.items():
            positions = () if value is None else (value,) if isinstance(value, int) else tuple(value)
            for i in positions:
                if not isinstance(i, int) or isinstance(i, bool) or i < 0:
                    raise ValueError(f"{name} must be positions of arguments, integers of at least 0, got {value!r}.")
                if i in owners:
                    raise ValueError(f"{name}={value!r} names argument {i}, which {owners[i]} names already.")
                owners[i] = name
            roles.append(positions)
        if batch_argnums is None:
            roles[1] = (next(i for i in itertools.count() if i not in owners),)
        if not roles[0] or not roles[1]:
            raise ValueError("argnums and batch_argnums must each name an argument.")
        return cls(*roles)

    def all(self) -> set[int]:
        return {i for positions in self for i in positions}

    def check(self, args: Sequence[Tree], kwargs: Mapping[str, Tree] | None = None) -> None:
        """Checks that all arguments with a role were passed by position."""
        named = ", ".join(f"{name}=..." for name in kwargs or () if name.isidentifier())  # Others are not the caller's.
        hint = (
            " Arguments passed by name are never split. To split them put them in one batch, and wrap the loss: "
            f"value_and_grad(lambda params, batch: loss(params, **batch), k)(params, dict({named}))."
            if named
            else ""
        )
        for name, positions in self._asdict().items():
            if max(positions, default=-1) >= len(args):
                option = {"params": "argnums", "keys": "key_argnums"}.get(name, f"{name}_argnums")
                raise TypeError(
                    f"the {name} argument is number {max(positions)}, counted from 0 ({option}), but only {len(args)} "
                    f"arguments were passed by position; pass it so, or name another.{hint}"
                )

    @contextlib.contextmanager
    def hints(
        self, args: Sequence[Tree], kwargs: Mapping[str, Tree], k: Any, stacked: bool, remedy: str = ""
    ) -> Iterator[None]:
        """Adds notes to an error about arguments that may have caused it; `remedy` is for those that are not split."""
        try:
            yield
        except Exception as error:
            for hint in (self._unsplit(args, kwargs, remedy=remedy), None if stacked else self._listed(args, k)):
                if hint is not None:
                    error.add_note(hint)
            raise

    def warn_of_unsplit(self, args: Sequence[Tree], k: Any, stacked: bool) -> None:
        """Warns of positional arguments that look like batches, where they would broadcast with a micro-batch."""
        axes = 2 if stacked else 1  # (K, N) or K·N.
        shapes = {jnp.shape(x)[:axes] for i in self.batch for x in jax.tree.leaves(args[i])}
        several = not isinstance(k, int) or k > 1
        broadcasts = all(len(shape) == axes for shape in shapes) if stacked else shapes == {(k,)}
        if several and broadcasts and (hint := self._unsplit(args, {}, axes)):
            warnings.warn(f"{hint} If it does not, pass it by name.", stacklevel=4)

    def _unsplit(self, args: Sequence[Tree], kwargs: Mapping[str, Tree], axes: int = 1, remedy: str = "") -> str | None:
        """A hint about arguments that have the batch's leading axes but are not split."""
        length = lambda x: tuple(getattr(x, "shape", ()))[:axes]
        lengths = {length(x) for i in self.batch for x in jax.tree.leaves(args[i])} - {()}
        is_like = lambda tree: any(length(x) in lengths for x in jax.tree.leaves(tree))
        positions = [i for i, arg in enumerate(args) if i not in self.all() and is_like(arg)]
        names = [*(f"args[{i}]" for i in positions), *(f"kwargs[{n!r}]" for n, arg in kwargs.items() if is_like(arg))]
        if not names:
            return None
        remedy = remedy or f"batch_argnums={tuple(sorted((*self.batch, *positions)))}"
        if len(names) > len(positions):
            remedy = "pass those by position, and name them in batch_argnums"
        return (
            f"{', '.join(names)}: as long as the batch, but not split, so that each micro-batch sees all of it. If it "
            f"belongs to the batch, {remedy}."
        )

    def _listed(self, args: Sequence[Tree], k: Any) -> str | None:
        """A hint about a batch that is a list of K trees of the same structure and shapes."""
        shapes = lambda tree: (jax.tree.structure(tree), [getattr(x, "shape", ()) for x in jax.tree.leaves(tree)])
        for i in self.batch:
            batch = args[i]
            is_list = isinstance(batch, (list, tuple)) and isinstance(k, int) and len(batch) == k > 1
            if is_list and all(shapes(tree) == shapes(batch[0]) for tree in batch):
                return (
                    f"args[{i}] is a {type(batch).__name__} of num_micro_batches={k} alike trees. If they are the "
                    "micro-batches, stack them with jax.tree.map(lambda *x: jnp.stack(x), *micro_batches), and pass "
                    "stacked=True."
                )
        return None

    def put(self, args: Sequence[Tree], *values: tuple[Tree, ...]) -> list[Tree]:
        """Replaces the parameters, batch, keys and carry, in this order."""
        new = list(args)
        for positions, replacements in zip((self.params, self.batch, self.keys, self.carry), values, strict=True):
            for i, value in zip(positions, replacements, strict=True):
                new[i] = value
        return new

    def without_carry(self, args: Sequence[Tree]) -> list[Tree]:
        """The arguments but for the carry."""
        return [arg for i, arg in enumerate(args) if i not in self.carry]

    def with_carry(self, others: Sequence[Tree], carry: Sequence[Tree]) -> list[Tree]:
        """The arguments, given those of `without_carry` and the carry."""
        args = list(others)
        for i in sorted(self.carry):
            args.insert(i, carry[self.carry.index(i)])
        return args
