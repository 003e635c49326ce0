"""jit on a mesh: runs a window of local sums on each index of the data axis, every other axis left to jax."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import layout
from jaxaccum._devices.topology import MeshAxis
from jaxaccum._types import Tree


def run(
    fun: Callable[..., Any],
    sync: MeshAxis,
    args: Sequence[Tree],
    kwargs: dict[str, Tree],
    *,
    split: Sequence[int],
    split_dim: int,
    out_specs: Tree,
) -> Tree:
    """`fun(*args, **kwargs)` on each index of the data axes, inside `jax.shard_map`.

    Args:
      fun: sees its share of the arguments named by `split` and all of the others.
      sync: the mesh and its data axes. Its other axes stay automatic: their collectives are where the model puts them.
      args: positional arguments; leaves that are not arrays are handed on as they are.
      kwargs: keyword arguments, likewise.
      split: the positions of the arguments to split over the data axes.
      split_dim: which of their dimensions.
      out_specs: how the results lie over the data axes.

    Returns:
      The results, as arrays on the mesh.
    """
    mesh, axes = sync.mesh, sync.names
    shared = P(*[None] * split_dim, axes)
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs))
    spec_of = [shared if i in split else P() for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    spec_of += [P()] * (len(leaves) - len(spec_of))
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    # On explicit axes jax would refuse to lay an argument out anew by itself.
    lay = (lambda x, spec: layout.reshard(x, mesh, axes, spec)) if layout.is_explicit(mesh) else lambda x, spec: x
    arrays = [lay(leaf, spec) for leaf, spec, array in zip(leaves, spec_of, is_array, strict=True) if array]

    def body(arrays):
        iterator = iter(arrays)
        args, kwargs = treedef.unflatten(
            next(iterator) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        )
        with _explained():
            return fun(*args, **kwargs)

    in_specs = ([spec for spec, array in zip(spec_of, is_array, strict=True) if array],)
    # Not with check_vma: a loss that is written for plain jit may start a loop from a constant, for example.
    options = {"axis_names": set(axes), "check_vma": False}
    mapped = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    return jax.jit(mapped)(arrays)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says what a loss may not do here, in place of jax's error about a mesh that its user didn't make."""
    try:
        yield
    except ValueError as error:
        if "should match the mesh passed to shard_map" not in str(error):
            raise
        raise ValueError(
            "the loss calls jax.shard_map with a mesh, but with mesh= it runs inside one over the data axis already: "
            "leave the mesh out of that call, and name the model's axes in its axis_names."
        ) from error
