"""The backward pass that adds into the sums as it goes, so that no second tree of gradients exists."""

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxaccum import _jaxprs, _loss, _overwrites, _products
from jaxaccum._accumulator import Added, Weighted

Tree = Any


class Backward(NamedTuple):
    """The loss and the gradient of one micro-batch, some leaves of which are added to their sums on the way.

    Attributes:
      total: `total(params, leaves, *args) -> (loss's total, (loss, rest))`; it differentiates by `leaves`.
      inside: for each leaf of the parameters whether it is one of those.
      wide: for each leaf whether its gradient in half-precision products is formed in float32.
    """

    total: Callable[..., tuple[Any, tuple[Any, Any]]]
    inside: tuple[bool, ...]
    wide: tuple[bool, ...]

    def __call__(self, params: Tree, sums: Tree, *args: Any) -> tuple[tuple[Weighted, Any], Tree]:
        """((loss, rest), gradient of the loss's total).

        Args:
          params: the parameters.
          sums: Σ of the gradients so far, a tree like them.
          *args: whatever else the loss takes.

        Returns:
          The loss as a `Weighted`, whose weight is None where it was plain, what else it returned, and the gradient;
          a leaf that is added inside is `Added`, its sum. A micro-batch of weight 0 adds nothing.
        """
        treedef = jax.tree.structure(params)
        leaves = _products.lifted(jax.tree.leaves(params), self.wide)
        total = lambda leaves: self.total(params, leaves, *args)
        if not any(self.inside):
            (_, returned), grads = jax.value_and_grad(total, has_aux=True)(leaves)
            return returned, treedef.unflatten(grads)
        value, fun, returned = jax.vjp(total, leaves, has_aux=True)
        vjp: Any = fun  # jax types it as a plain function.

        def backward(pending):
            # What is no reference asks for a value.
            slots: list[Any] = [
                jax.new_ref(x) if inside else 0.0 for x, inside in zip(pending, self.inside, strict=True)
            ]
            (grads,) = vjp.with_refs(slots)(jnp.ones_like(value))
            triples = zip(grads, slots, self.inside, strict=True)
            return [jax.freeze(slot) if inside else grad for grad, slot, inside in triples]

        pending = treedef.flatten_up_to(sums)
        loss, _ = returned
        if loss.weight is None:
            results = backward(pending)
        else:
            # What has been added can't be taken out again, and it may be infinite.
            none = lambda pending: [
                x if inside else jnp.where(True, jnp.zeros_like(leaf), leaf)  # Varying over devices where that is.
                for x, inside, leaf in zip(pending, self.inside, leaves, strict=True)
            ]
            results = jax.lax.cond(jnp.asarray(loss.weight) != 0, backward, none, pending)
        marked = [Added(x) if inside else x for x, inside in zip(results, self.inside, strict=True)]
        return returned, treedef.unflatten(marked)


def backward(loss: _loss.Traced, in_place: bool | None, sums: Tree, *, replaces: bool = False) -> Backward:
    """How to differentiate a loss that returns `(loss, rest)`, the loss plain or `Weighted`.

    Added inside are leaves that the loss hands, as they are, to one `jax.lax.scan` as what it walks along, and to
    nothing else, if it walks along nothing else that floats: the parameters of stacked layers. There each layer's
    gradient goes straight into its slice of the sum, and the stack of gradients, as large as the parameters, is never
    made. Of any other leaf the gradient exists as a whole before it could be added, and where layers are slices of a
    stack, taken one by one, each would pass over all of it.

    The sum must have the gradient's dtype, and at least 32 bits. What is added can't be taken out again, so a loss with
    a weight, which may be 0, is run backward in a conditional. That costs more than it saves in time, if not in memory,
    and is done only where it is asked for.

    Outside of loops it is the matrix product that can add, if it makes float32 of half precision (`_products`) and if
    nothing comes between it and the sum, as a selection would.

    Args:
      loss: the loss.
      in_place: False: nothing is added inside; True: whatever can be; None: what gains by it.
      sums: Σ of the gradients so far, a tree like the parameters.
      replaces: whether a gradient may take the place of its sum, by selection.
    """
    closed, treedef = loss.closed, jax.tree.structure(loss.args[0])
    named = jax.tree_util.tree_leaves_with_path(loss.args[0])
    leaves = [leaf for _, leaf in named]
    none = (False,) * len(leaves)
    plain = Backward(lambda _, leaves, *args: loss.total(treedef.unflatten(leaves), *args), inside=none, wide=none)
    if in_place is False or (loss.has_weight and in_place is None):
        return plain
    pending = treedef.flatten_up_to(sums)
    inputs = closed.jaxpr.invars[: len(leaves)]
    fits = {
        var
        for var, (path, leaf), sum_ in zip(inputs, named, pending, strict=True)
        if sum_ is not None and sum_.dtype == leaf.dtype and sum_.dtype.itemsize >= 4 and not _overwrites.holds(path)
    }
    walked = set().union(*(stack for stack in _stacks(closed.jaxpr) if stack <= fits))
    products = not loss.has_weight and not replaces and _products.occur(closed.jaxpr)
    wide = tuple(products and sum_ is not None and sum_.dtype == jnp.float32 for sum_ in pending)
    replay = functools.partial(_replay, closed, jax.tree.structure(loss.shapes), wide)
    return Backward(replay, tuple(var in walked for var in inputs), wide)


def _replay(closed: core.ClosedJaxpr, treedef: Any, wide: tuple[bool, ...], params: Tree, *args: Any) -> Any:
    """What was traced, so that it need not be traced again."""
    fun = _products.widened(closed, jax.tree.leaves(params), wide)
    return treedef.unflatten(fun(*jax.tree.leaves(args)))


def _stacks(jaxpr: core.Jaxpr) -> list[set[core.Var]]:
    """For each scan what it walks along and could have a gradient, if that is nothing but inputs not used elsewhere.

    All of it or nothing: where a scan walks along references and values, jax 0.10 takes the ones for the others.
    """
    operands = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    uses = collections.Counter(atom for atom in operands if isinstance(atom, core.Var))
    inputs = set(jaxpr.invars)
    floats = lambda atom: jnp.issubdtype(jnp.result_type(atom.aval), jnp.inexact)
    found: list[list[Any]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            along = eqn.invars[sum(_jaxprs.scan_operands(eqn, eqn.params["jaxpr"].jaxpr)) :]
            found.append([atom for atom in along if floats(atom)])
        elif _jaxprs.is_plain_jit(eqn):
            body = eqn.params["jaxpr"].jaxpr
            outer = dict(zip(body.invars, eqn.invars, strict=True))
            found += [[outer[var] for var in stack] for stack in _stacks(body)]
    return [set(stack) for stack in found if all(atom in inputs and uses[atom] == 1 for atom in stack)]
