"""The manifest of a checkpoint: what it holds, and whether that is still what is there.

Names, kinds, sizes and hashes are checked before anything is parsed.  Hashes find damage, not
forgery: whoever may write the directory may also write a manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..records import CheckpointError, DamagedCheckpointError
from .state_tree import Json, TensorSpec

FORMAT_VERSION = 6
#: The oldest format that is still read; what it lacks is filled in from the live run (``migration``).
OLDEST_VERSION = 2
#: No build will ever get there.
MAX_VERSION = 1_000_000
MANIFEST = "MANIFEST.json"
STATE = "training_state.json"
CONFIG = "config.toml"

#: A manifest line per tensor is about 100 bytes; a state tree a few words per parameter group.
MAX_MANIFEST_BYTES = 2**24
MAX_STATE_BYTES = 2**28

CHECKPOINT_NAME = re.compile(r"checkpoint_step_(0|[1-9][0-9]{0,17})")
PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
#: What parsing a document raises that is not what we wrote (RecursionError is a RuntimeError).
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint directory; ``tensors`` is part -> name -> spec."""

    format_version: int
    library_version: str
    torch_version: str
    step: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Mapping[str, TensorSpec]]


def verify(path: str | Path, *, hashes: bool = True) -> Manifest:
    """Check names, kinds and sizes of all files against the manifest, and their SHA-256.

    Raises:
        CheckpointError: anything differs; the message names the first file that does.
    """
    path = Path(path)
    try:
        if path.is_symlink():
            raise refusal(path, "is a symbolic link; give the directory itself")
        if not path.is_dir():
            old = path.with_name(path.name + ".old")
            advice = f"a save was cut short, the one before is {old.name}" if old.is_dir() else "check the path"
            gone = FileNotFoundError(path)  # of several checkpoints the next one is tried: it may have been rotated out
            raise CheckpointError(f"no checkpoint directory at {path}; {advice}") from gone
        manifest = read_manifest(path)
        name = CHECKPOINT_NAME.fullmatch(path.name)
        if name and int(name[1]) != manifest.step:
            raise refusal(path, f"holds step {manifest.step}; it has been renamed")
        found = {entry.name for entry in path.iterdir()} - {MANIFEST}
        if missing := manifest.files.keys() - found:
            raise refusal(path, f"is incomplete: {min(missing)} is missing")
        if extra := found - manifest.files.keys():
            raise refusal(path, f"holds {min(extra)}, which is not in its manifest")
        for file, record in manifest.files.items():
            check_file(path / file, record, hashes)
    except OSError as error:
        raise unreadable(path, error) from error
    return manifest


@contextlib.contextmanager
def unchanged(path: str | Path) -> Iterator[None]:
    """Around the reading of a checkpoint: nobody puts other files in its place between a check and what it is for.

    One that was removed meanwhile is as good as when it was read.

    Raises:
        CheckpointError: the files are not those that were there at first.
    """
    before = _stamps(Path(path))
    yield
    after = _stamps(Path(path))
    if after and after != before:
        raise CheckpointError(f"checkpoint {path} was written to while it was read; load it again")


def _stamps(path: Path) -> dict[str, tuple[int, ...]]:
    """What tells a file from another one, and from itself after it was written to."""
    try:
        with os.scandir(path) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return {}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_text(fields: Mapping[str, Json]) -> str:
    """Text of a manifest, its own hash included."""

    def dump(fields: Mapping[str, Json]) -> str:
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"

    return dump({**fields, "sha256": hashlib.sha256(dump(fields).encode()).hexdigest()})


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; raises CheckpointError."""
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise refusal(path, f"has no {MANIFEST}: it is no checkpoint, or an unfinished one")
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
        raise refusal(path, f"has a {MANIFEST} that is no file of at most {MAX_MANIFEST_BYTES} bytes")
    try:
        raw = file.read_bytes().decode()
        fields = json.loads(raw)
        version = fields["format_version"]
        if type(version) is not int or not 0 < version < MAX_VERSION:
            raise ValueError("format_version is none")
        if version > FORMAT_VERSION:
            raise _foreign(path, f"has format {version}, newer than {FORMAT_VERSION}; upgrade the library")
        if version < OLDEST_VERSION:
            older = f"has format {version}, older than {OLDEST_VERSION}; load it with the version that wrote it"
            raise _foreign(path, older)
        del fields["sha256"]
        if manifest_text(fields) != raw:
            raise ValueError("its text does not match its own SHA-256")
        manifest = Manifest(
            **{key: fields[key] for key in ("format_version", "library_version", "torch_version", "step")},
            files={name: FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in fields["files"].items()},
            tensors={
                part: {name: TensorSpec(t["dtype"], tuple(map(int, t["shape"]))) for name, t in specs.items()}
                for part, specs in fields["tensors"].items()
            },
        )
        needed = {STATE, CONFIG, *map(tensor_file, manifest.tensors)}
        if bad := [name for name in manifest.files if not PLAIN_FILE.fullmatch(name) or name == MANIFEST]:
            raise ValueError(f"{bad[0]!r} is not the name of a plain file")
        if any(size < 0 for specs in manifest.tensors.values() for spec in specs.values() for size in spec.shape):
            raise ValueError("a tensor has a size below zero")
        if type(manifest.step) is not int or needed - manifest.files.keys():
            raise ValueError("it lacks a step or a file")
    except MALFORMED as error:
        if isinstance(error, CheckpointError):
            raise
        raise refusal(path, f"has a damaged {MANIFEST}: {error}") from error
    return manifest


def check_file(path: Path, record: FileRecord, hashes: bool) -> None:
    """Check one file against its record; raises CheckpointError."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise refusal(path.parent, f"is refused: {path.name} is a link or not a file")
    if status.st_size != record.bytes:
        raise refusal(path.parent, f"is damaged: {path.name} has {status.st_size} bytes, not {record.bytes}")
    largest = {STATE: MAX_STATE_BYTES, CONFIG: MAX_MANIFEST_BYTES}.get(path.name)
    if largest is not None and record.bytes > largest:
        raise refusal(path.parent, f"is refused: {path.name} is larger than {largest} bytes")
    if hashes and sha256_of(path) != record.sha256:
        raise refusal(path.parent, f"is damaged: the SHA-256 of {path.name} is wrong")


def read_document(path: Path) -> dict[str, Json]:
    """Read ``training_state.json``; raises CheckpointError."""
    try:
        document = json.loads((path / STATE).read_bytes())
        if not isinstance(document["trees"], dict):
            raise TypeError("trees")
    except OSError as error:
        raise unreadable(path, error) from error
    except MALFORMED as error:
        raise refusal(path, f"has a {STATE} that cannot be read: {error}") from error
    return dict(document)


def refusal(path: Path, why: str, advice: str = "use another checkpoint") -> DamagedCheckpointError:
    """The error for a checkpoint that must not be used, and what to do instead."""
    return DamagedCheckpointError(f"checkpoint {path} {why}; {advice}")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error where the disk refuses to give a checkpoint: that may pass, and says nothing of its contents."""
    return CheckpointError(f"checkpoint {path} cannot be read: {error}; use another checkpoint")


def _foreign(path: Path, why: str) -> CheckpointError:
    """The error for a checkpoint that is whole, and that this build cannot read."""
    return CheckpointError(f"checkpoint {path} {why}")


def tensor_file(part: str) -> str:
    """Name of the file that holds a part's tensors."""
    return "model_weights.safetensors" if part == "model" else f"{part}_state.safetensors"
