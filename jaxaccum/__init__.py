"""Takes one optimizer step from K small batches: the big batch's exact gradient, in a small batch's memory.

Example:
  >>> import jax, jax.numpy as jnp, optax, jaxaccum
  >>> loss = lambda params, x: jnp.mean((x @ params - 1.0) ** 2)
  >>> params, batch = jnp.zeros(4), jnp.ones((256, 4))
  >>> value, grads = jaxaccum.value_and_grad(loss, num_micro_batches=8)(params, batch)  # the whole window in a call
  >>> print(value, grads)
  1.0 [-2. -2. -2. -2.]
  >>> opt = jaxaccum.MultiSteps(optax.sgd(0.1), every_k_schedule=8)  # or one micro-batch in a call
  >>> state = opt.init(params)
  >>> for micro_batch in batch.reshape(8, 32, 4):
  ...     updates, state = opt.update(jax.grad(loss)(params, micro_batch), state, params)
  ...     params = optax.apply_updates(params, updates)
  >>> print(params)
  [0.2 0.2 0.2 0.2]

`HostDriven` is the fastest way to take micro-batches one by one. `Weighted` weights them by examples or tokens.
`coupled_value_and_grad` is for contrastive losses, `flax` for linen and nnx models, and `Trainer` runs the whole loop.
`plan` finds the micro-batch that fits in memory.

The submodules `callbacks`, `checkpoint`, `distributed`, `equinox`, `flax` and `loggers` are imported when they are
first used.
README.md beside this file is the guide to the code.
"""

import importlib as _importlib
import importlib.metadata as _metadata
import importlib.util as _util
import typing as _typing

from jaxaccum._choosing.adaptive import AdaptiveAccumulation
from jaxaccum._choosing.noise_scale import NoiseScale
from jaxaccum._collectives.report import collectives
from jaxaccum._devices.zero import zero_sharding
from jaxaccum._gradient.casting import cast
from jaxaccum._gradient.local import local_value_and_grad
from jaxaccum._multi_steps.api import MultiSteps
from jaxaccum._multi_steps.from_optax import from_optax
from jaxaccum._multi_steps.host_driven import HostDriven
from jaxaccum._multi_steps.state import MultiStepsState, set_every_k
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._window.api import value_and_grad
from jaxaccum._window.coupled_api import coupled_value_and_grad

if _typing.TYPE_CHECKING:
    from jaxaccum import callbacks as callbacks
    from jaxaccum import checkpoint as checkpoint
    from jaxaccum import distributed as distributed
    from jaxaccum import equinox as equinox
    from jaxaccum import flax as flax
    from jaxaccum import loggers as loggers
    from jaxaccum._choosing.planner import plan
    from jaxaccum.task import Task
    from jaxaccum.trainer.trainer import Trainer

__all__ = [
    "AccumulationSchedule",
    "AdaptiveAccumulation",
    "HostDriven",
    "MultiSteps",
    "MultiStepsState",
    "NoiseScale",
    "Task",
    "Trainer",
    "Weighted",
    "cast",
    "collectives",
    "coupled_value_and_grad",
    "from_optax",
    "local_value_and_grad",
    "plan",
    "set_every_k",
    "value_and_grad",
    "zero_sharding",
]

try:
    __version__ = _metadata.version("jaxaccum")
except _metadata.PackageNotFoundError:  # A source tree that is not installed.
    __version__ = "0+unknown"

# The host side, the adapters and what needs jax's distributed runtime are loaded when they are asked for.
_LAZY = {"Task": "jaxaccum.task", "Trainer": "jaxaccum.trainer", "plan": "jaxaccum._choosing.planner"}
_EXTRAS = ("equinox", "flax")
_LAZY_MODULES = ("callbacks", "checkpoint", "distributed", *_EXTRAS, "loggers")


def __getattr__(name: str) -> object:
    if name in _LAZY_MODULES:
        return _importlib.import_module(f"jaxaccum.{name}")
    if name in _LAZY:
        return getattr(_importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxaccum' has no attribute {name!r}")


def __dir__() -> list[str]:
    names = {*globals(), *_LAZY, *_LAZY_MODULES}
    # Whoever walks through the names, as help does, must not fail for an extra that is not installed.
    return sorted(names - {extra for extra in _EXTRAS if not _util.find_spec(extra)})
