"""The flax adapters, each against what one would write by hand."""

import functools

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

import jaxaccum
import jaxaccum.flax
from jaxaccum import MultiSteps, Weighted

K = 4
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 3)).astype(np.float32), RNG.normal(size=(16, 2)).astype(np.float32)
X = X * np.linspace(0.1, 3.0, 16, dtype=np.float32)[:, None]  # So that no two micro-batches have like statistics.
BATCH = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
MICRO_BATCHES = [jax.tree.map(lambda a, i=i: a[i::K], BATCH) for i in range(K)]


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), a, b)


def mean_of(trees):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def squared_error(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


class Network(nnx.Module):
    """A stateless network, or one with batch statistics, or with dropout."""

    def __init__(self, *, norm=False, dropout=0.0, dtype=None, param_dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        make = functools.partial(nnx.Linear, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.inner, self.outer = make(3, 5), make(5, 2)
        self.norm = nnx.BatchNorm(5, rngs=rngs) if norm else None
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def hidden(self, x):
        h = self.inner(x)
        h = self.norm(h) if self.norm else h
        return self.dropout(h) if self.dropout else h

    def __call__(self, x):
        return self.outer(jnp.tanh(self.hidden(x)))


def pure(model, *filters):
    return nnx.to_pure_dict(nnx.state(model, *filters))


def by_hand(model, loss=squared_error, has_aux=False):
    """nnx's own gradient of each micro-batch in turn, averaged; the model is updated on the way."""
    step = nnx.jit(nnx.value_and_grad(loss, has_aux=has_aux))
    losses, grads = zip(*[step(model, batch) for batch in MICRO_BATCHES], strict=True)
    if has_aux:
        losses, aux = zip(*losses, strict=True)
        return (sum(losses) / K, jax.tree.map(lambda *rows: jnp.stack(rows), *aux)), mean_of(grads)
    return sum(losses) / K, mean_of(grads)


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
def test_nnx_gradient_is_that_of_the_big_batch(transform):
    """Catches a sum for a mean, a wrong split, and gradients that are no nnx.State like nnx's own."""
    model = Network()
    loss, grads = transform(jaxaccum.flax.value_and_grad(squared_error, K))(model, BATCH)
    want_loss, want = nnx.jit(nnx.value_and_grad(squared_error))(model, BATCH)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    assert_close((loss, grads), (want_loss, want))


def test_nnx_gradient_goes_into_an_nnx_optimizer():
    """Catches gradients in a form that `nnx.Optimizer.update` doesn't take."""
    model, twin = Network(), Network()
    optimizers = [nnx.Optimizer(m, optax.adam(0.1), wrt=nnx.Param) for m in (model, twin)]
    optimizers[0].update(model, nnx.jit(jaxaccum.flax.value_and_grad(squared_error, K))(model, BATCH)[1])
    optimizers[1].update(twin, nnx.jit(nnx.grad(squared_error))(twin, BATCH))
    assert_close(pure(model), pure(twin), rtol=1e-4)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_nnx_batch_statistics_go_from_micro_batch_to_micro_batch_into_the_model(jit):
    """Catches statistics of the last micro-batch alone, of the big batch, or left behind in a copy of the model."""
    model, twin = Network(norm=True), Network(norm=True)
    f = jaxaccum.flax.value_and_grad(squared_error, K)
    before = pure(model, nnx.BatchStat)
    got = (nnx.jit(f) if jit else f)(model, BATCH)
    assert_close(got, by_hand(twin))
    assert_close(pure(model), pure(twin))
    assert not np.allclose(before["norm"]["mean"], model.norm.mean[...])


def seen_by_dropout(model, batch):
    """The loss, and which hidden units dropout kept."""
    return squared_error(model, batch), model.hidden(jnp.ones_like(batch["x"])) != 0


def test_nnx_dropout_draws_anew_in_each_micro_batch_as_a_loop_would():
    """Catches one mask for all micro-batches, and a stream that is not returned to the model."""
    model, twin = Network(dropout=0.5), Network(dropout=0.5)
    f = nnx.jit(jaxaccum.flax.value_and_grad(seen_by_dropout, K, has_aux=True))
    got = f(model, BATCH)
    assert_close(got, by_hand(twin, seen_by_dropout, has_aux=True))
    masks = np.asarray(got[0][1])
    assert masks.shape == (K, 4, 5) and len({mask.tobytes() for mask in masks}) == K
    again = np.asarray(f(model, BATCH)[0][1])
    assert not {mask.tobytes() for mask in again} & {mask.tobytes() for mask in masks}


def test_nnx_dropout_is_reproducible():
    """Catches randomness from anywhere but the model's streams."""
    f = nnx.jit(jaxaccum.flax.value_and_grad(squared_error, K))
    assert_close(f(Network(dropout=0.5), BATCH), f(Network(dropout=0.5), BATCH), rtol=0)


def test_nnx_key_argument_is_folded_with_the_micro_step():
    """Catches argument numbers that are not moved with the model's: the key would be split, the batch folded."""
    noise = lambda model, batch, scale, key: (squared_error(model, batch), scale * jax.random.normal(key))
    f = jaxaccum.flax.value_and_grad(noise, K, key_argnums=3, has_aux=True)
    (_, got), _ = f(Network(), BATCH, 2.0, jax.random.key(1))
    assert_close(got, jnp.stack([2 * jax.random.normal(jax.random.fold_in(jax.random.key(1), i)) for i in range(K)]))


def masked_error(model, batch):
    """The loss per real token."""
    errors = ((model(batch["x"]) - batch["y"]) ** 2).mean(-1)
    return Weighted(jnp.sum(errors * batch["mask"]), batch["mask"].sum())


def masked_batch():
    """A batch whose micro-batches hold 4, 1, 0 and 2 real tokens."""
    by_micro_batch = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], jnp.float32)
    return BATCH | {"mask": by_micro_batch.T.ravel()}


def test_nnx_weighted_loss_is_exact_for_ragged_tokens():
    """Catches a mean of means."""
    model = Network()
    loss, grads = jaxaccum.flax.value_and_grad(masked_error, K)(model, masked_batch())
    exact = lambda model, batch: (lambda sums: sums.total / sums.weight)(masked_error(model, batch))
    assert_close((loss, grads), nnx.value_and_grad(exact)(model, masked_batch()))


def test_nnx_micro_batch_of_weight_0_leaves_the_model_alone():
    """Catches statistics and random streams of padding, NaN here, that reach the model."""
    model, twin = Network(norm=True), Network(norm=True)
    batch = masked_batch()
    batch["x"] = batch["x"].at[2::K].set(jnp.nan)
    nnx.jit(jaxaccum.flax.value_and_grad(masked_error, K))(model, batch)
    for i in (0, 1, 3):
        twin(batch["x"][i::K])
    assert_close(pure(model, nnx.BatchStat), pure(twin, nnx.BatchStat))


@pytest.mark.parametrize("has_aux", [False, True])
def test_nnx_micro_steps_are_a_window(has_aux):
    """Catches a model that is left behind, streams that repeat, and a state that a micro-batch of weight 0 changes."""
    model, twin = Network(norm=True, dropout=0.5), Network(norm=True, dropout=0.5)
    batch = masked_batch()
    batch["x"] = batch["x"].at[2::K].set(jnp.nan)  # Micro-batch 2 weighs 0.
    loss = (lambda model, batch: (masked_error(model, batch), batch["y"][0])) if has_aux else masked_error
    tx = MultiSteps(optax.sgd(0.1), K)
    step = jaxaccum.flax.HostDriven(tx, loss, has_aux)
    state, start = step.init(model), jax.tree.map(jnp.copy, pure(model, nnx.Param))
    for i in range(K):
        assert step.mini_step == i
        returned, state = step(model, state, jax.tree.map(lambda a, i=i: a[i::K], batch))
        if has_aux:
            np.testing.assert_array_equal(returned[1], batch["y"][i])
    window = nnx.jit(jaxaccum.flax.value_and_grad(masked_error, K))
    _, grads = window(twin, batch)
    jax.tree.map(np.testing.assert_array_equal, pure(model, nnx.BatchStat), pure(twin, nnx.BatchStat))
    assert model.dropout.rngs.count[...] == twin.dropout.rngs.count[...] == K - 1
    assert_close(pure(model, nnx.Param), jax.tree.map(lambda p, g: p - 0.1 * g, start, nnx.to_pure_dict(grads)))


def test_host_driven_passes_every_keyword_argument():
    """Catches a keyword argument of the loss whose name the adapter uses for its own, here a teacher's structure."""
    student, teacher = (nnx.Linear(3, 2, use_bias=bias, rngs=nnx.Rngs(seed)) for seed, bias in ((0, True), (1, False)))
    structure, weights = nnx.split(teacher)
    loss = lambda model, x, *, graphdef, weights: jnp.mean((model(x) - nnx.merge(graphdef, weights)(x)) ** 2)
    step = jaxaccum.flax.HostDriven(MultiSteps(optax.sgd(0.1), 2), loss)
    value, _ = step(student, step.init(student), jnp.ones((4, 3)), graphdef=structure, weights=weights)
    np.testing.assert_allclose(value, jnp.mean((student(jnp.ones((4, 3))) - teacher(jnp.ones((4, 3)))) ** 2), rtol=1e-6)


def test_nnx_micro_steps_close_and_compile_as_the_core_does():
    """Catches a flush that leaves the model as it was, a K that is not passed on, and a mode that is not seen."""
    model = Network(norm=True)
    step = jaxaccum.flax.HostDriven(MultiSteps(optax.sgd(0.1), 8), squared_error, wrt=nnx.PathContains("outer"))
    state = step.init(model)
    fixed = jax.tree.map(jnp.copy, pure(model.inner))
    _, state = step(model, state, MICRO_BATCHES[0])
    before = jax.tree.map(jnp.copy, pure(model.outer))
    state = step.flush(model, state)
    assert not np.allclose(before["kernel"], model.outer.kernel[...])
    step.every_k = 1
    _, state = step(model, state, MICRO_BATCHES[0])
    assert (step.every_k, int(state.gradient_step)) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, pure(model.inner), fixed)
    statistics = jax.tree.map(jnp.copy, pure(model, nnx.BatchStat))
    model.eval()
    _, state = step(model, state, MICRO_BATCHES[1])
    jax.tree.map(np.testing.assert_array_equal, pure(model, nnx.BatchStat), statistics)
    accumulate, close = step.lower(model, state, MICRO_BATCHES[0])
    assert len(accumulate.as_text()) < len(close.as_text())


