"""The key-value store of `jax.distributed`: what can be told without a second process."""

import socket

import pytest
from jax._src import distributed

from jaxaccum._jax import coordination


@pytest.fixture
def store(monkeypatch):
    """A port that accepts connections, as the store's address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(distributed.global_state, "coordinator_address", f"127.0.0.1:{server.getsockname()[1]}")
        yield server


def test_a_store_is_gone_if_its_machine_refuses(store):
    """Catches a store that is taken for dead, or for alive, by the wrong sign."""
    assert not coordination.is_gone(1.0)
    store.close()
    assert coordination.is_gone(1.0)


@pytest.mark.parametrize("error", [TimeoutError, socket.gaierror, ConnectionResetError])
def test_a_store_that_does_not_answer_is_not_gone(store, monkeypatch, error):
    """Catches the end of all processes for a slow machine."""

    def create_connection(address, timeout):
        raise error

    monkeypatch.setattr(socket, "create_connection", create_connection)
    assert not coordination.is_gone(1.0)


def test_without_a_store():
    """Catches a process that believes in others, or that waits for them."""
    assert not coordination.is_open() and coordination.place() == (0, 1)
    with pytest.raises(RuntimeError, match=r"jax\.distributed is not initialised"):
        coordination.write("key", "value")
