"""Driver 2: a drop-in for `jax.value_and_grad` that runs a whole window in one jitted step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxaccum import _calls
from jaxaccum._devices import mesh_map, placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis
from jaxaccum._gradient import in_place_sums, once_per_window, splitting
from jaxaccum._gradient.observed import Observed
from jaxaccum._gradient.returns import Returns
from jaxaccum._gradient.roles import Roles
from jaxaccum._integers import positive_int
from jaxaccum._sums import norms, numeric, overwrites, weighted_sum
from jaxaccum._sums.norms import GradientNorms
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum._window import call
from jaxaccum._window.loop import Window


@_calls.explains(every_k_schedule="K is num_micro_batches")
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
    gradient_norms: str | None = None,
    transform_micro_gradient: Callable[[Tree], Tree] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """`jax.value_and_grad` over K micro-batches: the full batch's loss and gradient in one micro-batch's memory.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
      >>> w, x = jnp.ones(3), jnp.arange(24.0).reshape(8, 3)
      >>> value, grad = jax.jit(jaxaccum.value_and_grad(loss, 4))(w, x)
      >>> big_value, big_grad = jax.value_and_grad(loss)(w, x)
      >>> bool(jnp.allclose(value, big_value) and jnp.allclose(grad, big_grad))
      True

      With each micro-batch's gradient clipped to norm 1:

      >>> clip = lambda g: g / jnp.maximum(1.0, jnp.linalg.norm(g))
      >>> f = jaxaccum.value_and_grad(loss, 4, gradient_norms="all", transform_micro_gradient=clip)
      >>> value, grad, norms = f(w, x)
      >>> norms.micro_batch.shape, bool(norms.micro_batch.min() > 1), bool(norms.window <= 1)
      ((4,), True, True)

    Args:
      fun: `fun(*args, **kwargs)` returns the mean loss of a micro-batch, a floating scalar, or a `Weighted`. The
        window's loss and gradient are the mean over micro-batches, or Σ total / Σ weight. If the weight depends on the
        parameters, the gradient is that of the quotient, and the window's forward passes run twice.
      num_micro_batches: K, an integer of at least 1. With `stacked` it may be a traced integer scalar, up to the
        batch's leading length. Micro-batches from K on then cost nothing, and changing K does not recompile.
      argnums: the arguments to differentiate, as in jax.
      has_aux: `fun` returns (loss, aux). aux is returned with a leading micro-batch axis of length K. With a traced K
        the axis has the batch's leading length, with zeros from K on. aux with one entry per example, (K, N, ...), is
        restored to batch order by `jnp.moveaxis(aux, 0, 1).reshape(K * N, ...)`.
      batch_argnums: the arguments to split. Their leaves are (K·N, ...), and micro-batch i is rows i, i + K, i + 2K,
        and so on. If the batch is sharded by rows over P devices and P divides N, no rows move, under plain jit too.
        If P does not divide N, this raises on Explicit mesh axes; on Auto axes, which are invisible to a trace, XLA
        gathers the batch and every device computes all of it. Under plain jit the gradient is reduced in every
        micro-step; with `mesh` it is reduced once.
      stacked: batch leaves are (K_max, N, ...) instead, and micro-batch i is row i. Shard them over devices along N.
      key_argnums: random keys; micro-batch i sees `jax.random.fold_in(key, i)`. A typed key raises if it is neither
        here nor in the batch, the carry or the parameters, since all micro-batches would draw the same mask. A raw
        uint32 key, or a key that `fun` closes over, is indistinguishable from other data and is shared.
      carry_argnums: mutable model state, such as batch statistics, carried from one micro-batch to the next. `fun`
        returns (loss, new_carry) or (loss, (new_carry, aux)), and so does the returned function.
      prepare: a function of the differentiated argument; `fun` receives its output. It runs forward once and backward
        once per window, whatever K is. See `cast`. "auto" finds the computation in `fun` that depends on that argument
        alone, mostly casts of matrices, and hoists it out of the loop over micro-batches; each gradient is computed as
        without it. A `jax.custom_vjp` must have a backward pass that is linear in its cotangents, like a
        straight-through estimator. Any other raises in a `prepare` function, and is not hoisted by "auto".
      in_place: whether the backward pass adds gradients to their sums directly. With None, the default, it does so in
        two cases. If the loss stacks layers and scans them with `jax.lax.scan`, the layers' gradients are added one by
        one, which saves a tree of gradients. If the loss multiplies by a half-precision matrix outside of loops, the
        matrix's gradient is formed in float32 without rounding, so that the product can add to the sum. A `Weighted`
        loss must have a weight that comes from the data (see `Weighted`); if it doesn't, True adds the layers'
        gradients nevertheless, in a conditional. True raises if a cast of the layers by a `prepare` function prevents
        it. False disables both.
      unroll: the number of micro-batches per loop iteration. With 2, sums are read and written half as often and the
        compiler can merge products, for up to twice the memory and twice the program size. K must not be traced.
      accumulator_dtype: the dtype of the sums; float64 and complex parameters keep theirs. None uses the parameters'
        dtypes. bfloat16 sums take half the memory and are rounded stochastically, seeded by the micro-step and its
        loss: they are noisier than float32 sums, but small addends are not lost.
      grad_dtype: the dtype of the returned gradients. None uses the parameters' dtypes, as in jax.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the name of the mapped data axis, or a tuple of names. Each of
        the P devices sums over its own batch of K·N, and the sums are reduced once, after the loop. Loss and gradient
        are those of all P·K·N examples, as on one device with P·K micro-batches. Keys match too: micro-batch i of
        device p has number p·K + i. Floating leaves of the carry are returned as their mean over the devices. Other
        leaves must agree, except typed keys: device p > 0 starts from `jax.random.fold_in(key, p)`, and the keys of
        device 0 are returned. aux is local to each device.
      mesh: under jit, a `jax.sharding.Mesh`. The batch is then a global array of P·K·N examples (stacked: (K_max, P·N,
        ...)), sharded over the data axis, and each device splits its own rows. Everything else is as with `axis_name`.
        aux is returned as (K, P, ...). With one entry per example, (K, P, N, ...), it is restored to batch order by
        `jnp.moveaxis(aux, 0, 2).reshape(P * N * K, ...)`. The mesh's other axes, for tensor parallelism or fsdp, are
        left to jax, whether Auto or Explicit.
      data_axis: the mesh's data axis, a name or a tuple of names; P is its size.
      reduce: "mean" returns the whole gradient on every device. "scatter" (ZeRO) needs `mesh` and reduce-scatters it:
        each device gets a shard, laid out as given by `zero_sharding`. Apply the update in global code with an
        optimizer state in the same layout, and gather the new parameters.
      gradient_norms: the norms to return after value and gradient, as a NamedTuple. "window": its field `window` is the
        norm of the window's gradient, before it is cast to `grad_dtype`. "all": there are also `micro_batch`, (K,), the
        norms of the micro-batches' mean gradients, with `mesh` (K, P); `squares`, Σ w·‖g‖² and Σ w over the
        micro-batches g of all devices; and `count`, how many of them count. The norm of one of weight 0 is 0. "all"
        adds no gradient in place, and hoists nothing for `prepare="auto"`; with a `prepare` function these are
        gradients with respect to its output. "noise": besides `window` there is `two_sizes`, what `NoiseScale.update`
        takes, from the devices' sums and their total. On one device they are the norms of the sums after the first
        micro-batches and at the end, with two passes over the sums (K passes if K is an odd prime), and K must be above
        1; with a `prepare` function they are with respect to its output. Gradients are added in place as without it.
        None computes nothing.
      transform_micro_gradient: a function of each micro-batch's mean gradient, also of a `Weighted` loss, that returns
        what is added in its place, of the same shapes: clipped or compressed, for example. It gets no key, so noise
        from a key that it closes over is the same for each micro-batch. Norms are those before it. It turns in-place
        addition and `prepare="auto"` off, as `gradient_norms="all"` does. Overwritten statistics bypass it.

    Returns:
      A function of the same arguments that returns what `jax.value_and_grad` does, and the norms if asked for.
      Micro-batches of weight 0 are excluded, even if they are NaN. If all weights are 0, loss and gradient are 0. For
      fp8 statistics, which flax keeps under `_overwrite_with_gradient` and whose "gradient" is their new value, it
      returns the maximum over the micro-batches.

    Raises:
      TypeError, ValueError: at construction, for an invalid or contradictory argument and for a traced K without
        `stacked`; when called, for a batch that is not divisible by K, for leaves of different lengths, and for a typed
        key that micro-batches would share.
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {fun!r}.")
    once_per_window.check_argument(prepare, auto=True)
    in_place_sums.check_argument(in_place)
    if prepare is not None and not isinstance(argnums, int):
        raise ValueError(f"prepare takes one differentiated argument, got argnums={argnums!r}; put them in one tree.")
    numeric.floating("accumulator_dtype", accumulator_dtype)
    numeric.floating("grad_dtype", grad_dtype)
    norms.check_argument(gradient_norms, in_place)
    observed = Observed(gradient_norms == "all", transform_micro_gradient)
    observed.check(in_place)
    if observed:
        in_place, prepare = False, None if isinstance(prepare, str) else prepare
    window = Window(
        fun=fun,
        k=_num_micro_batches(num_micro_batches, stacked),
        stacked=stacked,
        argnums=argnums,
        roles=Roles.of(argnums, batch_argnums, key_argnums, carry_argnums),
        returns=Returns(has_aux, carry_argnums),
        prepare=prepare,
        accumulator_dtype=accumulator_dtype,
        in_place=in_place,
        unroll=positive_int(unroll, "unroll", note=""),
        observed=observed,
        two_sizes=gradient_norms == "noise",
    )
    if window.unroll > 1 and not isinstance(window.k, int):
        raise ValueError(
            f"unroll={unroll!r} needs a num_micro_batches that is not traced: leave it at 1, or pass an int."
        )
    sync = placement.select_sync(axis_name, mesh, data_axis, reduce=reduce)
    if window.two_sizes and not isinstance(sync, MappedAxis):
        norms.check_two_sizes("num_micro_batches", window.k, sync.size())

    def value_and_grad(*args, **kwargs):
        run = functools.partial(_window_of, window, sync, grad_dtype, gradient_norms)
        return call.checked(run, window, sync, grad_dtype, args, kwargs)

    return value_and_grad


