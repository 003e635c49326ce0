"""Random configurations of every driver, what each gives, what jax alone gives in float64, and the smallest failure.

A configuration is a dict of JSON values: "kind" is "window", of `value_and_grad`, "stream", of micro-steps, or
"trainer". Every other entry is an option, and the table of its kind in `TABLES` lists its values, the plainest first.
"""

import functools
import json
import random
import warnings
from typing import Any, NamedTuple

import fuzzing_trainer
import jax
import jax.numpy as jnp
import matrix_cases
import matrix_drivers
import numpy as np
import optax
from devices import KINDS
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matrix_contexts import CONTEXTS, Inputs
from matrix_losses import LOSSES, batch, extras, params

import jaxaccum

DTYPES = {None: None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}
WINDOW = {
    "driver": ["stacked", "value_and_grad", "traced_k"],
    "context": ["jit", *CONTEXTS],
    "loss": list(LOSSES),
    "prepare": list(matrix_cases.PREPARES),
    "in_place": list(matrix_cases.IN_PLACE),
    "k": [2, 1, 3, 4, 5],
    "n": [1, 2, 3],
    "unroll": [1, 2, 3],
    "accumulator": ["float32", None, "bfloat16"],
    "grad_dtype": [None, "float32", "bfloat16"],
    "scatter": [False, True],
    "empty": [0, 1, 2],  # How many micro-batches weigh nothing and are NaN.
    "seed": list(range(8)),
}
STREAM = {
    "driver": ["micro_step", "update", "apply", "host_driven"],
    "boundary": ["counter", "static", "traced"],
    "place": ["one", "pmap", "shard_map", "shard_map_without_vma", "auto", "explicit", "zero", "zero_explicit"],
    "around": ["jit", "eager", "scan", "vmap"],
    "loss": ["dense", *(name for name, x in LOSSES.items() if not x.extra and not x.has_aux and name != "callback")],
    "prepare": ["none", "cast"],
    "in_place": list(matrix_cases.IN_PLACE),
    "use_grad_mean": [True, False],
    "nonfinite": ["propagate", "drop"],
    "skips": [False, True],
    "accumulator": ["float32", None, "bfloat16"],
    "devices": [2, 1, 4],
    "k": [2, 1, 3],
    "n": [1, 2],
    "seed": list(range(8)),
}
TABLES = {"window": WINDOW, "stream": STREAM, "trainer": fuzzing_trainer.TRAINER}
# What a stream may meet. A list of these is the option "events".
EVENTS = ["step", "heavy", "empty", "nan", "k 1", "k 3", "flush", "move 1", "move 4", "host"]
BATCHES = ["weighted", "per_device", "global"]
MOST = 64  # micro-batches of all devices in one window


def drawn(rng):
    """A possible configuration."""
    while True:
        kind = rng.choice(["window", "stream", "stream", "trainer"])
        # Half of the options are plain, so that each failure is of few.
        config = {name: rng.choice([values[0], rng.choice(values)]) for name, values in TABLES[kind].items()}
        config = {"kind": kind, **config}
        if kind == "stream":
            config["events"] = [rng.choice(["step", "step", rng.choice(EVENTS)]) for _ in range(rng.randint(3, 9))]
            config["batch"] = rng.choice(BATCHES)
        if why_refused(config) is None:
            return config


def why_refused(config):
    """Why the library can't do this, or None."""
    refused = {"window": _window_refused, "stream": _stream_refused, "trainer": fuzzing_trainer.why_refused}
    return refused[config["kind"]](config)


