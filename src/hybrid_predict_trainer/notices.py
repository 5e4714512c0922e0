"""What is told to the user while a run goes on: as a warning, and where warnings are errors as a line of the log.

A warning in the middle of a step must not raise: under ``python -W error`` it would leave the step half done, and it
would end a run that has just been kept from ending.  And it points to the line of the user's that it speaks of, however
deep below that line it is said.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path(__file__).parent
#: Folders of ours that are built on the core, and use it as anybody does.
USERS = tuple(f"{ROOT / name}/" for name in ("tasks", "experiments", "cli"))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line, and go on whatever the filters say.

    Args:
        message: One line.
        category: Of the warning.
    """
    try:
        warnings.warn(message, category, stacklevel=users_line())
    except Warning:
        log.warning(message)


def users_line() -> int:
    """``stacklevel`` of the innermost line that is neither the core's nor torch's, whose hooks call us.

    Counted from the caller of this, which is to call ``warnings.warn``; the caller itself where there is no other.
    """
    frame, level = sys._getframe(1), 1
    while _is_between(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
        if frame.f_back is None:
            return 1
        frame, level = frame.f_back, level + 1
    return level


def _is_between(path: str, module: str) -> bool:
    """Whether a frame of this file stands between the user's line and ours."""
    if path.startswith(f"{ROOT}/"):
        return not path.startswith(USERS)
    return module.partition(".")[0] == "torch" or path == contextlib.__file__
