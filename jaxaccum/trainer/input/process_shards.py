"""With several processes: exchanges the shapes of a micro-step's batches and builds its global pieces.

A piece is one program on all devices, so every process must know the shapes of all processes. Each one sends the others
a description of its own batches. A process without a share of a piece contributes zeros of the same shape and weight 0.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._jax import prng
from jaxaccum._types import Tree
from jaxaccum.trainer.input.batches import length, rows, signature, stacked
from jaxaccum.trainer.input.strategies import Piece, Place, Strategy


def offer(strategy: Strategy, batches: Sequence[Tree]) -> dict[str, Any]:
    """Describes this process's batches in a micro-step, as JSON types; `batches` is empty if its loader has ended."""
    rounds = [[_described(share) for share in shares] for shares in _rounds(strategy, batches)]
    kinds = list(dict.fromkeys(kind for kinds in rounds for kind in kinds if kind))
    numbered = [[kinds.index(kind) if kind else None for kind in kinds_of_round] for kinds_of_round in rounds]
    return {"kinds": kinds, "rounds": numbered, "batches": len(batches)}


def pieces(strategy: Strategy, batches: Sequence[Tree], offers: Sequence[dict[str, Any]], like: Tree) -> list[Piece]:
    """Starts the transfer of a micro-step's pieces to the devices and returns them.

    `offers` are the descriptions from all processes. `like` is a loader batch of this process, for its tree structure;
    if that differs between processes, all of them raise ValueError.
    """
    own, size = strategy.own, strategy.size
    shares = _rounds(strategy, batches)
    _check_trees(offers)
    mine = range(own * strategy.process_index, own * (strategy.process_index + 1))
    found: list[tuple[Tree, Place]] = []
    for number in range(max(len(offered["rounds"]) for offered in offers)):
        kinds = [kind for offered in offers for kind in _kinds(offered, number, own)]
        for kind, run in itertools.groupby(range(size), key=kinds.__getitem__):
            if kind is None:
                continue
            devices = list(run)
            have = {device: shares[number][device - mine[0]] for device in devices if device in mine}
            filler = next(iter(have.values())) if have else _zeros(kind, like)
            batch = stacked([have.get(device, filler) for device in mine])
            is_whole_batches = strategy.name != "dp"
            first = devices[0] + (0 if is_whole_batches else number * size)
            found.append((batch, Place(first, len(devices), len(devices) if is_whole_batches else 0)))
    if strategy.name == "dp":
        batch, place = found[-1]
        found[-1] = batch, place._replace(advance=1)
    return [strategy.sent(batch, place) for batch, place in found]


def _rounds(strategy: Strategy, batches: Sequence[Tree]) -> list[list[Tree | None]]:
    """Splits this process's batches into rounds, each with one share or None per device."""
    own = strategy.own
    if strategy.name != "dp" or not batches:
        return [[*batches, *[None] * (own - len(batches))]]
    (batch,) = batches
    each, rest = divmod(length(batch), own)
    rounds: list[list[Tree | None]] = []
    if each:
        rounds.append([rows(batch, slice(i * each, (i + 1) * each)) for i in range(own)])
    if rest or not each:
        rounds.append([rows(batch, slice(own * each, None)), *[None] * (own - 1)])
    return rounds


def _described(share: Tree | None) -> str | None:
    if share is None:
        return None
    treedef, leaves = signature(share)
    name = lambda dtype: dtype.name if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).name
    return json.dumps([str(treedef), [(shape, name(dtype)) for shape, dtype in leaves]])


def _kinds(offered: dict[str, Any], number: int, own: int) -> list[str | None]:
    """Returns the described share, or None, of each device of a process in a round."""
    numbered = offered["rounds"][number] if number < len(offered["rounds"]) else [None] * own
    return [None if kind is None else offered["kinds"][kind] for kind in numbered]


def _zeros(kind: str, like: Tree) -> Tree:
    """Builds a batch of zeros from a description by `_described`."""
    _, described = json.loads(kind)
    leaves, treedef = jax.tree.flatten(like)
    zeros = [_zero(shape, dtype, leaf) for (shape, dtype), leaf in zip(described, leaves, strict=True)]
    return jax.tree.unflatten(treedef, zeros)


def _zero(shape: Sequence[int], dtype: str, like: Any) -> Any:
    """Returns a leaf of zeros; random keys use the implementation of `like`."""
    if not prng.is_typed(like):
        return np.zeros(shape, dtype)
    data = jax.random.key_data(like)
    zeros = jnp.zeros((*shape, *data.shape[like.ndim :]), data.dtype)
    return jax.random.wrap_key_data(zeros, impl=jax.random.key_impl(like))


def _check_trees(offers: Sequence[dict[str, Any]]) -> None:
    trees = {json.loads(kind)[0]: i for i, offered in enumerate(offers) for kind in offered["kinds"]}
    if len(trees) > 1:
        whose = "; ".join(f"{tree} on process {process}" for tree, process in trees.items())
        raise ValueError(f"the loaders of the processes give batches of different trees: {whose}.")
