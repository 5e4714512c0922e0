"""Closed-form ridge regression that learns online with exponential forgetting."""

from __future__ import annotations

import torch
from torch import Tensor

from ..records import State


def solve_ridge(A: Tensor, b: Tensor, l2: float, prior: Tensor | None = None) -> Tensor:
    """argmin_w  w'A w - 2 b'w + strength * |w - prior|^2.

    Args:
        A: (F, F) accumulated Gram matrix of features.
        b: (F,) or (F, O) accumulated feature-target products.
        l2: Strength relative to the mean diagonal of ``A``, so that it has no units.
        prior: What to shrink to, like ``b``; zero if None.

    Returns:
        Weights shaped like ``b``.
    """
    size = A.shape[0]
    strength = l2 * float(A.diagonal().mean()) + 1e-12
    right = b if prior is None else b + strength * prior
    weights: Tensor = torch.linalg.solve(A + strength * torch.eye(size, dtype=A.dtype), right)
    return weights


class OnlineRidge:
    """Ridge on standardised features with a bias; sums are forgotten by a factor per observation."""

    def __init__(self, num_features: int, num_outputs: int, *, l2: float, forgetting: float) -> None:
        """Start with no data: predicts zeros."""
        F = num_features + 1
        self.l2, self.forgetting = l2, forgetting
        self._A = torch.zeros(F, F, dtype=torch.float64)
        self._b = torch.zeros(F, num_outputs, dtype=torch.float64)
        self._count = 0
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._m2 = torch.zeros(num_features, dtype=torch.float64)

    def _encode(self, features: Tensor) -> Tensor:
        std = (self._m2 / max(self._count - 1, 1)).sqrt()
        scaled = torch.where(
            std > 1e-12, (features.double() - self._mean) / std.clamp(min=1e-12), torch.zeros_like(std)
        )
        # a standardised value beyond 5 means the run left what was seen: extrapolate no further
        return torch.cat([scaled.clamp(-5.0, 5.0), torch.ones(1, dtype=torch.float64)])

    def observe(self, features: Tensor, target: Tensor) -> None:
        """Learn one pair: features (F,), target (O,)."""
        self._count += 1
        delta = features.double() - self._mean
        self._mean = self._mean + delta / self._count
        self._m2 = self._m2 + delta * (features.double() - self._mean)
        z = self._encode(features)
        self._A = self.forgetting * self._A + torch.outer(z, z)
        self._b = self.forgetting * self._b + torch.outer(z, target.double())

    def predict(self, features: Tensor) -> Tensor:
        """(O,) prediction; zeros before the first observation."""
        if not self._count:
            return torch.zeros(self._b.shape[1], dtype=torch.float64)
        return solve_ridge(self._A, self._b, self.l2).T @ self._encode(features)

    def memory_bytes(self) -> int:
        """Bytes of all sums."""
        return sum(t.numel() * t.element_size() for t in (self._A, self._b, self._mean, self._m2))

    def state_dict(self) -> State:
        """Sums and counts."""
        return {"A": self._A, "b": self._b, "count": self._count, "mean": self._mean, "m2": self._m2}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self._A, self._b, self._count = state["A"].clone(), state["b"].clone(), state["count"]
        self._mean, self._m2 = state["mean"].clone(), state["m2"].clone()
