"""Paths that users pass."""

import os
from pathlib import Path


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` with its "~" expanded, from the present working directory, without ".."; symbolic links stay."""
    return Path(os.path.abspath(os.path.expanduser(path)))
