"""Bad input is refused before anything runs, by an error that names the argument, the value and the remedy."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxaccum.equinox
import jaxaccum.flax
from jaxaccum import (
    AccumulationSchedule,
    HostDriven,
    MultiSteps,
    Weighted,
    cast,
    coupled_value_and_grad,
    plan,
    set_every_k,
    value_and_grad,
)

SGD = optax.sgd(1.0)
PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(())}
GRADS = {"w": jnp.ones(2), "b": jnp.ones(())}
W, X = jnp.ones(3), jnp.ones((10, 3))
MESH = jax.make_mesh((8,), ("data",))


def must_not_run(*args, **kwargs):
    raise AssertionError("ran in spite of a bad argument")


TX = MultiSteps(optax.GradientTransformationExtraArgs(SGD.init, must_not_run), 1)


def numbered(cases):
    """Test ids that hold no addresses, which differ from process to process."""
    return [f"{i} {' '.join(options)}" for i, (options, *_) in enumerate(cases)]


def fails(error, *words):
    """A context in which `error` must be raised, with every one of `words` in its message or its notes."""

    def check(caught):
        text = "\n".join([str(caught), *getattr(caught, "__notes__", ())])
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in: {text}"
        return True

    return pytest.raises(error, check=check)


def step(**kwargs):
    """One `update` that closes a window, of an optimizer that must not run."""
    arguments = dict(grads=GRADS, state=TX.init(PARAMS), params=PARAMS) | kwargs
    return TX.update(**arguments)


BAD_K = [
    (0, ValueError, ["got 0", "from 1", "K=1 means no accumulation"]),
    (-1, ValueError, ["got -1", "from 1"]),
    (2**31, ValueError, [str(2**31), str(2**31 - 1)]),
    (2.5, TypeError, ["2.5", "float", "an integer of at least 1"]),
    (True, TypeError, ["True", "bool"]),
    (np.True_, TypeError, ["True", "bool"]),
    (jnp.array(True), TypeError, ["True", "bool"]),
    ("2", TypeError, ["'2'", "str"]),
    (None, TypeError, ["None"]),
    (jnp.float32(2), TypeError, ["2.", "float32"]),
    (np.float64(2), TypeError, ["2.0", "float64"]),
    (jnp.array([2]), TypeError, ["[2]"]),
    ({0: 2}, TypeError, ["{0: 2}", "dict"]),
]
SETTERS = {
    "every_k_schedule": lambda k: MultiSteps(SGD, k),
    "num_micro_batches": lambda k: value_and_grad(must_not_run, k),
    "k": lambda k: set_every_k(MultiSteps(SGD, 2).init(PARAMS), k),
}


@pytest.mark.parametrize("name", SETTERS)
@pytest.mark.parametrize(("k", "error", "words"), BAD_K, ids=[repr(k) for k, _, _ in BAD_K])
def test_k_must_be_an_integer_of_at_least_1(name, k, error, words):
    """Catches Lightning's own: 0 divides by zero inside fit, -1 silently ascends, 2.5 and True are accepted."""
    with fails(error, f"{name} must be an integer", *words):
        SETTERS[name](k)


@pytest.mark.parametrize("integer", [int, np.int64, np.int32, np.uint8, jnp.int32], ids=lambda kind: kind.__name__)
def test_k_may_be_an_integer_of_any_kind(integer):
    """Catches a check by isinstance(int), which refuses what a configuration or numpy gives."""
    assert int(MultiSteps(SGD, integer(3)).init(PARAMS).every_k) == 3
    assert int(set_every_k(TX.init(PARAMS), integer(3)).every_k) == 3
    loss = lambda w, x: jnp.mean(x @ w)
    assert float(value_and_grad(loss, integer(2))(W, X)[0]) == 3.0


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [
        (lambda step: step * 2.0, TypeError, ["one integer of at least 1", "float32"]),
        (lambda step: 2.0, TypeError, ["an integer of at least 1", "2.0"]),
        (lambda step: 0, ValueError, ["got 0"]),
        (lambda step: True, TypeError, ["True", "bool"]),
        (lambda step: None, TypeError, ["None"]),
        (lambda step: jnp.full(1, 2), TypeError, ["one integer", "int32 of shape (1,)"]),
        (optax.linear_schedule(2.0, 8.0, 10), TypeError, ["float32"]),
    ],
    ids=["float array", "float", "0", "bool", "None", "vector", "optax schedule"],
)
def test_a_schedule_function_must_give_integers(schedule, error, words):
    """Catches a K of 2.5 that the comparison with the counter rounds up, found at construction and not in the trace."""
    with fails(error, "the result of every_k_schedule", *words):
        MultiSteps(SGD, schedule)


def test_a_schedule_function_that_starts_below_1_is_refused_by_init():
    """Catches a traced K of 0, whose value cannot be read before there is a state."""
    with fails(ValueError, "the result of every_k_schedule", "got 0"):
        MultiSteps(SGD, lambda step: jnp.where(step < 5, 0, 2)).init(PARAMS)


def test_a_schedule_by_epoch_is_no_schedule_by_step():
    """Catches an AccumulationSchedule, callable as it is, called with the optimizer step for an epoch."""
    with fails(TypeError, "every_k_schedule=AccumulationSchedule({0: 2})", "by epoch", "set_every_k(state, schedule"):
        MultiSteps(SGD, AccumulationSchedule({0: 2}))


BAD_OPTIONS = [
    (dict(opt=None), TypeError, ["opt must be an optax.GradientTransformation", "got None", "optax.adam(1e-3)"]),
    (dict(opt=optax.adam), TypeError, ["opt must be", "function adam"]),
    (dict(opt=tuple(SGD)), TypeError, ["opt must be"]),
    (dict(nonfinite="skip"), ValueError, ["nonfinite must be 'propagate' or 'drop'", "'skip'"]),
    (dict(nonfinite=True), ValueError, ["nonfinite", "True"]),
    (dict(averaged_extra_args="value"), TypeError, ["averaged_extra_args must be a tuple of names", "'value'"]),
    (dict(averaged_extra_args=None), TypeError, ["averaged_extra_args", "None"]),
    (dict(averaged_extra_args=(1,)), TypeError, ["averaged_extra_args", "(1,)"]),
    (dict(averaged_extra_args={1: 0.0}), TypeError, ["averaged_extra_args", "{1: 0.0}"]),
    (dict(averaged_extra_args={"a": "float"}), TypeError, ["'a' must be arrays or numbers", "'float'"]),
    (dict(averaged_extra_args={"a": [jax.random.key(0)]}), TypeError, ["'a' must be arrays or numbers", "key"]),
    (dict(averaged_extra_args={"a": None}), TypeError, ["'a' must be arrays or numbers", "None"]),
    (dict(accumulator_dtype=jnp.int32), TypeError, ["accumulator_dtype must be a floating dtype or None", "int32"]),
    (dict(accumulator_dtype="int8"), TypeError, ["accumulator_dtype", "'int8'"]),
    (dict(accumulator_dtype="fp32"), TypeError, ["accumulator_dtype", "'fp32'"]),
    (dict(accumulator_dtype=jnp.complex64), TypeError, ["accumulator_dtype", "complex64"]),
    (dict(should_skip_update_fn=True), TypeError, ["should_skip_update_fn must be None or a function", "True"]),
    (dict(num_micro_batches=2), TypeError, ["'num_micro_batches': K is every_k_schedule"]),
    (dict(accumulate_dtype=None), TypeError, ["'accumulate_dtype': did you mean 'accumulator_dtype'?"]),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS, ids=numbered(BAD_OPTIONS))
