"""Hoists parameter-only computation out of a loss, so that it runs once per window."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._gradient import in_place_sums
from jaxaccum._gradient.stand_in import standing_for
from jaxaccum._jax import core, jaxprs, linearity
from jaxaccum._sums import overwrites
from jaxaccum._types import Tree

# Hoisting these saves no time and takes memory: XLA fuses them into their consumers.
_SELECTS = frozenset(["dynamic_slice", "gather", "slice", "split", "squeeze", "unstack"])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a jaxpr is split: equations in `before` run once per window, and those in `after` in each micro-batch."""

    jaxpr: core.Jaxpr
    before: frozenset[int]  # Numbers of equations.
    after: frozenset[int]  # An equation that both parts need is in both.
    nested: dict[int, "_Plan"]  # For equations in `after` whose body is split as well.
    crossing: tuple[core.Var, ...]  # Computed before and used after.
    reads: tuple[bool, ...]  # For each input, whether the part before reads it.
    uses: tuple[bool, ...]  # For each input, whether the part after reads it.
    copies: bool = False  # Whether crossing values are casts of inputs, which receive their gradients.


def split(
    loss: Callable[..., Tree], params: Tree, *args: Any, in_place: bool | None
) -> tuple[Callable[[Tree], Tree], Callable[..., Tree]]:
    """Splits `loss(params, *args)` into `rest(prepare(params), *args)`: returns (prepare, rest); the loss is not run.

    `prepare` contains the computation that depends only on parameters, for example casts, weight norms and low-rank
    merges. This includes computation inside jit and `jax.checkpoint`. In a `jax.lax.scan` over stacked layers, it is
    hoisted for all layers at once.

    Parameter-only computation stays in `rest` if:

    * its result is larger than its inputs;
    * it only selects or rearranges elements;
    * its inputs are all vectors, which are cheap to recompute;
    * a loop uses the result in every iteration: its gradient would be summed over the iterations in the result's dtype;
    * its backward pass can't be shown to be linear in its cotangents, as with a `jax.custom_vjp` that clips them: run
      once on the sum of the micro-batches' cotangents, it would give a different gradient.

    Every gradient has the same dtype as in the loss. The result is at least as accurate as without hoisting: the
    transposes round once per window. `prepare` returns (the parameters that `rest` reads directly, the hoisted values).

    If gradients may be added in place (`in_place` is None or True), casts of stacked layers are not among the hoisted
    values: `rest` holds them as constants, and the stack itself receives their gradients, so that each layer's can be
    added to its slice of the sum. With None, that holds for a scan if nothing but casts is hoisted from it; with True,
    nothing but casts is hoisted.
    """
    # Overwritten statistics have no gradient to transpose, so nothing computed from them is hoisted.
    linear, statistics = overwrites.without(params), overwrites.only(params)

    def divided(linear, statistics, *args):
        return loss(overwrites.either(linear, statistics), *args)

    closed, shapes = jax.make_jaxpr(divided, return_shape=True)(linear, statistics, *args)
    leaves, treedef = jax.tree.structure(linear).num_leaves, jax.tree.structure(shapes)
    inputs = len(closed.jaxpr.invars)
    wide = {var for var in closed.jaxpr.invars[:leaves] if var.aval.dtype == jnp.float32}
    stacks = set() if in_place is False else in_place_sums.walked(closed.jaxpr, wide)
    is_stack = [var in stacks for var in closed.jaxpr.invars]
    plan = _Planner(in_place is True).plan(closed.jaxpr, [i < leaves for i in range(inputs)], is_stack)
    is_copy = _copies(plan)

    def hoisted(flat):
        return _run_before(jaxprs.Jits(), plan, closed.consts, [*flat, *[None] * (inputs - leaves)])

    def prepare(params):
        flat = jax.tree.leaves(overwrites.without(params))
        kept = [x for x, uses in zip(flat, plan.uses[:leaves], strict=True) if uses]
        made = [x for x, copied in zip(hoisted(flat), is_copy, strict=True) if not copied]
        return (kept, overwrites.only(params)), made

    computed = hoisted(jax.tree.leaves(linear)) if any(is_copy) else []
    copies = [x for x, copied in zip(computed, is_copy, strict=False) if copied]

    def rest(seen, *args):
        (kept, statistics), made = seen
        given, made, held = iter(kept), iter(made), iter(copies)
        flat = [next(given) if uses else None for uses in plan.uses[:leaves]]
        flat += jax.tree.leaves((statistics, args))
        made = [next(held) if copied else next(made) for copied in is_copy]
        return treedef.unflatten(_run_after(jaxprs.Jits(), plan, closed.consts, flat, made))

    return prepare, rest


