"""MultiSteps inside the containers that people really use, each against the bare optimizer on the mean gradient."""

import copy
import functools
import inspect
import operator
import pickle
import pydoc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training import train_state

import jaxaccum
from jaxaccum import MultiSteps

K = 3
PARAMS = {"w": np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(3, 2), "b": np.full(2, 0.5, np.float32)}
ADAM = optax.adam(0.1)


def fresh_params():
    return jax.tree.map(jnp.array, PARAMS)


def micro_gradients(count, like=PARAMS, seed=0):
    """`count` gradients like `like`, stacked."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.normal(size=(count, *p.shape)).astype(np.float32), like)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def means(grads, k=K, weights=None):
    """The weighted mean of every window of `k` rows."""
    w = np.ones((len(jax.tree.leaves(grads)[0]) // k, k)) if weights is None else np.reshape(weights, (-1, k))
    w = w / w.sum(1, keepdims=True)
    mean = lambda g: np.einsum("nk,nk...->n...", w, g.reshape(*w.shape, *g.shape[1:])).astype(np.float32)
    return jax.tree.map(mean, grads)


def drive(tx, grads, params=None, extras=()):
    """(parameters, state) after one `tx.update` for each row of `grads`, with that row's extra args."""

    @jax.jit
    def step(params, state, grads, extra_args):
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params = fresh_params() if params is None else params
    state = tx.init(params)
    for i in range(len(jax.tree.leaves(grads)[0])):
        params, state = step(params, state, row(grads, i), extras[i] if extras else {})
    return params, state


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)


def found(tree):
    """Every MultiStepsState in `tree`."""
    is_state = lambda node: isinstance(node, jaxaccum.MultiStepsState)
    states = [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]
    assert states
    return states


def frozen_bias(opt):
    freeze = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    return optax.chain(optax.masked(opt, {"w": True, "b": False}), freeze)


CONTAINERS = {
    "alone": lambda opt: opt,
    "chain": lambda opt: optax.chain(optax.scale(0.5), opt),
    "chain in a chain": lambda opt: optax.chain(optax.identity(), optax.chain(opt, optax.scale(2.0))),
    "named_chain": lambda opt: optax.named_chain(("half", optax.scale(0.5)), ("opt", opt)),
    "masked": frozen_bias,
    "partition": lambda opt: optax.partition({"all": opt}, {"w": "all", "b": "all"}),
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 5),
    "conditionally_transform": lambda opt: optax.conditionally_transform(opt, lambda step: step >= 0),
    "inject_hyperparams": lambda opt: optax.inject_hyperparams(lambda x: optax.chain(optax.scale(x), opt))(x=0.5),
}
contained = pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)


@contained
def test_a_container_of_it_equals_the_container_of_the_bare_optimizer(wrap):
    """Catches a container that needs a conversion call, loses the state, or sees an optimizer step a micro-step."""
    grads = micro_gradients(2 * K)
    got, state = drive(wrap(MultiSteps(ADAM, K)), grads)
    want, _ = drive(wrap(ADAM), means(grads))
    assert_close(got, want)
    assert [int(s.gradient_step) for s in found(state)] == [2]
    assert not np.array_equal(got["w"], PARAMS["w"])


@contained
def test_a_container_leaves_parameters_alone_between_boundaries(wrap):
    """Catches an inner optimizer that runs, or decays, on a partial window."""
    got, state = drive(wrap(MultiSteps(optax.adamw(0.1, weight_decay=0.1), K)), micro_gradients(K - 1))
    jax.tree.map(np.testing.assert_array_equal, got, PARAMS)
    assert [(int(s.mini_step), int(s.gradient_step)) for s in found(state)] == [(K - 1, 0)]


def test_two_of_different_k_share_one_multi_transform():
    """Catches a K, a counter or a trace that two instances share."""
    transforms = {"w": MultiSteps(optax.adam(0.1), 2), "b": MultiSteps(optax.sgd(0.1), 3)}
    grads = micro_gradients(6)
    got, state = drive(optax.multi_transform(transforms, {"w": "w", "b": "b"}), grads)
    assert_close(got["w"], drive(optax.adam(0.1), means(grads["w"], 2), jnp.array(PARAMS["w"]))[0])
    assert_close(got["b"], drive(optax.sgd(0.1), means(grads["b"], 3), jnp.array(PARAMS["b"]))[0])
    assert sorted(int(s.gradient_step) for s in found(state)) == [2, 3]


