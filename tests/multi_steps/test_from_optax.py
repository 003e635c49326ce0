"""`from_optax`: a state of `optax.MultiSteps` goes on in `jaxaccum.MultiSteps`, in mid-window too."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from devices import assert_close
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from training import assert_same

import jaxaccum
import jaxaccum.flax

K = 3
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(optax.linear_schedule(0.5, 0.1, 4), momentum=0.9),
    "adamw": lambda: optax.adamw(0.1),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.add_decayed_weights(0.1), {"w": True, "b": False}),
        optax.inject_hyperparams(optax.adam)(0.1),
    ),
}
every_mode = pytest.mark.parametrize("use_grad_mean", [True, False])


def params():
    return {"w": jnp.linspace(-1.0, 1.0, 32).reshape(16, 2), "b": jnp.ones(2)}


def gradients(count, nan=None):
    """So many gradients, of which the one numbered `nan` is not finite."""
    rng = np.random.default_rng(0)
    drawn = [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params()) for _ in range(count)]
    return [jax.tree.map(lambda x, i=i: x * (jnp.nan if i == nan else 1), grads) for i, grads in enumerate(drawn)]


def step(tx):
    def step(p, state, grads):
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    return jax.jit(step)


def run(tx, p, state, grads):
    """(parameters, state) before each of `grads`, and after the last."""
    passed, jitted = [(p, state)], step(tx)
    for one in grads:
        passed.append(jitted(*passed[-1], one))
    return passed


def both(name, k=K, use_grad_mean=True, skip=None, **options):
    """optax's and ours; without sums in float32, which optax would round float64 gradients to."""
    make = lambda kind, **options: kind(OPTIMIZERS[name](), k, use_grad_mean, skip, None, **options)
    return make(optax.MultiSteps), make(jaxaccum.MultiSteps, **options)


@every_mode
@pytest.mark.parametrize(
    ("name", "k", "skip"),
    [("sgd", K, None), ("adamw", lambda step: 2 + step, None), ("chain", K, optax.skip_not_finite)],
    ids=["sgd", "adamw, K by step", "chain, skipping"],
)
def test_training_goes_on_from_each_position(name, k, skip, use_grad_mean):
    """Catches a pending mean taken for a sum or a sum for a mean, a counter that starts anew, and a moment mistaken."""
    with jax.enable_x64(True):
        old, tx = both(name, k, use_grad_mean, skip)
        grads = gradients(9, nan=4 if skip else None)
        passed = run(old, params(), old.init(params()), grads)
        jitted = step(tx)
        for i, (start, state) in enumerate(passed):
            p, new = start, jaxaccum.from_optax(tx, state)
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, tx.init(params()))
            assert tx.has_updated(new) == old.has_updated(state)
            for one, (want, want_state) in zip(grads[i:], passed[i + 1 :], strict=True):
                p, new = jitted(p, new, one)
                assert_close(p, want)
                for field in ("mini_step", "gradient_step", "inner_opt_state", "skip_state"):
                    assert_close(getattr(new, field), getattr(want_state, field))
        assert jitted._cache_size() == 1


def restored_by_flax(state, folder):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


def restored_by_orbax(state, folder):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state")


