"""Every test runs on 8 forced host devices of the CPU; hypothesis draws the same cases every time."""

import os

# Compiled in a hurry: most of the time goes into compiling, and level 0 is that of machine code alone.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis

hypothesis.settings.register_profile(
    "jaxaccum",
    deadline=None,  # A case that meets a new shape compiles.
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxaccum")
