"""From the runs of a case to its rows: S, gaps, shares, verdicts.  Pure functions, nothing is run here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...cost import STEP_UNITS
from ..compare.equal_loss import Kind, Point, Speedup, over_seeds, seed_speedup
from ..compare.run import ROUNDING, in_percent
from ..report import charts as svg
from ..run_arm import ArmRun
from ..statistics import METHOD, MIN_PAIRED, ends_words, paired_p
from .cache import TimedRun

INVERSE: dict[Kind, Kind] = {"at least": "at most", "at most": "at least", "exact": "exact", "unknown": "unknown"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRuns:
    """An arm of a case with its runs.

    Attributes:
        name: as in the tables.
        kind: as of its runs; ``"tuned"`` for plain runs at the tuned rate where the case has another.
        weights_only: whether it changes nothing but the weights between steps.
        trials: of its learning-rate sweep; 0: none of its own.
        runs: one per seed.
    """

    name: str
    kind: str
    weights_only: bool = False
    trials: int = 0
    runs: tuple[TimedRun, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds in order."""
        return tuple(sorted(m.run.seed for m in self.runs))

    def of(self, seed: int) -> ArmRun:
        """The run from a seed."""
        return next(m.run for m in self.runs if m.run.seed == seed)


def speedup(entry: ArmRuns, plain: Sequence[ArmRuns], cost: Callable[[ArmRun], float]) -> Speedup:
    """S of an arm against the plain budgets, seed by seed.

    Args:
        entry: The arm.
        plain: Plain arms of all budgets, at one rate.
        cost: Of a run: cost units or seconds.
    """

    def of_seed(seed: int) -> Any:
        run = entry.of(seed)
        points = [Point(cost(p.of(seed)), p.of(seed).final_val_loss) for p in plain if seed in p.seeds]
        return seed_speedup(Point(cost(run), run.final_val_loss), points)

    return over_seeds([of_seed(seed) for seed in entry.seeds])


def units(run: ArmRun) -> float:
    """Cost of a run in forwards, a pass over the weights at the price of the optimizer's own."""
    return run.fair_cost_units


def seconds(run: ArmRun) -> float:
    """Cost of a run by wall-clock, validation left out."""
    return run.wall_s


def cpu_seconds(run: ArmRun) -> float:
    """Cost of a run by processor time, validation left out."""
    return run.cpu_s


def summarize(case: str, entries: Sequence[ArmRuns]) -> list[dict[str, Any]]:
    """One row per arm of a case, in the order given.

    ``S``, gaps and tests are against the plain arms at the rate of the case; where that rate is a
    multiple of the tuned one, ``cost_vs_tuned`` is against the plain arms at the tuned rate.  ``S_over`` is against
    each base of the case: a stronger recipe that is run at all budgets, too.
    """
    plain = [e for e in entries if e.kind == "plain"]
    tuned = [e for e in entries if e.kind == "tuned"]
    base = next(e for e in plain if e.runs[0].run.arm.budget == 1.0)
    rows = [row(case, entry, base, plain, tuned) for entry in entries]
    bases = _bases(entries)
    for found, entry in zip(rows, entries, strict=True):
        if bases and entry.kind not in ("plain", "tuned"):
            found["S_over"] = {
                name: _figures(speedup(entry, runs, units), False) for name, runs in bases.items() if name != entry.name
            }
    return rows


def _bases(entries: Sequence[ArmRuns]) -> dict[str, list[ArmRuns]]:
    """Peers that were run at several budgets, by name."""
    found: dict[str, list[ArmRuns]] = {}
    for entry in entries:
        if entry.kind == "peer":
            found.setdefault(entry.name.partition("@")[0], []).append(entry)
    return {name: of for name, of in found.items() if len(of) > 1}


