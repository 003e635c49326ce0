"""What a window does once: `prepare`, and its transpose on the window's sums."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxaccum._devices.topology import MappedAxis, OneDevice
from jaxaccum._gradient import hoisting, once_per_window
from jaxaccum._gradient.casting import Cast
from jaxaccum._types import Tree


class Prepared(NamedTuple):
    """A function of parameters with `prepare` taken out of it.

    Attributes:
      fun: the function of what `prepare` returns.
      params: what `prepare` returns, as a local tree.
      transpose: `transpose(sums, count)` maps sums of `count` gradients of `params` to those of the parameters.
      reduced: for each parameter, the mapped axes that `transpose` sums its gradient over.
    """

    fun: Callable[..., Any]
    params: Tree
    transpose: Callable[[Tree, Any], Tree]
    reduced: Tree


def of(
    prepare: Callable[[Tree], Tree] | str | None,
    device: OneDevice | MappedAxis,
    fun: Callable[..., Any],
    params: Tree,
    *args: Any,
    in_place: bool | None,
) -> Prepared:
    """Computes `prepare` of local parameters, for `fun(params, *args)`, which is traced only.

    `in_place`: whether gradients of stacked layers are added to their sums in the backward pass; None if they can be.
    """
    if isinstance(prepare, str):
        prepare, fun = hoisting.split(fun, params, *args, in_place=in_place)
    else:
        prepare = prepare.seeing(fun, params, *args) if isinstance(prepare, Cast) else prepare
        if prepare is None:
            return Prepared(fun, params, lambda sums, count: sums, jax.tree.map(lambda _: (), params))
        once_per_window.check_linear(prepare, params)
    reduced = once_per_window.gathered_axes(prepare, params, device.names)
    seen, transpose = once_per_window.with_transpose(prepare, params)
    return Prepared(fun, device.local(seen), transpose, reduced)
