"""AccumulationSchedule: Lightning's rules, without Lightning's surprises."""

import copy
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

import jaxaccum
from jaxaccum import AccumulationSchedule


@pytest.mark.parametrize(
    ("scheduling", "ks"),
    [
        ({0: 8, 4: 4, 8: 1}, [8, 8, 8, 8, 4, 4, 4, 4, 1, 1]),
        ({8: 1, 0: 8, 4: 4}, [8, 8, 8, 8, 4, 4, 4, 4, 1, 1]),
        ({2: 3}, [1, 1, 3, 3]),
        ({1: 2, 2: 5, 3: 2}, [1, 2, 5, 2]),
        ({0: 7}, [7, 7]),
        ({0: 2**31 - 1}, [2**31 - 1]),
    ],
)
def test_the_largest_key_up_to_the_epoch_wins(scheduling, ks):
    """Catches `<` for `<=`, keys read in the order given, and K other than 1 before the first key."""
    schedule = AccumulationSchedule(scheduling)
    assert [schedule(epoch) for epoch in range(len(ks))] == ks
    assert schedule(10**6) == ks[-1]


@pytest.mark.parametrize("by", ["step", "samples", "tokens"])
def test_a_schedule_by_another_unit_is_read_in_the_same_way(by):
    """Catches a unit that is lost on the way, and schedules of two units that are taken for equal."""
    schedule = AccumulationSchedule({4: 2, 10: 3}, by=by)
    assert [schedule(at) for at in (0, 3, 4, 9, 10, 10**9)] == [1, 1, 2, 2, 3, 3] and schedule.by == by
    same = [eval(repr(schedule)), AccumulationSchedule(schedule), pickle.loads(pickle.dumps(schedule))]
    assert all(other == schedule and hash(other) == hash(schedule) and other.by == by for other in same)
    others = [AccumulationSchedule({4: 2, 10: 3}), {4: 2, 10: 3}, AccumulationSchedule({4: 2}, by=by)]
    assert all(schedule != other for other in others)


def test_tokens_may_be_fractions():
    """Catches a weight that is rounded, and a key that is compared with another unit's rule."""
    schedule = AccumulationSchedule({0.5: 2, np.float32(2.5): 3}, by="tokens")
    assert [schedule(at) for at in (0, 0.49, 0.5, np.float64(2.4), 2.5)] == [1, 1, 2, 2, 3]
    assert repr(schedule) == "AccumulationSchedule({0.5: 2, 2.5: 3}, by='tokens')"


@pytest.mark.parametrize(
    ("scheduling", "by", "error", "words"),
    [
        ({0: 2}, "token", ValueError, ["by must be one of", "'tokens'", "'token'"]),
        ({0.5: 2}, "samples", TypeError, ["key by 'samples'", "0.5", "integer"]),
        ({-1: 2}, "step", ValueError, ["key by 'step'", "-1", "steps count from 0"]),
        ({-0.5: 2}, "tokens", ValueError, ["key by 'tokens'", "-0.5", "a number of at least 0"]),
        ({float("nan"): 2}, "tokens", ValueError, ["key by 'tokens'", "nan"]),
        ({float("inf"): 2}, "tokens", ValueError, ["key by 'tokens'", "inf"]),
        ({True: 2}, "tokens", TypeError, ["key by 'tokens'", "True"]),
        ({"1": 2}, "tokens", TypeError, ["key by 'tokens'", "'1'"]),
        ({0.5: 0}, "tokens", ValueError, ["K at tokens 0.5", "got 0"]),
    ],
)
def test_a_bad_key_of_another_unit_is_refused_by_value(scheduling, by, error, words):
    """Catches keys that no run reaches, or that mean something else than they say."""
    with pytest.raises(error) as caught:
        AccumulationSchedule(scheduling, by=by)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_callers_dict_is_neither_changed_nor_kept():
    """Catches Lightning's own bug, which writes `{0: 1}` into the dict, and a schedule that follows later edits."""
    scheduling = {4: 2}
    schedule = AccumulationSchedule(scheduling)
    assert schedule(0) == 1 and scheduling == {4: 2}
    scheduling[0] = 9
    assert schedule(0) == 1 and dict(schedule) == {4: 2}


