"""The one form of all losses: its total, its weight, and what is known of them from the trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxaccum._sums import traced_loss
from jaxaccum._sums.traced_loss import Traced
from jaxaccum._sums.weighted_sum import Weighted

PARAMS = {"w": jnp.arange(1.0, 4.0), "n": jnp.arange(3), "v": jnp.ones(2)}
BATCH = {"x": jnp.array([2.0, -1.0, 0.5]), "mask": jnp.array([1.0, 0.0, 1.0])}


def trace(loss, params=PARAMS, batch=BATCH) -> Traced:
    return traced_loss.trace(lambda p, b: (loss(p, b), {"aux": b["x"]}), params, batch)


def total(p, b):
    return jnp.sum(p["w"] * b["x"] * b["mask"])


def by(weight):
    return lambda p, b: Weighted(total(p, b), weight(p, b))


def counted(p, b):
    return b["mask"].sum()


def test_results():
    """Catches a total in place of a weight, and aux that is lost."""
    got, (loss, rest) = trace(by(counted)).total(PARAMS, BATCH)
    np.testing.assert_allclose([got, loss.total, loss.weight], [3.5, 3.5, 2.0])
    np.testing.assert_array_equal(rest["aux"], BATCH["x"])
    got, (loss, _) = trace(total).total(PARAMS, BATCH)
    assert float(got) == float(loss.total) == 3.5 and loss.weight is None


@pytest.mark.parametrize(
    ("weight", "constant", "has"),
    [
        (lambda p, b: 3, 3, False),
        (lambda p, b: 2.5, 2.5, False),
        (lambda p, b: float(len(b["x"])), 3.0, False),
        (lambda p, b: 0.0, None, True),
        (counted, None, True),
        (lambda p, b: p["w"][0], None, True),
        (None, None, False),
    ],
)
def test_a_constant_weight(weight, constant, has):
    """Catches a weight that is computed for each micro-batch though it is a number, and a 0 taken for one."""
    traced = trace(total if weight is None else by(weight))
    assert traced.weight == constant and type(traced.weight) is type(constant) and traced.has_weight is has


def test_the_weight_alone():
    """Catches a weight for which the loss runs, or that is said to need the parameters."""
    closed, used = trace(by(counted)).weight_alone()
    assert used == [False, False, False, True, False] and len(closed.jaxpr.eqns) == 1  # Of n, v, w; mask, x.


@jax.custom_vjp
def fused(w, x):
    """(their product, a sum of `x`), by one rule: to jvp both vary with `w`."""
    return jnp.sum(w * x), jnp.sum(x)


def of_the_product(kept, cotangents):
    w, x = kept
    return jax.lax.cond(w[0] > 0, lambda g: g * x, lambda g: x * g, cotangents[0]), jnp.zeros_like(x)


fused.defvjp(lambda w, x: (fused(w, x), (w, x)), of_the_product)


def looped(p, b):
    """A weight that varies, by a loop that has no reverse mode."""
    return jax.lax.while_loop(lambda c: c < 3, lambda c: c + jnp.sum(p["w"] ** 2), 0.0)


VARIES = {
    "a constant": (lambda p, b: 3.0, False),
    "of the batch": (counted, False),
    "of the parameters": (lambda p, b: jnp.sum(p["w"]), True),
    "of a power of them": (lambda p, b: jnp.sum(p["w"] ** 2) + counted(p, b), True),
    "of integers of theirs": (lambda p, b: jnp.sum(p["n"]) * 1.0, False),
    "a number of them": (lambda p, b: jnp.sum(p["w"] > 1.5) * 1.0, False),
    "held constant": (lambda p, b: jax.lax.stop_gradient(jnp.sum(p["w"])), False),
    "rounded": (lambda p, b: jnp.round(jnp.sum(p["w"])).astype(jnp.int32), False),
    "0 times them": (lambda p, b: jnp.sum(p["w"] * 0.0) + 1.0, False),
    "of a rule that holds it constant": (lambda p, b: fused(p["w"], b["x"])[1], False),
    "of a rule that doesn't": (lambda p, b: fused(p["w"], b["x"])[0], True),
    "of a loop": (looped, True),
}


@pytest.mark.parametrize("name", VARIES)
def test_a_weight_that_varies_with_the_parameters(name):
    """Catches a derivative that is left out of the gradient, and a second pass for one that is 0."""
    weight, varies = VARIES[name]
    traced = trace(by(weight))
    assert traced.weight_varies() is varies
    if varies:
        with pytest.raises(ValueError, match="the weight of the Weighted loss depends on the parameters"):
            traced.refuse_varying_weight()
    else:
        traced.refuse_varying_weight()


def test_a_loss_less_its_mean():
    """Catches the derivative of a quotient with another sign, or in another dtype."""
    weight = lambda p, b: jnp.sum(p["w"] ** 2)
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), ({"w": PARAMS["w"]}, BATCH))
        traced = trace(by(weight), params, batch)
        of_weight = float(weight(params, batch))
        less = traced.less(float(total(params, batch)) / of_weight)
        value, grads = jax.value_and_grad(lambda p: less.total(p, batch)[0])(params)
        want = jax.grad(lambda p: total(p, batch) / weight(p, batch))(params)
        np.testing.assert_allclose(value, 0, atol=1e-12)
        np.testing.assert_allclose(grads["w"] / of_weight, want["w"], rtol=1e-12)
        _, (loss, rest) = less.total(params, batch)
        np.testing.assert_allclose(loss.weight, of_weight)
        np.testing.assert_array_equal(rest["aux"], batch["x"])
    half = trace(lambda p, b: Weighted(total(p, b).astype(jnp.float16), weight(p, b))).less(jnp.float32(0.5))
    assert half.total(PARAMS, BATCH)[0].dtype == jnp.float16


def test_a_loss_that_is_reduced_already():
    """Catches a gradient that is divided by the number of devices twice, and a loss that is refused in vain."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(reduce, names, *, local=True):
        def body(w, x):
            w = jax.lax.pcast(w, ("a", "b"), to="varying") if local else w
            loss = lambda w, x: (reduce(jnp.sum(w * x)), None)
            traced_loss.trace(loss, w, x).refuse_reduced(names)
            return x

        over = P(("a", "b"))
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), over), out_specs=over)
        jax.eval_shape(mapped, jnp.ones(1), jnp.ones(4))

    mean = lambda *names: lambda x: jax.lax.pmean(x, names)
    run(lambda x: x, ("a", "b"))
    run(mean("a"), ("a", "b"))
    run(mean("a"), ("b",))
    run(mean("a", "b"), ("a", "b"), local=False)
    for names in (("a",), ("a", "b")):
        with pytest.raises(ValueError, match=r"the loss does not vary over axis_name=\('a',"):
            run(mean(*names), names)


