"""``linear``: online closed-form ridge on hindsight-optimal coefficients.

After every window the displacement T that really happened is compared with the basis as it was
before it: the best coefficients solve min |T - sum_k c_k b_k|^2, a K x K system from inner products.
Those systems are summed with forgetting per group, shrunk to the sum over all groups (a group alone
has little data), and a second ridge on the encoded loss curve corrects the length:

    c_g = argmin  sum_w f^(n-w) |T_w - B_w c|^2_g  + kappa |c - c_all|^2
    delta_g = (1 + scale_g(features)) * c_g

Letters: ``G`` groups, ``K`` columns, ``F`` features, ``N`` steps of a window, ``Y`` horizon.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from ..config import LinearConfig
from ..features import NUM_LOSS_FEATURES
from ..records import BasisSpec, Hindsight, PhasePrediction, State, Window
from ._common import linear_loss_trajectory, window_from_state, window_state
from .ridge import OnlineRidge, solve_ridge

#: Weight of the all-groups solution against one group's own data.
SHRINKAGE = 0.5


class Linear:
    """Ridge over four displacements, the lag x - theta and the optimizer's own direction."""

    name = "linear"

    def __init__(self, config: LinearConfig, num_groups: int) -> None:
        """Args: config: ridge strength and forgetting.  num_groups: G."""
        self.config = config
        self.spec = BasisSpec(num_displacements=4, lag=True, optimizer=True)
        K = self.spec.num_columns
        self._A = torch.zeros(num_groups, K, K, dtype=torch.float64)
        self._b = torch.zeros(num_groups, K, dtype=torch.float64)
        features = min(NUM_LOSS_FEATURES, config.feature_dim)
        self._scale = OnlineRidge(features, num_groups, l2=config.l2_regularization, forgetting=config.forgetting)
        self._loss = OnlineRidge(features, 1, l2=config.l2_regularization, forgetting=config.forgetting)
        self._window: Window | None = None
        self._errors: deque[float] = deque(maxlen=32)  # prequential, relative squared
        self._loss_errors: deque[float] = deque(maxlen=32)
        self._count = 0

    @property
    def ready(self) -> bool:
        """After the basis is full once and two hindsight systems are summed."""
        return self._count >= 2 and self._window is not None

    def observe(self, window: Window) -> None:
        """Score the last prediction, then learn from what happened."""
        before = self._window
        if before is not None:
            self._observe_loss(before, window)
            if window.hindsight is not None and float(window.hindsight.TT.sum()) > 0:
                self._observe_displacement(before, window.hindsight)
        self._window = window

    def _observe_displacement(self, before: Window, hindsight: Hindsight) -> None:
        c = self._coefficients()
        if self._count >= 2:
            self._errors.append(relative_error(c * self._length(before), hindsight))
        # best length of what was proposed, the target of the second ridge; unknown where c is zero
        along = torch.einsum("gk,gkl,gl->g", c, hindsight.BB, c)
        best = torch.einsum("gk,gk->g", c, hindsight.BT) / along.clamp(min=1e-300)
        if self._count >= 2:
            target = torch.where(along > 0, best.clamp(-1.0, 3.0) - 1, torch.zeros_like(best))
            self._scale.observe(self._features(before), target)
        weight = 1 / hindsight.TT.sum().clamp(min=1e-300)  # every window counts the same
        self._A = self.config.forgetting * self._A + weight * hindsight.BB
        self._b = self.config.forgetting * self._b + weight * hindsight.BT
        self._count += 1

    def _observe_loss(self, before: Window, after: Window) -> None:
        if not (math.isfinite(before.loss) and math.isfinite(after.loss)) or after.jumped:
            return
        scale = abs(before.loss) or 1.0
        change = torch.tensor([(after.loss - before.loss) / scale], dtype=torch.float64)
        features = self._features(before)
        self._loss_errors.append(float(change - self._loss.predict(features)))
        self._loss.observe(features, change)

    def _features(self, window: Window) -> Tensor:
        return window.features[: self.config.feature_dim]

    def _coefficients(self) -> Tensor:
        """(G, K) per-group ridge, shrunk to the global solution."""
        l2 = self.config.l2_regularization
        total = self._A.sum(0)
        shared = solve_ridge(total, self._b.sum(0), l2)
        rows = []
        for A, b in zip(self._A, self._b, strict=True):
            # prior in the metric of A: directions this group never moved in follow the others
            kappa = SHRINKAGE * float(A.diagonal().sum()) / max(float(total.diagonal().sum()), 1e-300)
            rows.append(solve_ridge(A + kappa * total, b + kappa * total @ shared, l2, prior=shared))
        return torch.stack(rows)

    def _length(self, window: Window) -> Tensor:
        """(G, 1) learned multiple of the coefficients."""
        return (1 + self._scale.predict(self._features(window)).clamp(-1.0, 1.0))[:, None]

    def predict(self, horizon: int) -> PhasePrediction:
        """Coefficients for Y steps.

        Drift columns grow with the planned learning rate over the horizon; the lag is a correction
        of the starting point and does not grow.
        """
        window = self._window
        assert window is not None, "predict() before ready"
        rate = window.lr_ahead / window.lr_integral if window.lr_integral > 0 else 1.0
        growth = torch.full((self.spec.num_columns,), rate * horizon / window.num_steps, dtype=torch.float64)
        growth[self.spec.num_displacements + self.spec.extras.index("lag")] = 1.0
        coefficients = self._coefficients() * self._length(window) * growth
        per_window = float(self._loss.predict(self._features(window))) * (abs(window.loss) or 1.0)
        slope = min(per_window / window.num_steps, 0.0) if self._loss_errors else window.loss_slope
        trajectory = linear_loss_trajectory(window.loss, slope, horizon)
        half = 1.96 * self._loss_spread() * math.sqrt(horizon / window.num_steps) * (abs(window.loss) or 1.0)
        return PhasePrediction(
            coefficients=coefficients,
            horizon=horizon,
            predicted_loss=trajectory[-1][1],
            loss_trajectory=trajectory,
            loss_interval=(trajectory[-1][1] - half, trajectory[-1][1] + half),
            confidence=self.explained,
            predicted_reduction=max(window.loss - trajectory[-1][1], 0.0),
        )

    @property
    def explained(self) -> float:
        """Share of displacement the last predictions explained before they were learnt from, in [0, 1]."""
        if not self._errors:
            return 0.0
        return min(max(1 - sum(self._errors) / len(self._errors), 0.0), 1.0)

    def _loss_spread(self) -> float:
        errors = self._loss_errors
        return math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else 0.0

    def memory_bytes(self) -> int:
        """Bytes of the accumulated systems."""
        own = sum(t.numel() * t.element_size() for t in (self._A, self._b))
        return own + self._scale.memory_bytes() + self._loss.memory_bytes()

    def state_dict(self) -> State:
        """Everything learnt."""
        return {
            "A": self._A, "b": self._b, "count": self._count, "window": window_state(self._window),
            "scale": self._scale.state_dict(), "loss": self._loss.state_dict(),
            "errors": list(self._errors), "loss_errors": list(self._loss_errors),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self._A, self._b, self._count = state["A"].clone(), state["b"].clone(), state["count"]
        self._window = window_from_state(state["window"])
        self._scale.load_state_dict(state["scale"])
        self._loss.load_state_dict(state["loss"])
        self._errors = deque(state["errors"], maxlen=32)
        self._loss_errors = deque(state["loss_errors"], maxlen=32)


def relative_error(coefficients: Tensor, hindsight: Hindsight) -> float:
    """|T - sum_k c_k b_k|^2 / |T|^2 over all groups, from inner products."""
    fitted = torch.einsum("gk,gkl,gl->", coefficients, hindsight.BB, coefficients)
    cross = torch.einsum("gk,gk->", coefficients, hindsight.BT)
    total = float(hindsight.TT.sum())
    return float(total - 2 * cross + fitted) / total if total > 0 else 0.0
