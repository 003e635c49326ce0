"""Runs a window of local sums on each index of a mesh's data axes; all other axes stay automatic."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import layout
from jaxaccum._devices.topology import MeshAxis
from jaxaccum._types import Tree


def on_data_axes(
    fun: Callable[..., Any],
    sync: MeshAxis,
    args: Sequence[Tree],
    kwargs: dict[str, Tree],
    *,
    split: Sequence[int],
    split_dim: int,
    out_specs: Tree,
) -> Tree:
    """Runs `fun(*args, **kwargs)` on each index of the data axes, inside `jax.shard_map`.

    `fun` receives its shard, along dimension `split_dim`, of the positional arguments in `split`, and all others whole;
    leaves that are not arrays are passed through. `out_specs` are the specs of the results over the data axes.
    """
    mesh, axes = sync.mesh, sync.names
    shared = P(*[None] * split_dim, axes)
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs))
    spec_of = [shared if i in split else P() for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    spec_of += [P()] * (len(leaves) - len(spec_of))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    arrays = list(itertools.compress(leaves, is_array))
    specs = list(itertools.compress(spec_of, is_array))
    if layout.is_explicit(mesh):  # There jax doesn't reshard arguments implicitly.
        arrays = [layout.reshard(x, mesh, axes, spec) for x, spec in zip(arrays, specs, strict=True)]

    def body(arrays):
        given = iter(arrays)
        full = [next(given) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        args, kwargs = treedef.unflatten(full)
        with _explained():
            return fun(*args, **kwargs)

    # check_vma would reject losses written for plain jit, for example one that starts a loop from a constant.
    options = {"axis_names": set(axes), "check_vma": False}
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=out_specs, **options)
    return jax.jit(mapped)(arrays)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Replaces jax's error about a mesh that the user didn't create with advice for the loss."""
    try:
        yield
    except ValueError as error:
        if "should match the mesh passed to shard_map" not in str(error):
            raise
        raise ValueError(
            "the loss calls jax.shard_map with a mesh, but with mesh= it runs inside one over the data axis already: "
            "leave the mesh out of that call, and name the model's axes in its axis_names."
        ) from error
