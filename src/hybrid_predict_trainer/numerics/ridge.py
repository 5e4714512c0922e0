"""Closed-form ridge regression: one system, many at once, online, and with its strength chosen by results.

Letters: ``F`` features, ``O`` outputs, ``S`` ridge strengths, ``C`` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import StateDict

#: Weight of an error one observation later in the choice between candidates.
CHOICE_FORGETTING = 0.9


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


def solve_ridges(A: Tensor, b: Tensor, l2: float | Tensor, prior: Tensor | None = None) -> Tensor:
    """:func:`solve_ridge` for many systems at once.

    Args:
        A: (..., F, F) accumulated Gram matrices.
        b: (..., F) accumulated products, one target each.
        l2: Strengths, broadcast over the systems.
        prior: Like ``b``; zero if None.

    Returns:
        Weights shaped like ``b``.
    """
    strength = l2 * A.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + 1e-12
    right = b if prior is None else b + strength[..., None] * prior
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    weights: Tensor = torch.linalg.solve(A + strength[..., None, None] * eye, right[..., None])[..., 0]
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

    def state_dict(self) -> StateDict:
        """Sums and counts."""
        return {"A": self._A, "b": self._b, "count": self._count, "mean": self._mean, "m2": self._m2}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._A, self._b, self._count = state["A"].clone(), state["b"].clone(), state["count"]
        self._mean, self._m2 = state["mean"].clone(), state["m2"].clone()


class SelectedRidge:
    """Ridge regressions of O targets on F features, each with whichever strength has predicted best of late.

    How strong a ridge has to be differs by orders of magnitude between a smooth curve and noise, and
    often nothing is there at all.  So S strengths, the forgotten mean of the target and zero are
    candidates; every one is scored on what it said before the target was known.  Features and targets
    are centred; the mean is not shrunk.
    """

    def __init__(self, num_features: int, num_outputs: int, *, strengths: Sequence[float], forgetting: float) -> None:
        """No data: predicts zeros.

        Args:
            num_features: F.
            num_outputs: O; each has its own sums, as its target may come at another time.
            strengths: S ridge strengths, relative to the mean variance of the features.
            forgetting: Weight of an observation one observation later.
        """
        F = num_features
        self.forgetting = forgetting
        self._strengths = torch.tensor(list(strengths), dtype=torch.float64)
        self._A = torch.zeros(num_outputs, F, F, dtype=torch.float64)
        self._b = torch.zeros(num_outputs, F, dtype=torch.float64)
        self._z = torch.zeros(num_outputs, F, dtype=torch.float64)
        self._y = torch.zeros(num_outputs, dtype=torch.float64)
        self._weight = torch.zeros(num_outputs, dtype=torch.float64)
        self._errors = torch.zeros(len(self._strengths) + 2, num_outputs, dtype=torch.float64)  # (C, O) mean absolute
        self._spread = torch.zeros(num_outputs, dtype=torch.float64)  # mean square of the chosen one's

    def candidates(self, features: Tensor) -> Tensor:
        """(C, O) what every strength, the mean and zero say of features (F,)."""
        weight = self._weight.clamp(min=1e-300)
        mean_z, mean_y = self._z / weight[:, None], self._y / weight
        covariance = self._A - self._z[:, :, None] * mean_z[:, None, :]
        right = self._b - self._z * mean_y[:, None]
        w = solve_ridges(covariance, right.expand(len(self._strengths), -1, -1), self._strengths[:, None])  # (S, O, F)
        ridges = mean_y + (w * (features.double() - mean_z)).sum(dim=-1)
        return torch.cat([ridges, mean_y[None], torch.zeros_like(mean_y)[None]])

    def choose(self, candidates: Tensor) -> Tensor:
        """(O,) of candidates (C, O) those that were best so far."""
        return candidates.gather(0, self._errors.argmin(dim=0)[None])[0]

    def predict(self, features: Tensor) -> Tensor:
        """(O,) prediction; zeros before the first observation."""
        return self.choose(self.candidates(features))

    def observe(self, output: int, features: Tensor, target: float, said: Tensor) -> None:
        """Learn one pair.

        Args:
            output: Which target.
            features: (F,).
            target: What happened.
            said: (C,) candidates for this output at these features, from before the target was known.
        """
        miss = (said - target).abs()
        chosen = float(miss[int(self._errors[:, output].argmin())])
        k, f = CHOICE_FORGETTING, self.forgetting
        self._spread[output] = k * self._spread[output] + (1 - k) * chosen * chosen
        self._errors[:, output] = k * self._errors[:, output] + (1 - k) * miss
        z = features.double()
        for total, new in (
            (self._A, torch.outer(z, z)), (self._b, z * target), (self._z, z), (self._y, target), (self._weight, 1.0),
        ):  # fmt: skip
            total[output] = f * total[output] + new

    @property
    def spread(self) -> Tensor:
        """(O,) root mean square error of late, of what was chosen."""
        return self._spread.sqrt()

    _TENSORS = ("_A", "_b", "_z", "_y", "_weight", "_errors", "_spread")

    def memory_bytes(self) -> int:
        """Bytes of all sums."""
        tensors = [getattr(self, name) for name in self._TENSORS]
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> StateDict:
        """Sums and errors."""
        return {name.lstrip("_"): getattr(self, name) for name in self._TENSORS}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._TENSORS:
            setattr(self, name, state[name.lstrip("_")].clone())
