"""A small Llama, and the published 260,000-parameter one that tells stories.

Shapes: B sequences, T tokens, W width, H heads, K key and value heads, D = W / H, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ROPE_BASE = 10_000.0  # Su et al. 2021, arXiv 2104.09864
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A model's shape.

    Attributes:
        num_layers: blocks.
        width: of the residual stream.
        hidden: width of the gated MLP.
        num_heads: of the queries; divides width.
        num_kv_heads: of keys and values; divides `num_heads`.
        vocab_size: tokens the model knows.
        context: most tokens a sequence may have.
    """

    num_layers: int
    width: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context: int


def rotation_angles(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (context, head_dim / 2): position t turns pair i by t / base^(2 i / head_dim)."""
    rates = ROPE_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (..., T, D) with its pairs (2 i, 2 i + 1) turned by the angles (T, D / 2): interleaved RoPE."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class GroupedAttention(nn.Module):
    """Causal self-attention in which several query heads share a head of keys and values (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig) -> None:
        """Draw the four projections."""
        super().__init__()
        self.head_dim = config.width // config.num_heads
        self.num_shared = config.num_heads // config.num_kv_heads
        kv_width = self.head_dim * config.num_kv_heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.out_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W) and the angles of T positions."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (part.repeat_interleave(self.num_shared, dim=1) for part in (rotate(k, cos, sin), v))
        mixed = functional.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class LlamaBlock(nn.Module):
    """Attention and SwiGLU MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        """Draw the block's weights."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attention = GroupedAttention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W) and the angles of T positions."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        z = self.mlp_norm(x)
        return x + self.down_proj(functional.silu(self.gate_proj(z)) * self.up_proj(z))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """Decoder-only transformer with rotary positions; the embedding is the head, too.

    Args:
        config: its shape.
        gradient_checkpointing: recompute each block's activations in the backward pass.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, *, gradient_checkpointing: bool = False) -> None:
        """Draw all weights, as PyTorch does by default: pretrained ones follow."""
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        cos, sin = rotation_angles(config.context, config.width // config.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T), T at most the context."""
        x: Tensor = self.embed_tokens(tokens)
        angles = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *angles, use_reentrant=False)
            else:
                x = block(x, *angles)
        return functional.linear(self.final_norm(x), self.embed_tokens.weight)


# --- the published model

# Our names and the file's; the file stacks the blocks of each matrix along its first axis.
STACKED = {
    "attention_norm": "rms1",
    "attention.q_proj": "wq",
    "attention.k_proj": "wk",
    "attention.v_proj": "wv",
    "attention.out_proj": "wo",
    "mlp_norm": "rms2",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def read_config(path: Path) -> LlamaConfig:
    """Return the shape written in a config.json with the keys dim, hidden, L, nh, nkv, V and T.

    Raises:
        ValueError: a key is missing or no number, or the heads do not divide the width.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        width, hidden, layers, heads, kv_heads, vocab, context = (
            int(raw[key]) for key in ("dim", "hidden", "L", "nh", "nkv", "V", "T")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} should hold the numbers dim, hidden, L, nh, nkv, V and T: {error!r}") from error
    if width % heads or heads % kv_heads or width // heads % 2:
        raise ValueError(f"{path}: {heads} heads and {kv_heads} for keys do not divide a width of {width} evenly")
    return LlamaConfig(
        num_layers=layers, width=width, hidden=hidden, num_heads=heads, num_kv_heads=kv_heads,
        vocab_size=vocab, context=context,
    )  # fmt: skip


def read_weights(path: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Return a state dict for `Llama(config)` from a file with stacked blocks.

    Raises:
        ValueError: it is no such file.
    """
    try:
        raw = load_file(path)
        state = {"embed_tokens.weight": raw["emb"], "final_norm.weight": raw["rmsf"]}
        for ours, theirs in STACKED.items():
            state |= {f"blocks.{i}.{ours}.weight": raw[theirs][i].clone() for i in range(config.num_layers)}
    except (safetensors.SafetensorError, KeyError, IndexError) as error:
        raise ValueError(f"{path} does not hold the weights of a stories model: {error!r}") from error
    return state
