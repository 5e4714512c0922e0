"""Next-token prediction on a stream of tokens: windows, batches, loss, validation.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base import Batch, TaskSettings, count_parameters, counter_rng, mean_loss, seeded_model, sent, torch_dtype
from .text import Corpus

NUM_VALID_WINDOWS = 64


def windows(tokens: Tensor, positions: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Return (x, y), each (B, T) int64, y one token ahead of x, from positions (B,) of 1-D tokens."""
    offsets = positions[:, None] + torch.arange(context + 1, device=positions.device)
    taken = tokens[offsets].long()
    return taken[:, :-1], taken[:, 1:]


def check_length(tokens: Tensor, context: int, part: str, source: str) -> None:
    """Raise `ValueError` if there is not one whole window in `tokens`."""
    if len(tokens) < context + 1:
        raise ValueError(
            f"the {part} part of {source} has {len(tokens)} tokens, fewer than context + 1 = {context + 1}; "
            "give more text or a smaller --context"
        )


def token_loss(model: nn.Module, batch: Batch, *, autocast_bf16: bool = False) -> Tensor:
    """Return the mean cross-entropy of a token, nats; the batch is (x, y), each (B, T)."""
    assert isinstance(batch, tuple)
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast_bf16):
        logits: Tensor = model(x)
    # At least float32 here: a bfloat16 log-sum-exp loses the third digit of the loss.
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class TokenWindows:
    """A corpus on a device, cut into windows.

    Args:
        corpus: tokens of both parts; the whole of it sits on the device: a batch then costs a copy of its B positions.
        context: T.
        batch_size: B.
        device: where the batches live.
        autocast_bf16: run the model's forward under bfloat16 autocast.

    Raises:
        ValueError: a part is shorter than one window.
    """

    def __init__(
        self, corpus: Corpus, *, context: int, batch_size: int, device: str = "cpu", autocast_bf16: bool = False
    ) -> None:
        """Check the lengths and place the tokens."""
        for tokens, part in ((corpus.train, "training"), (corpus.valid, "validation")):
            check_length(tokens, context, part, corpus.source["name"])
        self.context = context
        self.batch_size = batch_size
        self.autocast_bf16 = autocast_bf16
        self._train = corpus.train.to(device)
        self._valid = corpus.valid.to(device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield (x, y), each (B, T) int64, at random positions; batch k depends on (seed, k) only."""
        step = start
        while True:
            last = len(self._train) - self.context
            positions = torch.from_numpy(counter_rng(seed, step).integers(last, size=self.batch_size))
            yield windows(self._train, sent(positions, self._train.device), self.context)
            step += 1

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a token, nats."""
        return token_loss(model, batch, autocast_bf16=self.autocast_bf16)

    def evaluate(self, model: nn.Module) -> float:
        """Return the loss on `NUM_VALID_WINDOWS` evenly spaced windows of the validation text."""
        last = len(self._valid) - self.context - 1
        positions = torch.linspace(0, last, NUM_VALID_WINDOWS, dtype=torch.float64).long().to(self._valid.device)
        chunks = torch.split(positions, self.batch_size)
        parts = ((windows(self._valid, chunk, self.context), len(chunk)) for chunk in chunks)
        return mean_loss(self.loss_fn, model, parts)


class ReadsWindows:
    """What every task over windows of one text shares; a subclass sets ``_windows``."""

    _windows: TokenWindows

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield (x, y), each (batch_size, context) int64; batch k depends on (seed, k) only."""
        return self._windows.batches(seed, start)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a token, nats."""
        return self._windows.loss_fn(model, batch)

    def evaluate(self, model: nn.Module) -> float:
        """Return the loss on 64 evenly spaced windows of the validation text."""
        return self._windows.evaluate(model)


class TrainsGpt(ReadsWindows):
    """What tasks that train a GPT of a preset's shape from its beginning share; a subclass sets ``defaults``."""

    name: str
    preset: str

    def _read(self, settings: TaskSettings, shape: Any, corpus: Corpus) -> None:
        """Take the preset's shape, with what the settings say otherwise, and check that its context fits the corpus."""
        self.settings = settings
        self.config = replace(shape, context=settings.context or shape.context)
        self.batch_size = settings.batch_size or shape.batch_size
        self.dtype = torch_dtype(settings.dtype)
        self.source = corpus.source
        self._windows = TokenWindows(
            corpus,
            context=self.config.context,
            batch_size=self.batch_size,
            device=settings.device,
            autocast_bf16=settings.autocast_bf16,
        )

    def _new_model(self) -> nn.Module:
        raise NotImplementedError

    def build_model(self, seed: int) -> nn.Module:
        """Return a new model of the preset's shape."""
        return seeded_model(self._new_model, seed, self.settings, self.dtype)

    def describe(self) -> dict[str, Any]:
        """Return preset, sizes, data provenance and precision."""
        return {
            "task": self.name,
            "preset": self.preset,
            "data": self.source,
            "num_parameters": count_parameters(self._new_model),
            "num_layers": self.config.num_layers,
            "width": self.config.width,
            "context": self.config.context,
            "batch_size": self.batch_size,
            "vocab_size": self.config.vocab_size,
            "num_valid_windows": NUM_VALID_WINDOWS,
            "dtype": str(self.dtype).removeprefix("torch."),
            "autocast_bf16": self.settings.autocast_bf16,
        }
