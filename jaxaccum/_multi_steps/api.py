"""Driver 1: an optax transformation that is fed one micro-batch's gradient at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxaccum._devices import placement
from jaxaccum._devices.topology import MappedAxis
from jaxaccum._gradient import in_place_sums, once_per_window
from jaxaccum._integers import positive_int
from jaxaccum._jax import prng
from jaxaccum._multi_steps import checks, loss_step, misspelling, redistribution, stepping
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._multi_steps.stepping import Config, Shapes
from jaxaccum._sums import numeric
from jaxaccum._types import Tree


class MultiSteps(optax.GradientTransformationExtraArgs):
    """Sums the gradients of K micro-batches and hands their mean to an optimizer, once a window.

    It stands where `optax.MultiSteps` stands, as a gradient transformation itself: alone, in `optax.chain` and its
    kin, in flax's `TrainState` and `nnx.Optimizer`. In between boundaries the updates are zeros and the inner
    optimizer does not run. Put everything that should run once a window (clipping, decay, schedules) inside.

    Which call is the boundary is said in one of three ways:

    * not at all: the state's counter decides, in a conditional on the device;
    * `boundary=` a Python bool, static under jit: two programs, the fastest drive, for a host that counts. The one for
      False holds no optimizer, the one for True no conditional (with `weight` one, for a window that weighs nothing);
    * `boundary=` a traced bool: a conditional on the caller's own condition.

    Fields (it is a NamedTuple, and unpacks like every optax transformation):
      init: `init(params) -> MultiStepsState`.
      update: `update(grads, state, params=None, *, weight=None, boundary=None, **extra_args) -> (updates, state)`.
        `weight` is what this micro-batch counts for (a real scalar, by default 1); weight 0 leaves it out, whatever
        it holds, and a window of weight 0 leaves parameters and inner state untouched. Other extra args go to the inner
        optimizer, whether it reads them or not, as in optax; a misspelt `weight` or `boundary` is refused.

    Args:
      opt: the inner optimizer, which does not accumulate itself. It receives the mean in the accumulator's dtype, or in
        float32 where that is narrower and the sums are those of several devices, which are added in no less.
      every_k_schedule: K, an integer of at least 1, which `set_every_k` changes without a recompile; or a function
        of `gradient_step` (int32 scalar) that returns K.
      use_grad_mean: False hands the weighted sum to the inner optimizer in place of the mean.
      should_skip_update_fn: as in optax: `fn(grads, gradient_step, params) -> (skip, skip_state)`. A skipped
        micro-step never happened: it is not counted and closes no window, even where `boundary` says so.
      accumulator_dtype: a floating dtype for the sums, whatever the gradients'; float64 and complex parameters keep
        theirs. None: the parameters' dtypes. Sums in bfloat16, of half the size, are rounded stochastically, by the
        state's counters: they are noisier than float32's, but nothing that is small beside them is lost.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the name of the mapped data axis, or a tuple of names. Each
        device sums on its own, and the sums are joined once a window, at the boundary: Σ over devices and micro-steps
        of w·g over Σ w. Boundaries must fall on the same call on every device. With `use_grad_mean=False`, the mean
        over devices of their sums.
      mesh: under jit, a `jax.sharding.Mesh`. Then gradients come from `local_value_and_grad`, with a leading axis for
        the P devices of the data axis; a weight or an averaged extra arg is a scalar for all or (P,), and local sums
        are (P, ...), sharded over it. They are joined at the boundary alone. The mesh's other axes are left to jax.
      data_axis: the mesh's data axis, a name or a tuple of names.
      reduce: "mean" joins the sums on every device. "scatter" (ZeRO), with `mesh`, reduce-scatters them: the inner
        optimizer's state lives split over the data axis, as `zero_sharding` says, and so does its work; updates and
        parameters are gathered once a window.
      nonfinite: "propagate", or "drop": a micro-batch with a NaN or an infinity in its gradient or averaged extra
        args gets weight 0 and is counted in `state.dropped`.
      averaged_extra_args: names of scalar extra args that reach the inner optimizer as the window's weighted mean,
        if it takes them. For arrays and trees a dict of the names, each with a tree of the same shapes and dtypes:
        `{"value": 0.0, "hessian": params}`; `jax.ShapeDtypeStruct` will do. An extra arg `grad` reaches the inner
        optimizer as the window's mean gradient. All other extra args are those of the boundary's call.
      prepare: for `micro_step`, a function of the parameters: the loss sees what it returns, which is kept in the state
        and made anew at each optimizer step; its transpose runs there too, on the sum. See `cast`, which here needs
        `where=`, or to be shown the loss by `seeing`.
      in_place: for `micro_step`, as for `value_and_grad`, but that gradients are formed in float32 in `HostDriven`
        alone. With `should_skip_update_fn` or `nonfinite="drop"` nothing is added in place: what is added can't be
        taken out again.

    Raises:
      TypeError, ValueError: for an argument that is none of these, at construction; from `init`, where the inner
        optimizer holds another `MultiSteps`, ours or optax's.

    Example:
      >>> import jax.numpy as jnp, optax, jaxaccum
      >>> tx = jaxaccum.MultiSteps(optax.sgd(1.0), every_k_schedule=2)
      >>> params = {"w": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for grad in ([1.0, 2.0], [3.0, 6.0]):
      ...     updates, state = tx.update({"w": jnp.array(grad)}, state, params)
      ...     print(updates["w"], tx.has_updated(state))
      [0. 0.] False
      [-2. -4.] True
    """

    _config: Config

    def __new__(
        cls,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[Any], Any],
        use_grad_mean: bool = True,
        should_skip_update_fn: Callable[..., Any] | None = None,
        accumulator_dtype: Any = jnp.float32,
        *,
        axis_name: Any = None,
        mesh: Any = None,
        data_axis: Any = "data",
        reduce: str = "mean",
        nonfinite: str = "propagate",
        averaged_extra_args: Sequence[str] | Mapping[str, Tree] = ("value",),
        prepare: Callable[[Tree], Tree] | None = None,
        in_place: bool | None = None,
    ):
        if not (callable(getattr(opt, "init", None)) and callable(getattr(opt, "update", None))):
            raise TypeError(f"opt must be an optax.GradientTransformation, for example optax.adam(1e-3), got {opt!r}.")
        if isinstance(opt, MultiSteps) or _is_optax_multi_steps(opt):
            raise checks.accumulates()
        if not isinstance(use_grad_mean, bool):
            raise TypeError(f"use_grad_mean must be True or False, got {use_grad_mean!r}.")
        if nonfinite not in ("propagate", "drop"):
            raise ValueError(f"nonfinite must be 'propagate' or 'drop', got {nonfinite!r}.")
        is_collection = isinstance(averaged_extra_args, (tuple, list, Mapping))
        if not is_collection or not all(isinstance(name, str) for name in averaged_extra_args):
            raise TypeError(
                "averaged_extra_args must be a tuple of names, or a dict of names and what they are like, got "
                f"{averaged_extra_args!r}."
            )
        names = [name for name in averaged_extra_args if name != "grad"]  # That is the mean of the gradients anyway.
        trees = averaged_extra_args if isinstance(averaged_extra_args, Mapping) else {}
        shapes = {name: Shapes.of(numeric.numbers(name, trees[name])) for name in names if name in trees}
        is_scalar = lambda shapes: shapes == Shapes.of(jax.ShapeDtypeStruct((), shapes.leaves[0].dtype))
        if should_skip_update_fn is not None and not callable(should_skip_update_fn):
            raise TypeError(f"should_skip_update_fn must be None or a function, got {should_skip_update_fn!r}.")
        numeric.floating("accumulator_dtype", accumulator_dtype)
        once_per_window.checked(prepare)
        in_place_sums.checked(in_place)
        sync = placement.sync(axis_name, mesh, data_axis, should_skip_update_fn, reduce=reduce)
        if should_skip_update_fn is not None or nonfinite == "drop":
            if in_place:
                raise ValueError(
                    "in_place=True can't be had with should_skip_update_fn or nonfinite='drop': leave it at None."
                )
            in_place = False
        config = Config(
            opt=opt,
            every_k=checks.every_k_schedule(every_k_schedule),
            use_grad_mean=use_grad_mean,
            should_skip_update_fn=should_skip_update_fn,
            accumulator_dtype=None if accumulator_dtype is None else jnp.dtype(accumulator_dtype),
            nonfinite=nonfinite,
            averaged_extra_args=tuple(names),
            sync=sync,
            prepare=prepare,
            in_place=in_place,
            averaged_shapes=tuple((name, tree) for name, tree in shapes.items() if not is_scalar(tree)),
        )
        self = super().__new__(cls, *_transformation(config))
        self._config = config
        return self

    def apply(
        self,
        params: Tree,
        state: MultiStepsState,
        grads: Tree,
        *,
        weight: Any = None,
        boundary: Any = None,
        **extra_args: Any,
    ) -> tuple[Tree, MultiStepsState]:
        """`update` and `optax.apply_updates` in one: between boundaries the parameters are not even read.

        Under jit donate `params` and `state`, in this order and never the gradients; then nothing is copied.

        Args:
          params: the parameters.
          state: the state.
          grads: one micro-batch's gradient, a tree like the parameters.
          weight: what the micro-batch counts for; None is 1.
          boundary: whether it is the window's last; None lets the state's counter decide.
          **extra_args: as for `update`.

        Returns:
          (params, state).
        """
        _check_extra_args(self._config, "apply", extra_args)
        return stepping.run(
            _unprepared(self._config, "apply"),
            grads,
            checks.state(state, "apply", self._config.sync),
            params,
            weight,
            boundary,
            extra_args,
            stepping.apply_output(params),
        )

    def micro_step(
        self, fun: Callable[..., Any], params: Tree, state: MultiStepsState, *args: Any, boundary: Any = None
    ) -> tuple[jax.Array, Tree, MultiStepsState]:
        """One micro-batch from its loss to the parameters: backward, add, and at a boundary the optimizer step.

        Args:
          fun: `fun(params, *args)` returns the micro-batch's mean loss, a floating scalar, or a `Weighted`, whose
            weight may not depend on the parameters (`value_and_grad` takes one that does).
          params: the parameters.
          state: the state.
          *args: the micro-batch and whatever else `fun` takes. With `mesh=` the first is a batch of P·N examples, split
            over the data axis, and all others are common to its devices, but for typed random keys: device p sees
            `jax.random.fold_in(key, p)`. On one device and with `axis_name=` a key is used as it is: pass each
            micro-step one of its own, inside a mapped function each device too.
          boundary: as for `update`.

        Returns:
          (the micro-batch's mean loss, params, state). With `mesh=` the loss is (P,), one for each device. It is also
          the `value` of the inner optimizer's extra args, averaged over the window.

        Example:
          >>> import jax.numpy as jnp, optax, jaxaccum
          >>> tx = jaxaccum.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
          >>> params, state = jnp.array(1.0), tx.init(jnp.array(1.0))
          >>> for x in (1.0, 3.0):
          ...     loss, params, state = tx.micro_step(lambda w, x: (w * x) ** 2, params, state, x)
          ...     print(loss, params)
          1.0 1.0
          9.0 0.0
        """
        state = checks.state(state, "micro_step", self._config.sync)
        numeric.arrays(params)
        prng.refuse_rngs(args)
        return loss_step.micro_step(
            self._config, loss_step.without_aux(fun, "micro_step"), params, state, args, boundary
        )

    def flush(
        self, state: MultiStepsState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, MultiStepsState]:
        """Closes a partial window: an optimizer step on the mean of what it really holds.

        Where nothing is pending, or nothing but weight 0, the updates are zeros and the optimizer does not run.

        Args:
          state: the state.
          params: the parameters, where the inner optimizer needs them.
          **extra_args: the inner optimizer's extra arguments, other than the averaged ones: those are the window's.

        Returns:
          (updates, state).

        Raises:
          TypeError: if `state` is not this transformation's own.

        Example:
          >>> import jax.numpy as jnp, optax, jaxaccum
          >>> tx = jaxaccum.MultiSteps(optax.sgd(1.0), every_k_schedule=8)
          >>> updates, state = tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))
          >>> updates, state = tx.flush(state)
          >>> print(updates)
          -2.0
        """
        _check_extra_args(self._config, "flush", extra_args)
        return stepping.flush(self._config, checks.state(state, "flush", self._config.sync), params, extra_args)

    def redistribute(
        self, state: MultiStepsState, devices: int | None = None, batch: str | None = None
    ) -> MultiStepsState:
        """`state` with its pending local sums merged or split for another number of devices. For the host.

        For a state in mid-window that comes from a checkpoint, or from another mesh. Each sum goes to one device whole:
        nothing is divided, and the mean of what is pending is what it was. What that weighs beside the micro-steps to
        come depends on what the weights count, which `batch` says. With `use_grad_mean=False` each micro-step enters
        the result with the mean over the devices that it ran on, whatever `batch` is.

        Args:
          state: from a `MultiSteps` of the same options and any number of devices: with `mesh`, with `axis_name` as
            `jax.pmap` returns it (every leaf with a leading device axis), or on one device.
          devices: with `axis_name`, the number of devices; else they are known.
          batch: needed where a window is open and the number of devices changes.

            * "per_device": each device's batch stays as large as it was. A micro-step on 8 devices weighs 8, one on a
              single device weighs 1: as many as their examples.
            * "global": the batch of all devices stays as large as it was, and the loss is a plain mean, which weighs 1
              on each device. All sums are scaled by the ratio of the numbers of devices, and a micro-step of before
              weighs as much as one of after.
            * "weighted": weights are numbers of examples or tokens, as those of a `Weighted` loss or of `weight=`. They
              mean the same on any number of devices.

        Returns:
          The state for this transformation, its local sums placed on the mesh. The rest lies where it lay, or, if it
          came out of a pmap, on the default device.

        Raises:
          TypeError, ValueError: if `state` is no `MultiStepsState`, `devices` is missing or superfluous, or `batch` is
            missing or none of the three.

        Example:
          >>> import jax, jax.numpy as jnp, optax, jaxaccum
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> many = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh)
          >>> _, state = many.update(jnp.arange(1.0, mesh.size + 1), many.init(jnp.zeros(())))
          >>> one = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
          >>> state = one.redistribute(state, batch="per_device")
          >>> bool(state.acc_grads / state.weight == (1 + mesh.size) / 2)
          True
        """
        sync = self._config.sync
        if isinstance(sync, MappedAxis):
            devices = positive_int(devices, "devices")
        elif devices is not None:
            raise ValueError(f"devices={devices!r} is for axis_name= alone; here there are {sync.size()}.")
        if batch not in (None, *redistribution.BATCHES):
            raise ValueError(f"batch must be None, 'per_device', 'global' or 'weighted', got {batch!r}.")
        state = checks.state(state, "redistribute")
        return redistribution.redistribute(self._config, state, devices or sync.size(), batch)

    def has_updated(self, state: MultiStepsState) -> Any:
        """A bool scalar: whether the call that returned `state` ran the inner optimizer."""
        return checks.state(state, "has_updated").updated

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """This transformation: it needs no conversion. For code written for `optax.MultiSteps`."""
        return self

    @property
    def inner_opt(self) -> optax.GradientTransformationExtraArgs:
        """The inner optimizer."""
        return self._config.inner

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:
        """What `_replace` makes: with a function of its own it is no `MultiSteps` any more."""
        return optax.GradientTransformationExtraArgs._make(iterable)

    # Identity is configuration: a copy is equal to its original, and two that differ in one option never share a trace.

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._config == self._config

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((type(self), self._config))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._config._asdict().items() if name != "opt")
        return f"{type(self).__name__}({options})"

    def __reduce__(self):
        return _rebuild, (type(self), tuple(self._config))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)


# Without this jax would take an instance for a NamedTuple of two leaves.
jax.tree_util.register_static(MultiSteps)


def _rebuild(cls: type[MultiSteps], config: tuple) -> MultiSteps:
    options = Config(*config)._asdict()
    every_k, sync = options.pop("every_k"), options.pop("sync")
    shapes = {name: shapes.tree for name, shapes in options.pop("averaged_shapes")}
    if shapes:
        options["averaged_extra_args"] = dict.fromkeys(options["averaged_extra_args"], 0.0) | shapes
    return cls(every_k_schedule=every_k, **options, **sync.options())


def _is_optax_multi_steps(opt: Any) -> bool:
    """Whether `opt` is optax's `MultiSteps`, or the transformation that one was converted to."""
    return isinstance(opt, optax.MultiSteps) or isinstance(getattr(opt.init, "__self__", None), optax.MultiSteps)


