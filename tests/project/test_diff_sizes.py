"""How many lines of a script change for jaxaccum, from `optax.MultiSteps` and from a scan by hand."""

import difflib
import textwrap

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxaccum

K = 4

LINEN_OPTAX = """
    model = nn.Dense(2)
    loss = lambda params, x: jnp.mean((model.apply({"params": params}, x) - 1.0) ** 2)
    tx = optax.MultiSteps(optax.adam(0.1), every_k_schedule=K)
    state = TrainState.create(apply_fn=model.apply, params=model.init(key, batch)["params"], tx=tx)
    step = jax.jit(lambda state, x: state.apply_gradients(grads=jax.grad(loss)(state.params, x)))
    for i in range(K):
        state = step(state, batch[i::K])
    trained = state.params
"""
LINEN_SCAN = """
    model, opt = nn.Dense(2), optax.adam(0.1)
    loss = lambda params, x: jnp.mean((model.apply({"params": params}, x) - 1.0) ** 2)

    @jax.jit
    def step(params, state, batch):
        def add(sums, x):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(params, x)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(add, zeros, batch.reshape(K, -1, *batch.shape[1:]))
        value, grads = jax.tree.map(lambda x: x / K, sums)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates)

    params = model.init(key, batch)["params"]
    trained = step(params, opt.init(params), batch)
"""
NNX_OPTAX = """
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    loss = lambda model, x: jnp.mean((model(x) - 1.0) ** 2)
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.adam(0.1), every_k_schedule=K), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    for i in range(K):
        step(model, optimizer, batch[i::K])
    trained = nnx.state(model)
"""
NNX_SCAN = """
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    loss = lambda model, x: jnp.mean((model(x) - 1.0) ** 2)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        graphdef, params = nnx.split(model)

        def add(sums, x):
            of_one = jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), x))(params)
            return jax.tree.map(jnp.add, sums, of_one), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(add, zeros, batch.reshape(K, -1, *batch.shape[1:]))
        value, grads = jax.tree.map(lambda x: x / K, sums)
        optimizer.update(model, grads)

    step(model, optimizer, batch)
    trained = nnx.state(model)
"""
EQUINOX_OPTAX = """
    model = eqx.nn.MLP(3, 2, 4, 1, key=key)
    loss = lambda model, x: jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)
    opt = optax.MultiSteps(optax.adam(0.1), every_k_schedule=K)
    state = opt.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x):
        grads = eqx.filter_grad(loss)(model, x)
        updates, state = opt.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for i in range(K):
        model, state = step(model, state, batch[i::K])
    trained = eqx.filter(model, eqx.is_inexact_array)
"""
EQUINOX_SCAN = """
    model, opt = eqx.nn.MLP(3, 2, 4, 1, key=key), optax.adam(0.1)
    loss = lambda model, x: jnp.mean((jax.vmap(model)(x) - 1.0) ** 2)

    @eqx.filter_jit
    def step(model, state, batch):
        def add(sums, x):
            return jax.tree.map(jnp.add, sums, eqx.filter_value_and_grad(loss)(model, x)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
        sums, _ = jax.lax.scan(add, zeros, batch.reshape(K, -1, *batch.shape[1:]))
        value, grads = jax.tree.map(lambda x: x / K, sums)
        updates, state = opt.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates)

    trained = eqx.filter(step(model, opt.init(eqx.filter(model, eqx.is_inexact_array)), batch), eqx.is_inexact_array)
"""
WEIGHTED_OPTAX = """
    def loss(params, tokens):
        logits, targets = params["embed"][tokens[:, :-1]] @ params["out"], tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * (targets != 0)) / jnp.sum(targets != 0)

    opt = optax.MultiSteps(optax.adam(0.1), every_k_schedule=K)

    @jax.jit
    def step(params, state, tokens):
        grads = jax.grad(loss)(params, tokens)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = language_model, opt.init(language_model)
    for i in range(K):
        trained, state = step(trained, state, tokens[i::K])
"""
WEIGHTED_SCAN = """
    def loss(params, tokens):
        logits, targets = params["embed"][tokens[:, :-1]] @ params["out"], tokens[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * (targets != 0)), jnp.sum(targets != 0)

    opt = optax.adam(0.1)

    @jax.jit
    def step(params, state, tokens):
        def add(sums, x):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss, has_aux=True)(params, x)), None

        zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, params)
        ((total, weight), sums), _ = jax.lax.scan(add, zeros, tokens.reshape(K, -1, *tokens.shape[1:]))
        value, grads = total / weight, jax.tree.map(lambda x: x / weight, sums)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates)

    trained = step(language_model, opt.init(language_model), tokens)
"""


def window(script, line):
    """The changes that put `line` in the place of the scan in `script`: the body of `step` up to the gradient."""
    start = script.index("\n", script.index("def step")) + 1
    result = "        value, grads = "
    end = script.index("\n", script.index(result)) + 1
    return {script[start:end]: f"{result}{line}\n"}


CLASS = {"optax.MultiSteps(": "jaxaccum.MultiSteps("}
CASES = {
    "linen, optax.MultiSteps": (LINEN_OPTAX, CLASS, 1),
    "linen, scan": (LINEN_SCAN, window(LINEN_SCAN, "jaxaccum.value_and_grad(loss, K)(params, batch)"), 1),
    "nnx, optax.MultiSteps": (NNX_OPTAX, CLASS, 1),
    "nnx, scan": (NNX_SCAN, window(NNX_SCAN, "jaxaccum.flax.value_and_grad(loss, K)(model, batch)"), 1),
    "equinox, optax.MultiSteps": (EQUINOX_OPTAX, CLASS, 1),
    "equinox, scan": (
        EQUINOX_SCAN,
        window(EQUINOX_SCAN, "jaxaccum.equinox.filter_value_and_grad(loss, K)(model, batch)"),
        1,
    ),
    "weighted LM, optax.MultiSteps": (
        WEIGHTED_OPTAX,
        CLASS | {"(grads, state, params)": "(grads, state, params, weight=jnp.sum(tokens[:, 1:] != 0))"},
        2,
    ),
    "weighted LM, scan": (
        WEIGHTED_SCAN,
        window(WEIGHTED_SCAN, "jaxaccum.value_and_grad(loss, K)(params, tokens)")
        | {
            "return jnp.sum(losses * (targets != 0)), jnp.sum(targets != 0)": (
                "return jaxaccum.Weighted(jnp.sum(losses * (targets != 0)), jnp.sum(targets != 0))"
            )
        },
        2,
    ),
}


def run(script):
    """What `script` trains."""
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (16, 6), 0, 8) * (jnp.arange(16) // 3 > jnp.arange(6)[:, None]).T
    scope = {
        **{"K": K, "TrainState": TrainState, "eqx": eqx, "jax": jax, "jaxaccum": jaxaccum, "jnp": jnp},
        **{"nn": nn, "nnx": nnx, "optax": optax},
        "key": key,
        "batch": jax.random.normal(key, (16, 3)),
        "tokens": tokens,
        "language_model": {"embed": jax.random.normal(key, (8, 4)), "out": jnp.zeros((4, 8))},
    }
    exec(textwrap.dedent(script), scope)
    return scope["trained"]


@pytest.mark.parametrize("name", CASES)
def test_how_many_lines_change(name):
    """Catches a way into the library that takes more lines than the README says, besides the import."""
    script, changes, count = CASES[name]
    ours = script
    for old, new in changes.items():
        assert ours.count(old) == 1
        ours = ours.replace(old, new)
    added = [line for line in difflib.ndiff(script.splitlines(), ours.splitlines()) if line.startswith("+ ")]
    assert len(added) == count
    # optax takes the mean of the micro-batches' means, which differs where their numbers of tokens do.
    reference = WEIGHTED_SCAN if script == WEIGHTED_OPTAX else script
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), run(ours), run(reference))
