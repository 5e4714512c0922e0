"""``dmd``: linear dynamics of the displacements themselves, by the method of snapshots.

Near a minimum training is linear: d_{i+1} = A d_i for successive window displacements d (with
momentum too, in a larger state).  With the older columns X = [d_1 ... d_{K-1}] and the newer ones
X' = [d_0 ... d_{K-2}] (newest first) the projected operator needs inner products only
(exact DMD, Tu et al. 2014, arXiv 1312.0041, algorithm 2):

    U = X T,  U'U = I        A~ = U' X' T        A = X' T U'

so that A^j d_0 = X' T A~^(j-1) U' d_0: coefficients on the newer columns.  Eigenvalues are pulled back
to |lambda| <= 1 (training does not grow for ever), and the m = Y / N steps of a horizon are summed in
closed form, sum_j lambda^j = lambda (1 - lambda^m) / (1 - lambda), which also holds for broken m.
Under noise a regression in the span promises too much; what earlier predictions were worth in
hindsight shrinks the jump.

Two refinements.  Momentum hides half of the state: displacements alone then do not determine the next
one, so snapshots are stacked with their predecessors (delay embedding, Hankel-DMD, arXiv 1611.06664),
whose Gram matrix is a sum of shifted blocks of the one we have.  And each displacement is first
divided by the learning rates that made it: a schedule changes the size of the displacements more
than the dynamics behind them.

The loss is forecast in the same way from its own past: a loss that is a quadratic form of linear dynamics
is a sum of exponentials, so the changes of the log loss, per learning rate, follow a linear recurrence
(Prony's method), fitted by ridge and summed over the horizon like the displacements.

Letters: ``K`` displacement columns, ``R`` directions kept, ``G`` groups (one operator for all).
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from ..config.settings import DmdConfig
from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, Hindsight, PhasePrediction, StateDict, Window, zeros_like_coefficients
from ._common import TRAJECTORY_POINTS, linear_loss_trajectory
from ._learned import changed_loss, log_change
from .secant import orthonormaliser

#: Weight of an older hindsight one window later in the measured shrinkage.
FORGETTING = 0.95
#: Longest displacement per window, in median lengths of the columns: across a spike of the loss the fit
#: is of two different systems, and one such prediction was 400 times too long.
MAX_LENGTH = 2.0
#: Order of the recurrence of the loss, changes kept to fit it, and strength of its ridge relative to the mean
#: diagonal: the least error over all cases of ``hpt bench predictors`` among orders 1 to 4, 12 to 24 changes.
LOSS_ORDER, NUM_CHANGES, LOSS_L2 = 4, 24, 1e-3
#: Beyond this condition number of the eigenvectors powers are taken by multiplication instead.
MAX_CONDITION = 1e8


def snapshot_operator(BB: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Fit d_{i+1} = A d_i to the columns of one Gram matrix.

    Args:
        BB: (n, n) Gram matrix of displacements, newest first, n >= 3.
        tolerance: Relative length under which a direction is rounding noise.

    Returns:
        T (n-1, R), A~ (R, R), the newest displacement in the span U'd_0 (R,), and the spectral residual:
        the share |X' - A X|^2 / |X'|^2 the operator leaves unexplained.
    """
    older, newer = BB[1:, 1:], BB[:-1, :-1]
    cross = BB[1:, :-1]  # X' inner X: older column k with newer column l
    T = orthonormaliser(older, tolerance)
    operator = T.T @ cross @ T
    start = T.T @ cross[:, 0]
    total = float(newer.diagonal().sum())
    # A X = X' T T' X'X: each column replaced by its image
    images = T @ (T.T @ older)
    left = newer - newer @ images - images.T @ newer + images.T @ newer @ images
    residual = float(left.diagonal().sum()) / total if total > 0 else 0.0
    return T, operator, start, min(max(residual, 0.0), 1.0)