def _check_extra_args(config: Config, method: str, extra_args: dict[str, Any]) -> None:
    """Refuses a misspelt `weight` or `boundary`; `flush` has neither."""
    flushes = method == "flush"
    remedy = "It takes neither weight nor boundary: it closes the window with what that holds." if flushes else ""
    given = [name for name in extra_args if name not in config.averaged_extra_args]
    misspelling.check(method, given, ("weight", "boundary"), config.opt.update, remedy)


def _unprepared(config: Config, method: str) -> Config:
    if config.prepare is not None:
        raise TypeError(
            f"{method} takes gradients of the parameters, but with prepare= the sums are of what that returns, and "
            "micro_step alone differentiates there. Call micro_step, or leave prepare= out."
        )
    return config


def _transformation(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of an optax transformation."""

    def init(params: Tree) -> MultiStepsState:
        """A fresh state, with nothing pending.

        Args:
          params: the parameters.

        Returns:
          The state; no two leaves of it and of `params` share a buffer, so that both can be donated.

        Raises:
          TypeError, ValueError: for parameters that can't be trained so, and where the inner optimizer holds another
            `MultiSteps`.
        """
        return stepping.init(config, params)

    def update(
        grads: Tree,
        state: MultiStepsState,
        params: Tree | None = None,
        *,
        weight: Any = None,
        boundary: Any = None,
        **extra_args: Any,
    ) -> tuple[Tree, MultiStepsState]:
        """Adds one micro-batch's gradient and, at a boundary, runs the inner optimizer on the window's mean.

        Args:
          grads: one micro-batch's gradient, a tree like the parameters.
          state: the state.
          params: the parameters, where the inner optimizer needs them.
          weight: what the micro-batch counts for, a real scalar; None is 1, and 0 leaves it out.
          boundary: whether it is the window's last; None lets the state's counter decide.
          **extra_args: the inner optimizer's. Those named in `averaged_extra_args` reach it as the window's mean, and
            `grad` as the window's mean gradient.

        Returns:
          (updates, state). Between boundaries the updates are zeros.
        """
        checked = checks.state(state, "update", config.sync)
        _check_extra_args(_unprepared(config, "update"), "update", extra_args)
        output = stepping.updates_output(config, lambda: config.sync.one(grads), checked, params, extra_args)
        return stepping.run(config, grads, checked, params, weight, boundary, extra_args, output)

    return init, update
