"""Ways to train a model for a window of micro-batches on one device: by jaxaccum, by others, by hand."""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _model import Model
from optax.contrib import MuonDimensionNumbers, muon

import jaxaccum

Tree = Any
Loss = Callable[[Tree, jax.Array], jax.Array]

CAST = jaxaccum.cast(jnp.bfloat16)
POOL = 3  # windows, used in turn


def kernels(params: Tree) -> Tree:
    """What Muon is for: the layers' matrices, stacked or not."""
    matrix = lambda path, _: MuonDimensionNumbers(-2, -1) if path[-1] == jax.tree_util.DictKey("kernel") else None
    return jax.tree.map_with_path(matrix, params)


OPTIMIZERS = {"adamw": optax.adamw(3e-4), "muon": muon(3e-4, muon_weight_dimension_numbers=kernels)}


class Tokens(NamedTuple):
    """A window's data on the device, int32: (K·N, T + 1), and the same as K micro-batches (N, T + 1)."""

    whole: jax.Array
    parts: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What every side works on."""

    model: Model
    opt: optax.GradientTransformation
    k: int
    start: Tree
    windows: list[Tokens]


def drawn(model: Model, k: int, n: int) -> np.ndarray:
    """Random windows, (POOL, K, N, T + 1) int32, with tokens as frequent as words are: 1 / rank, by Zipf's law."""
    frequency = 1 / np.arange(1, model.vocabulary + 1)
    size = POOL, k, n, model.length + 1
    chosen = np.random.default_rng(0).choice(model.vocabulary, size, p=frequency / frequency.sum())
    return chosen.astype(np.int32)


def windows(model: Model, k: int, n: int) -> list[Tokens]:
    """The same, on the device."""
    whole = lambda window: jnp.asarray(window.reshape(k * n, -1))
    return [Tokens(whole(window), list(map(jnp.asarray, window))) for window in drawn(model, k, n)]


def fresh(problem: Problem) -> tuple[Tree, Tree]:
    """Parameters and optimizer state at the start."""
    params = jax.tree.map(jnp.copy, problem.start)
    return params, jax.jit(problem.opt.init)(params)


class Own(NamedTuple):
    """The model of a way that keeps one of its own: functions that copy its parameters, and read the last loss."""

    params: Callable[[], Tree]
    loss: Callable[[], float]


@dataclasses.dataclass
class Way:
    """A way to train.

    Attributes:
      step: `step(params, inner, rest, tokens) -> (params, inner, rest, losses)` trains for a window and donates the
        first three; `inner` is the optimizer's state.
      rest: what the way keeps from window to window besides the model, such as sums and counters.
      own: for a way that keeps a model of its own and passes the given one through.
    """

    step: Callable[[Tree, Tree, Tree, Tokens], tuple[Tree, Tree, Tree, Tree]]
    rest: Tree = None
    own: Own | None = None


def update(opt: optax.GradientTransformation, grads: Tree, inner: Tree, params: Tree) -> tuple[Tree, Tree]:
    """(new parameters, new state)."""
    updates, inner = opt.update(grads, inner, params)
    return optax.apply_updates(params, updates), inner


def floor(problem: Problem) -> Way:
    """What a window is made of. A gradient goes where the one before it was."""
    gradient = lambda params, old, tokens: jax.value_and_grad(problem.model.loss)(params, tokens)
    gradient = jax.jit(gradient, donate_argnums=1, keep_unused=True)
    close = jax.jit(lambda params, inner, grads: update(problem.opt, grads, inner, params), donate_argnums=(0, 1))

    def step(params, inner, grads, tokens):
        losses = []
        for part in tokens.parts:
            loss, grads = gradient(params, grads, part)
            losses.append(loss)
        return *close(params, inner, grads), grads, losses

    return Way(step, jax.tree.map(jnp.zeros_like, problem.start))


def in_one_jit(gradient: Callable[[Problem], Callable[..., Any]], problem: Problem) -> Way:
    """A window's gradient, by a function of (params, (K·N, T + 1)), and the update."""
    of_window = gradient(problem)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def program(params, inner, tokens):
        loss, grads = of_window(params, tokens)
        return *update(problem.opt, grads, inner, params), loss

    def step(params, inner, rest, tokens):
        params, inner, loss = program(params, inner, tokens.whole)
        return params, inner, rest, loss

    return Way(step)


def with_noise_scale(problem: Problem) -> Way:
    """`value_and_grad` and the update, with norms for a `NoiseScale`, in one jit."""
    of_window, scale = ours(problem, gradient_norms="noise"), jaxaccum.NoiseScale()

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def program(params, inner, noise, tokens):
        loss, grads, norms = of_window(params, tokens)
        return *update(problem.opt, grads, inner, params), scale.update(noise, *norms.two_sizes), loss

    return Way(lambda params, inner, noise, tokens: program(params, inner, noise, tokens.whole), scale.init())


def ours(problem: Problem, **options: Any) -> Callable[..., Any]:
    """`value_and_grad` with its options."""
    return jaxaccum.value_and_grad(problem.model.loss, problem.k, **options)