ACCUMULATING = {
    "ours": lambda opt: MultiSteps(opt, 2),
    "optax's": lambda opt: optax.MultiSteps(opt, 2),
    "optax's, converted": lambda opt: optax.MultiSteps(opt, 2).gradient_transformation(),
}
nesting = "opt accumulates by itself: it holds a MultiSteps.*one MultiSteps.*K1·K2"


@pytest.mark.parametrize("other", ACCUMULATING.values(), ids=ACCUMULATING)
def test_one_directly_inside_another_is_refused(other):
    """Catches a window of windows: K would be 4, weights those of means, and a flush reach the outer one alone."""
    with pytest.raises(ValueError, match=nesting):
        MultiSteps(other(ADAM), 2)


@contained
@pytest.mark.parametrize("other", [name for name in ACCUMULATING if name != "optax's"])
def test_one_anywhere_inside_another_is_refused(wrap, other):
    """Catches one that a container hides from the constructor."""
    with pytest.raises(ValueError, match=nesting):
        MultiSteps(wrap(ACCUMULATING[other](ADAM)), 2).init(fresh_params())


def test_hyperparameters_injected_inside_are_read_and_set():
    """Catches an inner state that is rebuilt or cast at a boundary, and a learning rate baked into the trace."""
    inject = optax.inject_hyperparams(optax.adam)
    tx, grads = MultiSteps(inject(learning_rate=0.1), 2), micro_gradients(4)
    params, state = fresh_params(), tx.init(fresh_params())
    step = jax.jit(tx.apply)
    for i in range(4):
        if i == 3:
            assert float(state.inner_opt_state.hyperparams["learning_rate"]) == pytest.approx(0.1)
            state.inner_opt_state.hyperparams["learning_rate"] = jnp.asarray(0.01)
        params, state = step(params, state, row(grads, i))
    bare = inject(learning_rate=optax.piecewise_constant_schedule(0.1, {1: 0.1}))
    assert_close(params, drive(bare, means(grads, 2))[0])
    assert float(state.inner_opt_state.hyperparams["learning_rate"]) == pytest.approx(0.01)


def test_hyperparameters_are_injected_around_a_factory_with_a_static_k():
    """Catches an instance that has to be the same from call to call: here each trace builds its own."""
    factory = optax.inject_hyperparams(lambda rate, k: MultiSteps(optax.adam(rate), k), static_args="k")
    grads = micro_gradients(2 * K)
    got, state = drive(factory(rate=0.1, k=K), grads)
    assert_close(got, drive(ADAM, means(grads))[0])
    assert float(state.hyperparams["rate"]) == pytest.approx(0.1)


def test_apply_if_finite_around_it_leaves_a_bad_micro_batch_out():
    """Catches an accumulator that a rejected NaN reaches all the same."""
    grads = micro_gradients(4)
    want, _ = drive(ADAM, means(jax.tree.map(lambda g: g[[0, 2, 3]], grads)))
    grads["w"][1] = np.nan
    got, state = drive(optax.apply_if_finite(MultiSteps(ADAM, 3), 5), grads)
    assert_close(got, want)
    assert int(state.total_notfinite) == 1


def test_apply_if_finite_inside_it_judges_the_window():
    """Catches an inner state whose types move, and a judgement of each micro-step."""
    grads = micro_gradients(4)
    want, _ = drive(ADAM, means(jax.tree.map(lambda g: g[2:], grads), 2))
    grads["w"][0] = np.inf
    got, state = drive(MultiSteps(optax.apply_if_finite(ADAM, 5), 2), grads)
    assert_close(got, want)
    assert int(state.inner_opt_state.total_notfinite) == 1 and int(state.gradient_step) == 2


def test_a_schedule_inside_counts_windows():
    """Catches a learning-rate schedule that ticks once a micro-batch."""
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1, 2: 0.1})
    grads = micro_gradients(3 * K)
    got, state = drive(MultiSteps(optax.sgd(schedule), K), grads)
    assert_close(got, drive(optax.sgd(schedule), means(grads))[0])
    assert int(optax.tree.get(state, "count")) == 3


