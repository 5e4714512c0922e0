"""Labelled sentences and pairs of sentences: files in GLUE's formats, hub sets, and a set every Python carries.

An example is (first sentence, second sentence or "", label).
"""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import importlib
import itertools
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import missing_extra
from ..language.text import HUB_PREFIX, STDLIB_EXCLUDED, VALID_EVERY, split_by_hash

Example = tuple[str, str, str]

# Columns of the first sentence, the second (if any) and the label; the first row that fits decides.
COLUMNS = (
    ("#1 String", "#2 String", "Quality"),  # MRPC
    ("question1", "question2", "is_duplicate"),  # QQP
    ("question1", "question2", "label"),
    ("question", "sentence", "label"),  # QNLI
    ("premise", "hypothesis", "label"),  # MNLI on the hub
    ("sentence1", "sentence2", "gold_label"),  # MNLI
    ("sentence1", "sentence2", "label"),  # RTE, WNLI, MRPC on the hub
    ("sentence", "", "label"),  # SST-2
    ("text", "", "label"),
)
SUFFIXES = (".tsv", ".jsonl", ".txt")
TRAIN = re.compile(r"(?:^|[_.-])train[_.-]")
# In the order of preference: GLUE's own test files have no labels, MRPC's has.
VALID = tuple(re.compile(rf"(?:^|[_.-])(?:{part})[_.-]") for part in ("dev|valid|validation", "test"))

HUB_EXAMPLES = 100_000
STDLIB_FILES = 100  # parsed in two seconds
MAX_PER_FILE = 80


@dataclass(frozen=True)
class SentenceSet:
    """Examples for training and validation.

    Attributes:
        train, valid: the examples.
        labels: in the order of the classes.
        source: provenance, JSON-able.
    """

    train: list[Example]
    valid: list[Example]
    labels: tuple[str, ...]
    source: dict[str, Any]


def load_sentences(data: str | Path | None) -> SentenceSet:
    """Return the set that `data` names.

    Args:
        data: a .tsv file with a heading or a .jsonl file (every twentieth example is held out), a folder of them
            with one called train and one called dev, valid or test, or `hf:<owner>/<name>` with `/<configuration>`
            where the set has several; `None` for lines of the standard library, see `load_code_or_prose`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the columns are none that are known, or a line does not fit.
        ModuleNotFoundError: a hub set is asked for and `datasets` is not installed.
    """
    if data is None:
        return load_code_or_prose()
    name = str(data)
    if name.startswith(HUB_PREFIX):
        return load_hub(name.removeprefix(HUB_PREFIX))
    path = Path(data)
    if path.is_dir():
        train, valid = find_parts(path)
        return _sentence_set(name, read_examples(train), read_examples(valid))
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {path}; pass a .tsv or .jsonl file, a folder of them or hf:...")
    return _held_out(name, read_examples(path))


def find_parts(folder: Path) -> tuple[Path, Path]:
    """Return the files of a folder that hold the training and the validation part, by their names."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    train = [path for path in files if TRAIN.search(path.name)]
    for pattern in VALID:
        if valid := [path for path in files if pattern.search(path.name)]:
            break
    if len(train) != 1 or not valid:
        wanted = "one file called train and one called dev, valid or test (.tsv, .jsonl or MRPC's .txt)"
        raise FileNotFoundError(f"{folder} should have {wanted}; it has {', '.join(p.name for p in files) or 'none'}")
    return train[0], valid[0]  # "dev_matched" comes before "dev_mismatched"


def read_examples(path: Path) -> list[Example]:
    """Return the examples of a .jsonl file, or of a file of columns separated by tabs, with a heading."""
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_table(path)
    examples = list(to_examples(rows, str(path)))
    if not examples:
        raise ValueError(f"{path} has no examples in it")
    return examples


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one in each line."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: should be an object with sentence and label")
            yield row


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of columns separated by tabs; quotation marks mean themselves, as in GLUE."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        heading = next(rows, [])
        for row in rows:
            if len(row) != len(heading):
                raise ValueError(f"{path}, line {rows.line_num}: has {len(row)} columns, the heading {len(heading)}")
            yield dict(zip(heading, row, strict=True))


def to_examples(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Example]:
    """Yield the examples in rows whose columns are known; rows without a label are left out.

    Raises:
        ValueError: the columns are not known, or a later row lacks one.
    """
    columns: tuple[str, str, str] | None = None
    for number, row in enumerate(rows, start=1):
        if columns is None:
            columns = next((c for c in COLUMNS if all(part in row for part in c if part)), None)
            if columns is None:
                known = "; ".join(", ".join(part for part in c if part) for c in COLUMNS)
                raise ValueError(f"{name} has the columns {', '.join(row)}; known are: {known}")
        missing = next((part for part in columns if part and part not in row), None)
        if missing is not None:
            raise ValueError(f"{name}: example {number} has no {missing!r}")
        first, second, label = (str(row[part]) if part else "" for part in columns)
        if label not in ("-1", "-", ""):  # how GLUE marks what annotators did not agree on, and hidden labels
            yield first, second, label


def load_hub(name: str) -> SentenceSet:
    """Return the first `HUB_EXAMPLES` examples of a hub set's training split, every twentieth for validation."""
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ModuleNotFoundError as error:
        raise missing_extra("datasets", "hf") from error
    owner, _, rest = name.partition("/")
    repository, _, configuration = rest.partition("/")
    arguments = (f"{owner}/{repository}", *([configuration] if configuration else []))
    rows = load_dataset(*arguments, split="train", streaming=True)
    return _held_out(HUB_PREFIX + name, list(itertools.islice(to_examples(rows, HUB_PREFIX + name), HUB_EXAMPLES)))


