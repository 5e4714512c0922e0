"""Weights that may be moved, as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...weights import algebra as weights


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """(P,) in the widest type."""
    return torch.cat([t.detach().reshape(-1).to(weights.accumulate_dtype(t.device)) for t in tensors])


def joined(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """(P,) of the same type and on the same device as the other."""
    return torch.cat([t.reshape(-1) for t in tensors]).to(like)


def split(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of :func:`flat`: tensors of the shapes and types of others."""
    parts = x.split([t.numel() for t in like])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


@torch.no_grad()
def put(live: Sequence[Tensor], x: Tensor) -> None:
    """Write a vector into the weights."""
    weights.copy_(live, split(x, live))


def displacement(parameters: Sequence[Tensor], movable: Sequence[bool], end: Sequence[Tensor]) -> list[Tensor]:
    """One tensor per parameter: from where it is to the end, zero where it may not be moved."""
    wide = weights.accumulate_dtype(parameters[0].device)
    ends = iter(end)
    delta = []
    for p, may in zip(parameters, movable, strict=True):
        to = next(ends) if may else None
        delta.append(torch.zeros_like(p) if to is None else to.to(wide) - p.detach().to(wide))
    return delta