def test_clipping_inside_happens_once_on_the_mean():
    """Catches micro-gradients clipped one by one: those that cancel in the mean must not be cut before."""
    tx = MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), 2)
    got, _ = drive(tx, jnp.array([100.0, -99.0]), jnp.array(0.0))
    assert_close(got, jnp.array(-0.5))


VALUES, WEIGHTS = np.array([1, 9, 2, 7, 5, 1, 1, 9.0]), np.array([1, 3, 1, 1, 1, 7, 1, 5.0])


@pytest.mark.parametrize(
    "bare",
    [
        optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)),
        optax.polyak_sgd(scaling=0.1),
    ],
    ids=["reduce_on_plateau", "polyak_sgd"],
)
def test_value_arrives_as_the_windows_weighted_mean(bare):
    """Catches extra args lost in a chain, the boundary's own loss in place of the mean, and an unweighted mean."""
    grads = micro_gradients(len(VALUES))
    extras = [dict(value=jnp.float32(v), weight=jnp.float32(w)) for v, w in zip(VALUES, WEIGHTS, strict=True)]
    got, state = drive(optax.chain(optax.identity(), MultiSteps(bare, 2)), grads, extras=extras)
    extras = [dict(value=v) for v in means(VALUES, 2, WEIGHTS)]
    want, inner = drive(bare, means(grads, 2, WEIGHTS), extras=extras)
    assert_close(got, want)
    assert_close(state[1].inner_opt_state, inner)


def test_plateau_falls_only_when_the_mean_stops_falling():
    """Catches the test above passing because no plateau was ever met."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    for values, scale in (((9, 1, 1, 5, 1, 1), 1.0), ((1, 1, 1, 1, 1, 1), 0.25)):
        extras = [dict(value=jnp.float32(v)) for v in values]
        _, state = drive(MultiSteps(plateau, 2), micro_gradients(6), extras=extras)
        assert float(state.inner_opt_state.scale) == scale


def scale_by_argument():
    """An optimizer whose updates are its gradients times the extra arg `factor`."""
    update = lambda grads, state, params=None, *, factor, **_: (jax.tree.map(lambda g: factor * g, grads), state)
    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_other_extra_args_are_those_of_the_boundary():
    """Catches an average of what was not asked to be averaged, and the first call's args kept."""
    tx = optax.chain(MultiSteps(scale_by_argument(), 2))
    extras = [dict(factor=jnp.float32(factor)) for factor in (100.0, 3.0)]
    assert_close(drive(tx, jnp.array([1.0, 3.0]), jnp.array(0.0), extras)[0], jnp.array(6.0))


