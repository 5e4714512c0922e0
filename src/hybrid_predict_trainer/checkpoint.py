"""Checkpoints: a directory that is complete and verified, or is not there.

::

    checkpoint_step_10000/
        model_weights.safetensors    plain model weights, names as in ``state_dict``
        <part>_state.safetensors     tensors of every other part that has some
        training_state.json          step, loss, phase, ... and the JSON tree of every part
        config.toml                  the configuration in use
        metrics_history.jsonl        (optional, with other texts)
        MANIFEST.json                written last: versions, size and SHA-256 of every file, tensors

A checkpoint is built in ``.tmp-checkpoint_step_N-<pid>-<random>`` beside its final place, forced to
disk and renamed; nothing is ever rewritten in place.  Reading checks names, sizes and hashes before
it parses anything, and no pickle is involved.  Hashes find damage, not forgery: whoever may write
the directory may also write a manifest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .records import CheckpointError, State
from .state_tree import Json, decode, encode, read_tensors, write_tensors
from .state_tree import TensorSpec as TensorSpec
from .state_tree import check_compatible as check_compatible

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "training_state.json"
CONFIG = "config.toml"

#: A manifest line per tensor is about 100 bytes; a state tree a few words per parameter group.
MAX_MANIFEST_BYTES = 2**24
MAX_STATE_BYTES = 2**28

#: A temporary directory is abandoned after a day, whoever made it; arbitrary, far above any save.
STALE_S = 86_400

#: Tells this process from an earlier one with its pid: in a container every run may be pid 1.
_PROCESS = secrets.token_hex(4)

_NAME = re.compile(r"checkpoint_step_(0|[1-9][0-9]{0,17})")
_NAME_OR_OLD = re.compile(_NAME.pattern + r"(\.old)?")
_TMP = re.compile(rf"\.tmp-{_NAME.pattern}-([0-9]{{1,9}})-([0-9a-f]{{6}})([0-9a-f]{{8}})[0-9a-f]{{8}}")
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
#: What parsing a document raises that is not what we wrote (RecursionError is a RuntimeError).
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError)
_PART = re.compile(r"[a-z][a-z0-9_]{0,63}")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint in memory; ``summary`` is what ``save`` was given, non-finite numbers as None."""

    step: int
    parts: dict[str, State]
    summary: dict[str, Json]
    config_toml: str
    manifest: Manifest
    path: Path


def save(
    directory: str | Path,
    step: int,
    parts: Mapping[str, State],
    *,
    config_toml: str = "",
    summary: Mapping[str, Json] | None = None,
    texts: Mapping[str, str] | None = None,
    keep_last_n: int | None = None,
) -> Path:
    """Commit ``directory/checkpoint_step_{step}``, point ``latest`` at it, drop the oldest.

    Args:
        directory: holds the checkpoints of one run; created when missing.
        step: non-negative; a checkpoint of the same step is replaced.
        parts: part name -> state; the part ``model`` can be loaded as plain weights elsewhere.
        config_toml: text of ``config.toml``.
        summary: loss, phase, phase_step, confidence and the like, for people and ``describe``.
        texts: more text files, file name -> contents, such as ``metrics_history.jsonl``.
        keep_last_n: how many intact checkpoints to keep, None for all.  What is not a checkpoint of
            ours, to the last file, is never deleted.

    Raises:
        CheckpointError: the disk refused; what was written is removed, older checkpoints stand.
        TypeError: a part holds something that is not plain data (found before anything is written).
        ValueError: a bad step, name or ``keep_last_n``.
    """
    if type(step) is not int or not _NAME.fullmatch(f"checkpoint_step_{step}"):
        raise ValueError(f"step must be an int in 0..10**18, got {step!r}")
    if keep_last_n is not None and keep_last_n < 1:
        raise ValueError(f"keep_last_n must be at least 1 or None, got {keep_last_n}")
    encoded = {part: encode(state) for part, state in parts.items()}
    contents = _text_files(step, encoded, config_toml, summary or {}, texts or {})
    target = Path(directory) / f"checkpoint_step_{step}"
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        temporary.mkdir()
        _fill(temporary, step, encoded, contents)
        _commit(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save checkpoint {target}: {error}; free space or choose another directory "
            "(older checkpoints are untouched)"
        ) from error
    finally:  # also on an interrupt; after the commit nothing is left under this name
        _discard(temporary)
    try:  # the checkpoint stands: from here on trouble is worth a warning, not the run
        _write(temporary, f"{target.name}\n".encode())
        temporary.replace(target.parent / "latest")
        _sweep(target.parent)
        if keep_last_n is not None:
            _rotate(target, keep_last_n)
    except OSError as error:
        _discard(temporary)
        warnings.warn(f"checkpoint {target} is saved, but tidying up failed: {error}", stacklevel=2)
    return target


