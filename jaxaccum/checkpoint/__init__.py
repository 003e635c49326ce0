"""Checkpoints on disk, by orbax: written in the background, and there as a whole or not at all.

Stores arrays by name and notes as JSON. Knows no `Trainer`: `trainer/loop/run_checkpoint.py` says what a run stores.
"""

from jaxaccum.checkpoint.orbax_io import CUT_OFF, Checkpoint, Writer, load

__all__ = ["CUT_OFF", "Checkpoint", "Writer", "load"]
