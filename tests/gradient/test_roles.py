"""The roles of a loss's arguments: which positions they are, what is said about wrong ones."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum._gradient.roles import Roles

K, N = 4, 6
PLAIN = Roles((0,), (1,), (), ())


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ((0, None, None, None), PLAIN),
        ((1, None, None, None), Roles((1,), (0,), (), ())),
        (((2, 0), None, 1, [4]), Roles((2, 0), (3,), (1,), (4,))),
        ((0, (3, 1), (2,), ()), Roles((0,), (3, 1), (2,), ())),
    ],
)
def test_positions(given, want):
    """Catches a batch that is not the first argument without a role, and positions put in order."""
    assert Roles.of(*given) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1, None, None, None), "argnums must be positions of arguments.*got -1"),
        ((0, True, None, None), "batch_argnums must be positions.*got True"),
        ((0, None, (2, "x"), None), "key_argnums must be positions.*got .2, 'x'."),
        (((0, 0), 1, None, None), "argnums=.0, 0. names argument 0, which argnums names already"),
        ((0, 1, 2, (3, 1)), "carry_argnums=.3, 1. names argument 1, which batch_argnums names already"),
        (((), 1, None, None), "argnums and batch_argnums must each name an argument"),
        ((0, (), None, None), "argnums and batch_argnums must each name an argument"),
    ],
)
def test_wrong_positions(given, message):
    """Catches an argument with two roles, a position from the end, and a bool taken for one."""
    with pytest.raises(ValueError, match=message):
        Roles.of(*given)


def test_all_positions():
    """Catches a role that is left out: its arguments would be taken for ones that are not split."""
    assert Roles((0,), (2, 1), (3,), (4,), (5,)).all() == {0, 1, 2, 3, 4, 5}


def test_arguments_that_were_not_passed_by_position():
    """Catches an error of Python's about an index, and advice about names that are not the caller's."""
    roles = Roles((0,), (1, 3), (2,), ())
    roles.check([0, 1, 2, 3])
    PLAIN.check([0, 1, 2])
    with pytest.raises(TypeError, match=r"the batch argument is number 3, .* only 3 arguments were .* another\.$"):
        roles.check([0, 1, 2], {"not a name": 0})
    with pytest.raises(TypeError, match=r"split them put them in one batch.*dict\(x=\.\.\., y=\.\.\.\)\)"):
        roles.check([0, 1, 2], {"x": 0, "not a name": 0, "y": 0})


def notes(roles, args, kwargs, k=K, stacked=False):
    """What `hints` adds to an error."""
    error = ValueError("wrong shapes")
    with pytest.raises(ValueError, match="wrong shapes"), roles.hints(args, kwargs, k, stacked):
        raise error
    return getattr(error, "__notes__", [])


def test_hints_about_arguments_that_are_not_split():
    """Catches a hint about a key, a scalar, or another length, and a remedy that leaves one out."""
    w, x, key = np.ones(N), np.ones((N, 3)), np.ones(N)
    roles = Roles((0,), (1,), (2,), ())
    assert notes(roles, [w, x, key], {}) == notes(roles, [w, x, key, 1.0, np.ones(N + 1)], {"y": 2.0}) == []
    assert notes(roles, [w, {"x": x, "scale": 1.0}, key, 2.0], {}) == []
    (note,) = notes(roles, [w, x, key, {"y": x, "z": 1.0}, np.ones(2), np.ones(N)], {})
    assert note.startswith("args[3], args[5]: as long as the batch") and note.endswith("batch_argnums=(1, 3, 5).")
    (note,) = notes(roles, [w, x, key, np.ones(N)], {"y": x, "z": np.ones(2)})
    assert note.startswith("args[3], kwargs['y']: ")
    assert note.endswith("pass those by position, and name them in batch_argnums.")


def test_hints_about_a_list_of_micro_batches():
    """Catches a list that is no list of micro-batches, and one that is and is not named."""
    one = lambda: {"x": np.ones((N, 3)), "scale": 1.0}
    (note,) = notes(PLAIN, [0.0, [one() for _ in range(K)]], {})
    assert note.startswith(f"args[1] is a list of num_micro_batches={K} alike trees")
    (note,) = notes(Roles((0,), (1, 2), (), ()), [0.0, one(), tuple(one() for _ in range(K))], {})
    assert note.startswith("args[2] is a tuple")
    for batch, k, stacked in [
        ([one() for _ in range(K)], K, True),
        ([one() for _ in range(K)], np.int32(K), False),
        ([one() for _ in range(K - 1)], K, False),
        ([one()], 1, False),
        ([*(one() for _ in range(K - 1)), {"x": np.ones((N, 2)), "scale": 1.0}], K, False),
        ([*(one() for _ in range(K - 1)), [np.ones((N, 3)), 1.0]], K, False),
        (np.ones((K, 3)), K, False),
    ]:
        assert notes(PLAIN, [0.0, batch], {}, k, stacked) == []


@pytest.mark.parametrize(
    ("batch", "other", "k", "stacked", "warns"),
    [
        ((K,), (K,), K, False, True),
        ((K, 3), (K, 2), K, False, True),
        ((K,), (K,), np.int32(K), False, True),
        ((2 * K,), (2 * K,), K, False, False),
        ((K,), (2,), K, False, False),
        ((1,), (1,), 1, False, False),
        ((K, N), (K, N), K, True, True),
        ((K, N, 3), (K, N), K, True, True),
        ((K, N), (K,), K, True, False),
        ((K,), (K,), K, True, False),
        ((1, N), (1, N), 1, True, False),
    ],
)
def test_a_warning_of_an_argument_that_would_broadcast(batch, other, k, stacked, warns):
    """Catches a target of K rows that each micro-batch of one row sees whole, and a warning where shapes differ."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PLAIN.warn_of_unsplit([np.ones(3), jnp.ones(batch), np.ones(other)], k, stacked)
    assert [str(x.message).endswith("batch_argnums=(1, 2). If it does not, pass it by name.") for x in found] == (
        [True] if warns else []
    )


def test_a_traced_number_of_micro_batches():
    """Catches a K whose value is asked for, though the axes alone tell."""
    args = [np.ones(3), np.ones((K, N)), np.ones((K, N))]
    with pytest.warns(UserWarning, match="as long as the batch"):
        jax.eval_shape(lambda k: PLAIN.warn_of_unsplit(args, k, stacked=True), K)


def test_no_warning_if_a_part_of_the_batch_is_of_another_shape():
    """Catches a warning where the other leaves of a micro-batch can't broadcast with the argument."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PLAIN.warn_of_unsplit([np.ones(3), (np.ones(K), np.ones(2 * K)), np.ones(K)], K, stacked=False)
        PLAIN.warn_of_unsplit([np.ones(3), (np.ones((K, N)), np.ones(K)), np.ones((K, N))], K, stacked=True)


def test_arguments_are_put_in_place():
    """Catches a carry that takes another argument's place, as where positions are not in order."""
    roles = Roles((4,), (0, 2), (), (3, 1))
    args = ["x", "c1", "y", "c3", "w", "other"]
    assert roles.put(args, ("W",), ("X", "Y"), (), ("C3", "C1")) == ["X", "C1", "Y", "C3", "W", "other"]
    assert args[0] == "x" and roles.without_carry(args) == ["x", "y", "w", "other"]
    assert roles.with_carry(roles.without_carry(args), ("c3", "c1")) == args