def test_multi_steps_refuses_an_option_at_construction(options, error, words):
    """Catches an option that fails in the first step, or is never looked at and means something else."""
    with fails(error, *words):
        MultiSteps(**{"opt": SGD, "every_k_schedule": 2} | options)


def test_float64_sums_need_x64():
    """Catches sums that jax silently keeps in float32."""
    with fails(ValueError, "accumulator_dtype=float64", "jax_enable_x64"):
        MultiSteps(SGD, 2, accumulator_dtype=jnp.float64).init(PARAMS)
    with fails(ValueError, "accumulator_dtype=float64", "jax_enable_x64"):
        value_and_grad(must_not_run, 2, accumulator_dtype=jnp.float64)(W, X)


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        ({"w": GRADS["w"]}, ValueError, ["missing: ['b']", "tree of the parameters"]),
        (GRADS | {"c": jnp.ones(2)}, ValueError, ["not among the parameters: ['c']"]),
        ({"w": [GRADS["w"]], "b": GRADS["b"]}, ValueError, ["missing: ['w']", "not among the parameters: ['w'][0]"]),
        (None, ValueError, ["missing: "]),
        (GRADS | {"w": jnp.ones(3)}, ValueError, ["grads['w'] has shape (3,)", "shape (2,)"]),
        (GRADS | {"w": jnp.ones(())}, ValueError, ["grads['w'] has shape ()", "shape (2,)"]),
        (GRADS | {"w": jnp.ones(2, jnp.int32)}, TypeError, ["grads['w'] must be floating or complex", "int32"]),
        (GRADS | {"w": None}, TypeError, ["grads['w']", "None", "allow_int=True"]),
        (GRADS | {"w": np.zeros(2, jax.dtypes.float0)}, TypeError, ["grads['w']", "float0"]),
    ],
    ids=["missing", "extra", "nested", "None", "shape", "scalar", "integer", "None leaf", "float0"],
)
def test_gradients_must_match_the_parameters(grads, error, words):
    """Catches broadcasting into the sums, and tree errors that don't say where; a float gradient of rank 0 included."""
    with fails(error, *words):
        step(grads=grads)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (-1, ["finite and at least 0", "got -1", "tokens"]),
        (jnp.float32(-2), ["finite and at least 0", "-2.0"]),
        (float("nan"), ["finite", "nan"]),
        (np.float32("inf"), ["finite", "inf"]),
        (jnp.ones(4), ["one real number", "float32 of shape (4,)", "sum the weights"]),
        (np.ones(1), ["one real number", "shape (1,)"]),
        ([1, 2], ["one real number", "[1, 2]"]),
        ("3", ["one real number", "'3'"]),
        (1j, ["one real number", "1j"]),
        (jax.random.key(0), ["one real number", "key"]),
    ],
)
def test_a_weight_is_one_finite_number_of_at_least_0(weight, words):
    """Catches gradient ascent by a negative weight, and weights of examples that broadcast against the gradients."""
    with fails(ValueError, "weight must be", *words):
        step(weight=weight)
    with fails(ValueError, "weight must be", *words):
        value_and_grad(lambda w, x: Weighted(jnp.sum(x @ w), weight), 2)(W, X)


@pytest.mark.parametrize(
    "boundary",
    [1, 0, 1.0, "yes", "bool", np.int64(1), jnp.int32(1), np.array([True]), jnp.array([True, False]), [True], ()],
    ids=repr,
)
def test_a_boundary_is_one_bool(boundary):
    """Catches a batch index or a count given for a boundary: every truthy value would close the window."""
    with fails(TypeError, "boundary must be None", "one bool", repr(boundary), "boundary=(batch_index + 1) % k == 0"):
        step(boundary=boundary)
    with fails(TypeError, "boundary must be None"):
        TX.micro_step(lambda params: params["w"].sum(), PARAMS, TX.init(PARAMS), boundary=boundary)


NEAR_MISSES = {
    "weights": "weight",
    "Weight": "weight",
    "wieght": "weight",
    "weigth": "weight",
    "wight": "weight",
    "boundry": "boundary",
    "boundery": "boundary",
    "bounday": "boundary",
    "boundarys": "boundary",
    "is_boundary": "boundary",
    "boundary_": "boundary",
    "weigh": "weight",
}


@pytest.mark.parametrize(("name", "ours"), NEAR_MISSES.items())
def test_a_misspelt_argument_is_no_extra_arg(name, ours):
    """Catches a weight that reaches an optimizer which does not read it, and a micro-batch that counts for 1."""
    words = [f"got an argument {name!r}", f"Did you mean {ours!r}?"]
    with fails(TypeError, "update", *words):
        step(**{name: 7.0})
    with fails(TypeError, "apply", *words):
        TX.apply(PARAMS, TX.init(PARAMS), GRADS, **{name: 7.0})
    with fails(TypeError, "update", *words):
        chain = optax.chain(TX)
        chain.update(GRADS, chain.init(PARAMS), PARAMS, **{name: 7.0})
    for misplaced in (name, ours):
        with fails(TypeError, f"flush got an argument {misplaced!r}", "takes neither weight nor boundary"):
            TX.flush(TX.init(PARAMS), PARAMS, **{misplaced: 7.0})


# Those of optax, and of optimizers around it.
EXTRA_ARGS = [
    *("accumulation_steps", "added_score", "carry", "grad", "grad_fn", "hess_fn", "hess_fn_state", "obj_fn", "order"),
    *("phase", "step", "step_size", "steps", "sync_next", "value", "value_and_grad_fn", "value_fn"),
    *("loss", "loss_fn", "lr", "mask", "weight_decay", "weights_mask", "sample_weights", "bounds", "bound", "height"),
    *("boundaries_and_scales", "key", "rng", "batch"),
    # Words of their own, or numbered ones.
    *("sample_weight", "wt", "weighted", "weighting", "eight", "weight0", "weight_1", "boundaries", "at_boundary"),
    *("hessian", "params_weight"),
]


