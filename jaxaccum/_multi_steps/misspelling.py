"""Tells a misspelt argument from an extra arg of an optimizer: optax lets pass what nobody reads."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import optax

# "weights" and "is_boundary" are as near as this; "height", which an optimizer may well read, is not. Letters that
# change places count as less alike, but leave the same letters.
_NEAR = 0.84
# Names as near as that, which nobody writes by mistake. Nor does one number a misspelling: "weight0".
_OWN_WORDS = frozenset({"at_boundary", "eight", "weighted"})


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
    """Whether an optimizer's `update` has a parameter of that name, or that of one that it is made of."""
    seen, found = {}, [update]
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # Kept alive: a bound method that is gone would leave its id to another one.
        if name in _extra_args(value):
            return True
        try:
            found += _held(value)
        except _UnknownError:
            return True
    return False


class _UnknownError(Exception):
    """What an optimizer is made of can't be known."""


def _extra_args(value: Any) -> list[str]:
    """The parameters of a function, but for the first: an optimizer's gradients, a schedule's step, a mask's tree."""
    if not callable(value) or inspect.isclass(value):
        return []
    try:
        return [*inspect.signature(value).parameters][1:]
    except (TypeError, ValueError):  # Some of those written in C have no signature.
        return []


def _held(value: Any) -> Iterable[Any]:
    """What could be an optimizer, or a part of one, in `value`."""
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
    # A jitted function has what it was made of in `__wrapped__`.
    return (getattr(value, "__wrapped__", None), *filter(inspect.ismethod, methods))


def _captured(function: Callable[..., Any]) -> list[Any]:
    """What a function's closure holds, where optax's containers keep what they contain, and the optimizers it names."""
    variables = inspect.getclosurevars(function)
    held = dict(variables.nonlocals)
    if "inner_factory" in held and "other_hps" in held:  # That of `optax.inject_hyperparams`.
        factory, others = held.pop("inner_factory"), held["other_hps"]
        numbers = inspect.signature(factory).parameters.keys() - others.keys()
        try:
            held["inner"] = factory(**others, **dict.fromkeys(numbers, jnp.ones(())))
        except Exception as error:  # It may refuse a 1 for a hyperparameter.
            raise _UnknownError from error
    optimizers = [value for value in variables.globals.values() if isinstance(value, optax.GradientTransformation)]
    return [*held.values(), *optimizers]