def test_it_is_a_mapping_of_what_it_was_given():
    """Catches a Mapping that invents keys, and one that is not sorted by epoch."""
    schedule = AccumulationSchedule({4: 2, 1: 3})
    assert list(schedule.items()) == [(1, 3), (4, 2)] and len(schedule) == 2
    assert 0 not in schedule and schedule[4] == 2
    with pytest.raises(KeyError):
        schedule[0]


def test_it_cannot_be_changed():
    """Catches a hashable object whose contents move: the hash would no longer find it."""
    schedule = AccumulationSchedule({0: 2})
    with pytest.raises(TypeError):
        schedule[0] = 3
    with pytest.raises(TypeError):
        del schedule[0]
    with pytest.raises(AttributeError):
        schedule.by = "step"
    assert not hasattr(schedule, "update")


def test_equal_schedules_are_equal_and_hash_alike():
    """Catches identity in place of equality, and an equality that the order of keys spoils."""
    schedule = AccumulationSchedule({0: 8, 4: 4})
    assert schedule == AccumulationSchedule({4: 4, 0: 8}) == {0: 8, 4: 4}
    assert hash(schedule) == hash(AccumulationSchedule({4: 4, 0: 8}))
    assert schedule != AccumulationSchedule({0: 8, 4: 2})
    assert len({schedule, AccumulationSchedule({4: 4, 0: 8}), AccumulationSchedule({0: 8})}) == 2


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: eval(repr(s)), AccumulationSchedule],
    ids=["copy", "deepcopy", "pickle", "repr", "constructor"],
)
def test_every_way_to_copy_it_gives_an_equal_one(again):
    """Catches a mapping proxy that cannot be pickled, and a repr that is not the way to write it."""
    schedule = AccumulationSchedule({4: 2, 1: 3})
    made = again(schedule)
    assert type(made) is AccumulationSchedule and made == schedule and hash(made) == hash(schedule)
    assert [made(epoch) for epoch in range(6)] == [1, 3, 3, 3, 2, 2]


def test_printing_it_shows_every_entry():
    """Catches the default repr: a log of the run's plan must say what K was."""
    assert str(AccumulationSchedule({4: 4, 0: 8})) == "AccumulationSchedule({0: 8, 4: 4})"


def test_numpy_integers_become_ints():
    """Catches a check by isinstance(int), and numpy scalars that leak into K, reprs and checkpoints."""
    schedule = AccumulationSchedule({np.int64(0): np.int32(8), np.uint8(4): np.int8(2)})
    assert repr(schedule) == "AccumulationSchedule({0: 8, 4: 2})"
    assert schedule(np.int64(5)) == 2 and type(schedule(0)) is int


@pytest.mark.parametrize(
    ("scheduling", "error", "words"),
    [
        ({}, TypeError, ["empty", "{0: 1}"]),
        (4, TypeError, ["map epochs to K", "got 4", "{0: K}"]),
        ([(0, 4)], TypeError, ["map epochs to K", "[(0, 4)]"]),
        (None, TypeError, ["map epochs to K", "None"]),
        ({True: 2}, TypeError, ["epoch", "True", "bool"]),
        ({0: True}, TypeError, ["K at epoch 0", "True", "bool"]),
        ({0: np.True_}, TypeError, ["K at epoch 0", "bool"]),
        ({1.0: 2}, TypeError, ["epoch", "1.0", "float"]),
        ({0: 2.0}, TypeError, ["K at epoch 0", "2.0", "float"]),
        ({"0": 2}, TypeError, ["epoch", "'0'", "str"]),
        ({0: "2"}, TypeError, ["K at epoch 0", "'2'", "str"]),
        ({0: None}, TypeError, ["K at epoch 0", "None"]),
        ({-1: 2}, ValueError, ["epoch", "-1", "from 0"]),
        ({0: 0}, ValueError, ["K at epoch 0", "got 0", "K=1 means no accumulation"]),
        ({0: 4, 3: -2}, ValueError, ["K at epoch 3", "got -2"]),
        ({0: 2**31}, ValueError, ["K at epoch 0", str(2**31)]),
    ],
)
def test_a_bad_schedule_is_refused_by_name_and_value(scheduling, error, words):
    """Catches what Lightning lets pass (bools) or finds out later (a K of 0), and errors that don't say which entry."""
    with pytest.raises(error) as caught:
        AccumulationSchedule(scheduling)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)])
