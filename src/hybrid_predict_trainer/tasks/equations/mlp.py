"""A tanh MLP that can carry derivatives with respect to its inputs forward with its values.

Shapes: N points, D input coordinates, C channels of a jet (value, first and second derivatives).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base import unknown_name

#: Widths of three hidden layers, by the number of weights that they come to.
SIZES = {"10k": 70, "50k": 157, "200k": 315}


def hidden_layers(own: Sequence[int], preset: str | None) -> tuple[int, ...]:
    """Return the widths of the hidden layers.

    Args:
        own: the problem's.
        preset: of :data:`SIZES`; None: the problem's own.

    Raises:
        ValueError: there is no such size.
    """
    if preset is None:
        return tuple(own)
    if preset not in SIZES:
        raise unknown_name("preset", preset, SIZES)
    return (SIZES[preset],) * 3


def jet_channels(orders: Sequence[int]) -> list[tuple[int, int]]:
    """Return the channels of a jet as (coordinate, order), the value first as (-1, 0).

    Args:
        orders: highest derivative wanted along each of the D coordinates: 0, 1 or 2.
    """
    firsts = [(d, 1) for d, order in enumerate(orders) if order >= 1]
    seconds = [(d, 2) for d, order in enumerate(orders) if order >= 2]
    return [(-1, 0), *firsts, *seconds]


def propagate_jet(linears: Sequence[nn.Linear], points: Tensor, orders: Sequence[int]) -> Tensor:
    """Return value and pure derivatives of the tanh MLP at the points, exactly and in one forward pass.

    Taylor mode by hand: a linear layer maps every channel alike (the bias touches the value only), and
    z = tanh(a) gives z' = (1 - z^2) a' and z'' = (1 - z^2) (a'' - 2 z a'^2). Unlike nested autograd it
    works under `torch.no_grad()`, and the backward pass costs as much as that of C plain forwards.

    Args:
        linears: the layers; tanh between them, none after the last.
        points: (N, D).
        orders: see `jet_channels`.

    Returns:
        (C, N): the channels of `jet_channels(orders)` of the first output.
    """
    channels = jet_channels(orders)
    num_first = sum(order == 1 for _, order in channels)
    # Which first derivative each second derivative squares.
    partner = [[c for c, _ in channels[1 : 1 + num_first]].index(c) for c, order in channels if order == 2]
    directions = torch.zeros(len(channels) - 1, 1, points.shape[1], dtype=points.dtype, device=points.device)
    for row, (coordinate, order) in enumerate(channels[1:]):
        directions[row, 0, coordinate] = float(order == 1)
    z = torch.cat([points[None], directions.expand(-1, len(points), -1)])
    for layer in linears[:-1]:
        a = z @ layer.weight.T
        value = torch.tanh(a[0] + layer.bias)
        slope = 1 - value * value
        first = a[1 : 1 + num_first]
        second = a[1 + num_first :] - 2 * value * first[partner].square() if partner else a[1 + num_first :]
        z = torch.cat([value[None], slope * torch.cat([first, second])])
    last = linears[-1]
    jet = z @ last.weight[0]  # (C, N)
    return torch.cat([jet[:1] + last.bias[0], jet[1:]])


class TanhMLP(nn.Module):
    """A tanh MLP with one output; its forward returns the jet that `orders` asks for.

    Args:
        sizes: widths from input to last hidden layer.
        orders: see `jet_channels`; all zero for the value alone.
        num_coefficients: of the equation, trained beside the network; each is one more channel.
    """

    def __init__(
        self, sizes: Sequence[int], orders: Sequence[int] | None = None, num_coefficients: int = 0
    ) -> None:  # fmt: skip
        """Draw all weights; coefficients begin at 1."""
        super().__init__()
        self.orders = tuple(orders) if orders is not None else (0,) * sizes[0]
        widths = [*sizes, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            # Keeps the variance of tanh units and of their slopes near one. Biases stay as nn.Linear draws
            # them: with zeros the network is an odd function, so is pinn-poisson's solution, and the gradient
            # of each bias is rounding noise, which Adam scales up to whole steps.
            nn.init.xavier_normal_(layer.weight)
        self.coefficients = nn.Parameter(torch.ones(num_coefficients, 1)) if num_coefficients else None

    def forward(self, points: Tensor) -> Tensor:
        """Return (C, N), channel 0 the value, at points (N, D)."""
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        jet = propagate_jet(linears, points, self.orders)
        if self.coefficients is None:
            return jet
        # as a layer of their own, so that every point has its part in their gradient
        return torch.cat([jet, nn.functional.linear(torch.ones_like(points[:, :1]), self.coefficients).T])
