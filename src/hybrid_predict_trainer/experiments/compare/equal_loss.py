"""The main figure: how much cheaper the hybrid run reaches its loss than the best plain run.

``S = cost of the cheapest plain run that reaches the hybrid run's final loss / cost of the hybrid run``

The plain runs of one seed have different budgets, each with a schedule that decays at its own end, so a
point of another run's curve never counts.  Between two budgets the cost is interpolated on the line
through log(cost) and log(loss), because losses fall like powers of the cost; where a loss is not
positive, on log(cost) and loss.  Beyond the budgets nothing is extrapolated: S is then a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..statistics import bounded_interval

Kind = Literal["exact", "at least", "at most", "unknown"]


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run ended."""

    cost: float
    loss: float

    @property
    def usable(self) -> bool:
        """Whether both are numbers one can compare."""
        return math.isfinite(self.loss) and math.isfinite(self.cost) and self.cost > 0


@dataclass(frozen=True, slots=True)
class SeedSpeedup:
    """S of one seed; ``value`` is a bound unless ``kind`` is exact, and NaN where it is unknown."""

    value: float
    kind: Kind
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """S over seeds: geometric mean and 95 % intervals, None where they cannot be known.

    ``ci95`` is the t interval of the logarithms, with None for an open end; ``ci95_bootstrap_t`` stands beside it.
    """

    value: float | None
    ci95: tuple[float | None, float | None] | None
    ci95_bootstrap_t: tuple[float, float] | None = None
    kind: Kind
    reason: str
    per_seed: tuple[SeedSpeedup, ...]


def seed_speedup(hybrid: Point, plain: Sequence[Point]) -> SeedSpeedup:
    """S of one seed.

    Args:
        hybrid: End of the hybrid run.
        plain: Ends of the plain runs, one per budget, in any order.
    """
    if not hybrid.usable:
        return SeedSpeedup(math.nan, "unknown", "the hybrid run's loss is not finite")
    budgets = sorted((p for p in plain if p.usable), key=lambda p: p.cost)
    if not budgets:
        return SeedSpeedup(math.nan, "unknown", "no plain run has a finite loss")
    reached = next((i for i, p in enumerate(budgets) if p.loss <= hybrid.loss), None)
    if reached is None:
        value = budgets[-1].cost / hybrid.cost
        return SeedSpeedup(value, "at least", "no plain budget reached the hybrid run's loss")
    if reached == 0 and budgets[0].loss < hybrid.loss:
        value = budgets[0].cost / hybrid.cost
        return SeedSpeedup(value, "at most", "the smallest plain budget is already better than the hybrid run")
    if reached == 0:
        return SeedSpeedup(budgets[0].cost / hybrid.cost, "exact")
    # The best of the cheaper runs stands at its own cost; a dearer one that is worse than it has no say.
    below = min(budgets[:reached], key=lambda p: (p.loss, p.cost))
    return SeedSpeedup(cost_at(hybrid.loss, below, budgets[reached]) / hybrid.cost, "exact")


def cost_at(loss: float, cheaper: Point, dearer: Point) -> float:
    """Cost at which the line through two budgets reaches a loss with ``dearer.loss <= loss < cheaper.loss``."""
    assert dearer.loss <= loss < cheaper.loss
    scale = math.log if dearer.loss > 0 else float
    share = (scale(cheaper.loss) - scale(loss)) / (scale(cheaper.loss) - scale(dearer.loss))
    return math.exp(math.log(cheaper.cost) + share * (math.log(dearer.cost) - math.log(cheaper.cost)))


def over_seeds(per_seed: Sequence[SeedSpeedup]) -> Speedup:
    """Geometric mean over seeds; seeds whose S is only bounded count at the bound, which the reason says."""
    seeds = tuple(per_seed)
    unknown = [s for s in seeds if s.kind == "unknown"]
    if unknown or not seeds:
        reason = unknown[0].reason if unknown else "no seed was run"
        some = f" on {len(unknown)} of {len(seeds)} seeds" if len(seeds) > 1 else ""
        return Speedup(value=None, ci95=None, kind="unknown", reason=f"{reason}{some}", per_seed=seeds)
    kind, reason = _bound_words(seeds)
    values = [s.value for s in seeds]
    found = bounded_interval(values, [s.kind for s in seeds if s.kind != "unknown"])
    return Speedup(
        value=found.mean, ci95=found.ends, ci95_bootstrap_t=found.bootstrap_t, kind=kind,
        reason="; ".join(filter(None, (reason, found.note))), per_seed=seeds,
    )  # fmt: skip


def _bound_words(seeds: Sequence[SeedSpeedup]) -> tuple[Kind, str]:
    low = sum(s.kind == "at least" for s in seeds)
    high = sum(s.kind == "at most" for s in seeds)
    parts = []
    if low:
        parts.append(f"at least: no plain budget reached the hybrid run's loss on {low} of {len(seeds)} seeds")
    if high:
        parts.append(f"at most: the smallest plain budget beat the hybrid run on {high} of {len(seeds)} seeds")
    if parts:
        parts.append("those seeds are counted at the bound")
    kind: Kind = "unknown" if low and high else "at least" if low else "at most" if high else "exact"
    return kind, "; ".join(parts)