def test_nnx_differentiates_what_wrt_names():
    """Catches a filter that is ignored, and frozen parameters that are lost or changed."""
    model = Network()
    before = pure(model)
    wrt = nnx.All(nnx.Param, nnx.PathContains("outer"))
    loss, grads = jaxaccum.flax.value_and_grad(squared_error, K, wrt=wrt)(model, BATCH)
    assert_close((loss, grads), nnx.value_and_grad(squared_error, argnums=nnx.DiffState(0, wrt))(model, BATCH))
    assert set(nnx.to_pure_dict(grads)) == {"outer"}
    jax.tree.map(np.testing.assert_array_equal, pure(model), before)


def test_nnx_step_compiles_once():
    """Catches a model that comes back with other types or another graph than it went in with."""
    traces = 0

    def loss(model, batch):
        nonlocal traces
        traces += 1
        return squared_error(model, batch)

    model = Network(norm=True, dropout=0.5)
    f = nnx.jit(jaxaccum.flax.value_and_grad(loss, K))
    f(model, BATCH)
    first = traces
    f(model, BATCH)
    assert traces == first


def test_nnx_bfloat16_gradients_are_summed_in_float32():
    """Catches a sum in bfloat16, where 1024 ones make 256, and gradients of another dtype than the parameters'."""
    model = nnx.Linear(1, 1, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    f = nnx.jit(jaxaccum.flax.value_and_grad(lambda model, x: jnp.mean(model(x)), 1024))
    loss, grads = f(model, jnp.ones((1024, 1), jnp.bfloat16))
    assert grads["kernel"][...].dtype == jnp.bfloat16 and float(grads["kernel"][0, 0]) == 1.0
    assert float(loss) == float(model.kernel[0, 0])


def test_nnx_options_reach_the_window():
    """Catches options that are dropped on the way: here a batch that is stacked, and a `grad_dtype`."""
    model = Network()
    stacked = jax.tree.map(lambda x: x.reshape(K, 4, -1), BATCH)
    f = jaxaccum.flax.value_and_grad(squared_error, K, stacked=True, grad_dtype=jnp.bfloat16)
    _, grads = f(model, stacked)
    assert_close(grads, nnx.grad(squared_error)(model, BATCH), rtol=1e-2)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


class Linen(nn.Module):
    """The same networks in linen."""

    norm: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(5, dtype=self.dtype)(x)
        h = nn.BatchNorm(use_running_average=False)(h) if self.norm else h
        if self.dropout:
            ones = nn.Dropout(self.dropout, deterministic=False)(jnp.ones_like(h))
            self.sow("masks", "mask", ones != 0, reduce_fn=lambda old, new: new, init_fn=lambda: None)
            h = h * ones
        return nn.Dense(2, dtype=self.dtype)(jnp.tanh(h))


@functools.cache
def init(module):
    """Variables of a module, made as a user would: from one micro-batch."""
    return jax.jit(module.init)({"params": jax.random.key(0), "dropout": jax.random.key(1)}, MICRO_BATCHES[0]["x"])


def linen_loss(module, **rngs):
    """`loss(params, rest, batch)` by hand, with mutated collections as aux."""

    def loss(params, rest, batch):
        y, mutated = module.apply({"params": params, **rest}, batch["x"], mutable=list(rest), rngs=rngs)
        return jnp.mean((y - batch["y"]) ** 2), mutated

    return loss


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_linen_gradient_is_that_of_the_big_batch(transform):
    """Catches a sum for a mean, a wrong split, and variables that come back changed."""
    module = Linen()
    variables = init(module)
    f = transform(jaxaccum.flax.linen_value_and_grad(module, squared_error, K))
    (loss, after), grads = f(variables, BATCH)
    (want_loss, _), want = jax.value_and_grad(linen_loss(module), has_aux=True)(variables["params"], {}, BATCH)
    assert_close((loss, grads), (want_loss, want))
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, after, variables)


