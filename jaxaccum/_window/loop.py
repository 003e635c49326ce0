"""One device's window: local sums of loss and gradient over its micro-batches, before any reduction."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import layout
from jaxaccum._devices.topology import MappedAxis, OneDevice
from jaxaccum._gradient import hoisting, micro_gradient, once_per_window, splitting, substitution, sum_packing
from jaxaccum._gradient.casting import Cast
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import core, prng
from jaxaccum._sums import traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class Window(NamedTuple):
    """The configuration of a window; see `value_and_grad` for the fields."""

    fun: Callable[..., Any]
    k: Any
    stacked: bool
    argnums: int | Sequence[int]
    roles: Roles
    has_aux: bool
    carry_argnums: int | Sequence[int] | None
    prepare: Callable[[Tree], Tree] | str | None
    accumulator_dtype: Any
    in_place: bool | None
    unroll: int

    def differentiated(self, args: Sequence[Tree]) -> Tree:
        """The differentiated arguments: one, or a tuple."""
        return args[self.argnums] if isinstance(self.argnums, int) else tuple(args[i] for i in self.argnums)

    def run(
        self, device: OneDevice | MappedAxis, args: Sequence[Tree], kwargs: dict[str, Tree]
    ) -> tuple[Weighted, Tree, jax.Array, tuple[Tree, ...], Tree]:
        """Runs the window on this device; `args` holds this device's whole batch.

        Returns (local sums of loss and gradient, the axes over which each gradient is already reduced, a zero of the
        loss's dtype, the carry averaged over the devices, aux).
        """
        params = weighted_sum.arrays(self.differentiated(args))
        micro_batches = splitting.split(args, self.roles.batch, self.k, self.stacked)
        # As leaves, because loops compare tree structures and not every pytree class supports comparison.
        leaves, carry_structure = jax.tree.flatten(tuple(args[i] for i in self.roles.carry))
        carry = prng.fold_beyond_first(device.local(list(map(_strong, leaves))), device.index())

        def loss(seen, index, batch, carry):
            differentiated = (seen,) if isinstance(self.argnums, int) else seen
            number = device.index() * self.k + index
            keys = tuple(prng.fold(args[i], number) for i in self.roles.keys)
            old_carry = carry_structure.unflatten(carry)
            returned = self.fun(*self.roles.put(args, differentiated, batch, keys, old_carry), **kwargs)
            value, new_carry, aux = self.unpack(returned)
            return value, (_carried(new_carry, old_carry), aux)

        # Cast to varying before any use, so that the backward pass does not reduce the gradients.
        params = device.local(params)
        first = (device.local(jnp.zeros((), jnp.int32)), micro_batches.take(0), carry)
        is_single = isinstance(self.k, int) and self.k == 1
        adds = self.in_place is not False and not is_single
        prepared = self._prepared(device, loss, params, first, in_place=adds)
        substituted = substitution.Substitution()
        if not is_single:
            substituted = substitution.of(prepared.loss, micro_batches, self.k, carry)
        if substituted.weights is None and prepared.loss.has_weight and not self.in_place:
            prepared = self._prepared(device, loss, params, first, in_place=False)
        (seen, traced, transpose, reduced), mean = prepared, None
        if traced.weight_varies():
            mean = self._mean(device, traced, seen, carry, micro_batches)
            traced = traced.less(mean)
        if is_single:
            sums, like, carry, aux = _only(traced, seen, *first)
        else:
            start = device.local(self._start(seen))
            drops = None if substituted.weights is None else False
            gradient = micro_gradient.of(traced, self.in_place, start.total[1], drops=drops)
            sums, like, carry, aux = self._sum(device, gradient, substituted, seen, start, carry, micro_batches)
        total, grads = sums.total
        total = total if mean is None else total + mean * sums.weight
        sums = Weighted((total, transpose(grads, self.k)), sums.weight)
        return sums, reduced, like, carry_structure.unflatten(device.averaged(carry)), aux

    def _prepared(self, device, loss, params, first, in_place: bool) -> "_Prepared":
        """Computes what `prepare` makes of the parameters; `in_place`: whether gradients may be added in place."""
        seen, transpose, reduced = params, lambda sums, count: sums, jax.tree.map(lambda _: (), params)
        if isinstance(self.prepare, str):
            narrow = jnp.dtype(self.accumulator_dtype).itemsize < 4
            visible, loss = hoisting.split(loss, params, *first, in_place=in_place and not narrow)
        else:
            visible = self.prepare.seeing(loss, params, *first) if isinstance(self.prepare, Cast) else self.prepare
            if visible is not None:
                once_per_window.check_linear(visible, params)
        if visible is not None:
            reduced = once_per_window.gathered_axes(visible, params, device.names)
            seen, transpose = once_per_window.with_transpose(visible, params)
            seen = device.local(seen)
        traced = traced_loss.trace(loss, seen, *first)
        traced.refuse_reduced(device.names)
        return _Prepared(seen, traced, transpose, reduced)

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
        (sums, _), _ = self._loop(micro_step, start, micro_batches.length)
        return device.local(traced_loss.mean(device.joined(sums)))

    def _sum(self, device, gradient, substituted, seen, sums, carry, micro_batches):
        """Sums over the micro-batches: (sums of loss and gradient, a zero of the loss's dtype, the last carry, aux)."""
        packing = sum_packing.of(sums.total[1], gradient.inside)
        changed = lambda sums, change: Weighted((sums.total[0], change(sums.total[1])), sums.weight)
        dtypes = []

        def micro_step(state, i):
            sums, carry = state
            step = substituted.step(i, carry)
            kept, args = step.kept, (device.local(step.number), micro_batches.take(step.number), step.carry)
            value, (new_carry, aux), grads = gradient(seen, packing.unpack(sums.total[1]), *args, kept=kept)
            dtypes.append(value.total.dtype)
            keep = traced_loss.keep(value.weight) if kept is None else kept
            weight = value.weight if step.weight is None else step.weight
            weight = jnp.ones_like(sums.weight) if weight is None else weight
            # The loss's bits make the rounding differ between windows.
            bits = jax.lax.bitcast_convert_type(value.total.astype(jnp.float32), jnp.uint32)
            new = Weighted((value.total, packing.pack(grads)), weight)
            selects = keep if kept is None else None  # What was substituted adds 0.
            sums = weighted_sum.merge(sums, new, keep=selects, counters=(device.index(), i, bits))
            if kept is not None and jax.tree.leaves(aux):
                own = lambda: gradient.loss.total(seen, device.local(i), micro_batches.take(i), carry)[1][1][1]
                aux = jax.lax.cond(kept, lambda: aux, own)
            return (sums, new_carry if keep is None else weighted_sum.select(keep, new_carry, carry)), aux

        (sums, carry), aux = self._loop(micro_step, (changed(sums, packing.pack), carry), micro_batches.length)
        return changed(substituted.sums(sums), packing.unpack), jnp.zeros((), dtypes[0]), carry, aux

    def _loop(self, micro_step, start, length):
        """Loops `micro_step(state, i) -> (state, row)` over the window's `length` micro-batches: (last state, rows)."""
        k = self.k
        if self.unroll > 1 and k != length:
            raise ValueError(
                f"unroll={self.unroll} needs all of the stacked batch: num_micro_batches={k}, but it holds {length}."
            )
        if isinstance(k, int):
            return jax.lax.scan(micro_step, start, jnp.arange(k, dtype=jnp.int32), unroll=self.unroll)
        return _loop(micro_step, start, k, length)

    def unpack(self, returned: Any) -> tuple[Any, tuple[Tree, ...], Tree]:
        """Normalizes the result of `fun` to (loss, new carry, aux), with () for no carry and None for no aux."""
        has_aux, carry_argnums = self.has_aux, self.carry_argnums
        has_carry = carry_argnums is not None
        if not has_aux and not has_carry:
            return returned, (), None

        def pair(value):
            if not isinstance(value, (tuple, list)) or isinstance(value, Weighted) or len(value) != 2:
                form = (
                    "(loss, (new_carry, aux))"
                    if has_aux and has_carry
                    else "(loss, new_carry)"
                    if has_carry
                    else "(loss, aux)"
                )
                raise TypeError(
                    f"with {has_aux=} and {carry_argnums=} fun must return {form}, got {type(value)} for a pair."
                )
            return value

        value, rest = pair(returned)
        if not has_carry:
            return value, (), rest
        carry, aux = pair(rest) if has_aux else (rest, None)
        return value, (carry,) if isinstance(carry_argnums, int) else tuple(carry), aux

    def pack(self, value: Any, carry: tuple[Tree, ...], aux: Tree) -> Any:
        """The inverse of `unpack`."""
        if self.carry_argnums is None:
            return (value, aux) if self.has_aux else value
        rest = carry[0] if isinstance(self.carry_argnums, int) else carry
        return value, ((rest, aux) if self.has_aux else rest)


class _Prepared(NamedTuple):
    """What `prepare` makes of the parameters.

    Attributes:
      seen: the result.
      loss: the traced loss of `seen`.
      transpose: maps sums of gradients of `seen`, and their number, to sums of gradients of the parameters.
      reduced: for each parameter, the axes over which its gradient is then already reduced.
    """

    seen: Tree
    loss: traced_loss.Traced
    transpose: Callable[[Tree, Any], Tree]
    reduced: Tree


def _only(traced, seen, index, batch, carry):
    """`Window._sum` for a window of one micro-batch, without a loop."""
    value, (new_carry, aux), grads = micro_gradient.of(traced, False, None)(seen, None, index, batch, carry)
    one = jnp.ones((), weighted_sum.weight_dtype())
    weight = one if value.weight is None else jnp.asarray(value.weight).astype(one.dtype)
    sums = Weighted((value.total.astype(one.dtype), grads), weight)
    keep = traced_loss.keep(value.weight)
    if keep is not None:
        sums = weighted_sum.only_if(keep, sums)
        new_carry = weighted_sum.select(keep, new_carry, carry)
    return sums, jnp.zeros((), value.total.dtype), new_carry, jax.tree.map(lambda x: x[None], aux)


def _loop(micro_step, start, k, length):
    """`lax.scan` over the first k of `length` micro-batches for a traced k; the other rows are zero."""
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
    return jax.lax.fori_loop(jnp.int32(0), jnp.minimum(k, length).astype(jnp.int32), body, (start, aux))


def _zero() -> jax.Array:
    return jnp.zeros((), weighted_sum.weight_dtype())


def _strong(x: Any) -> jax.Array:
    """`x` as an array without a weak type, which would make a loop trace its body twice."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype) if jax.typeof(x).weak_type else x


def _carried(new: tuple[Tree, ...], old: tuple[Tree, ...]) -> list[jax.Array]:
    """The leaves of the new carry, checked to match the old one's tree, shapes and dtypes."""
    flat = jax.tree_util.tree_leaves_with_path
    types = lambda tree: [(path, jnp.shape(x), jnp.result_type(x)) for path, x in flat(tree)]
    if types(new) != types(old):
        shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
        raise ValueError(
            f"fun must return a new carry of the same tree, shapes and dtypes: carry_argnums passed {shapes(old)}, "
            f"fun returned {shapes(new)}."
        )
    return list(map(_strong, jax.tree.leaves(new)))