def test_a_bad_epoch_is_refused_by_value(epoch, error):
    """Catches a call that gives K=1 for anything that is not an epoch."""
    with pytest.raises(error, match=f"epoch.*{epoch}"):
        AccumulationSchedule({0: 2})(epoch)


def test_the_schedule_needs_no_jax():
    """Catches an import that makes a host-side plan pay for jax, or touch a device."""
    package = pathlib.Path(jaxaccum.__file__).parent
    program = f"""
import sys, types
stub = types.ModuleType("jaxaccum")  # The real __init__ imports jax; its place is taken.
stub.__path__ = [{str(package)!r}]
sys.modules["jaxaccum"] = stub
from jaxaccum._schedule import AccumulationSchedule
assert AccumulationSchedule({{0: 8, 4: 2}})(5) == 2
print(sorted({{"jax", "jaxlib", "numpy", "optax"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize(
    ("scheduling", "epochs", "micro_steps", "want"),
    [
        ({0: 8, 4: 4, 8: 1}, 10, 14, 8 + 16 + 28),
        ({0: 1}, 3, 7, 21),
        ({0: 100}, 3, 7, 3),
        ({1: 2}, 2, 5, 8),
        ({0: 2}, 0, 5, 0),
    ],
)
def test_optimizer_steps_are_counted_epoch_by_epoch(scheduling, epochs, micro_steps, want):
    """Catches windows that run on across epochs, and a short one that is not counted."""
    assert AccumulationSchedule(scheduling).optimizer_steps(epochs, micro_steps) == want


@pytest.mark.parametrize("by", ["step", "samples"])
@pytest.mark.parametrize(
    "scheduling", [{0: 8, 4: 4, 8: 1}, {3: 5}, {1: 2, 2: 3, 20: 1, 25: 4}, {0: 4, 15: 1, 43: 3}, {100: 2}]
)
@pytest.mark.parametrize(("epochs", "micro_steps", "examples"), [(1, 40, 3), (4, 7, 2), (0, 5, 1)])
def test_optimizer_steps_are_counted_window_by_window(by, scheduling, epochs, micro_steps, examples):
    """Catches a partial window that counts as a full one, and a change that comes a window late."""
    schedule, steps, seen = AccumulationSchedule(scheduling, by=by), 0, 0
    for _ in range(epochs):
        left = micro_steps
        while left > 0:
            taken = min(left, schedule(steps if by == "step" else seen))
            steps, seen, left = steps + 1, seen + taken * examples, left - taken
    assert schedule.optimizer_steps(epochs, micro_steps, examples) == steps


def test_optimizer_steps_need_to_know_what_a_unit_counts():
    """Catches an estimate that takes samples for micro-steps, and one that makes up weights."""
    with pytest.raises(TypeError, match="examples must be"):
        AccumulationSchedule({0: 2}, by="samples").optimizer_steps(1, 4)
    with pytest.raises(ValueError, match="'tokens' depends on weights"):
        AccumulationSchedule({0: 2}, by="tokens").optimizer_steps(1, 4, 8)


@pytest.mark.parametrize(("epochs", "micro_steps"), [(-1, 3), (1, 0), (1.5, 3), (1, True)])
def test_optimizer_steps_of_nonsense_are_refused(epochs, micro_steps):
    """Catches a silent 0."""
    with pytest.raises((TypeError, ValueError), match=r"epoch|micro_steps"):
        AccumulationSchedule({0: 2}).optimizer_steps(epochs, micro_steps)