def test_a_named_extra_arg_is_averaged():
    """Catches "value" written into the code where the option's names belong."""
    tx = optax.chain(MultiSteps(scale_by_argument(), 2, averaged_extra_args=("factor",)))
    extras = [dict(factor=jnp.float32(factor)) for factor in (1.0, 3.0)]
    assert_close(drive(tx, jnp.array([1.0, 3.0]), jnp.array(0.0), extras)[0], jnp.array(4.0))


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a chain"])
def test_an_optimizer_that_takes_no_value_runs_in_micro_step_and_flush(inside):
    """Catches a `value` that micro_step or flush passes on to an optimizer of a fixed signature."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    opt = optax.contrib.sam(optax.sgd(0.1), ascent, sync_period=2)
    opt = optax.chain(optax.clip(1.0), opt) if inside else opt
    loss = lambda w, x: jnp.mean((w * x - 1.0) ** 2)
    tx, x = MultiSteps(opt, 2), jnp.arange(1.0, 7.0).reshape(3, 2)
    got, state = jnp.array(0.5), tx.init(jnp.array(0.5))
    want, inner = jnp.array(0.5), opt.init(jnp.array(0.5))
    step = jax.jit(functools.partial(tx.micro_step, loss))
    for micro_batches in (x[:2], x[2:]):
        for micro_batch in micro_batches:
            _, got, state = step(got, state, micro_batch)
        updates, inner = opt.update(jax.grad(loss)(want, micro_batches), inner, want)
        want = optax.apply_updates(want, updates)
    updates, state = tx.flush(state, got)
    assert_close(optax.apply_updates(got, updates), want)
    assert_close(state.inner_opt_state, inner)


def test_a_type_error_of_the_optimizer_is_its_own():
    """Catches an error swallowed, or an extra arg left out, because some extra arg was refused."""
    tx = MultiSteps(optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), 1, averaged_extra_args=())
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        tx.update(jnp.array(1.0), tx.init(jnp.array(0.0)), jnp.array(0.0), value=1.0)


def scale_by_grad():
    """An optimizer whose updates are the extra arg `grad`."""
    update = lambda updates, state, params=None, *, grad, **_: (grad, state)
    return optax.GradientTransformationExtraArgs(lambda params: (), update)


LINE_SEARCHES = {
    "backtracking": optax.scale_by_backtracking_linesearch(5, store_grad=True),
    "zoom": optax.scale_by_zoom_linesearch(5),
}


@pytest.mark.parametrize("search", LINE_SEARCHES.values(), ids=LINE_SEARCHES)
@pytest.mark.parametrize("flushes", [False, True], ids=["boundary", "flush"])
def test_a_line_search_sees_the_windows_gradient(search, flushes):
    """Catches a line search that judges the window's step by the last micro-batch's gradient."""
    opt = optax.chain(optax.sgd(1.0), search)
    mean_loss = lambda w: (w - 2.0) ** 2 + 1.0
    value_fns = [lambda w: (w - 1.0) ** 2, lambda w: (w - 3.0) ** 2]
    want, inner = jnp.array(0.0), opt.init(jnp.array(0.0))
    args = dict(value=mean_loss(want), grad=jax.grad(mean_loss)(want), value_fn=mean_loss)
    updates, inner = opt.update(args["grad"], inner, want, **args)

    tx, params = MultiSteps(opt, 3 if flushes else 2), jnp.array(0.0)
    state = tx.init(params)
    for value_fn in value_fns:
        value, grad = jax.value_and_grad(value_fn)(params)
        got, state = jax.jit(functools.partial(tx.update, value_fn=mean_loss))(
            grad, state, params, value=value, grad=grad
        )
    if flushes:
        got, state = tx.flush(state, params, value_fn=mean_loss)
    assert_close(got, updates)
    assert_close(state.inner_opt_state, inner)


@pytest.mark.parametrize("names", [("value",), ("value", "grad")], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_extra_arg_grad_is_the_windows_mean(names, dtype):
    """Catches the boundary's own gradient in place of the mean, 3.0 for 2.0, and one refused for its tree."""
    tx, params = MultiSteps(scale_by_grad(), 2, averaged_extra_args=names), {"w": jnp.zeros((), dtype)}
    state = tx.init(params)
    for grad in (1.0, 3.0):
        grads = {"w": jnp.array(grad, dtype)}
        updates, state = tx.update(grads, state, params, grad=grads)
    assert float(updates["w"]) == 2.0 and updates["w"].dtype == dtype
    _, state = tx.update(params, state, params, grad=params)
    assert float(tx.flush(state, params)[0]["w"]) == 0.0


def scale_by_tree():
    """An optimizer whose updates are the extra arg `tree["w"]`."""
    update = lambda updates, state, params=None, *, tree, **_: (tree["w"], state)
    return optax.GradientTransformationExtraArgs(lambda params: (), update)


TREE = {"w": jnp.zeros(2), "n": jnp.zeros((), jnp.int32)}
LIKE = {"arrays": TREE, "shapes": jax.eval_shape(lambda: TREE), "numbers": {"w": np.zeros(2, np.float32), "n": 0}}


@pytest.mark.parametrize("like", LIKE.values(), ids=LIKE)
@pytest.mark.parametrize("flushes", [False, True], ids=["boundary", "flush"])
def test_an_averaged_tree_is_the_windows_weighted_mean(like, flushes):
    """Catches a mean of scalars alone, one of the boundary's own tree, and sums that go on into the next window."""
    averaged = {"value": 0.0, "tree": like, "grad": like}
    tx = MultiSteps(scale_by_tree(), 3 if flushes else 2, averaged_extra_args=averaged)
    state, params = tx.init(jnp.zeros(2)), jnp.zeros(2)
    assert jax.tree.structure(state) == jax.tree.structure(tx.update(params, state, params, tree=TREE)[1])
    step = jax.jit(tx.update)
    for start in (0.0, 10.0):
        for w, weight in ((1.0, 1.0), (5.0, 3.0)):
            tree = {"w": jnp.array([start, w]), "n": 2}
            updates, state = step(params, state, params, tree=tree, weight=weight, value=1.0)
        if flushes:
            updates, state = tx.flush(state, params)
        np.testing.assert_array_equal(updates, [start, 4.0])
    assert step._cache_size() == 1


