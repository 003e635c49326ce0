"""XLA flags for fast compiles, in the tests and in the processes that they start."""

import importlib.metadata

# The programs are tiny, and run a few times each. HLO passes, which place copies and collectives, are unchanged.
HURRY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith("0.10."):
    # The other emitters compile in a fraction of the time; later versions have no choice.
    HURRY += " --xla_cpu_use_fusion_emitters=false"


def forced(devices: int) -> str:
    """The value of XLA_FLAGS for a process with this number of devices."""
    return f"--xla_force_host_platform_device_count={devices} {HURRY}"
