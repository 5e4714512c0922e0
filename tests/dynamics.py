"""Synthetic windows whose next displacement depends on a state a predictor has to read and remember.

The displacement turns round or goes on at random, so that no fixed coefficients are any good: what the
closed-form base makes of it is no better than no jump at all.  Which it will be is told one window
ahead of time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_predict_trainer.records import BasisSpec, Hindsight, PhasePrediction, Products, Window


@dataclass
class Step:
    window: Window
    columns: Tensor  # (G, K, P) the basis
    ahead: Tensor  # (4, G, P) displacements of the next four windows


def turning(
    spec: BasisSpec, num_windows: int, *, seed: int = 0, num_groups: int = 2, noise: float = 0.1, num_steps: int = 10
) -> Iterator[Step]:
    """d[t+1] = sign[t] d[t] + noise; the gradient norm at t tells sign[t + 1], the loss falls where it is positive."""
    generator = torch.Generator().manual_seed(seed)
    P, D = 64, spec.num_displacements
    sign = (2 * torch.randint(2, (num_windows + 8,), generator=generator) - 1).tolist()
    d = [torch.randn(num_groups, P, generator=generator, dtype=torch.float64)]
    for t in range(num_windows + 4):
        fresh = torch.randn(num_groups, P, generator=generator, dtype=torch.float64)
        step = sign[t] * d[-1] + noise * fresh
        d.append(step * (8 / torch.linalg.vector_norm(step, dim=1, keepdim=True)))
    loss, earlier, log_loss = 1.0, None, 0.0
    for t in range(num_windows):
        columns = torch.zeros(num_groups, spec.num_columns, P, dtype=torch.float64)
        for k in range(min(D, t + 1)):
            columns[:, k] = d[t - k]
        for i in range(len(spec.extras)):
            columns[:, D + i] = torch.randn(num_groups, P, generator=generator, dtype=torch.float64)
        BB = columns @ columns.mT
        hindsight = None
        if earlier is not None:
            BT = (earlier @ d[t][:, :, None])[:, :, 0]
            hindsight = Hindsight(BB=earlier @ earlier.mT, BT=BT, TT=d[t].square().sum(dim=1))
        loss = math.exp(log_loss)
        features = torch.zeros(32)
        window = Window(
            index=t, num_steps=num_steps, num_columns=min(D, t + 1), step=(t + 1) * num_steps, loss=loss, loss_slope=-1e-3,
            gradient_norm=10.0 if sign[t + 1] > 0 else 1.0, learning_rate=0.1, lr_integral=1.0, lr_ahead=1.0,
            jumped=False, features=features,
            products=Products(BB=BB, BY=torch.zeros_like(BB), Bg=torch.zeros_like(BB[:, 0]), gg=torch.ones(num_groups).double()),
            hindsight=hindsight, group_sizes=(P,) * num_groups,
        )  # fmt: skip
        log_loss += -0.05 if sign[t] > 0 else 0.03
        earlier = columns
        yield Step(window, columns, torch.stack(d[t + 1 : t + 5]))


def relative_error(step: Step, prediction: PhasePrediction) -> float:
    """|p - T|^2 / |T|^2 over the prediction's horizon."""
    m = prediction.horizon // step.window.num_steps
    T = step.ahead[:m].sum(dim=0)
    p = (prediction.coefficients[:, :, None] * step.columns).sum(dim=1)
    return float((p - T).square().sum() / T.square().sum().clamp(min=1e-12))
