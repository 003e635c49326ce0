"""The cases of the matrix: all possible pairs of the tables' entries."""

import collections
import functools
import itertools
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matrix_contexts import CONTEXTS, Inputs
from matrix_drivers import DRIVERS
from matrix_losses import LOSSES, K, batch, extras, params
from matrix_reference import window

import jaxaccum
from jaxaccum._jax import refs

PREPARES = {"none": None, "auto": "auto", "cast": jaxaccum.cast(jnp.bfloat16)}
IN_PLACE = {"default": None, "in_place": True, "after": False}


class Case(NamedTuple):
    """One entry of each table, by name."""

    driver: str
    context: str
    loss: str
    prepare: str
    in_place: str

    @property
    def id(self):
        return "-".join(self)


TABLES = Case(DRIVERS, CONTEXTS, LOSSES, PREPARES, IN_PLACE)


class Rule(NamedTuple):
    """Combinations that are impossible.

    Attributes:
      reason: why.
      applies: whether it holds of a case.
      error: what the case raises; None where there is nothing that one could call.
      match: what the message says.
      alone: jax alone raises it, so we may.
    """

    reason: str
    applies: Callable[[Case], bool]
    error: type[Exception] | tuple[type[Exception], ...] | None = None
    match: str = ""
    alone: bool = False


def is_multi_steps(case):
    return DRIVERS[case.driver].is_stream


def is_coupled(case):
    return DRIVERS[case.driver].is_coupled


def takes_gradients(case):
    return case.driver in ("update", "apply")


def is_refused_by_the_host(case):
    """Whether `HostDriven` can't be used in the context at all."""
    context = CONTEXTS[case.context]
    return not DRIVERS[case.driver].traces and (context.place == "axis_name" or context.jits == "always")


# The first rule that applies says why.
IMPOSSIBLE = [
    Rule(
        "a coupled window carries no state, its aux is not that of micro-batches, and it has no in_place",
        lambda c: is_coupled(c) and (LOSSES[c.loss].returns_pair or c.in_place in ("in_place", "after")),
    ),
    Rule(
        "a backward pass that is not linear has other results for the cotangents of a coupled loss",
        lambda c: is_coupled(c) and c.loss in ("custom_vjp", "custom_vjp_of_weights"),
    ),
    Rule(
        "layers that are cast before they are walked along have another dtype than their sums",
        lambda c: (
            c.loss in ("scan", "checkpoint", "constant_start")
            and (c.prepare, c.in_place) == ("cast", "in_place")
            and (c.loss != "checkpoint" or refs.REACH_CHECKPOINTS)
            and not (c.context == "vmap_k" and not DRIVERS[c.driver].has_traced_k)
            and not (takes_gradients(c) or is_refused_by_the_host(c))
            and not (c.context == "shard_map" and c.loss == "constant_start")
        ),
        ValueError,
        "in_place=True: the gradients of",
    ),
    Rule("only a traced K can be mapped over", lambda c: c.context == "vmap_k" and not DRIVERS[c.driver].has_traced_k),
    Rule(
        "jax has no reverse mode over a traced K: name a static K",
        lambda c: DRIVERS[c.driver].has_traced_k and CONTEXTS[c.context].is_reverse,
        ValueError,
        "Reverse-mode differentiation does not work for lax.while_loop",
    ),
    Rule(
        "a stream's state is made before its loss is seen",
        lambda c: is_multi_steps(c) and c.prepare == "auto",
        ValueError,
        "prepare must be None or a function of the parameters, got 'auto'",
    ),
    Rule(
        "the host can't count the windows of a mapped axis",
        lambda c: not DRIVERS[c.driver].traces and CONTEXTS[c.context].place == "axis_name",
        ValueError,
        "the host can't count the windows of a MultiSteps with axis_name",
    ),
    Rule(
        "the host can't count while jax traces",
        lambda c: not DRIVERS[c.driver].traces and CONTEXTS[c.context].jits == "always",
        TypeError,
        "HostDriven was called with tracers, inside jax.jit",
    ),
    Rule(
        "update and apply take gradients, which leave out the derivative of a weight",
        lambda c: takes_gradients(c) and c.loss == "varying_weight",
    ),
    Rule(
        "update and apply take gradients: carrying state over devices is up to the caller",
        lambda c: takes_gradients(c) and LOSSES[c.loss].extra == "carry" and CONTEXTS[c.context].devices > 1,
    ),
    Rule(
        "the sums of a stream have no place for a weight's derivative",
        lambda c: is_multi_steps(c) and c.loss == "varying_weight",
        ValueError,
        "weight of the Weighted loss depends on the parameters",
    ),
    Rule(
        "update and apply take gradients of the parameters, not of what prepare returns",
        lambda c: takes_gradients(c) and c.prepare == "cast",
        TypeError,
        "takes gradients of the parameters",
    ),
    Rule(
        "a scan whose carry comes to vary over a mapped axis must start from what does",
        lambda c: c.context == "shard_map" and c.loss == "constant_start",
        TypeError,
        "scan body function carry input and carry output must have equal types",
        alone=True,
    ),
    Rule(
        "a gather by indices on explicit axes must say where its result lies",
        lambda c: c.context == "sharded_explicit" and c.loss == "embedding",
        Exception,
        "out_sharding",
        alone=True,
    ),
    Rule(
        "no callback can be exported",
        lambda c: c.context == "export" and c.loss == "callback",
        NotImplementedError,
        "serialization of host_callbacks",
        alone=True,
    ),
    Rule(
        "sums that are not mapped can't be donated to mapped ones",
        lambda c: (
            not DRIVERS[c.driver].traces
            and (c.context == "vmap_batches" or (c.context == "vmap_both" and c.loss in ("weighted", "quantised")))
        ),
        UserWarning,
        "Some donated buffers were not usable",
    ),
]


