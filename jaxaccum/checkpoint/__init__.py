"""Checkpoints on disk, by orbax: written in the background, and there as a whole or not at all."""

from jaxaccum.checkpoint.orbax_io import CUT_OFF, Checkpoint, Writer, load

__all__ = ["CUT_OFF", "Checkpoint", "Writer", "load"]