def _window_of(window, sync, grad_dtype, gradient_norms, args, kwargs):
    """The result of `value_and_grad`."""
    params = window.differentiated(args)
    if isinstance(sync, MeshAxis):
        reduced = None
        local, like, carry, (aux, rows) = _on_mesh(window, sync, args, kwargs)
        sums = sync.joined(local)
    else:
        local, reduced, like, carry, (aux, rows) = window.run(sync, args, kwargs)
        value, grads = local.total
        sums = Weighted((sync.joined(value), sync.joined(grads, reduced)), sync.joined(local.weight))
    value, grads = weighted_sum.mean(sums, (like, params))
    measured = ()
    if window.two_sizes:
        measured = (_two_sizes(sync, Weighted(sums.total[1], sums.weight), reduced, local, rows),)
    elif gradient_norms is not None:
        measured = (_norms(sync, grads, reduced, rows, sums.weight),)
    grads = overwrites.kept(grads, params, sums.weight == 0)
    value = window.returns.pack(value.astype(like.dtype), carry, aux)
    return value, call.finished(grads, params, sync, grad_dtype), *measured


def _norms(sync, grads, reduced, rows, weight):
    """The norms of a window: of its gradient and, given `rows` of norms, of its micro-batches."""
    window = sync.norm(grads, reduced)
    if rows is None:
        return GradientNorms(window)
    micro_batch, sums = rows
    square, count = sync.joined(jnp.sum(sums, axis=0))
    return GradientNorms(window, micro_batch, Weighted(square, weight), count.astype(jnp.int32))