def ours_weighted(problem: Problem, left_out: int | None = None, **options: Any) -> Callable[..., Any]:
    """The same with a token-weighted loss, for which micro-batch `left_out` holds nothing but padding."""
    window = jaxaccum.value_and_grad(problem.model.weighted, problem.k, **options)
    is_padding = lambda tokens: jnp.arange(len(tokens))[:, None] % problem.k == left_out
    padded = lambda tokens: tokens if left_out is None else jnp.where(is_padding(tokens), -1, tokens)
    return lambda params, tokens: window(params, padded(tokens))


def by_hand(problem: Problem, unroll: int = 1) -> Callable[..., Any]:
    """Sums in a scan."""

    def gradient(params, tokens):
        def micro_step(sums, tokens):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(problem.model.loss)(params, tokens)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        parts = tokens.reshape(problem.k, -1, tokens.shape[-1])
        sums, _ = jax.lax.scan(micro_step, zeros, parts, unroll=unroll)
        return jax.tree.map(lambda x: x / problem.k, sums)

    return gradient


def by_optax(problem: Problem) -> Callable[..., Any]:
    """`optax.microbatch`, which takes every K-th sequence to a micro-batch."""
    mean = optax.microbatching.AccumulationType.MEAN
    n = problem.windows[0].parts[0].shape[0]
    return optax.microbatching.microbatch(jax.value_and_grad(problem.model.loss), 1, n, mean)


def one_a_call(make: Callable[..., Any], drive: Callable[[Any, Loss], Callable[..., Any]], problem: Problem) -> Way:
    """A micro-batch a call of `drive(tx, loss)`, which is a `step(params, state, part) -> (loss, params, state)`."""
    tx = make(problem.opt, problem.k)
    call = drive(tx, problem.model.loss)

    def step(params, inner, state, tokens):
        state, losses = state._replace(inner_opt_state=inner), []
        for part in tokens.parts:
            loss, params, state = call(params, state, part)
            losses.append(loss)
        return params, state.inner_opt_state, state._replace(inner_opt_state=None), losses

    return Way(step, tx.init(problem.start)._replace(inner_opt_state=None))


def counter(tx: jaxaccum.MultiSteps, loss: Loss) -> Callable[..., Any]:
    """One program, which counts."""
    return jax.jit(functools.partial(tx.micro_step, loss), donate_argnums=(0, 1))


def optax_contract(tx: Any, loss: Loss) -> Callable[..., Any]:
    """One program in optax's contract."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def call(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        return value, *update(tx, grads, state, params)

    return call


def host_driven(problem: Problem, prepare: bool = False, weighted: bool = False, **options: Any) -> Way:
    """A host that counts, with two programs."""
    if prepare:
        # Kept in the state: where parameters pass from side to side, they are those that this side made last.
        options["prepare"] = CAST.seeing(problem.model.loss, problem.start, problem.windows[0].parts[0])
    make = functools.partial(jaxaccum.MultiSteps, **options)
    drive = lambda tx, loss: jaxaccum.HostDriven(tx, problem.model.weighted if weighted else loss)
    return one_a_call(make, drive, problem)


class Turns(jaxaccum.callbacks.Callback):
    """Holds a `Trainer`, which runs in a thread of its own, between windows until the next one is asked for."""

    def __init__(self):
        self._asked, self._answers = threading.Semaphore(0), queue.SimpleQueue()
        self._in_window = False

    def window(self) -> None:
        """Lets the Trainer dispatch a window."""
        self._asked.release()
        error = self._answers.get()
        if error is not None:
            raise error

    def fail(self, error: BaseException) -> None:
        """Ends the wait for a window."""
        self._answers.put(error)

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if not self._in_window:
            self._asked.acquire()
            self._in_window = True

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.window_step == 0:
            self._in_window = False
            self._answers.put(None)


def in_trainer(problem: Problem, weighted: bool = False, **options: Any) -> Way:
    """`Trainer.fit`, with keys, on host arrays: what a user's script does, without a progress bar."""
    loss = problem.model.weighted if weighted else problem.model.loss
    task = jaxaccum.Task(
        init=lambda key, batch: jax.tree.map(jnp.copy, problem.start),
        loss=lambda params, tokens, key: loss(params, tokens),
        optimizer=problem.opt,
    )
    parts = [np.asarray(part) for window in problem.windows for part in window.parts]
    turns = Turns()
    options = {"strategy": "single", "enable_progress_bar": False, "callbacks": turns, "max_epochs": -1} | options
    trainer = jaxaccum.Trainer(accumulate_grad_batches=problem.k, **options)

    def fit():
        try:
            trainer.fit(task, parts)
        except BaseException as error:
            turns.fail(error)

    thread = threading.Thread(target=fit, daemon=True)

    def step(params, inner, rest, tokens):
        del tokens  # The Trainer reads the same windows in the same order.
        if thread.ident is None:
            thread.start()
        turns.window()
        return params, inner, trainer.state, ()

    last_loss = lambda: trainer.callback_metrics["train_loss"]
    return Way(step, own=Own(lambda: trainer.copy_state().params, last_loss))