@pytest.mark.parametrize("restored", [restored_by_flax, restored_by_orbax, lambda state, folder: [*state]])
def test_a_checkpoint_is_taken_in_the_containers_that_it_comes_in(restored, tmp_path):
    """Catches a leaf that lands in another's place where names are all that is left of the containers."""
    old, tx = both("chain", skip=optax.skip_not_finite)
    _, state = run(old, params(), old.init(params()), gradients(5))[-1]
    got = jaxaccum.from_optax(tx, restored(state, tmp_path))
    want = jaxaccum.from_optax(tx, state)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_same(got, want)


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@every_mode
@pytest.mark.parametrize(("kind", "reduce"), [("auto", "mean"), ("explicit", "mean"), ("explicit", "scatter")])
def test_a_mesh_goes_on_with_the_mean_of_all_devices(kind, reduce, use_grad_mean):
    """Catches a pending gradient that counts once for each device, or for one of them, and a state that recompiles."""
    with jax.enable_x64(True):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS[kind],))
        old, tx = both("chain", use_grad_mean=use_grad_mean, mesh=mesh, reduce=reduce)
        grads = gradients(6)
        passed = run(old, params(), old.init(params()), grads)
        p = jax.device_put(passed[4][0], NamedSharding(mesh, P()))
        # As a checkpoint brings it: on one device.
        state = jaxaccum.from_optax(tx, jax.device_put(passed[4][1], jax.devices()[1]))
        fresh = tx.init(p)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
        for one in grads[4:]:  # Each device has its own gradient; their mean is `one`.
            local = jax.tree.map(lambda x: x * (1 + jnp.linspace(-1, 1, 8).reshape(8, *[1] * x.ndim)), one)
            p, state = jax.jit(tx.apply)(p, state, jax.device_put(local, NamedSharding(mesh, P("data"))))
        assert_close(p, passed[-1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_model_axis_stay(kind):
    """Catches a state on the mesh whose shards are gathered, so that each device holds all of it."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "model") if x.ndim else P()))
    p = jnp.ones((4, 6))
    old, tx = both("adamw", mesh=mesh)
    state = jax.tree.map(place, old.update(p, old.init(p), p)[1])
    got, want = jaxaccum.from_optax(tx, state), tx.init(place(p))
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, want)


@pytest.mark.parametrize("is_mesh", [False, True])
def test_numpys_arrays_of_a_checkpoint_become_jaxs(is_mesh):
    """Catches leaves that are no arrays of jax: they have no device, and each one is sent with every step."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(KINDS["auto"],))
    old, tx = both("adamw", **{"mesh": mesh} if is_mesh else {})
    _, state = run(old, params(), old.init(params()), gradients(1))[-1]
    got = jaxaccum.from_optax(tx, jax.tree.map(np.asarray, state))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))
    assert_same(got, jaxaccum.from_optax(tx, state))


@every_mode
def test_pmap_goes_on_with_the_mean_of_all_devices(use_grad_mean):
    """Catches the same where each device holds its own copy of the state; the state of all of them is refused."""
    with jax.enable_x64(True):
        old, tx = both("chain", use_grad_mean=use_grad_mean, axis_name="data")
        grads = gradients(6)
        passed = run(old, params(), old.init(params()), grads)
        replicated = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)
        p, state = replicated((passed[4][0], jaxaccum.from_optax(tx, passed[4][1])))
        for one in grads[4:]:
            local = jax.tree.map(lambda x: x * (1 + jnp.linspace(-1, 1, 8).reshape(8, *[1] * x.ndim)), one)
            p, state = jax.pmap(tx.apply, "data")(p, state, local)
        assert_close(jax.tree.map(lambda x: x[0], p), passed[-1][0])
        with pytest.raises(ValueError, match=r"state.mini_step must be a scalar, got shape \(8,\).*x\[0\]"):
            jaxaccum.from_optax(tx, replicated(passed[4][1]))


def test_host_driven_and_jit_take_the_state():
    """Catches a window whose position is known to the device alone, and a conversion that needs concrete values."""
    with jax.enable_x64(True):
        old, tx = both("adamw")
        grads = gradients(6)
        passed = run(old, params(), old.init(params()), grads)
        p, state = passed[4]
        state = jax.jit(functools.partial(jaxaccum.from_optax, tx))(state)
        inner = lambda p, g: sum(jnp.vdot(p[name], g[name]) for name in p)
        host = jaxaccum.HostDriven(tx, inner)
        for one in grads[4:]:
            _, p, state = host(p, state, one)
        assert_close(p, passed[-1][0])


@pytest.mark.parametrize("driver", ["nnx.Optimizer", "HostDriven"])
def test_the_state_of_an_nnx_optimizer(driver):
    """Catches variables that are taken for a part of the paths, and a state that neither way of training takes."""
    loss = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    model, batches = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (6, 4, 3))
    old = nnx.Optimizer(model, optax.MultiSteps(optax.adam(0.1), K), wrt=nnx.Param)
    for x in batches[:2]:
        old.update(model, nnx.grad(loss)(model, x))
    tx, other = jaxaccum.MultiSteps(optax.adam(0.1), K), nnx.clone(model)
    state = jaxaccum.from_optax(tx, old.opt_state)
    if driver == "HostDriven":
        step = jaxaccum.flax.HostDriven(tx, loss)
        state = jax.tree.unflatten(jax.tree.structure(step.init(other)), jax.tree.leaves(state))
    else:
        new = nnx.Optimizer(other, tx, wrt=nnx.Param)
        nnx.update(new.opt_state, nnx.state(state))
    for x in batches[2:]:
        old.update(model, nnx.grad(loss)(model, x))
        if driver == "HostDriven":
            _, state = step(other, state, x)
        else:
            new.update(other, nnx.grad(loss)(other, x))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), nnx.state(other), nnx.state(model))


