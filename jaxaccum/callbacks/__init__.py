"""Callbacks: they observe a `Trainer`, ask it to stop, or ask for K. They never touch the sums of a window."""

from jaxaccum.callbacks.adaptive import AdaptiveAccumulation
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.callbacks.early_stopping import EarlyStopping
from jaxaccum.callbacks.ema import EMA
from jaxaccum.callbacks.learning_rate import LearningRateMonitor
from jaxaccum.callbacks.model_checkpoint import ModelCheckpoint
from jaxaccum.callbacks.noise_scale import NoiseScaleMonitor
from jaxaccum.callbacks.progress import ProgressBar
from jaxaccum.callbacks.scheduler import GradientAccumulationScheduler

__all__ = [
    "EMA",
    "AdaptiveAccumulation",
    "Callback",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "NoiseScaleMonitor",
    "ProgressBar",
    "TrainerView",
]
