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

import errno
import importlib.metadata
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..notices import warn
from ..records import StateDict
from ..recovery import CheckpointFailed
from .housekeeping import _discard, _is_intact, _quarantine, _rotate, _sweep, _temporary
from .inventory import inventory
from .manifest import (
    CHECKPOINT_NAME,
    CONFIG,
    FORMAT_VERSION,
    MALFORMED,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_STATE_BYTES,
    PLAIN_FILE,
    STATE,
    FileRecord,
    Manifest,
    manifest_text,
    read_document,
    refusal,
    sha256_of,
    tensor_file,
    unchanged,
    unreadable,
)
from .manifest import verify as verify
from .merged import merged
from .narrowed import narrowed
from .spread import tensors_of
from .state_tree import Json, decode, encode, read_tensors, write_tensors
from .state_tree import TensorSpec as TensorSpec
from .state_tree import check_compatible as check_compatible

_PART = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint in memory; ``summary`` is what ``save`` was given, non-finite numbers as None."""

    step: int
    parts: dict[str, StateDict]
    summary: dict[str, Json]
    config_toml: str
    manifest: Manifest
    path: Path


@dataclass(frozen=True, slots=True)
class Draft:
    """All that a checkpoint is going to hold, apart from the live objects it was taken from.

    Attributes:
        step: Of the run.
        encoded: Part -> JSON tree and tensors in host memory.
        contents: Name -> bytes of the text files.
        keep_last_n: As for :func:`save`.
    """

    step: int
    encoded: Mapping[str, tuple[Json, dict[str, Tensor]]]
    contents: Mapping[str, bytes]
    keep_last_n: int | None = None


def _compact(part: str, state: StateDict) -> tuple[Json, dict[str, Tensor]]:
    tree, tensors = merged(*encode(state))
    # states of an optimizer are left as they are: others may want to read them
    return (tree, tensors) if part == "optimizer" else narrowed(tree, tensors)


def draft(
    step: int,
    parts: Mapping[str, StateDict],
    *,
    config_toml: str = "",
    summary: Mapping[str, Json] | None = None,
    texts: Mapping[str, str] | None = None,
    keep_last_n: int | None = None,
    copy: bool = False,
    trees: Mapping[str, tuple[Json, dict[str, Tensor]]] | None = None,
) -> Draft:
    """Put together what :func:`write` is to write; nothing is written yet.

    Args:
        step: non-negative; a checkpoint of the same step is replaced.
        parts: part name -> state; the part ``model`` can be loaded as plain weights elsewhere.
        config_toml: text of ``config.toml``.
        summary: loss, phase, phase_step, confidence and the like, for people and ``describe``.
        texts: more text files, file name -> contents, such as ``metrics_history.jsonl``.
        keep_last_n: how many intact checkpoints to keep, None for all.
        trees: instead of ``parts``, encoded already.
        copy: tensors share no memory with the live ones, which may change before it is written.

    Raises:
        TypeError: a part holds something that is not plain data.
        ValueError: a bad step, name or ``keep_last_n``.
    """
    if type(step) is not int or not CHECKPOINT_NAME.fullmatch(f"checkpoint_step_{step}"):
        raise ValueError(f"step must be an int in 0..10**18, got {step!r}")
    if keep_last_n is not None and keep_last_n < 1:
        raise ValueError(f"keep_last_n must be at least 1 or None, got {keep_last_n}")
    # the part ``model`` is a plain file of weights for others to read: every name is in it
    encoded = (
        {part: encode(state) if part == "model" else _compact(part, state) for part, state in parts.items()}
        if trees is None
        else dict(trees)
    )
    contents = _text_files(step, encoded, config_toml, summary or {}, texts or {})
    if copy:
        encoded = {
            part: (tree, {name: tensor.clone() for name, tensor in tensors.items()})
            for part, (tree, tensors) in encoded.items()
        }
    return Draft(step, encoded, contents, keep_last_n)


def begin(directory: str | Path, step: int) -> Path:
    """A new folder beside the place of a checkpoint, for several ranks to write into.

    Raises:
        CheckpointError: the disk refused.
    """
    target = Path(directory) / f"checkpoint_step_{step}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        temporary = _temporary(target)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointFailed(str(target), str(error)) from error
    return temporary


def give_up(temporary: Path) -> None:
    """Remove what :func:`begin` has made, if it was not committed."""
    _discard(temporary)


def write(directory: str | Path, drafted: Draft, begun: Path | None = None) -> Path:
    """Commit a draft as ``directory/checkpoint_step_{step}``, point ``latest`` at it, drop the oldest.

    Args:
        directory: holds the checkpoints of one run; created when missing.
        drafted: from :func:`draft`.
        begun: from :func:`begin`, with files that belong to it.

    Raises:
        CheckpointError: the disk refused; what was written is removed, older checkpoints stand.
    """
    target = Path(directory) / f"checkpoint_step_{drafted.step}"
    temporary = _temporary(target) if begun is None else begun
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if begun is None:
            _sweep(target.parent)
            temporary.mkdir()
        _fill(temporary, drafted.step, drafted.encoded, drafted.contents)
        _commit(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointFailed(str(target), str(error)) from error
    finally:  # also on an interrupt; after the commit nothing is left under this name
        _discard(temporary)
    try:  # the checkpoint stands: from here on trouble is worth a warning, not the run
        _write(temporary, f"{target.name}\n".encode())
        temporary.replace(target.parent / "latest")
        _sweep(target.parent)
        if drafted.keep_last_n is not None:
            _rotate(target, drafted.keep_last_n)
    except OSError as error:
        _discard(temporary)
        warn(f"checkpoint {target} is saved, but tidying up failed: {error}")
    return target


def save(
    directory: str | Path,
    step: int,
    parts: Mapping[str, StateDict],
    *,
    config_toml: str = "",
    summary: Mapping[str, Json] | None = None,
    texts: Mapping[str, str] | None = None,
    keep_last_n: int | None = None,
) -> Path:
    """:func:`draft` and :func:`write` in one: the checkpoint is there when it returns.

    What is not a checkpoint of ours, to the last file, is never deleted.

    Raises:
        CheckpointError: the disk refused; what was written is removed, older checkpoints stand.
        TypeError: a part holds something that is not plain data (found before anything is written).
        ValueError: a bad step, name or ``keep_last_n``.
    """
    drafted = draft(
        step, parts, config_toml=config_toml, summary=summary, texts=texts, keep_last_n=keep_last_n
    )  # fmt: skip
    return write(directory, drafted)


def load(path: str | Path) -> LoadedCheckpoint:
    """Read exactly this checkpoint, after verifying it; tensors are on the CPU.

    Raises:
        CheckpointError: missing, damaged, foreign or of a newer format; nothing falls back.
    """
    path = Path(path)
    with unchanged(path):
        return _loaded(path)


def _loaded(path: Path) -> LoadedCheckpoint:
    manifest = verify(path)
    document = read_document(path)
    try:
        parts = {
            part: decode(tree, read_tensors(path / tensor_file(part)) if part in manifest.tensors else {})
            for part, tree in document["trees"].items()
        }
        config_toml = (path / CONFIG).read_bytes().decode()  # read_text would change line ends
    except OSError as error:
        raise unreadable(path, error) from error
    except (*MALFORMED, SafetensorError) as error:
        raise refusal(path, f"cannot be read: {error}") from error
    return LoadedCheckpoint(
        step=manifest.step,
        parts=parts,
        summary={key: value for key, value in document.items() if key not in ("format_version", "trees")},
        config_toml=config_toml,
        manifest=manifest,
        path=path,
    )


#: What a trainer says of its run beside its state; null in checkpoints from before it did.
DESCRIBED = (
    "step", "phase", "phase_step", "loss", "confidence", "withdrawn", "num_guard_alarms", "num_guard_restores",
    "num_failures",
)  # fmt: skip


def describe(path: str | Path) -> dict[str, Json]:
    """Verify a checkpoint and sum it up for ``hpt inspect``; the result can be written as JSON.

    ``num_parameters`` counts the numbers in the part ``model``, buffers included, tied ones once.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    path = Path(path)
    manifest = verify(path)
    document = read_document(path)
    tensors = _all_tensors(path, manifest, document)
    return {
        "path": str(path),
        "verified": True,
        **{key: document.get(key) for key in DESCRIBED},
        "num_parameters": sum(math.prod(spec.shape) for spec in tensors.get("model", {}).values()),
        "total_bytes": sum(record.bytes for record in manifest.files.values()),
        "part_bytes": {part: manifest.files[tensor_file(part)].bytes for part in manifest.tensors},
        "held": [asdict(held) for held in inventory(tensors)],
        "file_bytes": {name: record.bytes for name, record in manifest.files.items()},
        "format_version": manifest.format_version,
        "library_version": manifest.library_version,
        "torch_version": manifest.torch_version,
    }


