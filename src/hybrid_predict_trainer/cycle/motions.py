"""Learned multiplier and lookahead around the optimizer's own step, and the end of both.

What raises in them (no memory for a copy of the weights, say) ends no run: the step is the optimizer's own then, and
after three times it is so for the rest of the run.
"""

from __future__ import annotations

from ..keep.failures import Place
from .state import Run


def before_optimizer(run: Run) -> int:
    """Between backward and the optimizer's step; returns passes over the weights."""
    if run.failures.exhausted(Place.MOTION):
        return 0
    try:
        passes = run.scale.measure(run.parameters) + run.scale.before_step(run.parameters)
        if not run.deterministic and not run.switchback.switched_off:
            passes += run.lookahead.before_step(run.parameters)
        return passes
    except Exception as error:
        note_motion_failure(run, error)
        return 0


def after_optimizer(run: Run, rate: float) -> int:
    """After the optimizer's step; returns passes over the weights."""
    if run.failures.exhausted(Place.MOTION):
        return 0
    try:
        return run.scale.after_step(run.parameters) + look_ahead(run, rate)
    except Exception as error:
        note_motion_failure(run, error)
        return 0


def look_ahead(run: Run, rate: float) -> int:
    """Replace part of what was computed by the drift, and move on along it; returns passes over the weights.

    Where losses are exact the gate finds longer jumps than this at once.  A rate that still rises has no drift worth
    going on with, and one that the learned scale is making up for, because it is far too small, no swing to take
    out.  Without the drift kappa shortens all steps, which is not what a scale lengthened them for.
    """
    if run.switchback.switched_off or (run.deterministic and run.lookahead.num_steps <= 1):
        run.lookahead.forget()  # of the first batch nobody could tell that all are the same
        return 0
    rising, peak = rate > run.schedule.peak, max(rate, run.schedule.peak)
    lengthened = run.scale.growing if run.config.drift > 0 else run.scale.value > 1
    pull = 0.0 if lengthened or run.deterministic else 1.0
    strength = 0.0 if rising or run.deterministic or peak <= 0 else rate / peak
    if pull > 0 or strength > 0:
        run.switchback.note_motion()
    if not run.switchback.moving or run.guard.comparing or not run.schedule.anneals:
        pull = strength = 0.0
    passes = run.lookahead.after_step(
        run.parameters, rate * run.scale.value, pull=pull, strength=strength, along=run.scale.held,
        movable=run.trained.movable,
    )  # fmt: skip
    run.schedule.note_peak(rate)  # not before: an interrupted application is done again with the same numbers
    return passes


def note_motion_failure(run: Run, error: Exception) -> None:
    """Multiplier or lookahead failed: both begin anew, the multiplier at 1, and end if that happens again and again."""
    run.failures.note(Place.MOTION, error)
    run.scale.forget()
    run.scale.level()
    run.lookahead.forget()
    run.switchback.note_jump()
    run.raise_point = run.safe_point = None  # one of them may be what could not be copied
    run.guard.forget_anchor()
    if run.failures.exhausted(Place.MOTION):
        end_steering(run)


def end_steering(run: Run) -> None:
    """No multiplier, no cuts and no lookahead from here on."""
    run.scale.withdraw(for_good=True)
    run.scale.end_cuts()
    run.lookahead.forget()
    run.switchback.switched_off = True


def end_motions(run: Run) -> None:
    """Nothing but the optimizer moves the weights from here on."""
    end_steering(run)
    run.ledger.switched_off = True
    run.raise_point = run.safe_point = None
