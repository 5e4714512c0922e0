"""Text as tokens: the corpus every Python carries, local files, named sets, streams from a hub.

A token is a byte. Every source ends in one `Corpus`: two uint8 tensors in memory and where they came from.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import importlib
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import data_dir, missing_extra

NUM_BYTE_TOKENS = 256
STDLIB_BYTES = 8_000_000  # of the library's 12 MB: read in half a second; 4000 steps of 16 x 128 are one pass
LOCAL_BYTES = 256_000_000
STREAM_BYTES = 64_000_000
VALID_EVERY = 20  # files or documents; of a single file the last 1 / VALID_EVERY

#: Of a folder's text that is split by file; beyond, one file dominates.
LEAST_VALID, MOST_VALID = 0.01, 0.2

NUM_LOOKED_AT = 65_536  # bytes of a file, to see whether it is text
#: Bytes that text has next to none of; tab, line feed, form feed, carriage return, backspace and escape it may have.
CONTROL_BYTES = bytes(set(range(32)) - {8, 9, 10, 12, 13, 27})

STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
PART_NAME = re.compile(r"(?:^|[_.-])(train|valid|test)[_.-]")
TEXT_SUFFIXES = (".txt", ".py", ".md", ".gz")
NAMED_SETS = ("tinystories", "wikitext-2", "novels", "tinyshakespeare")
STDLIB, MANUAL = "stdlib", "manual"  # what every Python brings: its library's source, and its manual in prose
HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and validation.

    Attributes:
        train: (num_tokens,) uint8.
        valid: (num_tokens,) uint8, from other files or documents, or the end of a single file.
        source: provenance, JSON-able.
    """

    train: Tensor
    valid: Tensor
    source: dict[str, Any]


def load_corpus(data: str | Path | None, max_bytes: int | None = None) -> Corpus:
    """Return the corpus that `data` names.

    Args:
        data: a file or folder; else one of `NAMED_SETS` (under `HPT_DATA_DIR`); else `hf:<owner>/<name>`;
            "manual" for the Python manual's prose; "stdlib" or `None` for the standard library's source text.
        max_bytes: read at most this much training text, or the source's own limit.

    Raises:
        FileNotFoundError: there is no such file, folder or set.
        ValueError: there is no text in it.
        ModuleNotFoundError: a hub set is asked for and `datasets` is not installed.
    """
    if data is None:  # whatever the working directory holds
        return load_stdlib(max_bytes or STDLIB_BYTES)
    name = str(data)
    if name.startswith(HUB_PREFIX):
        return load_hub(name.removeprefix(HUB_PREFIX), max_bytes or STREAM_BYTES)
    path = Path(name)
    if not path.exists() and name in NAMED_SETS:
        path = data_dir(f"data set {name!r}") / "text" / name
    elif not path.exists() and name in EMBEDDED:
        return EMBEDDED[name](max_bytes or STDLIB_BYTES)
    if path.is_dir():
        return load_folder(path, max_bytes or LOCAL_BYTES, name)
    if path.is_file():
        return load_file(path, max_bytes or LOCAL_BYTES, name)
    sets = ", ".join((*NAMED_SETS, *EMBEDDED))
    known = f"a text file, a folder of them, hf:<owner>/<name> or one of {sets}"
    raise FileNotFoundError(f"no file or folder {path}; pass {known}")


