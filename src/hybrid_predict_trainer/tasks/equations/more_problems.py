"""Three more equations with known solutions: 2-D Allen-Cahn, Klein-Gordon, and one with unknown coefficients.

Their right-hand sides are made so that the solutions are given formulas. Letters as in `problems`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .mlp import jet_channels
from .points import Problem, midpoints, scattered_points

BOTH = (2, 2)
#: Of `jet_channels(BOTH)`: value, first and second derivatives along the first and the second coordinate.
U, U_X, U_Y, U_XX, U_YY = range(len(jet_channels(BOTH)))


def _sides(number: int, low: tuple[float, float], high: tuple[float, float]) -> Tensor:
    """Return (4 number, 2) points on the sides of a rectangle, float64."""
    x, y = (midpoints(a, b, number)[:, 0] for a, b in zip(low, high, strict=True))
    sides = [torch.stack([x, torch.full_like(x, v)], 1) for v in (low[1], high[1])]
    sides += [torch.stack([torch.full_like(y, v), y], 1) for v in (low[0], high[0])]
    return torch.cat(sides)


def _unit_square(number: int, offset: float) -> Tensor:
    """Return (number, 2) evenly scattered points of [0, 1]^2, float64."""
    points = scattered_points(number, offset)
    return torch.stack([(points[:, 0] + 1) / 2, points[:, 1]], 1)


def _square(number: int, offset: float) -> Tensor:
    """Return (number, 2) evenly scattered points of [-1, 1]^2, float64."""
    return 2 * _unit_square(number, offset) - 1


# --- Allen-Cahn: eps^2 (u_xx + u_yy) + u - u^3 = f on [-1, 1]^2, u = 0 on its sides

ALLEN_CAHN_EPS = 0.3


def allen_cahn_solution(points: Tensor) -> Tensor:
    """Return u = sin(pi x) sin(2 pi y) at (N, 2)."""
    return torch.sin(math.pi * points[:, 0]) * torch.sin(2 * math.pi * points[:, 1])


def allen_cahn_residual(points: Tensor, jet: Tensor) -> Tensor:
    """Return eps^2 (u_xx + u_yy) + u - u^3 - f, divided by the size of its largest term."""
    exact, size = allen_cahn_solution(points), 5 * math.pi**2 * ALLEN_CAHN_EPS**2
    forcing = -size * exact + exact - exact**3
    return (ALLEN_CAHN_EPS**2 * (jet[U_XX] + jet[U_YY]) + jet[U] - jet[U] ** 3 - forcing) / size


def allen_cahn_edge(points: Tensor, jet: Tensor) -> Tensor:
    """Return u on the sides."""
    del points
    return jet[U]


# --- Klein-Gordon: u_tt - u_xx + u^3 = f on [0, 1]^2 (Wang, Teng & Perdikaris, SIAM J. Sci. Comput. 43, 2021, sec. 4.3)

WAVE = 5 * math.pi


def klein_gordon_solution(points: Tensor) -> Tensor:
    """Return u = x cos(5 pi t) + (x t)^3 at (N, 2) points (x, t)."""
    x, t = points[:, 0], points[:, 1]
    return x * torch.cos(WAVE * t) + (x * t) ** 3


def klein_gordon_residual(points: Tensor, jet: Tensor) -> Tensor:
    """Return u_tt - u_xx + u^3 - f, divided by (5 pi)^2."""
    x, t = points[:, 0], points[:, 1]
    u_tt = -(WAVE**2) * x * torch.cos(WAVE * t) + 6 * x**3 * t
    forcing = u_tt - 6 * x * t**3 + klein_gordon_solution(points) ** 3
    return (jet[U_YY] - jet[U_XX] + jet[U] ** 3 - forcing) / WAVE**2


def klein_gordon_edge(points: Tensor, jet: Tensor) -> Tensor:
    """Return u minus its value at x = 0, x = 1 and t = 0, and u_t / (5 pi) at t = 0: (2, E)."""
    first = points[:, 1] == 0
    slope = torch.where(first, jet[U_Y] / WAVE, torch.zeros_like(jet[U_Y]))
    return torch.stack([jet[U] - klein_gordon_solution(points), slope])


def _three_sides(number: int) -> Tensor:
    points = _sides(number, (0.0, 0.0), (1.0, 1.0))
    return points[points[:, 1] < 1]  # nothing is known of the end


# --- Unknown coefficients: u_t = a u_xx + b u (1 - u) + f on [0, 1]^2, u known at some points

COEFFICIENTS = (0.3, 2.0)  # a and b


def inverse_solution(points: Tensor) -> Tensor:
    """Return u = exp(-t) sin(pi x) + sin(2 pi x) cos(3 t) / 4 at (N, 2) points (x, t)."""
    x, t = points[:, 0], points[:, 1]
    return torch.exp(-t) * torch.sin(math.pi * x) + 0.25 * torch.sin(2 * math.pi * x) * torch.cos(3 * t)


def inverse_residual(points: Tensor, jet: Tensor) -> Tensor:
    """Return u_t - a u_xx - b u (1 - u) - f, divided by pi; the last two channels are a and b."""
    (a, b), (x, t), u = COEFFICIENTS, points.T, inverse_solution(points)
    slow, fast = torch.exp(-t) * torch.sin(math.pi * x), 0.25 * torch.sin(2 * math.pi * x)
    u_t, u_xx = -slow - 3 * fast * torch.sin(3 * t), -(math.pi**2) * (slow + 4 * fast * torch.cos(3 * t))
    forcing = u_t - a * u_xx - b * u * (1 - u)
    return (jet[2] - jet[-2] * jet[3] - jet[-1] * jet[0] * (1 - jet[0]) - forcing) / math.pi


def inverse_edge(points: Tensor, jet: Tensor) -> Tensor:
    """Return u minus what was observed."""
    return jet[0] - inverse_solution(points)


MORE_PROBLEMS: dict[str, Problem] = {
    "pinn-allen-cahn": Problem(
        equation="0.09 (u_xx + u_yy) + u - u^3 = f on [-1, 1]^2, u = sin(pi x) sin(2 pi y)",
        orders=BOTH,
        hidden=(32, 32, 32),
        num_points=900,
        dtype=torch.float32,
        train_points=lambda number: _square(number, offset=0.5),
        valid_points=_square(4096, offset=0.25),
        edge=_sides(25, (-1.0, -1.0), (1.0, 1.0)),
        residual=allen_cahn_residual,
        edge_residual=allen_cahn_edge,
        solution=allen_cahn_solution,
    ),
    "pinn-klein-gordon": Problem(
        equation="u_tt - u_xx + u^3 = f on [0, 1]^2, u = x cos(5 pi t) + (x t)^3",
        orders=BOTH,
        hidden=(32, 32, 32),
        num_points=900,
        dtype=torch.float32,
        train_points=lambda number: _unit_square(number, offset=0.5),
        valid_points=_unit_square(4096, offset=0.25),
        edge=_three_sides(32),
        residual=klein_gordon_residual,
        edge_residual=klein_gordon_edge,
        solution=klein_gordon_solution,
    ),
    "pinn-inverse": Problem(
        equation="u_t = a u_xx + b u (1 - u) + f on [0, 1]^2, u observed at 100 points, a = 0.3 and b = 2 unknown",
        orders=(2, 1),
        hidden=(32, 32, 32),
        num_points=512,
        dtype=torch.float32,
        train_points=lambda number: _unit_square(number, offset=0.5),
        valid_points=_unit_square(4096, offset=0.25),
        edge=_unit_square(100, offset=0.75),
        residual=inverse_residual,
        edge_residual=inverse_edge,
        solution=inverse_solution,
        coefficients=COEFFICIENTS,
    ),
}
