"""A micro-step from the loss: each device's gradient, its accumulation and, at a boundary, the optimizer step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxaccum._devices.topology import MappedAxis, MeshAxis, Sync
from jaxaccum._gradient import micro_gradient, once_per_window, splitting
from jaxaccum._gradient.micro_gradient import Target
from jaxaccum._gradient.returns import Carry, Returns
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import prng
from jaxaccum._multi_steps import accumulation, checks
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
        kwargs: dict[str, Tree] | None = None,
    ) -> tuple[Weighted, Any, Any, Tree, MultiStepsState]:
        """Runs one micro-step: (loss, rest, whether it counts, params, state).

        The first three are per device, stacked with a mesh.
        """
        config = self.config
        checks.on_device(state.acc_grads)
        seen = params if config.prepare is None else once_per_window.restore(config.prepare, params, state.prepared)
        judges = config.should_skip_update_fn is not None  # That function receives mean gradients.
        loss, rest, grads = micro_gradient.on_each(
            self.fun,
            config.sync,
            self.roles,
            (seen, *args),
            kwargs,
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
        call = Call(params, extra_args, applies=True)
        params, state, counted = accumulation.add(config, state, micro_batch, boundary, call)
        return loss, rest, counted, params, state


def micro_step(
    config: Config, fun: Callable[..., Any], returns: Returns, *, counts: bool = False
) -> Callable[..., tuple[Any, Tree, Any]]:
    """`MultiSteps.micro_step` for one loss, called as `(params, state, args, kwargs, boundary)`."""
    sync = config.sync
    is_mesh = isinstance(sync, MeshAxis)
    device = MappedAxis(sync.names) if isinstance(sync, MeshAxis) else sync
    roles = micro_step_roles(sync, returns)

    def micro_step(params, state, args, kwargs, boundary):
        args = params, *args
        roles.check(args)
        if is_mesh:
            splitting.check_devices(args, roles.batch, 1, False, sync.size())
        carry = Carry.of([args[i] for i in roles.carry])

        def on_device(*args, **kwargs):
            if is_mesh:  # The batch is sharded; the other arguments are replicated.
                fold = lambda tree: prng.fold_typed(tree, device.index())
                args = [arg if i in roles.all() else fold(arg) for i, arg in enumerate(args)]
                kwargs = fold(kwargs)
            local = Carry.of([args[i] for i in roles.carry]).local(device)
            value, new, aux = returns.unpack(
                fun(*roles.with_carry(roles.without_carry(args), carry.trees(local)), **kwargs)
            )
            return value, (carry.renewed(new), aux)

        step = LossStep(config, on_device, roles, counts=counts)
        with roles.hints(args, kwargs, 1, True, remedy="put both in one tree, such as {'x': x, 'y': y}"):
            loss, (new, aux), counted, params, state = step(params, state, args[1:], boundary, kwargs=kwargs)
        if carry.leaves and counted is not True:
            new = weighted_sum.select(counted, new, sync.local(carry.leaves))
        return returns.pack(traced_loss.mean(loss), carry.trees(sync.averaged(new)), aux), params, state

    return micro_step


def micro_step_roles(sync: Sync, returns: Returns) -> Roles:
    """The roles of the arguments of a micro-step's loss; only a mesh splits a batch."""
    roles = Roles.of(0, None, (), returns.carry_argnums)
    return roles if isinstance(sync, MeshAxis) else roles._replace(batch=())
