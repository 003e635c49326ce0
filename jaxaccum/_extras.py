"""Optional dependencies: imported where they are used, and named where they are missing."""

import importlib
from types import ModuleType


def require(module: str, extra: str, what: str) -> ModuleType:
    """Imports `module`, which the extra `extra` of this package installs, for `what`.

    Raises:
      ImportError: if it is missing; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{what} needs {package}: pip install "jaxaccum[{extra}]".') from error
