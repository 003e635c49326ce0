"""Every driver against the big batch in float64: the mean that the inner optimizer receives, and the parameters."""

import functools
from typing import NamedTuple

import exact
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum

OPTIONS = {
    "mean": {},
    "sum": {"use_grad_mean": False},
    "drop": {"nonfinite": "drop"},
}


class Step(NamedTuple):
    """One micro-step of a random run."""

    seed: int
    weight: float | None
    poison: bool
    new_k: int | None
    flush: bool


weights = st.none() | st.sampled_from([0.0, 1.0, 3.0, 1000.0]) | st.floats(2.0**-7, 2.0**13, width=32)
steps = st.builds(
    Step,
    seed=st.integers(0, 2**31),
    weight=weights,
    poison=st.sampled_from([False, False, False, True]),
    new_k=st.none() | st.none() | st.integers(1, 6),
    flush=st.sampled_from([False] * 7 + [True]),
)


@functools.cache
def transformation(options):
    return jaxaccum.MultiSteps(exact.recorder(), 4, **OPTIONS[options])


@functools.cache
def program(options, entry):
    """A jitted micro-step that returns (params, state) whichever way it is entered."""
    tx = transformation(options)

    def step(params, state, grads, weight, boundary):
        if entry == "apply":
            return tx.apply(params, state, grads, weight=weight, boundary=boundary)
        updates, state = tx.update(grads, state, params, weight=weight, boundary=boundary)
        return optax.apply_updates(params, updates), state

    return {
        "static": jax.jit(step, static_argnames="boundary"),
        "traced": jax.jit(step),
        "flush": jax.jit(tx.flush),
    }


@hypothesis.settings(max_examples=80)
@hypothesis.given(
    tree=st.sampled_from(sorted(exact.TREES)),
    options=st.sampled_from(sorted(OPTIONS)),
    entry=st.sampled_from(["apply", "update"]),
    drive=st.sampled_from(["counter", "static", "traced"]),
    k=st.integers(1, 6),
    run=st.lists(steps, min_size=1, max_size=14),
)
def test_the_inner_optimizer_is_handed_the_big_batch_mean(tree, options, entry, drive, k, run):
    """Catches any lost, doubled, rounded or wrongly divided micro-batch, in any boundary mode and window split."""
    params = exact.TREES[tree]
    tx, programs = transformation(options), program(options, entry)
    state = jaxaccum.set_every_k(tx.init(params), k)
    window, optimizer_steps, dropped = exact.Window.empty(params), 0, 0

    def check_closed(state, old_params, new_params):
        nonlocal window, optimizer_steps
        applied = window.weight > 0
        optimizer_steps += applied
        assert bool(tx.has_updated(state)) == applied
        if applied:
            window.check(state.inner_opt_state.mean, options != "sum")
        else:
            jax.tree.map(np.testing.assert_array_equal, new_params, old_params)
        window = exact.Window.empty(params)

    for step in run:
        if step.new_k is not None:
            k = step.new_k
            state = jaxaccum.set_every_k(state, k)
        grads = exact.draw(params, np.random.default_rng(step.seed))
        weight = 1.0 if step.weight is None else step.weight
        if step.poison and (weight == 0 or options == "drop"):
            grads = exact.poisoned(grads, [np.nan, np.inf][step.seed % 2])
            dropped += weight != 0
            window = window.add(grads, 0.0)
        else:
            window = window.add(grads, weight)
        closes = window.size >= k
        boundary = {"counter": None, "static": closes, "traced": jnp.asarray(closes)}[drive]
        step_program = programs["traced" if drive == "traced" else "static"]
        new_params, state = step_program(params, state, grads, step.weight, boundary)
        if closes:
            check_closed(state, params, new_params)
        else:
            assert not tx.has_updated(state)
            jax.tree.map(np.testing.assert_array_equal, new_params, params)
        if step.flush:
            updates, state = programs["flush"](state, new_params)
            flushed = optax.apply_updates(new_params, updates)
            if window.size:
                check_closed(state, new_params, flushed)
            new_params = flushed
        params = new_params
        assert int(state.mini_step) == window.size
        assert int(state.gradient_step) == int(state.inner_opt_state.count) == optimizer_steps
        assert int(state.dropped) == dropped


BATCH_LOSSES = {
    "plain": lambda p, batch: sum(jnp.sum(x * g[0]) for x, g in zip(jax.tree.leaves(p), batch["g"], strict=True)),
    "weighted": lambda p, batch: jaxaccum.Weighted(
        sum(jnp.sum(x * g[0] * batch["w"][0]) for x, g in zip(jax.tree.leaves(p), batch["g"], strict=True)),
        batch["w"][0],
    ),
}


