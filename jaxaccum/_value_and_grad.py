"""Driver 2: a whole window inside one jitted step, a drop-in for `jax.value_and_grad`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec as P

from jaxaccum import _accumulator, _checks, _loss, _mesh, _prepare, _split
from jaxaccum._accumulator import Weighted
from jaxaccum._cast import Cast
from jaxaccum._roles import Roles
from jaxaccum._sync import MappedAxis, MeshAxis

Tree = Any


def value_and_grad(
    fun: Callable[..., Any],
    num_micro_batches: Any,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    stacked: bool = False,
    key_argnums: int | Sequence[int] = (),
    carry_argnums: int | Sequence[int] | None = None,
    prepare: Callable[[Tree], Tree] | None = None,
    accumulator_dtype: Any = jnp.float32,
    grad_dtype: Any = None,
    axis_name: Any = None,
    mesh: Any = None,
    data_axis: Any = "data",
) -> Callable[..., tuple[Any, Tree]]:
    """`jax.value_and_grad` over K micro-batches: the big batch's loss and gradient in one micro-batch's memory.

    Args:
      fun: `fun(*args, **kwargs)` returns the mean loss of a micro-batch, a floating scalar, or a `Weighted`. The
        window's loss and gradient are the mean over micro-batches, or Σ total / Σ weight.
      num_micro_batches: K, an integer of at least 1. With `stacked` it may be a traced integer scalar, up to the
        batch's leading length; absent micro-batches then cost nothing, and no K compiles again.
      argnums: the arguments to differentiate, as in jax.
      has_aux: `fun` returns (loss, aux); aux comes back with a leading micro-batch axis, of length K, or with a
        traced K of the batch's leading length with zeros from K on.
      batch_argnums: the arguments to split: their leaves are (K·N, ...), and micro-batch i is rows i·N to (i+1)·N.
      stacked: batch leaves are (K_max, N, ...) instead.
      key_argnums: random keys; micro-batch i sees `jax.random.fold_in(key, i)`.
      carry_argnums: mutable model state, such as batch statistics, handed from micro-batch to micro-batch: `fun`
        returns (loss, new_carry), or (loss, (new_carry, aux)), and so does the result.
      prepare: a function of the differentiated argument; `fun` sees what it returns. It runs forward once and
        backward once a window, however large K is. See `cast`.
      accumulator_dtype: the dtype of the sums; float64 and complex parameters keep theirs. None: the parameters'.
      grad_dtype: the dtype of the returned gradients; None: the parameters', as jax gives.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the name of the mapped data axis, or a tuple of names. Each of
        the P devices sums over its own batch of K·N, and the sums are joined once, after the loop: loss and gradient
        are those of all P·K·N examples, as on one device with P·K micro-batches, whose keys are numbered alike: device
        p's micro-batch i is number p·K + i. Floating leaves of the carry come back as their mean over the devices;
        others must agree. aux stays each device's own.
      mesh: under jit, a `jax.sharding.Mesh`. Then the batch is a global array of P·K·N examples (stacked: (K_max, P·N,
        ...)), split over the data axis, and everything else is as with `axis_name`. aux comes back as (K, P, ...). The
        mesh's other axes, for tensor parallelism or fsdp, are left to jax, whether Auto or Explicit.
      data_axis: the mesh's data axis, a name or a tuple of names; P is its size.

    Returns:
      A function of the same arguments that returns what `jax.value_and_grad` does. Micro-batches of weight 0 are left
      out, whatever they hold; where all are, loss and gradient are 0.

    Raises:
      TypeError, ValueError: for arguments that contradict each other, at construction; when called, for a batch that
        does not divide into K, for leaves of different lengths, and for a traced K without `stacked`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> w, x = jnp.ones(3), jnp.arange(24.0).reshape(8, 3)
      >>> value, grad = jax.jit(jaxaccum.value_and_grad(loss, 4))(w, x)
      >>> big_value, big_grad = jax.value_and_grad(loss)(w, x)
      >>> bool(jnp.allclose(value, big_value) and jnp.allclose(grad, big_grad))
      True
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {fun!r}.")
    if prepare is not None and not callable(prepare):
        raise TypeError(f"prepare must be None or a function of the parameters, got {prepare!r}.")
    if prepare is not None and not isinstance(argnums, int):
        raise ValueError(f"prepare takes one differentiated argument, got argnums={argnums!r}; put them in one tree.")
    _checks.floating("accumulator_dtype", accumulator_dtype)
    _checks.floating("grad_dtype", grad_dtype)
    k = _checks.num_micro_batches(num_micro_batches, stacked)
    roles = Roles.of(argnums, batch_argnums, key_argnums, carry_argnums)
    sync = _checks.sync(axis_name, mesh, data_axis)
    device = MappedAxis(sync.names) if isinstance(sync, MeshAxis) else sync

    def window(*args, **kwargs):
        _checks.available("accumulator_dtype", accumulator_dtype)
        _checks.available("grad_dtype", grad_dtype)
        roles.check(args)
        params = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
        _checks.differentiable(params)
        batches, length = _split.split(args, roles.batch, k, stacked)
        carry = device.local(jax.tree.map(_strong, tuple(args[i] for i in roles.carry)))

        def loss(seen, index, batch, carry):
            differentiated = (seen,) if isinstance(argnums, int) else seen
            number = device.index() * k + index
            keys = tuple(jax.tree.map(lambda key: jax.random.fold_in(key, number), args[i]) for i in roles.keys)
            returned = fun(*roles.put(args, differentiated, batch, keys, carry), **kwargs)
            value, new_carry, aux = _unpack(returned, has_aux, carry_argnums)
            return value, (_carried(new_carry, carry), aux)

        seen, transpose = params, lambda grads: grads
        if prepare is not None:
            first = (jnp.zeros((), jnp.int32), jax.tree.map(lambda x: x[0], batches), carry)
            visible = prepare.seeing(loss, params, *first) if isinstance(prepare, Cast) else prepare
            if isinstance(device, MappedAxis):
                _prepare.refuse_collectives(visible, params)
            seen, transpose = _prepare.once(visible, params)

        start = device.local(_start(seen, accumulator_dtype))
        sums, loss_dtype, carry, aux = _sum(loss, device.local(seen), start, carry, batches, k, length)
        sums, carry = device.joined(sums), device.averaged(carry)
        value, grads = _accumulator.mean(sums, (jnp.zeros((), loss_dtype), seen))
        grads = jax.tree.map(lambda g, p: g.astype(grad_dtype or jnp.result_type(p)), transpose(grads), params)
        return _pack(value.astype(loss_dtype), carry, aux, has_aux, carry_argnums), grads

    if not isinstance(sync, MeshAxis):
        return window

    def by_device(*args, **kwargs):
        result, grads = window(*args, **kwargs)
        value, carry, aux = _unpack(result, has_aux, carry_argnums)
        return _pack(value, carry, jax.tree.map(lambda x: x[:, None], aux), has_aux, carry_argnums), grads

    def on_mesh(*args, **kwargs):
        roles.check(args)
        _split.check_devices(args, roles.batch, k, stacked, sync.size())
        aux_spec = P(None, sync.names)
        out_specs = _pack(P(), (P(),) * len(roles.carry), aux_spec, has_aux, carry_argnums), P()
        split_dim = 1 if stacked else 0
        return _mesh.run(by_device, sync, args, kwargs, split=roles.batch, split_dim=split_dim, out_specs=out_specs)

    return on_mesh


