"""The failure detector names the process that failed: the rounds of one of three, with a simulated store."""

import pytest

from jaxaccum.distributed.failure_detector import Entry, Judge, News

INTERVAL = 0.5
PEER_ROUNDS = 20  # Of peer_timeout=10.


class World:
    """What process 1 reads of processes 0, 1 and 2, round by round."""

    def __init__(self, exit_timeout=300.0):
        self.judge = Judge(1, 3, INTERVAL, 10.0, exit_timeout)
        self.entries = {p: Entry(0, f"host{p}, pid {p}", False, {}) for p in range(3)}
        self.reads = 0
        self.asked = 0

    def beat(self, *processes, read=True):
        """A beat of each of `processes`, and a read of the store."""
        for p in processes:
            self.entries[p] = self.entries[p]._replace(beat=self.entries[p].beat + 1)
        self.reads += read

    def round(self, failure=None, finished=False, gone=False):
        """The judge's verdict."""

        def store_is_gone():
            self.asked += 1
            return gone

        return self.judge.round(News(self.reads, dict(self.entries)), failure, finished, store_is_gone)


def test_nobody_is_to_blame_while_all_are_heard_of():
    """Catches a count of silence that does not start anew with a beat."""
    world = World()
    for i in range(10 * PEER_ROUNDS):
        world.beat(0, *[2] * (i % (PEER_ROUNDS - 1) == 0))
        assert not world.round()
    assert world.asked == 0


@pytest.mark.parametrize("ever_heard", [False, True])
def test_a_silent_process_is_to_blame_after_the_timeout(ever_heard):
    """Catches a process that dies before its first beat and is never missed."""
    world = World()
    if ever_heard:
        world.beat(0, 2)
        assert not world.round()
    for _ in range(PEER_ROUNDS - 1):
        world.beat(0)
        assert not world.round()
    world.beat(0)
    blame = world.round()
    assert list(blame) == ["2"]
    assert blame["2"].startswith("process 2 (host2, pid 2) has not been heard of for 10 s")
    assert "peer_timeout" in blame["2"]


def test_a_store_that_is_gone_is_found_out_early():
    """Catches a wait for the whole timeout, in which jax aborts, and a question in every round."""
    world = World()
    for _ in range(5):
        world.beat(0, 2)
        assert not world.round(gone=True)
    assert world.asked == 0
    assert not world.round(gone=True) and not world.round(gone=True)
    blame = world.round(gone=True)
    assert list(blame) == ["0"] and "process 0 (host0, pid 0) is gone" in blame["0"]
    assert world.asked == 1


def test_a_store_that_hangs_blames_its_process_alone():
    """Catches all processes blamed when the store can't be read, and so none of them can be heard."""
    world = World()
    world.beat(0, 2)
    verdicts = [world.round() for _ in range(1 + PEER_ROUNDS)]
    assert not any(verdicts[:-1])
    assert list(verdicts[-1]) == ["0"] and "coordination service, has not been heard of" in verdicts[-1]["0"]


def test_an_exception_here_is_to_blame_when_all_others_live_on():
    """Catches a failing process that waits for the timeout before it says so, and one that names no process."""
    world = World()
    for i in range(4):
        world.beat(0, 2)
        blame = world.round(failure="RuntimeError: boom")
        assert bool(blame) == (i == 3), i
    assert list(blame) == ["1"] and "process 1 (host1, pid 1) failed with RuntimeError: boom." in blame["1"]


def test_an_exception_that_another_process_caused_is_not_to_blame():
    """Catches a collective's error that hides the death behind it."""
    world = World()
    failure = "ValueError: connection closed by peer"
    world.beat(0, 2)
    assert not world.round(failure)
    world.beat(0)  # This read was under way; it just missed the last beat of process 2, which the next one finds.
    assert not world.round(failure)
    world.beat(0, 2)
    for _ in range(PEER_ROUNDS):
        assert not world.round(failure)
        world.beat(0)
    assert list(world.round(failure)) == ["2"]


def test_what_another_process_says_comes_first():
    """Catches processes that name different reasons."""
    world = World()
    for _ in range(PEER_ROUNDS - 1):
        world.beat(0)
        assert not world.round()
    world.entries[0] = world.entries[0]._replace(blame={"7": "told"})
    world.beat(0)
    assert world.round() == {"7": "told"}


def test_those_that_run_on_are_to_blame_after_the_exit_timeout():
    """Catches a count that begins before this process has finished, and the blame of one that has finished too."""
    world = World(exit_timeout=5.0)
    world.entries[0] = world.entries[0]._replace(finished=True)
    for _ in range(30):
        world.beat(0, 2)
        assert not world.round()
    for _ in range(9):
        world.beat(0, 2)
        assert not world.round(finished=True)
    world.beat(0, 2)
    blame = world.round(finished=True)
    assert list(blame) == ["2"] and "still runs 5 s after process 1 has finished" in blame["2"]
    world.entries[2] = world.entries[2]._replace(finished=True)
    world.beat(0, 2)
    assert not world.round(finished=True)
