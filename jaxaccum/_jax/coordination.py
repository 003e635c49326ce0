"""The key-value store and the barriers that the processes of `jax.distributed` share.

The one module that touches jax's private API: jax has no public name for them.
"""

import socket

from jax._src import distributed


def is_open() -> bool:
    """Whether `jax.distributed` is initialised, and not shut down."""
    return distributed.global_state.client is not None


def place() -> tuple[int, int]:
    """(this process' number, how many there are); (0, 1) without `jax.distributed`."""
    state = distributed.global_state
    return (state.process_id, state.num_processes) if is_open() else (0, 1)


def is_gone(timeout: float) -> bool:
    """Whether the store's process is gone for certain: its machine answers, and says that nobody listens there.

    False where it is slow or stopped, and where the machine has not answered within `timeout` seconds.
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

    Raises:
      RuntimeError: if the store is gone. The call can also wait for ever then, as it does while its process is stopped.
    """
    _client().key_value_set(key, value, allow_overwrite=True)


def read(directory: str) -> dict[str, str]:
    """All entries below `directory`, which ends with a slash; their keys without it.

    Raises:
      RuntimeError: as for `write`.
    """
    return {key.removeprefix(directory): value for key, value in _client().key_value_dir_get(directory)}


def wait(key: str, timeout: float) -> str:
    """What `key` is, once a process has set it.

    Raises:
      RuntimeError: if none has within `timeout` seconds; else as for `write`.
    """
    return _client().blocking_key_value_get(key, round(1000 * timeout))


def forget(directory: str) -> None:
    """Removes all entries below `directory`, which ends with a slash.

    Raises:
      RuntimeError: as for `write`.
    """
    _client().key_value_delete(directory)


def meet(name: str, timeout: float) -> None:
    """Waits until every process has called this with the same `name`, which is good for one time.

    Raises:
      RuntimeError: if one hasn't within `timeout` seconds, or one more, of the first one's call; it gets it too, then.
    """
    _client().wait_at_barrier(name, round(1000 * timeout))


def _client():
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("jax.distributed is not initialised.")
    return client
