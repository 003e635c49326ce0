"""Driver 1: an optax transformation that receives one micro-batch's gradient per call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxaccum import _calls
from jaxaccum._devices import placement
from jaxaccum._devices.topology import MappedAxis
from jaxaccum._gradient import in_place_sums, once_per_window
from jaxaccum._gradient.returns import Returns
from jaxaccum._integers import positive_int
from jaxaccum._jax import prng
from jaxaccum._multi_steps import accumulation, checks, closing, initial_state, loss_step, misspelling, redistribution
from jaxaccum._multi_steps.accumulation import Boundary, MicroBatch
from jaxaccum._multi_steps.closing import Call
from jaxaccum._multi_steps.config import Config, Shapes
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import modules, norms, numeric
from jaxaccum._types import Tree


class MultiSteps(optax.GradientTransformationExtraArgs):
    """Accumulates the gradients of K micro-batches and passes their mean to an optimizer once per window.

    A drop-in for `optax.MultiSteps` that is itself a gradient transformation: use it alone, inside `optax.chain`, in
    flax's `TrainState` or in `nnx.Optimizer`. Between boundaries the updates are zeros and the inner optimizer does
    not run. Put everything that should run once per window (clipping, decay, schedules) inside it.

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

    Parameters may be a whole equinox module, or a tree that holds one. Then floating and complex arrays are trained, as
    with `equinox.filter_grad`. The optimizer sees None in place of all other leaves, such as functions, Python numbers,
    flags and integer arrays, and these come back as they were.

    There are three boundary modes:

    * `boundary=None`: the state's counter decides, in a conditional on the device.
    * `boundary=` a Python bool, static under jit: two programs, for a host that counts micro-steps. This is the fastest
      mode. The program for False contains no optimizer. The program for True contains no conditional, except with
      `weight`, where one guards against a window of zero weight.
    * `boundary=` a traced bool: a conditional on the caller's own condition.

    Fields (it is a NamedTuple and unpacks like every optax transformation):
      init: `init(params) -> MultiStepsState`.
      update: `update(grads, state, params=None, *, weight=None, boundary=None, **extra_args) -> (updates, state)`.
        `weight` is the weight of this micro-batch (a real scalar, 1 by default). Weight 0 excludes the micro-batch,
        even if it is NaN, and a window of zero weight leaves the parameters and the inner state unchanged. Other extra
        args are passed to the inner optimizer whether it reads them or not, as in optax. A misspelt `weight` or
        `boundary` raises.

    Args:
      opt: the inner optimizer, which must not accumulate itself. It receives the mean in the accumulator's dtype. If
        that is narrower than float32 and sums are reduced across devices, it receives the mean in float32, because the
        reduction is at least float32.
      every_k_schedule: K, an integer of at least 1, which `set_every_k` changes without recompilation; or a function
        of `gradient_step` (int32 scalar) that returns K.
      use_grad_mean: if False, the inner optimizer receives the weighted sum instead of the mean.
      should_skip_update_fn: as in optax: `fn(grads, gradient_step, params) -> (skip, skip_state)`. A skipped
        micro-step is not counted and does not close a window, even with `boundary=True`.
      accumulator_dtype: a floating dtype for the sums, whatever the gradients' dtype; float64 and complex parameters
        keep theirs. None uses the parameters' dtypes. bfloat16 sums take half the memory and are rounded
        stochastically, seeded by the state's counters: they are noisier than float32 sums, but small addends are not
        lost.
      axis_name: inside `jax.pmap` or `jax.shard_map`, the name of the mapped data axis, or a tuple of names. Each
        device accumulates local sums, which are reduced once per window, at the boundary: Σ w·g / Σ w over devices and
        micro-steps. All devices must reach the boundary on the same call. With `use_grad_mean=False` the result is the
        mean of the devices' sums. The state differs between devices: in `shard_map` give it a leading device axis, as
        it has in `pmap`.
      mesh: under jit, a `jax.sharding.Mesh`. Gradients then come from `local_value_and_grad`, with a leading axis for
        the P devices of the data axis. A weight or an averaged extra arg is a scalar for all devices, or (P,). Local
        sums are (P, ...), sharded over the data axis, and reduced only at the boundary. The mesh's other axes are left
        to jax.
      data_axis: the mesh's data axis, a name or a tuple of names.
      reduce: "mean" gives every device the reduced sums. "scatter" (ZeRO) needs `mesh` and reduce-scatters them: the
        inner optimizer's state and its computation are sharded over the data axis, as given by `zero_sharding`, and
        updates and parameters are gathered once per window.
      nonfinite: "propagate", or "drop": a micro-batch with a NaN or an infinity in its gradient or averaged extra
        args gets weight 0 and is counted in `state.dropped`.
      averaged_extra_args: names of scalar extra args that the inner optimizer receives as the window's weighted mean,
        if it takes them. For arrays and trees, a dict from each name to a tree of the same shapes and dtypes:
        `{"value": 0.0, "hessian": params}`; leaves may be `jax.ShapeDtypeStruct`s. An extra arg `grad` reaches the
        inner optimizer as the window's mean gradient. All other extra args are those of the boundary call.
      prepare: for `micro_step`, a function of the parameters. The loss receives its output, which is kept in the state
        and recomputed at each optimizer step; its transpose also runs there, once, on the sum. See `cast`, which here
        needs `where=`, or the loss through `seeing`.
      in_place: for `micro_step`, as for `value_and_grad`, except that only `HostDriven` forms gradients in float32, and
        that without `HostDriven` the layers of a `Weighted` loss are added in place only if `in_place=True`. With
        `should_skip_update_fn` or `nonfinite="drop"` nothing is added in place, because it could not be removed from
        the sums.
      gradient_norms: "window" keeps the norm of the gradient of the last optimizer step in `state.norms.window`; it
        costs a pass over that gradient. "all" also keeps the norms of the micro-batches' gradients (see
        `MultiStepsState`), with a pass over each, which turns `in_place` off. With `prepare` these are gradients with
        respect to its output. "noise" keeps, besides `window`, in `state.norms.two_sizes` what `NoiseScale.update`
        takes, of the last window: from the devices' sums and their total or, on one device, from the sums after the
        first micro-step (in a conditional, except with `HostDriven`) and at the end. On one device a window of one
        micro-step tells nothing, so an int K of 1 raises. None computes nothing.

    Raises:
      TypeError, ValueError: for an invalid argument, at construction; from `init`, if the inner optimizer contains
        another `MultiSteps`, ours or optax's.
    """

    _config: Config

    @_calls.explains(num_micro_batches="K is every_k_schedule", every_k="K is every_k_schedule")
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
        gradient_norms: str | None = None,
    ):
        if not (callable(getattr(opt, "init", None)) and callable(getattr(opt, "update", None))):
            raise TypeError(f"opt must be an optax.GradientTransformation, for example optax.adam(1e-3), got {opt!r}.")
        if isinstance(opt, MultiSteps) or _is_optax_multi_steps(opt):
            raise checks.accumulates()
        if not isinstance(use_grad_mean, bool):
            raise TypeError(f"use_grad_mean must be True or False, got {use_grad_mean!r}.")
        if nonfinite not in ("propagate", "drop"):
            raise ValueError(f"nonfinite must be 'propagate' or 'drop', got {nonfinite!r}.")
        trees = checks.averaged_extra_args(averaged_extra_args)
        # `grad` is always the mean gradient.
        shapes = {name: Shapes.of(tree) for name, tree in trees.items() if name != "grad"}
        if should_skip_update_fn is not None and not callable(should_skip_update_fn):
            raise TypeError(f"should_skip_update_fn must be None or a function, got {should_skip_update_fn!r}.")
        numeric.floating("accumulator_dtype", accumulator_dtype)
        once_per_window.check_argument(prepare)
        in_place_sums.check_argument(in_place)
        norms.check_argument(gradient_norms, in_place)
        sync = placement.select_sync(axis_name, mesh, data_axis, should_skip_update_fn, reduce=reduce)
        if should_skip_update_fn is not None or nonfinite == "drop":
            if in_place:
                raise ValueError(
                    "in_place=True can't be had with should_skip_update_fn or nonfinite='drop': leave it at None."
                )
            in_place = False
        if gradient_norms == "all":
            in_place = False
        if gradient_norms == "noise" and not isinstance(sync, MappedAxis):
            norms.check_two_sizes("every_k_schedule", every_k_schedule, sync.size())
        config = Config(
            opt=opt,
            every_k=checks.every_k_schedule(every_k_schedule),
            use_grad_mean=use_grad_mean,
            should_skip_update_fn=should_skip_update_fn,
            accumulator_dtype=None if accumulator_dtype is None else jnp.dtype(accumulator_dtype),
            nonfinite=nonfinite,
            averaged_extra_args=tuple(shapes),
            sync=sync,
            prepare=prepare,
            in_place=in_place,
            averaged_shapes=tuple((name, tree) for name, tree in shapes.items() if not tree.is_scalar),
            gradient_norms=gradient_norms,
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
        """`update` and `optax.apply_updates` in one call. Between boundaries the parameters are not read.

        Under jit, donate `params` and `state`, in this order, but not the gradients: then nothing is copied.

        Args:
          params: the parameters.
          state: the state.
          grads: one micro-batch's gradient, a tree like the parameters.
          weight: the micro-batch's weight; None is 1.
          boundary: whether this is the last micro-batch of the window; None lets the state's counter decide.
          **extra_args: as for `update`.

        Returns:
          (params, state).
        """
        _check_extra_args(self._config, "apply", extra_args)
        config = _unprepared(self._config, "apply")
        state = checks.state(state, "apply", config.sync)
        params, rest = modules.parted(params)
        call = Call(params, extra_args, applies=True)
        micro_batch = MicroBatch(modules.trained(grads), weight)
        params, state, _ = accumulation.add(config, state, micro_batch, Boundary(boundary), call)
        return modules.combined(params, rest), state

    def micro_step(
        self,
        fun: Callable[..., Any],
        params: Tree,
        state: MultiStepsState,
        *args: Any,
        boundary: Any = None,
        has_aux: bool = False,
        carry_argnums: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tree, MultiStepsState]:
        """Runs one micro-step from the loss: backward pass, accumulation and, at a boundary, the optimizer step.

        Example:
          >>> import jax.numpy as jnp, optax, jaxaccum
          >>> tx = jaxaccum.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
          >>> params, state = jnp.array(1.0), tx.init(jnp.array(1.0))
          >>> for x in (1.0, 3.0):
          ...     loss, params, state = tx.micro_step(lambda w, x: (w * x) ** 2, params, state, x)
          ...     print(loss, params)
          1.0 1.0
          9.0 0.0

          With model state, here the largest example so far:

          >>> fun = lambda w, x, largest: ((w * x) ** 2, jnp.maximum(largest, x))
          >>> largest = jnp.array(0.0)
          >>> for x in (2.0, 1.0):
          ...     (loss, largest), params, state = tx.micro_step(fun, params, state, x, largest, carry_argnums=2)
          >>> print(largest)
          2.0

        Args:
          fun: `fun(params, *args, **kwargs)` returns the micro-batch's mean loss, a floating scalar, or a `Weighted`.
            Its weight must not depend on the parameters (`value_and_grad` supports that).
          params: the parameters. `fun` gets a whole equinox module, and arguments, carry and aux may be modules too.
          state: the state.
          *args: the micro-batch and the other arguments of `fun`. With `mesh=` the first that is not a carry is a batch
            of P·N examples, sharded over the data axis. All others are the same on every device, except typed random
            keys: device p sees `jax.random.fold_in(key, p)`. On one device and with `axis_name=`, keys are used
            unchanged: pass a different key to each micro-step and, inside a mapped function, to each device.
          boundary: as for `update`.
          has_aux: `fun` returns (loss, aux). With `mesh=` aux is returned with a leading device axis.
          carry_argnums: mutable model state, such as batch statistics: positions of arguments of `fun`, whose argument
            0 are the parameters. `fun` returns (loss, new_carry) or (loss, (new_carry, aux)). A micro-batch that has
            weight 0, is dropped or is skipped leaves the carry as it was. On several devices, the carry is returned as
            by `value_and_grad`: floating leaves are averaged over the devices, in every micro-step, typed keys are
            folded, and other leaves must agree.
          **kwargs: keyword arguments of `fun`. If it takes one with the name of an argument of this method, bind it
            with `functools.partial`.

        Returns:
          (the micro-batch's mean loss, params, state); in place of the loss (loss, aux), (loss, carry) or
          (loss, (carry, aux)). With `mesh=` the loss is (P,), one per device. The inner optimizer receives the loss,
          averaged over the window, as the extra arg `value`.
        """
        state = checks.state(state, "micro_step", self._config.sync)
        params, rest = modules.parted(params)
        numeric.arrays(params)
        prng.refuse_rngs((*args, *kwargs.values()))
        step = loss_step.micro_step(self._config, modules.whole(fun), Returns(has_aux, carry_argnums))
        returned, params, state = step(params, state, *modules.arguments(rest, args, kwargs), Boundary(boundary))
        return modules.restored(returned), modules.combined(params, rest), state

    def flush(
        self, state: MultiStepsState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, MultiStepsState]:
        """Closes a partial window with an optimizer step on the mean of its micro-batches.

        If the window is empty or has zero weight, the updates are zeros and the optimizer does not run.

        Example:
          >>> import jax.numpy as jnp, optax, jaxaccum
          >>> tx = jaxaccum.MultiSteps(optax.sgd(1.0), every_k_schedule=8)
          >>> updates, state = tx.update(jnp.array(2.0), tx.init(jnp.array(0.0)))
          >>> updates, state = tx.flush(state)
          >>> print(updates)
          -2.0

        Args:
          state: the state.
          params: the parameters, if the inner optimizer needs them.
          **extra_args: the inner optimizer's extra args, except the averaged ones, which come from the window.

        Returns:
          (updates, state).

        Raises:
          TypeError: if `state` is not a `MultiStepsState`, or if `prepare` is set and `params` is missing.
        """
        _check_extra_args(self._config, "flush", extra_args)
        state = checks.state(state, "flush", self._config.sync)
        return closing.flush(self._config, state, modules.trained(params), extra_args)

    def redistribute(
        self, state: MultiStepsState, devices: int | None = None, batch: str | None = None
    ) -> MultiStepsState:
        """Moves the pending local sums of `state` to a different number of devices. Call it on the host.

        Use it for a mid-window state from a checkpoint or from another mesh. Sums are moved whole or merged, never
        divided, so the mean of the pending sums is unchanged. How much they weigh relative to later micro-steps depends
        on what the weights count, which `batch` specifies. With `use_grad_mean=False`, each micro-step contributes its
        mean over the devices it ran on, whatever `batch` is.

        Example:
          >>> import jax, jax.numpy as jnp, optax, jaxaccum
          >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
          >>> many = jaxaccum.MultiSteps(optax.sgd(1.0), 2, mesh=mesh)
          >>> _, state = many.update(jnp.arange(1.0, mesh.size + 1), many.init(jnp.zeros(())))
          >>> one = jaxaccum.MultiSteps(optax.sgd(1.0), 2)
          >>> state = one.redistribute(state, batch="per_device")
          >>> bool(state.acc_grads / state.weight == (1 + mesh.size) / 2)
          True

        Args:
          state: from a `MultiSteps` with the same options and any number of devices: with `mesh`, with `axis_name` as
            returned by `jax.pmap` (every leaf has a leading device axis), or on one device.
          devices: the number of devices, required with `axis_name` and not allowed otherwise.
          batch: required if a window is open and the number of devices changes.

            * "per_device": the batch per device keeps its size. A micro-step on 8 devices weighs 8, one on a single
              device weighs 1, in proportion to their examples.
            * "global": the global batch keeps its size, and the loss is a plain mean, which has weight 1 on each
              device. All sums are scaled by new devices / old devices, so that micro-steps before and after the change
              weigh the same.
            * "weighted": weights are numbers of examples or tokens, as in a `Weighted` loss or `weight=`. They mean the
              same on any number of devices.

        Returns:
          The state for this transformation, with its local sums placed on the mesh. All other leaves stay where they
          are or, if they come from a pmap, move to the default device.

        Raises:
          TypeError, ValueError: if `state` is not a `MultiStepsState`, if `devices` is missing or not allowed, or if
            `batch` is missing or not one of the three.
        """
        sync = self._config.sync
        if isinstance(sync, MappedAxis):
            devices = positive_int(devices, "devices", note="")
        elif devices is not None:
            raise ValueError(f"devices={devices!r} is for axis_name= alone; here there are {sync.size()}.")
        if batch not in (None, *redistribution.BATCHES):
            raise ValueError(f"batch must be None, 'per_device', 'global' or 'weighted', got {batch!r}.")
        state = checks.state(state, "redistribute")
        return redistribution.redistribute(self._config, state, devices or sync.size(), batch)

    def has_updated(self, state: MultiStepsState) -> Any:
        """Whether the call that returned `state` ran the inner optimizer, a bool scalar."""
        return checks.state(state, "has_updated").updated

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """Returns `self`. For compatibility with code written for `optax.MultiSteps`."""
        return self

    @property
    def inner_opt(self) -> optax.GradientTransformationExtraArgs:
        """The inner optimizer."""
        return self._config.inner_opt

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("every_k", "every_k_schedule"):
            raise AttributeError(
                f"{name} can't be set on a MultiSteps, because K belongs to the state: state = "
                f"jaxaccum.set_every_k(state, {value!r:.60}), or step.every_k = k of a HostDriven."
            )
        super().__setattr__(name, value)

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:
        """Makes `_replace` return a plain transformation: with another `init` or `update` it is not a `MultiSteps`."""
        return optax.GradientTransformationExtraArgs._make(iterable)

    # Equality compares configurations: copies are equal, and instances with different options never share a trace.

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


# Otherwise jax would flatten an instance as a NamedTuple with two leaves.
jax.tree_util.register_static(MultiSteps)


def config_of(tx: MultiSteps) -> Config:
    """The configuration of `tx`, for drivers built on it."""
    return tx._config


def _rebuild(cls: type[MultiSteps], config: tuple) -> MultiSteps:
    options = Config(*config)._asdict()
    every_k, sync = options.pop("every_k"), options.pop("sync")
    shapes = {name: shapes.tree for name, shapes in options.pop("averaged_shapes")}
    if shapes:
        options["averaged_extra_args"] = dict.fromkeys(options["averaged_extra_args"], 0.0) | shapes
    return cls(every_k_schedule=every_k, **options, **sync.options())


def _is_optax_multi_steps(opt: Any) -> bool:
    """Whether `opt` is optax's `MultiSteps` or its `gradient_transformation()`."""
    return isinstance(opt, optax.MultiSteps) or isinstance(getattr(opt.init, "__self__", None), optax.MultiSteps)


def _check_extra_args(config: Config, method: str, extra_args: dict[str, Any]) -> None:
    """Rejects a misspelt `weight` or `boundary`; `flush` takes neither."""
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
    """The `init` and `update` functions of `MultiSteps`."""

    def init(params: Tree) -> MultiStepsState:
        """Creates a state with an empty window.

        Args:
          params: the parameters.

        Returns:
          The state, with nothing pending. No two leaves of it and of `params` share a buffer, so both can be donated.

        Raises:
          TypeError, ValueError: for parameters that are not supported, or if the inner optimizer contains another
            `MultiSteps`.
        """
        return initial_state.init(config, params)

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
          params: the parameters, if the inner optimizer needs them.
          weight: the micro-batch's weight, a real scalar; None is 1, and 0 excludes the micro-batch.
          boundary: whether this is the last micro-batch of the window; None lets the state's counter decide.
          **extra_args: extra args for the inner optimizer. It receives those named in `averaged_extra_args` as the
            window's mean, and `grad` as the window's mean gradient.

        Returns:
          (updates, state). Between boundaries the updates are zeros.
        """
        state = checks.state(state, "update", config.sync)
        _check_extra_args(_unprepared(config, "update"), "update", extra_args)
        call = Call(modules.trained(params), extra_args, applies=False)
        micro_batch = MicroBatch(modules.trained(grads), weight)
        updates, state, _ = accumulation.add(config, state, micro_batch, Boundary(boundary), call)
        return updates, state

    return init, update
