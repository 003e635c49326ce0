"""A micro-step from the loss: each device's gradient, its accumulation and, at a boundary, the optimizer step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxaccum._devices.topology import MappedAxis, MeshAxis
from jaxaccum._gradient import micro_gradient, once_per_window, splitting
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import prng
from jaxaccum._multi_steps import stepping
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._multi_steps.stepping import Config
from jaxaccum._sums import traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


def step(
    config: Config,
    fun: Callable[..., tuple[Any, Any]],
    roles: Roles,
    params: Tree,
    state: MultiStepsState,
    args: Sequence[Any],
    boundary: Any,
    *,
    own: Sequence[int] = (),
    clears: bool = False,
    extra_args: dict[str, Any] | None = None,
) -> tuple[Weighted, Any, Tree, MultiStepsState]:
    """Runs one micro-step from the loss.

    Args:
      config: the transformation's configuration.
      fun: `fun(params, *args)` returns (loss, rest); the loss is plain or a `Weighted`.
      roles: the roles of the arguments; the parameters are argument 0.
      params: the parameters.
      state: the state.
      args: the other arguments.
      boundary: as for `MultiSteps.update`.
      own: as for `micro_gradient.on_each`.
      clears: as for `stepping.run`.
      extra_args: for the inner optimizer.

    Returns:
      (loss, rest, params, state). loss and rest are local to each device: with a mesh they have a leading device axis.
    """
    seen = params if config.prepare is None else once_per_window.seen(config.prepare, params, state.prepared)
    judges = config.should_skip_update_fn is not None  # That function receives mean gradients.
    loss, rest, grads = micro_gradient.on_each(
        fun,
        config.sync,
        roles,
        (seen, *args),
        own=own,
        sums=None if config.in_place is False else state.acc_grads,
        in_place=config.in_place,
        starts=False if clears else state.mini_step == 0,
        mean=judges,
    )
    if "value" in config.averaged_extra_args:
        extra_args = {"value": traced_loss.mean(loss), **(extra_args or {})}
    params, state = stepping.run(
        config,
        grads,
        state,
        params,
        loss.weight,
        boundary,
        extra_args or {},
        stepping.apply_output(params),
        like=weighted_sum.arrays(params),
        weighted=loss.weight is not None and not judges,
        clears=clears,
    )
    return loss, rest, params, state


def micro_step(
    config: Config,
    fun: Callable[..., Any],
    params: Tree,
    state: MultiStepsState,
    args: Sequence[Any],
    boundary: Any,
    clears: bool = False,
) -> tuple[jax.Array, Tree, MultiStepsState]:
    """`MultiSteps.micro_step`; `clears` as for `stepping.run`."""

    def own(params, *args):
        if isinstance(config.sync, MeshAxis):  # Only the batch is sharded; the other arguments are replicated.
            batch, *others = args
            args = batch, *prng.fold_typed(others, MappedAxis(config.sync.names).index())
        return fun(params, *args), None

    roles = Roles(params=(0,), batch=(1,), keys=(), carry=())
    if isinstance(config.sync, MeshAxis):
        given = params, *args
        roles.check(given)
        splitting.check_devices(given, roles.batch, 1, False, config.sync.size())
    loss, _, params, state = step(config, own, roles, params, state, args, boundary, clears=clears)
    return traced_loss.mean(loss), params, state


def without_aux(fun: Callable[..., Any], method: str) -> Callable[..., Any]:
    """Wraps the loss `fun` to check its return value for `method`, which does not support aux."""

    @functools.wraps(fun, updated=())
    def checked(*args):
        value = fun(*args)
        traced_loss.check_total(value.total if isinstance(value, Weighted) else value, method)
        return value

    return checked
