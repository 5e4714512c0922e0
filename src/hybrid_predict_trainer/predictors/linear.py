"""``linear``: online closed-form ridge on hindsight-optimal coefficients, continued window by window.

After every window the displacement T that really happened is compared with the basis as it was
before it: the best coefficients solve min |T - sum_k c_k b_k|^2, a K x K system from inner products.
Those systems are summed with forgetting per group and shrunk to the sum over all groups (a group alone
has little data).  Columns and target are first divided by the learning rate they arose under:

    c_g = argmin  sum_w f^(n-w) |T_w / r_w - sum_k c_k b_k,w / r_k,w|^2_g  +  kappa |c - c_all|^2

The same sums hold the recurrence of the displacements alone, s_(t+1) = sum_k a_k s_(t-k).  Several
windows ahead it is applied to its own predictions; where it would grow for ever it is brought back to
the unit circle.  How strong the ridge should be differs by orders of magnitude between a smooth curve
and noise, so several stand side by side and the one that predicted best of late speaks.

The change of the log loss is a second ridge (:class:`.ridge.SelectedRidge`), on the encoded state.

Letters: ``G`` groups, ``K`` columns, ``D`` of them displacements, ``F`` features, ``S`` ridge strengths,
``C`` candidates and ``O`` outputs of the loss ridge, ``N`` steps of a window, ``Y`` horizon.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.settings import LinearConfig
from ..numerics.ridge import SelectedRidge, solve_ridges
from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, Hindsight, PhasePrediction, StateDict, Window
from ._common import TRAJECTORY_POINTS

#: Weight of the all-groups solution against one group's own data.
SHRINKAGE = 0.5
#: Ridge strengths tried beside each other, as multiples of ``l2_regularization``.
STRENGTHS = (1.0, 1e-3, 1e-6)
#: Weight of a window one window later in the choice between them.
CHOICE_FORGETTING = 0.9
#: Windows ahead at which the loss is regressed; in between and beyond the forecast is straight.
LOSS_AHEAD = (1, 2, 4)
#: Ridge strengths of the loss, relative to the variance of a feature.
LOSS_STRENGTHS = (1e-4, 1e-2, 1.0)
#: Weight of a window one window later in the loss's sums; F features need more windows than K columns.
LOSS_FORGETTING = 0.95
#: Largest change of the log loss that is learnt or predicted.
MAX_CHANGE = 5.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A past window whose later losses are still to come."""

    loss: float
    features: Tensor  # (F,)
    said: Tensor  # (C, O) candidates of the loss ridge