class _Planner:
    """Plans the splits of jaxprs; `leaves_stacks`: nothing is hoisted from a scan over stacks but copies."""

    def __init__(self, leaves_stacks: bool):
        self._leaves_stacks, self._plans = leaves_stacks, dict[Any, _Plan]()

    def plan(self, jaxpr: core.Jaxpr, known: Sequence[bool], stacks: Sequence[bool]) -> _Plan:
        """The plan of `jaxpr`.

        `known` says which inputs come from parameters alone, and `stacks` which ones are parameters whose gradients one
        scan adds to their sums.
        """
        key = id(jaxpr), tuple(known), tuple(stacks)
        if key not in self._plans:
            self._plans[key] = _made_plan(self, jaxpr, known, stacks)
        return self._plans[key]

    def of_body(self, eqn: core.JaxprEqn, body: core.Jaxpr, known: Sequence[bool], stacks: Sequence[bool]) -> _Plan:
        """The plan of the body of `eqn`, given the same of its operands."""
        if jaxprs.is_plain_jit(eqn):
            return self.plan(body, known, stacks)
        none = [False] * len(stacks)
        if eqn.primitive.name != "scan":
            return self.plan(body, known, none)
        plan = self.plan(body, _walked(eqn, body, known), none)
        copying = _copying(plan) if any(stacks) else plan
        if copying is None and self._leaves_stacks:
            return self.plan(body, none, none)
        return copying or plan


def _copying(plan: _Plan) -> _Plan | None:
    """The same plan with crossing values as copies of inputs; None if one is more than a cast of a float32 input."""
    inputs = set(plan.jaxpr.invars)
    for eqn in (plan.jaxpr.eqns[i] for i in plan.before):
        is_cast = eqn.primitive.name == "convert_element_type" and jaxprs.dtype(eqn.invars[0]) == jnp.float32
        if not is_cast or eqn.invars[0] not in inputs:
            return None
    nested: dict[int, _Plan] = {}
    for i, inner in plan.nested.items():
        copying = _copying(inner)
        if copying is None:
            return None
        nested[i] = copying
    uses = tuple(used or read for used, read in zip(plan.uses, plan.reads, strict=True))
    return dataclasses.replace(plan, nested=nested, uses=uses, copies=True)


def _made_plan(planner: _Planner, jaxpr: core.Jaxpr, known: Sequence[bool], stacks: Sequence[bool]) -> _Plan:
    # The inputs that each known variable is computed from.
    origins: dict[core.Var, frozenset[core.Var]] = {var: frozenset() for var in jaxpr.constvars}
    origins |= {var: frozenset([var]) for var, is_known in zip(jaxpr.invars, known, strict=True) if is_known}
    summed = {var for var, is_stack in zip(jaxpr.invars, stacks, strict=True) if is_stack}
    certain, nested = set(), {}
    for i, eqn in enumerate(jaxpr.eqns):
        operands = _variables(eqn.invars)
        if all(var in origins for var in operands) and _may_run_once(eqn):
            certain.add(i)
            origins |= dict.fromkeys(eqn.outvars, frozenset().union(*(origins[var] for var in operands)))
        elif body := _body(eqn):
            made = [not isinstance(atom, core.Literal) and bool(origins.get(atom)) for atom in eqn.invars]
            added = [not isinstance(atom, core.Literal) and atom in summed for atom in eqn.invars]
            inner = planner.of_body(eqn, body, made, added)
            if inner.crossing or inner.nested:
                nested[i] = inner

    after, crossing = set(), []
    needed = set(_variables(jaxpr.outvars))
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        wanted = [var for var in eqn.outvars if var in needed]
        if not wanted and not eqn.effects:
            continue
        if i in certain and all(_gains(eqn, var, origins[var]) for var in wanted):
            crossing += wanted
            continue
        after.add(i)
        uses = nested[i].uses if i in nested else [True] * len(eqn.invars)
        needed.update(_variables(atom for atom, is_used in zip(eqn.invars, uses, strict=True) if is_used))

    before, wanted = set(), set(crossing)
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if i in after and i in nested:
            reads = nested[i].reads
            wanted.update(_variables(atom for atom, is_read in zip(eqn.invars, reads, strict=True) if is_read))
        elif wanted.intersection(eqn.outvars):
            before.add(i)
            wanted.update(_variables(eqn.invars))
    return _Plan(
        jaxpr=jaxpr,
        before=frozenset(before),
        after=frozenset(after),
        nested={i: inner for i, inner in nested.items() if i in after},
        crossing=tuple(crossing),
        reads=tuple(var in wanted for var in jaxpr.invars),
        uses=tuple(var in needed for var in jaxpr.invars),
    )


def _may_run_once(eqn: core.JaxprEqn) -> bool:
    """Whether running `eqn` once per window gives the same results and gradients as in every micro-batch."""
    is_pure = not eqn.effects and eqn.primitive.name != "rng_uniform"  # impure, but has no effect in its jaxpr
    return is_pure and not jaxprs.axes(eqn) and linearity.unproved_in(eqn) is None


def _gains(eqn: core.JaxprEqn, var: core.Var, origins: frozenset[core.Var]) -> bool:
    """Whether hoisting `var`, a result of `eqn`, pays off."""
    if not jnp.issubdtype(jaxprs.dtype(var), jnp.inexact):
        return False  # The loss is differentiated with respect to hoisted values, and integers have no gradient.
    itemsize = lambda atom: atom.aval.dtype.itemsize
    size = lambda var: var.aval.size * itemsize(var)
    name = eqn.primitive.name
    widens = name == "convert_element_type" and itemsize(var) > itemsize(eqn.invars[0])
    moves = name in jaxprs.MOVES or name in _SELECTS
    matrices = any(jaxprs.ndim(origin) > 1 for origin in origins)
    return not widens and not moves and matrices and size(var) <= sum(map(size, origins))


