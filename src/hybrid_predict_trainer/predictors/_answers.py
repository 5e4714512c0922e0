"""How the answers of an ensemble become one prediction, and its two kinds of uncertainty apart.

Every answer has a mean and an expected squared miss.  By the law of total variance the displacement's is

    variance between the members' means          epistemic: goes with data
    + mean variance within a member, and miss    aleatoric: stays

both reported as roots of their share of the expected squared displacement, |mean|^2 and both variances:
between 0 and 1, whatever the scale, and 1 where a jump of zero is the best that can be said.

Letters: ``M`` answers (rollouts or dropout masks of all members), ``J`` windows ahead, ``G`` groups,
``K`` columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import PhasePrediction, StateDict, zeros_like_coefficients
from ._common import TRAJECTORY_POINTS
from ._frame import MAX_AHEAD, step_weights
from ._learned import MIN_MISS, Experience, changed_loss

#: Log ratio of a miss to the expected one beyond which the loss grows linearly: one surprise must not
#: drown what a batch says.
MAX_SURPRISE = 3.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What M members and samples said of the J windows ahead."""

    corrections: Tensor  # (M, J, G, K) to the base, in the frame, per unit of planned drift
    changes: Tensor  # (M, J) of the log loss since the last window, in total
    misses: Tensor  # (M, J, G) expected squared misses, in lengths of the last displacements
    members: Tensor  # (M,) which member each row is from
    survival: float = 1.0  # probability that the loss stays finite and below twice its value

    def state_dict(self) -> StateDict:
        """For checkpoints: what was sampled once is not sampled again."""
        return {
            "corrections": self.corrections, "changes": self.changes, "misses": self.misses,
            "members": self.members, "survival": self.survival,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: StateDict | None) -> Answers | None:
        """Inverse of :meth:`state_dict`."""
        return None if state is None else cls(**state)


def miss_loss(log_ratio: Tensor, missed: Tensor, beyond: Tensor, weights: Tensor, base: Tensor) -> Tensor:
    """Sum over rows and groups of the loss whose minimum is the expected squared miss, relative to the base's.

    log v + y / v is minimised by v = E y (QLIKE; Patton, J. Econometrics 2011), whatever the
    distribution of y.

    Args:
        log_ratio: (..., G) log of v over ``base``.
        missed: (..., G, K) squared misses along the frame.
        beyond: (..., G) squared length outside it.
        weights: (..., G, K) of each, 0: not known.
        base: (..., G) what the base alone misses on average.
    """
    y = ((missed * (weights > 0)).sum(dim=-1) + beyond + MIN_MISS) / base
    surprise = y.log() - log_ratio
    steep = math.exp(MAX_SURPRISE)
    ratio = torch.where(
        surprise < MAX_SURPRISE, surprise.clamp(max=MAX_SURPRISE).exp(), steep * (1 + surprise - MAX_SURPRISE)
    )
    return (weights.amax(dim=-1) * (log_ratio + ratio)).sum()


def split_uncertainty(totals: Tensor, members: Tensor, noise: Tensor, area: Tensor) -> tuple[float, float]:
    """Squared lengths (epistemic, aleatoric) of the uncertainty of a displacement.

    The members' means hold 1/n of the variance of their n samples, which is taken off.

    Args:
        totals: (M, G, K) displacements in the frame.
        members: (M,) which member each is from.
        noise: (G,) expected squared miss of one answer, in squared lengths of the frame.
        area: (G,) squared length of the frame's unit.
    """
    ids, counts = members.unique(return_counts=True)
    centres = torch.stack([totals[members == i].mean(dim=0) for i in ids])
    own = centres[torch.searchsorted(ids, members)]
    # n / (n - 1): the mean is the samples' own; a member with one sample says nothing of its spread
    unbiased = (counts / (counts - 1).clamp(min=1))[torch.searchsorted(ids, members), None, None]
    within = area @ ((totals - own).square() * unbiased).sum(dim=2).mean(dim=0)
    between = area @ (centres - centres.mean(dim=0)).square().sum(dim=2).mean(dim=0)
    n = len(totals) / len(ids)
    return max(float(between - within / n), 0.0), float(within + area @ noise)


def phase_prediction(experience: Experience, answers: Answers, horizon: int) -> PhasePrediction:
    """Turn answers per window ahead into one prediction over Y steps."""
    window, frame = experience.window, experience.frame
    assert window is not None, "predict() before ready"
    m = horizon / window.num_steps
    trust = experience.trust[:, None, None]
    u = experience.base + trust * answers.corrections.double() * experience.known[:, None, :]
    times = step_weights(m) * experience.rates  # (J,)
    totals = torch.einsum("j,mjgk->mgk", times, u)
    coefficients = zeros_like_coefficients(window.products.num_groups, experience.spec.num_columns)
    epistemic = aleatoric = 0.0
    if frame is not None:
        mean = totals.mean(dim=0)
        coefficients = frame.coefficients(mean)
        area = frame.length.square()
        size = float(area @ mean.square().sum(dim=1))
        # the misses of different windows as if independent
        noise = torch.einsum("j,mjg->g", times.square(), answers.misses.double()) / len(totals)
        parts = split_uncertainty(totals, answers.members, noise, area)
        expected = max(size + sum(parts), 1e-300)
        epistemic, aleatoric = (math.sqrt(part / expected) for part in parts)
    trajectory = _trajectory(experience, answers, horizon)
    spread = float(_at(answers.changes, m).std(correction=0)) if len(answers.changes) > 1 else 0.0
    half = 1.96 * math.sqrt(spread**2 + experience.loss_error * max(m, 1e-3))
    ends = [changed_loss(window.loss, float(_at(answers.changes, m).mean()) + sign * half) for sign in (-1, 1)]
    predicted = trajectory[-1][1]
    confidence = experience.explained * answers.survival / (1 + epistemic)
    return PhasePrediction(
        coefficients=torch.nan_to_num(coefficients),
        horizon=horizon,
        predicted_loss=predicted,
        loss_trajectory=trajectory,
        loss_interval=(min(ends), max(ends)),
        confidence=min(max(confidence, 0.0), 1.0),
        predicted_reduction=max(window.loss - predicted, 0.0) if math.isfinite(window.loss) else 0.0,
        epistemic=epistemic,
        aleatoric=aleatoric,
    )


def _at(changes: Tensor, m: float) -> Tensor:
    """(M, J) changes after 1 ... J windows -> (M,) after m, linear between and beyond."""
    points = torch.cat([torch.zeros_like(changes[:, :1]), changes], dim=1)
    low = min(int(m), MAX_AHEAD - 1)
    return points[:, low] + (m - low) * (points[:, low + 1] - points[:, low])


def _trajectory(experience: Experience, answers: Answers, horizon: int) -> tuple[tuple[int, float], ...]:
    window = experience.window
    assert window is not None
    steps = sorted({max(1, round(f * horizon)) for f in TRAJECTORY_POINTS})
    means = [float(_at(answers.changes, step / window.num_steps).mean()) for step in steps]
    return tuple((step, changed_loss(window.loss, mean)) for step, mean in zip(steps, means, strict=True))
