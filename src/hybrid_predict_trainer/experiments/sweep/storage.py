"""Where a search keeps its trials: a journal in its folder, or any storage of Optuna's by URL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..arms.options import InputError

JOURNAL = "journal.log"


class StorageError(Exception):
    """The storage did not answer, or not as it should."""


def opened(url: str | None, out: Path) -> Any:
    """The storage.

    Args:
        url: As Optuna takes it; None: the journal in the search's folder.
        out: The search's folder.

    Raises:
        InputError: it cannot be opened.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage

    from .journal import Journal, KernelLock

    with storage_errors():
        if url is None:
            journal = out / JOURNAL
            backend = Journal(journal, KernelLock(out / f"{JOURNAL}.lock"))
            try:
                return JournalStorage(backend)  # plays back what the file says
            except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
                raise InputError(
                    f"{journal}: is damaged ({type(error).__name__}: {_line(error)}); without it 'hpt sweep' makes it "
                    "anew from the trials' folders"
                ) from None
        try:
            # a connection that the server has closed meanwhile is made anew
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except ImportError as error:
            hint = '; run: pip install "hybrid-predict-trainer[postgresql]"' if "psycopg" in f"{url} {error}" else ""
            raise InputError(f"--storage {without_secrets(url)}: {_line(error)}{hint}") from None
        except (ValueError, optuna.exceptions.OptunaError) as error:
            raise InputError(f"--storage {without_secrets(url)}: {_line(error)}") from None
        except Exception as error:
            if type(error).__module__.startswith("sqlalchemy.exc"):
                if "NoSuchModule" in type(error).__name__ or "ArgumentError" in type(error).__name__:
                    raise InputError(f"--storage {without_secrets(url)}: {_line(error)}") from None
                raise StorageError(_line(error)) from error
            raise


def without_secrets(url: str) -> str:
    """A URL as it may be shown: without user and password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else url


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Whatever a storage raises because it is away is a :class:`StorageError`."""
    import filelock
    import optuna

    try:
        yield
    except (InputError, StorageError):
        raise
    except (optuna.exceptions.StorageInternalError, filelock.Timeout, OSError) as error:
        raise StorageError(_line(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("sqlalchemy."):
            raise StorageError(_line(error)) from error
        raise


def _line(error: BaseException) -> str:
    """The first sentence of what may be a page."""
    told = str(getattr(error, "orig", None) or error.__cause__ or error)
    return " ".join(told.split())[:200] or type(error).__name__
