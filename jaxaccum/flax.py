"""Flax adapters: windows and tasks for nnx and linen models, and a `TrainState` with weights and boundaries.

Requires flax, which the core does not: `pip install "jaxaccum[flax]"`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

try:
    from flax import errors, linen, nnx
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
    from flax.training import train_state
except ImportError as error:
    raise ImportError('jaxaccum.flax needs flax: pip install "jaxaccum[flax]".') from error

from jaxaccum import _calls
from jaxaccum._gradient.returns import Returns
from jaxaccum._jax import prng
from jaxaccum._multi_steps import host_driven, misspelling
from jaxaccum._multi_steps.api import MultiSteps
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import numeric
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum._window import api
from jaxaccum.task import Task

_GRAPHDEF = "the graphdef"  # The keyword under which a loss gets the model's structure. It is no identifier.


def value_and_grad(
    fun: Callable[..., Any],
    num_micro_batches: Any,
    *,
    wrt: Any = nnx.Param,
    batch_argnums: int | tuple[int, ...] = 1,
    key_argnums: int | tuple[int, ...] = (),
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., tuple[Any, ...]]:
    """`nnx.value_and_grad` over K micro-batches.

    The model's other state (batch statistics, random streams) is carried from one micro-batch to the next and updated
    in the model. A micro-batch of weight 0 does not change it.

    Example:
      >>> import jax.numpy as jnp, jaxaccum.flax
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> f = jaxaccum.flax.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), 4)
      >>> loss, grads = f(model, jnp.ones((8, 3)))
      >>> grads["kernel"].shape
      (3, 1)

    Args:
      fun: `fun(model, *args, **kwargs)` returns the mean loss of a micro-batch, or a `jaxaccum.Weighted`.
      num_micro_batches: K, as for `jaxaccum.value_and_grad`; micro-batch i is rows i, i + K, ... of the batch.
      wrt: the filter of the variables to differentiate, as in nnx.
      batch_argnums: which arguments of `fun` to split; the model is argument 0.
      key_argnums: random keys; micro-batch i sees `jax.random.fold_in(key, i)`. A typed key that is neither here nor in
        the model or the batch raises.
      has_aux: `fun` returns (loss, aux); aux is returned as by `jaxaccum.value_and_grad`, whose docstring shows how to
        restore per-example entries to batch order.
      **options: the other options of `jaxaccum.value_and_grad`.

    Returns:
      A function of the same arguments that returns `(loss, grads)` or `((loss, aux), grads)`, and the norms with
      `gradient_norms`; `grads` is an `nnx.State`.
    """
    _calls.check_keywords("jaxaccum.flax.value_and_grad", options, api.value_and_grad)
    positions = lambda argnums: (argnums,) if isinstance(argnums, int) else tuple(argnums)
    known = {0, *positions(batch_argnums), *positions(key_argnums)}

    def value_and_grad(model, *args, **kwargs):
        _check_nnx(model, "jaxaccum.flax.value_and_grad", "jaxaccum.flax.linen_value_and_grad")
        if max(known) > len(args):
            raise TypeError(
                f"batch_argnums={batch_argnums} and key_argnums={key_argnums} count the arguments from 0, but only "
                f"{1 + len(args)} were passed by position; pass them so, or name others."
            )
        graphdef, params, state = nnx.split(model, wrt, ...)

        window = api.value_and_grad(
            functools.partial(_functional, fun, wrt, has_aux, graphdef),
            num_micro_batches,
            has_aux=has_aux,
            batch_argnums=batch_argnums,
            key_argnums=key_argnums,
            carry_argnums=1 + len(args),  # The model's other state.
            **options,
        )
        (loss, rest), *grads_and_norms = window(params, *args, state, **kwargs)
        state, aux = rest if has_aux else (rest, None)
        nnx.update(model, state)
        return ((loss, aux) if has_aux else loss), *grads_and_norms

    return value_and_grad


def _functional(
    fun: Callable[..., Any],
    wrt: Any,
    has_aux: bool,
    graphdef: Any,
    params: Tree,
    /,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """`fun` of an nnx model, as a loss with the model's other state as its last argument and carry."""
    *rest, state = args
    # Copied, because nnx can't mutate the carry's variables, which were created outside of this trace.
    model = nnx.merge(graphdef, params, state, copy=True)
    value, _, aux = Returns(has_aux, None).unpack(fun(model, *rest, **kwargs))
    _, _, state = nnx.split(model, wrt, ...)
    return (value, (state, aux)) if has_aux else (value, state)