def test_whether_a_micro_batch_counts():
    """Catches a selection by a weight that is a nonzero number, and none by a 0."""
    assert traced_loss.keep(None) is traced_loss.keep(2) is traced_loss.keep(0.5) is None
    for weight, want in [(0, False), (0.0, False), (jnp.float32(2), True), (np.array([0.0, 0.5]), [False, True])]:
        kept = traced_loss.keep(weight)
        assert kept.dtype == bool and kept.tolist() == want


def test_results_that_do_not_count():
    """Catches a NaN that a left-out micro-batch adds, and aux that is not its own."""
    returned = jnp.float32(jnp.nan), (Weighted(jnp.float32(jnp.nan), jnp.float32(2)), "aux")
    assert traced_loss.counted(None, returned) is traced_loss.counted(True, returned) is returned
    total, (loss, rest) = traced_loss.counted(jnp.asarray(False), returned)
    assert float(total) == float(loss.total) == float(loss.weight) == 0 and rest == "aux"
    total, (loss, _) = traced_loss.counted(jnp.asarray(True), (jnp.float32(3), (Weighted(3.0, jnp.float32(2)), None)))
    assert float(total) == float(loss.total) == 3 and float(loss.weight) == 2


def test_means():
    """Catches a NaN for nothing, a mean in the weight's dtype, and one in float32 under x64."""
    mean = lambda total, weight: traced_loss.mean(Weighted(jnp.float32(total), weight))
    assert float(mean(6.0, 4)) == 1.5 and float(mean(6.0, None)) == 6.0
    assert float(mean(jnp.nan, 0.0)) == float(mean(1.0, jnp.int32(0))) == 0.0
    with jax.enable_x64(True):
        assert mean(6.0, 4).dtype == jnp.float32
        third = traced_loss.mean(Weighted(jnp.float64(1), jnp.int32(3)))
        assert abs(float(third) - 1 / 3) < 1e-16
        grads = traced_loss.mean_gradient(Weighted(1.0, jnp.int32(3)), {"w": jnp.ones(2)})
        np.testing.assert_allclose(grads["w"], [1 / 3] * 2, rtol=1e-15)


@pytest.mark.parametrize("value", [1, 0, 2.5, True, np.float32(3), jnp.int32(0)])
def test_a_weight(value):
    """Catches a number that is refused."""
    traced_loss.check_weight(value)
    traced_loss.check_weight(np.array([value] * 2, np.float32), (2,))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "finite and at least 0, got -1"),
        (np.nan, "finite and at least 0, got nan"),
        (np.inf, "finite and at least 0, got inf"),
        (np.ones(3), "one real number, got float64 of shape"),
        (1j, "one real number, got 1j"),
        ("1", "one real number, got '1'"),
    ],
)
def test_what_is_no_weight(value, message):
    """Catches a weight that makes every gradient NaN or turns it around."""
    with pytest.raises(ValueError, match=f"weight must be {message}"):
        traced_loss.check_weight(value)
    if isinstance(value, int | float):
        for constant in (lambda p, b: value, lambda p, b: jnp.full((), float(value))):
            with pytest.raises(ValueError, match="weight must be finite and at least 0"):
                trace(by(constant))
    with pytest.raises(ValueError, match=r"weight must be one real number, or an array of shape \(2,\) with one"):
        traced_loss.check_weight(np.ones(3), (2,))
    with pytest.raises(ValueError, match="finite and at least 0"):
        traced_loss.check_weight(np.array([1.0, -1.0]), (2,))


@pytest.mark.parametrize("value", [jnp.ones(2), 1, True, 1j, None, "1", jnp.int32(1), jnp.complex64(1)])
def test_what_is_no_loss(value):
    """Catches jax's own error about a function that the user did not write."""
    with pytest.raises(TypeError, match="the loss must be one floating scalar"):
        trace(lambda p, b: value)
    with pytest.raises(TypeError, match="the loss must be one floating scalar"):
        trace(lambda p, b: Weighted(value, 1))


def test_a_weight_in_the_trace():
    """Catches a weight that is an array for each example, or complex, and found only when it runs."""
    for weight in (lambda p, b: b["mask"], lambda p, b: b["x"][0] * 1j):
        with pytest.raises(ValueError, match="weight must be one real number"):
            trace(by(weight))
