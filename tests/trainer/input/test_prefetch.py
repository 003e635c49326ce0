"""From loader batches to micro-steps: groups, pieces, what is held back, and what happens when a loader breaks."""

import array

import jax
import numpy as np
import pytest

from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.input.prefetch import AHEAD, fused, micro_steps
from jaxaccum.trainer.input.strategies import Strategy


def rows(*sizes):
    """Batches of consecutive numbers."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def shape(name, devices, sizes):
    """For each micro-step, for each of its pieces: (its rows, its place); and whether it is the last."""
    steps = list(micro_steps(rows(*sizes), Strategy(name, devices), Processes()))
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    assert sum(step.examples for step in steps) == sum(sizes)
    return [[(np.asarray(p.batch).tolist(), tuple(np.asarray(p.place).tolist())) for p in s.pieces] for s in steps]


def test_single_is_a_piece_for_each_batch():
    """Catches a batch that is copied, or marked as anything but whole."""
    assert shape("single", 1, [2, 1]) == [[([0, 1], (0, 1, 1))], [([2], (0, 1, 1))]]


def test_ddp_is_a_micro_step_for_every_p_batches_whatever_their_shapes():
    """Catches windows that shift where a batch has another size, and fills that are taken for batches."""
    assert shape("ddp", 2, [2, 2, 2, 1, 2]) == [
        [([0, 1, 2, 3], (0, 2, 2))],
        [([4, 5, 4, 5], (0, 1, 1)), ([6, 6], (1, 1, 1))],
        [([7, 8, 7, 8], (0, 1, 1))],
    ]


def test_dp_splits_a_batch_and_gives_the_rest_to_one_device():
    """Catches a rest that is dropped, or numbered as a share that there was, and a batch of nothing that fails."""
    assert shape("dp", 2, [4, 5, 1, 0]) == [
        [([0, 1, 2, 3], (0, 2, 1))],
        [([4, 5, 6, 7], (0, 2, 0)), ([8, 8], (2, 1, 1))],
        [([9, 9], (0, 1, 1))],
        [([], (0, 1, 1))],
    ]


def test_pieces_lie_on_the_devices_of_the_data_axis():
    """Catches a batch that is laid out when its program runs, not ahead of it."""
    strategy = Strategy("ddp", 4)
    (step,) = micro_steps(rows(2, 2, 2, 2), strategy, Processes())
    assert step.pieces[0].batch.sharding.is_equivalent_to(strategy.local, 1)
    assert len(step.pieces[0].batch.sharding.device_set) == 4


def test_micro_steps_are_sent_ahead_and_no_further():
    """Catches a loader that is waited for between micro-steps, and one that is read to its end."""
    read = []

    def loader():
        for i in range(10):
            read.append(i)
            yield np.zeros(2)

    steps = micro_steps(loader(), Strategy("single", 1), Processes())
    next(steps)
    assert len(read) == 1 + AHEAD + 1
    next(steps)
    assert len(read) == 1 + AHEAD + 2


@pytest.mark.parametrize(("name", "devices", "whole"), [("single", 1, 5), ("ddp", 2, 2)])
def test_what_came_before_an_error_comes_first_and_is_not_the_last(name, devices, whole):
    """Catches batches lost to an error that was met while reading ahead, and an epoch that seems to end with it."""

    def loader():
        yield from rows(2, 2, 2, 2, 2)
        raise OSError("disk")

    steps = []
    with pytest.raises(OSError, match="disk"):
        steps.extend(micro_steps(loader(), Strategy(name, devices), Processes()))
    steps = []
    with pytest.raises(OSError, match="disk"):
        for step in micro_steps(loader(), Strategy(name, devices), Processes()):
            steps.append(step.last)
    assert steps == [False] * whole


@pytest.mark.parametrize(("name", "devices", "whole"), [("single", 1, 5), ("ddp", 2, 2), ("dp", 2, 5)])
@pytest.mark.parametrize(("bad", "error"), [("a word", TypeError), ({}, ValueError), ([np.ones(2), 1], ValueError)])
def test_what_came_before_a_batch_that_cannot_be_read_comes_first_too(name, devices, whole, bad, error):
    """Catches batches lost to one that was read ahead, and an epoch that seems to end before it."""
    if isinstance(bad, list) and name == "single":
        pytest.skip("one device takes a scalar")
    steps = []
    with pytest.raises(error, match=r"batch is a str|without arrays|batch\[1\] is a scalar"):
        for step in micro_steps([*rows(2, 2, 2, 2, 2), bad, *rows(2)], Strategy(name, devices), Processes()):
            steps.append(step.last)
    assert steps == [False] * whole


@pytest.mark.parametrize(("name", "devices"), [("single", 1), ("ddp", 2), ("dp", 2)])
def test_a_micro_step_has_the_loaders_own_batches_and_the_examples_of_most_leaves(name, devices):
    """Catches hooks that are given what was made of a batch, and a count of the first leaf."""
    batches = [{"a": array.array("f", [i] * 4), "x": np.ones((4, 3)), "y": np.ones(4)} for i in range(2)]
    steps = list(micro_steps(batches, Strategy(name, devices), Processes()))
    groups = [[*step.batch] if name == "ddp" else [step.batch] for step in steps]
    assert [id(batch) for group in groups for batch in group] == [id(batch) for batch in batches]
    assert all(type(batch["a"]) is array.array for batch in batches)
    assert sum(step.examples for step in steps) == 8
    first = np.asarray(steps[0].pieces[0].batch["a"])
    assert first.dtype == np.float32 and first.tolist() == [0.0] * 4 + ([1.0] * 4 if name == "ddp" else [])


@pytest.mark.parametrize(
    ("sizes", "pending", "calls"),
    [
        ([2] * 7, 0, [3, 3, 1]),
        ([2] * 7, 2, [1, 3, 3]),
        ([2] * 5, 0, [3, 2]),
        ([2, 2, 2, 2, 1, 2, 2, 1], 0, [3, 1, 1, 1, 1, 1]),
    ],
    ids=["whole windows", "one that is open", "a partial one", "ragged ones"],
)
def test_a_call_is_a_window_where_it_can_be_stacked(sizes, pending, calls):
    """Catches windows that shift by what is pending, that run on past a boundary, or that mix shapes."""
    steps = list(micro_steps(rows(*sizes), Strategy("single", 1), Processes()))
    got = list(fused(steps, lambda: 3, pending))
    assert [len(call) for call in got] == calls
    assert [step for call in got for step in call] == steps


def test_micro_steps_of_several_pieces_are_not_stacked():
    """Catches a rest, or a batch of another shape within a group, that is left out of its window."""
    for name, sizes in [("dp", [4, 5]), ("ddp", [2, 1, 2, 1])]:
        steps = micro_steps(rows(*sizes), Strategy(name, 2), Processes())
        assert [len(call) for call in fused(steps, lambda: 2, 0)] == [1, 1]


def test_a_window_that_an_error_cuts_short_comes_first_one_by_one():
    """Catches micro-steps that are lost with the loader, and a window that is closed without its rest."""

    def breaks():
        yield from rows(2, 2, 2, 2, 2)
        raise OSError("disk")

    got = []
    with pytest.raises(OSError, match="disk"):
        for call in fused(micro_steps(breaks(), Strategy("single", 1), Processes()), lambda: 3, 0):
            got.append([step.examples for step in call])
    assert got == [[2, 2, 2], [2], [2]]


def test_batches_that_cannot_be_spread_are_refused_in_words():
    """Catches numpy's words for a scalar, and a batch of nothing."""
    for name in ("ddp", "dp"):
        with pytest.raises(ValueError, match=r"batch\['n'\] is a scalar"):
            list(micro_steps([{"a": np.ones(3), "n": 3}], Strategy(name, 2), Processes()))
    with pytest.raises(ValueError, match="without arrays"):
        list(micro_steps([{}], Strategy("single", 1), Processes()))


def test_auto_is_single_on_one_device_and_ddp_on_several():
    """Catches devices that stand idle."""
    assert Strategy("auto", 1).name == "single"
    assert (Strategy("auto", "auto").name, Strategy("auto", "auto").size) == ("ddp", jax.device_count())
    assert Strategy("single", "auto").size == 1
