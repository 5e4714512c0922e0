"""A DeepXDE problem, its points and its network, trained here in closed form: Burgers' equation.

    pip install deepxde
    DDE_BACKEND=pytorch python examples/pinn_deepxde.py [seconds of CPU time]

DeepXDE keeps geometry, equation and conditions; :func:`residuals_of` hands out what it squares.  Half of the time goes
to DeepXDE's own loop with Adam, the other half to ours, from the same initial weights.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import numpy as np
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig


def burgers(x: Tensor, u: Tensor) -> Tensor:
    """Return u_t + u u_x - 0.1 / pi u_xx, (N, 1)."""
    u_x, u_t = (dde.grad.jacobian(u, x, i=0, j=j) for j in (0, 1))
    residual: Tensor = u_t + u * u_x - 0.1 / math.pi * dde.grad.hessian(u, x, i=0, j=0)
    return residual


def problem() -> Any:
    """Return DeepXDE's data: 1,000 points inside, 80 on the sides, 160 at the beginning."""
    domain = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99))
    sides = dde.icbc.DirichletBC(domain, lambda x: 0.0, lambda _, on_side: on_side)
    start = dde.icbc.IC(domain, lambda x: -np.sin(math.pi * x[:, 0:1]), lambda _, at_start: at_start)
    return dde.data.TimePDE(
        domain, burgers, [sides, start], num_domain=1000, num_boundary=80, num_initial=160, num_test=5000
    )


def residuals_of(data: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return (network, points) -> residuals (R,), whose mean square is the sum of DeepXDE's losses.

    Args:
        data: a ``dde.data.PDE`` whose points stay as they are; those of the conditions come first.
    """
    ends = np.cumsum([0, *data.num_bcs])

    def residuals(net: nn.Module, points: Tensor) -> Tensor:
        x = points.clone().requires_grad_(True)
        u = net(x)
        dde.grad.clear()  # derivatives are remembered per tensor, and these are new ones
        found = data.pde(x, u)
        parts = [part[ends[-1] :] for part in (found if isinstance(found, list | tuple) else [found])]
        for bc, begin, end in zip(data.bcs, ends[:-1], ends[1:], strict=True):
            parts.append(bc.error(data.train_x, x, u, begin, end))
        total = sum(part.numel() for part in parts)
        return torch.cat([part.flatten() * (total / part.numel()) ** 0.5 for part in parts])

    return residuals


def main() -> None:
    """Train by both, and compare the losses on DeepXDE's own test points."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)
    torch.set_num_threads(1)
    data = problem()
    net = dde.nn.FNN([2, *[20] * 3, 1], "tanh", "Glorot normal")
    initial = copy.deepcopy(net.state_dict())
    residuals = residuals_of(data)
    points, test = (torch.from_numpy(np.asarray(x)) for x in (data.train_x, data.test_x))

    def test_loss() -> float:
        x = test.clone().requires_grad_(True)
        found = burgers(x, net(x)).square().mean().item()
        dde.grad.clear()
        return float(found)

    class Until(dde.callbacks.Callback):  # type: ignore[misc]
        """Ends DeepXDE's loop when its time is over."""

        began = time.process_time()

        def on_epoch_end(self) -> None:
            self.model.stop_training = time.process_time() - self.began > seconds / 2

    model = dde.Model(data, net)
    model.compile("adam", lr=5e-3)
    model.train(iterations=10_000_000, callbacks=[Until()], display_every=1_000, verbose=0)
    theirs = residuals(net, points).square().mean().item(), test_loss()

    net.load_state_dict(initial)
    trainer = HybridTrainer(
        net, torch.optim.Adam(net.parameters(), lr=5e-3), HybridTrainerConfig(),
        loss_fn=lambda net, points: residuals(net, points).square().mean(), residual_fn=residuals,
    )  # fmt: skip
    began = time.process_time()
    trainer.fit(
        itertools.repeat(points), total_steps=1_000_000,
        should_stop=lambda: time.process_time() - began > seconds / 2,
    )  # fmt: skip
    ours = residuals(net, points).square().mean().item(), test_loss()
    for name, (loss, held_out) in {"DeepXDE, Adam": theirs, "closed form": ours}.items():
        print(f"{name:14s} loss {loss:.2e}, squared residual on other points {held_out:.2e}")
    print(f"{trainer.statistics()['num_jumps_accepted']} jumps, predictor {trainer.statistics()['predictor']}")


if __name__ == "__main__":
    main()
