"""The figures of a run: counts and estimates, JSON-able."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..keep.failures import Place
from .sinks import jsonable
from .summary import histogram

if TYPE_CHECKING:
    from ..cycle.state import State


def histograms(run: State) -> dict[str, Any]:
    """Counts and edges of the last losses (256) and gradient norms (64)."""
    bins = run.config.metrics.histogram_bins
    return {
        name: histogram(v, bins)
        for name, v in (("loss", run.losses.history.losses), ("gradient_norm", run.losses.history.norms))
    }


def statistics(run: State) -> dict[str, Any]:
    """Counts of a run, JSON-able."""
    c = run.meter
    return {
        "predictor": run.proposer.predictor.name, "exact_losses": run.full_batch,
        "num_steps": c.num_steps, "num_real_steps": c.num_real_steps, "num_skipped_steps": c.num_skipped_steps,
        "num_claimed_steps": c.num_claimed_steps, "num_credited_steps": run.judge.ledger.num_credited_steps,
        "num_forward": c.num_forward, "num_backward": c.num_backward,
        "num_jumps_proposed": c.num_jumps_proposed, "num_jumps_accepted": c.num_jumps_accepted,
        "num_controls": c.num_controls, "num_rollbacks": c.num_rollbacks,
        "num_predictor_failures": run.num_predictor_failures, **_failures(run),
        "regime": None if run.proposer.source is None else run.proposer.source.regime,
        "num_divergence_events": c.num_divergence_events,
        "num_outside_writes": c.num_outside_writes, "num_left_alone": run.watch.trained.num_left_alone,
        "hands_off": run.watch.hands_off,
        "learned_scale": run.optimizer_step.scale.learned, "num_raises_taken_back": run.optimizer_step.scale.taken_back,
        "num_guard_alarms": run.safety.guard.num_alarms, "num_guard_restores": run.safety.guard.num_restored,
        "num_guard_retries": run.safety.guard.num_retries, "learning_rate_factor": run.schedule.factor,
        "withdrawn": run.safety.guard.withdrawn, "num_early_cuts": run.optimizer_step.scale.num_cuts,
        "lookahead_effect": run.optimizer_step.switchback.effect,
        "lookahead_switched_off": run.optimizer_step.switchback.switched_off,
        "cost_units": c.cost_units, "fair_cost_units": c.fair_cost_units,
        "backward_reduction_pct": c.backward_reduction_pct,
        **_steps_gained(run),
    }  # fmt: skip


def _failures(run: State) -> dict[str, int]:
    return {f"num_{place}_failures": n for place, n in run.failures.counts.items() if place is not Place.PREDICTOR}


def _steps_gained(run: State) -> dict[str, Any]:
    try:
        return {k: jsonable(v) for k, v in run.judge.ledger.steps_gained().items()}
    except (ArithmeticError, ValueError) as error:  # losses at the edge of what floats hold
        return {"steps_gained": None, "steps_gained_ci95": None, "reason": f"not known: {error}"}
