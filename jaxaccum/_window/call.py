"""What all functions of this package do with the arguments and the gradients of a call."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._devices import placement
from jaxaccum._devices.topology import MeshAxis, OneDevice, Sync
from jaxaccum._jax import eager, prng
from jaxaccum._sums import numeric
from jaxaccum._types import Tree
from jaxaccum._window.loop import Window


def checked(
    run: Callable[[Sequence[Tree], dict[str, Tree]], Any],
    window: Window,
    sync: Sync,
    grad_dtype: Any,
    args: Sequence[Tree],
    kwargs: dict[str, Tree],
    *,
    can_stack: bool = True,
) -> Any:
    """Checks the arguments, and returns `run(args, kwargs)`, compiled; `can_stack`: the caller offers `stacked`."""
    numeric.available("accumulator_dtype", window.accumulator_dtype)
    numeric.available("grad_dtype", grad_dtype)
    window.roles.check(args, kwargs)
    window.roles.warn_of_unsplit(args, window.k, window.stacked)
    placement.in_map(sync)
    if not (isinstance(sync, OneDevice) and isinstance(window.k, int) and window.k == 1):
        prng.refuse_shared(args, kwargs, window.roles.all())
    params = window.differentiated(args)
    numeric.differentiable(params)
    placement.placed(params, sync)
    put = lambda traced: run([traced.get(i, arg) for i, arg in enumerate(args)], kwargs)
    with window.roles.hints(args, kwargs, window.k, window.stacked or not can_stack):
        return eager.call_compiled(put, {i: args[i] for i in window.roles.all()})


def finished(grads: Tree, params: Tree, sync: Sync, grad_dtype: Any) -> Tree:
    """Reduced gradients as the caller gets them: in `grad_dtype` or the parameters' own, and laid out like those."""
    return sync.like(jax.tree.map(lambda g, p: g.astype(grad_dtype or jnp.result_type(p)), grads, params), params)


def refuse_gathers(reduced: Tree, sync: MeshAxis) -> None:
    """Raises if `prepare` gathers over the data axis of a mesh; `reduced` is as `Window.run` returns it."""
    if any(jax.tree.leaves(reduced)):
        raise ValueError(
            f"prepare gathers over data_axis={sync.names!r}, but with mesh= it sees whole parameters: those that "
            "lie split over the data axis have been gathered before it runs, once a window. Leave the gather out."
        )
