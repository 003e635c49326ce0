"""The heartbeat's two threads, with a store in place of the other processes."""

import json
import os
import threading
import time

import pytest

from jaxaccum._jax import coordination
from jaxaccum.distributed import heartbeat
from jaxaccum.distributed.failure_detector import Entry

NOBODY = Entry(0, "elsewhere", False, {})


@pytest.fixture
def store(monkeypatch):
    """The store's contents: process -> its entry, as it was last written."""
    entries = {}
    monkeypatch.setattr(coordination, "write", lambda key, value: entries.update({int(key.rpartition("/")[2]): value}))
    monkeypatch.setattr(coordination, "read", lambda directory: {str(p): value for p, value in list(entries.items())})
    monkeypatch.setattr(coordination, "is_open", lambda: True)
    return entries


@pytest.fixture
def ends(monkeypatch):
    """What `os._exit` was called with; the watch goes on."""
    calls = []
    monkeypatch.setattr(os, "_exit", calls.append)
    return calls


def wait_for(condition):
    """Waits until `condition()` holds, 5 seconds at most."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("process", [0, 1])
def test_the_store_stays_until_the_living_have_read_the_blame(store, ends, capfd, process):
    """Catches a process 0 that takes the store with it: the others would name it, not the one that failed."""
    watch = heartbeat.Watch(process, 3, peer_timeout=5.0, exit_timeout=60.0)
    blame, other = {"2": "process 2 is out of luck."}, 1 - process
    store[other], store[2] = json.dumps(NOBODY), json.dumps(NOBODY._replace(blame=blame))
    wait_for(lambda: process in store and Entry(*json.loads(store[process])).blame == blame)
    assert f"jaxaccum: process {process} of 3 ends: process 2 is out of luck.\n" in capfd.readouterr().err
    if process == 0:
        time.sleep(0.5)
        assert not ends
        store[other] = json.dumps(NOBODY._replace(blame=blame))
    wait_for(lambda: ends)
    assert ends[0] == 1
    watch._stop.set()
    watch._judging.join()
    watch._talking.join()


def test_all_go_on_until_the_last_has_finished(store, ends):
    """Catches a process that leaves, with its part of jax's service, when some have finished but not all."""
    watch = heartbeat.Watch(0, 2, peer_timeout=1.0, exit_timeout=60.0)
    finishing = threading.Thread(target=watch.finish)
    finishing.start()
    for beat in range(8):
        store[1] = json.dumps(NOBODY._replace(beat=beat))
        time.sleep(0.1)
    assert finishing.is_alive()
    store[1] = json.dumps(NOBODY._replace(beat=9, finished=True))
    finishing.join(1.0)
    assert not finishing.is_alive() and not ends


def test_a_process_that_has_not_written_yet_has_not_finished(store, ends):
    """Catches a process that leaves before another one has begun."""
    watch = heartbeat.Watch(0, 2, peer_timeout=5.0, exit_timeout=60.0)
    finishing = threading.Thread(target=watch.finish)
    finishing.start()
    wait_for(lambda: watch._news.of(0).finished)
    assert not watch._all_finished.is_set()
    store[1] = json.dumps(NOBODY._replace(beat=1, finished=True))
    finishing.join(5.0)
    assert not finishing.is_alive() and not ends