@pytest.mark.parametrize("mutable", ["batch_stats", ["batch_stats"]], ids=["name", "list"])
def test_linen_batch_statistics_go_from_micro_batch_to_micro_batch(mutable):
    """Catches statistics of one micro-batch alone, of the big batch, or none."""
    module = Linen(norm=True)
    variables = init(module)
    f = jax.jit(jaxaccum.flax.linen_value_and_grad(module, squared_error, K, mutable=mutable))
    (loss, after), grads = f(variables, BATCH)
    rest, losses, want = {"batch_stats": variables["batch_stats"]}, [], []
    step = jax.jit(jax.value_and_grad(linen_loss(module), has_aux=True))
    for batch in MICRO_BATCHES:
        (value, rest), g = step(variables["params"], rest, batch)
        losses.append(value)
        want.append(g)
    assert_close((loss, grads), (sum(losses) / K, mean_of(want)))
    assert_close(after, {"params": variables["params"], **rest})


def masks_and_loss(model, batch):
    loss = squared_error(model, batch)
    return loss, model.get_variable("masks", "mask")


def test_linen_dropout_draws_anew_in_each_micro_batch_from_the_key():
    """Catches one mask for all micro-batches or for all keys, and masks that cannot be drawn again."""
    module = Linen(dropout=0.5)
    f = jaxaccum.flax.linen_value_and_grad(module, masks_and_loss, K, mutable="masks", rngs="dropout", has_aux=True)
    f, masks = jax.jit(f), {}
    for seed in (0, 1):
        (_, (_, drawn)), grads = f(init(module), BATCH, jax.random.key(seed))
        (_, (_, again)), grads_again = f(init(module), BATCH, jax.random.key(seed))
        np.testing.assert_array_equal(drawn, again)
        assert_close(grads, grads_again, rtol=0)
        masks |= {np.asarray(mask).tobytes(): seed for mask in drawn}
    assert len(masks) == 2 * K


