"""What to say where a framework is not installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..recovery import IntegrationError


def framework(name: str, extra: str) -> ModuleType:
    """Import a framework.

    Args:
        name: Of the module.
        extra: Of this package, that installs it.

    Raises:
        IntegrationError: it is not installed; one line says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != name.split(".")[0]:
            raise  # it is there, and something that it needs is not
        told = f"{name} is not installed: pip install 'hybrid-predict-trainer[{extra}]'"
        raise IntegrationError(name, told) from error
