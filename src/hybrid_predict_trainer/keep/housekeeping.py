"""A folder of checkpoints: the newest, rotation, what an interrupted writer left behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..distributed.collective import Collective
from ..notices import warn
from ..records import CheckpointError, DamagedCheckpointError
from .manifest import CHECKPOINT_NAME
from .manifest import verify as verify

#: A temporary directory is abandoned after a day, whoever made it; arbitrary, far above any save.
STALE_S = 86_400

T = TypeVar("T")


#: Tells this process from an earlier one with its pid: in a container every run may be pid 1.
_PROCESS = secrets.token_hex(4)


_NAME_OR_OLD = re.compile(CHECKPOINT_NAME.pattern + r"(\.old)?")


_TMP = re.compile(rf"\.tmp-{CHECKPOINT_NAME.pattern}-([0-9]{{1,9}})-([0-9a-f]{{6}})([0-9a-f]{{8}})[0-9a-f]{{8}}")


def checkpoints(directory: str | Path) -> list[Path]:
    """All directories named as checkpoints, oldest step first, unverified.

    ``checkpoint_step_N.old`` counts where a save was killed between setting it aside and putting the
    new one in its place.
    """
    directory = Path(directory)
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for entry in sorted(directory.iterdir(), reverse=True):  # N.old comes before N, which replaces it
            match = _NAME_OR_OLD.fullmatch(entry.name)
            if match and entry.is_dir() and not entry.is_symlink():
                found[int(match[1])] = entry
    return [found[step] for step in sorted(found)]


def latest(directory: str | Path, *, quarantine: bool = False) -> Path:
    """The checkpoint of the highest step that verifies; damaged ones are skipped with a warning.

    The file ``latest`` is for people and scripts and is not consulted: a kill may leave it behind.

    Args:
        directory: where ``save`` wrote.
        quarantine: rename damaged ones to ``*.corrupt``, so that they are not tried again.

    Raises:
        CheckpointError: none is left, or the newest is of a build that this one cannot read.
    """

    def verified(path: Path) -> Path:
        verify(path)
        return path

    return first_good(directory, verified, quarantine=quarantine)


def newest_good(ranks: Collective, directory: str | Path, take: Callable[[Path], T]) -> T:
    """As :func:`first_good`, on every rank: the first one finds it, and all of them take it, or none.

    Args:
        ranks: That come here together.
        directory: Where ``save`` wrote; all of them see it.
        take: Reads one, and fails on every rank if it fails on one.
    """
    if ranks.alone:
        return first_good(directory, take)
    while True:
        path = ranks.alone_does(lambda: latest(directory, quarantine=True))
        try:
            return take(path)
        except CheckpointError as error:
            if not ranks.any(isinstance(error, DamagedCheckpointError)):
                raise
            ranks.alone_does(partial(_set_aside, path, error))


def _set_aside(path: Path, error: CheckpointError) -> None:
    try:
        aside = _quarantine(path)
    except OSError as refused:
        raise error from refused
    warn(f"skipping a checkpoint (it is {aside.name} now): {error}")


def first_good(directory: str | Path, take: Callable[[Path], T], *, quarantine: bool = True) -> T:
    """Try the checkpoints of a folder, the newest first, until one can be taken.

    What is damaged is set aside as ``*.corrupt``, where it can be looked at and is never tried again; what the disk
    does not give is passed over, because it may be there again later.  Any other refusal is not the checkpoint's
    fault (another model, a newer format) and is not got round by going back to an older one.

    Args:
        directory: Where ``save`` wrote.
        take: Reads one.
        quarantine: False: nothing is renamed.

    Returns:
        What ``take`` returned.

    Raises:
        CheckpointError: none is left, or ``take`` refused one that is whole.
    """
    refused = 0
    for path in reversed(checkpoints(directory)):
        try:
            return take(path)
        except CheckpointError as error:
            damaged = isinstance(error, DamagedCheckpointError)
            if not damaged and not isinstance(error.__cause__, OSError):
                raise
            refused += 1
            aside = None
            if damaged and quarantine:
                with contextlib.suppress(OSError):  # a read-only disk: skipping it is enough
                    aside = _quarantine(path)
            kept = "" if aside is None else f" (it is {aside.name} now)"
            warn(f"skipping a checkpoint{kept}: {error}")
    raise CheckpointError(f"no intact checkpoint in {directory} ({refused} damaged); begin a new run in another folder")


def _sweep(directory: Path) -> None:
    """Finish what a killed save left: unnamed directories go, a set-aside checkpoint comes back."""
    for path in list(directory.iterdir()):
        temporary = _TMP.fullmatch(path.name)
        if temporary and not _may_be_in_use(path, int(temporary[2]), temporary[3], temporary[4]):
            _discard(path)
        if path.name.endswith(".old") and _NAME_OR_OLD.fullmatch(path.name):
            target = path.with_suffix("")
            if not os.path.lexists(target):
                path.rename(target)
            elif _is_intact(path):
                _delete(path)
            else:
                _quarantine(path)


def _rotate(newest: Path, keep_last_n: int) -> None:
    kept = 1  # the one just written, whatever its step
    for path in reversed(checkpoints(newest.parent)):
        if path == newest or not _is_intact(path):
            continue
        if kept < keep_last_n:
            kept += 1
        else:
            _delete(path)


def _delete(checkpoint: Path) -> None:
    # Renamed first: a kill half-way must not leave half a checkpoint under a checkpoint's name.
    doomed = _temporary(checkpoint)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _quarantine(path: Path) -> Path:
    number, aside = 1, path.with_name(f"{path.name}.corrupt")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.corrupt-{number}")
    path.rename(aside)
    return aside


def _temporary(target: Path) -> Path:
    name = target.name.removesuffix(".old")
    return target.with_name(f".tmp-{name}-{os.getpid()}-{_host()}{_PROCESS}{secrets.token_hex(4)}")


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _may_be_in_use(path: Path, pid: int, host: str, process: str) -> bool:
    if time.time() - path.lstat().st_mtime > STALE_S:
        return False
    if host != _host() or os.name == "nt":  # there, signal 0 is no question but a Ctrl-C
        return True
    if pid == os.getpid():
        return process == _PROCESS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_intact(path: Path) -> bool:
    """Whether every file is there in its size: cheap, for housekeeping, not for reading."""
    try:
        verify(path, hashes=False)
    except CheckpointError:
        return False
    return True