def _body(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """The body of an equation, if it can be split."""
    if eqn.primitive.name == "scan" or jaxprs.is_plain_jit(eqn):
        return eqn.params["jaxpr"].jaxpr
    return eqn.params["jaxpr"] if jaxprs.is_checkpoint(eqn) else None


def _walked(eqn: core.JaxprEqn, body: core.Jaxpr, known: Sequence[bool]) -> list[bool]:
    """Which inputs of a scan's body are both known and scanned over."""
    whole = sum(jaxprs.scan_operands(eqn, body))
    return [is_known and i >= whole for i, is_known in enumerate(known)]


def _run_before(jits: jaxprs.Jits, plan: _Plan, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Computes the crossing values, those of `plan` and then those of nested plans; unread inputs may be None."""
    values = _Values(plan.jaxpr, consts, inputs)
    nested = []
    for i, eqn in enumerate(plan.jaxpr.eqns):
        if i in plan.before:
            values.write(eqn.outvars, jaxprs.bind(eqn, values.read(eqn.invars)))
        if i in plan.nested:
            nested += _call_before(jits, eqn, plan.nested[i], values.read(eqn.invars, plan.nested[i].reads))
    return [*values.read(plan.crossing), *nested]


def _call_before(jits: jaxprs.Jits, eqn: core.JaxprEqn, plan: _Plan, operands: list[Any]) -> Sequence[Any]:
    def body(operands):
        return _run_before(jits, plan, _consts(eqn), operands)

    if jaxprs.is_plain_jit(eqn):
        return jits.call(eqn, ("before", id(plan)), body, operands)
    with jaxprs.located(eqn):
        return (jax.vmap(body) if eqn.primitive.name == "scan" else body)(operands)


def _run_after(
    jits: jaxprs.Jits, plan: _Plan, consts: Sequence[Any], inputs: Sequence[Any], made: Sequence[Any]
) -> list[Any]:
    """Computes the outputs from the inputs and the crossing values; unused inputs may be None."""
    values = _Values(plan.jaxpr, consts, inputs)
    crossing, nested = list(made[: len(plan.crossing)]), list(made[len(plan.crossing) :])
    if plan.copies:
        cast = {eqn.outvars[0]: values[eqn.invars[0]] for i, eqn in enumerate(plan.jaxpr.eqns) if i in plan.before}
        crossing = [standing_for(cast[var], x) for var, x in zip(plan.crossing, crossing, strict=True)]
    values.write(plan.crossing, crossing)
    for i, eqn in enumerate(plan.jaxpr.eqns):
        if i in plan.nested:
            inner = plan.nested[i]
            count = len(_copies(inner))
            own, nested = nested[:count], nested[count:]
            values.write(eqn.outvars, _call_after(jits, eqn, inner, values.read(eqn.invars, inner.uses), own))
        elif i in plan.after:
            values.write(eqn.outvars, jaxprs.bind(eqn, values.read(eqn.invars)))
    return values.read(plan.jaxpr.outvars)


def _call_after(
    jits: jaxprs.Jits, eqn: core.JaxprEqn, plan: _Plan, operands: list[Any], made: list[Any]
) -> Sequence[Any]:
    def body(operands, made):
        return _run_after(jits, plan, _consts(eqn), operands, made)

    if jaxprs.is_plain_jit(eqn):
        return jits.call(eqn, ("after", id(plan)), lambda both: body(*both), (operands, made))
    if jaxprs.is_checkpoint(eqn):
        with jaxprs.located(eqn):
            return jaxprs.checkpointed(eqn, body)(operands, made)
    return jaxprs.rescanned(eqn, body, operands, made)


def _copies(plan: _Plan) -> list[bool]:
    """For each crossing value, those of nested plans after those of `plan`, whether it is a copy."""
    nested = (copied for inner in plan.nested.values() for copied in _copies(inner))
    return [*[plan.copies] * len(plan.crossing), *nested]


def _consts(eqn: core.JaxprEqn) -> Sequence[Any]:
    return [] if jaxprs.is_checkpoint(eqn) else eqn.params["jaxpr"].consts


def _variables(atoms: Any) -> list[core.Var]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


class _Values(dict):
    """A jaxpr's variables and their values."""

    def __init__(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]):
        super().__init__(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(self, atoms: Sequence[Any], wanted: Sequence[bool] | None = None) -> list[Any]:
        """The values of `atoms`; None for atoms that are not wanted."""
        wanted = [True] * len(atoms) if wanted is None else wanted
        value = lambda atom: atom.val if isinstance(atom, core.Literal) else self[atom]
        return [value(atom) if is_wanted else None for atom, is_wanted in zip(atoms, wanted, strict=True)]

    def write(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        self.update(zip(variables, values, strict=True))
