"""Repeats another micro-batch in place of one of weight 0, so that no gradient is left out by selection.

A weight usually comes from the data alone, such as the sum of a mask, and is cheap to compute. If so, all weights of a
window are computed before its loop. A micro-batch of weight 0 then repeats the first one that counts, with its rows,
its number (hence its keys) and the carry that it saw, under the cotangent 0. The repeated numbers are those of that
micro-batch: they are finite, or the window isn't. So the gradient is exactly 0 and can be added like any other, and
addition inside the backward pass and float32 products apply as for a loss without a weight.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._gradient.splitting import MicroBatches
from jaxaccum._jax import core, jaxprs, linearity
from jaxaccum._sums import overwrites, traced_loss, weighted_sum
from jaxaccum._types import Tree

# Primitives whose cost is that of reading their operands. A jaxpr of these is cheap beside a forward pass.
_ELEMENTWISE = (
    "abs add and atan2 cbrt ceil clamp convert_element_type cos div eq erf exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le log log1p logistic lt max min mul ne neg not or population_count pow reduce_precision rem round "
    "rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt square sub tan tanh xor"
)
_REDUCTIONS = (
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min reduce_or reduce_prod "
    "reduce_sum reduce_xor"
)
_PARTS = "dynamic_slice dynamic_update_slice gather iota optimization_barrier pad pcast"
_CHEAP = frozenset(f"{_ELEMENTWISE} {_REDUCTIONS} {_PARTS}".split()) | jaxprs.MOVES
_CALLS = frozenset(["closed_call", "cond", "core_call", "custom_jvp_call", "jit"])


class Substitution(NamedTuple):
    """Which micro-batch each step of a window's loop runs.

    Attributes:
      kept: for each micro-batch, whether it counts; None if that is only known after its forward pass.
      first: the number of the first one that counts.
      start: the carry at the start of the window, which that one sees.
    """

    kept: jax.Array | None
    first: Any
    start: Tree

    def at(self, i: Any, carry: Tree) -> tuple[Any, jax.Array | None, Tree]:
        """Micro-batch `i`'s (number of the one to run, whether it counts or None, carry to run it with)."""
        if self.kept is None:
            return i, None, carry
        kept = jax.lax.dynamic_index_in_dim(self.kept, i, keepdims=False)
        return jnp.where(kept, i, self.first), kept, weighted_sum.select(kept, carry, self.start)

    def sums(self, sums: Tree) -> Tree:
        """Clears the sums of a window in which no micro-batch counts: there was none to repeat."""
        return sums if self.kept is None else weighted_sum.only_if(jnp.any(self.kept), sums)


def of(loss: traced_loss.Traced, micro_batches: MicroBatches, k: Any, carry: Tree) -> Substitution:
    """Chooses what the steps of a window run.

    Micro-batches are substituted if the weight depends on the batch arguments and constants alone, by cheap operations,
    and if a repeated micro-batch has no other effect. They are not if:

    * the loss has effects, such as a callback;
    * it communicates over a mapped axis: others would receive the repeated values;
    * the backward pass of a `jax.custom_vjp` can't be shown to be linear: it may not map 0 to 0, if it normalises;
    * the parameters hold overwritten statistics, whose gradient is not linear.

    Args:
      loss: the traced loss, of (parameters, number, batch, carry).
      micro_batches: the window's micro-batches.
      k: K.
      carry: the carry at the start of the window.
    """
    weight = _weight(loss) if loss.has_weight else None
    if weight is None or not _may_repeat(loss):
        return Substitution(None, None, None)
    numbers = jnp.arange(micro_batches.length, dtype=jnp.int32)
    weights = jax.vmap(lambda _, batch: weight(batch), (0, micro_batches.axis))(numbers, micro_batches.arrays)
    kept = weights.astype(bool) & (numbers < k)
    return Substitution(kept, jnp.argmax(kept).astype(jnp.int32), carry)


def data_weight(loss: traced_loss.Traced, data: Sequence[int]) -> tuple[core.ClosedJaxpr, list[bool]] | None:
    """The jaxpr of the weight and, for each flat argument of the loss, whether it is one of its inputs.

    None if the weight needs more than the arguments at the positions `data` and constants, or is not cheap.
    """
    closed, used = loss.weight_alone()
    is_data = [i in data for i, arg in enumerate(loss.args) for _ in jax.tree.leaves(arg)]
    needs_more = any(is_used and not own for is_used, own in zip(used, is_data, strict=True))
    return None if needs_more or not _is_cheap(closed.jaxpr) else (closed, used)


def _weight(loss: traced_loss.Traced) -> Any:
    """The weight as a function of a micro-batch's batch arguments; None if it needs more, or is not cheap."""
    found = data_weight(loss, (_BATCH,))
    if found is None:
        return None
    closed, used = found
    before = jax.tree.structure(loss.args[:_BATCH]).num_leaves
    wanted = used[before : before + jax.tree.structure(loss.args[_BATCH]).num_leaves]

    def weight(batch):
        leaves = jax.tree.leaves(batch)
        (weight,) = core.jaxpr_as_fun(closed)(*(x for x, is_used in zip(leaves, wanted, strict=True) if is_used))
        return weight

    return weight


# The position of the batch arguments in the arguments of a window's loss.
_BATCH = 2


def _is_cheap(jaxpr: core.Jaxpr) -> bool:
    """Whether `jaxpr` only reads its operands: it has no products, loops, random bits, effects or collectives."""

    def is_cheap(eqn):
        if eqn.primitive.name in _CALLS or jaxprs.is_checkpoint(eqn):
            return all(map(_is_cheap, jaxprs.bodies(eqn)))
        return eqn.primitive.name in _CHEAP and not jaxprs.axes(eqn)

    return all(map(is_cheap, jaxpr.eqns))


def _may_repeat(loss: traced_loss.Traced) -> bool:
    """Whether a micro-batch that is repeated under the cotangent 0 has the gradient 0, and is invisible elsewhere."""
    jaxpr = loss.closed.jaxpr
    if any(map(jaxprs.axes, jaxpr.eqns)) or jax.tree.leaves(overwrites.only(loss.args[0])):
        return False
    return linearity.unproved(jaxpr) is None
