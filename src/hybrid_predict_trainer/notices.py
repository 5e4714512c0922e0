"""What is told to the user while a run goes on: as a warning, and where warnings are errors as a line of the log.

A warning in the middle of a step must not raise: under ``python -W error`` it would leave the step half done, and it
would end a run that has just been kept from ending.
"""

from __future__ import annotations

import logging
import warnings

log = logging.getLogger(__name__)


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn, and go on whatever the filters say.

    Args:
        message: One line.
        stacklevel: As for ``warnings.warn``, called from where this is called.
    """
    try:
        warnings.warn(message, stacklevel=stacklevel + 1)
    except Warning:
        log.warning(message)
