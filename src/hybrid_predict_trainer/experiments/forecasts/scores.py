"""Scores of the forecast: every family of runs foretold with a prior learnt on the other families only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ...forecast.curve import Array, Curve
from ...forecast.final_loss import FINAL_SHARE, Forecast, forecast
from ...forecast.fit import Fit, fit
from ...forecast.prior import WIDE, Prior, learnt
from ...sweeps.finished import Among, Finished
from .published import FITTED, Run

#: How far the law is off where all whole curves of a model are fitted together.
CLOSE = 5e-4
#: Shares of a run that are known when the rest is forecast.
SHARES = (0.25, 0.5, 0.75)
LEVEL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One forecast beside the truth; errors are relative, with their sign."""

    run: str
    family: str
    share: float
    truth: float
    error: float
    low: float
    high: float
    deviations: float  # of ln(truth) from the forecast, in the forecast's own standard deviations
    last_value: float
    power_law: float | None
    log_line: float | None

    @property
    def covered(self) -> bool:
        """Whether the interval holds the truth."""
        return self.low <= self.truth <= self.high


def groups_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by group, in their order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    return found


def shape_of(runs: Sequence[Run], prior: Prior = WIDE) -> Fit:
    """One law for all whole curves of a model."""
    return fit([(run.curve, run.plan) for run in runs], prior, discrepancy=CLOSE)


def shapes_of(runs: Sequence[Run]) -> dict[tuple[str, str], Array]:
    """(family, group) -> parameters of the law of its whole curves."""
    return {
        (members[0].family, name): shape_of(members).shape for name, members in groups_of(runs).items()
    }  # fmt: skip


def leave_family_out(
    runs: Sequence[Run], shares: Sequence[float] = SHARES, widening: float = 1.0, counts: float = 1.0
) -> list[Score]:
    """Forecast every run at every share with a prior from the whole curves of all other families.

    Args:
        runs: Of several families.
        shares: Of each that are known.
        widening: Of the prior.
        counts: Of a step of the runs that are foretold, and not of those that the prior comes from.
    """
    shapes = shapes_of(runs)
    found = []
    for family in sorted({run.family for run in runs}):
        prior = learnt("others", [s for (other, _), s in shapes.items() if other != family], widening=widening)
        told = [counted(run, counts) for run in runs if run.family == family]
        found += [score(run, share, prior) for run in told for share in shares]
    return found


def counted(run: Run, counts: float) -> Run:
    """The same run with so many counts a step."""
    if counts == 1.0:
        return run
    total = round(counts * len(run.rates))
    rates = np.interp(np.arange(1, total + 1) / counts, np.arange(1, len(run.rates) + 1), run.rates)
    return replace(run, curve=replace(run.curve, steps=counts * run.curve.steps), rates=rates)


def with_prior(runs: Sequence[Run], prior: Prior, shares: Sequence[float] = SHARES) -> list[Score]:
    """Forecast every run at every share with one prior, which comes from elsewhere."""
    return [score(run, share, prior) for run in runs for share in shares]


def among_others(
    runs: Sequence[Run],
    shares: Sequence[float] = SHARES,
    without: Callable[[Run, Run], bool] = lambda run, other: False,
) -> list[Score]:
    """Forecast every run at every share from the whole runs of all other families; intervals as they are stated.

    Args:
        runs: Of several families.
        shares: Of each that are known.
        without: (the run, another) -> whether the other is not learnt from.
    """
    found = []
    learnt_from: dict[tuple[str, ...], Among] = {}
    for run in runs:
        others = [r for r in runs if r.family != run.family and not without(run, r)]
        key = tuple(r.name for r in others)
        if key not in learnt_from:
            learnt_from[key] = Among(
                [Finished(steps=r.curve.steps, losses=r.curve.losses, rates=r.rates, model=r.family, size=r.size)
                 for r in others], level=LEVEL,
            )  # fmt: skip
        for share in shares:
            known = _known(run, share)
            said = learnt_from[key].forecast(known.steps, known.losses, run.rates, model=run.family, size=run.size)
            found.append(_held_against(run, share, said))
    return found