def test_linen_streams_draw_apart():
    """Catches two named streams that share a key."""

    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("unused", nn.initializers.zeros, ())
            return jnp.stack([jax.random.normal(self.make_rng(name)) for name in ("dropout", "noise")])

    module, loss = Noise(), lambda model, x: (jnp.sum(x), model(x))
    variables = module.init({name: jax.random.key(0) for name in ("params", "dropout", "noise")}, BATCH["x"])
    f = jaxaccum.flax.linen_value_and_grad(module, loss, K, rngs=("dropout", "noise"), has_aux=True)
    (_, (_, drawn)), _ = f(variables, BATCH["x"], jax.random.key(0))
    assert drawn.shape == (K, 2) and len(np.unique(drawn)) == 2 * K


def test_linen_says_that_a_key_is_needed():
    """Catches flax's error about a missing stream, from the inside of a scan."""
    f = jaxaccum.flax.linen_value_and_grad(Linen(dropout=0.5), squared_error, K, rngs="dropout")
    with pytest.raises(TypeError, match=r"key is needed: .*dropout"):
        f({"params": {}}, BATCH)


def test_linen_says_which_collection_is_missing():
    """Catches a bare KeyError where `mutable` names what the variables don't hold."""
    module = Linen()
    f = jaxaccum.flax.linen_value_and_grad(module, squared_error, K, mutable="batch_stats")
    with pytest.raises(ValueError, match=r"no collection 'batch_stats'.*hold \['params'\]"):
        f(init(module), BATCH)
    with pytest.raises(ValueError, match=r"no collection 'params'"):
        jaxaccum.flax.linen_value_and_grad(module, squared_error, K)(init(module)["params"], BATCH)


def test_linen_aux_comes_back_for_each_micro_batch():
    """Catches aux of the last micro-batch, and aux in place of the variables."""
    module = Linen(norm=True)
    loss = lambda model, batch: (squared_error(model, batch), {"first": batch["y"][0, 0]})
    f = jaxaccum.flax.linen_value_and_grad(module, loss, K, mutable="batch_stats", has_aux=True)
    (_, (after, aux)), _ = jax.jit(f)(init(module), BATCH)
    np.testing.assert_array_equal(aux["first"], Y[:K, 0])
    assert set(after) == {"params", "batch_stats"}


def test_linen_weighted_loss_is_exact_for_ragged_tokens():
    """Catches a mean of means, and a micro-batch of weight 0 whose statistics are kept."""
    module = Linen(norm=True)
    variables, batch = init(module), masked_batch()
    batch["x"] = batch["x"].at[2::K].set(jnp.nan)
    f = jaxaccum.flax.linen_value_and_grad(module, masked_error, K, mutable="batch_stats")
    (loss, after), grads = jax.jit(f)(variables, batch)

    def exact(params):
        total, weight, rest = 0.0, 0.0, {"batch_stats": variables["batch_stats"]}
        for i in (0, 1, 3):
            rows = jax.tree.map(lambda a: a[i::K], batch)  # noqa: B023
            y, rest = module.apply({"params": params, **rest}, rows["x"], mutable=["batch_stats"])
            total += jnp.sum(((y - rows["y"]) ** 2).mean(-1) * rows["mask"])
            weight += rows["mask"].sum()
        return total / weight, rest

    (want_loss, rest), want = jax.jit(jax.value_and_grad(exact, has_aux=True))(variables["params"])
    assert_close((loss, grads, after["batch_stats"]), (want_loss, want, rest["batch_stats"]))


