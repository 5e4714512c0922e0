"""The gate: judge a proposed jump by measured losses.  Pure functions over an evaluator.

Letters: ``a`` multiple of the proposal, ``x`` the origin, ``d`` the proposal; losses are L(x + a d).

Two cases.  If every batch is the same (full-batch training) losses are exact: candidates are
compared outright and the best one is lengthened while the loss falls.  Otherwise one half of the
batch chooses the length and the other half judges it, with a paired one-sided t test over chunks of
samples, because a length chosen and judged on the same noise always looks like a gain.

The comparison of measured and predicted reduction multiplies and never divides, as trust-region
methods do: near convergence the predicted reduction goes to zero (Conn, Gould & Toint, Trust-Region
Methods, 2000, section 6.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from ..numerics.quantiles import upper_bound
from ..records import Reason, Verdict

#: (candidate, scale a, part) -> losses of that part's chunks; weights are moved by the caller.
Part = Literal["length", "judge", "whole"]
Evaluate = Callable[[int, float, Part], Sequence[float]]


def parabola_minimum(scales: Sequence[float], losses: Sequence[float]) -> float:
    """Multiple at which the least-squares parabola through three or more points is lowest.

    Falls back on the best measured point where the parabola opens downwards.  The result never lies beyond the first
    measured multiple at which the loss rises, because the fit is not to be trusted there (critical sharpness, arXiv
    2601.16979).

    Args:
        scales: Multiples of the proposal, at least one, in any order.
        losses: As many, in units of the loss.
    """
    import numpy as np  # scalar path stays free of numpy

    order = sorted(range(len(scales)), key=lambda i: scales[i])
    a = [scales[i] for i in order]
    y = [losses[i] for i in order]
    best = a[min(range(len(a)), key=lambda i: y[i])]
    limit = a[-1]
    for i in range(1, len(a)):
        if y[i] > y[i - 1]:
            limit = a[i]
            break
    if len(a) < 3:
        return min(best, limit)
    curvature, linear, _ = np.polyfit(a, y, 2)
    if not curvature > 0:
        return min(best, limit)
    return float(min(max(-linear / (2 * curvature), 0.0), limit))


def agrees(measured: float, predicted: float, ratio: float) -> bool:
    """Whether the measured reduction reaches ``ratio`` of the predicted one."""
    return measured >= ratio * max(predicted, 0.0)


def judge_exact(
    evaluate: Evaluate, num_candidates: int, *, max_scale: float, known_before: float | None = None,
    way_back: int | None = None, predicted_reduction: float = 0.0, min_ratio: float = 0.0, first_fit: bool = False,
) -> Verdict:  # fmt: skip
    """Judge where every batch is the same and losses are exact.

    A line search: the best candidate is lengthened by doubling while the loss falls.  Any reduction is accepted,
    because the forwards are spent either way; the ledger decides whether to propose again.  Asking for their price here
    was measured to lose (LOG.md).

    Args:
        evaluate: Loss of a candidate at a multiple.
        num_candidates: Candidates, most careful first; the search stops at the first that is worse
            than the one before.
        max_scale: Longest multiple tried.
        known_before: Loss at the origin where it has been measured already; None: it is measured here.
        way_back: Candidate that leads to where ``known_before`` was measured: taken where nothing else lowers the
            loss and the base optimizer's last step raised it.
        predicted_reduction: Of the predictor's model.
        min_ratio: Least share of it that must be measured.
        first_fit: Take the first candidate that lowers the loss: where proposals come at every step, a
            forward spent on a better length is worth less than the next step.

    Returns:
        ``scale`` is a multiple of the candidate, losses are in units of the loss, ``num_forward`` in forwards of the
        batch.  A loss that is not finite counts as infinite.
    """
    forwards = 0.0

    def loss_at(candidate: int, scale: float) -> float:
        nonlocal forwards
        forwards += 1
        value = sum(evaluate(candidate, scale, "whole"))
        return value if math.isfinite(value) else math.inf

    before = loss_at(0, 0.0) if known_before is None else known_before
    if not math.isfinite(before):
        return Verdict(accepted=False, reason=Reason.LOSS_NOT_FINITE, loss_before=before, num_forward=forwards)
    best_loss, best = before, None
    for candidate in range(num_candidates):
        loss = loss_at(candidate, 1.0)
        if loss < best_loss:
            best_loss, best = loss, (candidate, 1.0)
            if first_fit:
                break
        elif best is not None:
            break
    if best is None and way_back is not None:
        here = loss_at(0, 0.0)
        if here > before:
            return Verdict(
                accepted=True, reason=Reason.WAY_BACK, scale=1.0, candidate=way_back, loss_before=here,
                loss_after=before, upper_bound=before - here, num_forward=forwards,
            )  # fmt: skip
    if best is None:
        return Verdict(
            accepted=False, reason=Reason.NO_DESCENT, loss_before=before, loss_after=best_loss, num_forward=forwards
        )
    candidate, scale = best
    while scale < max_scale:
        loss = loss_at(candidate, min(2 * scale, max_scale))
        if loss >= best_loss:
            break
        best_loss, scale = loss, min(2 * scale, max_scale)
    gain = before - best_loss
    reason = Reason.ACCEPTED if agrees(gain, predicted_reduction, min_ratio) else Reason.MODEL_DISAGREES
    return Verdict(
        accepted=reason is Reason.ACCEPTED, reason=reason, scale=scale, candidate=candidate, loss_before=before,
        loss_after=best_loss, upper_bound=-gain, num_forward=forwards,
    )  # fmt: skip


def beyond_noise(verdict: Verdict, noise: float) -> Verdict:
    """The verdict on exact losses, refused where the gain is within what two evaluations of one point differ by.

    Args:
        verdict: Of :func:`judge_exact`.
        noise: Largest difference of two evaluations at the same weights, 0 where they agree bit for bit.
    """
    if not verdict.accepted or noise == 0 or verdict.gain > noise:
        return verdict
    return replace(verdict, accepted=False, reason=Reason.NOT_SIGNIFICANT, price=noise)


def judge_noisy(
    evaluate: Evaluate, *, max_scale: float, level: float, price: Callable[[float], float], split: bool,
    predicted_reduction: float = 0.0, min_ratio: float = 0.0,
) -> Verdict:  # fmt: skip
    """Judge on one minibatch: length on one half, paired test on the other.

    Args:
        evaluate: Losses of a part's chunks; part ``length`` and ``judge`` are halves of the batch.
        max_scale: Longest multiple tried.
        level: One-sided significance level.
        price: Forwards spent -> loss that this many forwards of real training would have bought.
        split: Whether the batch could be split; if not, both parts are the whole batch.
        predicted_reduction: Of the predictor's model.
        min_ratio: Least share of it that must be measured.

    Returns:
        ``upper_bound`` is the upper end of the one-sided interval of the mean loss difference; the jump is accepted
        where it lies below minus ``price`` (both in units of the loss).  ``num_forward`` counts halves as halves.
    """
    share = 0.5 if split else 1.0
    scales = [0.0, 1.0]
    losses = [_mean(evaluate(0, a, "length")) for a in scales]
    forwards = 2 * share
    if not math.isfinite(losses[0]):
        return Verdict(accepted=False, reason=Reason.LOSS_NOT_FINITE, loss_before=losses[0], num_forward=forwards)
    # The third length depends on the first two: 2 if the loss fell at 1, else 1/2.  A proposal that is worse at both
    # is refused after 1.5 forwards; a full test takes 2.5.
    further = 2.0 if losses[1] < losses[0] and max_scale >= 2.0 else 0.5
    scales.append(further)
    losses.append(_mean(evaluate(0, further, "length")))
    forwards += share
    scale = parabola_minimum(scales, [y if math.isfinite(y) else losses[0] + 1e3 * abs(losses[0]) for y in losses])
    if scale <= 0.05 or not min(losses[1:]) < losses[0]:
        return Verdict(
            accepted=False, reason=Reason.NO_DESCENT, loss_before=losses[0], loss_after=min(losses[1:]),
            num_forward=forwards,
        )  # fmt: skip
    before = evaluate(0, 0.0, "judge")
    after = evaluate(0, scale, "judge")
    forwards += 2 * share
    mean_before, mean_after = _mean(before), _mean(after)
    if not (math.isfinite(mean_before) and math.isfinite(mean_after)):
        return Verdict(
            accepted=False, reason=Reason.LOSS_NOT_FINITE, loss_before=mean_before, loss_after=mean_after,
            num_forward=forwards,
        )  # fmt: skip
    cost = price(forwards)
    bound = upper_bound([b - a for a, b in zip(before, after, strict=True)], level)
    reason = Reason.ACCEPTED
    if not bound < -cost:
        reason = Reason.NOT_SIGNIFICANT
    elif not agrees(mean_before - mean_after, predicted_reduction * scale, min_ratio):
        reason = Reason.MODEL_DISAGREES
    return Verdict(
        accepted=reason is Reason.ACCEPTED, reason=reason, scale=scale, loss_before=mean_before,
        loss_after=mean_after, upper_bound=bound, price=cost, num_forward=forwards,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
