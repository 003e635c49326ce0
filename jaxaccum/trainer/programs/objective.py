"""The loss of one piece of a micro-step on each device, for training and validation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxaccum import task as _task
from jaxaccum._devices import mesh_map
from jaxaccum._devices.topology import MappedAxis, OneDevice
from jaxaccum._gradient.roles import Roles
from jaxaccum._sums import traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum.task import Task
from jaxaccum.trainer.input.strategies import Strategy

Logs = dict[str, Weighted]


# The roles of the arguments of `objective`. The model state is per device, and the batch is sharded.
ROLES = Roles(params=(0,), batch=(2,), keys=(), carry=(), own=(1,))


def objective(
    task: Task, strategy: Strategy, seed: int, params: Tree, model_state: Tree, batch: Tree, place: Any, index: Any
) -> tuple[Any, tuple[Tree, Logs]]:
    """Computes a piece's loss on one device, to be differentiated there.

    `model_state` and `batch`, with leaves (N, ...), are those of this device. `place` is a `Place`, int32 (3,), and
    `index` a uint32 scalar, the number of loader batches before this one. Returns (loss, (new model state, weighted
    sums of loss and metrics)). The loss is a `Weighted`: a plain loss is weighted by its examples, and a device without
    a share has weight 0.
    """
    device = _device(strategy)
    key = _key(strategy, seed, device.index(), place, index)
    value, new_model_state, metrics = _task.evaluate(task, params, model_state, batch, key)
    _check_unchanged(model_state, new_model_state)
    value = value if isinstance(value, Weighted) else Weighted(value, None)
    traced_loss.check_total(value.total)
    present = _present(strategy, device.index(), place)
    logs = _logs(value, metrics, batch, present)
    if value.weight is None:
        value = Weighted(value.total * _examples(batch), _examples(batch))
    # On one device every piece has a share, and its number of examples is static.
    weight = value.weight if strategy.size == 1 else jnp.where(present, value.weight, 0)
    return Weighted(value.total, weight), (new_model_state, logs)


def returned(task: Task, held: tuple[Tree, Tree], batch: Tree) -> tuple[Weighted, None]:
    """(One share's loss with its weight, None), for `HostWeight`. `held`: (params, model state)."""
    value, *_ = _task.evaluate(task, *held, batch, jax.random.key(0))
    return value if isinstance(value, Weighted) else Weighted(value, _examples(batch)), None


def losses(task: Task, strategy: Strategy, params: Tree, model_state: Tree, batch: Tree, place: Any) -> Logs:
    """Returns the weighted sums of a piece's loss and metrics on each device, in validation."""

    def on_device(params, model_state, batch, place):
        value, _, metrics = _task.evaluate(task, params, model_state, batch, None)
        value = value if isinstance(value, Weighted) else Weighted(value, None)
        traced_loss.check_total(value.total)
        return _logs(value, metrics, batch, _present(strategy, _device(strategy).index(), place))

    sync, args = strategy.sync, (params, model_state, batch, place)
    if isinstance(sync, OneDevice):
        return on_device(*args)
    body = lambda *args: jax.tree.map(lambda x: x[None], on_device(*args))
    return mesh_map.on_data_axes(body, sync, args, {}, split=(2,), split_dim=0, out_specs=P(sync.names))


def _device(strategy: Strategy) -> OneDevice | MappedAxis:
    """Returns the topology that the code runs under."""
    return MappedAxis(strategy.sync.names) if strategy.size > 1 else OneDevice()


def _key(strategy: Strategy, seed: int, device: Any, place: Any, index: Any) -> jax.Array:
    """Returns the micro-batch's key, from the loader batch's index and, with "dp", the index of the share."""
    key, device, first = jax.random.key(seed), jnp.asarray(device, jnp.uint32), place[0].astype(jnp.uint32)
    if strategy.name != "dp":
        return jax.random.fold_in(key, index + device - first)
    precede = first // strategy.size * strategy.size
    return jax.random.fold_in(jax.random.fold_in(key, index), precede + device)


def _present(strategy: Strategy, device: Any, place: Any) -> Any:
    """Whether a device has a share of a piece."""
    first = place[0] % strategy.size
    return jnp.logical_and(first <= device, device < first + place[1])


def _logs(value: Weighted, metrics: dict[str, Any], batch: Tree, present: Any) -> Logs:
    """Returns the weighted sums of a loss and its metrics, in the weights' dtype; zeros on devices without a share."""
    wide = lambda x: jnp.asarray(x).astype(weighted_sum.weight_dtype())
    weight = wide(_examples(batch) if value.weight is None else value.weight)

    def sums(name, entry):
        if jnp.ndim(entry.total) or jnp.ndim(entry.weight):
            raise ValueError(
                f"metric {name!r} must be a scalar or a Weighted of two, got a total of shape "
                f"{jnp.shape(entry.total)}; reduce it in the loss."
            )
        counted = jnp.where(present, wide(entry.weight), 0)
        return Weighted(jnp.where(counted == 0, 0, wide(entry.total)), counted)

    as_the_loss = lambda mean: Weighted(wide(mean) * weight, weight)
    loss = as_the_loss(value.total) if value.weight is None else value
    entries = {name: x if isinstance(x, Weighted) else as_the_loss(x) for name, x in metrics.items()}
    return {name: sums(name, entry) for name, entry in {"loss": loss, **entries}.items()}


def _examples(batch: Tree) -> int:
    """Returns the weight of a plain loss: the common leading length of the batch's leaves."""
    shapes = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "a plain loss counts for its number of examples, but the batch's leaves have no one leading length: "
            f"{shapes}. Return a jaxaccum.Weighted to say what the batch counts for."
        )
    return lengths.pop()[0]


def _check_unchanged(old: Tree, new: Tree) -> None:
    """Checks that the new model state has the tree structure, shapes and dtypes of the old one."""
    kinds = lambda tree: jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)
    if jax.tree.flatten(kinds(old)) != jax.tree.flatten(kinds(new)):
        raise ValueError(
            "the loss must return a model state of the tree, shapes and dtypes of the one it was given, "
            f"{kinds(old)}; it returned {kinds(new)}."
        )
