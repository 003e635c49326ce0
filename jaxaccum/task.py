"""`Task`: the initialization, loss and optimizer that a `Trainer` trains."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import optax

from jaxaccum import _calls
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


@dataclasses.dataclass(frozen=True)
class Task:
    """What a `Trainer` trains: pure functions and an optimizer, without a base class.

    Example:
      >>> import jax.numpy as jnp, optax, jaxaccum
      >>> task = jaxaccum.Task(
      ...     init=lambda key, batch: jnp.zeros(batch["x"].shape[1]),
      ...     loss=lambda params, batch, key: jnp.mean((batch["x"] @ params - batch["y"]) ** 2),
      ...     optimizer=optax.sgd(0.1),
      ... )
      >>> task.model_state
      False

      With a schedule over the whole run:

      >>> decayed = dataclasses.replace(
      ...     task, optimizer=lambda total_steps: optax.adam(optax.cosine_decay_schedule(1e-3, total_steps))
      ... )

    Attributes:
      init: `init(key, batch) -> params`; `batch` is the loader's first batch. The result is copied.
      loss: `loss(params, batch, key)` returns the micro-batch's mean loss, a floating scalar, or a `Weighted`; or a
        pair of either and a dict of metrics, each a scalar or a `Weighted`. The weight of a plain loss is its number of
        examples, the leading length of the batch's leaves. A plain metric has the loss's weight. `key` is different for
        each micro-batch in training, and None in validation, where the loss must not use dropout.
      optimizer: an optax transformation, applied once per window. The Trainer sets the number of micro-batches in a
        window. Or a function that returns one, whose parameter is named `total_steps`: the run's expected number of
        optimizer steps, as in `Trainer.estimate_optimizer_steps`.
      model_state: whether the model has state that the loss changes, such as batch statistics. Then
        `init(key, batch) -> (params, model_state)`, and `loss(params, model_state, batch, key)` returns
        `(loss, model_state)` or `(loss, model_state, metrics)`. Within a window the state is local to each device. At
        the boundary its floating leaves are averaged over the devices, and all other leaves must agree.
      predict: `predict(params, batch)`, or `predict(params, model_state, batch)` with model state, for
        `Trainer.predict`. It returns a pytree of arrays, such as the predictions for the batch's examples.

    Raises:
      TypeError: for an invalid argument, at construction.
    """

    init: Callable[..., Any]
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation]
    model_state: bool = False
    predict: Callable[..., Any] | None = None

    def __post_init__(self):
        for name in ("init", "loss"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, got {getattr(self, name)!r}.")
        if not (is_transformation(self.optimizer) or needs_total_steps(self)):
            raise TypeError(
                "optimizer must be an optax.GradientTransformation, for example optax.adam(1e-3), or a function of "
                "total_steps that returns one, whose parameter has this name, for example lambda total_steps: ..., got "
                f"{self.optimizer!r}."
            )
        if not (self.predict is None or callable(self.predict)):
            raise TypeError(
                f"predict must be a function, or None for a task without predictions, got {self.predict!r}."
            )
        if not isinstance(self.model_state, bool):
            raise TypeError(
                f"model_state must be True or False, got {self.model_state!r}; the state itself is what init returns."
            )
        state = ("model_state",) if self.model_state else ()
        _calls.positional("Task.init", self.init, "key", "batch")
        _calls.positional("Task.loss", self.loss, "params", *state, "batch", "key")
        if self.predict is not None:
            _calls.positional("Task.predict", self.predict, "params", *state, "batch")


def needs_total_steps(task: Task) -> bool:
    """Whether the task's optimizer is a function of `total_steps`."""
    if is_transformation(task.optimizer) or not callable(task.optimizer):
        return False
    return "total_steps" in inspect.signature(task.optimizer).parameters


def optimizer(task: Task, total_steps: int | None) -> optax.GradientTransformation:
    """Returns the task's optimizer; `total_steps` is None unless it needs them."""
    made: Any = task.optimizer
    if total_steps is not None:
        made = made(total_steps=total_steps)
    if not is_transformation(made):
        raise TypeError(f"optimizer(total_steps) must return an optax.GradientTransformation, got {made!r}.")
    return made


def is_transformation(value: Any) -> bool:
    """Whether `value` is an optax transformation."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def initial(task: Task, key: Any, batch: Tree) -> tuple[Tree, Tree]:
    """(params, model state) from `task.init`; the model state is () if the task has none."""
    made = task.init(key, batch)
    if not task.model_state:
        return made, ()
    if not isinstance(made, tuple) or len(made) != 2:
        raise TypeError(f"with model_state=True init must return (params, model_state), got {type(made)}.")
    return made


def evaluate(task: Task, params: Tree, model_state: Tree, batch: Tree, key: Any) -> tuple[Any, Tree, dict[str, Any]]:
    """Evaluates the loss on one micro-batch and normalizes its result to (loss, new model state, metrics)."""
    if task.model_state:
        with _hints(task, params, key):
            returned = task.loss(params, model_state, batch, key)
        if not isinstance(returned, tuple) or isinstance(returned, Weighted) or len(returned) not in (2, 3):
            raise TypeError(
                "with model_state=True the loss must return (loss, model_state) or (loss, model_state, metrics), "
                f"got {type(returned)}."
            )
        value, model_state, metrics = (*returned, {})[:3]
    else:
        with _hints(task, params, key):
            value, metrics = task.loss(params, batch, key), {}
        if isinstance(value, tuple) and not isinstance(value, Weighted):
            if len(value) != 2:
                raise TypeError(f"the loss must return a loss or (loss, metrics), got a tuple of {len(value)}.")
            value, metrics = value
    if not isinstance(metrics, dict) or "loss" in metrics:
        raise TypeError(
            f"metrics must be a dict from names other than 'loss' to scalars or Weighteds, got {metrics!r}; "
            "model state is returned with model_state=True."
        )
    return value, model_state, metrics


@contextlib.contextmanager
def _hints(task: Task, params: Tree, key: Any) -> Iterator[None]:
    """Adds notes to an error of the loss about what may have caused it."""
    try:
        yield
    except Exception as error:
        if key is None and "NoneType" in str(error):
            error.add_note("The key is None in validation: use dropout only if it is not None.")
        if not task.model_state and isinstance(params, tuple):
            error.add_note("Task.init returned a tuple: if it is (params, model_state), pass Task model_state=True.")
        raise


def predicted(task: Task, params: Tree, model_state: Tree, batch: Tree) -> Any:
    """Calls `task.predict`, which must be given."""
    assert task.predict is not None
    return task.predict(params, model_state, batch) if task.model_state else task.predict(params, batch)