def test_an_averaged_tree_on_a_mesh_is_the_mean_over_devices():
    """Catches a leading device axis that reaches the optimizer, or is missing in the sums."""
    tx = MultiSteps(scale_by_tree(), 2, averaged_extra_args={"tree": TREE}, mesh=jax.make_mesh((8,), ("data",)))
    state, params = tx.init(jnp.zeros(2)), jnp.zeros(2)
    for i in range(2):
        tree = {"w": jnp.arange(16.0).reshape(8, 2) + i, "n": jnp.arange(8)}
        updates, state = jax.jit(tx.update)(jnp.zeros((8, 2)), state, params, tree=tree)
    np.testing.assert_array_equal(updates, [7.5, 8.5])
    one = MultiSteps(scale_by_tree(), 2, averaged_extra_args={"tree": TREE})
    _, state = tx.update(jnp.zeros((8, 2)), state, params, tree=tree)
    updates, _ = one.flush(one.redistribute(state, batch="per_device"), params)
    np.testing.assert_array_equal(updates, [8.0, 9.0])


@pytest.mark.parametrize("array", [bool, np.bool_, jnp.asarray], ids=["bool", "numpy", "traced"])
def test_boundary_and_weight_reach_it_through_a_chain(array):
    """Catches a chain that drops `boundary`, a Python bool included, and a boundary that the counter overrules."""
    tx = optax.chain(optax.identity(), MultiSteps(optax.sgd(1.0), 1))
    static = () if array is jnp.asarray else ("boundary",)
    update = jax.jit(tx.update, static_argnames=static)
    state, params = tx.init(jnp.array(0.0)), jnp.array(0.0)
    for grad, weight, boundary in ((1.0, 1, False), (5.0, 3, True), (7.0, 1, False)):
        updates, state = update(jnp.array(grad), state, params, weight=jnp.int32(weight), boundary=array(boundary))
        params = optax.apply_updates(params, updates)
    assert float(params) == -4.0


def test_flax_train_state():
    """Catches a need for more than `apply_gradients(grads=)`, which passes no extra args."""
    grads = micro_gradients(2 * K)
    state = train_state.TrainState.create(apply_fn=None, params=fresh_params(), tx=MultiSteps(ADAM, K))
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for i in range(2 * K):
        state = step(state, row(grads, i))
    assert_close(state.params, drive(ADAM, means(grads))[0])
    assert int(state.step) == 2 * K and int(state.opt_state.gradient_step) == 2


class Model(nnx.Module):
    """A layer with a parameter that takes no part in the loss, and with state that is no parameter."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.linear(x)


BATCHES = np.random.default_rng(1).normal(size=(2 * K, 4, 3)).astype(np.float32)


def nnx_step(model, optimizer, x, **extra_args):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads, **extra_args)
    return loss


def test_nnx_optimizer():
    """Catches state that nnx cannot wrap leaf by leaf, and a transformation that nnx.jit cannot hash."""
    model, twin = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MultiSteps(ADAM, K), wrt=nnx.Param)
    bare = nnx.Optimizer(twin, ADAM, wrt=nnx.Param)
    step = nnx.jit(nnx_step)
    for batch in BATCHES:
        step(model, optimizer, batch)
    for window in BATCHES.reshape(2, 4 * K, 3):
        step(twin, bare, window)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(nnx.state(twin, nnx.Param)))
    assert int(model.calls[...]) == 2 * K


def test_nnx_optimizer_passes_extra_args():
    """Catches `weight` and `boundary` that a nnx.Optimizer turns into something else."""
    model = Model(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, MultiSteps(ADAM, K), wrt=nnx.Param)
    step = nnx.jit(nnx_step, static_argnames="boundary")
    step(model, optimizer, BATCHES[0], boundary=True, weight=jnp.float32(0.0))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    step(model, optimizer, BATCHES[0], boundary=True, weight=jnp.float32(2.0))
    assert not np.array_equal(before["linear"]["kernel"], model.linear.kernel[...])


def test_nnx_split_and_merge_keep_an_optimizer_with_it_inside():
    """Catches a transformation that nnx takes for a node, and a graph definition that differs from its copy's."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MultiSteps(ADAM, K), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    assert graphdef == nnx.split((model, optimizer))[0]
    again_model, again = nnx.merge(graphdef, state)
    step = nnx.jit(nnx_step)
    for batch in BATCHES[:K]:
        step(model, optimizer, batch)
        step(again_model, again, batch)
    assert again.tx == optimizer.tx
    np.testing.assert_array_equal(again_model.linear.kernel[...], model.linear.kernel[...])