@pytest.mark.parametrize("name", EXTRA_ARGS)
def test_any_other_extra_arg_passes(name):
    """Catches an extra arg refused that optax lets pass, whether an optimizer reads it or not."""
    tx = MultiSteps(SGD, 1)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, **{name: 1.0})
    tx.apply(PARAMS, tx.init(PARAMS), GRADS, **{name: 1.0})
    tx.flush(tx.init(PARAMS), PARAMS, **{name: 1.0})


def reads(updates, state, params=None, *, weights, **_):
    return jax.tree.map(lambda u: jnp.full_like(u, weights), updates), state


def names_only(updates, state, params=None, *, weights):
    return reads(updates, state, params, weights=weights)


def takes_it_in_order(updates, state, params=None, weights=None):
    return reads(updates, state, params, weights=weights)


class Callable:
    """An optimizer's update as an object."""

    def __call__(self, updates, state, params=None, *, weights):
        return reads(updates, state, params, weights=weights)


class Holder:
    """An optimizer as an object that holds another one."""

    def __init__(self, inner):
        self.inner = inner

    def update(self, updates, state, params=None, **extra_args):
        return self.inner.update(updates, state, params, **extra_args)


def decorated(update):
    @functools.wraps(update)
    def wrapper(*args, **kwargs):
        return update(*args, **kwargs)

    return wrapper


def through(inner, updates, state, params=None, **extra_args):
    return inner.update(updates, state, params, **extra_args)


def through_keyword(updates, state, params=None, *, inner, **extra_args):
    return inner.update(updates, state, params, **extra_args)


def through_global(updates, state, params=None, **extra_args):
    return READER.update(updates, state, params, **extra_args)


def reading(update):
    return optax.GradientTransformationExtraArgs(SGD.init, update)


def scaled_reader(scale, decay=0.5):
    """Reads `weights`; its own hyperparameters are numbers or schedules."""
    return optax.chain(optax.scale(scale / scale), optax.scale(decay / decay), READER)


READER = reading(reads)
READERS = {
    "alone": READER,
    "a named keyword alone": reading(names_only),
    "a parameter with a default": reading(takes_it_in_order),
    "chain of a named keyword": optax.chain(reading(names_only)),
    "jit": reading(jax.jit(reads)),
    "jit in a chain": optax.chain(reading(jax.jit(names_only))),
    "callable object": reading(Callable()),
    "callable object in a chain": optax.chain(reading(Callable())),
    "decorated": reading(decorated(names_only)),
    "held by an object": reading(Holder(READER).update),
    "held by a callable object": reading(functools.partial(Holder(reading(names_only)).update)),
    "global": reading(through_global),
    "partial": reading(functools.partial(through, READER)),
    "partial by keyword": reading(functools.partial(through_keyword, inner=READER)),
    "partial of a keyword": reading(functools.partial(names_only, weights=2.0)),
    "inject_hyperparams": optax.inject_hyperparams(scaled_reader)(scale=1.0),
    "inject_hyperparams, schedule": optax.inject_hyperparams(scaled_reader)(optax.constant_schedule(1.0)),
    "inject_hyperparams in a chain": optax.chain(optax.inject_hyperparams(scaled_reader)(scale=1.0)),
    "conditionally_transform": optax.conditionally_transform(READER, lambda step: step >= 0),
    "chain": optax.chain(optax.scale(1.0), READER),
    "chain in a chain": optax.chain(optax.chain(READER)),
    "named_chain": optax.named_chain(("a", READER)),
    "masked": optax.masked(READER, True),
    "partition": optax.partition({"a": READER}, "a"),
}


@pytest.mark.parametrize("opt", READERS.values(), ids=READERS)
def test_an_extra_arg_that_the_inner_optimizer_names_passes(opt):
    """Catches a name refused that is no misspelling: the optimizer asks for it."""
    tx = MultiSteps(opt, 1, averaged_extra_args=())  # Some of them take no `value`.
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, weights=7.0)
    assert updates["b"] == 7.0
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, boundary=False, weights=7.0)
    assert tx.flush(state, PARAMS, weights=3.0)[0]["b"] == 3.0
    averaging = MultiSteps(SGD, 1, averaged_extra_args=("weights",))
    averaging.update(GRADS, averaging.init(PARAMS), PARAMS, weights=7.0)


def test_a_function_that_a_loss_or_schedule_names_is_no_optimizer():
    """Catches a name taken for an extra arg because some function that the optimizer holds has it."""
    masked = optax.masked(SGD, lambda weights: jax.tree.map(lambda _: True, weights))
    injected = optax.inject_hyperparams(lambda rate, weights=1.0: optax.sgd(rate * weights))(rate=1.0)
    for opt in (masked, injected):
        tx = MultiSteps(opt, 1)
        with fails(TypeError, "update got an argument 'weights'"):
            tx.update(GRADS, tx.init(PARAMS), PARAMS, weights=7.0)


def test_a_variable_that_is_named_like_optaxs_own():
    """Catches a closure that is taken for that of `optax.inject_hyperparams` by one of its names."""
    inner_factory = optax.sgd(1.0)
    update = lambda grads, state, params=None, **extra_args: inner_factory.update(grads, state, params)
    tx = MultiSteps(optax.GradientTransformationExtraArgs(inner_factory.init, update), 2)
    with fails(TypeError, "update got an argument 'weights'"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, weights=1.0)


def test_a_factory_that_cannot_be_asked_is_believed():
    """Catches an error of the check itself, where what `inject_hyperparams` builds can't be known from outside."""

    def picky(scale):
        if scale != 3.0:
            raise ValueError("scale")
        return READER

    tx = MultiSteps(optax.inject_hyperparams(picky)(scale=3.0), 1)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, weights=7.0)
    assert updates["b"] == 7.0


@pytest.mark.parametrize("value", [jnp.ones(3), np.ones(1), 1j, "x", [1.0]], ids=repr)
def test_an_averaged_extra_arg_is_one_number(value):
    """Catches losses of examples that are averaged by broadcasting, and an error that hides the way out."""
    with fails(ValueError, "'value'", "one real number", "averaged_extra_args={'value': ...}", "leave 'value' out"):
        step(value=value)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"a": jnp.ones(2)}, ValueError, ["{'a': (3,)}", "{'a': (2,)}"]),
        ({"b": jnp.ones(3)}, ValueError, ["{'a': (3,)}", "{'b': (3,)}"]),
        (jnp.ones(3), ValueError, ["{'a': (3,)}", "(3,)"]),
        (1.0, ValueError, ["{'a': (3,)}", "()"]),
        ({"a": "x"}, TypeError, ["arrays or numbers", "'x'"]),
    ],
    ids=["shape", "key", "array", "scalar", "string"],
)
def test_an_averaged_tree_is_like_what_was_given(value, error, words):
    """Catches a tree that broadcasts into the sums of another."""
    tx = MultiSteps(TX.inner_opt, 1, averaged_extra_args={"stats": {"a": jnp.ones(3)}})
    with fails(error, "'stats'", *words):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, stats=value)


