"""A small GPT and the language-modelling task.

Shapes: B sequences, T tokens, W width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..base import TaskDefaults, TaskSettings, unknown_name
from .batches import TrainsGpt
from .text import NUM_BYTE_TOKENS, Corpus, load_corpus
from .tokens import encode_corpus, load_gpt2


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
        vocab_size: tokens the model knows.
        tied: use the embedding as the head.
        tokens: what the corpus is cut into: "bytes", or "gpt2" for GPT-2's byte-pair encoding.
    """

    num_layers: int
    width: int
    num_heads: int
    context: int
    lr: float
    batch_size: int = 16
    vocab_size: int = NUM_BYTE_TOKENS
    tied: bool = False
    tokens: Literal["bytes", "gpt2"] = "bytes"


# Named by the number of parameters, which a test counts; "gpt2" by the model whose shape and tokens it has.
PRESETS: dict[str, GptConfig] = {
    "0.3M": GptConfig(num_layers=2, width=96, num_heads=3, context=128, lr=3e-3),
    "0.9M": GptConfig(num_layers=4, width=128, num_heads=4, context=128, lr=3e-3),
    "3M": GptConfig(num_layers=6, width=192, num_heads=6, context=256, lr=2e-3),
    "10M": GptConfig(num_layers=8, width=320, num_heads=5, context=256, lr=1.5e-3),
    "30M": GptConfig(num_layers=9, width=512, num_heads=8, context=512, lr=1e-3),
    # GPT-2 small with its vocabulary, for the cost of it; fed with bytes all the same.
    "124M": GptConfig(num_layers=12, width=768, num_heads=12, context=1024, lr=6e-4, vocab_size=50257, tied=True),
    # Radford et al. 2019; blocks are this module's (RMSNorm, no biases), so 0.1 M parameters fewer.
    "gpt2": GptConfig(
        num_layers=12, width=768, num_heads=12, context=1024, lr=6e-4, vocab_size=50257, tied=True, tokens="gpt2"
    ),
}
DEFAULT_PRESET = "0.9M"


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


class GptTask(TrainsGpt):
    """A `Task`: next-token prediction; batches are windows at positions drawn from (seed, step).

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
        if corpus is None:
            corpus = load_corpus(settings.data, settings.data_bytes)
            corpus = encode_corpus(corpus, load_gpt2()) if preset.tokens == "gpt2" else corpus
        self._read(settings, preset, corpus)

    def _new_model(self) -> nn.Module:
        return Gpt(self.config, gradient_checkpointing=self.settings.gradient_checkpointing)
