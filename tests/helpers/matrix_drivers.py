"""The drivers of the matrix: each makes a window, a function of (params, batch, extras, k) that returns a dict.

`value_and_grad` gives value, grads and, where the loss has them, carry and aux. `coupled` gives value and grads: each
micro-batch's loss is in the rows of its representations, and the coupled loss divides their sums. Streams start from a
fresh state, run K micro-steps with an optimizer that subtracts the gradient, and give losses and grads, and those from
the loss carry and aux too. Those of whole equinox modules put the parameters into one, with leaves that are no
parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from matrix_losses import K
from matrix_reference import stacked, unpacked

import jaxaccum


class Driver(NamedTuple):
    """A driver of the matrix.

    Attributes:
      make: `make(loss, options, where)` returns the window; `options` are prepare and in_place, `where` is empty or has
        axis_name or mesh.
      is_stacked: the batch has leaves (K, N, ...), not (K·N, ...).
      has_room: the batch has leaves (K + 1, N, ...), the last micro-batch of NaN, which a K of less leaves out.
      has_traced_k: it uses the k that the window gets; any other has K.
      is_stream: it returns losses, not a value.
      traces: it can be called while jax traces.
      is_coupled: it has two functions in place of a loss.
    """

    make: Callable[..., Any]
    is_stacked: bool = True
    has_room: bool = False
    has_traced_k: bool = False
    is_stream: bool = True
    traces: bool = True
    is_coupled: bool = False


def value_and_grad(loss, options, where, stacked=False, traced=False, static_k=K, of=jaxaccum.value_and_grad):
    roles = {"has_aux": loss.has_aux}
    if loss.extra:
        roles[f"{loss.extra}_argnums"] = 2
    make = lambda k: of(loss.fun, k, stacked=stacked, **roles, **options, **where)

    def window(params, batch, extras, k):
        value, grads = make(k if traced else static_k)(params, batch, *extras)
        if loss.returns_pair:
            value, rest = value
            return {"value": value, "grads": grads, "aux" if loss.has_aux else "carry": rest}
        return {"value": value, "grads": grads}

    return window


def coupled(loss, options, where):
    options = {"prepare": options["prepare"], "key_argnums": (2,) if loss.extra == "key" else ()}

    def encode(params, batch, *extra):
        value, weight, *_ = unpacked(loss, loss.fun(params, batch, *extra))
        weight = jnp.ones_like(value) if weight is None else weight.astype(value.dtype)
        row = lambda x: jnp.broadcast_to(x, jax.tree.leaves(batch)[0].shape[:1])
        return {"total": row(value * weight), "weight": row(weight)}

    ratio = lambda params, rows: jnp.sum(rows["total"]) / jnp.sum(rows["weight"])

    def window(params, batch, extras, k):
        del k
        value, grads = jaxaccum.coupled_value_and_grad(encode, ratio, K, **options, **where)(params, batch, *extras)
        return {"value": value, "grads": grads}

    return window


def roles_of(loss):
    """The loss's roles in a micro-step."""
    return {"has_aux": loss.has_aux, "carry_argnums": 2 if loss.extra == "carry" else None}


def steps(loss, options, where, params, micro_batch):
    """The `MultiSteps` whose updates subtract the gradient. A cast is shown the loss, as its docstring says."""
    if isinstance(options["prepare"], type(jaxaccum.cast(jnp.bfloat16))):
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x
        shapes = jax.tree.map(shape, (params, *micro_batch))
        options = {**options, "prepare": options["prepare"].seeing(loss.fun, *shapes)}
    return jaxaccum.MultiSteps(optax.sgd(1.0), K, **options, **where)


def row(i, loss, where, batch, extras):
    """Micro-batch i and its key or carry."""
    if loss.extra == "key":
        number = jax.lax.axis_index(where["axis_name"]) * K + i if "axis_name" in where else i
        extras = (jax.random.fold_in(*extras, number),)
    return jax.tree.map(lambda x: x[i], batch), *extras


def outcome(losses, params, new_params):
    arrays = eqx.filter((params, new_params), eqx.is_inexact_array)
    return {"losses": losses, "grads": jax.tree.map(jnp.subtract, *arrays)}


def with_rest(loss, returned, extras, result):
    """`result` with the carry, or the aux of all micro-steps; `returned` is what they returned in place of the loss."""
    if loss.extra == "carry":
        return {**result, "carry": extras[0]}
    return {**result, "aux": returned[1]} if loss.has_aux else result


def micro_step(loss, options, where, boundary):
    """The boundary is the state's counter's, static, or traced."""

    def window(params, batch, extras, k):
        del k
        tx = steps(loss, options, where, params, row(0, loss, where, batch, extras))

        def step(carry, i):
            *carry, extras = carry
            at = {"counter": None, "static": i == K - 1, "traced": i == K - 1}[boundary]
            args = *carry, *row(i, loss, where, batch, extras)
            returned, *carry = tx.micro_step(loss.fun, *args, boundary=at, **roles_of(loss))
            extras = (returned[1],) if loss.extra == "carry" else extras
            return (*carry, extras), returned[0] if loss.extra == "carry" else returned

        carry = params, tx.init(params), extras
        if boundary == "static":
            values = []
            for i in range(K):
                carry, value = step(carry, i)
                values.append(value)
            returned = stacked(values)
        else:
            carry, returned = jax.lax.scan(step, carry, jnp.arange(K))
        losses = returned[0] if loss.has_aux else returned
        return with_rest(loss, returned, carry[2], outcome(losses, params, carry[0]))

    return window


