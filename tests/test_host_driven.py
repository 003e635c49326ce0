"""The two programs that a host picks by counting: the same training as on the device's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum

XS = jax.random.normal(jax.random.key(0), (11, 4, 3))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}


def loss(params, x):
    return jnp.mean((x @ params["w"] + params["b"] - 1.0) ** 2)


def start(**options):
    tx = jaxaccum.MultiSteps(optax.adamw(1e-2), 3, **options)
    params = jax.tree.map(jnp.copy, PARAMS)
    return tx, params, tx.init(params)


def counted(xs, ks):
    tx, params, state = start()
    step = jax.jit(tx.micro_step, static_argnums=0)
    for x, k in zip(xs, ks, strict=True):
        state = jaxaccum.set_every_k(state, k)
        _, params, state = step(loss, params, state, x)
    return params, state


def told(params, state):
    """All but the sums, which mean nothing after a boundary."""
    return params, state._replace(acc_grads=None, weight=None)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("ks", [[3] * 11, [4] * 6 + [2] * 5, [4, 4, 4, 2, 3, 3, 3, 1, 1, 5, 5]])
def test_it_trains_as_the_counter_does(ks):
    """A boundary at the wrong micro-step, K that the state does not hear of, or one program too many."""
    tx, params, state = start()
    step = jaxaccum.HostDriven(tx, loss)
    assert step.every_k == 3
    for x, k in zip(XS, ks, strict=True):
        step.every_k = k
        _, params, state = step(params, state, x)
        assert step.mini_step == int(state.mini_step)
    equal(told(params, state), told(*counted(XS, ks)))
    assert step._accumulate._cache_size() == step._close._cache_size() == 1


def test_it_goes_on_where_a_state_stands():
    """A count that starts from 0 though micro-batches are pending."""
    params, state = counted(XS[:4], [3] * 4)
    step = jaxaccum.HostDriven(start()[0], loss)
    for x in XS[4:]:
        _, params, state = step(params, state, x)
    equal(told(params, state), told(*counted(XS, [3] * 11)))


@pytest.mark.parametrize("micro_steps", [3, 6])
def test_it_takes_over_at_a_boundary(micro_steps):
    """Sums that other drives leave after a window, taken for the next one's."""
    params, state = counted(XS[:micro_steps], [3] * micro_steps)
    assert np.any(state.acc_grads["w"])
    step = jaxaccum.HostDriven(start()[0], loss)
    for x in XS[micro_steps:]:
        _, params, state = step(params, state, x)
    equal(told(params, state), told(*counted(XS, [3] * 11)))


def test_flush_closes_what_is_pending():
    """A partial window divided by K, or a count that goes on after it."""
    tx, params, state = start()
    step = jaxaccum.HostDriven(tx, loss)
    for x in XS[:2]:
        _, params, state = step(params, state, x)
    params, state = step.flush(params, state)
    assert (step.mini_step, int(state.mini_step), int(state.gradient_step)) == (0, 0, 1)
    equal(params, counted(XS[:2], [2, 2])[0])
    for x in XS[2:5]:
        _, params, state = step(params, state, x)
    equal(params, counted(XS[:5], [2, 2, 3, 3, 3])[0])


def test_the_optimizer_does_not_pass_through_the_accumulating_program():
    """Buffers that the host hands through a program which has no use for them."""
    tx, params, state = start()
    step = jaxaccum.HostDriven(tx, loss)
    moments = state.inner_opt_state
    _, params_after, state = step(params, state, XS[0])
    assert state.inner_opt_state is moments
    assert params_after is params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis_name": "data"}, "axis_name"),
        ({"should_skip_update_fn": lambda grads, step, params: (False, ())}, "should_skip_update_fn"),
    ],
)
def test_what_a_host_cannot_count(options, message):
    """A count that the device does not share."""
    with pytest.raises(ValueError, match=message):
        jaxaccum.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), 2, **options), loss)


def test_bad_arguments():
    """An error only when the first step is compiled."""
    with pytest.raises(ValueError, match="function for every_k_schedule"):
        jaxaccum.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), lambda step: 2), loss)
    with pytest.raises(TypeError, match="tx"):
        jaxaccum.HostDriven(optax.sgd(1.0), loss)
    with pytest.raises(TypeError, match="fun"):
        jaxaccum.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), 2), None)
    with pytest.raises(ValueError, match="every_k"):
        jaxaccum.HostDriven(start()[0], loss).every_k = 0