def row(case: str, entry: ArmRuns, base: ArmRuns, plain: Sequence[ArmRuns], tuned: Sequence[ArmRuns]) -> dict[str, Any]:
    """What the benchmark says of one arm; keys as in benchmarks/README.md."""
    runs = [m.run for m in entry.runs]
    is_baseline = entry.kind in ("plain", "tuned")
    by_cost, by_wall = speedup(entry, plain, units), speedup(entry, plain, seconds)
    by_cpu = speedup(entry, plain, cpu_seconds)
    losses = [entry.of(seed).final_val_loss for seed in entry.seeds]
    pairs = [(base.of(s).final_val_loss, entry.of(s).final_val_loss) for s in entry.seeds if s in base.seeds]
    gap = gap_pct(pairs)
    found: dict[str, Any] = {
        "case": case,
        "arm": entry.name,
        "kind_of_arm": entry.kind,
        "weights_only": entry.weights_only,
        "budget": runs[0].arm.budget,
        **_figures(by_cost, is_baseline),
        **_timed("S_wall", by_wall, is_baseline),
        **_timed("S_cpu", by_cpu, is_baseline),
        "final_loss": {"mean": _mean(losses), "std": _std(losses), "per_seed": losses},
        "cost_units": _mean([units(r) for r in runs]),
        "cost_units_counted": _mean([r.cost_units for r in runs]),
        "wall_s": _mean([r.wall_s for r in runs]),
        "cpu_s": _mean([r.cpu_s for r in runs]),
        **_error_of(runs),
        "gap_pct": gap if entry is not base else None,
        "backward_reduction": None if is_baseline else backward_reduction(by_cost, runs, [m.run for m in base.runs]),
        "prediction_share": prediction_share(entry),
        "lr": runs[0].arm.lr,
        "trials": entry.trials,
        "jumps": jumps(runs),
        "paired_p": paired_p(pairs) if entry is not base else None,
        "curve": mean_curve(runs),
        "errors": sorted({r.error for r in runs if r.error}),
    }
    if tuned:
        found |= cost_vs_tuned(speedup(entry, tuned, units))
    found["verdict"] = verdict(entry, by_cost, gap, num_jumps=found["jumps"]["accepted"] if found["jumps"] else None)
    return found