@functools.lru_cache(maxsize=1)
def load_code_or_prose() -> SentenceSet:
    """Return lines of the standard library: "prose" from its documentation strings and comments, "code" otherwise.

    Split by file; as many of one kind as of the other from each file. Files that do not parse are left out. Kept in
    memory.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if STDLIB_EXCLUDED.isdisjoint(path.relative_to(root).parts)]
    if len(files) < 2:
        raise ValueError(f"no Python source text in {root}; pass a .tsv or .jsonl file with --data")
    train, valid = split_by_hash({path.relative_to(root).as_posix(): path for path in files})
    parts = [
        [example for path in some for example in code_or_prose(path.read_bytes())]
        for some in (train[:STDLIB_FILES], valid[: STDLIB_FILES // 4])
    ]
    return _sentence_set(f"code or prose, Python {platform.python_version()} standard library", *parts)


def code_or_prose(source: bytes) -> list[Example]:
    """Return up to `MAX_PER_FILE` lines of a source file, half of each kind, without what gives the kind away.

    Lines have at least three words, and no marks of comments or strings.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's file
            tree = ast.parse(source)
            text = source.decode("utf-8")
    except (SyntaxError, ValueError):
        return []
    inside: set[int] = set()
    prose: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno is not None:
            inside |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            prose += (ast.get_docstring(node) or "").splitlines()
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#"):
            prose.append(line.lstrip("# \t"))
        elif number not in inside:
            code.append(line)
    kinds = [[stripped for line in lines if len((stripped := line.strip()).split()) >= 3] for lines in (code, prose)]
    number = min(MAX_PER_FILE // 2, *map(len, kinds))
    return [
        (line, "", label)
        for lines, label in zip(kinds, ("code", "prose"), strict=True)
        for line in lines[:: max(1, len(lines) // max(number, 1))][:number]
    ]


def _held_out(name: str, examples: list[Example]) -> SentenceSet:
    train = [example for i, example in enumerate(examples) if i % VALID_EVERY != VALID_EVERY - 1]
    valid = examples[VALID_EVERY - 1 :: VALID_EVERY]
    if not valid:
        raise ValueError(f"{name} has {len(examples)} examples, at least {VALID_EVERY} are needed")
    return _sentence_set(name, train, valid)


def _sentence_set(name: str, train: list[Example], valid: list[Example]) -> SentenceSet:
    labels = tuple(sorted({label for _, _, label in train}))
    if len(labels) < 2:
        raise ValueError(f"the training part of {name} has the labels {list(labels)}; at least two are needed")
    unknown = sorted({label for _, _, label in valid} - set(labels))
    if unknown:
        raise ValueError(f"the validation part of {name} has the label {unknown[0]!r}, the training part has not")
    source = {
        "name": name,
        "labels": list(labels),
        "num_train_examples": len(train),
        "num_valid_examples": len(valid),
        "sha256": hashlib.sha256(repr((train, valid)).encode("utf-8", "surrogatepass")).hexdigest()[:16],
    }
    return SentenceSet(train, valid, labels, source)
