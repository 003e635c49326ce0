"""Checks of calls: keywords that a function doesn't take, and functions that can't be called as they will be."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def check_keywords(
    name: str, given: Iterable[str], fun: Callable[..., Any], remedies: Mapping[str, str] | None = None
) -> None:
    """Raises TypeError for a keyword that `fun` doesn't take, with its remedy or the nearest one that it takes.

    `name` is the public function that was given the keywords.
    """
    known = _parameters(fun)
    for keyword in given:
        if keyword not in known:
            near = "".join(f"did you mean {other!r}?" for other in difflib.get_close_matches(keyword, known, 1))
            remedy = (remedies or {}).get(keyword, near)
            raise TypeError(f"{name} got an unexpected keyword argument {keyword!r}{remedy and f': {remedy}'}")


@functools.cache
def _parameters(fun: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fun).parameters


def explains(**remedies: str) -> Callable[[F], F]:
    """Decorates a function, which then says what to do instead of passing a keyword that it doesn't take."""

    def decorate(fun: F) -> F:
        @functools.wraps(fun)
        def call(*args: Any, **kwargs: Any) -> Any:
            check_keywords(fun.__qualname__.partition(".__")[0], kwargs, fun, remedies)
            return fun(*args, **kwargs)

        return cast(F, call)

    return decorate


def positional(name: str, fun: Callable[..., Any], *arguments: str) -> list[str]:
    """Checks that `fun` can be called with these arguments; returns its parameters' names, or [] if they are unknown.

    A wrapper counts as itself, since it may pass other arguments on.
    """
    try:
        signature = inspect.signature(fun, follow_wrapped=False)
    except (TypeError, ValueError):  # Some C functions have no signature.
        return []
    try:
        signature.bind(*arguments)
    except TypeError:
        called = f"{name.rpartition('.')[2]}({', '.join(arguments)})"
        got = getattr(fun, "__name__", type(fun).__name__)
        raise TypeError(f"{name} is called as {called}, got {got}{signature}.") from None
    return [*signature.parameters]