def _check_nnx(model: Any, what: str, remedy: str) -> None:
    """Raises for a linen module, or a `TrainState` of one, in the place of an nnx model."""
    if isinstance(model, (linen.Module, train_state.TrainState)):
        kind = "linen module" if isinstance(model, linen.Module) else type(model).__name__
        raise TypeError(f"{what} takes an nnx model, got a {kind}: use {remedy}.")


class HostDriven:
    """`jaxaccum.HostDriven` for an nnx model: micro-steps one by one, in two compiled programs.

    The model is updated in place: its other state (batch statistics, random streams) after each micro-step, except one
    of weight 0, and the variables to train at each optimizer step. What `jaxaccum.HostDriven` says of donation,
    `every_k` and several states holds here too; at a boundary the model's old arrays are donated.

    Example:
      >>> import jax.numpy as jnp, jaxaccum.flax, optax
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> tx = jaxaccum.MultiSteps(optax.adam(1e-3), every_k_schedule=2)
      >>> step = jaxaccum.flax.HostDriven(tx, lambda model, x: jnp.mean(model(x) ** 2))
      >>> state = step.init(model)
      >>> for x in jnp.ones((4, 8, 3)):
      ...     loss, state = step(model, state, x)
      >>> int(state.gradient_step)
      2

    Args:
      tx: the `jaxaccum.MultiSteps`.
      fun: `fun(model, *args, **kwargs)` returns the micro-batch's mean loss, or a `jaxaccum.Weighted`.
      has_aux: `fun` returns (loss, aux).
      wrt: the filter of the variables to train, as in nnx.
    """

    @_calls.explains(**host_driven.REMEDIES)
    def __init__(self, tx: MultiSteps, fun: Callable[..., Any], has_aux: bool = False, *, wrt: Any = nnx.Param):
        def pure(params, state, /, *args, **kwargs):
            return _functional(fun, wrt, has_aux, kwargs.pop(_GRAPHDEF), params, *args, state, **kwargs)

        self._tx, self._wrt, self._has_aux = tx, wrt, has_aux
        self._step = host_driven.HostDriven(tx, pure, has_aux, carry_argnums=1)

    @property
    def every_k(self) -> int:
        """K, as in `jaxaccum.HostDriven`."""
        return self._step.every_k

    @every_k.setter
    def every_k(self, k: int) -> None:
        self._step.every_k = k

    @property
    def mini_step(self) -> int:
        """The number of micro-steps in the open window of the last returned state."""
        return self._step.mini_step

    def init(self, model: Any) -> MultiStepsState:
        """The state of `tx` for the variables to train, with an empty window."""
        remedy = "with a loss of the parameters, which calls module.apply, and batch statistics in carry_argnums"
        _check_nnx(model, "jaxaccum.flax.HostDriven", f"jaxaccum.HostDriven {remedy}")
        state: Any = self._tx.init(nnx.state(model, self._wrt))
        return state

    def __call__(self, model: Any, state: MultiStepsState, *args: Any, **kwargs: Any) -> tuple[Any, MultiStepsState]:
        """Runs one micro-step on the model, and updates it.

        Args:
          model: the model.
          state: the state, as for `jaxaccum.HostDriven`.
          *args: the other arguments of `fun`. With `mesh=` the first is the batch, split over the data axis.
          **kwargs: its keyword arguments.

        Returns:
          (the micro-batch's mean loss, or (loss, aux) with `has_aux`; state).
        """
        params, args, kwargs = self._arguments(model, args, kwargs)
        (loss, rest), params, state = self._step(params, state, *args, **kwargs)
        others, aux = rest if self._has_aux else (rest, None)
        nnx.update(model, params, others)
        return ((loss, aux) if self._has_aux else loss), state

    def lower(
        self, model: Any, state: MultiStepsState, *args: Any, **kwargs: Any
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Lowers the two programs, as `jaxaccum.HostDriven.lower` does."""
        params, args, kwargs = self._arguments(model, args, kwargs)
        return self._step.lower(params, state, *args, **kwargs)

    def flush(self, model: Any, state: MultiStepsState) -> MultiStepsState:
        """Closes a partial window with an optimizer step on the mean of its micro-batches, and updates the model."""
        params, state = self._step.flush(nnx.state(model, self._wrt), state)
        nnx.update(model, params)
        return state

    def _arguments(self, model, args, kwargs):
        """(the variables to train, the other arguments of the functional loss, those by keyword)."""
        graphdef, params, others = nnx.split(model, self._wrt, ...)
        return params, (others, *args), {**kwargs, _GRAPHDEF: graphdef}


def linen_value_and_grad(
    module: linen.Module,
    fun: Callable[..., Any],
    num_micro_batches: Any,
    *,
    mutable: str | Iterable[str] = (),
    rngs: str | Iterable[str] = (),
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., tuple[Any, ...]]:
    """The gradient of a linen model's loss over K micro-batches.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxaccum.flax
      >>> module, x = nn.BatchNorm(use_running_average=False), jnp.arange(8.0).reshape(8, 1)
      >>> variables = module.init(jax.random.key(0), x)
      >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
      >>> f = jaxaccum.flax.linen_value_and_grad(module, loss, 4, mutable="batch_stats")
      >>> (value, variables), grads = f(variables, x)
      >>> sorted(variables), grads["scale"].shape
      (['batch_stats', 'params'], (1,))

    Args:
      module: the model.
      fun: `fun(model, batch)` returns the mean loss of a micro-batch, or a `jaxaccum.Weighted`; `model` is the module
        bound to its variables.
      num_micro_batches: K, as for `jaxaccum.value_and_grad`; micro-batch i is rows i, i + K, ... of the batch.
      mutable: the collections that a call changes, such as "batch_stats". They are carried from one micro-batch to the
        next.
      rngs: the random streams that a call draws from, such as "dropout". Each micro-batch gets different keys.
      has_aux: `fun` returns (loss, aux); aux is returned as by `jaxaccum.value_and_grad`, whose docstring shows how to
        restore per-example entries to batch order.
      **options: the other options of `jaxaccum.value_and_grad`, except for the positions of arguments: there is one
        batch, a tree, and one key.

    Returns:
      A function `f(variables, batch, key=None)` that returns `((loss, variables), grads)`, or
      `((loss, (variables, aux)), grads)`: the variables with the mutated collections updated, and the gradient with
      respect to `variables["params"]`; with `gradient_norms`, also the norms. `key` is required if `rngs` names a
      stream. The returned variables include fp8 statistics (the collection `_overwrite_with_gradient`), each the
      maximum over the micro-batches.
    """
    if positions := {name for name in options if name.endswith("argnums")}:
        raise TypeError(
            f"linen_value_and_grad takes no {', '.join(sorted(positions))}: fun receives the model and one batch. Pass "
            "several arrays as one tree, such as {'x': x, 'y': y}."
        )
    _calls.check_keywords("linen_value_and_grad", options, api.value_and_grad)
    _check_linen(module)
    _calls.positional("fun", fun, "model", "batch")
    mutable, rngs = _names(mutable), _names(rngs)
    apply = linen.apply(fun, module, mutable=list(mutable))

    def pure(differentiated, state, batch, key, *, constants):
        with _hints():
            returned, state = apply({**differentiated, **state, **constants}, batch, rngs=_streams(key, rngs))
        value, _, aux = Returns(has_aux, None).unpack(returned)
        return (value, (state, aux)) if has_aux else (value, state)

    window = api.value_and_grad(
        pure, num_micro_batches, has_aux=has_aux, batch_argnums=2, key_argnums=3, carry_argnums=1, **options
    )

    def value_and_grad(variables, batch, key=None):
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"variables must be a dict of collections, such as {{'params': ts.params}} of a TrainState ts, got a "
                f"{type(variables).__name__}."
            )
        if rngs and key is None:
            raise TypeError(f"key is needed: rngs={rngs} draw from it.")
        if key is not None and not prng.is_key(key):
            raise TypeError(
                f"key must be a random key, got {numeric.kind(key)}. The loss takes one batch: pass several arrays as "
                "one tree, such as {'x': x, 'y': y}."
            )
        for name in ("params", *mutable):
            if name not in variables:
                raise ValueError(f"variables hold no collection {name!r}; they hold {sorted(variables)}.")
        state = {name: variables[name] for name in mutable}
        differentiated = {name: variables[name] for name in ("params", OVERWRITE_WITH_GRADIENT) if name in variables}
        constants = {name: value for name, value in variables.items() if name not in {**state, **differentiated}}
        (loss, rest), grads, *norms = window(differentiated, state, batch, key, constants=constants)
        state, aux = rest if has_aux else (rest, None)
        variables = {**variables, **state, **grads, "params": variables["params"]}
        return (loss, (variables, aux) if has_aux else variables), grads["params"], *norms

    return value_and_grad


def linen_task(
    module: linen.Module,
    fun: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    mutable: str | Iterable[str] = (),
    rngs: str | Iterable[str] = (),
) -> Task:
    """A `jaxaccum.Task` that trains a linen model.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, jaxaccum.flax, optax
      >>> loss = lambda model, batch, train: jnp.mean(model(batch["x"]) ** 2)
      >>> task = jaxaccum.flax.linen_task(nn.Dense(1), loss, optax.sgd(0.1))
      >>> params, model_state = task.init(jax.random.key(0), {"x": jnp.ones((2, 3))})
      >>> params["kernel"].shape, model_state
      ((3, 1), {})

    Args:
      module: the model.
      fun: `fun(model, batch, train)` returns a loss, a `jaxaccum.Weighted`, or a pair of either and a dict of metrics,
        as in a Task. `model` is the module bound to its variables, and `train` is False in validation. `fun` also runs
        once to initialize the variables.
      optimizer: as for `Task`.
      mutable: the collections that a call changes in training, such as "batch_stats".
      rngs: the random streams that a call draws from in training, such as "dropout".

    Returns:
      A Task whose parameters are `variables["params"]` and whose model state is all other collections. With fp8 layers
      the parameters are a dict of "params" and `_overwrite_with_gradient`, whose statistics are overwritten at each
      optimizer step.
    """
    _check_linen(module)
    if (third := _calls.positional("fun", fun, "model", "batch", "train")[2:3]) and third[0] in ("key", "rng", "rngs"):
        raise TypeError(
            f"fun is called as fun(model, batch, train), but names the bool train {third[0]!r}: name random "
            "streams in rngs=, and draw from them with model.make_rng(name)."
        )
    mutable, rngs = _names(mutable), _names(rngs)

    def init(key, batch):
        make = linen.init(lambda model, batch: fun(model, batch, True), module)
        with _hints():
            variables = dict(jax.jit(make)(_streams(key, ("params", *rngs)), batch))
        if "params" not in variables:
            raise ValueError(f"module={type(module).__name__} has no parameters to train.")
        params = variables.pop("params")
        if OVERWRITE_WITH_GRADIENT in variables:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: variables.pop(OVERWRITE_WITH_GRADIENT)}
        return params, variables

    def loss(params, model_state, batch, key):
        train = key is not None
        apply = linen.apply(fun, module, mutable=list(mutable) if train else False)
        variables = {**(params if _has_statistics(params) else {"params": params}), **model_state}
        if not train:
            return _with_state(apply(variables, batch, False), model_state)
        with _hints():
            returned, changed = apply(variables, batch, True, rngs=_streams(key, rngs))
        return _with_state(returned, {**model_state, **changed})

    return Task(init, loss, optimizer, model_state=True)


def nnx_task(
    make: Callable[[nnx.Rngs], Any],
    fun: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    wrt: Any = nnx.Param,
) -> Task:
    """A `jaxaccum.Task` that trains an nnx model.

    Example:
      >>> import jax.numpy as jnp, jaxaccum.flax, optax
      >>> from flax import nnx
      >>> loss = lambda model, batch: jnp.mean(model(batch["x"]) ** 2)
      >>> task = jaxaccum.flax.nnx_task(lambda rngs: nnx.Linear(3, 1, rngs=rngs), loss, optax.sgd(0.1))
      >>> params, model_state = task.init(jax.random.key(0), {"x": jnp.ones((2, 3))})
      >>> params["kernel"].shape
      (3, 1)

    Args:
      make: `make(rngs)` returns the model.
      fun: `fun(model, batch)` returns a loss, a `jaxaccum.Weighted`, or a pair of either and a dict of metrics, as in a
        Task. In training the model is in `train()` mode, with different random streams for each micro-batch. In
        validation it is in `eval()` mode.
      optimizer: as for `Task`.
      wrt: the filter of the variables to train.

    Returns:
      A Task whose parameters are the `nnx.State` of the variables to train. Its model state is that of all other
      variables except the random streams. `nnx.update(model, state.params, state.model_state)` writes both to a model.
    """
    if isinstance(make, nnx.Module) or not callable(make):
        raise TypeError(
            f"make must be a function of rngs that returns the model, got a {type(make).__name__}: for example "
            "lambda rngs: nnx.Linear(3, 1, rngs=rngs)."
        )
    _calls.positional("make", make, "rngs")
    _calls.positional("fun", fun, "model", "batch")
    # All models from `make` have the same structure, and so do their random streams.
    graphdef, _, random, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), wrt, nnx.RngState, ...)
    streams, structure = jax.tree.flatten(random)

    def init(key, batch):
        del batch
        _, params, _, others = nnx.split(make(nnx.Rngs(key)), wrt, nnx.RngState, ...)
        return params, others

    def loss(params, model_state, batch, key):
        train = key is not None
        key = key if train else jax.random.key(0)
        drawn = [_stream(stream, jax.random.fold_in(key, i)) for i, stream in enumerate(streams)]
        model = nnx.merge(graphdef, params, structure.unflatten(drawn), model_state, copy=True)
        (model.train if train else model.eval)()
        returned = fun(model, batch)
        return _with_state(returned, nnx.split(model, wrt, nnx.RngState, ...)[3])

    return Task(init, loss, optimizer, model_state=True)


def _check_linen(module: Any) -> None:
    """Raises for what is not an instance of a linen module."""
    if not isinstance(module, linen.Module):
        remedy = "are module and fun swapped?"
        if isinstance(module, type):
            remedy = f"pass an instance, {module.__name__}(...)"
        elif isinstance(module, nnx.Module):
            remedy = "use jaxaccum.flax.value_and_grad or nnx_task"
        raise TypeError(f"module must be a flax.linen.Module, got a {type(module).__name__}: {remedy}")


@contextlib.contextmanager
def _hints() -> Iterator[None]:
    """Adds a note about our arguments to flax's errors about collections and random streams."""
    try:
        yield
    except errors.ModifyScopeVariableError as error:
        error.add_note("To let a call change collections, pass their names as mutable=, such as 'batch_stats'.")
        raise
    except errors.InvalidRngError as error:
        error.add_note("To let a call draw from random streams, pass their names as rngs=, such as 'dropout'.")
        raise


def _names(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _streams(key: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """A key for each of a linen model's random streams."""
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(names)}


def _stream(stream: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """A leaf of a model's random streams: `key`, split for stacked layers, or a counter of 0."""
    if not prng.is_typed(stream):
        return jnp.zeros(stream.shape, stream.dtype)
    return jax.random.split(key, stream.shape) if stream.shape else key


def _has_statistics(params: Tree) -> bool:
    """Whether `params` contains the collection of fp8 statistics."""
    return isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params


def _with_state(returned: Any, model_state: Tree) -> tuple[Any, ...]:
    """Inserts the model state after the loss: (loss, model_state) or (loss, model_state, metrics)."""
    if isinstance(returned, tuple) and not isinstance(returned, Weighted):
        value, metrics = returned
        return value, model_state, metrics
    return returned, model_state


class TrainState(train_state.TrainState):
    """flax's `TrainState`, whose `apply_gradients` also takes `weight=`, `boundary=` and the optimizer's extra args.

    If `tx` is a `jaxaccum.MultiSteps`, micro-steps between boundaries do not read the parameters. `step` counts calls,
    as in flax, and so counts micro-steps; `opt_state.gradient_step` counts optimizer steps.

    With a `MultiSteps` as `tx`, fp8 statistics (`_overwrite_with_gradient`) are constant within a window, so that all
    micro-batches use the same ones. At the boundary each is replaced by its maximum over the micro-batches. The
    optimizer does not see them.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, jaxaccum.flax, optax
      >>> tx = jaxaccum.MultiSteps(optax.sgd(1.0), every_k_schedule=2)
      >>> state = jaxaccum.flax.TrainState.create(apply_fn=None, params={"w": jnp.zeros(())}, tx=tx)
      >>> for tokens, grad in ((30, 1.0), (10, 5.0)):
      ...     state = state.apply_gradients(grads={"w": jnp.array(grad)}, weight=tokens)
      >>> print(state.params["w"])
      -2.0
    """

    @classmethod
    def create(cls, *, apply_fn: Any, params: Any, tx: optax.GradientTransformation, **kwargs: Any) -> "TrainState":
        """Creates a state, with `opt_state` from `tx.init`."""
        if not (isinstance(tx, MultiSteps) and _has_statistics(params)):
            return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        # The window's sums include the statistics, which flax's `create` would not pass to `tx.init`.
        return cls(step=0, apply_fn=apply_fn, params=params, tx=tx, opt_state=tx.init(params), **kwargs)

    def apply_gradients(self, *, grads: Tree, weight: Any = None, boundary: Any = None, **kwargs: Any) -> "TrainState":
        """Runs one micro-step.

        Args:
          grads: the micro-batch's gradient, a tree like `params`.
          weight: the micro-batch's weight; None is 1.
          boundary: whether this is the last micro-batch of the window; None lets the state's counter decide.
          **kwargs: fields of this dataclass to replace; all others are extra args for the optimizer.

        Returns:
          The new state.

        Raises:
          ValueError: if `weight` or `boundary` is given and `tx` contains no `MultiSteps`; if there are fp8 statistics
            and `tx` contains a `MultiSteps` but is not one itself.
          TypeError: for an extra arg that looks like a misspelt `weight`, `boundary` or field of a subclass, unless an
            optimizer has a parameter of that name.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in self.__dataclass_fields__}
        own_fields = self.__dataclass_fields__.keys() - train_state.TrainState.__dataclass_fields__.keys()
        misspelling.check("apply_gradients", kwargs, ("weight", "boundary", *own_fields), self.tx.update)
        extra_args = {name: value for name, value in (("weight", weight), ("boundary", boundary)) if value is not None}
        nodes = jax.tree.leaves(self.opt_state, is_leaf=lambda node: isinstance(node, MultiStepsState))
        has_multi_steps = any(isinstance(node, MultiStepsState) for node in nodes)
        if extra_args and not has_multi_steps:
            raise ValueError(
                f"{' and '.join(extra_args)} can't be used: tx holds no jaxaccum.MultiSteps. Wrap the optimizer in one."
            )
        extra_args |= kwargs
        opt_state: Any = self.opt_state
        if isinstance(self.tx, MultiSteps):
            params, opt_state = self.tx.apply(self.params, opt_state, grads, **extra_args)
            return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)
        # fp8 statistics among the parameters are replaced by their "gradient", not updated.
        overwrites = _has_statistics(grads)
        if overwrites and has_multi_steps:
            raise ValueError(
                f"grads hold {OVERWRITE_WITH_GRADIENT!r}, statistics that are overwritten once a window, but tx is a "
                f"{type(self.tx).__name__} around a MultiSteps: make the MultiSteps the outermost transformation."
            )
        params, grads_of = (self.params["params"], grads["params"]) if overwrites else (self.params, grads)
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads_of, opt_state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        if overwrites:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)
