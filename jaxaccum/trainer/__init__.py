"""The `Trainer`: from a loader to micro-steps, the programs that are compiled, and the course of a run."""

from jaxaccum.trainer.trainer import Trainer

__all__ = ["Trainer"]
