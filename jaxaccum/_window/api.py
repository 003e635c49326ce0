"""Driver 2: a whole window inside one jitted step, a drop-in for `jax.value_and_grad`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import mesh_map, placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice
from jaxaccum._gradient import in_place_sums, once_per_window, splitting
from jaxaccum._gradient.roles import Roles
from jaxaccum._integers import positive_int
from jaxaccum._jax import eager, prng
from jaxaccum._sums import numeric, overwrites, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum._window.loop import Window


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
    prepare: Callable[[Tree], Tree] | str | None = None,
    in_place: bool | None = None,
    unroll: int = 1,
    accumulator_dtype: Any = jnp.float32,
    grad_dtype: Any = None,
    axis_name: Any = None,
    mesh: Any = None,
    data_axis: Any = "data",
    reduce: str = "mean",
) -> Callable[..., tuple[Any, Tree]]:
    """`jax.value_and_grad` over K micro-batches: the big batch's loss and gradient in one micro-batch's memory.

    Args:
      fun: `fun(*args, **kwargs)` returns the mean loss of a micro-batch, a floating scalar, or a `Weighted`. The
        window's loss and gradient are the mean over micro-batches, or Σ total / Σ weight. Where the weight depends on
        the parameters, the gradient is that of the quotient, for which the window's forward passes run twice.
      num_micro_batches: K, an integer of at least 1. With `stacked` it may be a traced integer scalar, up to the
        batch's leading length; absent micro-batches then cost nothing, and no K compiles again.
      argnums: the arguments to differentiate, as in jax.
      has_aux: `fun` returns (loss, aux); aux comes back with a leading micro-batch axis, of length K, or with a
        traced K of the batch's leading length with zeros from K on. aux of shape (K, N, ...), an entry for each
        example, is in the order of the batch again as `jnp.moveaxis(aux, 0, 1).reshape(K * N, ...)`.
      batch_argnums: the arguments to split: their leaves are (K·N, ...), and micro-batch i is rows i, i + K, i + 2K and
        so on. A batch whose rows are split over P devices stays where it is, under plain jit too, if P divides N. If P
        doesn't, this raises on Explicit axes of a mesh; on Auto axes, which a trace can't see, XLA gathers the batch
        and every device computes all of it. Under plain jit the gradient is reduced in every micro-step; with `mesh` it
        is reduced once.
      stacked: batch leaves are (K_max, N, ...) instead, and micro-batch i is row i; split them over devices along N.
      key_argnums: random keys; micro-batch i sees `jax.random.fold_in(key, i)`. A typed key that is neither here nor
        among the batch, the carry and the parameters is refused: all micro-batches would draw the same mask. A raw
        uint32 key, or one that `fun` closes over, can't be told from other data, and is shared.
      carry_argnums: mutable model state, such as batch statistics, handed from micro-batch to micro-batch: `fun`
        returns (loss, new_carry), or (loss, (new_carry, aux)), and so does the result.
      prepare: a function of the differentiated argument; `fun` sees what it returns. It runs forward once and
        backward once a window, however large K is. See `cast`. "auto" finds what of `fun` depends on that argument
        alone, casts of matrices above all, and takes it out of the micro-batches: each gradient is formed as it is
        without. A `jax.custom_vjp` must have a backward pass that is linear in its cotangents, as that of a
        straight-through estimator: any other is refused in a function, and left in `fun` by "auto".
      in_place: whether gradients are added to their sums inside of the backward pass. With None, the default, this
        happens for a plain loss in two ways: the gradients of layers that the loss stacks and scans with `jax.lax.scan`
        are added one by one, which saves a tree of gradients; and where the loss multiplies by a weight in half
        precision outside of loops, the weight's gradient is formed in float32, not rounded, so that the product can add
        it. True also adds those of layers for a `Weighted` loss, and raises where a cast of the layers prevents it.
        False does neither.
      unroll: how many micro-batches are one iteration of the loop over them: with 2 the sums are read and written half
        as often and compilers join products, in up to twice the memory; what compiles is twice as large. Only for a K
        that is not traced.
      accumulator_dtype: the dtype of the sums; float64 and complex parameters keep theirs. None: the parameters'. Sums
        in bfloat16, of half the size, are rounded stochastically, by the micro-step and its loss: they are noisier than
        float32's, but nothing that is small beside them is lost.
      grad_dtype: the dtype of the returned gradients; None: the parameters', as jax gives.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the name of the mapped data axis, or a tuple of names. Each of
        the P devices sums over its own batch of K·N, and the sums are joined once, after the loop: loss and gradient
        are those of all P·K·N examples, as on one device with P·K micro-batches, whose keys are numbered alike: device
        p's micro-batch i is number p·K + i. Floating leaves of the carry come back as their mean over the devices;
        others must agree, except typed keys: device p > 0 starts from `jax.random.fold_in(key, p)`, and the keys of
        device 0 come back. aux stays each device's own.
      mesh: under jit, a `jax.sharding.Mesh`. Then the batch is a global array of P·K·N examples (stacked: (K_max, P·N,
        ...)), split over the data axis, and everything else is as with `axis_name`: each device splits its own rows.
        aux comes back as (K, P, ...); one entry for each example, (K, P, N, ...), is in the order of the batch as
        `jnp.moveaxis(aux, 0, 2).reshape(P * N * K, ...)`. The mesh's other axes, for tensor parallelism or fsdp, are
        left to jax, whether Auto or Explicit.
      data_axis: the mesh's data axis, a name or a tuple of names; P is its size.
      reduce: "mean" gives every device the whole gradient. "scatter" (ZeRO), with `mesh`, reduce-scatters it: each
        device gets a part, laid out as `zero_sharding` says. Update in global code, with an optimizer state laid out
        so too, and gather the new parameters.

    Returns:
      A function of the same arguments that returns what `jax.value_and_grad` does. Micro-batches of weight 0 are left
      out, even if they are NaN; where all are, loss and gradient are 0. For statistics of fp8 layers, which flax keeps
      under `_overwrite_with_gradient` and whose "gradient" is their new value, it is the largest that a micro-batch
      gave.

    Raises:
      TypeError, ValueError: for arguments that contradict each other, at construction; when called, for a batch that
        does not divide into K, for leaves of different lengths, for a traced K without `stacked`, and for a typed key
        that micro-batches would share.

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
    once_per_window.checked(prepare, auto=True)
    in_place_sums.checked(in_place)
    if prepare is not None and not isinstance(argnums, int):
        raise ValueError(f"prepare takes one differentiated argument, got argnums={argnums!r}; put them in one tree.")
    numeric.floating("accumulator_dtype", accumulator_dtype)
    numeric.floating("grad_dtype", grad_dtype)
    window = Window(
        fun=fun,
        k=_num_micro_batches(num_micro_batches, stacked),
        stacked=stacked,
        argnums=argnums,
        roles=Roles.of(argnums, batch_argnums, key_argnums, carry_argnums),
        has_aux=has_aux,
        carry_argnums=carry_argnums,
        prepare=prepare,
        accumulator_dtype=accumulator_dtype,
        in_place=in_place,
        unroll=positive_int(unroll, "unroll"),
    )
    if window.unroll > 1 and not isinstance(window.k, int):
        raise ValueError(
            f"unroll={unroll!r} needs a num_micro_batches that is not traced: leave it at 1, or pass an int."
        )
    sync = placement.sync(axis_name, mesh, data_axis, reduce=reduce)

    def value_and_grad(*args, **kwargs):
        numeric.available("accumulator_dtype", accumulator_dtype)
        numeric.available("grad_dtype", grad_dtype)
        window.roles.check(args, kwargs)
        placement.in_map(sync)
        if not (isinstance(sync, OneDevice) and isinstance(window.k, int) and window.k == 1):
            prng.refuse_shared(args, kwargs, window.roles.all())
        params = window.differentiated(args)
        numeric.differentiable(params)
        placement.placed(params, sync)
        with window.roles.hints(args, kwargs, window.k, stacked):
            traced = {i: args[i] for i in window.roles.all()}
            return eager.run(functools.partial(_window_of, window, sync, grad_dtype, args, kwargs), traced)

    return value_and_grad