def gradient(loss, where, params, micro_batch, extra):
    """(value, weight, carry, gradient) of a micro-batch as a user computes it, in front of `update` and `apply`."""
    if "mesh" in where:
        roles = {"has_aux": loss.has_aux, "key_argnums": (2,) if loss.extra == "key" else ()}
        value, grads = jaxaccum.local_value_and_grad(loss.fun, **roles, **where)(params, micro_batch, *extra)
        value, weight, *_ = unpacked(loss, value)
        return value, weight, None, grads

    def fun(params):
        value, weight, carry, _ = unpacked(loss, loss.fun(params, micro_batch, *extra))
        return value, (weight, carry)

    if "axis_name" in where:
        params = jax.tree.map(lambda x: jax.lax.pcast(x, where["axis_name"], to="varying"), params)
    (value, (weight, carry)), grads = jax.value_and_grad(fun, has_aux=True)(params)
    return value, weight, carry, grads


def update(loss, options, where, applies):
    """`MultiSteps.update`, or `apply`."""

    def window(params, batch, extras, k):
        del k
        tx = steps(loss, options, where, params, row(0, loss, where, batch, extras))
        new, state = params, tx.init(params)
        losses = []
        for i in range(K):
            micro_batch, *extra = row(i, loss, where, batch, extras)
            value, weight, carry, grads = gradient(loss, where, new, micro_batch, extra)
            if applies:
                new, state = tx.apply(new, state, grads, weight=weight)
            else:
                updates, state = tx.update(grads, state, new, weight=weight)
                new = optax.apply_updates(new, updates)
            extras = (carry,) if loss.extra == "carry" else extras
            losses.append(value)
        return outcome(jnp.stack(losses), params, new)

    return window


def host_driven(loss, options, where):
    def window(params, batch, extras, k):
        del k
        tx = steps(loss, options, where, params, row(0, loss, where, batch, extras))
        step = jaxaccum.HostDriven(tx, loss.fun, **roles_of(loss))
        new, state = jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, params), tx.init(params)
        values = []
        for i in range(K):
            value, new, state = step(new, state, *row(i, loss, where, batch, extras))
            if loss.extra == "carry":
                value, *extras = value
            values.append(value)
        returned = stacked(values)
        losses = returned[0] if loss.has_aux else returned
        return with_rest(loss, returned, extras, outcome(losses, params, new))

    return window


class Model(eqx.Module):
    """Parameters beside what is none. It raises where that has changed on its way to the loss."""

    params: dict[str, jax.Array]
    table: jax.Array
    act: Callable[..., Any] = jnp.tanh
    rate: float = 0.5
    flag: bool = True

    def params_of_loss(self):
        assert self.act is jnp.tanh and type(self.rate) is float and self.flag is True
        assert self.table.dtype == jnp.int32
        return self.params


def of_module(make):
    """The driver `make` by a whole module."""

    def made(loss, options, where):
        fun = lambda model, *args: loss.fun(model.params_of_loss(), *args)
        window = make(loss._replace(fun=fun), options, where)

        def of_params(params, *args):
            result = window(Model(params, jnp.arange(3, dtype=jnp.int32)), *args)
            grads = result["grads"]
            assert (grads.table, grads.act, grads.rate, grads.flag) == (None, None, None, None)
            return {**result, "grads": grads.params}

        return of_params

    return made


def alone(loss, options, where):
    """jax's own gradient of the batch, to see where that fails. It has no options."""
    del options, where

    def window(params, batch, extras, k):
        del k
        value, grads = jax.value_and_grad(loss.fun, has_aux=loss.returns_pair)(params, batch, *extras)
        return {"value": value, "grads": grads}

    return window


ALONE = Driver(alone, is_stacked=False)
DRIVERS = {
    "value_and_grad": Driver(value_and_grad, is_stacked=False, is_stream=False),
    "stacked": Driver(functools.partial(value_and_grad, stacked=True), has_room=True, is_stream=False),
    "traced_k": Driver(
        functools.partial(value_and_grad, stacked=True, traced=True), has_room=True, has_traced_k=True, is_stream=False
    ),
    "coupled": Driver(coupled, is_stacked=False, is_stream=False, is_coupled=True),
    "micro_step": Driver(functools.partial(micro_step, boundary="counter")),
    "micro_step_static": Driver(functools.partial(micro_step, boundary="static")),
    "micro_step_traced": Driver(functools.partial(micro_step, boundary="traced")),
    "update": Driver(functools.partial(update, applies=False)),
    "apply": Driver(functools.partial(update, applies=True)),
    "host_driven": Driver(host_driven, traces=False),
    "equinox": Driver(
        of_module(functools.partial(value_and_grad, of=jaxaccum.equinox.filter_value_and_grad)),
        is_stacked=False,
        is_stream=False,
    ),
    "equinox_micro_step": Driver(of_module(functools.partial(micro_step, boundary="static"))),
    "equinox_host_driven": Driver(of_module(host_driven), traces=False),
}
