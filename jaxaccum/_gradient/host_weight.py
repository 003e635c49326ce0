"""Computes the weights of micro-batches on the host, before the micro-batches run.

A micro-batch that may have weight 0 needs a selection, which costs a pass over its gradient. For those that the host
knows to count, it runs another program, without the selection.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._devices import mesh_map
from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice
from jaxaccum._gradient import substitution
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import core, eager, jaxprs, prng
from jaxaccum._sums import traced_loss
from jaxaccum._types import Tree

_BATCH_ALONE = Roles(params=(0,), batch=(1,), keys=(), carry=())


class HostWeight:
    """Tells which micro-batches are known to have a positive weight on every device.

    `fun(params, *args, **kwargs)` returns (loss, rest); with a mesh, the first of `args` that is not a carry is split
    over the data axis. The weight must be a constant, or be computed from the data, which is all but the parameters and
    the carry, by cheap operations (see `substitution`). The loss is traced once more for each signature of its data, so
    its weight must not depend on the types of the parameters or the carry.
    """

    def __init__(
        self,
        fun: Callable[..., tuple[Any, Any]],
        sync: OneDevice | MappedAxis | MeshAxis,
        roles: Roles = _BATCH_ALONE,
    ):
        self._of_args, self._sync, self._roles = fun, sync, roles
        self._known: dict[Any, bool | _Test] = {}

    def is_positive(self, params: Tree, *args: Tree, **kwargs: Tree) -> bool:
        """Whether the weight is known to be positive; waits for the leaves it depends on if they are being computed."""
        held, data = (params,), (*args, kwargs)
        if self._roles.carry:
            held = params, *[args[i - 1] for i in self._roles.carry]
            _, *others = self._roles.without_carry((params, *args))
            data = *others, kwargs
        leaves, treedef = jax.tree.flatten(data)
        types = tuple([(x.shape, x.dtype) if hasattr(x, "dtype") else type(x) for x in leaves])
        x64 = jax.config.jax_enable_x64  # pyrefly: ignore[missing-attribute]
        signature = treedef, types, x64, eager.trace_state_clean()
        known = self._known.get(signature)
        if known is None:
            try:
                loss = self._traced(held, data)
            except Exception:  # The program that runs next raises it. Another trace may succeed.
                return False
            known = self._known[signature] = self._test(loss, data)
        return known if isinstance(known, bool) else known(leaves)

    def _fun(self, held: Sequence[Tree], *data: Any) -> tuple[Any, Any]:
        """The loss as a function of the parameters with the carry, and of the data."""
        (params, *carry), (*others, kwargs) = held, data
        return self._of_args(*self._roles.with_carry((params, *others), carry), **kwargs)

    def _traced(self, held: Sequence[Tree], data: Sequence[Tree]) -> traced_loss.Traced:
        """The loss, traced as in its program: with a mesh, on one device's share."""
        if not isinstance(self._sync, MeshAxis):
            return traced_loss.trace(self._fun, held, *data)
        traced = []
        on_device = lambda *args: traced.append(traced_loss.trace(self._fun, *args))
        options = {"split": (1,), "split_dim": 0, "out_specs": None}
        jax.eval_shape(lambda *args: mesh_map.on_data_axes(on_device, self._sync, args, {}, **options), held, *data)
        return traced[0]

    def _test(self, loss: traced_loss.Traced, data: Sequence[Tree]) -> "bool | _Test":
        """How to test micro-batches like this one."""
        if not loss.has_weight:
            return True
        found = substitution.data_weight(loss, range(1, len(loss.args)))
        if found is None:
            return False
        closed, used = found
        of_params = jax.tree.structure(loss.args[0]).num_leaves
        inputs = [i for i, is_used in enumerate(used[of_params:]) if is_used]
        split = jax.tree.structure(data[0]).num_leaves if isinstance(self._sync, MeshAxis) else 0
        axes = tuple(0 if i < split else None for i in inputs)
        weight = functools.partial(_evaluated, closed)

        def are_positive(*inputs):
            shares = lambda x, aval: x.reshape(-1, *aval.shape)
            by_share = [
                x if axis is None else shares(x, aval)
                for x, axis, aval in zip(inputs, axes, closed.in_avals, strict=True)
            ]
            [weights] = jax.vmap(weight, axes)(*by_share) if 0 in axes else weight(*by_share)
            # What is a rounding error here may be 0 on another device.
            least = jnp.finfo(weights.dtype).eps ** 0.5 if jnp.issubdtype(weights.dtype, jnp.floating) else 1
            return jnp.all(weights >= jnp.asarray(least, weights.dtype))

        leaves = jax.tree.leaves(data)
        dtypes = [aval.dtype for aval in closed.in_avals]
        try:
            cpu = jax.local_devices(backend="cpu")[0]
            on_cpu = jax.sharding.SingleDeviceSharding(cpu)
            types = [
                jax.ShapeDtypeStruct(np.shape(leaves[i]), dtype, sharding=on_cpu)
                for i, dtype in zip(inputs, dtypes, strict=True)
            ]
            with _undisturbed(), jax.set_mesh(jax.sharding.Mesh([cpu], "cpu")):
                test = _Test(jax.jit(are_positive).lower(*types).compile(), inputs, dtypes)
        except Exception:  # The host has no CPU backend, can't read a constant, or runs inside of a transformation.
            return False
        return test if inputs else test(leaves)


class _Test(NamedTuple):
    """Whether weights are positive: `program` of the leaves of the data at `inputs`, in these dtypes."""

    program: Callable[..., Any]
    inputs: Sequence[int]
    dtypes: Sequence[Any]

    def __call__(self, leaves: Sequence[Any]) -> bool:
        inputs = [leaves[i] for i in self.inputs]
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in inputs):
            return True  # Shapes stand for a micro-batch that counts.
        if not all(map(_is_readable, inputs)):
            return False
        with _undisturbed():
            return bool(self.program(*map(np.asarray, inputs, self.dtypes)))


def _evaluated(closed: core.ClosedJaxpr, *inputs: Any) -> list[Any]:
    """Evaluates a weight's jaxpr on one device, without the meshes and the layouts that it was traced with."""

    def results(eqn, operands):
        if eqn.primitive.name in _LAYOUTS:
            return operands
        called = [part for part in jaxprs.parts(eqn) if isinstance(part, (core.Jaxpr, core.ClosedJaxpr))]
        if len(called) == 1:
            [body] = called
            return _evaluated(core.ClosedJaxpr(body, ()) if isinstance(body, core.Jaxpr) else body, *operands)
        params = eqn.params | {name: None for name in ("sharding", "out_sharding") if name in eqn.params}
        found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
        return found if eqn.primitive.multiple_results else [found]

    # A literal has a mesh, too. Large arrays, which may be for other results than the weight, are not read.
    keeps = lambda x: np.shape(x) or prng.is_typed(x)
    entry = lambda x: x if keeps(x) else np.asarray(x, jax.typeof(x).dtype)
    return jaxprs.evaluate(closed.jaxpr, closed.consts, inputs, results, entry)


# Primitives that return their operands, elsewhere or with another type.
_LAYOUTS = frozenset(["device_put", "pcast", "pvary", "reshard", "sharding_constraint"])


def _is_readable(leaf: Any) -> bool:
    """Whether the host can read `leaf`: its array has no part in another process."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Allows compiled programs and transfers, whatever the caller has set for its own."""
    with jax.disable_jit(False), jax.transfer_guard("allow"):
        yield
