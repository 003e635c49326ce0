"""Exact gradient accumulation for JAX, Flax and optax."""

import importlib as _importlib
import typing as _typing

from jaxaccum._accumulator import Weighted as Weighted
from jaxaccum._cast import cast as cast
from jaxaccum._collectives import collectives as collectives
from jaxaccum._host_driven import HostDriven as HostDriven
from jaxaccum._local import local_value_and_grad as local_value_and_grad
from jaxaccum._multi_steps import MultiSteps as MultiSteps
from jaxaccum._schedule import AccumulationSchedule as AccumulationSchedule
from jaxaccum._state import MultiStepsState as MultiStepsState
from jaxaccum._state import set_every_k as set_every_k
from jaxaccum._value_and_grad import value_and_grad as value_and_grad
from jaxaccum._zero import zero_sharding as zero_sharding

if _typing.TYPE_CHECKING:
    from jaxaccum import callbacks as callbacks
    from jaxaccum import checkpoint as checkpoint
    from jaxaccum import loggers as loggers
    from jaxaccum.task import Task as Task
    from jaxaccum.trainer import Trainer as Trainer

# The host side is loaded when it is asked for.
_LAZY = {"Task": "jaxaccum.task", "Trainer": "jaxaccum.trainer"}
_LAZY_MODULES = ("callbacks", "checkpoint", "loggers")


def __getattr__(name: str) -> object:
    if name in _LAZY_MODULES:
        return _importlib.import_module(f"jaxaccum.{name}")
    if name in _LAZY:
        return getattr(_importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxaccum' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
