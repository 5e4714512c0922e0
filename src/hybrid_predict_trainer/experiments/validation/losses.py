"""Experiment 2: can the loss of the last fifth of a run be told from the steps before?

At every origin in the last fifth each predictor tells the loss some steps ahead from what came before the origin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...forecast.curve import Array, Curve
from ...forecast.fit import fit
from ...forecast.law import Plan
from ...forecast.prior import PRIORS, shipped
from .criteria import Criterion

TRAINED = 0.8
HORIZONS = (1, 10, 25, 50, 100, 200)
NUM_ORIGINS = 12
#: Steps ahead that the first hypothesis is about.
NEAR = 50
EMA_DECAY, LINE_STEPS = 0.98, 100
#: (losses so far, rates of the whole run, steps ahead (h,)) -> losses (h,)
Predictor = Callable[[Array, Array, Array], Array]


def last_value(losses: Array, rates: Array, ahead: Array) -> Array:
    """The newest loss."""
    return np.full(len(ahead), losses[-1])


def moving_average(losses: Array, rates: Array, ahead: Array) -> Array:
    """An exponential average."""
    weights = EMA_DECAY ** np.arange(len(losses))[::-1]
    return np.full(len(ahead), float(losses @ weights / weights.sum()))


def straight_line(losses: Array, rates: Array, ahead: Array) -> Array:
    """A line through the last steps."""
    recent = losses[-LINE_STEPS:]
    slope, start = np.polyfit(np.arange(len(recent)), recent, 1)
    found: Array = start + slope * (len(recent) - 1 + ahead)
    return found


def law(losses: Array, rates: Array, ahead: Array) -> Array:
    """The parametric curve of ``forecast``: a power law of the summed rate with a term for its drops."""
    steps = np.arange(1.0, len(losses) + 1)
    plan = Plan.of(rates)
    return fit([(Curve.of(steps, losses), plan)], shipped(PRIORS[0])).losses(plan, len(losses) + ahead)


PREDICTORS: dict[str, Predictor] = {
    "law": law, "last value": last_value, "moving average": moving_average, "straight line": straight_line
}  # fmt: skip


def measure(losses: Array, rates: Array) -> dict[str, Any]:
    """Errors of every predictor.

    Args:
        losses: (T,) training losses by step.
        rates: (T,) learning rates.

    Returns:
        By predictor: mean absolute error over the range of the held-out losses, R2, and the error by horizon; the
        largest R2 that the noise of single losses allows.
    """
    total = len(losses)
    first = round(TRAINED * total)
    held = losses[first:]
    span = float(held.max() - held.min())
    origins = np.unique(np.linspace(first, total - 1, NUM_ORIGINS, endpoint=False).astype(np.intp))
    rows: dict[str, list[tuple[int, float, float]]] = {name: [] for name in PREDICTORS}
    for origin in origins:
        ahead = np.array([float(h) for h in HORIZONS if origin + h <= total])
        for name, predict in PREDICTORS.items():
            told = predict(losses[:origin], rates, ahead)
            rows[name] += [(int(h), float(v), float(losses[origin + int(h) - 1]))
                           for h, v in zip(ahead, told, strict=True)]  # fmt: skip
    noise = Curve.of(np.arange(1.0, total + 1), losses).noise * float(held.mean())
    variance = float(np.var([truth for _, _, truth in rows["law"]]))
    return {
        "predictors": {name: _errors(found, span) for name, found in rows.items()}, "span": span,
        "noise": noise, "r2_ceiling": 1 - noise**2 / variance if variance > 0 else None,
    }  # fmt: skip


def _errors(rows: list[tuple[int, float, float]], span: float) -> dict[str, Any]:
    told, truth = (np.array([row[k] for row in rows]) for k in (1, 2))
    horizons = sorted({h for h, _, _ in rows})
    by = {h: float(np.mean([abs(p - t) for at, p, t in rows if at == h])) for h in horizons}
    return {
        "mae_of_range": float(np.abs(told - truth).mean()) / span,
        "r2": 1 - float(((told - truth) ** 2).mean()) / float(np.var(truth)),
        "relative": float(np.mean(np.abs(told - truth) / truth)), "mae_by_horizon": by,
        "relative_near": float(np.mean([abs(p - t) / t for h, p, t in rows if h <= NEAR])),
    }  # fmt: skip


def criteria(found: Mapping[str, Any]) -> list[Criterion]:
    """The bars, each beside the moving average, which knows of no dynamics."""
    ours, trivial = found["predictors"]["law"], found["predictors"]["moving average"]
    growth = [list(who["mae_by_horizon"].values()) for who in (ours, trivial)]
    name = "moving average"
    return [
        Criterion(name="mean absolute error over the range of held-out losses", value=ours["mae_of_range"], bar=0.05,
                  sense="below", control=trivial["mae_of_range"], control_name=name),
        Criterion(name="R2 on held-out losses", value=ours["r2"], bar=0.85, sense="above", control=trivial["r2"],
                  control_name=name),
        Criterion(name=f"relative error up to {NEAR} steps ahead", value=ours["relative_near"], bar=0.05, sense="below",
                  control=trivial["relative_near"], control_name=name),
        Criterion(name="relative error up to 200 steps ahead", value=ours["relative"], bar=0.05, sense="below",
                  control=trivial["relative"], control_name=name),
        Criterion(name="error at the longest over the shortest horizon", value=growth[0][-1] / growth[0][0], bar=3.0,
                  sense="below", control=growth[1][-1] / growth[1][0], control_name=name),
    ]  # fmt: skip


def decision(found: Mapping[str, Any]) -> str:
    """The protocol's stop rule after this experiment."""
    return by_fit(found["predictors"]["law"]["r2"])


def by_fit(r2: float) -> str:
    """On above 0.85, refine the model from 0.7, else stop."""
    return "continue" if r2 > 0.85 else "refine" if r2 >= 0.7 else "stop"
