"""A physics-informed network without a framework: -u'' = f on [0, 1], u(0) = u(1) = 0, in closed form.

    python examples/pinn_plain.py [seconds of CPU time]

The points are drawn afresh at every step.  What is squared is handed in as ``residual_fn``; everything else is an
ordinary model, an ordinary optimizer and an ordinary loop.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig

NUM_POINTS = 128


def solution(x: Tensor) -> Tensor:
    """Return u = sin(pi x) + sin(3 pi x) / 2."""
    return torch.sin(math.pi * x) + 0.5 * torch.sin(3 * math.pi * x)


def residuals(model: nn.Module, points: Tensor) -> Tensor:
    """Return (R,): u'' + f at the points over pi^2, and u at both ends; the loss is their mean square."""
    x = points.clone().requires_grad_(True)
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    f = torch.sin(math.pi * x) + 4.5 * torch.sin(3 * math.pi * x)
    inside = (curvature / math.pi**2 + f)[:, 0]
    ends = model(torch.tensor([[0.0], [1.0]], dtype=points.dtype))[:, 0]
    total = len(inside) + len(ends)  # mean(inside^2) + mean(ends^2) as one mean
    return torch.cat([inside * (total / len(inside)) ** 0.5, ends * (total / len(ends)) ** 0.5])


def new_points() -> Iterator[Tensor]:
    """Yield points of [0, 1], others at every step."""
    generator = torch.Generator().manual_seed(0)
    for _ in itertools.count():
        yield torch.rand(NUM_POINTS, 1, generator=generator, dtype=torch.float64)


def error(model: nn.Module) -> float:
    """Return the relative L2 error against the solution."""
    x = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None]
    with torch.no_grad():
        return float((model(x) - solution(x)).norm() / solution(x).norm())


def main() -> None:
    """Train, and say now and then how far it is."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()
    trainer = HybridTrainer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-2),
        HybridTrainerConfig(predictor_type="gauss_newton"),
        loss_fn=lambda model, points: residuals(model, points).square().mean(),
        residual_fn=residuals,
    )
    began = time.process_time()
    trainer.fit(
        new_points(),
        total_steps=1_000_000,
        progress_callback=lambda r: print(f"step {r.step}: error {error(model):.1e}") if r.step % 50 == 0 else None,
        should_stop=lambda: time.process_time() - began > seconds,
    )
    print(f"relative L2 error {error(model):.2e}, {trainer.statistics()['num_jumps_accepted']} jumps")


if __name__ == "__main__":
    main()
