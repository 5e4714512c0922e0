"""Low-rank adaptation: a frozen matrix and a trained correction of small rank (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

RANK, ALPHA = 8, 16.0
# Adapted are the linear layers of the blocks, not the head (arXiv 2305.14314, section 4).
NOT_ADAPTED = frozenset({"lm_head", "classifier"})


class LoraLinear(nn.Module):
    """x W' + b + scale x A' B' with W and b as they were, A (rank, in) drawn, B (out, rank) zero at first.

    Args:
        base: the layer to adapt; frozen here.
        rank: of the correction.
        alpha: scale is alpha / rank, so that a rate found for one rank serves another.
    """

    def __init__(self, base: nn.Linear, rank: int = RANK, alpha: float = ALPHA) -> None:
        """Draw A like the weight of a linear layer, as the paper's own code does."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for (..., in)."""
        correction = functional.linear(functional.linear(x, self.lora_a), self.lora_b)
        return self.base(x) + self.scale * correction  # type: ignore[no-any-return]

    def merged_weight(self) -> Tensor:
        """Return the (out, in) matrix of one linear layer that does the same: W + scale B A."""
        return self.base.weight + self.scale * self.lora_b @ self.lora_a


def add_lora(model: nn.Module, rank: int = RANK, alpha: float = ALPHA) -> nn.Module:
    """Freeze the model and put a `LoraLinear` in place of each linear layer of its blocks; return the model.

    Raises:
        ValueError: rank is below 1, or there is no linear layer to adapt.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    model.requires_grad_(False)
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name not in NOT_ADAPTED
    ]
    if not found:
        raise ValueError(f"LoRA needs an nn.Linear to adapt, {type(model).__name__} has none")
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, rank, alpha))
    return model
