"""Flags for fast compiles, in the tests and in the processes that they start."""

import atexit
import importlib.metadata
import shutil
import tempfile

# The programs are tiny, and run a few times each. HLO passes, which place copies and collectives, are unchanged.
HURRY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jax").startswith(("0.9.", "0.10.")):
    # The other emitters compile in a fraction of the time; later versions have no choice.
    HURRY += " --xla_cpu_use_fusion_emitters=false"


def forced(devices: int) -> str:
    """The value of XLA_FLAGS for a process with this number of devices."""
    return f"--xla_force_host_platform_device_count={devices} {HURRY}"


def compiling_once() -> dict[str, str]:
    """Variables by which this process, and those that it starts, compile equal programs once.

    The folder is this process's own: jax writes its entries in place, so that another one could read half of an entry.
    """
    folder = tempfile.mkdtemp(prefix="jaxaccum-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
