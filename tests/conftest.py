"""Every test runs on 8 forced host devices of the CPU; hypothesis draws the same cases every time."""

import os

import flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.forced(8)}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

hypothesis.settings.register_profile(
    "jaxaccum",
    deadline=None,  # A case that meets a new shape compiles.
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxaccum")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Each fit builds its own programs; a cache on disk lets XLA compile equal ones once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    former = {name: getattr(jax.config, name) for name in options}
    for settings in (options, former):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is options:
            yield