def _error_of(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """Median relative L2 error against the true solution, where there is one."""
    found = [r.solution_error for r in runs if not math.isnan(r.solution_error)]
    return {"solution_error": statistics.median(found)} if found else {}


def _figures(s: Speedup, is_baseline: bool) -> dict[str, Any]:
    """S over seeds; nothing for the plain arms, which S is measured against."""
    values = [seed.value for seed in s.per_seed]
    return {
        "S": None if is_baseline else s.value,
        "mean": None if is_baseline else s.value,
        "std": None if is_baseline else _std(values),
        "ci95": None if is_baseline else s.ci95,
        "ci95_bootstrap_t": None if is_baseline else s.ci95_bootstrap_t,
        "interval": METHOD,
        "n": len(values),
        "kind": None if is_baseline else s.kind,
        "reason": None if is_baseline else reason(s) or None,
        "per_seed": None if is_baseline else [{"value": p.value, "kind": p.kind} for p in s.per_seed],
    }


def _timed(name: str, s: Speedup, is_baseline: bool) -> dict[str, Any]:
    """S by a clock."""
    value, ends, kind = (None, None, None) if is_baseline else (s.value, s.ci95, s.kind)
    return {name: value, f"{name}_ci95": ends, f"{name}_kind": kind}


def reason(s: Speedup) -> str:
    """Why S is a bound or unknown; the equal-loss figure calls every arm that it judges hybrid."""
    return s.reason.replace("the hybrid run's", "this arm's").replace("the hybrid run", "this arm")


def gap_pct(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean over seeds of how much higher the second loss is than the first, in percent of the first."""
    return _mean([100 * (b - a) / abs(a) if a else math.nan for a, b in pairs])


def backward_reduction(s: Speedup, runs: Sequence[ArmRun], plain: Sequence[ArmRun]) -> float | None:
    """Share of the backward passes saved against the plain run of equal loss; below 0: more were made."""
    if s.value is None:
        return None
    backward, cost = (_mean([r.counts.get(k, math.nan) for r in runs]) for k in ("num_backward", "fair_cost_units"))
    per_unit = _mean([r.counts["num_backward"] for r in plain]) / _mean([units(r) for r in plain])
    needed = s.value * cost * per_unit
    return 1 - backward / needed if needed > 0 and math.isfinite(backward) else None


def prediction_share(entry: ArmRuns) -> dict[str, float | None] | None:
    """Shares of cost and of time that went into predicting: watching, learning, proposing, testing.

    Probation is real training and no part of it.  None for arms that do not predict.
    """
    if entry.kind not in ("hybrid", "jump-of-zero"):
        return None
    costs = [1 - STEP_UNITS * m.run.counts["num_backward"] / units(m.run) for m in entry.runs]
    times = [m.time_share for m in entry.runs if m.time_share is not None]
    return {"cost": _mean(costs), "time": _mean(times) if times else None}


def jumps(runs: Sequence[ArmRun]) -> dict[str, float] | None:
    """Mean number of jumps per run; None for arms that make none."""
    if runs[0].arm.kind not in ("hybrid", "jump-of-zero"):
        return None
    names = {"proposed": "num_jumps_proposed", "accepted": "num_jumps_accepted", "rolled_back": "num_rollbacks"}
    return {word: _mean([r.counts[key] for r in runs]) for word, key in names.items()}


def cost_vs_tuned(s: Speedup) -> dict[str, Any]:
    """The arm's cost over that of the cheapest plain run at the tuned rate that reaches its loss: 1 / S there."""
    ends = None if s.ci95 is None else tuple(None if end is None else 1 / end for end in reversed(s.ci95))
    return {
        "cost_vs_tuned": None if s.value is None else 1 / s.value,
        "cost_vs_tuned_ci95": ends,
        "cost_vs_tuned_kind": INVERSE[s.kind],
    }


def verdict(entry: ArmRuns, s: Speedup, gap: float, *, num_jumps: float | None) -> str:
    """What the figures say of an arm, in one line.

    Args:
        entry: The arm.
        s: Its equal-loss figure by cost.
        gap: Its loss against plain at equal cost, percent.
        num_jumps: Accepted ones per run; None: it makes none.
    """
    if entry.kind == "tuned":
        return "plain training at the tuned rate, for comparison"
    if entry.kind == "plain":
        return "the baseline"
    if s.value is None:
        return f"no verdict: {reason(s)}"
    bound = f"{s.kind} " if s.kind in ("at least", "at most") else ""
    words = f"S {bound}{s.value:.3g}"
    if math.isfinite(gap):
        side = "the same loss" if abs(gap) < 0.005 else f"loss {in_percent(gap)} {'lower' if gap < 0 else 'higher'}"
        words += f", {side} at equal cost"
    if num_jumps == 0:
        others = "" if entry.kind == "jump-of-zero" else "learned scale, lookahead and "  # which are off there
        return f"no jump was accepted: {others}the price of asking ({words})"
    count = len(s.per_seed)
    if s.ci95 is None and count == 1:
        return f"one seed only, which shows little ({words})"
    if s.ci95 is None:  # all at the bound
        side = {"at least": "ahead on", "at most": "behind on"}.get(s.kind if _one_side(s) else "", "bounded on")
        return f"{side} all {count} seeds, no interval is known ({words}, n = {count})"
    words += f"; 95 % {ends_words(s.ci95)}, n = {count}"
    few = count < MIN_PAIRED  # two seeds that agree by chance have an interval of no width
    low, high = s.ci95
    if low is not None and low > 1 + ROUNDING:
        return f"ahead on all {count} seeds, too few to be sure ({words})" if few else f"pays ({words})"
    if high is not None and high < 1 - ROUNDING:
        return f"behind on all {count} seeds, too few to be sure ({words})" if few else f"loses ({words})"
    return f"no difference shown ({words})"


def _one_side(s: Speedup) -> bool:
    """Whether the bounds of all seeds lie on the side of 1 that they bound away from."""
    if s.kind == "at least":
        return all(p.value > 1 + ROUNDING for p in s.per_seed)
    return all(p.value < 1 - ROUNDING for p in s.per_seed)


def best_weights_only(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The peer of the highest S among those that change nothing but the weights; None where none was run."""
    peers = [r for r in found if r["weights_only"] and r["S"] is not None]
    best = max(peers, key=lambda r: float(r["S"]), default=None)
    return None if best is None else {"arm": best["arm"], "S": best["S"]}


def mean_curve(runs: Sequence[ArmRun]) -> list[tuple[float, float]]:
    """Validation loss against cost, mean over seeds."""
    finite = [[p for p in r.curve if math.isfinite(p[1])] for r in runs]
    return list(svg.over_seeds(finite)[0])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
