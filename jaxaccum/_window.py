"""The window of one device: the sums of loss and gradient over its micro-batches, before any synchronisation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxaccum import _accumulator, _hoist, _in_place, _packing, _prepare, _split
from jaxaccum._accumulator import Weighted
from jaxaccum._cast import Cast
from jaxaccum._roles import Roles
from jaxaccum._sync import MappedAxis, OneDevice

Tree = Any


class Window(NamedTuple):
    """What a window is made of; `value_and_grad` documents its arguments."""

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
        """The arguments to differentiate: one, or a tuple."""
        return args[self.argnums] if isinstance(self.argnums, int) else tuple(args[i] for i in self.argnums)

    def run(
        self, device: OneDevice | MappedAxis, args: Sequence[Tree], kwargs: dict[str, Tree]
    ) -> tuple[Weighted, Tree, jax.Array, tuple[Tree, ...], Tree]:
        """The window on this device.

        Args:
          device: where it runs.
          args: the positional arguments of `fun`, its batch that of the whole window.
          kwargs: the keyword arguments.

        Returns:
          (local sums of loss and gradient; for each gradient, the axes over which it is summed already; a zero of the
          loss's dtype; the carry, averaged over the devices; aux).
        """
        params = self.differentiated(args)
        batches, length = _split.split(args, self.roles.batch, self.k, self.stacked)
        carry = device.local(jax.tree.map(_strong, tuple(args[i] for i in self.roles.carry)))

        def loss(seen, index, batch, carry):
            differentiated = (seen,) if isinstance(self.argnums, int) else seen
            number = device.index() * self.k + index
            keys = tuple(jax.tree.map(lambda key: jax.random.fold_in(key, number), args[i]) for i in self.roles.keys)
            returned = self.fun(*self.roles.put(args, differentiated, batch, keys, carry), **kwargs)
            value, new_carry, aux = self.unpack(returned)
            return value, (_carried(new_carry, carry), aux)

        # Cast to varying before anything is computed from them, so that no gradient is reduced on its way back.
        seen = params = device.local(params)
        transpose, reduced = (lambda grads: grads), jax.tree.map(lambda _: (), params)
        first = (jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x[0], batches), carry)
        if isinstance(self.prepare, str):
            visible, loss = _hoist.split(loss, params, *first)
        else:
            visible = self.prepare.seeing(loss, params, *first) if isinstance(self.prepare, Cast) else self.prepare
            if visible is not None:
                _prepare.check(visible, params)
        if visible is not None:
            reduced = _prepare.gathered(visible, params, device.names)
            seen, transpose = _prepare.once(visible, params)
            seen = device.local(seen)

        start = device.local(self._start(seen))
        backward = _in_place.backward(loss, self.in_place, seen, start.total[1], *first)
        sums, like, carry, aux = self._sum(device, backward, seen, start, carry, batches, length)
        sums = Weighted((sums.total[0], transpose(sums.total[1])), sums.weight)
        return sums, reduced, like, device.averaged(carry), aux

    def _start(self, seen: Tree) -> Weighted:
        """Sums of no micro-batch."""
        zero = jnp.zeros((), _accumulator.weight_dtype())
        return Weighted((zero, _accumulator.zeros(seen, self.accumulator_dtype)), zero)

    def _sum(self, device, backward, seen, sums, carry, batches, length):
        """(sums of loss and gradient, a zero of the loss's dtype, the last carry, aux) over the micro-batches."""
        packing = _packing.of(sums.total[1], backward.inside)
        changed = lambda sums, change: Weighted((sums.total[0], change(sums.total[1])), sums.weight)
        dtypes = []

        def micro_step(state, micro_batch):
            sums, carry = state
            (value, (new_carry, aux)), grads = backward(seen, packing.unpack(sums.total[1]), *micro_batch, carry)
            dtypes.append(value.total.dtype)
            keep = None if value.weight is None else jnp.asarray(value.weight) != 0
            weight = jnp.ones_like(sums.weight) if value.weight is None else value.weight
            # The loss tells one window from the next.
            bits = jax.lax.bitcast_convert_type(value.total.astype(jnp.float32), jnp.uint32)
            counters = (device.index(), micro_batch[0], bits)
            new = Weighted((value.total, packing.pack(grads)), weight)
            sums = _accumulator.merge(sums, new, keep=keep, counters=counters)
            return (sums, new_carry if keep is None else _accumulator.select(keep, new_carry, carry)), aux

        start, k = (changed(sums, packing.pack), carry), self.k
        if isinstance(k, int) and k == length:
            (sums, carry), aux = jax.lax.scan(
                micro_step, start, (jnp.arange(k, dtype=jnp.int32), batches), unroll=self.unroll
            )
        elif self.unroll > 1:
            raise ValueError(
                f"unroll={self.unroll} needs all of the stacked batch: num_micro_batches={k}, but it holds {length}."
            )
        else:
            (sums, carry), aux = _loop(micro_step, start, batches, k, length)
        return changed(sums, packing.unpack), jnp.zeros((), dtypes[0]), carry, aux

    def unpack(self, returned: Any) -> tuple[Any, tuple[Tree, ...], Tree]:
        """What `fun` returned as (loss, new carry, aux), with () and None for what it does not return."""
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


def _loop(micro_step, start, batches, k, length):
    """`lax.scan` over the first k of `length` micro-batches, k static or traced; rows of absent ones are zero."""
    take = lambda i: (i, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches))
    # Traced once, to know the shapes of what it returns before the loop that needs them.
    closed, (_, aux_shapes) = jax.make_jaxpr(micro_step, return_shape=True)(start, take(jnp.zeros((), jnp.int32)))
    rows = k if isinstance(k, int) else length
    aux = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), aux_shapes)
    treedef = jax.tree.structure((start, aux))

    def body(i, state):
        state, aux = state
        flat = core.jaxpr_as_fun(closed)(*jax.tree.leaves((state, take(i))))
        state, row = jax.tree.unflatten(treedef, flat)
        return state, jax.tree.map(lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, i, 0), aux, row)

    return jax.lax.fori_loop(0, k if isinstance(k, int) else jnp.minimum(k, length), body, (start, aux))


def _strong(x: Any) -> jax.Array:
    """`x` as an array without a weak type, which a loop would widen by tracing its body again."""
    return jax.lax.convert_element_type(x, jnp.result_type(x)) if jnp.asarray(x).weak_type else jnp.asarray(x)


def _carried(new: tuple[Tree, ...], old: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """The new model state, which must have the old one's tree, shapes and dtypes."""
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    if jax.tree.structure(new) != jax.tree.structure(old) or shapes(new) != shapes(old):
        raise ValueError(
            f"fun must return a new carry of the same tree, shapes and dtypes: carry_argnums passed {shapes(old)}, "
            f"fun returned {shapes(new)}."
        )
    return jax.tree.map(_strong, new)
