"""Tells a misspelt argument from an extra arg of an optimizer: optax lets pass what nobody reads."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

# "weights" and "is_boundary" are as near as this; "height", which an optimizer may well read, is not. Letters that
# change places count as less alike, but leave the same letters.
_NEAR = 0.84


def check(
    method: str, given: Iterable[str], meant: Iterable[str], update: Callable[..., Any], remedy: str = ""
) -> None:
    """Refuses an extra arg whose name is nearly that of an argument, unless the optimizer asks for it by name.

    Args:
      method: what was called.
      given: the extra args' names.
      meant: the arguments that one of them could be a misspelling of.
      update: the optimizer's `update`.
      remedy: what to do; by default the argument's right name.

    Raises:
      TypeError: for such a name.
    """
    for name in given:
        near = _nearest(name, tuple(meant))
        if near is not None and name not in _asked_for(update):
            raise TypeError(
                f"{method} got an argument {name!r}, which no optimizer in it asks for by that name. "
                + (remedy or f"Did you mean {near!r}?")
            )


@functools.cache
def _nearest(name: str, meant: tuple[str, ...]) -> str | None:
    found = difflib.get_close_matches(name.lower(), meant, n=1, cutoff=_NEAR)
    found += [other for other in meant if sorted(other) == sorted(name.lower())]
    return found[0] if found else None


def _asked_for(update: Callable[..., Any]) -> set[str]:
    """The extra args that an optimizer's `update` names, and those that the ones it is made of do.

    optax's containers hold the latter in their closures. Of all functions there, those that take extra args are known
    by their `**extra_args`.
    """
    names, seen, found = set(), set(), [update]
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (tuple, list)):
            found += value
        elif isinstance(value, functools.partial):
            found += (value.func, *value.args)
        elif inspect.ismethod(value):
            found.append(value.__func__)
        elif inspect.isfunction(value):
            parameters = inspect.signature(value).parameters.values()
            if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                names |= {parameter.name for parameter in parameters}
            found += inspect.getclosurevars(value).nonlocals.values()
    return names
