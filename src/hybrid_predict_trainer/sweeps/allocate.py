"""Which trial of a search trains next, and how far: freeze and thaw (Swersky, Snoek & Adams, arXiv 1406.3896).

Every trial trains to its first look.  Then whichever is expected to end best goes on to its next one, and trials that
cannot win stop, until one is complete that no other can beat.  A trial that waits costs nothing.  Who goes on is a
matter of `joint`, which knows most of how ends differ; a trial stops where neither it nor `ends` says that it can win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .curves import LOOKS, TrialCurve
from .decide import bar_of, cannot_win, most_promising
from .ends import End, Model, ends_of
from .joint import ends_jointly

#: A trial that is expected to end above this share of all waits for a new one.
NEW_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Slice:
    """What to train next.

    Attributes:
        index: of the trial.
        until: step.
    """

    index: int
    until: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Of a search.

    Attributes:
        error: that one look may make (``looks.spent_at_a_look``).
        min_gain: by which the best has to be beaten, on the scale of the values.
        rate_names: parameters about rate and schedule only.
        quantile: of the end that decides who goes on; 0.5 is what is expected.
        model: of the forecast's errors.
    """

    error: float
    min_gain: float = 0.0
    rate_names: tuple[str, ...] = ()
    quantile: float = 0.5
    model: Model = field(default_factory=Model)


def first_look(curve: TrialCurve) -> int:
    """Index of the first look that is after a trial's warm-up, so that two reports can come before it."""
    for k, look in enumerate(LOOKS[:-1]):
        if look * curve.total_steps >= max(1.2 * curve.first, 2.0):
            return k
    return len(LOOKS) - 1


def next_stop(curve: TrialCurve) -> int:
    """The step at which a trial is looked at next."""
    k = max(curve.stands, default=-1) + 1
    k = max(k, first_look(curve))
    while k < len(LOOKS) - 1 and LOOKS[k] * curve.total_steps <= curve.last_step:
        k += 1
    return curve.total_steps if LOOKS[k] >= 1 else -(-round(LOOKS[k] * curve.total_steps * 1000) // 1000)


def stopped(curves: Sequence[TrialCurve], ends: Sequence[End], alive: Sequence[bool], rules: Rules) -> list[int]:
    """Indices of living trials that cannot win."""
    competing = [a or c.complete for a, c in zip(alive, curves, strict=True)]
    bar = bar_of(curves, ends, rules.error, competing)
    return [
        i
        for i, (curve, end) in enumerate(zip(curves, ends, strict=True))
        if alive[i] and not curve.complete and cannot_win(curve, end, bar, rules.error, rules.min_gain)
    ]


def next_slice(
    curves: Sequence[TrialCurve], alive: Sequence[bool], rules: Rules, busy: Sequence[int] = (),
    new: Sequence[int] = (), only: Sequence[int] = (),
) -> tuple[Slice | None, list[int], list[End]]:  # fmt: skip
    """What to train next.

    Args:
        curves: Of all trials.
        alive: Whether each may still go on; complete ones may not.
        rules: Of the search.
        busy: Indices of those that another worker trains now.
        new: Indices of those that nobody has begun: they go by their forecasts, others without a report go first.
        only: Indices of those that may go on, busy ones among them; empty: all that are not busy.

    Returns:
        The slice (None: nothing is left to do, or all that is left is busy), the trials to stop, and all ends.
    """
    ends = ends_jointly(curves, rate_names=rules.rate_names)
    stop = stopped(curves, ends, alive, rules)
    if stop:
        alone = ends_of(curves, model=rules.model, rate_names=rules.rate_names, asked=stop)
        stop = sorted({*stop} & {*stopped(curves, alone, alive, rules)})
    left = only if only else [i for i in range(len(curves)) if i not in busy]
    going = [i for i in left if alive[i] and i not in stop and not curves[i].complete]
    if not going:
        return None, stop, ends
    chosen = most_promising(curves, ends, going, rules.quantile, new)
    return Slice(chosen, next_stop(curves[chosen])), stop, ends


def kept_for(curves: Sequence[TrialCurve], alive: Sequence[bool], left: float, steps: int) -> list[int]:
    """Indices of the trials that the rest of a budget is kept for, so that one of them comes to its end.

    A budget that is spent on many beginnings ends without any result.  As long as no trial is complete, what the
    cheapest end costs is therefore kept back, beside one slice of every trial that another worker may be training and
    the first slice of a new one.

    Args:
        curves: Of the search.
        alive: Whether each may still go on.
        left: Of the budget, in runs of ``steps``.
        steps: Of a run.

    Returns:
        Those that the rest can complete; nothing where there is enough, where there is a complete trial, or where the
        rest completes none.
    """
    going = [curve for curve, a in zip(curves, alive, strict=True) if a]
    if not going or any(curve.complete for curve in curves):
        return []
    rest = {i: (c.total_steps - c.last_step) / steps for i, c in enumerate(curves) if alive[i]}
    fit = [i for i, cost in rest.items() if cost <= left + 1e-9]
    slices = sum((next_stop(c) - c.last_step) / steps for c in going)
    first = max(LOOKS[first_look(c)] * c.total_steps / steps for c in going)
    return fit if fit and left < min(rest[i] for i in fit) + slices + first else []


def wants_new(ends: Sequence[End], chosen: int | None) -> bool:
    """Whether a trial that nobody has begun yet promises more than the one that would go on.

    A new trial may end as any of those that are known: it goes before one that is expected to end above the best
    quarter of them.

    Args:
        ends: Of all trials.
        chosen: The trial that would go on; None: there is none.
    """
    if chosen is None:
        return True
    known = sorted(end.mean for end in ends if math.isfinite(end.scale))
    end = ends[chosen]
    if not math.isfinite(end.scale) or not known:
        return False  # nothing is known of it: it goes to its first look before others are begun
    return end.mean > known[math.ceil(len(known) * NEW_SHARE) - 1]