def test_linen_bfloat16_computes_narrow_and_sums_wide():
    """Catches gradients of the compute dtype, and a sum that bfloat16 stops at 256."""

    class Scale(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x.astype(jnp.bfloat16) * self.param("scale", nn.initializers.ones, ()).astype(jnp.bfloat16)

    variables = Scale().init(jax.random.key(0), jnp.ones(1))
    f = jaxaccum.flax.linen_value_and_grad(Scale(), lambda model, x: jnp.mean(model(x)), 1024)
    (loss, _), grads = jax.jit(f)(variables, jnp.ones(1024))
    assert (float(grads["scale"]), grads["scale"].dtype) == (1.0, jnp.float32)
    assert float(loss) == 1.0


PARAMS = {"w": np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(3, 2)}
GRADIENTS = RNG.normal(size=(4, 3, 2)).astype(np.float32)
WEIGHTS = np.array([3.0, 1.0, 2.0, 6.0], np.float32)
ADAM = optax.adam(0.1)
IN_A_CHAIN = {"alone": lambda opt: opt, "chain": lambda opt: optax.chain(optax.identity(), opt)}


def create(tx, cls=jaxaccum.flax.TrainState, **fields):
    return cls.create(apply_fn=None, params=jax.tree.map(jnp.array, PARAMS), tx=tx, **fields)


def trained(opt, gradients, extras=None):
    """Parameters after one update of bare `opt` for each of `gradients`."""
    opt, params = optax.with_extra_args_support(opt), jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    for i, gradient in enumerate(gradients):
        updates, state = opt.update({"w": gradient}, state, params, **(extras[i] if extras else {}))
        params = optax.apply_updates(params, updates)
    return params


def weighted_means():
    pairs = zip(GRADIENTS.reshape(2, 2, 3, 2), WEIGHTS.reshape(2, 2), strict=True)
    return [np.average(g, axis=0, weights=w) for g, w in pairs]


@pytest.mark.parametrize("static", [True, False], ids=["static", "traced"])
@pytest.mark.parametrize("wrap", IN_A_CHAIN.values(), ids=IN_A_CHAIN)
def test_train_state_takes_weight_and_boundary(wrap, static):
    """Catches arguments that are lost on the way, in a chain above all, and a counter that overrules the boundary."""
    step = jax.jit(
        lambda state, gradient, weight, boundary: state.apply_gradients(
            grads={"w": gradient}, weight=weight, boundary=boundary
        ),
        static_argnums=(3,) if static else (),
    )
    state = create(wrap(MultiSteps(ADAM, 100)))
    for i in range(4):
        before = state.params
        state = step(state, GRADIENTS[i], WEIGHTS[i], i % 2 == 1)
        assert np.array_equal(before["w"], state.params["w"]) == (i % 2 == 0)
    assert_close(state.params, trained(ADAM, weighted_means()))
    assert int(state.step) == 4


@pytest.mark.parametrize("wrap", IN_A_CHAIN.values(), ids=IN_A_CHAIN)
def test_train_state_counts_by_itself_and_counts_calls(wrap):
    """Catches a `step` of optimizer steps, which would part from flax's, and a None that is taken for a boundary."""
    state = create(wrap(MultiSteps(ADAM, 2)))
    for i in range(4):
        state = state.apply_gradients(grads={"w": GRADIENTS[i]})
        assert int(state.step) == i + 1
    assert_close(state.params, trained(ADAM, GRADIENTS.reshape(2, 2, 3, 2).mean(1)))
    assert int(optax.tree.get(state.opt_state, "gradient_step")) == 2


@pytest.mark.parametrize("wrap", IN_A_CHAIN.values(), ids=IN_A_CHAIN)
def test_train_state_passes_extra_args(wrap):
    """Catches `value` lost, or taken for a field: flax's own class replaces fields by all keyword arguments."""
    bare, values = optax.polyak_sgd(scaling=0.1), np.array([1.0, 3.0, 4.0, 8.0], np.float32)
    state = create(wrap(MultiSteps(bare, 2)))
    for i in range(4):
        state = state.apply_gradients(grads={"w": GRADIENTS[i]}, value=values[i])
    extras = [dict(value=v) for v in values.reshape(2, 2).mean(1)]
    assert_close(state.params, trained(bare, GRADIENTS.reshape(2, 2, 3, 2).mean(1), extras))


TRANSFORMATIONS = {"MultiSteps": MultiSteps(optax.sgd(1.0), 1), "sgd": optax.sgd(1.0), "scale": optax.scale(-1.0)}


@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_train_state_replaces_fields_and_takes_any_transformation(tx):
    """Catches a field of a subclass passed to the optimizer, and a bare optimizer that chokes on extra args."""

    class WithStatistics(jaxaccum.flax.TrainState):
        batch_stats: jax.Array

    state = create(tx, WithStatistics, batch_stats=jnp.zeros(()))
    state = state.apply_gradients(grads={"w": GRADIENTS[0]}, batch_stats=jnp.ones(()), value=1.0)
    assert float(state.batch_stats) == 1.0
    assert_close(state.params, trained(optax.sgd(1.0), GRADIENTS[:1]))


@pytest.mark.parametrize("tx", [MultiSteps(optax.sgd(1.0), 1), optax.sgd(1.0)], ids=["MultiSteps", "sgd"])
@pytest.mark.parametrize("tree", [lambda x: x, lambda x: [x]], ids=["array", "list"])
def test_train_state_takes_parameters_in_any_tree(tree, tx):
    """Catches a search for fp8 statistics in what has no names."""
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=tree(jnp.ones(3)), tx=tx)
    assert_close(state.apply_gradients(grads=tree(jnp.full(3, 0.25))).params, tree(np.full(3, 0.75)))


def test_train_state_overwrites_fp8_statistics_and_accumulates_the_rest():
    """Catches scales that are averaged, or stepped on by the optimizer, and parameters that lose their wrapping."""
    params = {"params": {"w": jnp.array(PARAMS["w"])}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(())}}
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params=params, tx=MultiSteps(ADAM, 2))
    for i in range(2):
        assert_close(state.params["params"], PARAMS)
        grads = {"params": {"w": GRADIENTS[i]}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.float32(10 + i)}}
        state = state.apply_gradients(grads=grads)
        assert float(state.params[OVERWRITE_WITH_GRADIENT]["scale"]) == (1, 11)[i]
    assert_close(state.params["params"], trained(ADAM, [GRADIENTS[:2].mean(0)]))
    bare = jaxaccum.flax.TrainState.create(apply_fn=None, params=params, tx=ADAM).apply_gradients(grads=grads)
    assert float(bare.params[OVERWRITE_WITH_GRADIENT]["scale"]) == 11
    assert_close(bare.params["params"], trained(ADAM, GRADIENTS[1:2]))