def test_sums_have_the_accumulators_dtype_and_an_empty_window_none():
    """Catches sums that keep optax's dtype, and a NaN that optax keeps at a window's end."""
    old = optax.MultiSteps(optax.sgd(1.0), 4)
    _, state = old.update(jnp.full(2, 3.0, jnp.bfloat16), old.init(jnp.ones(2, jnp.bfloat16)))
    assert state.acc_grads.dtype == jnp.float32
    for dtype in (jnp.bfloat16, jnp.float32):
        new = jaxaccum.from_optax(jaxaccum.MultiSteps(optax.sgd(1.0), 4, accumulator_dtype=dtype), state)
        assert new.acc_grads.dtype == dtype and new.acc_grads[0] == 3.0
    ended = state._replace(mini_step=jnp.zeros((), jnp.int32), acc_grads=jnp.full(2, jnp.nan))
    assert not jaxaccum.from_optax(jaxaccum.MultiSteps(optax.sgd(1.0), 4), ended).acc_grads.any()


def pending(opt=None, **options):
    old = optax.MultiSteps(opt or optax.adam(0.1), 4, **options)
    grads = params()
    return old.update(grads, old.update(grads, old.init(params()))[1])[1]


OURS = jaxaccum.MultiSteps(optax.adam(0.1), 4)


@pytest.mark.parametrize(
    ("tx", "state", "error", "message"),
    [
        (optax.MultiSteps(optax.adam(0.1), 4), pending, TypeError, "tx must be a jaxaccum.MultiSteps, got .*optax"),
        (OURS, lambda: OURS.init(params()), TypeError, "state must be an optax.MultiStepsState.*got .*jaxaccum"),
        (OURS, lambda: {"mini_step": 0}, TypeError, "state must be an optax.MultiStepsState.*got .*dict"),
        (OURS, lambda: (pending(),), TypeError, "In a chain's state it is the entry"),
        (
            jaxaccum.MultiSteps(optax.adam(0.1), 2),
            pending,
            ValueError,
            "state.mini_step=2 .*every_k_schedule=2: .*set_ev",
        ),
        (
            jaxaccum.MultiSteps(optax.adam(0.1), lambda step: 1 + step),
            pending,
            ValueError,
            "state.mini_step=2 .*every_k_schedule=1:",
        ),
        (
            OURS,
            lambda: pending(optax.sgd(0.1)),
            ValueError,
            r"inner_opt_state/0/count: nothing in place of \(\).*the opt that",
        ),
        (
            jaxaccum.MultiSteps(optax.sgd(0.1), 4),
            pending,
            ValueError,
            r"inner_opt_state/0/count: \(\) in place of nothing",
        ),
        (
            OURS,
            lambda: pending()._replace(acc_grads={"w": jnp.ones((16, 3)), "b": jnp.ones(2)}),
            ValueError,
            r"inner_opt_state/0/mu/w: \(16, 2\) in place of \(16, 3\)",
        ),
        (
            jaxaccum.MultiSteps(optax.adam(0.1), 4, should_skip_update_fn=lambda *_: (jnp.array(False), {"n": 0})),
            lambda: pending(should_skip_update_fn=optax.skip_not_finite),
            ValueError,
            r"state.skip_state is not that of the should_skip_update_fn of tx, at skip_state/n: nothing in",
        ),
        (
            OURS,
            lambda: jax.tree.map(lambda x: jnp.stack([x] * 2), pending()),
            ValueError,
            r"state.mini_step must be a scalar, got shape \(2,\).*replicated",
        ),
        (
            jaxaccum.MultiSteps(optax.adam(0.1), 4, prepare=jaxaccum.cast(jnp.bfloat16, where=lambda *_: True)),
            pending,
            ValueError,
            "prepare=.*Build tx without prepare=",
        ),
    ],
)
def test_what_can_not_be_converted_is_refused(tx, state, error, message):
    """Catches a state of another optimizer or another K that is taken, and an error that names neither."""
    with pytest.raises(error, match=message):
        jaxaccum.from_optax(tx, state())
