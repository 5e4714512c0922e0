"""Slow and obvious versions: every weight in one flat float64 vector, every sum written out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_predict_trainer.records import BasisSpec
from hybrid_predict_trainer.weights.parameters import Groups


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One float64 vector."""
    return torch.cat([t.detach().double().reshape(-1).cpu() for t in tensors])


class DenseBasis:
    """All windows ever closed, kept as vectors; columns and products are computed when asked for."""

    def __init__(self, parameters: Sequence[Tensor], groups: Groups, spec: BasisSpec, window: int) -> None:
        self.parameters, self.spec, self.window = list(parameters), spec, window
        self.rows = [
            torch.cat([
                torch.full((p.numel(),), float(g == row)) for p, g in zip(parameters, groups.index, strict=True)
            ]).double()
            for row in range(groups.num_groups)
        ]  # fmt: skip
        self.thetas: list[Tensor] = []  # of the open window
        self.grads: list[Tensor] = []
        self.x: Tensor | None = None
        self.g: Tensor | None = None
        self.s: list[Tensor] = []  # newest first
        self.y: list[Tensor] = []
        self.lag: Tensor | None = None
        self.optimizer: Tensor | None = None

    def accumulate(self) -> None:
        """Before the optimizer's step."""
        self.close_if_full()
        self.thetas.append(flat(self.parameters))
        self.grads.append(flat([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]))

    def close_if_full(self) -> None:
        """After the optimizer's step."""
        if len(self.thetas) < self.window:
            return
        theta = flat(self.parameters)
        x, g = torch.stack(self.thetas).mean(0), torch.stack(self.grads).mean(0)
        if self.x is not None and self.g is not None:
            self.s.insert(0, x - self.x)
            self.y.insert(0, g - self.g)
        self.lag, self.optimizer = x - theta, theta - self.thetas[-1]
        self.x, self.g, self.thetas, self.grads = x, g, [], []

    def jumped(self, delta: Tensor) -> None:
        """The weights were moved by ``delta``."""
        self.thetas, self.grads = [], []
        if not self.spec.curvature and self.x is not None:
            self.x = self.x + delta

    def columns(self) -> Tensor:
        """(K, all weights), the order of :class:`BasisSpec`."""
        self.close_if_full()
        assert self.g is not None
        zero = torch.zeros_like(self.g)
        num = self.spec.num_displacements
        extras = {"lag": self.lag, "optimizer": self.optimizer, "gradient": self.g}
        rows = (self.s + [zero] * num)[:num] + [extras[name] if self.s else zero for name in self.spec.extras]
        return torch.stack([zero if r is None else r for r in rows])

    def combine(self, coefficients: Tensor) -> Tensor:
        """sum_k c[g, k] b_k."""
        columns = self.columns()
        return sum(
            (mask * (c.double() @ columns) for mask, c in zip(self.rows, coefficients, strict=True)), torch.zeros(())
        )

    def BB(self) -> Tensor:
        """(G, K, K)"""
        B = self.columns()
        return torch.stack([(B * mask) @ B.T for mask in self.rows])

    def BY(self) -> Tensor:
        """(G, K, K), symmetric: the product of the older displacement with the newer difference."""
        B, K, num = self.columns(), self.spec.num_columns, len(self.s)
        out = torch.zeros(len(self.rows), K, K, dtype=torch.float64)
        for k in range(min(num, self.spec.num_displacements)):
            for j in range(min(num, self.spec.num_displacements)):
                newer = min(k, j)  # age 0 is the newest
                older = max(k, j)
                for row, mask in enumerate(self.rows):
                    out[row, k, j] = (B[older] * mask) @ self.y[newer]
        return out

    def Bg(self) -> Tensor:
        """(G, K)"""
        B = self.columns()
        assert self.g is not None
        return torch.stack([(B * mask) @ self.g for mask in self.rows])

    def gg(self) -> Tensor:
        """(G,)"""
        assert self.g is not None
        return torch.stack([(self.g * mask) @ self.g for mask in self.rows])


# ---------------------------------------------------------------- history


def ema_moments(values: Sequence[float], decay: float) -> tuple[float, float]:
    """Bias-corrected exponential mean and standard deviation, by explicit weights."""
    v = np.asarray(values, dtype=np.float64)
    w = decay ** np.arange(len(v))[::-1]
    mean = float((w * v).sum() / w.sum())
    return mean, float(np.sqrt(max(0.0, (w * v * v).sum() / w.sum() - mean**2)))


def trimmed_mean(values: Sequence[float], share: float = 0.2) -> float:
    """Mean without the lowest and highest share."""
    v = np.sort(np.asarray(values, dtype=np.float64))
    cut = int(len(v) * share)
    return float(v[cut : len(v) - cut].mean())