@pytest.mark.parametrize(
    ("skip", "words"),
    [(1, ["got 1"]), (jnp.int32(1), ["int32"]), (jnp.array([True]), ["bool of shape (1,)"]), ("x", ["'x'"])],
)
def test_the_verdict_of_should_skip_update_fn_is_one_bool(skip, words):
    """Catches a norm returned where its comparison was meant: every norm but 0 would skip."""
    tx = MultiSteps(TX.inner_opt, 1, should_skip_update_fn=lambda *_: (skip, ()))
    with fails(ValueError, "should_skip_update_fn must return (skip, skip_state)", "one bool", *words):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


METHODS = {
    "update": lambda tx, state: tx.update(GRADS, state, PARAMS),
    "apply": lambda tx, state: tx.apply(PARAMS, state, GRADS),
    "micro_step": lambda tx, state: tx.micro_step(lambda params: params["w"].sum(), PARAMS, state),
    "flush": lambda tx, state: tx.flush(state, PARAMS),
    "has_updated": lambda tx, state: tx.has_updated(state),
}
OTHER_STATES = {
    "tuple": optax.chain(TX).init(PARAMS),
    "NoneType": None,
    "jaxaccum.flax.TrainState": jaxaccum.flax.TrainState.create(apply_fn=None, params=PARAMS, tx=TX),
    "optax.transforms._accumulation.MultiStepsState": optax.MultiSteps(SGD, 2).init(PARAMS),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", OTHER_STATES)
def test_a_state_must_be_its_own(method, kind):
    """Catches a chain's tuple, and optax's state of the same name, which fail deep inside or not at all."""
    with fails(
        TypeError,
        f"{method} takes the MultiStepsState",
        f"'{kind}'",
        "in a chain's state it is the entry",
        "in a TrainState its opt_state",
    ):
        METHODS[method](TX, OTHER_STATES[kind])


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (SGD.init(PARAMS), ["holds no MultiStepsState", "'tuple'", "MultiSteps.init"]),
        (None, ["holds no MultiStepsState", "'NoneType'"]),
        (TX, ["holds no MultiStepsState", "MultiSteps'"]),
        (optax.MultiSteps(SGD, 2).init(PARAMS), ["holds no MultiStepsState", "optax"]),
        (MultiSteps(SGD, lambda step: 2).init(PARAMS), ["k=3", "K is a function", "integer every_k_schedule"]),
        (optax.chain(TX, MultiSteps(SGD, lambda step: 2)).init(PARAMS), ["k=3", "K is a function"]),
    ],
    ids=["sgd", "None", "transformation", "optax", "function", "chain with a function"],
)
def test_set_every_k_says_where_there_is_nothing_to_set(state, words):
    """Catches a silent return: the run would go on with the old K."""
    with fails(ValueError, *words):
        set_every_k(state, 3)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (10, ["10 examples", "num_micro_batches=4", "nearest sizes that can: 8 and 12", "Weighted"]),
        (3, ["3 examples", "num_micro_batches=4", "nearest sizes that can: 4."]),
        (0, ["0 examples", "num_micro_batches=4"]),
    ],
)
def test_a_batch_must_divide_into_micro_batches(length, words):
    """Catches examples dropped in silence, and an error that leaves the arithmetic to the reader."""
    with fails(ValueError, *words):
        value_and_grad(must_not_run, 4)(W, jnp.ones((length, 3)))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": X, "y": X[:8]}, ["one leading length", "args[1]['x']: 10", "args[1]['y']: 8"]),
        ({"x": X, "n": 3.0}, ["args[1]['n'] is a scalar", "outside batch_argnums"]),
        ({}, ["batch_argnums=(1,)", "no array to split"]),
        (None, ["batch_argnums=(1,)", "no array to split"]),
    ],
    ids=["lengths", "scalar", "empty", "None"],
)
def test_a_batch_must_be_one_that_can_be_split(batch, words):
    """Catches labels that part from their inputs, and a scalar that is split or repeated."""
    with fails(ValueError, *words):
        value_and_grad(must_not_run, 2)(W, batch)


def test_a_stacked_batch_must_hold_k_micro_batches():
    """Catches a window of K that sees fewer, by a clamped index: the last would count twice."""
    with fails(ValueError, "num_micro_batches=4", "holds 2 micro-batches", "num_micro_batches=2"):
        value_and_grad(must_not_run, 4, stacked=True)(W, jnp.ones((2, 5, 3)))


@pytest.mark.parametrize(
    ("k", "stacked", "words"),
    [
        (2, False, ["traced", "not stacked", "stacked=True", "(K_max, N, ...)"]),
        (2.0, True, ["num_micro_batches must be one integer", "float32"]),
        (jnp.array([2]), True, ["num_micro_batches must be one integer", "shape (1,)"]),
    ],
    ids=["unstacked", "float", "vector"],
)
def test_a_traced_k_needs_a_stacked_batch(k, stacked, words):
    """Catches jax's own error about a concrete value, deep in a reshape."""
    with fails(TypeError, *words):
        jax.jit(lambda k: value_and_grad(must_not_run, k, stacked=stacked)(W, X))(k)


BAD_WINDOW_OPTIONS = [
    (dict(argnums=1), ValueError, ["batch_argnums=1 names argument 1", "argnums names already"]),
    (dict(key_argnums=1), ValueError, ["key_argnums=1 names argument 1", "batch_argnums names already"]),
    (dict(carry_argnums=0), ValueError, ["carry_argnums=0 names argument 0", "argnums names already"]),
    (dict(batch_argnums=(1, 1)), ValueError, ["batch_argnums=(1, 1) names argument 1"]),
    (dict(argnums=-1), ValueError, ["argnums must be positions", "at least 0", "-1"]),
    (dict(batch_argnums="x"), ValueError, ["batch_argnums must be positions", "'x'"]),
    (dict(batch_argnums=()), ValueError, ["batch_argnums", "each name an argument"]),
    (dict(prepare=1), TypeError, ["prepare must be None or a function", "got 1"]),
    (dict(prepare=abs, argnums=(0, 2)), ValueError, ["prepare", "argnums=(0, 2)", "one tree"]),
    (dict(accumulator_dtype=jnp.int32), TypeError, ["accumulator_dtype must be a floating dtype", "int32"]),
    (dict(grad_dtype="fp8"), TypeError, ["grad_dtype must be a floating dtype", "'fp8'"]),
    (dict(fun=3), TypeError, ["fun must be callable", "got 3"]),
    (dict(every_k_schedule=2), TypeError, ["'every_k_schedule': K is num_micro_batches"]),
    (dict(batch_argnum=2), TypeError, ["value_and_grad got an", "'batch_argnum': did you mean 'batch_argnums'?"]),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_WINDOW_OPTIONS, ids=numbered(BAD_WINDOW_OPTIONS))
