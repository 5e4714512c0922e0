"""A small GPT and the language-modelling task.

Shapes: B sequences, T tokens, W width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .base import (
    Batch,
    TaskDefaults,
    TaskSettings,
    count_parameters,
    counter_rng,
    mean_loss,
    seeded_model,
    torch_dtype,
    unknown_name,
)
from .text import NUM_BYTE_TOKENS, Corpus, load_corpus


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """A model's shape and the peak learning rate it is trained with.

    Attributes:
        num_layers: blocks.
        width: of the residual stream; the MLP is four times as wide.
        num_heads: must divide width.
        context: most tokens a sequence may have.
        lr: peak rate for AdamW; measured for 0.9M, scaled down with size by hand for the rest.
        batch_size: default number of sequences per batch.
        vocab_size: tokens the model knows; the task's data are bytes.
        tied: use the embedding as the head.
    """

    num_layers: int
    width: int
    num_heads: int
    context: int
    lr: float
    batch_size: int = 16
    vocab_size: int = NUM_BYTE_TOKENS
    tied: bool = False


# Named by the number of parameters, which a test counts.
PRESETS: dict[str, GptConfig] = {
    "0.3M": GptConfig(num_layers=2, width=96, num_heads=3, context=128, lr=3e-3),
    "0.9M": GptConfig(num_layers=4, width=128, num_heads=4, context=128, lr=3e-3),
    "3M": GptConfig(num_layers=6, width=192, num_heads=6, context=256, lr=2e-3),
    "10M": GptConfig(num_layers=8, width=320, num_heads=5, context=256, lr=1.5e-3),
    "30M": GptConfig(num_layers=9, width=512, num_heads=8, context=512, lr=1e-3),
    # GPT-2 small with its vocabulary, for the cost of it; fed with bytes all the same.
    "124M": GptConfig(num_layers=12, width=768, num_heads=12, context=1024, lr=6e-4, vocab_size=50257, tied=True),
}
DEFAULT_PRESET = "0.9M"

NUM_VALID_WINDOWS = 64


class Attention(nn.Module):
    """Causal self-attention of `num_heads` heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Draw the four projections."""
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W)."""
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Draw the block's weights."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down_proj(functional.gelu(self.up_proj(self.mlp_norm(x))))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Decoder-only transformer with learned positions.

    Args:
        config: its shape.
        gradient_checkpointing: recompute each block's activations in the backward pass.
    """

    def __init__(self, config: GptConfig, *, gradient_checkpointing: bool = False) -> None:
        """Draw all weights."""
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        init_weights(self, config.num_layers)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T), T at most the context."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x: Tensor = self.embed_tokens(tokens) + self.embed_positions(positions)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.lm_head(self.final_norm(x))  # type: ignore[no-any-return]


def init_weights(model: nn.Module, num_layers: int) -> None:
    """Draw GPT-2's initial weights: normal 0.02, less for the matrices that write to the residual stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            writes = name.endswith(("out_proj", "down_proj"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * num_layers) if writes else 0.02)


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


class GptTask:
    """A `Task`: next-byte prediction; batches are windows at positions drawn from (seed, step).

    Args:
        settings: all of them apply.
        corpus: tokens to use instead of those `settings.data` names.
    """

    name = "gpt"
    deterministic = False
    steps_per_epoch = None

    def __init__(self, settings: TaskSettings, corpus: Corpus | None = None) -> None:
        """Load the corpus and check that the context fits into it."""
        self.preset = settings.preset or DEFAULT_PRESET
        if self.preset not in PRESETS:
            raise unknown_name("preset of task 'gpt'", self.preset, PRESETS)
        preset = PRESETS[self.preset]
        self.settings = settings
        self.config = replace(preset, context=settings.context or preset.context)
        self.batch_size = settings.batch_size or preset.batch_size
        self.dtype = torch_dtype(settings.dtype)
        self.defaults = TaskDefaults(
            lr=preset.lr,
            lr_grid=tuple(preset.lr * factor for factor in (0.5, 0.7, 1.0, 1.4)),
            betas=(0.9, 0.98),
            momentum=0.95,
            weight_decay=0.1,
            steps=1000,
            warmup_steps=50,
            schedule="wsd",
            decay_frac=0.25,
            grad_clip=1.0,
        )
        corpus = corpus or load_corpus(settings.data, settings.data_bytes)
        self.source = corpus.source
        for tokens, part in ((corpus.train, "training"), (corpus.valid, "validation")):
            check_length(tokens, self.config.context, part, self.source["name"])
        # The whole corpus sits on the device, a byte per token: a batch then costs a copy of its B positions.
        self._train = corpus.train.to(settings.device)
        self._valid = corpus.valid.to(settings.device)

    def _new_model(self) -> nn.Module:
        return Gpt(self.config, gradient_checkpointing=self.settings.gradient_checkpointing)

    def build_model(self, seed: int) -> nn.Module:
        """Return a new `Gpt` of the preset's shape."""
        return seeded_model(self._new_model, seed, self.settings, self.dtype)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield (x, y), each (batch_size, context) int64; batch k depends on (seed, k) only."""
        step = start
        while True:
            last = len(self._train) - self.config.context
            positions = torch.from_numpy(counter_rng(seed, step).integers(last, size=self.batch_size))
            yield windows(self._train, positions.to(self._train.device), self.config.context)
            step += 1

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a token, nats."""
        assert isinstance(batch, tuple)
        x, y = batch
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.settings.autocast_bf16):
            logits: Tensor = model(x)
        # At least float32 here: a bfloat16 log-sum-exp loses the third digit of the loss.
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def evaluate(self, model: nn.Module) -> float:
        """Return the loss on 64 evenly spaced windows of the validation text."""
        last = len(self._valid) - self.config.context - 1
        positions = torch.linspace(0, last, NUM_VALID_WINDOWS, dtype=torch.float64).long().to(self._valid.device)
        chunks = torch.split(positions, self.batch_size)
        parts = ((windows(self._valid, chunk, self.config.context), len(chunk)) for chunk in chunks)
        return mean_loss(self.loss_fn, model, parts)

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
