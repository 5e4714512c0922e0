"""Folders of text as people have them: binary files, hidden ones, files of any size."""

from __future__ import annotations

import gzip
import random
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_predict_trainer.tasks.language.text import Corpus, load_corpus

WORDS = b"the quick brown fox jumps over a lazy dog "


def text(size: int, letter: str = "") -> bytes:
    return (WORDS + letter.encode() * 3) * (size // len(WORDS) + 1)


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def share(corpus: Corpus) -> float:
    return len(corpus.train) / (len(corpus.train) + len(corpus.valid))


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("noise.txt", random.Random(0).randbytes(5000), "binary"),
        ("late.txt", WORDS * 200 + b"\0" + WORDS, "binary"),
        ("control.txt", bytes(range(1, 32)) * 50 + WORDS * 5, "binary"),
        ("utf16.txt", "words".encode("utf-16") * 100, "binary"),
        ("noise.txt.gz", gzip.compress(random.Random(1).randbytes(5000)), "binary"),
        (".draft.txt", WORDS * 50, "hidden"),
        (".git/objects/x.txt", WORDS * 50, "hidden"),
        ("deep/.cache/x.md", WORDS * 50, "hidden"),
    ],
)
def test_what_is_no_text_is_passed_over_with_a_count(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    kept = {"a.txt": text(3000, "a"), "b.TXT": text(3000, "b"), "c.md": text(3000, "c")}
    with pytest.warns(UserWarning, match=f"passed over 1 {kind} files"):
        corpus = load_corpus(folder(tmp_path, {**kept, name: content}))
    assert corpus.source["passed_over"] == {kind: 1}
    assert corpus.source["num_train_documents"] in (2, 3)
    assert len(corpus.train) + len(corpus.valid) >= sum(map(len, kept.values()))
    assert 0 not in corpus.train.tolist()


def test_without_text_the_error_says_what_was_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text in .*passed over 1 binary and 2 hidden files"):
        load_corpus(folder(tmp_path, {"a.txt": bytes(3000), ".b.txt": WORDS, ".c/d.txt": WORDS}))


def test_a_file_of_binary_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds binary data"):
        load_corpus(folder(tmp_path, {"a.txt": WORDS * 500 + b"\0"}) / "a.txt")
    with pytest.raises(ValueError, match=r"b\.txt is text in UTF-16.*iconv"):
        load_corpus(folder(tmp_path, {"b.txt": (WORDS * 500).decode().encode("utf-16")}) / "b.txt")


@pytest.mark.parametrize(
    "content", [b"caf\xe9 cr\xe8me " * 300, "日本語の文章。".encode() * 300, b"\x1b[1mbold\x1b[0m\r\n" * 99]
)
def test_text_in_other_encodings_is_text(content: bytes, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = load_corpus(folder(tmp_path, {"a.txt": content, "b.txt": content}))
    assert "passed_over" not in corpus.source


@pytest.mark.parametrize(
    "sizes",
    [[60_000, 50_000], [100_000, 100], [100, 100_000], [100_000] + [50] * 30, [300] * 3, [5000] * 21, [1, 1, 50_000]],
    ids=str,
)
def test_at_least_four_fifths_are_for_training(sizes: list[int], tmp_path: Path) -> None:
    corpus = load_corpus(folder(tmp_path, {f"{k}.txt": text(size)[:size] for k, size in enumerate(sizes)}))
    assert 0.8 <= share(corpus) <= 0.9901
    assert len(corpus.valid) > 0


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(100, 30_000), min_size=2, max_size=12), limit=st.none() | st.integers(1000, 100_000))
def test_whatever_the_sizes_four_fifths_are_for_training(
    sizes: list[int], limit: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("sizes")
    corpus = load_corpus(folder(root, {f"{k}.txt": text(size)[:size] for k, size in enumerate(sizes)}), limit)
    assert share(corpus) >= 0.79  # line feeds between documents are a few bytes
    assert len(corpus.valid) > 0
    assert limit is None or len(corpus.train) <= limit + 2 * len(sizes)


def test_files_stay_on_their_sides_where_none_dominates(tmp_path: Path) -> None:
    files = {f"{k}.txt": text(3000, chr(97 + k))[:3000] for k in range(24)}
    corpus = load_corpus(folder(tmp_path, files))
    train, valid = bytes(corpus.train.tolist()), bytes(corpus.valid.tolist())
    for content in files.values():
        assert (content[:3000] in train) != (content[:3000] in valid)