def test_value_and_grad_refuses_an_option_at_construction(options, error, words):
    """Catches a batch that is differentiated, a key that is split, and errors that come from the trace."""
    with fails(error, *words):
        value_and_grad(**{"fun": must_not_run, "num_micro_batches": 2} | options)


@pytest.mark.parametrize(
    ("options", "args", "kwargs", "words"),
    [
        (
            dict(batch_argnums=3),
            (W, X),
            {},
            ["batch argument is number 3", "(batch_argnums)", "only 2 arguments", "by position"],
        ),
        (dict(key_argnums=2), (W, X), {}, ["number 2", "only 2 arguments", "by position"]),
        (dict(carry_argnums=5), (W, X), {}, ["carry argument is number 5", "by position"]),
        (dict(), (W,), {"x": X}, ["batch argument is number 1", "only 1 arguments", "by position"]),
    ],
    ids=["batch", "key", "carry", "keyword"],
)
def test_an_argument_with_a_role_must_be_passed_by_position(options, args, kwargs, words):
    """Catches a batch passed by keyword, which would go whole into every micro-batch."""
    with fails(TypeError, *words):
        value_and_grad(must_not_run, 2, **options)(*args, **kwargs)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda w: w, ["float32 of shape (3,)", "reduce"]),
        (lambda w: Weighted(w, 3.0), ["float32 of shape (3,)", "Weighted"]),
        (lambda w: (jnp.sum(w), {"accuracy": 1.0}), ["accuracy", "has_aux=True"]),
        (lambda w: (Weighted(jnp.sum(w), 3.0), {"accuracy": 1.0}), ["accuracy", "has_aux=True"]),
        (lambda w: 3, ["got 3"]),
        (lambda w: jnp.sum(w) * 1j, ["complex64"]),
        (lambda w: None, ["got None"]),
    ],
    ids=["vector", "weighted vector", "aux", "weighted aux", "integer", "complex", "None"],
)
def test_a_loss_is_one_floating_scalar(loss, words):
    """Catches a vector of losses, and aux without has_aux, which jax reports as an array conversion."""
    with fails(TypeError, "the loss must be one floating scalar", *words):
        value_and_grad(lambda w, x: loss(w), 2)(W, X)
    with fails(TypeError, "the loss must be one floating scalar", *words):
        tx = MultiSteps(SGD, 2)
        tx.micro_step(loss, W, tx.init(W))


DRIVERS = {
    "micro_step": lambda tx, loss: tx.micro_step,
    "HostDriven": lambda tx, loss: lambda loss, *args, **kwargs: HostDriven(tx, loss)(*args, **kwargs),
}
drivers = pytest.mark.parametrize(("name", "driver"), DRIVERS.items(), ids=DRIVERS)


@drivers
@pytest.mark.parametrize("options", [{}, {"mesh": MESH}], ids=["one device", "mesh"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: Weighted(x, 2.0)], ids=["plain", "Weighted"])
def test_a_loss_with_aux_in_a_micro_step(name, driver, options, wrap):
    """Catches aux without has_aux, which jax reports as an array conversion."""
    del name
    tx = MultiSteps(SGD, 2, **options)
    loss = lambda w, x: (wrap(jnp.sum(x @ w)), {"accuracy": 1.0})
    with fails(TypeError, "the loss must be one floating scalar", "accuracy", "has_aux=True"):
        driver(tx, loss)(loss, W, tx.init(W), jnp.ones((8, 3)))


BAD_ROLES = [
    (dict(carry_argnums=0), ValueError, ["carry_argnums=0 names argument 0", "argnums"]),
    (dict(carry_argnums=-1), ValueError, ["carry_argnums", "-1"]),
    (dict(carry_argnums=3), TypeError, ["the carry argument is number 3", "only 3 arguments"]),
    (dict(carry_argnums=2), TypeError, ["with has_aux=False and carry_argnums=2 fun must return (loss, new_carry)"]),
    (dict(has_aux=True), TypeError, ["and carry_argnums=None fun must return (loss, aux), got a single array"]),
]


@drivers
@pytest.mark.parametrize(("roles", "error", "words"), BAD_ROLES, ids=numbered(BAD_ROLES))
def test_bad_roles_in_a_micro_step(name, driver, roles, error, words):
    """Catches jax's error about a tuple, and a position that is another argument's."""
    del driver
    tx = MultiSteps(SGD, 2)
    loss = lambda w, x, s: jnp.sum(x @ w) + s
    with fails(error, *words):
        if name == "HostDriven":
            HostDriven(tx, loss, **roles)(W, tx.init(W), X, jnp.zeros(()))
        else:
            tx.micro_step(loss, W, tx.init(W), X, jnp.zeros(()), **roles)


def test_a_carry_of_another_shape():
    """Catches a selection that broadcasts."""
    tx = MultiSteps(SGD, 2)
    with fails(ValueError, "fun must return a new carry of the same tree, shapes and dtypes"):
        tx.micro_step(lambda w, x, s: (jnp.sum(x @ w), x[0]), W, tx.init(W), X, jnp.zeros(()), carry_argnums=2)


def test_a_mesh_needs_a_batch_by_position():
    """Catches a carry that is split over the devices in the place of the batch."""
    tx = MultiSteps(SGD, 2, mesh=MESH)
    loss = lambda w, s, x: (jnp.sum(x @ w), s)
    with fails(TypeError, "the batch argument is number 2"):
        tx.micro_step(loss, W, tx.init(W), jnp.zeros(8), x=jnp.ones((8, 3)), carry_argnums=1)


def traced_calls(step, tx):
    params, state, x = jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones((2, 3))
    step(params, state, x)  # What the host knows of a state must not hide that the call is traced.
    state = tx.init(jnp.ones(3))
    return {
        "all": lambda: jax.jit(step)(params, state, x),
        "params": lambda: jax.jit(lambda p: step(p, state, x))(params),
        "batch": lambda: jax.jit(lambda x: step(params, state, x))(x),
        "scan": lambda: jax.lax.scan(lambda c, x: (step(*c, x)[1:], 0), (params, state), x[None]),
        "flush": lambda: jax.jit(step.flush)(params, state),
        "flush params": lambda: jax.jit(lambda p: step.flush(p, state))(params),
    }


