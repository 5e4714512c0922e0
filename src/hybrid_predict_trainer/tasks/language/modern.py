"""A GPT as it is trained today, and its recipe: what a gain over plain AdamW has to be measured on.

RMSNorm in front of every part, normalised queries and keys (Henry et al. 2020, arXiv 2010.04245), rotary positions (Su
et al. 2021, arXiv 2104.09864), squared ReLU (So et al. 2021, arXiv 2109.08668) or SwiGLU (Shazeer 2020, arXiv
2002.05202), no biases; what writes to the residual stream begins at zero, the head as well or drawn.

Shapes: B sequences, T tokens, W width, H heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional

from ..base import TaskDefaults, TaskSettings, unknown_name
from .batches import TrainsGpt
from .llama import rotate, rotation_angles
from .text import NUM_BYTE_TOKENS, Corpus, load_corpus


@dataclass(frozen=True, kw_only=True)
class ModernConfig:
    """A model's shape.

    Attributes:
        num_layers: blocks.
        width: of the residual stream.
        num_heads: must divide width.
        context: most tokens a sequence may have.
        head: how the head begins: at "zero", or "drawn" from a normal distribution of deviation 0.02.
        mlp: "relu2" of four widths, or "swiglu" of eight thirds, which has as many weights.
        lr: peak rate for AdamW, the middle of the grid.
        batch_size: default number of sequences per batch.
        vocab_size: tokens the model knows.
    """

    num_layers: int
    width: int
    num_heads: int
    context: int = 128
    head: Literal["zero", "drawn"] = "zero"
    mlp: Literal["relu2", "swiglu"] = "relu2"
    lr: float = 3e-3
    batch_size: int = 8
    vocab_size: int = NUM_BYTE_TOKENS


_SMALL = ModernConfig(num_layers=2, width=96, num_heads=3)

PRESETS: dict[str, ModernConfig] = {
    "0.3M": _SMALL,
    "0.3M-drawn": replace(_SMALL, head="drawn"),
    "0.3M-swiglu": replace(_SMALL, mlp="swiglu"),
    "0.9M": ModernConfig(num_layers=4, width=128, num_heads=4),
    "3M": ModernConfig(num_layers=6, width=192, num_heads=6, context=256, lr=2e-3),
    "124M": ModernConfig(num_layers=17, width=768, num_heads=12, context=1024, lr=1e-3, batch_size=16),
}
DEFAULT_PRESET = "0.3M"


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys and rotary positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Draw the projections; the one that writes to the residual stream is zero."""
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W) and the angles of T positions, each (T, W / H / 2)."""
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(functional.rms_norm(part, (part.shape[-1],)), cos, sin) for part in (q, k))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two matrices around a squared ReLU, or three of SwiGLU."""

    def __init__(self, width: int, kind: Literal["relu2", "swiglu"]) -> None:
        """Draw the matrices; the one that writes to the residual stream is zero."""
        super().__init__()
        hidden = 4 * width if kind == "relu2" else 8 * width // 3
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False) if kind == "swiglu" else None
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W)."""
        hidden: Tensor = self.up_proj(x)
        if self.gate_proj is None:
            hidden = functional.relu(hidden).square()
        else:
            hidden = hidden * functional.silu(self.gate_proj(x))
        return self.down_proj(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModernConfig) -> None:
        """Draw the block's weights."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config.width, config.num_heads)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W) and the angles of T positions."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class ModernGpt(nn.Module):
    """Decoder-only transformer of today."""

    def __init__(self, config: ModernConfig) -> None:
        """Draw all weights: matrices of a deviation of 1 / sqrt(inputs), what writes to the stream zero."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        cos, sin = rotation_angles(config.context, config.width // config.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("out_proj", "down_proj")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if config.head == "zero":
            nn.init.zeros_(self.lm_head.weight)
        else:
            nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T), T at most the context."""
        num = tokens.shape[1]
        assert isinstance(self.cos, Tensor)
        assert isinstance(self.sin, Tensor)
        x: Tensor = self.embed_tokens(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:num], self.sin[:num])
        return self.lm_head(self.final_norm(x))  # type: ignore[no-any-return]


class ModernGptTask(TrainsGpt):
    """A `Task`: next-token prediction with today's model and recipe; batches are windows drawn from (seed, step).

    Args:
        settings: all but gradient checkpointing apply.
        corpus: tokens to use instead of those `settings.data` names.
    """

    name = "gpt-modern"
    deterministic = False
    steps_per_epoch = None

    def __init__(self, settings: TaskSettings, corpus: Corpus | None = None) -> None:
        """Load the corpus and check that the context fits into it."""
        self.preset = settings.preset or DEFAULT_PRESET
        if self.preset not in PRESETS:
            raise unknown_name("preset of task 'gpt-modern'", self.preset, PRESETS)
        if settings.gradient_checkpointing:
            raise ValueError("task 'gpt-modern' has no use for gradient checkpointing; leave it out, or take task gpt")
        preset = PRESETS[self.preset]
        self.defaults = TaskDefaults(
            lr=preset.lr,
            lr_grid=tuple(preset.lr * factor for factor in (0.5, 1.0, 2.0, 4.0)),
            betas=(0.9, 0.95),
            momentum=0.95,
            weight_decay=0.1,
            steps=1000,
            warmup_steps=100,
            schedule="wsd",
            decay_frac=0.25,
            grad_clip=1.0,
        )
        self._read(settings, preset, corpus or load_corpus(settings.data, settings.data_bytes))

    def _new_model(self) -> nn.Module:
        return ModernGpt(self.config)

    def describe(self) -> dict[str, Any]:
        """Return what every GPT's task does, and how the head begins and which MLP it has."""
        return {**super().describe(), "head": self.config.head, "mlp": self.config.mlp}