@functools.lru_cache(maxsize=2)
def load_stdlib(max_bytes: int, without: frozenset[str] = frozenset()) -> Corpus:
    """Return the Python standard library's source text, without its tests, split by file; kept in memory.

    Args:
        max_bytes: read at most this much training text, and as much for validation.
        without: names of folders to leave out as well.
    """
    root = Path(sysconfig.get_path("stdlib"))
    excluded = STDLIB_EXCLUDED | without
    files = [path for path in root.rglob("*.py") if excluded.isdisjoint(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"no Python source text in {root}; pass a text file or folder with --data")
    train, valid = split_by_hash({path.relative_to(root).as_posix(): path for path in files})
    name = f"Python {platform.python_version()} standard library"
    return _corpus(name, read_files(train, max_bytes), read_files(valid, max_bytes))


MANUAL_PACKAGE = "pydoc_data"
MANUAL_VALID_EVERY = 6  # of 79 chapters, many of them short: a twentieth would be less text than is validated on


def load_manual(max_bytes: int) -> Corpus:
    """Return the chapters of the Python reference that `help()` shows: English prose, split by chapter.

    Half a megabyte that looks unlike source text, in every installation that has `help()`.
    """
    try:
        topics: dict[str, str] = importlib.import_module(f"{MANUAL_PACKAGE}.topics").topics
    except ModuleNotFoundError as error:
        raise ValueError("this Python comes without its manual (pydoc_data); pass a text file with --data") from error
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    left = max_bytes
    # In the hash's order, as files are: a chapter stays on its side, and a limit favours no letter.
    for index, name in enumerate(sorted(topics, key=name_hash)):
        held_out = index == 0 or name_hash(name) % MANUAL_VALID_EVERY == 0
        text = topics[name].encode()[: None if held_out else left]
        parts[held_out].append(text)
        left -= 0 if held_out else len(text)
    return _corpus(f"Python {platform.python_version()} manual", *parts)


EMBEDDED: dict[str, Callable[[int], Corpus]] = {STDLIB: load_stdlib, MANUAL: load_manual}


def load_file(path: Path, max_bytes: int, name: str) -> Corpus:
    """Return one file's text, the last twentieth of it for validation, under the name reports call it by."""
    text = read_text(path, max_bytes)
    if not text:
        raise ValueError(f"{path} is empty; pass a file with text in it")
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{path} is text in UTF-16, and a token is a byte of UTF-8: convert it (iconv -f UTF-16 -t UTF-8)"
        )
    if b"\0" in text[:NUM_LOOKED_AT]:  # who names a file means it: other control characters may be
        raise ValueError(f"{path} holds binary data; pass a text file, or one compressed as .gz")
    cut = len(text) - len(text) // VALID_EVERY
    return _corpus(name, [text[:cut]], [text[cut:]])


def load_folder(path: Path, max_bytes: int, name: str) -> Corpus:
    """Return a folder's text: split by name if all files are called train, valid or test, else by file.

    Where a split by file would keep more than a fifth of the text from training, or leave next to nothing for
    validation, because one file dominates, each file gives its last twentieth instead.  Hidden files and folders
    and files of binary content are passed over; how many is said, and told by the corpus' `source`.

    Args:
        path: searched with its subfolders.
        max_bytes: read at most this much training text, and as much for validation where files say their part.
        name: what reports call it.
    """
    files, passed_over = text_files(path)
    if not files:
        kinds = f"no file in it ends in {', '.join(TEXT_SUFFIXES)} and is not empty"
        raise ValueError(f"no text in {path}: {kinds}{passed_over_words(passed_over)}")
    if passed_over:
        warnings.warn(f"{path}{passed_over_words(passed_over)}", stacklevel=2)
    corpus = load_files(path, files, max_bytes, name)
    return replace(corpus, source={**corpus.source, "passed_over": passed_over}) if passed_over else corpus


def text_files(path: Path) -> tuple[list[Path], dict[str, int]]:
    """Return the text files below a folder in the order of their names, and how many of which kind were passed over."""
    files: list[Path] = []
    passed_over: dict[str, int] = {}
    for found in sorted(path.rglob("*")):
        if found.suffix.lower() not in TEXT_SUFFIXES or not found.is_file() or found.stat().st_size == 0:
            continue
        hidden = any(part.startswith(".") for part in found.relative_to(path).parts)
        if not hidden and not is_binary(read_text(found, NUM_LOOKED_AT)):
            files.append(found)
            continue
        kind = "hidden" if hidden else "binary"
        passed_over[kind] = passed_over.get(kind, 0) + 1
    return files, passed_over


def passed_over_words(passed_over: dict[str, int]) -> str:
    """Return the end of a sentence about a folder; empty where nothing was passed over."""
    told = " and ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    return f": passed over {told} files" if told else ""


def is_binary(content: bytes) -> bool:
    """Return whether the beginning of a file is no text in any encoding whose line ends are single bytes."""
    head = content[:NUM_LOOKED_AT]
    return b"\0" in head or len(head.translate(None, CONTROL_BYTES)) < 0.9 * len(head)


