"""New trials by the forecast itself (``--sampler joint``): the best of a pool of random ones.

Optuna's samplers learn from ends alone.  ``sweeps.joint`` foretells the end of a trial that nobody has begun from all
that every trial has shown, so that it may say which of many to begin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...forecast.schedules import planned_rates
from ...records import ConfigError
from ...sweeps.curves import TrialCurve
from ...sweeps.joint import ends_jointly
from ..arms.options import InputError
from ..run_arm import Experiment
from .plan import Plan, schedule_of
from .space import RATE_NAMES

#: Trials that are foretold for each one that is begun.
POOL = 64


def proposed(
    plan: Plan, setup: Experiment, tried: Sequence[Mapping[str, Any]], curves: Sequence[TrialCurve], seed: int
) -> dict[str, Any] | None:
    """Values of the trial in a random pool that is foretold to end best.

    Args:
        plan: Of the search.
        setup: What every trial needs.
        tried: Values of all trials so far; none of them is proposed again.
        curves: Of those that are learnt from.
        seed: Of the pool.

    Returns:
        Name -> value; None where nothing has been shown yet, or the pool holds nothing new.
    """
    pool = [params for params in _drawn(plan, seed) if params not in [dict(t) for t in tried]]
    fresh: list[TrialCurve] = []
    kept: list[dict[str, Any]] = []
    for params in pool:
        try:
            schedule, steps = schedule_of(setup, plan, params)
            rates = planned_rates(schedule, steps) * float(params.get("lr", setup.recipe.lr))
            fresh.append(TrialCurve.of(-1, [], rates, params=params))
        except (InputError, ConfigError, ValueError):
            continue  # settings that do not go together
        kept.append(params)
    if not kept:
        return None
    ends = ends_jointly([*curves, *fresh], rate_names=RATE_NAMES)[len(curves) :]
    best = min(range(len(kept)), key=lambda i: ends[i].mean if math.isfinite(ends[i].mean) else math.inf)
    return kept[best] if math.isfinite(ends[best].mean) else None


def _drawn(plan: Plan, seed: int) -> list[dict[str, Any]]:
    """A random pool, each of it once."""
    import optuna

    sampler = optuna.samplers.RandomSampler(seed=seed)
    study = optuna.create_study()  # of its own: a random sampler reads neither study nor trial
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    found: list[dict[str, Any]] = []
    for _ in range(POOL):
        params = {
            name: sampler.sample_independent(study, trial, name, distribution)
            for name, distribution in plan.space.items()
        }
        if params not in found:
            found.append(params)
    return found
