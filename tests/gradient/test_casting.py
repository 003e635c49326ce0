"""Which leaves `cast` selects, from the jaxpr of the loss; no program runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum

W = jnp.ones((4, 4))
PARAMS = {"a": W, "b": W}
X = jnp.ones((3, 4))
INDEX = jnp.zeros(3, jnp.int32)


def selected(loss, params, *args):
    """The names of the leaves that are cast."""
    cast = jax.eval_shape(jaxaccum.cast(jnp.bfloat16).seeing(loss, params, *args), params)
    paths = jax.tree_util.tree_leaves_with_path(cast)
    return {jax.tree_util.keystr(path, simple=True) for path, x in paths if x.dtype == jnp.bfloat16}


def scanned(body, carry, along=None):
    return jax.lax.scan(lambda carry, x: (body(carry, x), None), carry, along, length=3 if along is None else None)[0]


@jax.custom_vjp
def gathered(w, i):
    return w[i]


gathered.defvjp(lambda w, i: (w[i], None), lambda _, g: (g, None))
# Of losses that use "b" in a product, what they do with "a" that makes its gradient a running sum.
SUMMED = {
    "a gather": lambda a, x: a[INDEX],
    "a gather of the transpose": lambda a, x: a.T[INDEX],
    "a gather of a sum": lambda a, x: (1 + 2 * a)[INDEX],
    "a gather in a jit": lambda a, x: jax.jit(lambda i, a: a[i])(INDEX, a),
    "a gather in a rule": lambda a, x: gathered(a, INDEX),
    "a gather in one branch": lambda a, x: jax.lax.cond(x[0, 0] > 0, lambda x, a: x, lambda x, a: a[INDEX], x, a),
    "a gather of a branch's result": lambda a, x: jax.lax.cond(x[0, 0] > 0, lambda x, a: a, lambda x, a: W, x, a)[
        INDEX
    ],
    "a gather of the other's result": lambda a, x: jax.lax.cond(x[0, 0] > 0, lambda a: W, lambda a: a, a)[INDEX],
    "a gather of a loop of unknown length": lambda a, x: jax.lax.while_loop(lambda a: a[0, 0] < 3, lambda a: 2 * a, a)[
        INDEX
    ],
    "a gather of a jit's result": lambda a, x: jax.jit(lambda x, a: (x, 2 * a))(x, a)[1][INDEX],
    "a gather of a carry": lambda a, x: scanned(lambda a, _: jnp.sin(a), a)[INDEX],
    "a gather of a loop's rows": lambda a, x: jax.lax.map(jnp.sin, a)[INDEX],
    "a loop": lambda a, x: scanned(lambda x, _: x @ a, x),
    "a loop in a loop": lambda a, x: scanned(lambda x, _: scanned(lambda x, _: x @ a, x), x),
    "a loop in a checkpoint": lambda a, x: jax.checkpoint(lambda x, a: scanned(lambda x, _: x @ a, x))(x, a),
    "a loop over vectors": lambda a, x: scanned(lambda x, a: x * a, x, a),
    "a loop over sums of matrices": lambda a, x: scanned(lambda x, a: x * a, x, jnp.sum(jnp.stack([a, a]), axis=1)),
    "a gather in a loop over matrices": lambda a, x: scanned(lambda x, a: x + a[INDEX], x, jnp.stack([a, a])),
}
CAST = {
    "a product": lambda a, x: x @ a,
    "a gather of a product": lambda a, x: (x @ a)[INDEX],
    "a gather of a product in a jit": lambda a, x: jax.jit(lambda x, a: x @ a)(x, a)[INDEX],
    "a gather of another result of a jit": lambda a, x: jax.jit(lambda x, a: (x, 2 * a))(x, a)[0][INDEX] @ a,
    "a slice": lambda a, x: x @ a[:, :2],
    "a sum": lambda a, x: x + jnp.sum(a, axis=0),
    "a loop over matrices": lambda a, x: scanned(lambda x, a: x @ a, x, a[None] * jnp.ones((3, 1, 1))),
    "no use": lambda a, x: x,
    "a branch": lambda a, x: jax.lax.cond(x[0, 0] > 0, lambda x, a: x @ a, lambda x, a: x, x, a),
}


@pytest.mark.parametrize("name", SUMMED)
def test_a_gradient_that_is_a_running_sum(name):
    """Catches a leaf whose gradient is summed in bfloat16, as seen through what calls and selects it."""
    use = SUMMED[name]
    assert selected(lambda p, x: jnp.sum(use(p["a"], x)) + jnp.sum(x @ p["b"]), PARAMS, X) == {"b"}


@pytest.mark.parametrize("name", CAST)
def test_a_gradient_that_is_not(name):
    """Catches a matrix that stays wide although its gradient is one product."""
    use = CAST[name]
    assert selected(lambda p, x: jnp.sum(use(p["a"], x)) + jnp.sum(x[INDEX] @ p["b"]), PARAMS, X) == {"a", "b"}


def test_what_is_a_matrix():
    """Catches a vector, a scalar or an integer that is cast, and a stack of layers that is not."""
    params = {
        "scalar": jnp.float32(1),
        "vector": jnp.ones(3),
        "stack": jnp.ones((2, 3, 4)),
        "integers": jnp.ones((2, 2), int),
    }
    assert selected(lambda p, x, y: sum(map(jnp.sum, p.values())), params, X, X) == {"stack"}


def test_a_rule_of_ones_own():
    """Catches a `where` that is not asked, is asked about integers, or that the loss overrules."""
    seen = []

    def where(path, leaf):
        seen.append((path, leaf.shape))
        return path.endswith("b")

    params = {"x": [jnp.ones(3), jnp.ones((2, 2), int)], "y": {"b": jnp.ones(2), "c": jnp.ones(2)}}
    rule = jaxaccum.cast(jnp.bfloat16, where)
    assert rule.seeing(lambda p: 1 / 0, params) is rule
    cast = rule(params)
    assert seen == [("x/0", (3,)), ("y/b", (2,)), ("y/c", (2,))]
    dtypes = [np.dtype(np.float32), np.dtype(np.int32), jnp.dtype(jnp.bfloat16), np.dtype(np.float32)]
    assert [x.dtype for x in jax.tree.leaves(cast)] == dtypes
    with pytest.raises(TypeError, match=r"cast\(\) chooses by looking at the loss"):
        jaxaccum.cast(jnp.bfloat16)(params)


def test_wrong_arguments():
    """Catches an integer that parameters are rounded to, and a rule that can't be called."""
    with pytest.raises(TypeError, match="dtype must be floating"):
        jaxaccum.cast(jnp.int8)
    with pytest.raises(TypeError, match="where must be None or a function"):
        jaxaccum.cast(jnp.bfloat16, "w")


def test_boxes_are_no_part_of_a_name():
    """Catches a name that ends in the field of a box, and a leaf named "value" that loses its name."""

    @jax.tree_util.register_pytree_with_keys_class
    class Box:
        def __init__(self, value):
            self.value = value

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("value"), self.value)], None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    seen = []
    rule = jaxaccum.cast(jnp.bfloat16, lambda path, leaf: seen.append(path))
    rule({"a": Box(W), "value": W})
    rule(W)
    assert seen == ["a", "value", ""]