@pytest.mark.parametrize("wrap", IN_A_CHAIN.values(), ids=IN_A_CHAIN)
def test_train_state_can_be_donated(wrap):
    """Catches two leaves of a fresh train state that share a buffer, and a step that compiles again."""
    opt = optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1)
    state = create(wrap(MultiSteps(opt, 2))).replace(step=jnp.zeros((), jnp.int32))
    step = jax.jit(lambda state, gradient: state.apply_gradients(grads={"w": gradient}), donate_argnums=0)
    for i in range(4):
        state = step(state, GRADIENTS[i])
    assert_close(state.params, trained(opt, GRADIENTS.reshape(2, 2, 3, 2).mean(1)))
    assert step._cache_size() == 1


@pytest.mark.parametrize("option", [{"weight": 2.0}, {"boundary": False}])
def test_a_train_state_without_multi_steps_refuses_what_it_would_ignore(option):
    """Catches a boundary that is ignored, so that every micro-step is an optimizer step."""
    state = jaxaccum.flax.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(1.0))
    with pytest.raises(ValueError, match=rf"{next(iter(option))} can't be used: tx holds no jaxaccum.MultiSteps"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, **option)


@pytest.mark.parametrize("tx", [MultiSteps(ADAM, 2), optax.chain(MultiSteps(ADAM, 2)), ADAM])
@pytest.mark.parametrize(
    ("name", "meant"), [("weights", "weight"), ("boundry", "boundary"), ("batch_stat", "batch_stats")]
)
def test_train_state_refuses_a_misspelt_argument(tx, name, meant):
    """Catches a weight, a boundary or new statistics that are taken for an extra arg that no optimizer reads."""

    class WithStatistics(jaxaccum.flax.TrainState):
        batch_stats: jax.Array

    state = create(tx, WithStatistics, batch_stats=jnp.zeros(()))
    with pytest.raises(TypeError, match=f"apply_gradients got an argument '{name}'.*Did you mean '{meant}'"):
        state.apply_gradients(grads={"w": GRADIENTS[0]}, **{name: 1.0})
    state.apply_gradients(grads={"w": GRADIENTS[0]}, params_shape=1.0, steps=2, param_labels=3)


