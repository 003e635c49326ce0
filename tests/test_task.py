"""Task: what it takes, what a loss may return, and the errors for what it may not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import ones, single, slope

import jaxaccum
from jaxaccum import Task, Weighted

INIT, OPTIMIZER = lambda key, batch: jnp.ones(()), optax.sgd(1.0)


@pytest.mark.parametrize(
    ("loss", "model_state", "want"),
    [
        (lambda w, b, key: w * jnp.mean(b), False, {}),
        (lambda w, b, key: Weighted(w * jnp.sum(b), b.size), False, {}),
        (lambda w, b, key: (w * jnp.mean(b), {"size": b.size}), False, {"train_size": 2.5}),
        (lambda w, b, key: (Weighted(w * jnp.sum(b), b.size), {"m": Weighted(b.size, 1)}), False, {"train_m": 2.0}),
        (lambda w, s, b, key: (w * jnp.mean(b), s + 1), True, {}),
        (lambda w, s, b, key: (Weighted(w * jnp.sum(b), b.size), s + 1, {"s": s}), True, {"train_s": 0.75}),
    ],
)
def test_a_loss_may_return_each_form(loss, model_state, want):
    """Catches a Weighted taken for a pair of loss and metrics, and a metric that counts once for each batch."""
    init = (lambda key, batch: (jnp.ones(()), jnp.zeros(()))) if model_state else INIT
    t = single(accumulate_grad_batches=2)
    state = t.fit(Task(init, loss, OPTIMIZER, model_state), ones(1, 3))
    assert float(state.params) == 0
    assert {name: float(x) for name, x in t.callback_metrics.items()} == {"train_loss": 1.0} | want
    assert state.model_state == (2 if model_state else ())


@pytest.mark.parametrize(
    ("loss", "model_state", "match"),
    [
        (lambda w, b, key: (w, {}, {}), False, "tuple of 3"),
        (lambda w, b, key: (w, jnp.ones(3)), False, "metrics must be a dict"),
        (lambda w, b, key: (w, {"loss": w}), False, "other than 'loss'"),
        (lambda w, b, key: (w, {"rows": b}), False, r"metric 'rows'.*\(2,\).*reduce it"),
        (lambda w, b, key: w * b, False, "one floating scalar"),
        (lambda w, s, b, key: w, True, "model_state=True the loss must return"),
        (lambda w, s, b, key: (w, jnp.zeros(3)), True, r"tree, shapes and dtypes.*float32\[\].*float32\[3\]"),
    ],
)
def test_any_other_form_is_refused_in_words(loss, model_state, match):
    """Catches an error from deep inside jax."""
    init = (lambda key, batch: (jnp.ones(()), jnp.zeros(()))) if model_state else INIT
    with pytest.raises((TypeError, ValueError), match=match):
        single().fit(Task(init, loss, OPTIMIZER, model_state), ones(2))


def test_what_is_no_task_is_refused_at_construction():
    """Catches an error that comes with the first batch only."""
    loss = slope().loss
    for arguments, match in [
        ((3, loss, OPTIMIZER), "init must be a function, got 3"),
        ((INIT, "mse", OPTIMIZER), "loss must be a function, got 'mse'"),
        ((INIT, loss, "adam"), "optimizer must be an optax"),
        ((INIT, loss, optax.adam), "optimizer must be .* function of total_steps .* lambda total_steps: "),
        ((INIT, loss, lambda steps: OPTIMIZER), "optimizer must be .* function of total_steps"),
        ((INIT, loss, OPTIMIZER, {}), "model_state must be True or False"),
        ((lambda key: 0, loss, OPTIMIZER), r"Task.init is called as init\(key, batch\), got <lambda>\(key\)"),
        ((INIT, lambda w, b: w, OPTIMIZER), r"Task.loss is called as loss\(params, batch, key\), got <lambda>\(w, b\)"),
        ((INIT, lambda w, s, b, key: w, OPTIMIZER), r"loss\(params, batch, key\), got"),
        ((INIT, loss, OPTIMIZER, True), r"loss\(params, model_state, batch, key\), got"),
        ((INIT, loss, OPTIMIZER, False, lambda w: w), r"Task.predict is called as predict\(params, batch\), got"),
    ]:
        with pytest.raises(TypeError, match=match):
            jaxaccum.Task(*arguments)
    with pytest.raises(TypeError, match=r"optimizer\(total_steps\) must return an optax.*got 0.5"):
        single().fit(Task(INIT, loss, lambda total_steps: 1 / 2), ones(2))
    with pytest.raises(TypeError, match="init must return"):
        single().fit(Task(INIT, lambda w, s, b, key: (w, s), OPTIMIZER, model_state=True), ones(2))


def test_signatures_that_are_not_refused():
    """Catches a function refused that can be called."""
    loss = slope().loss

    @functools.wraps(lambda w, batch: 0)
    def wrapper(*args):
        return loss(*args)

    for fun in (wrapper, functools.partial(lambda w, b, key, scale: w, scale=1), lambda w, b, key, more=1: w, max):
        jaxaccum.Task(INIT, fun, OPTIMIZER)
    jaxaccum.Task(INIT, jax.vmap(loss), OPTIMIZER)


@pytest.mark.parametrize(
    ("task", "note"),
    [
        (Task(INIT, lambda w, b, key: w * jax.random.uniform(key), OPTIMIZER), "key is None in validation"),
        (Task(lambda *_: ({}, {}), lambda w, b, key: w["a"], OPTIMIZER), r"init returned a tuple: .* model_state=True"),
    ],
)
def test_notes(task, note):
    """Catches an error from inside the loss that does not say what it was given."""
    with pytest.raises(TypeError) as caught:
        single(num_sanity_val_steps=0).fit(task, ones(2), ones(2))
    assert re.search(note, " ".join(caught.value.__notes__))


def test_a_plain_loss_needs_one_number_of_examples():
    """Catches a weight taken from whichever leaf comes first."""
    loss = lambda w, batch, key: w * jnp.mean(batch["x"])
    batch = {"x": np.ones(4, np.float32), "lengths": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"no one leading length.*lengths.*Weighted"):
        single().fit(Task(INIT, loss, OPTIMIZER), [batch])
    weighted = lambda w, batch, key: Weighted(w * jnp.sum(batch["x"]), 4)
    single().fit(Task(INIT, weighted, OPTIMIZER), [batch])


def test_each_loader_batch_has_a_key_of_its_own_and_validation_has_none():
    """Catches a key that two micro-batches or two epochs share."""
    drawn = []

    def loss(w, batch, key):
        drawn.append(key is None)
        return 0 * w, {"bits": 0 if key is None else jax.random.uniform(key)}

    seen = []

    class Reads(jaxaccum.callbacks.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            seen.append(outputs["bits"])

    single(max_epochs=2, accumulate_grad_batches=2, callbacks=Reads()).fit(
        Task(INIT, loss, OPTIMIZER), ones(2, 2, 2), ones(2)
    )
    assert len(set(seen)) == 6
    assert set(drawn) == {True, False}