def power_sum(operator: Tensor, start: Tensor, num_powers: float) -> Tensor:
    """(sum_{j=0}^{m-1} A^j) start for real m > 0, eigenvalues clipped to the unit disc.

    Args:
        operator: (R, R).
        start: (R,).
        num_powers: m; a broken one interpolates along the eigenvalues' powers.
    """
    values, vectors = torch.linalg.eig(operator)
    size = values.abs()
    clipped = torch.where(size > 1, values / size.clamp(min=1e-300), values)
    if float(torch.linalg.cond(vectors)) < MAX_CONDITION:
        near = (1 - clipped).abs() < 1e-9
        safe = torch.where(near, torch.zeros_like(clipped), clipped)
        sums = torch.where(near, torch.full_like(clipped, num_powers), (1 - safe**num_powers) / (1 - safe))
        weights: Tensor = torch.linalg.solve(vectors, start.to(values.dtype))
        summed: Tensor = vectors @ (sums * weights)
        return summed.real
    radius = max(float(size.max()), 1.0)
    total, term = torch.zeros_like(start), start
    for j in range(math.ceil(num_powers)):
        total = total + min(num_powers - j, 1.0) * term
        term = operator @ term / radius
    return total


def stacked(BB: Tensor, delays: int) -> Tensor:
    """Gram matrix (n, n) of columns -> (n - q + 1, ...) of columns stacked with their q - 1 predecessors."""
    size = BB.shape[0] - delays + 1
    return torch.stack([BB[r : r + size, r : r + size] for r in range(delays)]).sum(dim=0)


def _shortened(c: Tensor, gram: Tensor, limit: float) -> Tensor:
    """Coefficients (K,) of a vector no longer than ``limit`` median columns."""
    allowed = limit * float(gram.diagonal().clamp(min=0).sqrt().median())
    length = math.sqrt(max(float(c @ gram @ c), 0.0))
    return c * (allowed / length) if length > allowed else c