@pytest.mark.parametrize("call", ["all", "params", "batch", "scan", "flush", "flush params"])
def test_a_host_can_not_count_inside_jit(call):
    """Catches jax's error about int(), and a count of one call for all of a program's."""
    tx = MultiSteps(SGD, 2)
    step = HostDriven(tx, lambda w, x: jnp.mean(x @ w))
    with fails(TypeError, "HostDriven", "called with tracers", "jax.jit", "tx.micro_step"):
        traced_calls(step, tx)[call]()


ON_OTHER_DEVICES = {
    "update": lambda tx, state, x: tx.update(jnp.ones(x), state, jnp.ones(3)),
    "apply": lambda tx, state, x: tx.apply(jnp.ones(3), state, jnp.ones(x)),
    "micro_step": lambda tx, state, x: tx.micro_step(
        lambda w, x: jnp.mean(x @ w), jnp.ones(3), state, jnp.ones((8, 3))
    ),
    "flush": lambda tx, state, x: tx.flush(state, jnp.ones(3)),
    "HostDriven": lambda tx, state, x: HostDriven(tx, lambda w, x: jnp.mean(x @ w))(
        jnp.ones(3), state, jnp.ones((8, 3))
    ),
    "HostDriven.flush": lambda tx, state, x: HostDriven(tx, must_not_run).flush(jnp.ones(3), state),
}


@pytest.mark.parametrize("method", ON_OTHER_DEVICES)
def test_a_state_of_other_devices_is_named(method):
    """Catches blame on the gradients, and a flush that returns updates of a wrong shape without a word."""
    one, two = MultiSteps(SGD, 2), MultiSteps(SGD, 2, mesh=jax.make_mesh((2,), ("data",)))
    many, call = MultiSteps(SGD, 2, mesh=MESH), ON_OTHER_DEVICES[method]
    advice = [f"{method} got a state", "its own init", "redistribute"]
    with fails(ValueError, "made without mesh=, but", "with mesh= for 8 devices", *advice):
        call(many, one.init(jnp.ones(3)), (8, 3))
    with fails(ValueError, "made with mesh= for 8 devices, but", "without mesh=", *advice):
        call(one, many.init(jnp.ones(3)), 3)
    with fails(ValueError, "made with mesh= for 2 devices, but", "with mesh= for 8 devices", *advice):
        call(many, two.init(jnp.ones(3)), (8, 3))


@pytest.mark.parametrize("method", ON_OTHER_DEVICES)
def test_sums_in_host_memory_are_named(method):
    """Catches jax's error about memory spaces, which names an addition of ours."""
    tx = MultiSteps(SGD, 2)
    state = tx.init(jnp.ones(3))
    host = state.acc_grads.sharding.with_memory_kind("pinned_host")
    state = state._replace(acc_grads=jax.device_put(state.acc_grads, host), mini_step=state.mini_step + 1)
    with fails(ValueError, "state.acc_grads lies in host memory", "jax.device_put(state, jax.memory.Space.Device)"):
        ON_OTHER_DEVICES[method](tx, state, 3)
    ON_OTHER_DEVICES[method](MultiSteps(SGD, 2), jax.device_put(state, jax.memory.Space.Device), 3)


IN_A_MAP = {
    "update": lambda: MAPPED.update(W, MAPPED.init(W), W),
    "apply": lambda: MAPPED.apply(W, MAPPED.init(W), W),
    "micro_step": lambda: MAPPED.micro_step(must_not_run, W, MAPPED.init(W), X),
    "flush": lambda: MAPPED.flush(MAPPED.init(W), W),
    "value_and_grad": lambda: value_and_grad(must_not_run, 2, axis_name=("data", "more"))(W, X),
}
MAPPED = MultiSteps(SGD, 2, axis_name=("data", "more"))


@pytest.mark.parametrize("call", IN_A_MAP.values(), ids=IN_A_MAP)
def test_an_axis_name_needs_its_map(call):
    """Catches jax's advice to call axis_index elsewhere."""
    words = ["axis_name=('data', 'more')", "inside the function", "jax.pmap", "jax.shard_map"]
    with fails(NameError, *words):
        call()
    with fails(NameError, *words):
        jax.vmap(lambda _: call(), axis_name="data")(W)


@pytest.mark.parametrize("value", ["atuo", "Auto", "", "bfloat16"])
def test_a_misspelt_prepare(value):
    """Catches a string that is blamed for not being a function, without the one that it may be."""
    with fails(ValueError, 'prepare must be "auto", None or a function', repr(value)):
        value_and_grad(must_not_run, 2, prepare=value)
    with fails(ValueError, "prepare must be None or a function", repr(value), '"auto"', "value_and_grad alone"):
        MultiSteps(SGD, 2, prepare=value)


MICRO_BATCHES = {
    "a length that K doesn't divide": ([jnp.ones((6, 3))] * 4, "list"),
    "arrays": ([jnp.ones((8, 3))] * 4, "list"),
    "a tuple of trees": (({"x": jnp.ones((8, 3))},) * 4, "tuple"),
}


@pytest.mark.parametrize(("batch", "kind"), MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_a_list_of_micro_batches(batch, kind):
    """Catches an error about the examples, or from inside the loss, that doesn't say how to pass micro-batches."""
    loss = lambda w, x: jnp.mean((x["x"] if isinstance(x, dict) else x) @ w)
    words = [f"args[1] is a {kind} of num_micro_batches=4 alike trees", "stack them", "stacked=True"]
    with fails(Exception, *words):
        value_and_grad(loss, 4)(W, batch)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batch)
    assert float(value_and_grad(loss, 4, stacked=True)(W, stacked)[0]) == 3.0


def notes(call):
    """The notes of the error that `call` raises, but for jax's own."""
    with pytest.raises(Exception) as caught:
        call()
    return [note for note in getattr(caught.value, "__notes__", ()) if "JAX" not in note]


def test_a_second_batch_argument_that_is_not_split():
    """Catches a shape error in the loss that doesn't say whose shape is the whole batch's."""
    loss = lambda w, x, y, scale=1.0: jnp.mean((x @ w - y) ** 2) * scale
    with fails(TypeError, "args[2]: as long as the batch, but not split", "batch_argnums=(1, 2)"):
        value_and_grad(loss, 5)(W, X, jnp.ones(10))
    with fails(TypeError, "kwargs['y']: as long as the batch", "by position", "batch_argnums"):
        value_and_grad(loss, 5)(W, X, y=jnp.ones(10))
    assert value_and_grad(loss, 5, batch_argnums=(1, 2))(W, X, jnp.ones(10))[0] == 4.0