def _start(seen, accumulator_dtype):
    """Sums of no micro-batch."""
    zero = jnp.zeros((), _accumulator.weight_dtype())
    return Weighted((zero, _accumulator.init(seen, accumulator_dtype)), zero)


def _sum(loss, seen, sums, carry, batches, k, length):
    """(sums of loss and gradient, the loss's dtype, the last carry, aux) over the first k of `length` micro-batches."""
    dtypes = []

    def micro_step(state, micro_batch):
        sums, carry = state
        (value, (new_carry, aux)), grads = _loss.value_and_grad(loss)(seen, *micro_batch, carry)
        dtypes.append(value.total.dtype)
        keep = None if value.weight is None else jnp.asarray(value.weight) != 0
        weight = jnp.ones_like(sums.weight) if value.weight is None else value.weight
        sums = _accumulator.merge(sums, Weighted((value.total, grads), weight), keep=keep)
        return (sums, new_carry if keep is None else _accumulator.select(keep, new_carry, carry)), aux

    start = sums, carry
    if isinstance(k, int) and k == length:
        (sums, carry), aux = jax.lax.scan(micro_step, start, (jnp.arange(k), batches))
    else:
        (sums, carry), aux = _loop(micro_step, start, batches, k, length)
    return sums, dtypes[0], carry, aux


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


def _unpack(returned: Any, has_aux: bool, carry_argnums: Any) -> tuple[Any, tuple[Tree, ...], Tree]:
    """What `fun` returned as (loss, new carry, aux), with () and None for what it does not return."""
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


def _pack(value: Any, carry: tuple[Tree, ...], aux: Tree, has_aux: bool, carry_argnums: Any) -> Any:
    """The inverse of `_unpack`."""
    if carry_argnums is None:
        return (value, aux) if has_aux else value
    rest = carry[0] if isinstance(carry_argnums, int) else carry
    return value, ((rest, aux) if has_aux else rest)


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