class Linear:
    """Ridge over six displacements, the lag x - theta and the optimizer's own direction."""

    name = "linear"
    wants_encoding = True

    def __init__(self, config: LinearConfig, num_groups: int) -> None:
        """Args: config: ridge strength and forgetting.  num_groups: G."""
        self.config = config
        self.spec = BasisSpec(num_displacements=config.num_displacements, lag=True, optimizer=True)
        K = self.spec.num_columns
        self._A = torch.zeros(num_groups, K, K, dtype=torch.float64)
        self._b = torch.zeros(num_groups, K, dtype=torch.float64)
        self._strengths = config.l2_regularization * torch.tensor(STRENGTHS, dtype=torch.float64)
        self._choice = torch.zeros(len(STRENGTHS), dtype=torch.float64)  # forgotten mean errors
        self._loss = SelectedRidge(
            config.feature_dim, len(LOSS_AHEAD), strengths=LOSS_STRENGTHS, forgetting=LOSS_FORGETTING
        )
        self._waiting: deque[Waiting] = deque(maxlen=max(LOSS_AHEAD))
        self._window: Window | None = None
        self._rates: deque[float] = deque(maxlen=config.num_displacements + 1)  # of past windows, newest first
        self._errors: deque[float] = deque(maxlen=32)  # prequential, relative squared
        self._count = 0

    @property
    def ready(self) -> bool:
        """After two hindsight systems are summed."""
        return self._count >= 2 and self._window is not None

    # ---- learning --------------------------------------------------------------------------------

    def observe(self, window: Window) -> None:
        """Score the last prediction, then learn from what happened."""
        hindsight = window.hindsight
        if self._window is not None and hindsight is not None and float(hindsight.TT.sum()) > 0:
            rate = joined_rate(self._window.lr_integral, window.lr_integral, window.num_steps)
            self._observe_displacement(hindsight, rate)
        self._observe_loss(window)
        self._window = window
        self._rates.appendleft(window.lr_integral)

    def _observe_displacement(self, hindsight: Hindsight, rate: float) -> None:
        known = self._rates_known and 0 < rate < math.inf
        ratio = rate / self._column_rates() if known else torch.ones(self.spec.num_columns, dtype=torch.float64)
        if self._count >= 2:
            said = self._solutions(self._A, self._b) * ratio
            errors = torch.tensor([relative_error(c, hindsight) for c in said], dtype=torch.float64)
            self._errors.append(float(errors[self._chosen]))
            self._choice = CHOICE_FORGETTING * self._choice + (1 - CHOICE_FORGETTING) * errors.clamp(max=4.0)
        f, weight = self.config.forgetting, 1 / hindsight.TT.sum().clamp(min=1e-300)  # every window counts the same
        self._A = f * self._A + weight * ratio[:, None] * hindsight.BB * ratio
        self._b = f * self._b + weight * ratio * hindsight.BT
        self._count += 1

    def _observe_loss(self, window: Window) -> None:
        if window.jumped or not math.isfinite(window.loss):
            self._waiting.clear()
        for output, ahead in enumerate(LOSS_AHEAD):
            if len(self._waiting) >= ahead:
                past = self._waiting[-ahead]
                self._loss.observe(output, past.features, log_change(past.loss, window.loss), past.said[:, output])
        if math.isfinite(window.loss):
            features = self._features(window)
            self._waiting.append(Waiting(window.loss, features, self._loss.candidates(features)))

    def _features(self, window: Window) -> Tensor:
        """(F,) the first F numbers of the encoded state, of the loss curve alone where there is none."""
        known = window.features if window.encoding is None else window.encoding
        known = known[: self.config.feature_dim].double()
        return torch.nn.functional.pad(known, (0, self.config.feature_dim - len(known)))

    # ---- coefficients ------------------------------------------------------------------------------

    @property
    def _rates_known(self) -> bool:
        return bool(self._rates) and all(0 < rate < math.inf for rate in self._rates)

    @property
    def _chosen(self) -> int:
        return int(self._choice.argmin())

    def _column_rates(self) -> Tensor:
        """(K,) learning rate every column arose under; a displacement joins the means of two windows."""
        D, K = self.spec.num_displacements, self.spec.num_columns
        if not self._rates_known:
            return torch.ones(K, dtype=torch.float64)
        past = [*self._rates, *[self._rates[-1]] * (D + 1 - len(self._rates))]
        num_steps = self._window.num_steps if self._window is not None else 1
        own = [joined_rate(past[k + 1], past[k], num_steps) for k in range(D)]
        return torch.tensor(own + [past[0]] * (K - D), dtype=torch.float64)

    def _solutions(self, A: Tensor, b: Tensor) -> Tensor:
        """(S, G, K) per-group ridges of every strength, shrunk to the one over all groups."""
        total, right = A.sum(dim=0), b.sum(dim=0)
        squared = total.diagonal()
        # unit columns: a short one (the optimizer's step) is not shrunk more than a long one
        scale = torch.where(squared > 0, squared.clamp(min=1e-300).rsqrt(), torch.zeros_like(squared))
        total, right = scale[:, None] * total * scale, scale * right
        A, b = scale[:, None] * A * scale, scale * b
        S, strengths = len(self._strengths), self._strengths
        shared = solve_ridges(total.expand(S, -1, -1), right.expand(S, -1), strengths)  # (S, K)
        # prior in the metric of A: directions this group never moved in follow the others
        kappa = SHRINKAGE * A.diagonal(dim1=1, dim2=2).sum(dim=1) / total.trace().clamp(min=1e-300)
        A = A + kappa[:, None, None] * total
        b = b + kappa[:, None] * (shared @ total)[:, None, :]  # (S, G, K)
        return solve_ridges(A.expand(S, -1, -1, -1), b, strengths[:, None], shared[:, None, :]) * scale

    def _recurrence(self) -> Tensor:
        """(G, D) coefficients a of the displacements alone, none of whose modes grows."""
        D = self.spec.num_displacements
        a = self._solutions(self._A[:, :D, :D], self._b[:, :D])[self._chosen]
        companion = torch.zeros(len(a), D, D, dtype=torch.float64)
        companion[:, 0] = a
        companion[:, torch.arange(1, D), torch.arange(D - 1)] = 1
        largest = torch.linalg.eigvals(companion).abs().amax(dim=1).clamp(min=1.0)
        bounded: Tensor = a * largest[:, None] ** -(torch.arange(D) + 1.0)
        return bounded

    def _total(self, num_windows: float) -> Tensor:
        """(G, K) coefficients of the displacement over some windows from now."""
        window = self._window
        assert window is not None, "predict() before ready"
        D, K = self.spec.num_displacements, self.spec.num_columns
        rates, known = self._column_rates(), self._rates_known and math.isfinite(window.lr_ahead)
        first = joined_rate(window.lr_integral, window.lr_ahead, window.num_steps) if known else 1.0
        later = window.lr_ahead if known else 1.0
        ahead = self._solutions(self._A, self._b)[self._chosen] / rates
        total = min(num_windows, 1.0) * first * ahead
        if num_windows <= 1:
            return total
        a = self._recurrence()
        past = list(torch.diag(1 / rates)[:D].expand(len(a), D, K).unbind(dim=1))
        for j in range(1, math.ceil(num_windows)):
            past = [ahead, *past[: D - 1]]
            ahead = torch.einsum("gd,gdk->gk", a, torch.stack(past, dim=1))
            total = total + min(num_windows - j, 1.0) * later * ahead
        return total

    # ---- prediction --------------------------------------------------------------------------------

    def predict(self, horizon: int) -> PhasePrediction:
        """Coefficients for Y steps, scaled by the planned learning rate; the loss at a few points on the way."""
        window = self._window
        assert window is not None, "predict() before ready"
        changes = [0.0] * len(LOSS_AHEAD)
        if self._waiting:  # the last window, with what the candidates say of it
            changes = self._loss.choose(self._waiting[-1].said).clamp(-MAX_CHANGE, MAX_CHANGE).tolist()
        steps = sorted({max(1, round(f * horizon)) for f in TRAJECTORY_POINTS})
        points = [_between(changes, step / window.num_steps) for step in steps]
        trajectory = tuple((s, changed_loss(window.loss, change)) for s, change in zip(steps, points, strict=True))
        predicted = trajectory[-1][1]
        m = horizon / window.num_steps
        half = 1.96 * float(self._loss.spread[0]) * math.sqrt(m)
        ends = [changed_loss(window.loss, points[-1] + sign * half) for sign in (-1.0, 1.0)]
        return PhasePrediction(
            coefficients=self._total(m),
            horizon=horizon,
            predicted_loss=predicted,
            loss_trajectory=trajectory,
            loss_interval=(min(ends), max(ends)),
            confidence=self.explained,
            predicted_reduction=max(window.loss - predicted, 0.0) if math.isfinite(window.loss) else 0.0,
        )

    @property
    def explained(self) -> float:
        """Share of displacement the last predictions explained before they were learnt from, in [0, 1]."""
        if not self._errors:
            return 0.0
        return min(max(1 - sum(self._errors) / len(self._errors), 0.0), 1.0)

    # ---- cost and state ----------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Bytes of the accumulated systems."""
        return sum(t.numel() * t.element_size() for t in (self._A, self._b)) + self._loss.memory_bytes()

    def state_dict(self) -> StateDict:
        """Everything learnt."""
        return {
            "A": self._A, "b": self._b, "count": self._count, "window": window_state(self._window),
            "choice": self._choice, "loss": self._loss.state_dict(), "rates": list(self._rates),
            "errors": list(self._errors),
            "waiting": [{"loss": w.loss, "features": w.features, "said": w.said} for w in self._waiting],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._A, self._b, self._count = state["A"].clone(), state["b"].clone(), state["count"]
        self._window = window_from_state(state["window"])
        self._choice = state["choice"].clone()
        self._loss.load_state_dict(state["loss"])
        self._rates = deque(state["rates"], maxlen=self._rates.maxlen)
        self._errors = deque(state["errors"], maxlen=32)
        waiting = (Waiting(w["loss"], w["features"].clone(), w["said"].clone()) for w in state["waiting"])
        self._waiting = deque(waiting, maxlen=max(LOSS_AHEAD))


def joined_rate(older: float, newer: float, num_steps: int) -> float:
    """Learning rate, summed over a window, behind the way between the means of two windows.

    Weights are averaged as they are before every step: (N + 1) / 2 of the older window's steps and
    (N - 1) / 2 of the newer one's lie between the two means.
    """
    share = (num_steps + 1) / (2 * num_steps)
    return share * older + (1 - share) * newer


def log_change(before: float, after: float) -> float:
    """Change of the log loss, bounded; of the loss relative to its size where it is not positive."""
    if min(before, after) > 0:
        change = math.log(after / before) if after / before > 0 else -MAX_CHANGE
    else:
        change = (after - before) / max(abs(before), abs(after), 1e-300)
    return max(min(change, MAX_CHANGE), -MAX_CHANGE)


def changed_loss(loss: float, change: float) -> float:
    """Inverse of :func:`log_change` in its second argument."""
    change = max(min(change, MAX_CHANGE), -MAX_CHANGE)
    return loss * math.exp(change) if loss > 0 else loss + change * abs(loss)


def _between(changes: list[float], m: float) -> float:
    """Change after m windows from those after :data:`LOSS_AHEAD`, straight between and beyond."""
    xs, ys = [0.0, *map(float, LOSS_AHEAD)], [0.0, *changes]
    i = next((i for i in range(1, len(xs)) if m <= xs[i]), len(xs) - 1)
    return ys[i - 1] + (m - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1])


def relative_error(coefficients: Tensor, hindsight: Hindsight) -> float:
    """|T - sum_k c_k b_k|^2 / |T|^2 over all groups, from inner products."""
    fitted = torch.einsum("gk,gkl,gl->", coefficients, hindsight.BB, coefficients)
    cross = torch.einsum("gk,gk->", coefficients, hindsight.BT)
    total = float(hindsight.TT.sum())
    return float(total - 2 * cross + fitted) / total if total > 0 else 0.0
