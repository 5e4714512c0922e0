"""Differential equations with known solutions, for physics-informed networks.

A problem is two residual functions of a jet and its fixed points. Shapes: N interior points, E edge
points (boundary or initial), D coordinates, C jet channels in the order of `mlp.jet_channels`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .more_problems import MORE_PROBLEMS
from .points import Problem, midpoints, scattered_points

# --- Poisson: u'' = f on [-1, 1] with u(-1) = u(1) = 0


def poisson_solution(points: Tensor) -> Tensor:
    """Return u(x) = sin(pi x) + sin(4 pi x) / 2 at (N, 1): two scales, so that depth has something to do."""
    x = points[:, 0]
    return torch.sin(math.pi * x) + 0.5 * torch.sin(4 * math.pi * x)


def poisson_residual(points: Tensor, jet: Tensor) -> Tensor:
    """Return (u'' - f) / pi^2 with f = u'' of `poisson_solution`.

    Divided by the slow term's size the edge keeps its say. Measured with Adam at 1e-2, 2000 steps, one seed:
    the solution's relative error is 0.0002 like this, 1.3 when divided by (4 pi)^2 and 0.02 undivided.
    """
    x = points[:, 0]
    forcing = -(math.pi**2) * (torch.sin(math.pi * x) + 8 * torch.sin(4 * math.pi * x))
    return (jet[2] - forcing) / math.pi**2


def poisson_edge(points: Tensor, jet: Tensor) -> Tensor:
    """Return u at the two ends."""
    del points
    return jet[0]


# --- Burgers: u_t + u u_x = nu u_xx on [-1, 1] x [0, 1] with u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0

# Six times the viscosity of Raissi, Perdikaris, Karniadakis 2019 (0.01 / pi): with theirs the shock falls
# between 1024 points, and the loss on other points was 2 to 10 times the training loss; here it is 1.1 times.
BURGERS_NU = 0.02


def burgers_solution(points: Tensor, nu: float = BURGERS_NU, order: int = 100) -> Tensor:
    """Return the solution at (N, 2) points (x, t) by the Cole-Hopf integral and Gauss-Hermite quadrature.

    Formula: Basdevant et al. 1986, Computers & Fluids 14, section 2.2. With eta = 2 sqrt(nu t) z and
    F(y) = exp(-cos(pi y) / (2 pi nu)), u = -E[sin(pi (x - eta)) F(x - eta)] / E[F(x - eta)].
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite.hermgauss(order))
    x, t = points[:, :1].double(), points[:, 1:].double()
    y = x - 2 * torch.sqrt(nu * t) * nodes
    # F is at most e^(1 / (2 pi nu)); divided by that both sums stay below one however small nu is.
    mass = weights * torch.exp(-(torch.cos(math.pi * y) + 1) / (2 * math.pi * nu))
    return -(torch.sin(math.pi * y) * mass).sum(1) / mass.sum(1)


def burgers_residual(points: Tensor, jet: Tensor) -> Tensor:
    """Return u_t + u u_x - nu u_xx; channels (u, u_x, u_t, u_xx)."""
    del points
    return jet[2] + jet[0] * jet[1] - BURGERS_NU * jet[3]


def burgers_edge(points: Tensor, jet: Tensor) -> Tensor:
    """Return u minus its initial value where t = 0, and u where x = -1 or 1."""
    x, t = points[:, 0], points[:, 1]
    return jet[0] + torch.where(t == 0, torch.sin(math.pi * x), torch.zeros_like(x))


def _burgers_edge_points() -> Tensor:
    x = torch.linspace(-1, 1, 129, dtype=torch.float64)
    t = midpoints(0, 1, 32)[:, 0]
    ends = torch.cat([torch.full_like(t, -1), torch.full_like(t, 1)])
    return torch.stack([torch.cat([x, ends]), torch.cat([torch.zeros_like(x), t, t])], dim=1)


# --- Oscillator: u'' + 2 d u' + w0^2 u = 0 on [0, 1] with u(0) = 1, u'(0) = 0

OSCILLATOR_D, OSCILLATOR_W0 = (
    2.0,
    20.0,
)  # Moseley's PINN tutorial; nothing in the library was tuned on this one


def oscillator_solution(points: Tensor) -> Tensor:
    """Return exp(-d t) (cos(w t) + d / w sin(w t)) with w^2 = w0^2 - d^2 at (N, 1)."""
    t = points[:, 0]
    w = math.sqrt(OSCILLATOR_W0**2 - OSCILLATOR_D**2)
    return torch.exp(-OSCILLATOR_D * t) * (torch.cos(w * t) + OSCILLATOR_D / w * torch.sin(w * t))


def oscillator_residual(points: Tensor, jet: Tensor) -> Tensor:
    """Return the equation divided by w0^2, so that its terms are of the size of u.

    Divided by w0 instead, Adam ends at u = 0 in 4000 steps (relative error 1.0 against 0.3).
    """
    del points
    return (jet[2] + 2 * OSCILLATOR_D * jet[1]) / OSCILLATOR_W0**2 + jet[0]


def oscillator_edge(points: Tensor, jet: Tensor) -> Tensor:
    """Return u(0) - 1 and u'(0) / w0, as (2, 1)."""
    del points
    return torch.stack([jet[0] - 1, jet[1] / OSCILLATOR_W0])


PROBLEMS: dict[str, Problem] = {
    "pinn-poisson": Problem(
        equation="u'' = f on [-1, 1], u(-1) = u(1) = 0, u = sin(pi x) + sin(4 pi x) / 2",
        orders=(2,),
        hidden=(32, 32, 32),
        num_points=256,
        dtype=torch.float32,
        train_points=lambda number: midpoints(-1, 1, number),
        valid_points=midpoints(-1, 1, 1001),
        edge=torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        residual=poisson_residual,
        edge_residual=poisson_edge,
        solution=poisson_solution,
    ),
    "pinn-burgers": Problem(
        equation="u_t + u u_x = 0.02 u_xx on [-1, 1] x [0, 1], u(x, 0) = -sin(pi x), u(+-1, t) = 0",
        orders=(2, 1),
        hidden=(32, 32, 32, 32),
        num_points=1024,
        dtype=torch.float32,
        train_points=lambda number: scattered_points(number, offset=0.5),
        valid_points=scattered_points(4096, offset=0.25),
        edge=_burgers_edge_points(),
        residual=burgers_residual,
        edge_residual=burgers_edge,
        solution=burgers_solution,
    ),
    "oscillator": Problem(
        equation="u'' + 4 u' + 400 u = 0 on [0, 1], u(0) = 1, u'(0) = 0",
        orders=(2,),
        hidden=(32, 32, 32),
        num_points=128,
        dtype=torch.float64,
        train_points=lambda number: midpoints(0, 1, number),
        valid_points=midpoints(0, 1, 501),
        edge=torch.zeros(1, 1, dtype=torch.float64),
        residual=oscillator_residual,
        edge_residual=oscillator_edge,
        solution=oscillator_solution,
    ),
    **MORE_PROBLEMS,
}
