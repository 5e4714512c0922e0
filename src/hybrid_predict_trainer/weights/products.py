"""Inner products and sums of directions kept tensor by tensor, read in one transfer, as wide as it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import algebra as weights
from .algebra import without_graph


@without_graph
def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """(number of tensors,) squared Euclidean norms in float64 on the CPU, read in one transfer."""
    return weights.on_host(weights.norms(tensors)).square()


@without_graph
def paired_dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(number of tensors,) inner products a_i . b_i in float64 on the CPU, read in one transfer."""
    return weights.on_host([torch.dot(u.reshape(-1), v.reshape(-1)) for u, v in zip(a, b, strict=True)])


def row_dots(column: Tensor, vector: Tensor) -> Tensor:
    """(K,) inner products of the rows of (K, P) with (P,).

    Half-precision rows are widened one by one: a product rounded to 8 bits would make the Gram matrix of
    nearly parallel displacements indefinite.
    """
    if column.dtype is torch.bfloat16:
        wide = vector.to(device=column.device, dtype=torch.float32)
        return torch.stack([torch.dot(row.float(), wide) for row in column])
    return column @ vector.to(device=column.device, dtype=column.dtype)


def weighted_sum(coefficients: Tensor, column: Tensor) -> Tensor:
    """(P,) sum_k c_k row_k, in float32 for half-precision rows: large coefficients cancel.

    Args:
        coefficients: (K,) in host memory for half-precision rows, else on the rows' device.
        column: (K, P).
    """
    if column.dtype is torch.bfloat16:
        total = torch.zeros(column.shape[1], dtype=torch.float32, device=column.device)
        for c, row in zip(coefficients.tolist(), column, strict=True):
            total.add_(row, alpha=c)
        return total
    return coefficients.to(column.dtype) @ column
