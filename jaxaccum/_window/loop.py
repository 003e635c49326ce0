"""One device's window: local sums of loss and gradient over its micro-batches, before any reduction."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import layout
from jaxaccum._devices.topology import MappedAxis, OneDevice
from jaxaccum._gradient import micro_gradient, splitting, substitution, sum_packing
from jaxaccum._gradient.observed import Observed
from jaxaccum._gradient.returns import Carry, Returns
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import core, prng
from jaxaccum._sums import norms, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum._window import once


class Window(NamedTuple):
    """The configuration of a window; see `value_and_grad` for the fields."""

    fun: Callable[..., Any]
    k: Any
    stacked: bool
    argnums: int | Sequence[int]
    roles: Roles
    returns: Returns
    prepare: Callable[[Tree], Tree] | str | None
    accumulator_dtype: Any
    in_place: bool | None
    unroll: int
    observed: Observed
    two_sizes: bool = False  # Whether one device measures the sums after the first micro-batches too.

    def differentiated(self, args: Sequence[Tree]) -> Tree:
        """The differentiated arguments: one, or a tuple."""
        return args[self.argnums] if isinstance(self.argnums, int) else tuple(args[i] for i in self.argnums)

    def run(
        self, device: OneDevice | MappedAxis, args: Sequence[Tree], kwargs: dict[str, Tree]
    ) -> tuple[Weighted, Tree, jax.Array, tuple[Tree, ...], Tree]:
        """Runs the window on this device; `args` holds this device's whole batch.

        Returns (local sums of loss and gradient, the axes over which each gradient is already reduced, a zero of the
        loss's dtype, the carry averaged over the devices, (aux, rows of norms)).
        """
        params = device.local(weighted_sum.arrays(self.differentiated(args)))
        micro_batches = splitting.split(args, self.roles.batch, self.k, self.stacked)
        given = Carry.of([args[i] for i in self.roles.carry])
        carry = given.local(device)
        call = self.call(device, args, kwargs)

        def loss(seen, index, batch, carry):
            value, new_carry, aux = self.returns.unpack(call(seen, index, batch, given.trees(carry)))
            return value, (given.renewed(new_carry), aux)

        first = first_step(device, micro_batches, carry)
        prepared = self._prepared(device, loss, params, first, micro_batches, carry)
        sums, like, carry, aux = self.sums(device, prepared.fun, prepared.params, micro_batches, carry)
        sums = Weighted((sums.total[0], prepared.transpose(sums.total[1], self.k)), sums.weight)
        return sums, prepared.reduced, like, given.trees(device.averaged(carry)), aux

    def call(self, device: OneDevice | MappedAxis, args: Sequence[Tree], kwargs: dict[str, Tree]) -> Callable[..., Any]:
        """Returns `fun` as a function of (differentiated arguments, index of a micro-batch, its batch, carry)."""

        def call(seen, index, batch, carry):
            differentiated = (seen,) if isinstance(self.argnums, int) else seen
            number = device.index() * self.k + index
            keys = tuple(prng.fold(args[i], number) for i in self.roles.keys)
            return self.fun(*self.roles.put(args, differentiated, batch, keys, carry), **kwargs)

        return call

    def sums(
        self,
        device: OneDevice | MappedAxis,
        loss: Callable[..., Any],
        seen: Tree,
        micro_batches: splitting.MicroBatches,
        carry: list[jax.Array],
    ) -> tuple[Weighted, jax.Array, list[jax.Array], Tree]:
        """Sums `loss(seen, index, batch, carry) -> (loss, (new carry, aux))` and its gradient over the micro-batches.

        Returns (local sums of loss and gradient, a zero of the loss's dtype, the last carry, (aux, rows of norms)).
        """
        if self.two_sizes:
            norms.check_two_sizes("num_micro_batches", self.k, device.size())
        first = first_step(device, micro_batches, carry)
        traced, mean = traced_loss.trace(loss, seen, *first), None
        traced.refuse_reduced(device.names)
        if traced.weight_varies():
            mean = self._mean(device, traced, seen, carry, micro_batches)
            traced = traced.less(mean)
        if isinstance(self.k, int) and self.k == 1:
            sums, like, carry, aux = _only(self.observed, traced, seen, *first)
        else:
            start = device.local(self._start(seen))
            substituted = substitution.of(traced, micro_batches, self.k, carry)
            drops = None if substituted.weights is None else False
            gradient = micro_gradient.of(traced, self.in_place, start.total[1], drops=drops)
            sums, like, carry, aux = self._sum(device, gradient, substituted, seen, start, carry, micro_batches)
        if mean is not None:
            sums = Weighted((sums.total[0] + mean * sums.weight, sums.total[1]), sums.weight)
        return sums, like, carry, aux

    def _prepared(self, device, loss, params, first, micro_batches, carry) -> once.Prepared:
        """Takes `prepare` out of the loss, for gradients that are added in place if they can be."""
        prepare = functools.partial(once.of, self.prepare, device, loss, params, *first)
        single = isinstance(self.k, int) and self.k == 1
        in_place = False if single or jnp.dtype(self.accumulator_dtype).itemsize < 4 else self.in_place
        prepared = prepare(in_place=in_place)
        if in_place is None and isinstance(self.prepare, str):
            traced = traced_loss.trace(prepared.fun, prepared.params, *first)
            if traced.has_weight and substitution.of(traced, micro_batches, self.k, carry).weights is None:
                return prepare(in_place=False)
        return prepared

    def _start(self, seen: Tree) -> Weighted:
        return Weighted((_zero(), weighted_sum.zeros(seen, self.accumulator_dtype)), _zero())

    def _mean(self, device, loss, seen, carry, micro_batches) -> jax.Array:
        """The window's mean loss over all devices, from forward passes alone."""

        def micro_step(state, i):
            sums, carry = state
            _, (value, (new_carry, _)) = loss.total(seen, device.local(i), micro_batches.take(i), carry)
            keep = value.weight != 0
            sums = weighted_sum.merge(sums, value, keep=keep)
            return (sums, weighted_sum.select(keep, new_carry, carry)), ()

        start = device.local(Weighted(_zero(), _zero())), carry
        (sums, _), _, _ = self._loop(micro_step, start, micro_batches.length)
        return device.local(traced_loss.mean(device.joined(sums)))

    def _sum(self, device, gradient, substituted, seen, sums, carry, micro_batches):
        """Sums over the micro-batches.

        Returns (sums of loss and gradient, a zero of the loss's dtype, the last carry, (aux, rows of norms)).
        """
        packing = sum_packing.of(sums.total[1], gradient.inside)
        changed = lambda sums, change: Weighted((sums.total[0], change(sums.total[1])), sums.weight)
        dtypes = []

        def part(state):  # Of the stacks, so that small leaves take one kernel together.
            sums, _ = state
            return norms.of_part(Weighted(sums.total[1], sums.weight))

        def micro_step(state, i):
            sums, carry = state
            step = substituted.step(i, carry)
            kept, args = step.kept, (device.local(step.number), micro_batches.take(step.number), step.carry)
            value, (new_carry, aux), grads = gradient(seen, packing.unpack(sums.total[1]), *args, kept=kept)
            dtypes.append(value.total.dtype)
            keep = traced_loss.keep(value.weight) if kept is None else kept
            weight = value.weight if step.weight is None else step.weight
            grads, row = self.observed(grads, weight, True if keep is None else keep)
            weight = jnp.ones_like(sums.weight) if weight is None else weight
            # The loss's bits make the rounding differ between windows.
            bits = jax.lax.bitcast_convert_type(value.total.astype(jnp.float32), jnp.uint32)
            new = Weighted((value.total, packing.pack(grads)), weight)
            # What was substituted adds 0, unless a transformation makes something else of it.
            selects = keep if kept is None or self.observed.transform is not None else None
            sums = weighted_sum.merge(sums, new, keep=selects, counters=(device.index(), i, bits))
            if kept is not None and jax.tree.leaves(aux):
                own = lambda: gradient.loss.total(seen, device.local(i), micro_batches.take(i), carry)[1][1][1]
                aux = jax.lax.cond(kept, lambda: aux, own)
            new_carry = new_carry if keep is None else weighted_sum.select(keep, new_carry, carry)
            return (sums, new_carry), (aux, row)

        start = changed(sums, packing.pack), carry
        measured = part if self.two_sizes and device.size() == 1 else None
        (sums, carry), (aux, rows), parts = self._loop(micro_step, start, micro_batches.length, measured)
        sums = changed(substituted.sums(sums), packing.unpack)
        return sums, jnp.zeros((), dtypes[0]), carry, (aux, rows if measured is None else parts)

    def _loop(self, micro_step, start, length, measured=None):
        """Loops `micro_step(state, i) -> (state, row)` over the window's `length` micro-batches.

        Returns (last state, rows, `measured` of the states after the first micro-batches and at the end, or None).
        """
        k = self.k
        if self.unroll > 1 and k != length:
            raise ValueError(
                f"unroll={self.unroll} needs all of the stacked batch: num_micro_batches={k}, but it holds {length}."
            )
        if not isinstance(k, int):
            return _loop(micro_step, start, k, length, measured)
        scan = functools.partial(jax.lax.scan, micro_step, unroll=self.unroll)
        numbers = jnp.arange(k, dtype=jnp.int32)
        if measured is None:
            return *scan(start, numbers), None

        def part(state, numbers):
            state, rows = scan(state, numbers)
            return state, (rows, measured(state))

        # A loop of loops: the program holds one micro-step, as without it, and no conditional.
        count = next(n for n in range(2, k + 1) if k % n == 0)
        state, (rows, parts) = jax.lax.scan(part, start, numbers.reshape(count, -1))
        return state, jax.tree.map(lambda x: x.reshape(k, *x.shape[2:]), rows), jnp.stack([parts[0], parts[-1]])


def first_step(device: OneDevice | MappedAxis, micro_batches: splitting.MicroBatches, carry: Tree) -> tuple[Any, ...]:
    """The (index, batch arguments, carry) of the first micro-batch, to trace a loss with."""
    return device.local(jnp.zeros((), jnp.int32)), micro_batches.take(0), carry


def _only(observed, traced, seen, index, batch, carry):
    """`Window._sum` for a window of one micro-batch, without a loop."""
    value, (new_carry, aux), grads = micro_gradient.of(traced, False, None)(seen, None, index, batch, carry)
    keep = traced_loss.keep(value.weight)
    grads, row = observed(grads, value.weight, True if keep is None else keep)
    one = jnp.ones((), weighted_sum.weight_dtype())
    weight = one if value.weight is None else jnp.asarray(value.weight).astype(one.dtype)
    sums = Weighted((value.total.astype(one.dtype), grads), weight)
    if keep is not None:
        sums = weighted_sum.only_if(keep, sums)
        new_carry = weighted_sum.select(keep, new_carry, carry)
    return sums, jnp.zeros((), value.total.dtype), new_carry, jax.tree.map(lambda x: x[None], (aux, row))


def _loop(micro_step, start, k, length, measured):
    """`Window._loop` over the first k of `length` micro-batches for a traced k; the other rows are zero."""
    # Traced once beforehand, because the loop needs the output types.
    closed, (_, aux_shapes) = jax.make_jaxpr(micro_step, return_shape=True)(start, jnp.zeros((), jnp.int32))
    avals = closed.out_avals[len(closed.out_avals) - len(jax.tree.leaves(aux_shapes)) :]
    aux = jax.tree.unflatten(jax.tree.structure(aux_shapes), [layout.zeros(length, aval) for aval in avals])
    treedef = jax.tree.structure((start, aux))

    def body(i, state):
        state, aux = state
        flat = core.jaxpr_as_fun(closed)(*jax.tree.leaves((state, i)))
        state, row = jax.tree.unflatten(treedef, flat)
        return state, jax.tree.map(lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, i, 0), aux, row)

    # Micro-batches are numbered in int32, under x64 too.
    zero, end = jnp.int32(0), jnp.minimum(k, length).astype(jnp.int32)
    if measured is None:
        return *jax.lax.fori_loop(zero, end, body, (start, aux)), None

    def part(state, bounds):
        state = jax.lax.fori_loop(bounds[0], bounds[1], body, state)
        return state, measured(state[0])

    bounds = jnp.stack([zero, jnp.int32(1)]), jnp.stack([jnp.int32(1), end])
    (state, aux), parts = jax.lax.scan(part, (start, aux), bounds)
    return state, aux, parts


def _zero() -> jax.Array:
    return jnp.zeros((), weighted_sum.weight_dtype())