class Tower(nn.Module):
    """A linen network with batch statistics and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(5)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def linen_tower():
    loss = lambda model, batch, train: (jnp.mean((model(batch["x"], train) - batch["y"]) ** 2), {"seen": train})
    return jaxaccum.flax.linen_task(Tower(), loss, optax.sgd(0.1), mutable="batch_stats", rngs="dropout")


def nnx_tower():
    loss = lambda model, batch: (squared_error(model, batch), {"seen": not model.dropout.deterministic})
    return jaxaccum.flax.nnx_task(NnxTower, loss, optax.sgd(0.1))


class NnxTower(nnx.Module):
    """The same in nnx."""

    def __init__(self, rngs):
        self.inner, self.outer = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(5, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(self.norm(self.inner(x))))


class NnxStack(nnx.Module):
    """The same layers three times, their parameters and random streams stacked, in a scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stacked(rngs):
            return NnxLayer(rngs)

        self.layers = stacked(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def walk(x, layer):
            return layer(x)

        return walk(x, self.layers)


class NnxLayer(nnx.Module):
    """Dropout of ones: what it returns says which mask it drew."""

    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.mask = nnx.Intermediate(jnp.zeros(8))

    def __call__(self, x):
        self.mask[...] = self.dropout(jnp.ones(8))
        return self.linear(x) * self.mask


def test_an_nnx_task_of_stacked_layers_draws_a_mask_for_each():
    """Catches random streams of a stack made as one key: an IndexError, or one mask for all layers."""
    task = jaxaccum.flax.nnx_task(NnxStack, lambda model, batch: jnp.mean(model(batch) ** 2), optax.sgd(0.1))
    params, state = task.init(jax.random.key(0), jnp.ones((2, 8)))
    masks = set()
    for key in jax.random.split(jax.random.key(1), 2):
        _, drawn = jax.jit(task.loss)(params, state, jnp.ones((2, 8)), key)
        masks |= {tuple(mask) for mask in np.asarray(drawn["layers"]["mask"][...])}
    assert len(masks) == 6
    _, drawn = task.loss(params, state, jnp.ones((2, 8)), None)
    np.testing.assert_array_equal(drawn["layers"]["mask"][...], np.ones((3, 8)))


class NnxPair(nnx.Module):
    """Two masks, each of a stream of its own."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(()))
        self.one, self.other = (nnx.Dropout(0.5, rngs=nnx.Rngs(rngs())) for _ in range(2))


def test_an_nnx_task_draws_apart_from_each_stream():
    """Catches a key that all streams begin with."""
    differ = lambda model, x: jnp.mean(jnp.abs(model.one(x) - model.other(x)) * model.scale[...])
    task = jaxaccum.flax.nnx_task(NnxPair, differ, optax.sgd(0.1))
    params, state = task.init(jax.random.key(0), None)
    assert task.loss(params, state, jnp.ones(64), jax.random.key(1))[0] > 0


class Noisy(nn.Module):
    """Adds the difference of two streams."""

    @nn.compact
    def __call__(self, x):
        one, other = (jax.random.uniform(self.make_rng(name), x.shape) for name in ("one", "other"))
        return x * self.param("scale", nn.initializers.ones, ()) + one - other


def test_a_linen_task_has_all_of_its_streams():
    """Catches streams that are missing or alike."""
    loss = lambda model, batch, train: jnp.mean(jnp.abs(model(batch) - batch))
    task = jaxaccum.flax.linen_task(Noisy(), loss, optax.sgd(0.1), rngs=("one", "other"))
    params, state = task.init(jax.random.key(0), jnp.ones(8))
    assert task.loss(params, state, jnp.ones(8), jax.random.key(1))[0] > 0


def test_keyword_arguments_of_an_nnx_micro_step():
    """Catches an argument that the loss doesn't get."""
    tx, model = MultiSteps(optax.sgd(0.0), 1), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    step = jaxaccum.flax.HostDriven(tx, lambda model, x, *, scale: scale * jnp.mean(model(x) ** 2))
    state = step.init(model)
    one, state = step(model, state, jnp.ones((4, 3)), scale=1.0)
    two, _ = step(model, state, jnp.ones((4, 3)), scale=2.0)
    assert two == 2 * one


def test_a_linen_tasks_names_come_from_any_iterable():
    """Catches an iterator that the first call uses up, so that statistics stand still."""
    loss = lambda model, batch, train: jnp.mean(model(batch, train) ** 2)
    task = jaxaccum.flax.linen_task(Tower(), loss, ADAM, mutable=iter(["batch_stats"]), rngs=iter(["dropout"]))
    params, state = task.init(jax.random.key(0), X)
    for i in range(2):
        _, new = task.loss(params, state, X, jax.random.key(i))
        assert jax.tree.all(jax.tree.map(lambda a, b: not np.allclose(a, b), new, state))


class WithAuxiliaryHead(nn.Module):
    """A layer, and in training another one beside it."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1, name="head")(x) + (nn.Dense(1, name="auxiliary")(x) if train else 0)


def test_a_linen_task_is_initialized_in_training_mode():
    """Catches parameters without those that training alone uses."""
    loss = lambda model, batch, train: jnp.mean(model(batch, train))
    task = jaxaccum.flax.linen_task(WithAuxiliaryHead(), loss, optax.sgd(0.1))
    params, _ = task.init(jax.random.key(0), jnp.ones((2, 3)))
    assert set(params) == {"head", "auxiliary"}


class Shifted(nn.Module):
    """A layer with a collection that no call changes."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, ())
        return x * scale + self.variable("constants", "shift", lambda: jnp.full((), 3.0)).value


def test_a_linen_task_keeps_collections_that_no_call_changes():
    """Catches a model state of the mutable collections alone."""
    loss = lambda model, batch, train: jnp.mean(model(batch))
    task = jaxaccum.flax.linen_task(Shifted(), loss, optax.sgd(0.1))
    params, state = task.init(jax.random.key(0), jnp.ones((2, 3)))
    for key in (jax.random.key(1), None):
        assert task.loss(params, state, jnp.ones((2, 3)), key) == (4.0, {"constants": {"shift": 3.0}})


@pytest.mark.parametrize("make", [linen_tower, nnx_tower], ids=["linen", "nnx"])
def test_a_task_of_a_flax_model_trains_as_by_hand(make):
    """Catches statistics that stand still, masks that are shared, and a mode that validation does not switch."""
    options = {"enable_progress_bar": False, "max_epochs": 1, "strategy": "single", "accumulate_grad_batches": K}
    task = make()
    trainer = jaxaccum.Trainer(**options)
    state = trainer.fit(task, MICRO_BATCHES, MICRO_BATCHES[:1])

    key = jax.random.key(0)
    params, statistics = task.init(jax.random.fold_in(key, np.uint32(2**32 - 1)), MICRO_BATCHES[0])
    start, gradients, at_first = params, [], statistics
    loss = jax.jit(task.loss)
    gradient_of = jax.jit(jax.value_and_grad(lambda *args: task.loss(*args)[:2], has_aux=True))
    for i, batch in enumerate(MICRO_BATCHES):
        (_, statistics), gradient = gradient_of(params, statistics, batch, jax.random.fold_in(key, i))
        gradients.append(gradient)
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, start, mean_of(gradients)))
    assert_close(state.model_state, statistics)
    moved = jax.tree.map(lambda new, old: not np.allclose(new, old), state.model_state, at_first)
    assert jax.tree.leaves(moved) and all(jax.tree.leaves(moved))
    masked = {float(loss(params, statistics, MICRO_BATCHES[0], key)[0]) for key in jax.random.split(key, 3)}
    assert len(masked) == 3
    assert float(trainer.callback_metrics["train_seen"]) == 1 and trainer.callback_metrics["val_seen"] == 0
    again = [loss(state.params, state.model_state, MICRO_BATCHES[0], None)[0] for _ in range(2)]
    assert again[0] == again[1] == pytest.approx(trainer.callback_metrics["val_loss"])
    two = jaxaccum.Trainer(**options | {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2})
    assert jax.tree.structure(two.fit(task, MICRO_BATCHES)) == jax.tree.structure(state)


def test_arguments_are_counted_as_the_caller_counts_them():
    """Catches an error that names a position of the function inside the adapter."""
    model, x, y = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), jnp.ones((8, 3)), jnp.ones(8)
    loss = lambda model, x, y: jnp.mean((model(x)[:, 0] - y) ** 2)
    with pytest.raises(TypeError) as caught:
        jaxaccum.flax.value_and_grad(loss, 4)(model, x, y)
    assert "args[2]: as long as the batch" in caught.value.__notes__[-1]
    assert "batch_argnums=(1, 2)" in caught.value.__notes__[-1]
    with pytest.raises(TypeError, match=r"batch_argnums=\(1, 2\).* only 2 were passed by position"):
        jaxaccum.flax.value_and_grad(loss, 4, batch_argnums=(1, 2))(model, x)