def _two_sizes(sync, sums, reduced, local, parts):
    """The norms of a window from its reduced sums and from the `local` ones or, on one device, its `parts`."""
    divisor = jnp.where(sums.weight == 0, 1, sums.weight)
    norm = sync.norm(sums.total, reduced)
    if sync.size() == 1:
        return norms.of_two_sizes(norm / divisor, *map(sync.joined, parts))
    norms.refuse_reduced(reduced)
    part = sync.joined(norms.of_part(Weighted(local.total[1], local.weight), sync.shape))
    return norms.of_two_sizes(norm / divisor, part, (norm**2 / divisor, sums.weight))


def _on_mesh(window, sync, args, kwargs):
    """Runs each device's window: (local sums, a zero of the loss's dtype, carry, aux)."""
    splitting.check_devices(args, window.roles.batch, window.k, window.stacked, sync.size())

    def body(k, *args, **kwargs):
        sums, reduced, like, carry, aux = window._replace(k=k).run(MappedAxis(sync.names), args, kwargs)
        call.refuse_gathers(reduced, sync)
        return jax.tree.map(lambda x: x[None], sums), like, carry, jax.tree.map(lambda x: x[:, None], aux)

    out_specs = P(sync.names), P(), P(), P(None, sync.names)
    split = [i + 1 for i in window.roles.batch]
    options = {"split": split, "split_dim": 1 if window.stacked else 0, "out_specs": out_specs}
    return mesh_map.on_data_axes(body, sync, (window.k, *args), kwargs, **options)


def _num_micro_batches(value: Any, stacked: bool) -> Any:
    """Checks K: a Python int or, if the batch is stacked, a traced integer scalar."""
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
