"""Which backward passes are shown to be linear, rule by rule; each table is itself checked by numbers, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxaccum._jax import core, linearity

# Of backward passes: from the input `x` and a cotangent `g`, both (4,), to the gradient, (4,).
MATRIX = np.random.default_rng(0).standard_normal((4, 4))
INDEX = np.array([2, 0, 0, 1])


def scanned(body, start, along=None):
    return jax.lax.scan(body, start, along, length=3)[0]


def ruled(x, y):
    """`x * y`, by a custom_jvp."""
    f = jax.custom_jvp(jnp.multiply)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * primals[1] + primals[0] * tangents[1]))
    return f(x, y)


def owned(x, y):
    """`x * y`, by a custom_vjp."""
    f = jax.custom_vjp(jnp.multiply)
    f.defvjp(lambda x, y: (f(x, y), (x, y)), lambda kept, g: (g * kept[1], kept[0] * g))
    return f(x, y)


LINEAR = {
    "zero": lambda x, g: jnp.zeros(4),
    "zeros of another dtype": lambda x, g: jnp.zeros(4, jnp.int32).astype(g.dtype),
    "zero times": lambda x, g: 0.0 * x,
    "times zero": lambda x, g: x * 0.0,
    "zero times both": lambda x, g: 0.0 * x * g,
    "sums": lambda x, g: g + g - (-g) * 3.0,
    "a product": lambda x, g: jnp.sin(x) * g,
    "a product on the right": lambda x, g: g * jnp.sin(x),
    "a quotient": lambda x, g: g / (1 + x**2),
    "reductions": lambda x, g: jnp.cumsum(g) + jnp.sum(g) + jnp.mean(g),
    "windows": lambda x, g: jax.lax.reduce_window(g, 0.0, jax.lax.add, (2,), (1,), "SAME"),
    "parts": lambda x, g: jnp.real(jnp.conj(jax.lax.complex(g, 2 * g))) + jnp.imag(jax.lax.complex(g, g)),
    "moves": lambda x, g: jnp.concatenate([g[2:], g[::-1][:2]]).reshape(2, 2).T.ravel(),
    "padding with zeros": lambda x, g: jax.lax.pad(g[:2], 0.0, [(1, 1, 0)]),
    "padding with itself": lambda x, g: jax.lax.pad(g[:2], g[0], [(1, 1, 0)]),
    "a slice": lambda x, g: jnp.tile(jax.lax.dynamic_slice(g, (jnp.argmax(x) // 2,), (2,)), 2),
    "an updated slice": lambda x, g: jax.lax.dynamic_update_slice(g, 2 * g[:2], (jnp.argmax(x) // 2,)),
    "a slice of zeros": lambda x, g: jax.lax.dynamic_update_slice(jnp.zeros(4), g[:2], (jnp.argmax(x) // 2,)),
    "a gather": lambda x, g: g[INDEX] + g[jnp.argsort(x)],
    "a scatter": lambda x, g: g.at[jnp.argmax(x)].set(g[0]) + jnp.zeros(4).at[INDEX[:2]].set(g[:2]),
    "an adding scatter": lambda x, g: jnp.zeros(4).at[INDEX].add(g) + g.at[jnp.argmax(x)].add(g[0]),
    "a selection": lambda x, g: jnp.where(x > 0, g, 0.0) + jnp.where(x > 0, g, 2 * g),
    "matrix products": lambda x, g: MATRIX @ g + g @ MATRIX,
    "a convolution": lambda x, g: jnp.convolve(g, MATRIX[0], mode="same"),
    "a triangular solve": lambda x, g: jax.scipy.linalg.solve_triangular(MATRIX, g),
    "casts": lambda x, g: g.astype(jnp.float32).astype(jnp.bfloat16).astype(jnp.float32).astype(jnp.float64),
    "a cast of a constant": lambda x, g: jnp.argsort(x).astype(jnp.float16).astype(g.dtype) * g,
    "a jit": jax.jit(lambda x, g: x * g),
    "a checkpoint": jax.checkpoint(lambda x, g: x * g),
    "a custom_jvp": ruled,
    "a custom_vjp": owned,
    "a barrier": lambda x, g: jax.lax.optimization_barrier((x, g))[1],
    "a conditional": lambda x, g: jax.lax.cond(x[0] > 0, lambda g, x: x * g, lambda g, x: g, g, x),
    "a loop": lambda x, g: scanned(lambda g, x: (g * x, None), g, jnp.stack([x, x, x])),
    "a loop from zero": lambda x, g: scanned(lambda c, _: (c + x * g, None), jnp.zeros(4)),
    "a loop that hands on": lambda x, g: scanned(lambda c, _: ((c[1], c[0] * x, c[2]), None), (g, g, x))[0],
    "a loop's rows": lambda x, g: jax.lax.scan(lambda c, g: (c + g, 2 * c), 0.0, g)[1],
    "the backward pass of a function of jax's": lambda x, g: jax.vjp(jax.nn.gelu, x)[1](g)[0],
}
OTHER = {
    "the input": lambda x, g: x,
    "one": lambda x, g: jnp.ones(4),
    "a constant": lambda x, g: jnp.asarray(MATRIX[0]),
    "ones of another dtype": lambda x, g: jnp.ones(4, jnp.int32).astype(g.dtype),
    "a sum with the input": lambda x, g: g + x,
    "a sum with a function of the input": lambda x, g: g + jnp.sin(x),
    "a sum with one": lambda x, g: 1.0 + g,
    "a square": lambda x, g: g * g,
    "a power": lambda x, g: g**3,
    "a clip": lambda x, g: jnp.clip(g, -1, 1),
    "a division by it": lambda x, g: x / g,
    "a norm": lambda x, g: g / jnp.linalg.norm(g),
    "a selection by it": lambda x, g: jnp.where(g > 0, g, 0.0),
    "a selection of one": lambda x, g: jnp.where(x > 0, g, 1.0),
    "padding with one": lambda x, g: jax.lax.pad(g[:2], 1.0, [(1, 1, 0)]),
    "a slice by it": lambda x, g: jnp.tile(jax.lax.dynamic_slice(g, (jnp.argmax(g) // 2,), (2,)), 2),
    "an updated slice by it": lambda x, g: jax.lax.dynamic_update_slice(g, g[:2], (jnp.argmax(g) // 2,)),
    "a slice of ones": lambda x, g: jax.lax.dynamic_update_slice(g, jnp.ones(2), (jnp.argmax(x) // 2,)),
    "a gather by it": lambda x, g: x[jnp.argsort(g)],
    "a scatter by it": lambda x, g: g.at[jnp.argmax(g)].set(0.0),
    "a scatter of ones": lambda x, g: g.at[INDEX].set(1.0),
    "a scatter by a product": lambda x, g: g.at[INDEX].multiply(g),
    "a product with itself": lambda x, g: jnp.outer(g, g)[0],
    "a product of products": lambda x, g: MATRIX @ (g * g),
    "a solve by it": lambda x, g: jax.scipy.linalg.solve_triangular(jnp.diag(g), x),
    "a cast to an integer": lambda x, g: g.astype(jnp.int32).astype(g.dtype),
    "a cast to a smaller range": lambda x, g: (1e4 * g).astype(jnp.float16).astype(g.dtype),
    "a cast in two steps": lambda x, g: (1e4 * g.astype(jnp.float32)).astype(jnp.float16).astype(g.dtype),
    "a jit": jax.jit(lambda x, g: x + g),
    "a checkpoint": lambda x, g: jax.checkpoint(jnp.tanh)(g),
    "a custom_jvp": lambda x, g: ruled(g, g),
    "a custom_vjp": lambda x, g: owned(g, g),
    "a barrier": lambda x, g: jax.lax.optimization_barrier((x, g))[0],
    "a conditional": lambda x, g: jax.lax.cond(x[0] > 0, lambda x, g: g, lambda x, g: x, x, g),
    "the other branch": lambda x, g: jax.lax.cond(x[0] < 0, lambda x, g: x, lambda x, g: g, x, g),
    "a conditional on it": lambda x, g: jax.lax.cond(g[0] > 0, lambda x, g: g, lambda x, g: 2 * g, x, g),
    "a loop": lambda x, g: scanned(lambda c, x: (jnp.tanh(c), None), g, jnp.stack([x, x, x])),
    "a loop from the input": lambda x, g: scanned(lambda c, _: (c + g, None), x),
    "a loop's rows": lambda x, g: jax.lax.scan(lambda c, g: (c * g, c), 1.0, g)[1],
    "a sort": lambda x, g: jnp.sort(g),
    "a loop's third pass": lambda x, g: scanned(lambda c, _: ((*c[1:], g), None), (0 * g, 0 * g, 0 * g, x))[0],
    "a loop to a limit": lambda x, g: jax.lax.while_loop(lambda g: g[0] < 1, lambda g: g + 1, g),
}


def with_rule(backward):
    """`sin`, by a custom_vjp with the gradient `backward(x, g)`."""

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, g: (backward(x, g),))
    return sine


def unproved(fun, *args):
    return linearity.unproved(jax.make_jaxpr(fun)(*args).jaxpr)


def is_linear_in_numbers(backward):
    x, a, b = np.array([[-1.0, 2.0, 0.5, 3.0], [1.0, -2.0, 3.0, 0.5], [-4.0, 1.5, 1.0, 0.25]])
    f = lambda g: np.asarray(backward(x, jnp.asarray(g)), np.float64)
    close = lambda a, b: np.allclose(a, b, rtol=1e-2, atol=1e-2)  # Of a cast to bfloat16.
    return all(close(f(s * (a + b)), s * (f(a) + f(b))) for s in (1, 4, 1e2))


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_backward_pass(name):
    """Catches one that is not recognised: its product's sum is selected, or a `prepare` refused."""
    with jax.enable_x64(True):
        assert is_linear_in_numbers(LINEAR[name])
        assert unproved(with_rule(LINEAR[name]), jnp.ones(4)) is None


