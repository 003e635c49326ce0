"""Repeats another micro-batch in place of one of weight 0, so that no gradient is left out by selection.

A weight usually comes from the data alone, such as the sum of a mask, and is cheap to compute. If so, all weights of a
window are computed before its loop. A micro-batch of weight 0 then repeats the first one that counts, with its rows,
its number (hence its keys) and the carry that it saw, under the cotangent 0. The repeated numbers are those of that
micro-batch: they are finite, or the window isn't. So the gradient is exactly 0 and can be added like any other, and
addition inside the backward pass and float32 products apply as for a loss without a weight.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._gradient.splitting import MicroBatches
from jaxaccum._jax import core, jaxprs, linearity, varying
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


class Step(NamedTuple):
    """What a step of a window's loop runs: micro-batch `number`, with `carry`.

    `kept` and `weight` are those of the micro-batch in whose place it runs: whether it counts, and its weight. They are
    None if they are only known after its forward pass.
    """

    number: Any
    carry: Tree
    kept: Any = None
    weight: Any = None


class Substitution(NamedTuple):
    """Which micro-batch each step of a window's loop runs.

    The weights are computed once: computed again in the loop, they could be rounded to other numbers. They are None if
    they are only known after the micro-batches' forward passes.
    """

    weights: jax.Array | None = None
    kept: Any = None  # For each micro-batch, whether it counts.
    first: Any = None  # The number of the first one that counts.
    start: Tree = None  # The window's first carry, which the first micro-batch that counts sees.

    def step(self, i: Any, carry: Tree) -> Step:
        """What runs in the place of micro-batch `i`."""
        if self.weights is None:
            return Step(i, carry)
        kept, weight = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (self.kept, self.weights))
        weight = weighted_sum.only_if(kept, weight)  # Its derivative is 0 too.
        return Step(jnp.where(kept, i, self.first), weighted_sum.select(kept, carry, self.start), kept, weight)

    def sums(self, sums: Tree) -> Tree:
        """Clears the sums of a window in which no micro-batch counts: there was none to repeat."""
        if self.weights is None:
            return sums
        counts = jnp.any(self.kept)

        def by_conditional(sums):
            return jax.lax.cond(counts, lambda sums: sums, lambda sums: weighted_sum.only_if(none, sums), sums)

        # XLA writes the result of a selection over its operand on a CPU, and that of a conditional on a GPU.
        none, by_selection = jnp.asarray(False), lambda sums: weighted_sum.only_if(counts, sums)
        return jax.lax.platform_dependent(sums, cuda=by_conditional, rocm=by_conditional, default=by_selection)


def of(loss: traced_loss.Traced, micro_batches: MicroBatches, k: Any, carry: Tree) -> Substitution:
    """Chooses what the steps of a window run; `loss` is traced with (parameters, number, batch, carry).

    Micro-batches are substituted if the weight depends on the batch arguments and constants alone, by cheap operations,
    and if a repeated micro-batch has no other effect. They are not if:

    * the loss has effects, such as a callback;
    * it communicates over a mapped axis: others would receive the repeated values;
    * a batch argument is the same on all devices of a mapped axis, but the weight isn't;
    * a backward pass can't be shown to map 0 to 0, as in a `jax.custom_vjp` that normalises, or in a linear solver;
    * the parameters hold overwritten statistics, whose gradient is not linear.
    """
    weight = _weight(loss) if loss.has_weight else None
    if weight is None or not _may_repeat(loss):
        return Substitution()
    length = micro_batches.length
    numbers = jnp.arange(length, dtype=jnp.int32)
    if weight.is_small:
        weights = jax.vmap(weight.of_batch, micro_batches.axis)(micro_batches.arrays)
    else:
        weights = jax.lax.map(lambda i: weight.of_batch(micro_batches.take(i)), numbers)
    axes = varying.axes(weights)
    if any(axes - varying.axes(leaf) for leaf in jax.tree.leaves(micro_batches.arrays)):
        return Substitution()
    kept = weights.astype(bool) & (numbers < jnp.minimum(k, length))
    return Substitution(weights, kept, jnp.argmax(kept).astype(jnp.int32), carry)


def data_weight(loss: traced_loss.Traced, data: Sequence[int]) -> tuple[core.ClosedJaxpr, list[bool]] | None:
    """The jaxpr of the weight and, for each flat argument of the loss, whether it is one of its inputs.

    None if the weight needs more than the arguments at the positions `data` and constants, or is not cheap.
    """
    closed, used = loss.weight_alone()
    is_data = [i in data for i, arg in enumerate(loss.args) for _ in jax.tree.leaves(arg)]
    needs_more = any(is_used and not own for is_used, own in zip(used, is_data, strict=True))
    return None if needs_more or not _is_cheap(closed.jaxpr) else (closed, used)


class _Weight(NamedTuple):
    """The weight of a micro-batch, as a function of its batch arguments."""

    of_batch: Callable[[Tree], jax.Array]
    is_small: bool  # Whether intermediate results are about as small as the batch arguments.


def _weight(loss: traced_loss.Traced) -> _Weight | None:
    """The weight, if it comes from the batch arguments by cheap operations."""
    found = data_weight(loss, (_BATCH,))
    if found is None:
        return None
    closed, used = found
    before = jax.tree.structure(loss.args[:_BATCH]).num_leaves
    wanted = used[before : before + jax.tree.structure(loss.args[_BATCH]).num_leaves]

    def of_batch(batch):
        leaves = jax.tree.leaves(batch)
        (weight,) = core.jaxpr_as_fun(closed)(*(x for x, is_used in zip(leaves, wanted, strict=True) if is_used))
        return weight

    size = lambda atoms: max((atom.aval.size for atom in atoms), default=1)
    results = (var for eqn in jaxprs.equations(closed.jaxpr) for var in eqn.outvars)
    return _Weight(of_batch, size(results) <= 4 * size(closed.jaxpr.invars))


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
    if linearity.communicates(jaxpr) or jax.tree.leaves(overwrites.only(loss.args[0])):
        return False
    is_solver = any(eqn.primitive.name == "custom_linear_solve" for eqn in jaxprs.equations(jaxpr))
    return not is_solver and linearity.unproved(jaxpr) is None
