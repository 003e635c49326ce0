"""The contexts of the matrix: how a window is called, and how the same follows from plain calls of the reference."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from devices import KINDS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 2
LOCAL = ("losses", "aux")  # what each device has of its own
NAMES = "params", "batches", "extras", "k"  # the arguments of a window


class Inputs(NamedTuple):
    """What a window is called with.

    Attributes:
      params: two trees of parameters.
      batches: two batches.
      extras: the key or the carry.
      k: K.
      dim: the axis of the batch that is split over devices.
      jit: jax.jit, or the identity for a window that can't be traced.
    """

    params: list[Any]
    batches: list[Any]
    extras: tuple[Any, ...]
    k: Any
    dim: int = 0
    jit: Callable[..., Any] = jax.jit

    def plain(self):
        return self.params[0], self.batches[0], self.extras, self.k


class Context(NamedTuple):
    """A context of the matrix.

    Attributes:
      run: `run(window, inputs)` calls a driver's window.
      want: the same of the reference, by plain calls of it or its derivative.
      place: None, "axis_name", "mesh" or "sharded".
      jits: whether it calls the window under jit: always, never, or where the window can be traced.
      is_reverse: it differentiates in reverse mode.
      kind: that of the mesh's axes.
      around: a context manager to be in.
    """

    run: Callable[..., Any]
    want: Callable[..., Any]
    place: str | None = None
    jits: str = "always"
    is_reverse: bool = False
    kind: str = "auto"
    around: Callable[[], Any] = contextlib.nullcontext

    @property
    def devices(self):
        return DEVICES if self.place in ("axis_name", "mesh") else 1

    @property
    def mesh(self):
        return mesh_of(self.kind)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def eager(window, inputs):
    return window(*inputs.plain())


def jit(window, inputs):
    return inputs.jit(window)(*inputs.plain())


def mapped(over, before=lambda f: f, after=lambda f: f):
    """`jax.vmap` over some of "params", "batches" and "k", with something before and after it."""

    def run(window, inputs):
        params = stack(inputs.params) if "params" in over else inputs.params[0]
        batch = stack(inputs.batches) if "batches" in over else inputs.batches[0]
        k = jnp.stack([inputs.k, inputs.k - 1]) if "k" in over else inputs.k
        axes = tuple(0 if name in over else None for name in NAMES)
        return after(jax.vmap(before(window), axes))(params, batch, inputs.extras, k)

    return run


def one_by_one(over):
    """What `mapped` is, without vmap."""

    def want(window, inputs):
        first = inputs.plain()
        other = inputs.params[1], inputs.batches[1], inputs.extras, inputs.k - 1
        second = [b if name in over else a for name, a, b in zip(NAMES, first, other, strict=True)]
        return stack([window(*first), window(*second)])

    return want


def of_params(inputs, transform):
    """Applies `transform(function of the parameters)` under jit, K an argument."""
    params, batch, extras, k = inputs.plain()

    def decorate(window):
        run = lambda params, batch, extras, k: transform(lambda p: window(p, batch, extras, k))(params)
        static = 3 if isinstance(k, int) else ()
        return jax.jit(run, static_argnums=static)(params, batch, extras, k)

    return decorate


def smooth(outcome):
    """The differentiable part of an outcome."""
    is_floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return {name: [x for x in jax.tree.leaves(tree) if is_floating(x)] for name, tree in outcome.items()}


def product(a, b):
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def grad(window, inputs, wrap=lambda f: f):
    """The gradient of half the square of the gradient."""
    square = lambda grads: product(grads, grads) / 2
    transform = lambda f: lambda p: {"grad": jax.grad(lambda p: square(wrap(f)(p)["grads"]))(p)}
    return of_params(inputs, transform)(window)


def checkpoint(window, inputs):
    return grad(window, inputs, jax.checkpoint)


def jacobian(transform):
    return lambda window, inputs: of_params(inputs, lambda f: transform(lambda p: smooth(f(p))))(window)


def jvp(window, inputs):
    tangent = inputs.params[1]
    transform = lambda f: lambda p: jax.jvp(lambda p: smooth(f(p)), (p,), (tangent,))[1]
    return of_params(inputs, transform)(window)


def hessian_vector_product(window, inputs):
    vector = inputs.params[1]
    transform = lambda f: lambda p: {"product": jax.grad(lambda p: product(f(p)["grads"], vector))(p)}
    return of_params(inputs, transform)(window)


def descended(params, grads):
    return jax.tree.map(lambda p, g: p - g / 4, params, grads)


def scan(window, inputs):
    """Windows of a training loop."""

    def train(params, batches, extras, k):
        def step(params, batch):
            outcome = window(params, batch, extras, k)
            return descended(params, outcome["grads"]), outcome

        return jax.lax.scan(step, params, batches)[1]

    return jax.jit(train)(inputs.params[0], stack(inputs.batches), inputs.extras, inputs.k)


def in_turn(window, inputs):
    """What `scan` is, without scan."""
    params, outcomes = inputs.params[0], []
    for batch in inputs.batches:
        outcomes.append(window(params, batch, inputs.extras, inputs.k))
        params = descended(params, outcomes[-1]["grads"])
    return stack(outcomes)


def cond(window, inputs):
    return jax.jit(lambda *args: jax.lax.cond(args[-1] > 0, window, window, *args))(*inputs.plain())


def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(KINDS[kind],), devices=jax.devices()[:DEVICES])


def rows(inputs):
    """How a batch is split over the devices."""
    return P(*[None] * inputs.dim, "data")


def apart(outcome):
    """(what all devices have in common, what each has of its own)."""
    return tuple({n: x for n, x in outcome.items() if (n in LOCAL) == is_local} for is_local in (False, True))


def shard_map(check_vma):
    def run(window, inputs):
        def body(*args):
            common, local = apart(window(*args))
            return common, jax.tree.map(lambda x: x[:, None], local)

        specs = {"in_specs": (P(), rows(inputs), P(), P()), "out_specs": (P(), P(None, "data"))}
        run = jax.jit(jax.shard_map(body, mesh=mesh_of("auto"), check_vma=check_vma, **specs))
        common, local = run(*inputs.plain())
        return {**common, **local}

    return run


def pmap(window, inputs):
    params, batch, extras, k = inputs.plain()
    split = lambda x: x.reshape(*x.shape[: inputs.dim], DEVICES, -1, *x.shape[inputs.dim + 1 :])
    options = {"in_axes": (None, inputs.dim, None, None), "out_axes": (None, 1), "devices": jax.devices()[:DEVICES]}
    run = jax.pmap(lambda *args: apart(window(*args)), axis_name="data", **options)
    common, local = run(params, jax.tree.map(split, batch), extras, k)
    return {**common, **local}


def on_mesh(kind):
    """Jitted, with the batch split over the devices of a mesh."""

    def run(window, inputs):
        params, batch, extras, k = inputs.plain()
        mesh = mesh_of(kind)
        params, extras, k = jax.device_put((params, extras, k), NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, rows(inputs)))
        return inputs.jit(window)(params, batch, extras, k)

    return run


def export(window, inputs):
    return jax.export.export(jax.jit(window))(*inputs.plain()).call(*inputs.plain())


jacrev = jacobian(jax.jacrev)
CONTEXTS = {
    "eager": Context(eager, eager, jits="never"),
    "jit": Context(lambda window, inputs: jax.jit(window)(*inputs.plain()), eager),
    "vmap_params": Context(mapped(["params"]), one_by_one(["params"]), jits="never"),
    "vmap_batches": Context(mapped(["batches"]), one_by_one(["batches"]), jits="never"),
    "vmap_k": Context(mapped(["k"], after=jax.jit), one_by_one(["k"])),
    "vmap_both": Context(mapped(["params", "batches"]), one_by_one(["params", "batches"]), jits="never"),
    "vmap_jit": Context(mapped(["params"], before=jax.jit), one_by_one(["params"])),
    "jit_vmap": Context(mapped(["params", "batches"], after=jax.jit), one_by_one(["params", "batches"])),
    "grad": Context(grad, grad, is_reverse=True),
    "jacfwd": Context(jacobian(jax.jacfwd), jacrev),
    "jacrev": Context(jacrev, jacrev, is_reverse=True),
    "jvp": Context(jvp, jvp),
    "hvp": Context(hessian_vector_product, hessian_vector_product, is_reverse=True),
    "scan": Context(scan, in_turn),
    "cond": Context(cond, eager),
    "checkpoint": Context(checkpoint, grad, is_reverse=True),
    "shard_map": Context(shard_map(True), eager, "axis_name"),
    "shard_map_without_vma": Context(shard_map(False), eager, "axis_name"),
    "pmap": Context(pmap, eager, "axis_name"),
    "mesh_auto": Context(on_mesh("auto"), eager, "mesh", jits="where it can"),
    "mesh_explicit": Context(on_mesh("explicit"), eager, "mesh", jits="where it can", kind="explicit"),
    "sharded_auto": Context(on_mesh("auto"), eager, "sharded", jits="where it can"),
    "sharded_explicit": Context(on_mesh("explicit"), eager, "sharded", jits="where it can"),
    "export": Context(export, eager),
    "strict": Context(jit, eager, jits="where it can", around=lambda: jax.numpy_dtype_promotion("strict")),
    "x64": Context(jit, eager, jits="where it can", around=lambda: jax.enable_x64(True)),
}