@pytest.mark.parametrize("name", OTHER)
def test_another_backward_pass(name):
    """Catches one that is taken for linear, and run once on a sum of cotangents."""
    with jax.enable_x64(True):
        assert not is_linear_in_numbers(OTHER[name])
        assert unproved(with_rule(OTHER[name]), jnp.ones(4)) == "sine"


def test_a_backward_pass_with_an_effect():
    """Catches a callback that would run once a window, and not for each micro-batch."""

    def backward(x, g):
        jax.debug.callback(lambda g: None, g)
        return x * g

    assert unproved(with_rule(backward), jnp.ones(4)) == "sine"


@pytest.mark.parametrize("of_two", [False, True])
def test_the_backward_pass_of_attention(of_two):
    """Catches cuDNN's taken for one that is linear in other operands too, or in none."""
    attention = core.Primitive("dot_product_attention_bwd")
    attention.def_abstract_eval(lambda *operands: operands[0])
    rule = with_rule(lambda x, g: attention.bind(x, g if of_two else x, g))
    assert unproved(rule, jnp.ones(4)) == ("sine" if of_two else None)


def split(backward, none=None):
    """(x, x of an integer, the integers) by a custom_vjp, whose cotangents `backward` gets."""
    f = jax.custom_vjp(lambda x, i: (x, x * i, i))
    f.defvjp(lambda x, i: (f(x, i), i), lambda i, given: (backward(*given[:2], i), none))
    return f