def recurrence(changes: Tensor) -> Tensor:
    """Companion matrix (R, R) of d_{i+1} = sum_r a_r d_{i-r} fitted to a series (n,), oldest first, R <= LOSS_ORDER."""
    R = min(LOSS_ORDER, (len(changes) - 1) // 2)
    past = changes[:-1].unfold(0, R, 1).flip(1)  # (n - R, R) newest first
    A, b = past.T @ past, past.T @ changes[R:]
    ridge = LOSS_L2 * float(A.diagonal().mean()) + 1e-300
    companion = torch.diag(torch.ones(R - 1, dtype=torch.float64), -1)
    companion[0] = torch.linalg.solve(A + ridge * torch.eye(R, dtype=torch.float64), b)
    return companion


class LossRecurrence:
    """Changes of the log loss per learning rate, and how well they were forecast."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._changes: deque[float] = deque(maxlen=NUM_CHANGES)  # oldest first
        self._fit: tuple[Tensor, Tensor] | None = None  # companion matrix and next state, made when first asked for
        self._expected = math.nan  # next change of the log loss
        self._squared, self._count = 0.0, 0

    def observe(self, before: Window, after: Window, drift: float) -> None:
        """Score the forecast, add a change; one across a jump says nothing of the dynamics."""
        change = log_change(before.loss, after.loss)
        if after.jumped or not math.isfinite(change):
            return
        if math.isfinite(self._expected):
            self._count += 1
            self._squared += ((change - self._expected) ** 2 - self._squared) / min(self._count, 20)
        self._changes.append(change / drift if drift > 0 and math.isfinite(drift) else change)
        self._fit = None

    def note(self, expected: float | None) -> None:
        """Remember what is forecast for the next window, None for nothing."""
        self._expected = math.nan if expected is None else expected

    def change(self, num_windows: float, first: float, planned: float) -> float | None:
        """Expected change of the log loss over m windows, None until four changes are known.

        Args:
            num_windows: m.
            first: Sum of the learning rate that makes the next change.
            planned: The same of every later one.
        """
        if len(self._changes) < 4:
            return None
        if self._fit is None:
            changes = torch.tensor(list(self._changes), dtype=torch.float64)
            companion = recurrence(changes)
            self._fit = companion, companion @ changes.flip(0)[: len(companion)]
        total = planned * float(power_sum(*self._fit, num_windows)[0])
        if first != planned:
            total += (first - planned) * float(power_sum(*self._fit, min(num_windows, 1.0))[0])
        return total if math.isfinite(total) else None

    @property
    def spread(self) -> float:
        """Root mean square of past errors one window ahead, in log loss."""
        return math.sqrt(self._squared)

    def state_dict(self) -> StateDict:
        """Everything learnt."""
        return {
            "changes": list(self._changes), "squared": self._squared, "count": self._count,
            "expected": None if math.isnan(self._expected) else self._expected,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._changes, self._fit = deque(state["changes"], maxlen=NUM_CHANGES), None
        self._squared, self._count = state["squared"], state["count"]
        self.note(state["expected"])


class Dmd:
    """One operator over all groups, their products summed."""

    name = "dmd"

    def __init__(self, config: DmdConfig) -> None:
        """Args: config: number of displacements, rank tolerance."""
        self.config = config
        self.spec = BasisSpec(num_displacements=config.num_displacements)
        self._window: Window | None = None
        self._drifts: deque[float] = deque(maxlen=config.num_displacements + 1)  # lr sums, newest last
        self._loss = LossRecurrence()
        self._one_step: Tensor | None = None  # (G, K) what the last window was predicted to bring
        self._cross = self._fitted = self._total = 0.0  # forgotten sums of p.T, p.p, T.T over hindsights
        self._count = 0

    @property
    def ready(self) -> bool:
        """After three displacements: two pairs."""
        return self._window is not None and self._window.num_columns >= 3

    def observe(self, window: Window) -> None:
        """Score the one-window prediction made last time, then make the next one."""
        if self._one_step is not None and window.hindsight is not None:
            self._score(self._one_step, window.hindsight)
        before = self._window.lr_integral if self._window is not None else window.lr_integral
        # a displacement joins the means of two windows, half of each one's steps
        self._drifts.append(0.5 * (before + window.lr_integral))
        if self._window is not None:
            self._loss.observe(self._window, window, self._drifts[-1])
        self._window = window
        self._loss.note(self._loss_change(1.0))
        self._one_step = self._coefficients(1.0)[0] if self.ready else None

    def _score(self, coefficients: Tensor, hindsight: Hindsight) -> None:
        total = float(hindsight.TT.sum())
        if not 0 < total < math.inf:
            return
        fitted = float(torch.einsum("gk,gkl,gl->", coefficients, hindsight.BB, coefficients))
        cross = float(torch.einsum("gk,gk->", coefficients, hindsight.BT))
        if not (math.isfinite(fitted) and math.isfinite(cross)):
            return
        weight = 1 / max(total, fitted)  # every window counts the same, also one with a wild prediction
        self._cross = FORGETTING * self._cross + weight * cross
        self._fitted = FORGETTING * self._fitted + weight * fitted
        self._total = FORGETTING * self._total + weight * total
        self._count += 1

    @property
    def shrinkage(self) -> float:
        """Least-squares multiple of the past predictions, in [0, 1]; 1 until known."""
        if not self._count or self._fitted <= 0:
            return 1.0
        return min(max(self._cross / self._fitted, 0.0), 1.0)

    @property
    def explained(self) -> float:
        """Share of displacement that past predictions, so shrunk, explained; in [0, 1]."""
        if not self._count:
            return 0.0
        a = self.shrinkage
        return min(max((2 * a * self._cross - a * a * self._fitted) / self._total, 0.0), 1.0)

    def _coefficients(self, num_windows: float) -> tuple[Tensor, float]:
        window = self._window
        assert window is not None
        n = window.num_columns
        drift = torch.tensor(list(self._drifts)[: -n - 1 : -1], dtype=torch.float64)
        coefficients = zeros_like_coefficients(window.products.num_groups, self.spec.num_columns)
        if n < 3 or len(drift) < n or not bool((torch.isfinite(drift) & (drift > 0)).all()):
            drift = torch.ones(n, dtype=torch.float64)
        gram = window.products.BB.sum(0)[:n, :n] / torch.outer(drift, drift)
        BB = stacked(gram, min(self.config.delays, max(n - 2, 1)))
        n = BB.shape[0]
        if n < 3 or not bool(torch.isfinite(BB).all()) or not float(BB.diagonal().sum()) > 0:
            return coefficients, 1.0
        T, operator, start, residual = snapshot_operator(BB, self.config.rank_tolerance)
        if T.shape[1]:
            first, planned = self._planned(float(drift[0]))
            later = planned * power_sum(operator, start, num_windows)
            sooner = (first - planned) * power_sum(operator, start, min(num_windows, 1.0))
            c = T @ (later + sooner)
            if bool(torch.isfinite(c).all()):
                limit = MAX_LENGTH * (num_windows * planned + abs(first - planned))
                coefficients[:, : n - 1] = _shortened(c, gram[: n - 1, : n - 1], limit) / drift[: n - 1]
        return coefficients, residual

    def _planned(self, otherwise: float) -> tuple[float, float]:
        """Sums of the learning rate that make the next displacement, half of it past, and every later one."""
        window = self._window
        assert window is not None
        if not window.lr_integral > 0:
            return otherwise, otherwise
        planned = window.lr_ahead if window.lr_ahead >= 0 else otherwise
        return 0.5 * (window.lr_integral + planned), planned

    def _loss_change(self, num_windows: float) -> float | None:
        """Expected change of the log loss over m windows."""
        drift = self._drifts[-1]
        return self._loss.change(num_windows, *self._planned(drift if drift > 0 else 1.0))

    def _loss_trajectory(self, horizon: int) -> tuple[tuple[int, float], ...]:
        """Loss at a few points of the horizon; along its slope until its recurrence is known."""
        window = self._window
        assert window is not None
        steps = sorted({max(1, round(f * horizon)) for f in TRAJECTORY_POINTS})
        changes = [self._loss_change(step / window.num_steps) for step in steps]
        known = [(step, changed_loss(window.loss, c)) for step, c in zip(steps, changes, strict=True) if c is not None]
        return tuple(known) if known else linear_loss_trajectory(window.loss, window.loss_slope, horizon)

    def predict(self, horizon: int) -> PhasePrediction:
        """Coefficients for Y steps, from powers of the fitted operator."""
        window = self._window
        assert window is not None, "predict() before ready"
        coefficients, residual = self._coefficients(horizon / window.num_steps)
        trajectory = self._loss_trajectory(horizon)
        predicted = trajectory[-1][1]
        half = 1.96 * self._loss.spread * math.sqrt(horizon / window.num_steps)
        ends = [changed_loss(predicted, sign * half) for sign in (-1, 1)]
        return PhasePrediction(
            coefficients=coefficients * self.shrinkage,
            horizon=horizon,
            predicted_loss=predicted,
            loss_trajectory=trajectory,
            loss_interval=(min(ends), max(ends)),
            confidence=self.explained,
            predicted_reduction=max(window.loss - predicted, 0.0) if math.isfinite(window.loss) else 0.0,
            epistemic=residual,
        )

    def memory_bytes(self) -> int:
        """One set of coefficients and a few numbers."""
        return 0 if self._one_step is None else self._one_step.numel() * self._one_step.element_size()

    def state_dict(self) -> StateDict:
        """The last window, its prediction, and what past predictions were worth."""
        return {
            "window": window_state(self._window), "drifts": list(self._drifts),
            "one_step": self._one_step, "count": self._count,
            "cross": self._cross, "fitted": self._fitted, "total": self._total, "loss": self._loss.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._window = window_from_state(state["window"])
        self._drifts = deque(state["drifts"], maxlen=self.config.num_displacements + 1)
        self._one_step = None if state["one_step"] is None else state["one_step"].clone()
        self._count, self._cross = state["count"], state["cross"]
        self._fitted, self._total = state["fitted"], state["total"]
        self._loss.load_state_dict(state["loss"])