def _window_refused(c):
    case = matrix_cases.Case(c["driver"], c["context"], c["loss"], c["prepare"], c["in_place"])
    context, loss = CONTEXTS[c["context"]], LOSSES[c["loss"]]
    rules = {
        "by the matrix": matrix_cases.impossible(case),
        "unroll": c["unroll"] > 1 and c["driver"] == "traced_k",
        "an unrolled loop needs all rows": c["unroll"] > 1 and c["driver"] == "stacked" and c["k"] > 0,
        "only a mesh scatters": c["scatter"] and context.place != "mesh",
        "no gradient of a rounded gradient": context.is_reverse and c["grad_dtype"] == "bfloat16",
        "vmap_k takes one less": c["context"] == "vmap_k" and c["k"] < 2,
        "a batch that P doesn't divide": context.place == "sharded" and c["n"] % 2,
        "only a mask can be empty": c["empty"] and c["loss"] not in ("weighted", "quantised"),
        "something must count": c["empty"] >= c["k"] - (c["context"] == "vmap_k"),
        "strict promotion": c["context"] == "strict" and loss.dtype is not None,
        "a cast is of the layers' sums": c["in_place"] == "in_place" and c["accumulator"] != "float32",
        "NaN in what is differentiated twice": c["empty"] and (context.is_reverse or c["context"] in ("jacfwd", "jvp")),
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def _stream_refused(c):
    events = " ".join(c["events"])
    several, mapped = c["place"] != "one", c["place"] in ("pmap", "shard_map", "shard_map_without_vma")
    gradients = c["driver"] in ("update", "apply")
    weighs = c["loss"] in ("weighted", "quantised")
    rules = {
        "a weight with a derivative": c["loss"] == "varying_weight",
        "gradients of parameters": gradients and (c["prepare"] == "cast" or c["in_place"] != "default"),
        "a weight is passed with a gradient": "heavy" in events and not gradients,
        "nothing can be empty": "empty" in events and not (gradients or weighs),
        "a NaN that nothing drops": "nan" in events and c["nonfinite"] == "propagate" and not c["skips"],
        "the host counts": c["driver"] == "host_driven"
        and (mapped or c["skips"] or c["around"] != "eager" or c["boundary"] != "counter"),
        "devices could skip apart": c["skips"] and several,
        "what can't be removed is not added": c["in_place"] == "in_place" and (c["skips"] or c["nonfinite"] == "drop"),
        "a cast has another dtype than its sums": c["in_place"] == "in_place"
        and (c["prepare"] == "cast" or c["accumulator"] != "float32"),
        "a loop is on the device": c["around"] == "scan" and c["boundary"] == "static",
        "vmap": c["around"] == "vmap" and (several or c["driver"] == "host_driven"),
        "a mapped function is compiled": mapped and c["around"] in ("eager", "scan"),
        "nothing moves on one device": "move" in events and (not several or c["place"].startswith("shard_map")),
        "a weighted loss is not global": "move" in events and c["batch"] == "global" and (weighs or gradients),
        "a scan whose start is constant": c["place"] == "shard_map" and c["loss"] == "constant_start",
        "a gather on explicit axes": "explicit" in c["place"] and c["loss"] == "embedding",
        "static boundaries of the host's": c["boundary"] == "static" and c["around"] == "eager" and mapped,
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def tolerance(config):
    """The largest error that is due to rounding, beside the largest entry."""
    if config["kind"] == "trainer":
        return 1e-5
    loss = LOSSES[config["loss"]]
    low = [config["accumulator"] == "bfloat16", config.get("grad_dtype") == "bfloat16", config["prepare"] == "cast"]
    low.append(config["accumulator"] is None and loss.dtype is not None)
    scale = 1 if config["kind"] == "window" else 4  # Errors of several windows.
    return scale * max(loss.tolerance, 0.06 if any(low) else 0)


def failure(config):
    """What is wrong with a configuration: a line, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs = {"window": _window, "stream": _stream, "trainer": _trained}
            got, want = runs[config["kind"]](config)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        errors = matrix_cases.errors(got, want)
    except AssertionError as error:
        return f"shapes of {error}"
    wrong = {name: error for name, error in errors.items() if not error <= tolerance(config)}
    return f"{', '.join(wrong)} off by {', '.join(f'{error:.1e}' for error in wrong.values())}" if wrong else None


def smallest(config):
    """A configuration that fails in the same way, with as many plain options and as few events as can be."""
    kind = lambda found: found and found.split(" ")[0]
    wanted = kind(failure(config))
    fails = lambda other: why_refused(other) is None and kind(failure(other)) == wanted
    changed = True
    while changed:
        changed = False
        for other in _plainer(config):
            if fails(other):
                config, changed = other, True
                break
    return config


def _plainer(config):
    """Configurations that are simpler by one option or one event."""
    events = config.get("events", [])
    for i in range(len(events)):
        if len(events) > 1:
            yield {**config, "events": [*events[:i], *events[i + 1 :]]}
    for name, values in TABLES[config["kind"]].items():
        for value in values[: values.index(config[name])]:
            yield {**config, name: value}
    for i, event in enumerate(events):
        if event != "step":
            yield {**config, "events": [*events[:i], "step", *events[i + 1 :]]}


def report(config):
    """The failure, and the command that shows it again."""
    small = smallest(config)
    return f"{failure(small)}\n  python tests/fuzz.py --only '{json.dumps(small)}'"


# Windows: a driver of the matrix in one of its contexts, with more options.


def _window(c):
    loss, context, driver = LOSSES[c["loss"]], CONTEXTS[c["context"]], matrix_drivers.DRIVERS[c["driver"]]
    k = c["k"]
    options = {"prepare": matrix_cases.PREPARES[c["prepare"]], "in_place": matrix_cases.IN_PLACE[c["in_place"]]}
    options |= {name: DTYPES[c[key]] for name, key in (("accumulator_dtype", "accumulator"), ("grad_dtype",) * 2)}
    options |= {"unroll": c["unroll"], "reduce": "scatter" if c["scatter"] else "mean"}
    where = {"axis_name": {"axis_name": "data"}, "mesh": {"mesh": context.mesh}}.get(context.place, {})
    raw = [batch(context.devices, 2 * c["seed"] + variant, k, c["n"]) for variant in (0, 1)]
    for data in raw:
        data["mask"][:, : c["empty"]] = 0
    holes = lambda data: {**data, "x": np.where(data["mask"][..., None] == 0, np.nan, data["x"])}
    trees = [params(loss, 2 * c["seed"] + variant) for variant in (0, 1)]
    with context.around():
        dtype = jnp.result_type(float)
        inputs = Inputs(
            [matrix_cases.floating(tree, loss.dtype or dtype) for tree in trees],
            [matrix_cases.floating(matrix_cases.layout(holes(data), driver), dtype) for data in raw],
            extras(loss, dtype),
            jnp.asarray(k),
            dim=int(driver.is_stacked),
        )
        window = matrix_drivers.value_and_grad(
            loss, options, where, stacked=driver.is_stacked, traced=driver.has_traced_k, static_k=k
        )
        got = matrix_cases.numbers(context.run(window, inputs))
    room = k + 1 if driver.has_traced_k and context.jits != "never" else None
    with jax.enable_x64(True):
        inputs = Inputs(
            [matrix_cases.floating(tree, jnp.float64) for tree in trees],
            [matrix_cases.floating(data, jnp.float64) for data in raw],
            extras(loss, jnp.float64),
            k,
        )
        window = matrix_cases.window(c["loss"], context.devices, False, False, room)
        return got, matrix_cases.numbers(context.want(window, inputs))


# Streams: micro-steps one after the other, and what a host does between them.


class Given(NamedTuple):
    """One micro-batch of all devices.

    Attributes:
      data: leaves (P, N, ...).
      weight: of its gradient.
      is_nan: whether what the driver sees is NaN.
    """

    data: Any
    weight: float = 1.0
    is_nan: bool = False

    def seen(self):
        """The data that the driver sees, (P, N, ...)."""
        return {**self.data, "x": np.where(self.is_nan, np.nan, self.data["x"])}


def _optimizer():
    return optax.sgd(0.25, momentum=0.5)


@functools.cache
def _whole(name, mean):
    """The gradient of all micro-batches (M, N, ...) of a window at once, each with a factor."""
    loss = LOSSES[name]
    fun = loss.exact or loss.fun

    def sums(p, stack):
        value = fun(p, stack)
        return value if isinstance(value, jaxaccum.Weighted) else (value, 1.0)

    def each(p, stack, factors):
        """The sum of each micro-batch's own gradient, where a backward pass is not linear."""
        used = factors / jnp.sum(factors) if mean else factors
        grads = jax.vmap(jax.grad(fun), (None, 0))(p, stack)
        return jax.tree.map(lambda g: jnp.tensordot(used, g, axes=1), grads)

    def total(p, stack, factors):
        totals, weights = jax.vmap(sums, (None, 0))(p, stack)
        weights = jnp.broadcast_to(weights, factors.shape)
        used = factors * (weights > 0)
        result = jnp.sum(jnp.where(used > 0, used * totals, 0))
        return result / jnp.sum(used * weights) if mean else result

    return jax.jit(jax.grad(total) if loss.is_mean else each)


class Reference:
    """A stream in float64: the pending micro-batches, and the bare optimizer on all of them at each boundary."""

    def __init__(self, c, p):
        self.c, self.every_k, self.steps = c, c["k"], 0
        with jax.enable_x64(True):
            self.params = matrix_cases.floating(p, jnp.float64)
            self.state = _optimizer().init(self.params)
        self._open()

    def _open(self):
        self.pending, self.factors, self.count = [], [], 0

    def step(self, given):
        """Adds a micro-batch; returns whether it closes the window if it is not skipped."""
        if given.is_nan and self.c["skips"]:
            return self.count + 1 >= self.every_k
        devices = len(given.data["x"])
        weight = 0.0 if given.is_nan else given.weight
        self.pending += [{name: x[p] for name, x in given.data.items()} for p in range(devices)]
        self.factors += [weight / (1 if self.c["use_grad_mean"] else devices)] * devices
        self.count += 1
        closes = self.count >= self.every_k
        if closes:
            self.close()
        return closes

    def moved(self, before, after):
        """A global batch on another number of devices weighs as much as before."""
        if self.c["batch"] == "global" and self.c["use_grad_mean"]:
            self.factors = [factor * after / before for factor in self.factors]

    def weighs(self):
        """The window's total weight."""
        weighted = "mask" if self.c["loss"] in ("weighted", "quantised") else None
        pairs = zip(self.factors, self.pending, strict=True)
        return sum(factor * (data["mask"].sum() if weighted else 1.0) for factor, data in pairs)

    def close(self):
        if self.count and self.weighs():
            with jax.enable_x64(True):
                missing = MOST - len(self.pending)
                assert missing >= 0
                stack = [*self.pending, *[self.pending[0]] * missing]
                stack = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *stack)
                factors = jnp.asarray([*self.factors, *[0.0] * missing])
                gradient = _whole(self.c["loss"], self.c["use_grad_mean"])
                grads = gradient(self.params, matrix_cases.floating(stack, jnp.float64), factors)
                updates, self.state = _optimizer().update(grads, self.state, self.params)
                self.params = optax.apply_updates(self.params, updates)
            self.steps += 1
        self._open()


class Driver:
    """`MultiSteps` of a configuration, on some devices."""

    def __init__(self, c, devices, p, data):
        self.c, self.devices, self.loss = c, devices, LOSSES[c["loss"]]
        place = c["place"]
        self.mapped = place in ("pmap", "shard_map", "shard_map_without_vma")
        self.mesh = None
        where = {}
        if self.mapped:
            where = {"axis_name": "data"}
        elif place != "one":
            kind = KINDS["explicit" if "explicit" in place else "auto"]
            self.mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
            where = {"mesh": self.mesh, "reduce": "scatter" if "zero" in place else "mean"}
        options = {"prepare": matrix_cases.PREPARES[c["prepare"]]}
        if c["prepare"] == "cast":
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (p, data))
            options["prepare"] = options["prepare"].seeing(self.loss.fun, *shapes)
        self.tx = jaxaccum.MultiSteps(
            _optimizer(),
            c["k"],
            c["use_grad_mean"],
            optax.skip_not_finite if c["skips"] else None,
            DTYPES[c["accumulator"]],
            in_place=matrix_cases.IN_PLACE[c["in_place"]],
            nonfinite=c["nonfinite"],
            **options,
            **where,
        )
        self.host = jaxaccum.HostDriven(self.tx, self.loss.fun) if c["driver"] == "host_driven" else None
        self.step = self._step()
        self.flush = self.over(self._flush, 2)

    def placed(self, tree):
        """Parameters on the devices; with a mapped axis, one copy for each."""
        if self.mapped:
            return jax.tree.map(lambda x: jnp.stack([x] * self.devices), tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P())) if self.mesh is not None else tree

    def one(self, tree):
        return jax.tree.map(lambda x: x[0], tree) if self.mapped else tree

    def rows(self, data):
        """(P, N, ...) as a micro-step takes them."""
        data = matrix_cases.floating(data, jnp.float32)
        if self.mapped:
            return data
        data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)
        return jax.device_put(data, NamedSharding(self.mesh, P("data"))) if self.mesh is not None else data

    def _flush(self, p, s):
        if self.host is not None:
            return self.host.flush(p, s)
        updates, s = self.tx.flush(s, p)
        return optax.apply_updates(p, updates), s

    def micro_step(self, p, s, data, weight, boundary):
        """(parameters, state) after one micro-batch."""
        tx, loss = self.tx, self.loss
        if self.host is not None:
            return self.host(p, s, data)[1:]
        if self.c["driver"] == "micro_step":
            return tx.micro_step(loss.fun, p, s, data, boundary=boundary)[1:]
        where = {} if self.mesh is None else {"mesh": self.mesh}  # Each device of a mapped axis has its own parameters.
        _, own, _, grads = matrix_drivers.gradient(loss, where, p, data, ())
        weight = weight if own is None else weight * own
        if self.c["driver"] == "apply":
            return tx.apply(p, s, grads, weight=weight, boundary=boundary)
        updates, s = tx.update(grads, s, p, weight=weight, boundary=boundary)
        return optax.apply_updates(p, updates), s

    def over(self, fun, count):
        """`fun` on the devices: its first `count` arguments are each device's, the others common to all."""
        around = self.c["around"]
        if self.c["place"] == "pmap":
            axes = lambda args: tuple(0 if i < count else None for i in range(len(args)))
            return lambda *args: jax.pmap(fun, "data", in_axes=axes(args), devices=jax.devices()[: self.devices])(*args)
        if self.mapped:
            mesh = Mesh(np.array(jax.devices()[: self.devices]), ("data",))

            def mapped(*args):
                def body(*args):
                    own = jax.tree.map(lambda x: x[0], args[:count])
                    return jax.tree.map(lambda x: x[None], fun(*own, *args[count:]))

                specs = tuple(P("data") if i < count else P() for i in range(len(args)))
                options = {"mesh": mesh, "check_vma": self.c["place"] == "shard_map"}
                return jax.jit(jax.shard_map(body, in_specs=specs, out_specs=P("data"), **options))(*args)

            return mapped
        if around == "vmap":
            axes = lambda args: tuple(0 if i < count else None for i in range(len(args)))
            return lambda *args: jax.jit(jax.vmap(fun, axes(args)))(*args)
        return fun if around == "eager" else jax.jit(fun)

    def _step(self):
        """`step(p, s, data, weight, is_last)`, of which the last two are Python numbers."""
        boundary, programs = self.c["boundary"], {}

        def step(p, s, data, weight, is_last):
            key = is_last if boundary == "static" else None
            if key not in programs:
                static = {"counter": lambda _: None, "static": lambda _: is_last, "traced": lambda last: last}[boundary]
                fun = lambda p, s, data, weight, last: self.micro_step(p, s, data, weight, static(last))
                programs[key] = self.over(fun, 3)
            return programs[key](p, s, data, jnp.float32(weight), jnp.asarray(is_last))

        return step


