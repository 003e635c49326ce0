"""Counts what jax compiles."""

import contextlib

import jax


@contextlib.contextmanager
def counted_compiles():
    """A list that grows by one with each compile."""
    compiles = []

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