def score(run: Run, share: float, prior: Prior) -> Score:
    """One forecast by the law."""
    known = _known(run, share)
    said = forecast(known.steps, known.losses, run.rates, level=LEVEL, priors=[prior])
    return _held_against(run, share, said)


def _known(run: Run, share: float) -> Curve:
    first = float(run.curve.steps[0])
    return run.curve.until(first + share * (float(run.curve.steps[-1]) - first))


def noise_floor(runs: Sequence[Run]) -> float:
    """Median relative error that nobody can avoid: that of the final losses themselves, by their rows' scatter.

    The median absolute value of a normal variable is 0.6745 standard deviations.
    """
    last = [max(1, round(FINAL_SHARE * len(run.curve.losses))) for run in runs]
    return float(np.median([0.6745 * run.curve.noise / np.sqrt(n) for run, n in zip(runs, last, strict=True)]))


def _held_against(run: Run, share: float, said: Forecast) -> Score:
    truth = run.ends_at()
    deviation = np.log(said.high / said.low) / (2 * NormalDist().inv_cdf((1 + LEVEL) / 2))
    middle = np.sqrt(said.high * said.low)
    return Score(
        run=run.name, family=run.family, share=share, truth=truth, error=said.final_loss / truth - 1, low=said.low,
        high=said.high, deviations=float(np.log(truth / middle) / deviation), last_value=said.last_value / truth - 1,
        power_law=None if said.power_law is None else said.power_law / truth - 1,
        log_line=None if said.log_line is None else said.log_line / truth - 1,
    )  # fmt: skip


def widening_of(scores: Sequence[Score]) -> float:
    """Factor of the standard deviation at which the intervals hold :data:`LEVEL` of these scores.

    The quantile has the finite-sample correction of split conformal prediction, (n + 1) level / n.
    """
    sizes = np.abs([s.deviations for s in scores])
    rank = min(1.0, LEVEL * (len(sizes) + 1) / len(sizes))
    return float(np.quantile(sizes, rank, method="higher") / NormalDist().inv_cdf((1 + LEVEL) / 2))


def calibrated(scores: Sequence[Score]) -> list[Score]:
    """The scores with intervals widened by what the other families' scores ask for."""
    factor = {f: widening_of([s for s in scores if s.family != f]) for f in {s.family for s in scores}}
    found = []
    for s in scores:
        middle, half = np.sqrt(s.low * s.high), np.sqrt(s.high / s.low)
        wide = half ** factor[s.family]
        found.append(replace(s, low=float(middle / wide), high=float(middle * wide)))
    return found


def whole_curves(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each size: the law fitted to three whole curves, and its mean relative error over every other curve."""
    found = []
    groups = groups_of(runs)
    shapes = {name: shape_of(members).shape for name, members in groups.items()}
    for name, members in groups.items():
        three = [run for run in members if run.name in FITTED]
        for label, prior in (
            ("wide prior", WIDE), ("prior of the other size", learnt("o", [s for n, s in shapes.items() if n != name]))
        ):  # fmt: skip
            law = shape_of(three, prior)
            errors = {run.name: mean_error(law, run) for run in members if run not in three}
            found.append({"group": name, "prior": label, "mean": float(np.mean(list(errors.values()))), "runs": errors})
    return found


def mean_error(law: Fit, run: Run) -> float:
    """Mean of |L_law / L - 1| over all rows of a run from where the law begins."""
    part = run.curve.since(run.plan.first)
    told: Array = law.losses(run.plan, part.steps)
    return float(np.mean(np.abs(told / part.losses - 1)))


def summary(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """By share: median and largest errors, coverage, and the simple forecasts beside them."""
    found = []
    for share in sorted({s.share for s in scores}):
        these = [s for s in scores if s.share == share]
        size = np.abs([s.error for s in these])
        simple = {
            name: [abs(e) for s in these if (e := getattr(s, name)) is not None]
            for name in ("last_value", "power_law", "log_line")
        }
        found.append({
            "share": share, "n": len(these), "median": float(np.median(size)), "largest": float(size.max()),
            "covered": float(np.mean([s.covered for s in these])),
            **{name: float(np.median(errors)) if errors else None for name, errors in simple.items()},
        })  # fmt: skip
    return found
