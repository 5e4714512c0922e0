"""Learned multiplier and lookahead around the optimizer's own step, and the end of both.

What raises in them (no memory for a copy of the weights, say) ends no run: the step is the optimizer's own then, and
after three times it is so for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Callable

from ..keep.failures import Place
from .state import State


def before_optimizer(run: State) -> int:
    """Between backward and the optimizer's step; returns passes over the weights."""
    return _unless_it_raises(run, lambda: run.optimizer_step.before(exact=run.full_batch))


def after_optimizer(run: State, rate: float) -> int:
    """After the optimizer's step; returns passes over the weights."""
    resting = run.safety.guard.comparing
    return _unless_it_raises(run, lambda: run.optimizer_step.after(rate, exact=run.full_batch, resting=resting))


def _unless_it_raises(run: State, work: Callable[[], int]) -> int:
    try:
        return work()
    except Exception as error:
        on_motion_failure(run, error)
        return 0


def on_motion_failure(run: State, error: Exception) -> None:
    """Multiplier or lookahead failed: both begin anew, the multiplier at 1, and end if that happens again and again."""
    run.failures.note(Place.MOTION, error)
    run.optimizer_step.forget()
    run.safety.forget_weights()  # one of its copies may be what could not be made
    if run.failures.exhausted(Place.MOTION):
        run.optimizer_step.end_steering()


def end_motions(run: State) -> None:
    """Nothing but the optimizer moves the weights from here on."""
    run.optimizer_step.end_steering()
    run.judge.ledger.switch_off()
    run.safety.drop_points()
