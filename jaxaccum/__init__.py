"""Exact gradient accumulation for JAX, Flax and optax."""

from jaxaccum._accumulator import Weighted as Weighted
from jaxaccum._cast import cast as cast
from jaxaccum._collectives import collectives as collectives
from jaxaccum._local import local_value_and_grad as local_value_and_grad
from jaxaccum._multi_steps import MultiSteps as MultiSteps
from jaxaccum._schedule import AccumulationSchedule as AccumulationSchedule
from jaxaccum._state import MultiStepsState as MultiStepsState
from jaxaccum._state import set_every_k as set_every_k
from jaxaccum._value_and_grad import value_and_grad as value_and_grad
from jaxaccum._zero import zero_sharding as zero_sharding
