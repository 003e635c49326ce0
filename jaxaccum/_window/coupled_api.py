"""The driver for losses that couple the examples of a window: `coupled_value_and_grad`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxaccum import _calls
from jaxaccum._devices import mesh_map, placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis
from jaxaccum._gradient import once_per_window, splitting
from jaxaccum._gradient.observed import Observed
from jaxaccum._gradient.returns import Returns
from jaxaccum._gradient.roles import Roles
from jaxaccum._integers import positive_int
from jaxaccum._sums import numeric
from jaxaccum._types import Tree
from jaxaccum._window import call
from jaxaccum._window.coupled import Coupled
from jaxaccum._window.loop import Window


@_calls.explains(every_k_schedule="K is num_micro_batches")
def coupled_value_and_grad(
    encode: Callable[..., Tree],
    loss: Callable[..., Any],
    num_micro_batches: int,
    *,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    key_argnums: int | Sequence[int] = (),
    has_aux: bool = False,
    prepare: Callable[[Tree], Tree] | str | None = None,
    axis_name: Any = None,
    mesh: Any = None,
    data_axis: Any = "data",
    accumulator_dtype: Any = jnp.float32,
    grad_dtype: Any = None,
) -> Callable[..., tuple[Any, Tree]]:
    """Value and gradient of a loss that couples the examples of a window, in one micro-batch's activations.

    A contrastive loss compares each example with all others, so that of a batch is not the mean of its micro-batches'.
    This computes `jax.value_and_grad(lambda p: loss(p, encode(p, batch)))(params)` exactly, in two passes, as GradCache
    does (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). The first pass
    computes the representations of all K micro-batches. From those follow the loss and its gradient with respect to
    them. The second pass encodes each micro-batch again, and applies its VJP to its rows of that gradient.

    Memory holds the activations of one micro-batch, the representations of all examples, and what the loss needs.
    `encode` runs forward twice and backward once, `loss` once each.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> def encode(params, batch):
      ...     return {"image": batch["image"] @ params["image"], "text": batch["text"] @ params["text"]}
      >>> def loss(params, representations):
      ...     logits = params["scale"] * representations["image"] @ representations["text"].T
      ...     return -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))
      >>> params = {"image": jnp.eye(3), "text": jnp.eye(3) / 2, "scale": jnp.array(2.0)}
      >>> batch = {"image": jnp.sin(jnp.arange(24.0)).reshape(8, 3), "text": jnp.cos(jnp.arange(24.0)).reshape(8, 3)}
      >>> value, grads = jax.jit(jaxaccum.coupled_value_and_grad(encode, loss, 4))(params, batch)
      >>> big_value, big_grads = jax.value_and_grad(lambda p: loss(p, encode(p, batch)))(params)
      >>> bool(jnp.allclose(value, big_value) and jnp.allclose(grads["image"], big_grads["image"], atol=1e-6))
      True

    Args:
      encode: `encode(*args, **kwargs)` returns the representations of a micro-batch: a pytree of arrays (N, ...), one
        row for each example, from as many towers as needed. A row must not depend on the other rows of a micro-batch.
        With batch normalisation or a collective of activations it does, so there is no `carry_argnums`. Leaves that
        have no gradient, such as integer labels, are passed through to the loss.
      loss: `loss(params, representations)` returns a floating scalar. It receives the differentiated arguments alone,
        in the order of `argnums`, and the representations of all examples, (K·N, ...), in the batch's order. All other
        arguments go to `encode`. Data of the examples, such as labels, reach the loss as leaves of the representations.
        The loss must be the same on all devices. It must not return a `Weighted`: there is one loss, and no
        micro-batches to weigh.
      num_micro_batches: K, an integer of at least 1.
      argnums: the arguments to differentiate, as in jax. With (0, 1): `encode(p, q, batch)`, `loss(p, q,
        representations)`.
      batch_argnums: the arguments to split. Their leaves are (K·N, ...), and micro-batch i is rows i, i + K, i + 2K,
        and so on, as for `value_and_grad`.
      key_argnums: random keys for `encode`; micro-batch i sees `jax.random.fold_in(key, i)` in both passes. A typed key
        that is neither here nor in the batch or the parameters raises, as for `value_and_grad`.
      has_aux: `loss` returns (value, aux), as in jax.
      prepare: as for `value_and_grad`. `encode` and `loss` receive the output of a function, which runs once. "auto"
        hoists from `encode`, and `loss` receives the parameters as they are.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the name of the mapped data axis, or a tuple of names. Each of
        the P devices encodes its own K·N examples. The representations are gathered once, in the order of the devices,
        so every example is compared with all P·K·N. The sums are reduced once. Each device computes the whole loss,
        which counts once. Micro-batch i of device p has the key number p·K + i.
      mesh: under jit, a `jax.sharding.Mesh`. The batch is then a global array of P·K·N examples, sharded over the data
        axis. Everything else is as with `axis_name`. Without it, a sharded batch gives the same result; its gradient
        is then reduced in every micro-batch.
      data_axis: the mesh's data axis, a name or a tuple of names; P is its size.
      accumulator_dtype: the dtype of the sums, as for `value_and_grad`.
      grad_dtype: the dtype of the returned gradients. None uses the parameters' dtypes, as in jax.

    Returns:
      A function of the arguments of `encode` that returns what `jax.value_and_grad` does: `(value, grads)`, or
      `((value, aux), grads)` with `has_aux`. value and aux are the same on all devices.

    Raises:
      TypeError, ValueError: at construction, for an invalid or contradictory argument; when called, for a batch that is
        not divisible by K, for representations that don't lead with N or depend on no parameter, for a loss that is not
        one floating scalar or that communicates over the data axis, and for a typed key that micro-batches would share.
    """
    for name, function in (("encode", encode), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r}.")
    once_per_window.check_argument(prepare, auto=True)
    if prepare is not None and not isinstance(argnums, int):
        raise ValueError(f"prepare takes one differentiated argument, got argnums={argnums!r}; put them in one tree.")
    numeric.floating("accumulator_dtype", accumulator_dtype)
    numeric.floating("grad_dtype", grad_dtype)
    window = Window(
        fun=encode,
        k=positive_int(num_micro_batches, "num_micro_batches"),
        stacked=False,
        argnums=argnums,
        roles=Roles.of(argnums, batch_argnums, key_argnums, None),
        returns=Returns(has_aux=False, carry_argnums=None),
        prepare=prepare,
        accumulator_dtype=accumulator_dtype,
        in_place=None,
        unroll=1,
        observed=Observed(norms=False, transform=None),
    )
    sync = placement.select_sync(axis_name, mesh, data_axis)
    run = functools.partial(_coupled, Coupled(window, loss, has_aux), sync, grad_dtype)

    def value_and_grad(*args, **kwargs):
        return call.checked(run, window, sync, grad_dtype, args, kwargs, can_stack=False)

    return value_and_grad


def _coupled(coupled, sync, grad_dtype, args, kwargs):
    """The result of `coupled_value_and_grad`."""
    if isinstance(sync, MeshAxis):
        grads, value, aux = _on_mesh(coupled, sync, args, kwargs)
    else:
        grads, reduced, value, aux = coupled.run(sync, args, kwargs)
        grads = sync.joined(grads, reduced)
    grads = call.finished(grads, coupled.window.differentiated(args), sync, grad_dtype)
    return ((value, aux) if coupled.has_aux else value), grads


def _on_mesh(coupled, sync, args, kwargs):
    """Runs both passes on each device: (reduced gradients, loss, aux)."""
    batch = coupled.window.roles.batch
    splitting.check_devices(args, batch, coupled.window.k, False, sync.size())

    def body(*args, **kwargs):
        grads, reduced, value, aux = coupled.run(MappedAxis(sync.names), args, kwargs)
        call.refuse_gathers(reduced, sync)
        return jax.tree.map(lambda x: x[None], grads), value, aux

    out_specs = P(sync.names), P(), P()
    grads, *rest = mesh_map.on_data_axes(body, sync, args, kwargs, split=batch, split_dim=0, out_specs=out_specs)
    return sync.joined(grads), *rest