def test_no_hint_where_none_is_due():
    """Catches hints at arguments of other lengths, at trees of one that differ, and an error of the hint's own."""

    def loss(w, x, y, *_):
        raise KeyError("own")

    for args in [(X, jnp.ones(3)), (X, 2.0), ({"x": X, "n": X}, None), ([X, jnp.ones(10)], None)]:
        assert notes(lambda args=args: value_and_grad(loss, 2)(W, *args)) == []
    assert notes(lambda: value_and_grad(loss, 2)(W, X, "text", object())) == []
    assert notes(lambda: value_and_grad(loss, 2)(W, {"x": X, "name": "text"}, None)) == []


def test_an_nnx_rngs_is_no_key():
    """Catches nnx's own error about trace levels, without the remedy, and one mask on all micro-steps of a mesh."""
    noisy = lambda w, x, rngs: jnp.mean(x @ w) * jax.random.uniform(rngs.dropout(), ())
    keyed = lambda w, x, key: noisy(w, x, nnx.Rngs(key))
    for args, kwargs in [((nnx.Rngs(0),), {}), ((), {"rngs": nnx.Rngs(0)})]:
        with fails(ValueError, "random key that all micro-batches would share", "key_argnums"):
            value_and_grad(noisy, 2)(W, X, *args, **kwargs)
    value_and_grad(noisy, 2, key_argnums=2)(W, X, nnx.Rngs(0))
    words = ["an nnx.Rngs", "Pass a key in its place", "make nnx.Rngs(key) in the loss", "key_argnums"]
    for tx in (MultiSteps(SGD, 2), MultiSteps(SGD, 2, mesh=MESH)):
        for driver in DRIVERS.values():
            with fails(TypeError, *words):
                driver(tx, noisy)(noisy, W, tx.init(W), jnp.ones((8, 3)), nnx.Rngs(0))
            with fails(TypeError, *words):
                driver(tx, noisy)(noisy, W, tx.init(W), jnp.ones((8, 3)), rngs=nnx.Rngs(0))
            driver(tx, keyed)(keyed, W, tx.init(W), jnp.ones((8, 3)), nnx.Rngs(0)())


class Frozen:
    """No array."""


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu", Frozen()], ids=["function", "string", "object"])
def test_parameters_are_arrays(leaf):
    """Catches a module of equinox whole in place of its arrays, and jax's error that names no leaf."""
    params = {"w": W, "act": [leaf]}
    words = ["['act'][0]", repr(leaf), "not an array", "eqx.partition(model, eqx.is_inexact_array)", "eqx.combine"]
    tx = MultiSteps(SGD, 2)
    with fails(TypeError, *words):
        value_and_grad(must_not_run, 2)(params, X)
    with fails(TypeError, *words):
        tx.init(params)
    for driver in DRIVERS.values():
        with fails(TypeError, *words):
            driver(tx, must_not_run)(must_not_run, params, tx.init({"w": W, "act": [None]}), X)


def test_an_equinox_module_trains_by_the_remedy():
    """Catches a remedy that does not work."""
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    with fails(TypeError, ".activation", "eqx.partition"):
        value_and_grad(loss, 2)(model, X)
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    combined = lambda arrays, x: loss(eqx.combine(arrays, rest), x)
    _, grads = value_and_grad(combined, 2)(arrays, X)
    want = eqx.filter_grad(loss)(model, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, want)


@pytest.mark.parametrize(("shape", "options"), [((4,), {}), ((4, 2), {"stacked": True})])
def test_an_argument_that_would_broadcast_with_a_micro_batch(shape, options):
    """Catches labels that are not split, and so are compared, all of them, with each micro-batch."""
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    x, y = jnp.ones((*shape, 2)), jnp.arange(4.0 if shape == (4,) else 8.0).reshape(shape)
    with pytest.warns(UserWarning, match=r"args\[2\]: as long as the batch.* batch_argnums=\(1, 2\).* pass it by name"):
        jax.jit(value_and_grad(loss, 4, **options))(jnp.ones(2), x, y)
    whole = jax.value_and_grad(loss)(jnp.ones(2), x.reshape(-1, 2), y.reshape(-1))[0]
    assert float(value_and_grad(loss, 4, batch_argnums=(1, 2), **options)(jnp.ones(2), x, y)[0]) == float(whole)
    value_and_grad(loss, 4, **options)(jnp.ones(2), x, y=y)


def test_a_batch_by_name():
    """Catches an error that leaves a loss of keyword arguments without a way."""
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    batch = dict(x=X, y=jnp.ones(10))
    wrap = "value_and_grad(lambda params, batch: loss(params, **batch), k)(params, dict(x=..., y=...))"
    with fails(TypeError, "by position", wrap):
        value_and_grad(loss, 2)(W, **batch)
    wrapped = value_and_grad(lambda params, batch: loss(params, **batch), 2)
    assert float(wrapped(W, batch)[0]) == 4.0


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"w": W, "table": jnp.arange(3)}, ["int32 at ['table']", "another argument"]),
        (jnp.arange(3), ["int32 at its root"]),
        ({"frozen": [True]}, ["bool at ['frozen'][0]"]),
    ],
    ids=["leaf", "root", "bool"],
)
def test_parameters_to_differentiate_are_floating(params, words):
    """Catches jax's error about one dtype in a whole tree, without the path."""
    with fails(TypeError, "no gradient", *words):
        value_and_grad(must_not_run, 2)(params, X)


@pytest.mark.parametrize(
    ("carry", "words"),
    [
        (lambda c: jnp.zeros(3), ["(2,)", "(3,)"]),
        (lambda c: c.astype(jnp.bfloat16), ["float32", "bfloat16"]),
        (lambda c: {"c": c}, ["'c'"]),
        (lambda c: None, ["None"]),
    ],
    ids=["shape", "dtype", "tree", "None"],
)
def test_a_carry_keeps_its_structure_shapes_and_dtypes(carry, words):
    """Catches statistics that a bfloat16 model narrows, reported as a scan's own type mismatch."""
    f = value_and_grad(lambda w, x, c: (jnp.sum(x @ w), carry(c)), 2, carry_argnums=2)
    with fails(ValueError, "carry_argnums passed", "same tree, shapes and dtypes", *words):
        f(W, X, jnp.zeros(2))


@pytest.mark.parametrize("dtype", [int, jnp.int8, jnp.complex64, bool], ids=repr)
def test_cast_takes_a_floating_dtype(dtype):
    """Catches parameters truncated to integers, without a gradient."""
    with fails(TypeError, "dtype must be floating", "jnp.bfloat16"):
        cast(dtype)


