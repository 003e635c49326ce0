"""What a window must give, computed by jax alone."""

import functools

import jax
import jax.numpy as jnp
from matrix_losses import LOSSES

import jaxaccum


def unpacked(loss, returned):
    """(mean loss, weight, carry, aux) of what `loss.fun` returned."""
    value, rest = returned if loss.returns_pair else (returned, None)
    weight = None
    if isinstance(value, jaxaccum.Weighted):
        value, weight = value.total / value.weight, value.weight
    return value, weight, rest if loss.extra == "carry" else None, rest if loss.has_aux else None


def mean_over(axis, tree):
    """The mean of floating leaves, what comes first of others."""
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.mean(axis) if floats(x) else x[0], tree)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def window(name, devices, folds_device, meets, room):
    """A function of (params, batch, extras, k) that returns all that a driver may return.

    Args:
      name: the loss.
      devices: P. The batch has leaves (P, K, N, ...).
      folds_device: the key of micro-batch i on device p is that of micro-step i with p folded in, not number p·K + i.
      meets: the carry is averaged over the devices after each micro-batch, not at the end.
      room: the length of losses and aux, which are zero from k on; None is k.

    Returns:
      A dict of value, losses (K, P), carry, aux (K, P, ...) and grads; for one device without the axis P.
    """
    loss = LOSSES[name]
    fun = loss.exact or loss.fun

    def value_and_rest(params, batch, *extra):
        value, _, carry, aux = unpacked(loss, fun(params, batch, *extra))
        return value, {"carry": carry, "aux": aux}

    def key_of(key, p, i, k):
        if folds_device:
            return jax.random.fold_in(jax.random.fold_in(key, i), p)
        return jax.random.fold_in(key, p * k + i)

    def own(p, extras):
        """The carry with the device's own key, or the key."""
        if loss.carries_key and p:
            return ({**extras[0], "key": jax.random.fold_in(extras[0]["key"], p)},)
        return extras

    def run(params, batch, extras, k):
        carries, calls = [own(p, extras) for p in range(devices)], [[] for _ in range(devices)]
        for i in range(k):
            for p in range(devices):
                args = (key_of(*extras, p, i, k),) if loss.extra == "key" else carries[p]
                micro_batch = jax.tree.map(lambda x, p=p, i=i: x[p, i], batch)
                (value, rest), grads = jax.value_and_grad(value_and_rest, has_aux=True)(params, micro_batch, *args)
                carries[p] = (rest["carry"],) if loss.extra == "carry" else extras
                calls[p].append({"losses": value, "aux": rest["aux"], "grads": grads})
            if loss.extra == "carry" and meets:
                common = mean_over(0, stacked(carries))
                carries = [own(p, common) if i + 1 < k else common for p in range(devices)]
        devices_own = stacked([{**stacked(calls[p]), "carry": carries[p]} for p in range(devices)])
        local = lambda tree: jax.tree.map(lambda x: x[0] if devices == 1 else x.swapaxes(0, 1), tree)
        padded = lambda x: jnp.concatenate([x, jnp.zeros((room - k, *x.shape[1:]), x.dtype)]) if room else x
        result = {name: jax.tree.map(padded, local(devices_own[name])) for name in ("losses", "aux")}
        if loss.extra == "carry":
            result["carry"] = mean_over(0, devices_own["carry"][0])
        if loss.is_mean:
            whole = jax.tree.map(lambda x: x[:, :k].reshape(-1, *x.shape[3:]), batch)
            (value, _), grads = jax.value_and_grad(value_and_rest, has_aux=True)(params, whole, *extras)
        else:
            value, grads = mean_over((0, 1), (devices_own["losses"], devices_own["grads"]))
        return {**result, "value": value, "grads": grads}

    return jax.jit(run, static_argnums=3)