def _all_tensors(
    path: Path, manifest: Manifest, document: Mapping[str, Json]
) -> Mapping[str, Mapping[str, TensorSpec]]:
    """What the manifest lists, or what ranks have written together."""
    try:
        return manifest.tensors or tensors_of(path, document["trees"])
    except OSError as error:
        raise unreadable(path, error) from error
    except (*MALFORMED, SafetensorError) as error:
        raise refusal(path, f"cannot be read: {error}") from error


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
        if not PLAIN_FILE.fullmatch(name) or name.lower() in taken or name.endswith(".safetensors"):
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
    for part, (tree, tensors) in encoded.items():
        if tensors:
            write_tensors(temporary / tensor_file(part), tree, tensors)
    mode = stat.S_IMODE((temporary / STATE).stat().st_mode)
    for path in sorted(temporary.glob("*.*")):
        if path.name not in contents:  # those that ranks have written as well
            path.chmod(mode)  # safetensors makes private files whatever the umask
            sync(path)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        library_version=_library_version(),
        torch_version=str(torch.__version__),
        step=step,
        files={path.name: FileRecord(path.stat().st_size, sha256_of(path)) for path in sorted(temporary.iterdir())},
        tensors={
            part: {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
            for part, (_, tensors) in encoded.items()
            if tensors
        },
    )
    text = manifest_text(asdict(manifest)).encode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise ValueError(f"more tensors than a manifest of {MAX_MANIFEST_BYTES} bytes can list")
    _write(temporary / MANIFEST, text)
    sync(temporary)


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
    sync(target.parent)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder.

    Raises:
        OSError: the disk refused.
    """
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


def _library_version() -> str:
    try:
        return importlib.metadata.version("hybrid-predict-trainer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree
