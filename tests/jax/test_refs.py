"""References that a backward pass adds to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum._jax import jaxprs, refs


@pytest.mark.parametrize("inside", [(True, False, True), (False, False, False)])
def test_gradients_are_added_to_pending_sums(inside):
    """Catches a sum in place of a gradient, the reverse, and leaves that change places."""
    leaves = [jnp.arange(1.0, 4.0), jnp.float32(2), jnp.full(3, 5.0)]
    pending = [jnp.full(3, 10.0), jnp.float32(20), jnp.full(3, 30.0)]
    loss = lambda leaves: jnp.sum(leaves[0] ** 2 * leaves[2]) * leaves[1]

    def run(leaves, pending):
        _, vjp = jax.vjp(loss, leaves)
        return refs.backward(vjp, jnp.float32(0.5), inside, pending)

    got = jaxprs.purely(run, leaves, pending)
    want = [0.5 * g + s * i for g, s, i in zip(jax.grad(loss)(leaves), pending, inside, strict=True)]
    jax.tree.map(np.testing.assert_allclose, got, want)


@pytest.mark.parametrize("reaches", [True, False])
def test_checkpoints_are_reached_by_new_versions_of_jax_alone(reaches, monkeypatch):
    """Catches a reference that jax 0.9 can't transpose, and a loop without a checkpoint whose gradients are copied."""
    monkeypatch.setattr(refs, "REACH_CHECKPOINTS", reaches)
    for body, want in [
        (jnp.sin, True),
        (jax.checkpoint(jnp.sin), reaches),
        (jax.jit(jax.checkpoint(jnp.sin)), reaches),
    ]:
        jaxpr = jax.make_jaxpr(lambda x, f=body: jax.lax.map(f, x))(jnp.ones(3)).jaxpr
        (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
        assert refs.reach(scan) is want