def impossible(case):
    """The rule that makes it impossible, or None."""
    return next((rule for rule in IMPOSSIBLE if rule.applies(case)), None)


# By the number of the failure in the issue, or a new one: which cases fail today.
KNOWN = {}


# Cases that failed once, beside those that cover all pairs.
FAILED = [
    Case("value_and_grad", "vmap_params", "scan", "none", "default"),
    Case("micro_step", "checkpoint", "scan", "none", "default"),
    Case("value_and_grad", "strict", "bf16_parameters", "none", "default"),
    Case("traced_k", "mesh_auto", "aux", "none", "default"),
    Case("value_and_grad", "jit", "quantised", "auto", "in_place"),
    Case("traced_k", "mesh_explicit", "dense", "none", "default"),
    Case("value_and_grad", "mesh_auto", "constant_start", "none", "default"),
    Case("traced_k", "sharded_explicit", "aux", "none", "default"),
]


def known(case):
    """The numbers of the failures that it is known to show."""
    return [number for number, applies in KNOWN.items() if applies(case)]


def pairs(case):
    """The pairs of entries that a case covers."""
    return set(itertools.combinations(enumerate(case), 2))


def number(case):
    """A number that is the same in each run, to choose by at random."""
    return zlib.crc32(case.id.encode())


def entries(case):
    """The entries of the tables that a case holds."""
    return set(enumerate(case))


def covering(cases, parts=pairs):
    """Some of `cases` that cover each of the parts that any of them has: the rarest first, and many others with it."""
    holding = collections.defaultdict(list)
    for case in cases:
        for part in parts(case):
            holding[part].append(case)
    uncovered, chosen = set(holding), []
    for part in sorted(holding, key=lambda part: (len(holding[part]), part)):
        if part in uncovered:
            chosen.append(max(holding[part], key=lambda case: (len(parts(case) & uncovered), number(case))))
            uncovered -= parts(chosen[-1])
    return chosen


