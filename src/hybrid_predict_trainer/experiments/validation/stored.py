"""Results that were written earlier, by anybody: what they lack is said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ...records import ConfigError


@contextlib.contextmanager
def read_from(where: Path) -> Iterator[None]:
    """Around whatever uses stored results: a figure that is missing or of another kind is told with its place.

    Args:
        where: The file, or the folder where it may be any of several.

    Raises:
        ConfigError: something was missing or of another kind.
    """
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else str(error)
        within = "holds a result that is" if where.is_dir() else "is"
        raise ConfigError(f"{where}: {within} damaged ({what}); delete it to have it measured again") from error