def _window_of(window, sync, grad_dtype, args, kwargs, traced):
    """What `value_and_grad` returns; `traced` takes the place of arguments by number."""
    args = [traced.get(i, arg) for i, arg in enumerate(args)]
    params = window.differentiated(args)
    if isinstance(sync, MeshAxis):
        sums, like, carry, aux = _on_mesh(window, sync, args, kwargs)
    else:
        sums, reduced, like, carry, aux = window.run(sync, args, kwargs)
        sums = Weighted((sync.joined(sums.total[0]), sync.joined(sums.total[1], reduced)), sync.joined(sums.weight))
    value, grads = weighted_sum.mean(sums, (like, params))
    grads = overwrites.kept(grads, params, sums.weight == 0)
    grads = jax.tree.map(lambda g, p: g.astype(grad_dtype or jnp.result_type(p)), grads, params)
    return window.pack(value.astype(like.dtype), carry, aux), sync.like(grads, params)


def _on_mesh(window, sync, args, kwargs):
    """(joined sums, zero of the loss's dtype, carry, aux) of the windows of all devices of the data axis."""
    splitting.check_devices(args, window.roles.batch, window.k, window.stacked, sync.size())

    def body(k, *args, **kwargs):
        sums, reduced, like, carry, aux = window._replace(k=k).run(MappedAxis(sync.names), args, kwargs)
        if any(jax.tree.leaves(reduced)):
            raise ValueError(
                f"prepare gathers over data_axis={sync.names!r}, but with mesh= it sees whole parameters: those that "
                "lie split over the data axis have been gathered before it runs, once a window. Leave the gather out."
            )
        return jax.tree.map(lambda x: x[None], sums), like, carry, jax.tree.map(lambda x: x[:, None], aux)

    out_specs = P(sync.names), P(), P(), P(None, sync.names)
    split = [i + 1 for i in window.roles.batch]
    options = {"split": split, "split_dim": 1 if window.stacked else 0, "out_specs": out_specs}
    sums, *rest = mesh_map.run(body, sync, (window.k, *args), kwargs, **options)
    return sync.joined(sums), *rest


def _num_micro_batches(value: Any, stacked: bool) -> Any:
    """K of one window: a Python int, or a traced integer scalar where the batch is stacked."""
    if not isinstance(value, jax.core.Tracer):
        return positive_int(value, "num_micro_batches")
    if value.shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"num_micro_batches must be one integer, got {value.dtype} of shape {value.shape}.")
    if not stacked:
        raise TypeError(
            "num_micro_batches is traced, but the batch is not stacked: how to split it must be known at compile time. "
            "Pass a Python int, or stacked=True with batch leaves of shape (K_max, N, ...)."
        )
    return value