def load(path: str | Path) -> LoadedCheckpoint:
    """Read exactly this checkpoint, after verifying it; tensors are on the CPU.

    Raises:
        CheckpointError: missing, damaged, foreign or of a newer format; nothing falls back.
    """
    path = Path(path)
    manifest = verify(path)
    document = _read_document(path)
    try:
        parts = {
            part: decode(tree, read_tensors(path / _tensor_file(part)) if part in manifest.tensors else {})
            for part, tree in document["trees"].items()
        }
        config_toml = (path / CONFIG).read_bytes().decode()  # read_text would change line ends
    except (*_MALFORMED, OSError, SafetensorError) as error:
        raise _refusal(path, f"cannot be read: {error}") from error
    return LoadedCheckpoint(
        step=manifest.step,
        parts=parts,
        summary={key: value for key, value in document.items() if key not in ("format_version", "trees")},
        config_toml=config_toml,
        manifest=manifest,
        path=path,
    )


def verify(path: str | Path, *, hashes: bool = True) -> Manifest:
    """Check names, kinds and sizes of all files against the manifest, and their SHA-256.

    Raises:
        CheckpointError: anything differs; the message names the first file that does.
    """
    path = Path(path)
    try:
        if path.is_symlink():
            raise _refusal(path, "is a symbolic link; give the directory itself")
        if not path.is_dir():
            old = path.with_name(path.name + ".old")
            advice = (
                f"a save was cut short, the one before is {old.name}" if old.is_dir() else "check the path"
            )
            raise CheckpointError(f"no checkpoint directory at {path}; {advice}")
        manifest = _read_manifest(path)
        name = _NAME.fullmatch(path.name)
        if name and int(name[1]) != manifest.step:
            raise _refusal(path, f"holds step {manifest.step}; it has been renamed")
        found = {entry.name for entry in path.iterdir()} - {MANIFEST}
        if missing := manifest.files.keys() - found:
            raise _refusal(path, f"is incomplete: {min(missing)} is missing")
        if extra := found - manifest.files.keys():
            raise _refusal(path, f"holds {min(extra)}, which is not in its manifest")
        for file, record in manifest.files.items():
            _check_file(path / file, record, hashes)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error}") from error
    return manifest


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
        CheckpointError: none is left.
    """
    damaged = 0
    for path in reversed(checkpoints(directory)):
        try:
            verify(path)
        except CheckpointError as error:
            damaged += 1
            warnings.warn(f"skipping a checkpoint: {error}", stacklevel=2)
            if quarantine:
                with contextlib.suppress(OSError):  # a read-only disk: skipping it is enough
                    _quarantine(path)
        else:
            return path
    raise CheckpointError(f"no intact checkpoint in {directory} ({damaged} damaged); start without resuming")


def describe(path: str | Path) -> dict[str, Json]:
    """Verify a checkpoint and sum it up for ``hpt inspect``; the result can be written as JSON.

    ``num_parameters`` counts the numbers in the part ``model``, buffers included, tied ones once.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    path = Path(path)
    manifest = verify(path)
    document = _read_document(path)
    return {
        "path": str(path),
        "verified": True,
        **{key: document.get(key) for key in ("step", "phase", "phase_step", "loss", "confidence")},
        "num_parameters": sum(math.prod(spec.shape) for spec in manifest.tensors.get("model", {}).values()),
        "total_bytes": sum(record.bytes for record in manifest.files.values()),
        "part_bytes": {part: manifest.files[_tensor_file(part)].bytes for part in manifest.tensors},
        "file_bytes": {name: record.bytes for name, record in manifest.files.items()},
        "format_version": manifest.format_version,
        "library_version": manifest.library_version,
        "torch_version": manifest.torch_version,
    }


def _text_files(
    step: int,
    encoded: Mapping[str, tuple[Json, dict[str, Tensor]]],
    config_toml: str,
    summary: Mapping[str, Json],
    texts: Mapping[str, str],
) -> dict[str, bytes]:
    if bad := [part for part in encoded if not _PART.fullmatch(part)]:
        raise ValueError(f"part names are lower-case words, got {bad[0]!r}")
    if {"format_version", "trees"} & summary.keys() or summary.get("step", step) != step:
        raise ValueError("summary may not hold format_version, trees or another step")
    trees = {part: tree for part, (tree, _) in encoded.items()}
    document = {"format_version": FORMAT_VERSION, "step": step, **_finite(summary), "trees": trees}
    contents = {STATE: json.dumps(document, allow_nan=False).encode(), CONFIG: config_toml.encode()}
    if len(contents[STATE]) > MAX_STATE_BYTES:
        raise ValueError(f"the states hold over {MAX_STATE_BYTES} bytes besides tensors; use tensors")
    for name, text in texts.items():
        taken = {MANIFEST.lower(), *(other.lower() for other in contents)}  # some disks ignore case
        if not _PLAIN_FILE.fullmatch(name) or name.lower() in taken or name.endswith(".safetensors"):
            raise ValueError(f"{name!r} cannot be the name of a text file in a checkpoint")
        contents[name] = text.encode()
    return contents