@pytest.mark.parametrize(
    ("kept", "opt"),
    [(eqx.is_inexact_array, ADAM), (eqx.is_array, optax.sgd(0.1))],  # Bare Adam itself refuses an integer parameter.
    ids=["is_inexact_array", "is_array"],
)
def test_equinox_filter_jit(kept, opt):
    """Catches models with None for a bias, a function for a leaf, and an integer array that has no gradient."""

    class Network(eqx.Module):
        mlp: eqx.nn.MLP
        table: jax.Array

        def __call__(self, x):
            return self.mlp(x)[self.table]

    network = Network(eqx.nn.MLP(3, 2, 4, 1, use_bias=False, key=jax.random.key(0)), jnp.array([1, 0]))
    loss = lambda network, x: jnp.mean((jax.vmap(network)(x) - 1.0) ** 2)

    def train(tx, batches):
        @eqx.filter_jit
        def step(network, state, x):
            updates, state = tx.update(eqx.filter_grad(loss)(network, x), state, eqx.filter(network, kept))
            return eqx.apply_updates(network, updates), state

        trained, state = network, tx.init(eqx.filter(network, kept))
        for batch in batches:
            trained, state = step(trained, state, batch)
        return eqx.filter(trained, eqx.is_array)

    got = train(MultiSteps(opt, K), BATCHES)
    assert_close(got, train(opt, BATCHES.reshape(2, 4 * K, 3)))
    assert not np.array_equal(got.mlp.layers[0].weight, network.mlp.layers[0].weight)


def plain_sgd_init(params):
    del params
    return optax.EmptyState()


def plain_sgd_update(updates, state, params=None):
    del params
    return jax.tree.map(jnp.negative, updates), state


def twice_sgd_update(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: -2.0 * u, updates), state


SGD = optax.GradientTransformation(plain_sgd_init, plain_sgd_update)  # Of module-level functions, so it can be pickled.


def too_large(grads, gradient_step, params):
    del gradient_step, params
    return optax.tree.norm(grads) > 50, ()


OTHERS = {
    "opt": dict(opt=optax.GradientTransformation(plain_sgd_init, twice_sgd_update)),
    "every_k_schedule": dict(every_k_schedule=3),
    "use_grad_mean": dict(use_grad_mean=False),
    "should_skip_update_fn": dict(should_skip_update_fn=too_large),
    "accumulator_dtype": dict(accumulator_dtype=jnp.bfloat16),
    "nonfinite": dict(nonfinite="drop"),
    "averaged_extra_args": dict(averaged_extra_args=()),
    "averaged shapes": dict(averaged_extra_args={"value": jnp.zeros(2)}),
}


ALL = {name: value for options in OTHERS.values() for name, value in options.items()}


def build(**options):
    return MultiSteps(**{"opt": SGD, "every_k_schedule": 2} | options)


COPIES = {
    "tree.map": lambda tx: jax.tree.map(lambda leaf: leaf, tx),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda tx: pickle.loads(pickle.dumps(tx)),
    "flatten": lambda tx: jax.tree.unflatten(jax.tree.structure(tx), jax.tree.leaves(tx)),
    "built again": lambda tx: build(**ALL),
    "gradient_transformation": lambda tx: tx.gradient_transformation(),
}


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_a_copy_is_the_same_transformation(again):
    """Catches a NamedTuple rebuilt from its two functions: without its options, or unequal and compiled anew."""
    tx = build(**ALL)
    made = again(tx)
    assert type(made) is MultiSteps and made == tx and hash(made) == hash(tx) and repr(made) == repr(tx)
    # K is 3, 100 is skipped, NaN dropped, and the sum of 1 and 2 stepped on twice over.
    assert float(drive(made, jnp.array([1.0, 100.0, 2.0, jnp.nan, 7.0]), jnp.array(0.0))[0]) == -6.0


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_one_other_option_makes_another_transformation(options):
    """Catches two instances that compare equal although they compute different things."""
    tx, other = build(), build(**options)
    assert operator.ne(tx, other) and not operator.eq(tx, other)
    assert len({tx, other, build(), build(**options)}) == 2