def test_integers_among_operands_and_results():
    """Catches a cotangent of an integer counted as one, or a rule that is not traced since it has integers."""
    i = jnp.arange(4)
    assert unproved(split(lambda g, h, i: g + h * i), jnp.ones(4), i) is None
    none = np.zeros(4, jax.dtypes.float0)
    assert unproved(split(lambda g, h, i: g + h * i, none), jnp.ones(4), i) is None
    assert unproved(split(lambda g, h, i: g * h), jnp.ones(4), i) == "<lambda>"
    assert unproved(split(lambda g, h, i: g + i), jnp.ones(4), i) == "<lambda>"


@pytest.mark.parametrize("order", [1, -1])
def test_each_gradient_counts(order):
    """Catches a rule of which one operand's gradient is linear, and another's is not."""
    f = jax.custom_vjp(jnp.multiply)
    f.defvjp(lambda x, y: (f(x, y), None), lambda _, g: (g, g**2)[::order])
    assert unproved(f, jnp.ones(4), jnp.ones(4)) is not None


CLIPPED, DOUBLED = with_rule(OTHER["a clip"]), with_rule(LINEAR["sums"])
AROUND = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: scanned(lambda c, _: (f(c), None), x),
    "cond": lambda f: lambda x: jax.lax.cond(x[0] > 0, lambda x: x, f, x),
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None]),
    "an earlier one": lambda f: lambda x: f(DOUBLED(x)),
    "a later one": lambda f: lambda x: DOUBLED(f(x)),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_rule_inside(around):
    """Catches a body that is not searched."""
    assert unproved(AROUND[around](CLIPPED), jnp.ones(4)) == "sine"
    assert unproved(AROUND[around](DOUBLED), jnp.ones(4)) is None


