"""What one process makes of the others' entries, with a dict in place of jax's store."""

import itertools
import json

import pytest

from jaxaccum._jax import coordination
from jaxaccum.distributed import process_group
from jaxaccum.distributed.process_group import Processes, Wishes


@pytest.fixture
def store(monkeypatch):
    """What has been written, by key."""
    entries = {}

    def read(directory):
        return {key.removeprefix(directory): text for key, text in entries.items() if key.startswith(directory)}

    def wait(key, timeout):
        if key not in entries:
            raise RuntimeError(f"nothing at {key} after {timeout} s")
        return entries[key]

    def forget(directory):
        for key in read(directory):
            del entries[directory + key]

    monkeypatch.setattr(process_group, "_gatherings", itertools.count())
    monkeypatch.setattr(coordination, "write", entries.__setitem__)
    for function in (read, wait, forget):
        monkeypatch.setattr(coordination, function.__name__, function)
    return entries


@pytest.fixture
def process(store, monkeypatch):
    """`process(index, of)`: the processes as one of them sees them."""

    def process(index, of=2):
        monkeypatch.setattr(coordination, "place", lambda: (index, of))
        return Processes()

    return process


def key(number, name):
    return f"jaxaccum/gatherings/{number // 100}/{number}/{name}"


def entry(about, value=None, signal=None, stop=False):
    return json.dumps([about, value, [signal, stop]])


def test_values_and_wishes_come_from_all(store, process):
    """Catches values out of order, and a wish that needs all processes or only this one."""
    processes = process(0, of=3)
    store |= {key(0, 1): entry("here", "b", signal=2, stop=True), key(0, 2): entry("here", "a", signal=15)}
    assert processes.gather("here", "a") == ["a", "b", "a"]
    assert processes.wishes == Wishes(2, True) and processes.own == Wishes()
    other = process(2, of=3)
    process_group._gatherings = itertools.count()
    assert other.gather("here", "a") == ["a", "b", "a"] and other.wishes == processes.wishes


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (entry("there"), "process 0 is at 'here'; process 1 is at 'there'"),
        (json.dumps({"left": "KeyError('luck')"}), r"process 1 left the run with KeyError\('luck'\)"),
    ],
)
def test_processes_that_part_do_not_wait(store, process, theirs, words):
    """Catches a process that goes on with entries of another place, or waits for one that has ended."""
    processes = process(0)
    store[key(0, 1)] = theirs
    with pytest.raises(RuntimeError, match=words):
        processes.gather("here", 1)
    assert processes.left and processes.gather("here", 2) == [2]


def test_a_process_that_leaves_says_so_once(store, process):
    """Catches an error that the others are not told, and one that they had too."""
    processes = process(1)
    processes.leave(KeyError("luck"))
    processes.leave(KeyError("more"))
    assert store == {key(0, 1): json.dumps({"left": "KeyError('luck')"})}
    common = process(1)
    with pytest.raises(ValueError, match="ours"):
        common.fail(error := ValueError("ours"))
    common.leave(error)
    assert common.are_together(error) and not common.left and len(store) == 1


def test_a_process_that_does_not_come_is_named(process):
    """Catches jax's own error, which names no process."""
    with pytest.raises(TimeoutError, match="process 1 had nothing to tell for 1800 s"):
        process(0).gather("here")


def test_what_differs_is_told_alone(store, process):
    """Catches all options in place of those that differ."""
    processes = process(0)
    store[key(0, 1)] = entry("options", {"k": 2, "seed": 0})
    with pytest.raises(ValueError, match=r"options: k=1 on process 0; options: k=2 on process 1") as caught:
        processes.agree("options", {"k": 1, "seed": 0})
    assert "seed" not in str(caught.value) and processes.are_together(caught.value)


def test_old_entries_are_forgotten(store, process):
    """Catches a store that grows with the run, and entries that a slow process has yet to read."""
    processes = process(0)
    for number in range(400):
        store[key(number, 1)] = entry("here")
        processes.gather("here")
        assert key(max(number - 1, 0), "all") in store
    assert len(store) == 2 * 100


def test_one_process_waits_for_nothing(process):
    """Catches a store that is asked where there is none."""
    processes = process(0, of=1)
    processes.own.stop = True
    assert processes.gather("here", 3) == [3] and processes.wishes.stop
    processes.begin()
    assert not processes.wishes.stop
