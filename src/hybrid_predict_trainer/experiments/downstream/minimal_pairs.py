"""Minimal pairs (BLiMP, Warstadt et al., TACL 8, 2020): is the grammatical sentence the more likely one?

For models over bytes, in-process; a model too small to tell stands at one half.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ...records import ConfigError
from ...tasks.base import DATA_DIR_VARIABLE

FILE = Path("eval") / "blimp.jsonl.gz"
#: Pairs of an evaluation, spread evenly over the file: a standard error of 2.5 % at one half.
NUM_PAIRS = 400
Pair = tuple[str, str]


@functools.lru_cache(maxsize=4)
def load(path: Path | None = None, count: int = NUM_PAIRS) -> tuple[Pair, ...]:
    """(good, bad) sentences; empty where the file is not there.

    Args:
        path: None: :data:`FILE` below ``HPT_DATA_DIR``.
        count: At most so many.

    Raises:
        ConfigError: the file is there and holds something else.
    """
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if path is None:
        if not folder or not (Path(folder) / FILE).is_file():
            return ()
        path = Path(folder) / FILE
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
        rows = [json.loads(line) for line in lines[:: max(1, len(lines) // count)]][:count]
        return tuple((str(row["good"]), str(row["bad"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no file of minimal pairs (JSON lines with good and bad, gzip): {error}"
        ) from error


@torch.no_grad()
def log_likelihood(model: nn.Module, text: str, context: int) -> float:
    """Sum of the log-probabilities of a text's bytes after the first, each given at most ``context`` bytes before it.

    Args:
        model: Tokens (B, T) of bytes to logits (B, T, V).
        text: At least two bytes.
        context: Longest T of the model.
    """
    tokens = torch.tensor(list(text.encode()), device=next(model.parameters()).device)
    done, total = 1, 0.0
    while done < len(tokens):
        end = min(len(tokens), done + (context if done == 1 else max(1, context // 2)))
        piece = tokens[max(0, end - context - 1) : end]
        logits = model(piece[None, :-1])[0].float()
        count = end - done
        total -= float(functional.cross_entropy(logits[-count:], piece[-count:], reduction="sum"))
        done = end
    return total


def accuracy(model: nn.Module, pairs: Sequence[Pair], context: int) -> float:
    """Share of pairs whose good sentence is the more likely one."""
    training = model.training
    model.eval()
    right = sum(log_likelihood(model, good, context) > log_likelihood(model, bad, context) for good, bad in pairs)
    model.train(training)
    return right / len(pairs)