def load_files(path: Path, files: list[Path], max_bytes: int, name: str) -> Corpus:
    """Return the text of a folder's files, at least one, split."""
    if len(files) == 1:
        return load_file(files[0], max_bytes, name)
    parts = [PART_NAME.search(p.name) for p in files]
    train = [p for p, part in zip(files, parts, strict=True) if part and part[1] == "train"]
    valid = [p for p, part in zip(files, parts, strict=True) if part and part[1] == "valid"]
    # Every name must say its part: a project with a train.py and a valid.py is not a split data set.
    if all(parts) and train and valid:
        return _corpus(name, read_files(train, max_bytes), read_files(valid, max_bytes))
    train, valid = split_by_hash({p.relative_to(path).as_posix(): p for p in files})
    texts = read_files(train, max_bytes), read_files(valid, max_bytes // 4)
    sizes = [sum(map(len, text)) for text in texts]
    if LEAST_VALID * sum(sizes) <= sizes[1] <= MOST_VALID * sum(sizes):
        return _corpus(name, *texts)
    whole = read_files([*valid, *train], max_bytes)  # the order of their hashes, but for those held out
    cuts = [len(text) - len(text) // VALID_EVERY for text in whole]
    pairs = list(zip(whole, cuts, strict=True))
    ends = [text[cut:] for text, cut in pairs if cut < len(text)]
    return _corpus(name, [text[:cut] for text, cut in pairs], ends) if ends else _corpus(name, *texts)


def load_hub(name: str, max_bytes: int) -> Corpus:
    """Return the first documents of a hub set, `max_bytes` in all, every twentieth for validation."""
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ModuleNotFoundError as error:
        raise missing_extra("datasets", "hf") from error
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for index, text in enumerate(stream_texts(load_dataset, name)):
        document = text.encode()
        parts[index % VALID_EVERY == VALID_EVERY - 1].append(document)
        size += len(document)
        if size >= max_bytes:
            break
    train, valid = parts
    if not valid:
        have = f"{HUB_PREFIX}{name} gave {len(train)} documents in {max_bytes} bytes"
        raise ValueError(f"{have}, at least {VALID_EVERY} are needed; choose a larger set or raise data_bytes")
    return _corpus(HUB_PREFIX + name, train, valid)


def stream_texts(load_dataset: Callable[..., Iterable[dict[str, Any]]], name: str, **options: Any) -> Iterator[str]:
    """Yield the texts of a set's training split without downloading it first.

    Args:
        load_dataset: `datasets.load_dataset`, or anything that takes the same arguments.
        name: as on the hub, or a loader's name such as "json" with `data_files` among the options.
        options: passed on.

    Raises:
        ValueError: the documents have no field "text".
    """
    for row in load_dataset(name, split="train", streaming=True, **options):
        if "text" not in row:
            raise ValueError(f'{name} has no field "text", only {", ".join(row)}; choose a text set')
        yield row["text"]


def name_hash(name: str) -> int:
    """Return a 64-bit hash of a name that is the same in every process (Python's `hash` is not)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split_by_hash(files: dict[str, Path]) -> tuple[list[Path], list[Path]]:
    """Return (train, valid), about every twentieth file for validation and at least one; needs two files.

    By the hash of its name, so that a file stays on its side when others come and go; in the hash's order, so
    that a limit on the bytes read does not favour the beginning of the alphabet.
    """
    names = sorted(files, key=lambda name: (name_hash(name), name))
    valid = [name for name in names if name_hash(name) % VALID_EVERY == 0] or names[:1]
    if len(valid) == len(names):
        valid = names[:1]
    held_out = set(valid)
    return [files[name] for name in names if name not in held_out], [files[name] for name in valid]


def read_text(path: Path, max_bytes: int) -> bytes:
    """Return the first `max_bytes` of a file, decompressed if its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(max_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file ({error}); unpack or replace it") from error


def read_files(paths: Iterable[Path], max_bytes: int) -> list[bytes]:
    """Return the files' texts in this order, `max_bytes` in all: one may be cut, the rest left out."""
    texts: list[bytes] = []
    left = max_bytes
    for path in paths:
        if left <= 0:
            break
        texts.append(read_text(path, left))
        left -= len(texts[-1])
    return texts


def _corpus(name: str, train: list[bytes], valid: list[bytes]) -> Corpus:
    texts = [b"\n\n".join(documents) for documents in (train, valid)]
    source = {
        "name": name,
        "tokens": "bytes",
        "num_train_tokens": len(texts[0]),
        "num_valid_tokens": len(texts[1]),
        "num_train_documents": len(train),
        "num_valid_documents": len(valid),
        "sha256": hashlib.sha256(b"".join(texts)).hexdigest()[:16],
    }
    return Corpus(_tokens(texts[0]), _tokens(texts[1]), source)


def _tokens(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
