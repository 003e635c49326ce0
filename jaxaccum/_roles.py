"""Which positional arguments of a loss are its parameters, its batch, its keys, its carry."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Tree = Any


class Roles(NamedTuple):
    """Which positional arguments are what."""

    params: tuple[int, ...]
    batch: tuple[int, ...]
    keys: tuple[int, ...]
    carry: tuple[int, ...]

    @classmethod
    def of(cls, argnums, batch_argnums, key_argnums, carry_argnums) -> "Roles":
        """The roles as tuples, disjoint and none of them negative."""
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
        if not roles[0] or not roles[1]:
            raise ValueError("argnums and batch_argnums must each name an argument.")
        return cls(*roles)

    def all(self) -> set[int]:
        """The positions that have a role."""
        return {i for positions in self for i in positions}

    def check(self, args: Sequence[Tree]) -> None:
        """All of them must have been passed by position."""
        for name, positions in self._asdict().items():
            if max(positions, default=-1) >= len(args):
                raise TypeError(
                    f"the {name} argument is number {max(positions)}, counted from 0, but only {len(args)} arguments "
                    "were passed by position; pass it so, or name another."
                )

    def put(self, args: Sequence[Tree], *values: tuple[Tree, ...]) -> list[Tree]:
        """`args` with the arguments of each role replaced, in the order of the fields."""
        new = list(args)
        for positions, replacements in zip(self, values, strict=True):
            for i, value in zip(positions, replacements, strict=True):
                new[i] = value
        return new
