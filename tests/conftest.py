"""Every test runs on 8 forced host devices of the CPU; hypothesis draws the same cases every time."""

import gc
import os

import flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.forced(8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.update(flags.compiling_once())

import hypothesis

hypothesis.settings.register_profile(
    "jaxaccum",
    deadline=None,  # A case that meets a new shape compiles.
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxaccum")


def pytest_collection_finish():
    """jax keeps what it traced: at Python's own thresholds a sixth of the time goes to looking that over again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