def jvp_rule(body, tangent):
    """A custom_jvp of `body`, with `sin` and `tangent(x, its tangent)` in its rule."""

    @jax.custom_jvp
    def own(x):
        return body(x)

    own.defjvp(lambda primals, tangents: (jnp.sin(*primals), tangent(*primals, *tangents)))
    return own


def test_the_rule_of_a_custom_jvp_counts_and_not_its_body():
    """Catches a clip in a rule that is passed over, and one in a body, which jax doesn't differentiate."""
    x = jnp.ones(4)
    times = lambda x, dx: x * dx
    assert unproved(jvp_rule(jnp.sin, times), x) is None
    assert unproved(jvp_rule(CLIPPED, times), x) is None
    assert unproved(jvp_rule(jnp.sin, lambda x, dx: CLIPPED(dx)), x) == "sine"
    assert unproved(jax.jit(jvp_rule(jnp.sin, lambda x, dx: CLIPPED(dx))), x) == "sine"
    # jax inlines what a rule calls, here the body of another one.
    assert unproved(jvp_rule(jnp.sin, lambda x, dx: jvp_rule(CLIPPED, times)(x) * dx), x) == "sine"
    assert unproved(jvp_rule(jnp.sin, lambda x, dx: jvp_rule(jnp.sin, times)(dx)), x) is None


def test_a_rule_that_can_not_be_traced():
    """Catches the rule's own error raised from an analysis, and its function taken for linear."""

    def refuse(x, g):
        raise ValueError("no derivative")

    assert unproved(with_rule(refuse), jnp.ones(4)) == "sine"
    assert unproved(jvp_rule(jnp.sin, refuse), jnp.ones(4)) == "own"


def test_a_custom_jvp_with_an_integer_operand():
    """Catches a rule that gets a float tangent for an integer."""
    f = jax.custom_jvp(lambda x, i: x * i)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * primals[1]))
    assert unproved(f, jnp.ones(4), jnp.arange(4)) is None
    assert unproved(lambda x, i: f(CLIPPED(x), i), jnp.ones(4), jnp.arange(4)) == "sine"


def communicates(fun):
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    found = []

    def body(x):
        found.append(linearity.communicates(jax.make_jaxpr(fun)(x).jaxpr))
        return x

    jax.eval_shape(jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False), jnp.ones(2))
    return found == [True]


def test_what_communicates():
    """Catches a collective in a body, and one in the derivative alone."""
    summed = lambda x, *_: jax.lax.psum(x, "a")
    assert not communicates(jnp.sin) and not communicates(jvp_rule(jnp.sin, jnp.multiply))
    assert not communicates(lambda x: jax.pure_callback(np.sin, x, x))
    assert communicates(summed) and communicates(jax.jit(summed)) and communicates(jvp_rule(summed, jnp.multiply))
    assert communicates(jvp_rule(jnp.sin, lambda x, dx: summed(dx)))
    assert communicates(jax.jit(jvp_rule(jnp.sin, lambda x, dx: dx * jax.jit(summed)(x))))
    assert communicates(jvp_rule(jnp.sin, lambda x, dx: jnp.undefined))  # It can't be traced, so it may.


def test_what_is_zero():
    """Catches zeros that are not seen through operations, and a value that may be 0 taken for one that is."""
    zero = lambda fun, linear: linearity.is_zero(jax.make_jaxpr(fun)(*[jnp.ones(4)] * len(linear)).jaxpr, linear)
    assert zero(lambda x, g: (0.0 * g, jnp.zeros(4) - 0 * x), [False, True])
    assert zero(lambda x, g: jnp.where(x > 0, jnp.zeros(4), 0.0), [False, True])
    assert not zero(lambda x, g: (0.0 * g, g), [False, True]) and not zero(lambda x: x, [False])
    assert not zero(lambda x, g: x - x, [False, True]) and not zero(jnp.cos, [False])