def test_no_two_of_them_share_a_trace_and_equal_ones_do():
    """Catches jit running the first instance's program for the second, and a compile for each equal instance."""
    step = jax.jit(lambda tx, grads, state: tx.update(grads, state)[0])
    for options in [{}, *OTHERS.values()]:
        for tx in (build(**options), build(**options)):
            step(tx, jnp.array(1.0), tx.init(jnp.array(0.0)))
    assert step._cache_size() == len(OTHERS) + 1


def test_it_is_an_argument_of_jit_without_leaves():
    """Catches a transformation whose functions jit takes for arrays."""
    tx = build()
    assert jax.tree.leaves(tx) == []
    assert float(jax.jit(lambda tx, x: tx.init(x).every_k)(tx, jnp.array(0.0))) == 2
    assert tx != optax.GradientTransformationExtraArgs(*tx) and tx != tuple(tx)


def test_it_is_an_optax_transformation_of_two_functions():
    """Catches code that unpacks a transformation, as optax's own does."""
    tx = build()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    updates, state = update(jnp.array(1.0), init(jnp.array(0.0)), None)
    assert float(updates) == 0 and bool(tx.has_updated(state)) is False


@pytest.mark.parametrize("field", ["init", "update"])
def test_a_replaced_field_makes_a_plain_optax_transformation(field):
    """Catches a NamedTuple's own method, which makes an instance without its options."""
    tx = build()
    replaced = tx._replace(**{field: min})
    assert type(replaced) is optax.GradientTransformationExtraArgs
    assert replaced._asdict() == tx._asdict() | {field: min}
    assert type(MultiSteps._make((min, max))) is optax.GradientTransformationExtraArgs
    with pytest.raises((TypeError, ValueError), match="opt"):
        tx._replace(opt=SGD)
    if hasattr(copy, "replace"):  # from Python 3.13
        assert copy.replace(tx, **{field: min}) == replaced


def test_its_functions_document_themselves():
    """Catches help that shows functools.partial in place of arguments, and a name that a profile can't show."""
    tx = build()
    for fun, words in (
        (tx.init, ["params", "nothing pending"]),
        (tx.update, ["weight: ", "boundary: ", "**extra_args"]),
    ):
        text = pydoc.plain(pydoc.render_doc(fun))
        assert f"{fun.__name__}(" in text and all(word in text for word in words)
    parameters = ["grads", "state", "params", "weight", "boundary", "extra_args"]
    assert list(inspect.signature(tx.update).parameters) == parameters
    assert (tx.init.__name__, tx.update.__name__) == ("init", "update")


