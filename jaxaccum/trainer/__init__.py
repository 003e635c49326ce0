"""The `Trainer`, in three packages: `input` (loader to micro-steps), `programs` (what is compiled), `loop` (the run).

`trainer.py` is the public class. It and `loop` alone know callbacks and loggers.
"""

from jaxaccum.trainer.trainer import Trainer

__all__ = ["Trainer"]
