"""Small files that may come from anybody: read with limits, written without following links, symbolic or hard.

A folder of results is passed around, unpacked from archives and shared.  Where a JSON or TOML file is expected there
may be a pipe that never ends, a device, a file of a terabyte or nesting a million deep; where a file is to be written
there may be a symbolic link to somebody's file elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .notices import warn

#: Largest JSON file that is read: results with the curves of a thousand runs are a tenth of it.
MAX_JSON_BYTES = 256_000_000
#: Longest line of a metrics file; ours take a few hundred bytes, predictions that are kept some thousands.
MAX_LINE_BYTES = 10_000_000

#: Flags that not every system has.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_CLOSE = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _CLOSE


class UnusableFileError(ValueError):
    """A file cannot be read or written as asked; the message is one line that names it."""


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file open for reading, links to one included.

    Raises:
        UnusableFileError: missing, unreadable, or no regular file (a pipe, a device, a folder).
    """
    try:
        # without O_NONBLOCK the opening of a pipe that nobody writes to waits for ever
        descriptor = os.open(path, os.O_RDONLY | _NO_WAIT | _CLOSE)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UnusableFileError(f"{path}: cannot be read: not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise UnusableFileError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: Which.
        limit: Most bytes that are read.

    Raises:
        UnusableFileError: as :func:`opened`, or it is longer than the limit.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""  # what says 0, in /proc say, may be any length
    if max(size, len(content)) > limit:
        raise UnusableFileError(f"{path}: {max(size, len(content))} bytes is too large (at most {limit})")
    return content


def read_lines(path: str | Path, limit: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Lines of a regular file of any length, one at a time.

    Args:
        path: Which.
        limit: Longest line, bytes.

    Raises:
        UnusableFileError: as :func:`opened`, or a line is longer.
    """
    with opened(path) as file:
        for number in itertools.count(1):
            line = file.readline(limit + 1)
            if len(line) > limit:
                raise UnusableFileError(f"{path}, line {number}: is too long (at most {limit} bytes)")
            if not line:
                return
            yield line


def read_text(path: str | Path, limit: int) -> str:
    """The content of a regular file as text; a byte-order mark is dropped.

    Raises:
        UnusableFileError: as :func:`read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableFileError(f"{path}: is not UTF-8 text") from None


def read_json(path: str | Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        UnusableFileError: as :func:`read_text`, or it is not JSON, or nested too deep.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except RecursionError:
        raise UnusableFileError(f"{path}: is nested too deep") from None
    except ValueError as error:
        raise UnusableFileError(f"{path}: not valid JSON: {error}") from None


def read_json_object(path: str | Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UnusableFileError: as :func:`read_json`, or it is another kind of value.
    """
    found = read_json(path, limit)
    if not isinstance(found, dict):
        raise UnusableFileError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: beside its place first, then into it.

    Raises:
        UnusableFileError: there is a symbolic link or something else that is no regular file.
        OSError: the disk refused; what stood there stands.
    """
    path = Path(path)
    refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        with os.fdopen(os.open(partial, _NEW, 0o666), "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        partial.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say what was to be written
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_between(path: str | Path, name: str, text: str) -> None:
    """Write lines of a document: between its marks of that name where it has them, else alone.

    Args:
        path: Of the document.
        name: ``<!-- name: begin -->`` and ``<!-- name: end -->`` are the marks.
        text: Ends with a line break.

    Raises:
        OSError: it cannot be written.
    """
    path, first, last = Path(path), f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if path.is_file():
        before, begin, rest = path.read_text(encoding="utf-8").partition(first)
        _, end, after = rest.partition(last)
        if begin and end:
            text = f"{before}{first}\n{text}{last}{after}"
    write_named(path, text)


def write_named(path: str | Path, text: str) -> None:
    """Write a file whose place a person named: a link, a pipe or ``/dev/stdout`` is what was meant.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and (path.is_symlink() or not path.is_file()):
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)


def refuse_unwritable(path: str | Path) -> None:
    """Refuse a place for a file before hours are spent on what is to be written there.

    Raises:
        UnusableFileError: it is a folder, lies below a file, or may not be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UnusableFileError(f"{path}: is a folder, a file is to be written there")
    place = path if path.exists() else next((p for p in path.absolute().parents if p.exists()), path)
    if place != path and not place.is_dir():
        raise UnusableFileError(f"{path}: cannot be written: {place} is no folder")
    if not os.access(place, os.W_OK):
        raise UnusableFileError(f"{path}: cannot be written: no right to write to {place}")


def open_append(path: str | Path, *, written: bool = True) -> int:
    """A descriptor that appends to a regular file, which is made if missing.

    A file that has other names too (hard links: a copy made with ``cp -al``) is replaced by one of its own first, so
    that what the other names show stays as it is.

    Args:
        path: Of the file.
        written: False: only a lock is held on it, which every name must share.

    Raises:
        UnusableFileError: there is a symbolic link, a pipe, a device or a folder.
        OSError: it cannot be opened.
    """
    refuse_special(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_FOLLOW | _NO_WAIT | _CLOSE
    descriptor = os.open(path, flags, 0o666)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):  # it came between
            raise UnusableFileError(f"{path}: cannot be written: not a regular file")
        if found.st_nlink == 1 or not written:
            return descriptor
        _part_from_links(Path(path), stat.S_IMODE(found.st_mode))
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return os.open(path, flags, 0o666)


def end_torn_line(path: str | Path) -> None:
    """See to it that what is appended to a file of JSON lines begins a line of its own.

    A process that was killed while it wrote leaves half a record; that is dropped, and said.  A last line that is
    whole and only lacks its end gets it.  Anything that is no regular file is left alone, and so is a tail that is no
    record of ours.

    Args:
        path: May be missing.

    Raises:
        OSError: the disk refused.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        return
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - MAX_LINE_BYTES, 0))
        tail = file.read().rpartition(b"\n")[2]
    if not tail:
        return
    torn = tail.startswith(b"{") and not _is_json(tail)
    with path.open("r+b") as file:
        if torn:
            file.truncate(size - len(tail))
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
    if torn:
        warn(f"{path}: the last line was torn ({len(tail)} bytes of a record) and has been dropped")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _part_from_links(path: Path, mode: int) -> None:
    """Give a name a file of its own, with the content and the permissions of the one it shared with other names."""
    partial = _partial(path)
    try:
        with opened(path) as shared, os.fdopen(os.open(partial, _NEW, 0o600), "wb") as own:
            shutil.copyfileobj(shared, own)
        partial.chmod(mode)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Where a file is written before it takes its place: a name that nothing has."""
    return path.parent / f".{path.name[:80]}.{secrets.token_hex(4)}.part"


def refuse_special(path: str | Path) -> None:
    """Refuse to write where something stands that is no regular file.

    Raises:
        UnusableFileError: a symbolic link (dangling or not), a folder, a pipe, a device.
        OSError: the name cannot be looked up.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UnusableFileError(f"{path}: is a symbolic link, which is not written through; remove it")
    if not stat.S_ISREG(mode):
        raise UnusableFileError(f"{path}: is not a regular file, so it is not written to; remove it")


def refuse_links(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse to write to a folder where a name, or anything below it, is a symbolic link.

    Args:
        folder: May be a link itself: whoever named it chose it.
        names: Of files and folders in it.

    Raises:
        UnusableFileError: the first link that was found.
    """
    waiting = [Path(folder) / name for name in names]
    while waiting:
        path = waiting.pop()
        if path.is_symlink():
            raise UnusableFileError(f"{path}: is a symbolic link, which is not written through; remove it")
        if path.is_dir():
            waiting += path.iterdir()
