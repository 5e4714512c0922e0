"""What an equation with a known solution is, and where its points lie.

Shapes: N interior points, E edge points (boundary, initial or observed), D coordinates, C jet channels in the order of
`mlp.jet_channels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A differential equation with its points and its solution.

    Attributes:
        equation: for humans.
        orders: highest derivative needed along each coordinate.
        hidden: widths of the hidden layers.
        num_points: default number of training points.
        dtype: default precision.
        train_points: number -> (N, D), float64, interior.
        valid_points: (N, D), float64, interior, none of them a training point.
        edge: (E, D), float64.
        residual: ((N, D), (C, N)) -> (N,), zero for the solution.
        edge_residual: ((E, D), (C, E)) -> any shape, zero for the solution, weights included.
        solution: (N, D) float64 -> (N,).
        coefficients: true values of numbers in the equation that are trained beside the network: channels of their own,
            behind those of the jet.
    """

    equation: str
    orders: tuple[int, ...]
    hidden: tuple[int, ...]
    num_points: int
    dtype: torch.dtype
    train_points: Callable[[int], Tensor]
    valid_points: Tensor
    edge: Tensor
    residual: Callable[[Tensor, Tensor], Tensor]
    edge_residual: Callable[[Tensor, Tensor], Tensor]
    solution: Callable[[Tensor], Tensor]
    coefficients: tuple[float, ...] = ()


def midpoints(low: float, high: float, number: int) -> Tensor:
    """Return the (number, 1) midpoints of equal cells of [low, high], float64."""
    return (low + (high - low) * (torch.arange(number, dtype=torch.float64) + 0.5) / number)[:, None]


def scattered_points(number: int, offset: float) -> Tensor:
    """Return (number, 2) evenly scattered points (x, t) in [-1, 1) x [0, 1), float64.

    Roberts' R2 sequence (2018): multiples of (1 / g, 1 / g^2) modulo one, g the real root of g^3 = g + 1.
    As even as Sobol points here, and one line that no library version can change.
    """
    plastic = 1.324717957244746
    steps = torch.arange(1, number + 1, dtype=torch.float64)[:, None]
    unit = (offset + steps * torch.tensor([1 / plastic, 1 / plastic**2], dtype=torch.float64)) % 1
    return torch.stack([2 * unit[:, 0] - 1, unit[:, 1]], dim=1)
