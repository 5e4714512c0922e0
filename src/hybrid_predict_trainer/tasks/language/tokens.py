"""Tokens larger than a byte: the 512-piece vocabulary of the stories models, and GPT-2's byte-pair encoding.

Both read "<|endoftext|>" as the border between documents.
"""

from __future__ import annotations

import base64
import binascii
import functools
import importlib
import itertools
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..base import data_dir, missing_extra
from .text import Corpus

END_OF_TEXT = "<|endoftext|>"

# llama2.c's layout, which is sentencepiece's: <unk>, <s>, </s>, then one piece per byte.
BOS, FIRST_BYTE = 1, 3
FIRST_PIECE = FIRST_BYTE + 256
# A space belongs to the word behind it; no piece crosses the borders these words have (`ScoredVocabulary` checks).
WORD = re.compile(r"\n| ?[^ \n]+| ")

# GPT-2's own pattern (Radford et al. 2019, encoder.py); the standard library's `re` has no \p.
GPT2_WORD = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer(Protocol):
    """Text to tokens."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        ...

    def encode(self, text: bytes) -> Tensor:
        """Return the text's tokens, (num_tokens,) int32."""
        ...


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> Corpus:
    """Return the corpus (bytes) in the tokenizer's tokens."""
    train, valid = (tokenizer.encode(part.numpy().tobytes()) for part in (corpus.train, corpus.valid))
    source = {
        **corpus.source,
        "tokens": tokenizer.name,
        "num_train_tokens": len(train),
        "num_valid_tokens": len(valid),
        "num_train_bytes": len(corpus.train),
        "num_valid_bytes": len(corpus.valid),
    }
    return Corpus(train, valid, source)


# --- pieces with scores


def read_pieces(path: Path) -> list[tuple[float, bytes]]:
    """Return (score, piece) of a llama2.c vocabulary file.

    Its format, little endian: int32 longest piece; then for each piece float32 score, int32 length, its bytes.

    Raises:
        ValueError: the file ends within a piece.
    """
    raw = path.read_bytes()
    pieces: list[tuple[float, bytes]] = []
    offset = 4
    while offset < len(raw):
        try:
            score, length = struct.unpack_from("<fi", raw, offset)
            (piece,) = struct.unpack_from(f"<{length}s", raw, offset + 8)
        except struct.error as error:
            raise ValueError(f"{path} is no vocabulary file of llama2.c: {error}") from error
        pieces.append((score, piece))
        offset += 8 + length
    return pieces


def merge(symbols: list[bytes], scores: dict[bytes, float]) -> list[bytes]:
    """Return the symbols, neighbours joined while the result is a piece: the best score first, then the leftmost.

    Args:
        symbols: the characters of a word.
        scores: of the pieces.
    """
    symbols = list(symbols)
    while True:
        joined = [a + b for a, b in itertools.pairwise(symbols)]
        known = [(-scores[piece], i) for i, piece in enumerate(joined) if piece in scores]
        if not known:
            return symbols
        _, i = min(known)
        symbols[i : i + 2] = [joined[i]]


class ScoredVocabulary:
    """Greedy merges by score, as sentencepiece and llama2.c do it (github.com/karpathy/llama2.c, run.c).

    A document becomes the token for its beginning, a space, its text without surrounding white space. Characters
    that are no piece become their bytes.

    Args:
        pieces: (score, piece), the first `FIRST_PIECE` of them control pieces and bytes.

    Raises:
        ValueError: there are no bytes among the pieces, or a piece goes across words.
    """

    name = "pieces of llama2.c"

    def __init__(self, pieces: Sequence[tuple[float, bytes]]) -> None:
        """Index the pieces."""
        if len(pieces) < FIRST_PIECE or pieces[FIRST_BYTE][1] != b"<0x00>":
            raise ValueError(f"a vocabulary needs <unk>, <s>, </s> and 256 bytes first, got {len(pieces)} pieces")
        learned = list(enumerate(pieces))[FIRST_PIECE:]
        for _, (_, piece) in learned:
            if b" " in piece[1:] or (b"\n" in piece and piece != b"\n"):
                raise ValueError(f"the piece {piece!r} goes across words; only vocabularies split at spaces are read")
        self.vocab_size = len(pieces)
        self._scores = {piece: score for _, (score, piece) in learned}
        self._tokens = {piece: token for token, (_, piece) in learned}
        self._word = functools.lru_cache(maxsize=200_000)(self._encode_word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokens: list[int] = []
        for symbol in merge([c.encode("utf-8", "surrogateescape") for c in word], self._scores):
            known = self._tokens.get(symbol)
            tokens += [FIRST_BYTE + byte for byte in symbol] if known is None else [known]
        return tuple(tokens)

    def encode(self, text: bytes) -> Tensor:
        """Return the text's tokens, (num_tokens,) int32; any bytes will do, also where they are no UTF-8."""
        tokens: list[int] = []
        for document in text.decode("utf-8", "surrogateescape").split(END_OF_TEXT):
            if stripped := document.strip():
                tokens.append(BOS)
                for word in WORD.findall(" " + stripped):
                    tokens += self._word(word)
        return torch.tensor(tokens, dtype=torch.int32)


# --- GPT-2


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding through `tiktoken`.

    Args:
        ranks: piece -> token.
    """

    name = "gpt2"

    def __init__(self, ranks: dict[bytes, int]) -> None:
        """Build the encoder.

        Raises:
            ModuleNotFoundError: `tiktoken` is not installed.
        """
        try:
            tiktoken: Any = importlib.import_module("tiktoken")
        except ModuleNotFoundError as error:
            raise missing_extra("tiktoken", "hf") from error
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            self.name, pat_str=GPT2_WORD, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )

    def encode(self, text: bytes) -> Tensor:
        """Return the text's tokens, (num_tokens,) int32; bytes that are no UTF-8 become the replacement character."""
        tokens = self._encoding.encode(text.decode("utf-8", "replace"), allowed_special={END_OF_TEXT})
        return torch.tensor(tokens, dtype=torch.int32)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return piece -> rank of a file in tiktoken's format: a line holds a piece in base64 and its rank.

    Raises:
        ValueError: a line holds something else, or ranks are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: a piece in base64 and its rank were expected") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks should be 0 to {len(ranks) - 1}, each of them once")
    return ranks


def load_gpt2() -> Gpt2Tokenizer:
    """Return GPT-2's tokenizer from `HPT_DATA_DIR`/tokenizers/gpt2.tiktoken.

    Raises:
        FileNotFoundError: it is not there.
        ModuleNotFoundError: `tiktoken` is not installed.
    """
    path = data_dir("GPT-2's vocabulary (tokenizers/gpt2.tiktoken)") / "tokenizers" / "gpt2.tiktoken"
    return Gpt2Tokenizer(read_ranks(path))