def product():
    """All cases."""
    return list(itertools.starmap(Case, itertools.product(*TABLES)))


def possible():
    """All possible cases."""
    return [case for case in product() if not impossible(case)]


def in_part(cases):
    """The cases by loss; with JAXACCUM_MATRIX=fifth a fifth of them, the same in each run."""
    cases = sorted(cases, key=lambda case: (list(LOSSES).index(case.loss), case))
    is_fifth = os.environ.get("JAXACCUM_MATRIX") == "fifth"
    return [case for case in cases if not is_fifth or number(case) % 5 == 0]


def layout(raw, driver):
    """Leaves (P, K, N, ...) as the driver takes them: (P·K·N, ...), or (K, P·N, ...) with room for one more."""

    def leaf(x):
        if not driver.is_stacked:
            return x.swapaxes(1, 2).reshape(-1, *x.shape[3:])
        x = x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
        absent = np.full_like(x[:1], np.nan if np.issubdtype(x.dtype, np.floating) else 0)
        return np.concatenate([x, absent]) if driver.has_room else x

    return jax.tree.map(leaf, raw)


def floating(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype), tree)


def numbers(tree):
    """The tree in numpy, the data of random keys in place of them."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def run(case, driver=None):
    """What the driver gives in the context."""
    driver, context, loss = driver or DRIVERS[case.driver], CONTEXTS[case.context], LOSSES[case.loss]
    options = {"prepare": PREPARES[case.prepare], "in_place": IN_PLACE[case.in_place]}
    where = {"axis_name": {"axis_name": "data"}, "mesh": {"mesh": context.mesh}}.get(context.place, {})
    with context.around():
        dtype = jnp.result_type(float)
        inputs = Inputs(
            [floating(params(loss, variant), loss.dtype or dtype) for variant in (0, 1)],
            [floating(layout(batch(context.devices, variant), driver), dtype) for variant in (0, 1)],
            extras(loss, dtype),
            jnp.asarray(K),
            dim=int(driver.is_stacked),
            jit=jax.jit if driver.traces else lambda window: window,
        )
        return numbers(context.run(driver.make(loss, options, where), inputs))


def expected(case):
    """What jax alone gives."""
    driver, context = DRIVERS[case.driver], CONTEXTS[case.context]
    folds_device = driver.is_stream and context.place == "mesh"
    meets = driver.is_stream and context.devices > 1
    room = K + 1 if driver.has_traced_k and context.jits != "never" else None
    return _expected(context.want, case.loss, context.devices, folds_device, meets, room)


@functools.cache
def _expected(want, name, devices, folds_device, meets, room):
    loss = LOSSES[name]
    with jax.enable_x64(True):
        inputs = Inputs(
            [floating(params(loss, variant), jnp.float64) for variant in (0, 1)],
            [floating(batch(devices, variant), jnp.float64) for variant in (0, 1)],
            extras(loss, jnp.float64),
            K,
        )
        return numbers(want(window(name, devices, folds_device, meets, room), inputs))


def tolerance(case):
    """The largest error that is due to rounding, beside the largest entry."""
    loss = LOSSES[case.loss]
    if case.prepare == "cast":
        return max(loss.tolerance, 0.05)
    return 1e-10 if case.context == "x64" and not (loss.exact or loss.dtype) else loss.tolerance


def errors(got, want):
    """For each entry of a dict the largest error in its tree, beside the largest number in that; NaN for NaN."""
    found = {}
    for name, tree in got.items():
        leaves, wanted = jax.tree.leaves(tree), jax.tree.leaves(want[name])
        assert [x.shape for x in leaves] == [y.shape for y in wanted], name
        size = max([np.abs(y).max() for y in wanted], default=0) or 1
        found[name] = np.max(
            [np.abs(x.astype(float) - y).max() / size for x, y in zip(leaves, wanted, strict=True)] or [0.0]
        )
    return found
