"""Detects misspelt arguments among extra args, since optax silently accepts extra args that no optimizer reads."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import optax

# This cutoff catches "weights" and "is_boundary" but not "height", a plausible extra arg. Transposed letters score
# lower, so `_nearest` also compares sorted letters.
_NEAR = 0.84
# Names within the cutoff that are not typos. Names that end in a digit, such as "weight0", are not typos either.
_OWN_WORDS = frozenset({"at_boundary", "eight", "weighted"})


def check(
    method: str, given: Iterable[str], meant: Iterable[str], update: Callable[..., Any], remedy: str = ""
) -> None:
    """Raises for a name in `given` that is close to one in `meant`, unless the optimizer has a parameter of that name.

    `update` is the optimizer's. `remedy` replaces the suggestion of the correct name at the end of the error message.
    """
    for name in given:
        near = _nearest(name, tuple(meant))
        if near is not None and not _asks_for(update, name):
            raise TypeError(
                f"{method} got an argument {name!r}, which no optimizer in it asks for by that name. "
                + (remedy or f"Did you mean {near!r}?")
            )


@functools.cache
def _nearest(name: str, meant: tuple[str, ...]) -> str | None:
    if name.lower() in _OWN_WORDS or name[-1:].isdigit():
        return None
    found = difflib.get_close_matches(name.lower(), meant, n=1, cutoff=_NEAR)
    found += [other for other in meant if sorted(other) == sorted(name.lower())]
    return found[0] if found else None


def _asks_for(update: Callable[..., Any], name: str) -> bool:
    """Whether `update`, or a function of an optimizer inside it, has a parameter `name`."""
    seen, found = {}, [update]
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # Kept alive, because the id of a deleted bound method can be reused.
        if name in _extra_args(value):
            return True
        try:
            found += _held(value)
        except _UnknownError:
            return True
    return False


class _UnknownError(Exception):
    """An optimizer's components can't be determined."""


def _extra_args(value: Any) -> list[str]:
    """A function's parameter names except the first (an optimizer's gradients, a schedule's step, a mask's tree)."""
    if not callable(value) or inspect.isclass(value):
        return []
    try:
        return [*inspect.signature(value).parameters][1:]
    except (TypeError, ValueError):  # Some C functions have no signature.
        return []


def _held(value: Any) -> Iterable[Any]:
    """The objects inside `value` that may be optimizers or parts of one."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if inspect.ismethod(value):
        return (value.__self__, *getattr(value.__self__, "__dict__", {}).values(), *_held(value.__func__))
    if inspect.isfunction(value):
        return _captured(value)
    if inspect.isclass(value):
        return ()
    methods = [getattr(value, name, None) for name in ("update", "__call__")]
    # A jitted function keeps the original in `__wrapped__`.
    return (getattr(value, "__wrapped__", None), *filter(inspect.ismethod, methods))


def _captured(function: Callable[..., Any]) -> list[Any]:
    """A function's closure variables, where optax's containers keep their contents, and the global optimizers in it."""
    variables = inspect.getclosurevars(function)
    held = dict(variables.nonlocals)
    if "inner_factory" in held and "other_hps" in held:  # `optax.inject_hyperparams`.
        factory, others = held.pop("inner_factory"), held["other_hps"]
        numbers = inspect.signature(factory).parameters.keys() - others.keys()
        try:
            held["inner"] = factory(**others, **dict.fromkeys(numbers, jnp.ones(())))
        except Exception as error:  # The factory may reject 1 as a hyperparameter.
            raise _UnknownError from error
    optimizers = [value for value in variables.globals.values() if isinstance(value, optax.GradientTransformation)]
    return [*held.values(), *optimizers]
