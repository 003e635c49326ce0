"""The key-value store and the barriers that the processes of `jax.distributed` share.

It uses jax's private API, since jax has no public one for them.
"""

import socket

from jax._src import distributed


def is_open() -> bool:
    """Whether `jax.distributed` is initialised and not shut down."""
    return distributed.global_state.client is not None


def place() -> tuple[int, int]:
    """Returns (this process's index, the number of processes); (0, 1) without `jax.distributed`."""
    state = distributed.global_state
    return (state.process_id, state.num_processes) if is_open() else (0, 1)


def is_gone(timeout: float) -> bool:
    """Whether the store's process has certainly exited: its machine refuses the connection.

    False if the process is slow or stopped, or if the machine doesn't answer within `timeout` seconds.
    """
    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def write(key: str, value: str) -> None:
    """Sets `key` for all processes.

    Raises RuntimeError if the store is gone. It may also block forever then, as while the store's process is stopped.
    """
    _client().key_value_set(key, value, allow_overwrite=True)


def read(directory: str) -> dict[str, str]:
    """Reads all entries below `directory`, which ends with a slash; keys are relative to it. Raises as `write` does."""
    return {key.removeprefix(directory): value for key, value in _client().key_value_dir_get(directory)}


def wait(key: str, timeout: float) -> str:
    """The value of `key` once a process has set it; RuntimeError after `timeout` seconds, or as in `write`."""
    return _client().blocking_key_value_get(key, round(1000 * timeout))


def forget(directory: str) -> None:
    """Removes all entries below `directory`, which ends with a slash. Raises as `write` does."""
    _client().key_value_delete(directory)


def meet(name: str, timeout: float) -> None:
    """Waits at a barrier until every process has called this with `name`, which can be used once.

    Raises RuntimeError in all processes, late ones included, if one hasn't called it within about `timeout` seconds of
    the first call.
    """
    _client().wait_at_barrier(name, round(1000 * timeout))


def _client():
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("jax.distributed is not initialised.")
    return client