def _finite(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fill(
    temporary: Path,
    step: int,
    encoded: Mapping[str, tuple[Json, dict[str, Tensor]]],
    contents: Mapping[str, bytes],
) -> None:
    for name, content in contents.items():
        _write(temporary / name, content)
    mode = stat.S_IMODE((temporary / STATE).stat().st_mode)
    for part, (tree, tensors) in encoded.items():
        if tensors:
            path = temporary / _tensor_file(part)
            write_tensors(path, tree, tensors)
            path.chmod(mode)  # safetensors makes private files whatever the umask
            _fsync(path)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        library_version=_library_version(),
        torch_version=str(torch.__version__),
        step=step,
        files={
            path.name: FileRecord(path.stat().st_size, _sha256(path)) for path in sorted(temporary.iterdir())
        },
        tensors={
            part: {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
            for part, (_, tensors) in encoded.items()
            if tensors
        },
    )
    text = _manifest_text(asdict(manifest)).encode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise ValueError(f"more tensors than a manifest of {MAX_MANIFEST_BYTES} bytes can list")
    _write(temporary / MANIFEST, text)
    _fsync(temporary)


def _commit(temporary: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if _is_intact(target):
        target.rename(old)
    elif os.path.lexists(target):
        _quarantine(target)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _fsync(target.parent)


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


def _quarantine(path: Path) -> None:
    number, aside = 1, path.with_name(f"{path.name}.corrupt")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.corrupt-{number}")
    path.rename(aside)


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


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this to a directory; for a file it is a failure.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_text(fields: Mapping[str, Json]) -> str:
    def dump(fields: Mapping[str, Json]) -> str:
        return json.dumps(fields, indent=1, sort_keys=True) + "\n"

    return dump({**fields, "sha256": hashlib.sha256(dump(fields).encode()).hexdigest()})


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise _refusal(path, f"has no {MANIFEST}: it is no checkpoint, or an unfinished one")
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
        raise _refusal(path, f"has a {MANIFEST} that is no file of at most {MAX_MANIFEST_BYTES} bytes")
    try:
        raw = file.read_bytes().decode()
        fields = json.loads(raw)
        version = fields["format_version"]
        if type(version) is not int:
            raise ValueError("format_version is not an int")
        if version > FORMAT_VERSION:
            raise _refusal(path, f"has format {version}, newer than {FORMAT_VERSION}", "upgrade the library")
        del fields["sha256"]
        if version != FORMAT_VERSION or _manifest_text(fields) != raw:
            raise ValueError("its text does not match its own SHA-256")
        manifest = Manifest(
            **{key: fields[key] for key in ("format_version", "library_version", "torch_version", "step")},
            files={
                name: FileRecord(int(f["bytes"]), str(f["sha256"])) for name, f in fields["files"].items()
            },
            tensors={
                part: {name: TensorSpec(t["dtype"], tuple(map(int, t["shape"]))) for name, t in specs.items()}
                for part, specs in fields["tensors"].items()
            },
        )
        needed = {STATE, CONFIG, *map(_tensor_file, manifest.tensors)}
        if bad := [name for name in manifest.files if not _PLAIN_FILE.fullmatch(name) or name == MANIFEST]:
            raise ValueError(f"{bad[0]!r} is not the name of a plain file")
        if type(manifest.step) is not int or needed - manifest.files.keys():
            raise ValueError("it lacks a step or a file")
    except _MALFORMED as error:
        if isinstance(error, CheckpointError):
            raise
        raise _refusal(path, f"has a damaged {MANIFEST}: {error}") from error
    return manifest


def _check_file(path: Path, record: FileRecord, hashes: bool) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path.parent, f"is refused: {path.name} is a link or not a file")
    if status.st_size != record.bytes:
        raise _refusal(path.parent, f"is damaged: {path.name} has {status.st_size} bytes, not {record.bytes}")
    if path.name == STATE and record.bytes > MAX_STATE_BYTES:
        raise _refusal(path.parent, f"is refused: {STATE} is larger than {MAX_STATE_BYTES} bytes")
    if hashes and _sha256(path) != record.sha256:
        raise _refusal(path.parent, f"is damaged: the SHA-256 of {path.name} is wrong")


def _read_document(path: Path) -> dict[str, Json]:
    try:
        document = json.loads((path / STATE).read_bytes())
        if not isinstance(document["trees"], dict):
            raise TypeError("trees")
    except (*_MALFORMED, OSError) as error:
        raise _refusal(path, f"has a {STATE} that cannot be read: {error}") from error
    return dict(document)


def _refusal(path: Path, why: str, advice: str = "use another checkpoint") -> CheckpointError:
    return CheckpointError(f"checkpoint {path} {why}; {advice}")


def _tensor_file(part: str) -> str:
    return "model_weights.safetensors" if part == "model" else f"{part}_state.safetensors"


def _library_version() -> str:
    try:
        return importlib.metadata.version("hybrid-predict-trainer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree
