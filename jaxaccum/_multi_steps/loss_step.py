"""A micro-step from the loss: each device's gradient, its accumulation and, at a boundary, the optimizer step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxaccum._devices.topology import MappedAxis, MeshAxis
from jaxaccum._gradient import micro_gradient, once_per_window, splitting
from jaxaccum._gradient.micro_gradient import Target
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import prng
from jaxaccum._multi_steps import accumulation
from jaxaccum._multi_steps.accumulation import Boundary, MicroBatch
from jaxaccum._multi_steps.closing import Call
from jaxaccum._multi_steps.config import Config
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class LossStep(NamedTuple):
    """Micro-steps of one loss."""

    config: Config
    fun: Callable[..., tuple[Any, Any]]  # `fun(params, *args)` returns (loss, rest); the loss may be a `Weighted`.
    roles: Roles  # Of the arguments of `fun`; the parameters are argument 0.
    counts: bool = False  # Whether the weight of each micro-batch is known to be positive.

    def __call__(
        self,
        params: Tree,
        state: MultiStepsState,
        args: Sequence[Any],
        boundary: Boundary,
        extra_args: dict[str, Any] | None = None,
    ) -> tuple[Weighted, Any, Tree, MultiStepsState]:
        """Runs one micro-step: (loss, rest, params, state). loss and rest are per device, stacked with a mesh."""
        config = self.config
        seen = params if config.prepare is None else once_per_window.restore(config.prepare, params, state.prepared)
        judges = config.should_skip_update_fn is not None  # That function receives mean gradients.
        loss, rest, grads = micro_gradient.on_each(
            self.fun,
            config.sync,
            self.roles,
            (seen, *args),
            target=Target(
                sums=None if config.in_place is False else state.acc_grads,
                in_place=config.in_place,
                starts=False if boundary.clears else state.mini_step == 0,
                counts=self.counts,
            ),
            mean=judges,
        )
        extra_args = extra_args or {}
        if "value" in config.averaged_extra_args:
            extra_args = {"value": traced_loss.mean(loss)} | extra_args
        micro_batch = MicroBatch(
            grads=grads,
            weight=loss.weight,
            weighted=loss.weight is not None and not judges,
            like=weighted_sum.arrays(params),
            counts=self.counts,
        )
        params, state = accumulation.add(config, state, micro_batch, boundary, Call(params, extra_args, applies=True))
        return loss, rest, params, state


def micro_step(
    config: Config, fun: Callable[..., Any], method: str, *, counts: bool = False
) -> Callable[..., tuple[Any, Tree, Any]]:
    """`MultiSteps.micro_step` for one loss, called as `(params, state, args, boundary)`; `method` is for errors."""
    fun = _without_aux(fun, method)

    def on_device(params, *args):
        if isinstance(config.sync, MeshAxis):  # Only the batch is sharded; the other arguments are replicated.
            batch, *others = args
            args = batch, *prng.fold_typed(others, MappedAxis(config.sync.names).index())
        return fun(params, *args), None

    step = LossStep(config, on_device, Roles(params=(0,), batch=(1,), keys=(), carry=()), counts=counts)

    def micro_step(params, state, args, boundary):
        if isinstance(config.sync, MeshAxis):
            step.roles.check((params, *args))
            splitting.check_devices((params, *args), step.roles.batch, 1, False, config.sync.size())
        loss, _, params, state = step(params, state, args, boundary)
        return traced_loss.mean(loss), params, state

    return micro_step


def _without_aux(fun: Callable[..., Any], method: str) -> Callable[..., Any]:
    """The loss `fun`, whose value is checked for `method`, which does not support aux."""

    @functools.wraps(fun, updated=())
    def checked(*args):
        value = fun(*args)
        traced_loss.check_total(value.total if isinstance(value, Weighted) else value, method)
        return value

    return checked
