"""Words as BERT cuts them: word pieces where a vocabulary is at hand, hashed words where none is.

Shapes: N examples, T tokens. An encoded example is (2, T): tokens and segments.
"""

from __future__ import annotations

import functools
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .data import Example

# Where the uncased vocabulary of BERT has them; hashed words begin behind them.
PAD, UNKNOWN, CLS, SEP = 0, 100, 101, 102
FIRST_WORD = 103
LONGEST_WORD = 100  # characters; BERT calls longer ones unknown


class WordTokenizer(Protocol):
    """Sentences to tokens."""

    @property
    def name(self) -> str:
        """As reports call it."""
        ...

    def encode(self, sentence: str) -> list[int]:
        """Return the sentence's tokens, without any for its ends."""
        ...


def basic_words(sentence: str) -> list[str]:
    """Return the words and marks of a sentence, in lower case and without accents: BERT's "uncased" rule.

    Source: Devlin et al. 2018, tokenization.py, without its rule for Chinese.
    """
    plain = "".join(c for c in unicodedata.normalize("NFD", sentence.lower()) if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if _is_mark(c) else c for c in plain)
    return spaced.split()


def _is_mark(c: str) -> bool:
    # All of ASCII that is no letter, digit or space, also "$" and "^", which Unicode does not call punctuation.
    return (c.isascii() and not c.isalnum() and c.isprintable() and c != " ") or unicodedata.category(c)[0] == "P"


class HashedWords:
    """Each word is a token by its CRC-32; words may share one.

    Args:
        vocab_size: tokens there are, the special ones included.
    """

    name = "hashed words"

    def __init__(self, vocab_size: int) -> None:
        """Keep the size."""
        self._num_words = vocab_size - FIRST_WORD

    def encode(self, sentence: str) -> list[int]:
        """Return the sentence's tokens."""
        return [FIRST_WORD + zlib.crc32(word.encode()) % self._num_words for word in basic_words(sentence)]


class WordPieces:
    """The longest known piece first, "##" before pieces inside a word (Wu et al. 2016, arXiv 1609.08144).

    Args:
        vocabulary: piece -> token, with [PAD], [UNK], [CLS] and [SEP] where BERT's uncased one has them.

    Raises:
        ValueError: it has not.
    """

    name = "word pieces"

    def __init__(self, vocabulary: dict[str, int]) -> None:
        """Check the special pieces."""
        for piece, token in (("[PAD]", PAD), ("[UNK]", UNKNOWN), ("[CLS]", CLS), ("[SEP]", SEP)):
            if vocabulary.get(piece) != token:
                raise ValueError(f"the vocabulary has {piece} at {vocabulary.get(piece)}, bert-base-uncased at {token}")
        self._vocabulary = vocabulary
        self._word = functools.lru_cache(maxsize=200_000)(self._encode_word)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokens: list[int] = []
        start = 0
        while start < len(word) <= LONGEST_WORD:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._vocabulary), None)
            if end is None:
                return (UNKNOWN,)
            tokens.append(self._vocabulary[prefix + word[start:end]])
            start = end
        return tuple(tokens) or (UNKNOWN,)

    def encode(self, sentence: str) -> list[int]:
        """Return the sentence's tokens."""
        return [token for word in basic_words(sentence) for token in self._word(word)]


def read_vocabulary(path: Path) -> WordPieces:
    """Return the word pieces of a vocab.txt: one in each line, its token the line's number from 0."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return WordPieces({piece: token for token, piece in enumerate(lines)})


def truncate(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Return both, shortened at their ends until they fit into `room`: always the longer one."""
    excess = max(0, len(first) + len(second) - room)
    for _ in range(excess):
        if len(first) > len(second):
            first = first[:-1]
        else:
            second = second[:-1]
    return first, second


def encode_examples(examples: Sequence[Example], tokenizer: WordTokenizer, context: int) -> Tensor:
    """Return (N, 2, T) int32: [CLS] first [SEP] second [SEP], padded, and the segment (0 or 1) of each token."""
    encoded = torch.zeros(len(examples), 2, context, dtype=torch.int32)
    for row, (first, second, _) in zip(encoded, examples, strict=True):
        num_special = 3 if second else 2
        a, b = truncate(tokenizer.encode(first), tokenizer.encode(second), context - num_special)
        tokens = [CLS, *a, SEP, *([*b, SEP] if second else [])]
        row[0, : len(tokens)] = torch.tensor(tokens)
        row[1, len(a) + 2 : len(tokens)] = 1
    return encoded