def test_a_linen_module_is_no_nnx_model():
    """Catches an IndexError from inside flax."""
    loss = lambda model, x: jnp.mean(model(x))
    step = jaxaccum.flax.HostDriven(jaxaccum.MultiSteps(optax.sgd(1.0), 2), loss)
    with pytest.raises(TypeError, match=r"takes an nnx model, got a linen module: use jaxaccum.HostDriven"):
        step.init(nn.Dense(1))
    train_state = jaxaccum.flax.TrainState.create(apply_fn=None, params={}, tx=optax.sgd(1.0))
    for model, kind in ((nn.Dense(1), "linen module"), (train_state, "TrainState")):
        with pytest.raises(
            TypeError, match=f"takes an nnx model, got a {kind}: use jaxaccum.flax.linen_value_and_grad"
        ):
            jaxaccum.flax.value_and_grad(loss, 2)(model, BATCH["x"])


LINEN, NNX = jaxaccum.flax.linen_task, jaxaccum.flax.nnx_task
LINEN_WINDOW = jaxaccum.flax.linen_value_and_grad
two, three = lambda model, batch: jnp.mean(model(batch)), lambda model, batch, train: jnp.mean(model(batch))


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (LINEN, (nn.Dense(1), two, ADAM), r"fun is called as fun\(model, batch, train\), got <lambda>\(model, batch\)"),
        (LINEN, (nn.Dense(1), lambda m, b, key: 0.0, ADAM), "names the bool train 'key': name random streams in rngs="),
        (LINEN, (three, nn.Dense(1), ADAM), "module must be a flax.linen.Module, got a function: are .* swapped"),
        (LINEN, (nn.Dense, three, ADAM), r"module must be .*: pass an instance, Dense\(...\)"),
        (LINEN, (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), three, ADAM), "module must be .* got a Linear: use .* nnx_task"),
        (LINEN_WINDOW, (two, nn.Dense(1), 2), "module must be a flax.linen.Module, got a function"),
        (LINEN_WINDOW, (nn.Dense(1), three, 2), r"fun is called as fun\(model, batch\), got"),
        (NNX, (lambda rngs: nnx.Linear(1, 1, rngs=rngs), three, ADAM), r"fun is called as fun\(model, batch\), got"),
        (NNX, (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), two, ADAM), "make must be a function of rngs .* got a Linear"),
        (NNX, (lambda: None, two, ADAM), r"make is called as make\(rngs\), got"),
    ],
)
def test_what_is_refused_at_construction(make, arguments, words):
    """Catches an error with the first batch, and a key that is a bool."""
    with pytest.raises(TypeError, match=words):
        make(*arguments)


def test_a_linen_task_needs_parameters():
    """Catches a KeyError."""
    with pytest.raises(ValueError, match="module=Dropout has no parameters"):
        LINEN(nn.Dropout(0.5, deterministic=True), three, ADAM).init(jax.random.key(0), X)


@pytest.mark.parametrize(("module", "note"), [(Linen(norm=True), "mutable="), (Linen(dropout=0.5), "rngs=")])
def test_notes_on_what_is_missing(module, note):
    """Catches flax's error alone, which does not know our arguments."""
    key, variables = jax.random.key(0), init(module)
    task = LINEN(module, lambda model, batch, train: squared_error(model, batch), ADAM)
    for call in (
        lambda: jaxaccum.flax.linen_value_and_grad(module, squared_error, K)(variables, BATCH),
        lambda: task.loss(*task.init(key, BATCH), BATCH, key),
    ):
        with pytest.raises(flax.errors.FlaxError) as caught:
            call()
        assert note in caught.value.__notes__[0]


def test_aux_must_be_there():
    """Catches an IndexError."""
    nnx_window = jaxaccum.flax.value_and_grad(squared_error, K, has_aux=True)
    linen_window = jaxaccum.flax.linen_value_and_grad(Linen(), squared_error, K, has_aux=True)
    for call in (lambda: nnx_window(Network(), BATCH), lambda: linen_window(init(Linen()), BATCH)):
        with pytest.raises(TypeError, match=r"fun must return \(loss, aux\), got a single array"):
            call()


def test_variables_are_a_dict():
    """Catches an error about iteration where a `TrainState` is passed."""
    train_state = jaxaccum.flax.TrainState.create(apply_fn=None, params={}, tx=ADAM)
    with pytest.raises(TypeError, match=r"variables must be a dict .*\{'params': ts.params\}.* got a TrainState"):
        jaxaccum.flax.linen_value_and_grad(nn.Dense(1), two, K)(train_state, X)


def test_linen_takes_one_batch():
    """Catches labels that are taken as the key, and an option that the adapter has no use for."""
    module, loss = nn.Dense(1), lambda model, batch: jnp.mean(model(batch) ** 2)
    variables = module.init(jax.random.key(0), jnp.ones((8, 3)))
    with pytest.raises(TypeError, match=r"takes no batch_argnums: .* one tree"):
        jaxaccum.flax.linen_value_and_grad(module, loss, 4, batch_argnums=(1, 2))
    with pytest.raises(TypeError, match=r"key must be a random key, got float32 of shape \(8,\).* one tree"):
        jaxaccum.flax.linen_value_and_grad(module, loss, 4)(variables, jnp.ones((8, 3)), jnp.ones(8))