@functools.cache
def window_program(loss, k, stacked):
    fun = BATCH_LOSSES[loss]
    if stacked:
        return jax.jit(lambda p, batch, k: jaxaccum.value_and_grad(fun, k, stacked=True)(p, batch))
    f = jaxaccum.value_and_grad(fun, k)
    return jax.jit(lambda p, batch, k: f(p, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    loss=st.sampled_from(sorted(BATCH_LOSSES)),
    stacked=st.booleans(),
    k=st.sampled_from([1, 2, 3, 6]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_a_window_in_one_step_is_the_big_batch(loss, stacked, k, seed, data):
    """Catches a micro-batch lost, doubled or wrongly weighted inside the loop, or an absent one that counts."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(5)}
    rng = np.random.default_rng(seed)
    window = exact.Window.empty(params)
    all_weights, all_grads = [], []
    for i in range(6 if stacked else k):
        weight = (
            data.draw(st.sampled_from([0.0, 1.0, 7.0]) | st.floats(2.0**-7, 2.0**10, width=32))
            if loss != "plain"
            else 1.0
        )
        grads = exact.draw(params, rng)
        grads = exact.poisoned(grads, np.nan) if weight == 0 else grads
        all_weights.append(weight)
        all_grads.append(jax.tree.leaves(grads))
        if i < k:
            window = window.add(grads, weight)
    batch = {
        "g": [jnp.stack(g)[:, None] for g in zip(*all_grads, strict=True)],
        "w": jnp.asarray(all_weights, jnp.float32)[:, None],
    }
    value, grads = window_program(loss, None if stacked else k, stacked)(params, batch, k)
    if window.weight:
        window.check(grads)
        expected = sum(float(np.sum(t).real) for t in window.total) / window.weight
        scale = sum(float(np.sum(m)) for m in window.magnitude) / window.weight
        np.testing.assert_allclose(value, expected, atol=1e-5 * scale)
    else:
        assert value == 0 and all(np.all(g == 0) for g in jax.tree.leaves(grads))


INNER = {
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.01),
    "clipped adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
}
SIGN_OR_ROUND = {
    "lion": lambda: optax.lion(0.01),
    "muon": lambda: optax.contrib.muon(0.01),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(0.01),
}


def trajectory(tx, params, windows, drive):
    """Parameters after all windows of (weight, gradient) pairs, in one boundary mode."""
    state = tx.init(params)
    step = jax.jit(lambda p, s, g, w, boundary: tx.apply(p, s, g, weight=w, boundary=boundary), static_argnums=4)
    for window in windows:
        state = jaxaccum.set_every_k(state, len(window))
        for i, (weight, grads) in enumerate(window):
            boundary = None if drive == "counter" else i + 1 == len(window)
            params, state = step(params, state, grads, weight, boundary)
    return params, state


def random_windows(params, sizes, seed):
    rng = np.random.default_rng(seed)
    return [[(float(rng.integers(1, 50)), exact.draw(params, rng)) for _ in range(size)] for size in sizes]


def big_batch(opt, params, windows):
    """The bare optimizer on each window's mean, in the precision of `params`."""
    state = opt.init(params)
    for window in windows:
        weights, grads = zip(*window, strict=True)
        mean = jax.tree.map(lambda *g, w=weights: sum(a * b for a, b in zip(w, g, strict=True)) / sum(w), *grads)
        updates, state = opt.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("drive", ["counter", "static"])
def test_parameters_follow_the_big_batch_in_float64(name, drive):
    """Catches an inner state that advances off the boundary, is lost, or sees anything but the mean."""
    with jax.enable_x64(True):
        params = {"w": jnp.linspace(-1.0, 1.0, 48).reshape(8, 6), "b": jnp.ones(5)}
        windows = random_windows(params, [4, 4, 1, 3, 3], seed=1)
        tx = jaxaccum.MultiSteps(INNER[name](), 4)
        got, _ = trajectory(tx, params, windows, drive)
        want = big_batch(INNER[name](), params, windows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, want)


@pytest.mark.parametrize("name", INNER)
def test_parameters_in_float32_stay_within_the_bound_of_float64(name):
    """Catches a mean that is exact on its way in and rounded, or a state cast, on its way out."""
    start = {"w": np.linspace(-1.0, 1.0, 48).reshape(8, 6), "b": np.ones(5)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    windows = random_windows(params, [4, 4, 1, 3, 3], seed=2)
    got, _ = trajectory(jaxaccum.MultiSteps(INNER[name](), 4), params, windows, "static")
    with jax.enable_x64(True):
        double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
        windows = [[(weight, double(grads)) for weight, grads in window] for window in windows]
        want = big_batch(INNER[name](), double(params), windows)
    # A relative error of 2K·eps in a mean moves an update by a few times that; five windows add up.
    bound = 5 * 2 * 4 * np.finfo(np.float32).eps
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=bound, atol=bound), got, want)


@pytest.mark.parametrize("name", SIGN_OR_ROUND)
def test_optimizers_with_signs_or_rounding_are_handed_identical_means(name):
    """Catches a mean that depends on the optimizer behind it; their parameters would prove nothing."""
    params = {"w": jnp.linspace(-1.0, 1.0, 48).reshape(8, 6), "b": jnp.ones(5)}
    windows = random_windows(params, [4, 2, 3], seed=3)

    def means(opt):
        # Recorded beside the optimizer, in a chain that hands the mean on as it is.
        watch = optax.GradientTransformation(
            exact.recorder().init, lambda g, s, p=None: (g, exact.Recorded(g, s.count + 1))
        )
        _, state = trajectory(jaxaccum.MultiSteps(optax.chain(watch, opt), 4), params, windows, "counter")
        return state.inner_opt_state[0].mean

    jax.tree.map(np.testing.assert_array_equal, means(SIGN_OR_ROUND[name]()), means(optax.sgd(0.1)))