def host_step(case):
    """(jitted step, its first state) for one container: `state = step(state, i)` is a micro-step."""
    grads = micro_gradients(1)
    if case == "TrainState":
        state = train_state.TrainState.create(apply_fn=None, params=fresh_params(), tx=MultiSteps(ADAM, 8))
        state = state.replace(step=jnp.zeros((), jnp.int32))  # flax starts from a Python 0, which compiles by itself.
        return jax.jit(lambda state: state.apply_gradients(grads=row(grads, 0))), state
    tx = CONTAINERS[case](MultiSteps(ADAM, 8))

    def step(carry):
        updates, state = tx.update(row(grads, 0), carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    return jax.jit(step), (fresh_params(), tx.init(fresh_params()))


@pytest.mark.parametrize("case", [*CONTAINERS, "TrainState"])
def test_set_every_k_compiles_nothing_in_any_container(case):
    """Catches a K that arrives as another type, weak type or placement, and a container that hides the state."""
    step, state = host_step(case)
    step(state)  # Compiled for the state as init gave it.
    for k, kind in ((2, int), (3, np.int64), (1, jnp.int32)):
        state = jaxaccum.set_every_k(state, kind(k))
        assert [int(s.every_k) for s in found(state)] == [k]
        before = int(found(state)[0].gradient_step)
        for i in range(k):
            state = step(state)
            assert int(found(state)[0].gradient_step) == before + (i == k - 1)
    assert step._cache_size() == 1


def test_set_every_k_compiles_nothing_on_a_mesh():
    """Catches a K that comes back on one device, or uncommitted, where the old one was on all."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, replicated = MultiSteps(SGD, 8), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(tx.init(jnp.array(0.0)), replicated)
    step = jax.jit(lambda state: tx.update(jnp.array(1.0), state)[1], out_shardings=replicated)
    for k in (2, 3):
        state = step(state)
        state = step(jaxaccum.set_every_k(state, k))
        assert state.every_k.sharding == replicated and int(state.every_k) == k
    assert step._cache_size() == 1


def test_set_every_k_reaches_every_replica():
    """Catches a scalar K where pmap's states hold one for each device."""
    replicated = jax.tree.map(lambda x: jnp.stack([x] * 8), MultiSteps(SGD, 8).init(jnp.array(0.0)))
    np.testing.assert_array_equal(jaxaccum.set_every_k(replicated, 3).every_k, [3] * 8)


def test_set_every_k_compiles_nothing_in_nnx():
    """Catches a state that comes back with arrays in place of nnx variables."""
    traces = 0

    @nnx.jit
    def step(model, optimizer, x):
        nonlocal traces
        traces += 1
        return nnx_step(model, optimizer, x)

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, MultiSteps(ADAM, 1), wrt=nnx.Param)
    step(model, optimizer, BATCHES[0])
    for k in (2, 3, 1):
        optimizer = jaxaccum.set_every_k(optimizer, k)
        before = int(optimizer.opt_state.gradient_step[...])
        for _ in range(k):
            assert int(optimizer.opt_state.gradient_step[...]) == before
            step(model, optimizer, BATCHES[0])
        assert int(optimizer.opt_state.gradient_step[...]) == before + 1
    assert traces == 1


def test_set_every_k_reaches_all_of_them_and_leaves_the_argument_alone():
    """Catches a search that stops at the first state or the outermost, and one that writes into the caller's tree."""
    tx = optax.multi_transform({"w": MultiSteps(ADAM, 2), "b": MultiSteps(ADAM, 3)}, {"w": "w", "b": "b"})
    old = tx.init(fresh_params())
    new = jaxaccum.set_every_k(old, 5)
    assert [int(s.every_k) for s in found(new)] == [5, 5]
    assert sorted(int(s.every_k) for s in found(old)) == [2, 3]
    assert jax.tree.structure(new) == jax.tree.structure(old)


def test_k_that_shrinks_to_what_is_pending_closes_the_window_with_its_true_weight():
    """Catches pending micro-batches that are lost, or divided by the new K."""
    tx = MultiSteps(optax.sgd(1.0), 8)
    step, params, state = jax.jit(tx.apply), jnp.array(0.0), tx.init(jnp.array(0.0))
    for grad in (1.0, 2.0, 3.0, 4.0, 10.0):
        if grad == 10.0:
            state = jaxaccum.set_every_k(state, 3)
        params, state = step(params, state, jnp.array(grad))
    assert float(params) == -4.0 and int(state.mini_step) == 0


def sharing_sgd():
    """SGD whose state holds the parameters themselves, twice, and one zero twice."""

    def init(params):
        zero = jnp.zeros(())
        return {"start": params, "again": params, "zeros": (zero, zero)}

    return optax.GradientTransformation(init, lambda grads, state, _=None: (optax.tree.scale(-0.1, grads), state))


DONATED = {
    "adam": ADAM,
    "sgd": optax.sgd(0.1),
    "chain with counts": optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(lambda step: 0.1), optax.ema(0.9), optax.scale(-1.0)
    ),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "a state that shares": sharing_sgd(),
}


@pytest.mark.parametrize("jit_init", [False, True], ids=["init", "jit init"])
@pytest.mark.parametrize("opt", DONATED.values(), ids=DONATED)
def test_a_fresh_state_and_its_parameters_can_be_donated(opt, jit_init):
    """Catches "donate the same buffer twice": two leaves of the state, or one and the parameters, that share a zero."""
    tx = MultiSteps(opt, 2)
    params = fresh_params()
    state = jax.jit(tx.init)(params) if jit_init else tx.init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state)) if leaf.size]
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(tx.apply, donate_argnums=(0, 1))
    grads = micro_gradients(4)
    for i in range(4):
        params, state = step(params, state, row(grads, i))
    assert_close(params, drive(opt, means(grads, 2))[0])
