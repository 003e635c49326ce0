"""Equinox adapter: windows of whole modules.

Requires equinox, which the core does not: `pip install "jaxaccum[equinox]"`. `MultiSteps` and `HostDriven` take whole
modules as they are.

Example:
  >>> import equinox as eqx, jax, jax.numpy as jnp, jaxaccum, optax
  >>> model = eqx.nn.MLP(3, "scalar", 8, 1, activation=jnp.tanh, key=jax.random.key(0))
  >>> tx = jaxaccum.MultiSteps(optax.adam(1e-3), every_k_schedule=2)
  >>> step = jaxaccum.HostDriven(tx, lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2))
  >>> state = tx.init(model)
  >>> for x in jnp.ones((4, 8, 3)):
  ...     loss, model, state = step(model, state, x)
  >>> int(state.gradient_step), model.activation is jnp.tanh
  (2, True)
"""

from collections.abc import Callable
from typing import Any

from jaxaccum import _calls, _extras
from jaxaccum._jax import prng
from jaxaccum._sums import modules
from jaxaccum._window import api

_eqx = _extras.require("equinox", "equinox", "jaxaccum.equinox")


def filter_value_and_grad(
    fun: Callable[..., Any], num_micro_batches: Any, **options: Any
) -> Callable[..., tuple[Any, ...]]:
    """`equinox.filter_value_and_grad` over K micro-batches.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, jaxaccum
      >>> model = eqx.nn.MLP(3, "scalar", 8, 1, key=jax.random.key(0))
      >>> loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
      >>> f = eqx.filter_jit(jaxaccum.equinox.filter_value_and_grad(loss, 4))
      >>> value, grads = f(model, jnp.ones((8, 3)))
      >>> grads.layers[0].weight.shape, grads.activation
      ((8, 3), None)

    Args:
      fun: `fun(model, *args, **kwargs)` returns the mean loss of a micro-batch, or a `jaxaccum.Weighted`. Like the
        model, other arguments may be whole modules.
      num_micro_batches: K, as for `jaxaccum.value_and_grad`; micro-batch i is rows i, i + K, ... of the batch.
      **options: the options of `jaxaccum.value_and_grad` except `argnums`: the first argument is differentiated, which
        may be a tuple of modules. Positions count as in `fun`. Dropout keys go to `key_argnums`, an `eqx.nn.State` to
        `carry_argnums`. `prepare` and `transform_micro_gradient` see a module with None in place of the leaves that are
        not floating or complex arrays.

    Returns:
      A function of the same arguments that returns `(value, grads)`, or `((value, aux), grads)` and so on, as
      `jaxaccum.value_and_grad` does. `grads` is a module with None in place of the leaves that are not floating or
      complex arrays.

    Raises:
      TypeError, ValueError: as `jaxaccum.value_and_grad`; also for `argnums`, and for a typed random key in the model,
        which all micro-batches would share.
    """
    if "argnums" in options:
        raise TypeError(
            f"argnums={options['argnums']!r}: filter_value_and_grad differentiates the first argument. Put all that is "
            "to be differentiated in there, as a tuple."
        )
    _calls.check_keywords("filter_value_and_grad", options, api.value_and_grad)
    window = api.value_and_grad(modules.whole(fun), num_micro_batches, **options)

    def value_and_grad(model, *args, **kwargs):
        if not isinstance(num_micro_batches, int) or num_micro_batches > 1:
            prng.refuse_shared((_eqx.filter(model, _eqx.is_array),), {}, ())  # Here a key has its name.
        model, rest = modules.parted(model)
        args, kwargs = modules.arguments(rest, args, kwargs)
        return modules.restored(window(model, *args, **kwargs))

    return value_and_grad
