"""A micro-step that starts from a loss: its gradient on each device, added, and at a boundary the optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxaccum import _accumulator, _keys, _loss, _micro_batch, _micro_step, _prepare, _split
from jaxaccum._accumulator import Weighted
from jaxaccum._micro_step import Config
from jaxaccum._roles import Roles
from jaxaccum._state import MultiStepsState
from jaxaccum._sync import MappedAxis, MeshAxis

Tree = Any


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
    """One micro-step from its loss to the parameters.

    Args:
      config: the transformation.
      fun: `fun(params, *args)` returns (loss, rest), the loss plain or a `Weighted`.
      roles: what the arguments are, the parameters number 0.
      params: the parameters.
      state: the state.
      args: the other arguments.
      boundary: as for `MultiSteps.update`.
      own: as for `_micro_batch.on_each`.
      clears: as for `_micro_step.run`.
      extra_args: for the inner optimizer.

    Returns:
      (loss, rest, params, state), the former two each device's own: with a mesh they have a leading device axis.
    """
    seen = params if config.prepare is None else _prepare.seen(config.prepare, params, state.prepared)
    judges = config.should_skip_update_fn is not None  # It is shown mean gradients.
    loss, rest, grads = _micro_batch.on_each(
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
        extra_args = {"value": _loss.mean(loss), **(extra_args or {})}
    params, state = _micro_step.run(
        config,
        grads,
        state,
        params,
        loss.weight,
        boundary,
        extra_args or {},
        _micro_step.apply_output(params),
        like=_accumulator.arrays(params),
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
    """`MultiSteps.micro_step`; `clears` as for `_micro_step.run`."""

    def own(params, *args):
        if isinstance(config.sync, MeshAxis):  # Each device's part of the batch; the rest is common to all of them.
            batch, *others = args
            args = batch, *_keys.fold_typed(others, MappedAxis(config.sync.names).index())
        return fun(params, *args), None

    roles = Roles(params=(0,), batch=(1,), keys=(), carry=())
    if isinstance(config.sync, MeshAxis):
        given = params, *args
        roles.check(given)
        _split.check_devices(given, roles.batch, 1, False, config.sync.size())
    loss, _, params, state = step(config, own, roles, params, state, args, boundary, clears=clears)
    return _loss.mean(loss), params, state
