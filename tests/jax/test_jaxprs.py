"""What the package reads of a jaxpr, and that a program holds the loss as written: its scopes and jitted functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum._jax import core, jaxprs, varying

K, LAYERS = 4, 24


@functools.partial(jax.jit, static_argnums=2)
def layer(x, w, dtype):
    with jax.named_scope("attention"):
        return jnp.tanh(x.astype(dtype) @ w.astype(dtype))


def loss(p, x, dtype=jnp.float32):
    for i, w in enumerate(p):
        with jax.named_scope(f"block{i}"):
            x = layer(x, w, dtype)
    return jnp.mean(x.astype(jnp.float32) ** 2)


half = functools.partial(loss, dtype=jnp.bfloat16)


def params():
    return [jnp.eye(8)] * LAYERS


def by_hand(fun):
    def window(p, x):
        def micro_step(sums, i):
            value, grads = jax.value_and_grad(fun)(p, x[i])
            return jax.tree.map(jnp.add, sums, grads), value

        return jax.lax.scan(micro_step, jax.tree.map(jnp.zeros_like, p), jnp.arange(K))

    return window


def micro_step(fun, **options):
    tx = jaxaccum.MultiSteps(optax.sgd(1.0), K, **options)
    return lambda p, x: tx.micro_step(fun, p, tx.init(p), x, boundary=False)[2].acc_grads


WINDOWS = {
    "plain": (jaxaccum.value_and_grad, loss, {}),
    "not in place": (jaxaccum.value_and_grad, loss, {"in_place": False}),
    "half precision": (jaxaccum.value_and_grad, half, {}),
    "auto": (jaxaccum.value_and_grad, half, {"prepare": "auto"}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_scopes_and_jitted_functions_stay(name):
    """Catches profiles without layers, and one jitted layer that is lowered 24 times: 318 kB of StableHLO for 63."""
    driver, fun, options = WINDOWS[name]
    x = jnp.ones((2 * K, 8))
    lowered = jax.jit(driver(fun, K, **options)).lower(params(), x)
    hand = jax.jit(by_hand(fun)).lower(params(), x.reshape(K, 2, 8))
    functions = lambda lowered: lowered.as_text().count("func.func private @")
    # With "auto" a layer's casts and the rest of it are two functions.
    assert functions(lowered) <= functions(hand) + (4 if name == "auto" else 1)
    assert len(lowered.as_text()) <= 1.6 * len(hand.as_text())
    text = lowered.as_text(debug_info=True)
    assert all(scope in text for scope in ("attention", *(f"block{i}" for i in range(LAYERS))))
    assert "@layer" in lowered.as_text()


@pytest.mark.parametrize("fun", [loss, half])
def test_so_they_do_in_micro_steps(fun):
    """Catches the same in a stream."""
    lowered = jax.jit(micro_step(fun)).lower(params(), jnp.ones((2, 8)))
    assert "block17" in lowered.as_text(debug_info=True) and "@layer" in lowered.as_text()
    hand = jax.jit(jax.value_and_grad(fun)).lower(params(), jnp.ones((2, 8)))
    assert lowered.as_text().count("func.func private @") <= hand.as_text().count("func.func private @") + 1


def equation(fun, *args, named=None):
    """The first equation of the jaxpr of `fun`, or the first one of a name, in whichever body."""
    found = jaxprs.equations(jax.make_jaxpr(fun)(*args).jaxpr)
    return next(eqn for eqn in found if named in (None, eqn.primitive.name))


@pytest.mark.parametrize("counts", [(0, 1, 1), (2, 1, 3), (1, 3, 0), (0, 0, 2)])
def test_the_operands_of_a_scan(counts):
    """Catches constants counted as carries: layers would be added to the sums of others."""
    constants, carries, along = counts
    operands = [jnp.ones(2) + i for i in range(constants)]

    def fun(shared, start, stacks):
        def body(carry, xs):
            total = sum(map(jnp.sum, (*shared, *xs)), 0.0)
            return tuple(c + total for c in carry), total

        return jax.lax.scan(body, tuple(start), stacks, length=3)

    eqn = equation(fun, operands, [jnp.ones(2)] * carries, [jnp.ones((3, 2))] * along, named="scan")
    assert jaxprs.scan_operands(eqn, eqn.params["jaxpr"].jaxpr) == (constants, carries)
    assert len(eqn.invars) == constants + carries + along


def test_what_is_a_plain_jit_or_a_checkpoint():
    """Catches a jit whose shardings a rebuilt program would lose, and a checkpoint that it would not keep."""
    sin = jnp.sin
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), P())
    assert jaxprs.is_plain_jit(equation(jax.jit(sin), 1.0))
    assert not jaxprs.is_plain_jit(equation(jax.jit(sin, in_shardings=sharding), 1.0))
    assert not jaxprs.is_plain_jit(equation(jax.jit(sin, out_shardings=sharding), 1.0))
    assert not jaxprs.is_plain_jit(equation(sin, 1.0))
    eqn = equation(jax.checkpoint(sin, prevent_cse=False, policy=jax.checkpoint_policies.everything_saveable), 1.0)
    assert jaxprs.is_checkpoint(eqn) and not jaxprs.is_checkpoint(equation(sin, 1.0))
    again = equation(jaxprs.checkpointed(eqn, sin), 1.0)
    assert [again.params[name] for name in ("prevent_cse", "policy")] == [False, eqn.params["policy"]]


def test_evaluation_on_entries():
    """Catches constants, literals, or a result that is an input, which are not entries."""
    constant = jnp.arange(2.0)
    closed = jax.make_jaxpr(lambda x, y: (jnp.sin(x) * 2.0 + constant, y, 3.0))(1.0, 2.0)
    seen = []

    def results(eqn, operands):
        seen.append(eqn.primitive.name)
        return [("made", x) for x in jaxprs.bind(eqn, [x for _, x in operands])]

    outputs = jaxprs.evaluate(closed.jaxpr, closed.consts, [("x", 1.0), ("y", 2.0)], results, lambda x: ("constant", x))
    assert [kind for kind, _ in outputs] == ["made", "y", "constant"]
    np.testing.assert_allclose(outputs[0][1], np.sin(1.0) * 2 + np.arange(2), rtol=1e-6)
    assert seen[0] == "sin"


def test_references_become_arrays():
    """Catches a reference left in a program: vmap, second derivatives and remat refuse those that are closed over."""

    def total(x):
        ref = jax.new_ref(jnp.zeros(()))

        def body(i, _):
            ref[...] += x[i]
            return _

        jax.lax.fori_loop(0, 3, body, 0)
        return {"total": jax.freeze(ref)}

    pure = jax.make_jaxpr(lambda x: jaxprs.purely(total, x))(jnp.arange(3.0))
    assert not any("ref" in eqn.primitive.name or "Ref" in str(eqn.outvars) for eqn in jaxprs.equations(pure.jaxpr))
    summed = jax.vmap(lambda x: jaxprs.purely(total, x))(jnp.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(summed["total"], [3, 12])


def test_all_equations_are_walked():
    """Catches a body that is passed over: branches, loops, jits, rules, checkpoints."""

    @jax.custom_jvp
    def ruled(x):
        return jnp.cos(x)

    ruled.defjvp(lambda primals, tangents: (jnp.cos(primals[0]), tangents[0]))

    def fun(x):
        x = jax.lax.cond(x > 0, jnp.sin, jnp.tanh, x)
        x = jax.lax.while_loop(lambda x: jnp.log(x) > 9, jnp.exp, x)
        x = jax.lax.fori_loop(0, 2, lambda i, x: jnp.sqrt(x), x)
        return jax.jit(jnp.sinh)(ruled(jax.checkpoint(jnp.arctan)(x)))

    jaxpr = jax.make_jaxpr(fun)(1.0).jaxpr
    names = {eqn.primitive.name for eqn in jaxprs.equations(jaxpr)}
    assert {"sin", "tanh", "log", "exp", "sqrt", "sinh", "cos", "atan"} <= names
    assert len(list(jaxprs.bodies(equation(fun, 1.0, named="cond")))) == 2


def test_what_an_output_depends_on():
    """Catches a dependence that is lost on the way, and one that there is not."""
    jaxpr = jax.make_jaxpr(lambda x, y: (jnp.sin(x) + y, jnp.cos(y), x, 1.0))(1.0, 2.0).jaxpr
    assert jaxprs.reached(jaxpr, [True, False]) == [True, False, True, False]
    assert jaxprs.reached(jaxpr, [False, True]) == [True, True, False, False]
    halves = jax.make_jaxpr(lambda x: jnp.split(x, 2))(jnp.ones(4)).jaxpr
    assert jaxprs.reached(halves, [True]) == [True, True]


def test_a_pruned_jaxpr():
    """Catches an output of another number, an input counted as used, and an effect that is dropped."""

    def fun(x, y, z):
        jax.debug.callback(lambda z: None, z)
        return jnp.sin(x), jnp.cos(y)

    closed, used = jaxprs.pruned(jax.make_jaxpr(fun)(1.0, 2.0, 3.0), 1)
    assert used == [False, True, True]
    (result,) = core.jaxpr_as_fun(closed)(2.0, 3.0)
    np.testing.assert_allclose(result, np.cos(2.0), rtol=1e-6)


def test_the_axes_of_communication():
    """Catches a collective in a body, one over several axes, and the axes of an array taken for those of a mesh."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))

    def over(fun):
        mapped = jax.shard_map(fun, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
        return set().union(*map(jaxprs.axes, jax.make_jaxpr(mapped)(jnp.ones((2, 2))).jaxpr.eqns))

    assert over(lambda x: x + jnp.sum(x, axis=1, keepdims=True) + jax.lax.axis_index("a")) == set()
    assert over(lambda x: x + jax.lax.psum(x, ("a", "b"))) == {"a", "b"}
    assert over(jax.jit(lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]))) == {"b"}
    assert over(lambda x: jax.lax.all_gather(x, "a", axis=0, tiled=True)[:1]) == {"a"}


def test_moves_commute_with_casts():
    """Catches an operation that computes among those that only move elements, behind which a cast is left out."""
    assert "concatenate" in jaxprs.MOVES and "all_gather" in jaxprs.MOVES
    assert jaxprs.MOVES.isdisjoint({"add", "cumsum", "gather", "mul", "pad", "reduce_sum", "reduce_max", "sort"})


def test_the_axes_that_a_value_varies_over():
    """Catches an attribute of jax's types under another name: no axis would be known to be reduced."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    found = []

    def body(x):
        found.extend([varying.axes(x), varying.axes(jax.lax.psum(x, "a"))])
        return x

    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a")), jnp.ones(2))
    assert found == [{"a"}, set()] and varying.axes(jnp.ones(2)) == set()