def test_cast_chooses_only_where_it_sees_the_loss():
    """Catches a cast used alone that casts embeddings too, or nothing."""
    with fails(
        TypeError, "only value_and_grad shows it that by itself", "where=lambda path, leaf: leaf.ndim >= 2", "seeing"
    ):
        cast(jnp.bfloat16)({"w": jnp.ones((2, 2))})
    with fails(TypeError, "where must be None or a function of (path, leaf)", "got 3"):
        cast(jnp.bfloat16, where=3)
    alone = cast(jnp.bfloat16, where=lambda path, leaf: path == "w")({"w": jnp.ones(2), "b": jnp.ones(2)})
    assert (alone["w"].dtype, alone["b"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"has_aux": True}, "(loss, aux)"),
        ({"carry_argnums": 2}, "(loss, new_carry)"),
        ({"carry_argnums": 2, "has_aux": True}, "(loss, (new_carry, aux))"),
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", [lambda w, x, *_: jnp.sum(x @ w), lambda w, x, *_: Weighted(jnp.sum(x @ w), 1)])
def test_a_loss_must_return_what_its_options_say(options, form, loss):
    """Catches a `Weighted` loss taken for a loss and its aux, and an error from inside the loop."""
    with fails(TypeError, f"fun must return {form}"):
        value_and_grad(loss, 2, **options)(W, X, jnp.zeros(2))


def test_use_grad_mean_is_a_bool():
    """Catches "no" taken for True."""
    with fails(TypeError, "use_grad_mean must be True or False", "got 'no'"):
        MultiSteps(SGD, 2, use_grad_mean="no")


def test_a_gradient_dtype_must_be_switched_on():
    """Catches float64 gradients that come back as float32 with no more than a warning."""
    with fails(ValueError, "grad_dtype=float64 needs x64"):
        value_and_grad(lambda w, x: jnp.sum(x @ w), 2, grad_dtype=jnp.float64)(W, X)


@pytest.mark.parametrize("axis", [dict(batch_argnums=1), dict(key_argnums=2)], ids=repr)
@pytest.mark.parametrize("driver", [HostDriven, jaxaccum.flax.HostDriven])
def test_a_host_driven_step_splits_nothing(driver, axis):
    """Catches Python's own error, which doesn't say how to pass a batch or a key."""
    with fails(TypeError, "HostDriven got", *axis, "all arguments after state are the loss's"):
        driver(TX, must_not_run, **axis)


def test_adapters_name_themselves():
    """Catches an unknown option that is blamed on a function which the caller did not call."""
    adapters = {
        "filter_value_and_grad": jaxaccum.equinox.filter_value_and_grad,
        "jaxaccum.flax.value_and_grad": jaxaccum.flax.value_and_grad,
        "linen_value_and_grad": functools.partial(jaxaccum.flax.linen_value_and_grad, nn.Dense(1)),
    }
    for name, adapter in adapters.items():
        with fails(TypeError, f"{name} got", "'accumulate_dtype': did you mean 'accumulator_dtype'?"):
            adapter(lambda model, x: 0.0, 2, accumulate_dtype=jnp.float32)


def test_k_belongs_to_the_state():
    """Catches an assignment that changes nothing."""
    tx = MultiSteps(SGD, 2)
    with fails(AttributeError, "K belongs to the state", "jaxaccum.set_every_k(state, 4)", "of a HostDriven"):
        tx.every_k = 4


def test_an_argument_in_the_wrong_place_is_shown_by_its_shapes():
    """Catches an error that prints all numbers of the parameters."""
    with fails(TypeError, "tx must be a jaxaccum.MultiSteps, got {'b': 'float32 of shape ()', 'w': 'float32 of shape"):
        HostDriven(PARAMS, must_not_run)
    with pytest.raises(TypeError, match="k must be an integer") as caught:
        set_every_k(2, {"w": jnp.ones(1000)})
    assert len(str(caught.value)) < 150


class Net(nnx.Module):
    """An nnx model with variables that are no parameters."""

    def __init__(self):
        self.linear, self.norm = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


def squares(model, x):
    return jnp.mean(model(x) ** 2)


WITH_A_MODEL = {
    "init": lambda tx, model, state: tx.init({"model": model}),
    "value_and_grad": lambda tx, model, state: value_and_grad(squares, 2)(model, X),
    "jit": lambda tx, model, state: jax.jit(value_and_grad(squares, 2))(model, X),
    "coupled": lambda tx, model, state: coupled_value_and_grad(lambda m, x: m(x), lambda m, r: jnp.mean(r), 2)(
        model, X
    ),
    "micro_step": lambda tx, model, state: tx.micro_step(squares, model, state, X),
    "HostDriven": lambda tx, model, state: HostDriven(tx, squares)(model, state, X),
    "plan": lambda tx, model, state: plan(squares, model, X, SGD, 4, memory_limit=1e9),
}


@pytest.mark.parametrize("call", WITH_A_MODEL.values(), ids=WITH_A_MODEL)
def test_an_nnx_model_is_split_into_parameters_and_state(call):
    """Catches batch statistics that are trained as parameters, and never updated."""
    tx, model, plain = MultiSteps(SGD, 2), Net(), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    words = ["an nnx model (Net) with BatchStat variables", "jaxaccum.flax.HostDriven", "jaxaccum.flax.nnx_task"]
    with fails(TypeError, *words):
        call(tx, model, jaxaccum.flax.HostDriven(tx, squares).init(model))
    call(tx, plain, tx.init(plain))
    tx.init(nnx.state(model))


def test_the_state_of_an_nnx_optimizer_is_its_own():
    """Catches an error of a comparison inside flush."""
    tx, model = MultiSteps(SGD, 2), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with fails(
        TypeError, "flush got the opt_state of an nnx.Optimizer", "optimizer.update(model, grads, boundary=True)"
    ):
        tx.flush(optimizer.opt_state)


@drivers
def test_arguments_of_a_mesh(name, driver):
    """Catches an error that names K, which a micro-step does not split by, and labels that every device sees whole."""
    del name
    tx, loss = MultiSteps(SGD, 2, mesh=MESH), lambda w, x, y=0.0: jnp.mean((x @ w - y) ** 2)
    with fails(ValueError, "a batch of 7 examples can't be split over 8 devices: "):
        driver(tx, loss)(loss, W, tx.init(W), jnp.ones((7, 3)))
    with fails(TypeError, "args[2]: as long as the batch, but not split", "put both in one tree"):
        driver(tx, loss)(loss, W, tx.init(W), jnp.ones((16, 3)), jnp.ones(16))