def through_host(tree):
    """Arrays as a checkpoint would bring them."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def _stream(c):
    """The parameters, the number of optimizer steps and the open micro-steps: (what a driver has, the reference's)."""
    loss = LOSSES[c["loss"]]
    devices = 1 if c["place"] == "one" else c["devices"]
    seeds = [c["seed"], c["seed"] + 100] if c["around"] == "vmap" else [c["seed"]]
    start = params(loss, c["seed"])
    references = [Reference(c, start) for _ in seeds]
    numbers = [iter(range(1000 * seed, 1000 * seed + 1000)) for seed in seeds]

    def given(event):
        """One micro-batch for each of the streams that are mapped over."""
        found = []
        for own in numbers:
            data = jax.tree.map(lambda x: x[:, 0], batch(devices, next(own), 1, c["n"]))
            if event == "empty":
                data["mask"] = 0 * data["mask"]
            weight = {"heavy": 2.5, "empty": 0.0}.get(event, 1.0)
            found.append(Given(data, weight, event in ("empty", "nan")))
        return found

    p = matrix_cases.floating(start, loss.dtype or jnp.float32)
    shown = jax.tree.map(lambda x: x[0], matrix_cases.floating(batch(1, 0, 1, c["n"]), jnp.float32))
    shown = jax.tree.map(lambda x: x[0], shown)
    make = lambda devices: Driver(c, devices, p, shown)
    driver = make(devices)
    stacked = c["around"] == "vmap"
    both = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees) if stacked else trees[0]
    p = driver.placed(jax.tree.map(jnp.copy, p))
    s = driver.tx.init(p if driver.mesh is not None else driver.one(p))
    if driver.mapped:
        s = driver.placed(s)
    p, s = both([p] * len(seeds)), both([s] * len(seeds))
    waiting = []  # Micro-steps of one loop on the device.

    def run(p, s):
        """Runs what waits."""
        if not waiting:
            return p, s
        data, weights, lasts = zip(*waiting, strict=True)
        waiting.clear()
        along = jax.tree.map(lambda *x: jnp.stack(x), *data), jnp.asarray(weights, jnp.float32), jnp.asarray(lasts)

        def body(carry, xs):
            data, weight, last = xs
            boundary = None if c["boundary"] == "counter" else last
            return driver.micro_step(*carry, data, weight, boundary), None

        return jax.jit(lambda p, s, along: jax.lax.scan(body, (p, s), along)[0])(p, s, along)

    for event in [*c["events"], "step"]:
        name, _, number = event.partition(" ")
        if name in ("step", "heavy", "empty", "nan"):
            rows = given(name)
            data = both([driver.rows(x.seen()) for x in rows])
            is_last, *_ = [reference.step(x) for reference, x in zip(references, rows, strict=True)]
            if c["around"] == "scan":
                waiting.append((data, rows[0].weight, is_last))
            else:
                p, s = driver.step(p, s, data, rows[0].weight, is_last)
            continue
        p, s = run(p, s)
        if name == "k":
            for reference in references:
                reference.every_k = int(number)
            if driver.host is not None:
                driver.host.every_k = int(number)
            else:
                every_k = s.every_k
                s = (
                    s._replace(every_k=jnp.full_like(every_k, int(number)))
                    if jnp.ndim(every_k)
                    else (jaxaccum.set_every_k(s, int(number)))
                )
        elif name == "flush":
            p, s = driver.flush(p, s)
            for reference in references:
                reference.close()
        elif name == "move":
            new = make(int(number))
            p, s = through_host((driver.one(p), s))
            s = new.tx.redistribute(s, *([int(number)] if new.mapped else []), batch=c["batch"])
            p = new.placed(p)
            if new.host is not None:
                new.host.every_k = references[0].every_k
            references[0].moved(devices, int(number))
            devices, driver = int(number), new
        elif name == "host" and driver.mesh is None and not driver.mapped:
            p, s = through_host((p, s))
    p, s = run(p, s)
    got = {"params": driver.one(p), "gradient_step": driver.one(s.gradient_step), "mini_step": driver.one(s.mini_step)}
    wants = [
        {
            "params": reference.params,
            "gradient_step": np.asarray(reference.steps),
            "mini_step": np.asarray(reference.count),
        }
        for reference in references
    ]
    want = jax.tree.map(lambda *x: np.stack(x), *wants) if stacked else wants[0]
    return matrix_cases.numbers(got), matrix_cases.numbers(want)


def _trained(c):
    got, want = fuzzing_trainer.run(c)
    return matrix_cases.numbers(jax.tree.map(jnp.asarray, got)), matrix_cases.numbers(jax.tree.map(np.asarray, want))


def configurations(seed, count):
    """The same ones for the same seed."""
    rng = random.Random(seed)
    return [drawn(rng) for _ in range(count)]
