"""What an alarm makes of a run: shorter horizons, forced full steps, a smaller learning rate."""

from __future__ import annotations

from ..records import Action, Alarm, Level
from .state import State
from .withdrawal import follow_advice

#: Critical steps in a row after which the same learning rate is not tried again.
RETRY_AFTER = 5


def rate_is_lowered(run: State) -> bool:
    """Whether the critical step just taken is one after which the same rate is not tried again."""
    critical = run.monitor.num_consecutive_critical
    return critical > 0 and critical % RETRY_AFTER == 0


def respond(run: State, alarm: Alarm) -> None:
    """Apply what an alarm asks for."""
    settings = run.config.divergence
    if alarm.level is Level.CRITICAL and run.optimizer_step.scale.learned > 1 and run.judge.probation is None:
        follow_advice(run, run.optimizer_step.scale.withdraw())
    if alarm.level is Level.CRITICAL and rate_is_lowered(run):
        run.schedule.lower(settings.retry_learning_rate_factor)
    if alarm.action is not Action.REDUCE_HORIZON:
        run.judge.on_level(alarm.level)
    if alarm.action is Action.REDUCE_HORIZON:
        run.proposer.halve_horizon()
    elif run.judged_exactly and alarm.level < Level.CRITICAL:
        pass  # the gate measures every jump exactly, whatever the base optimizer does in between
    elif alarm.action in (Action.FORCE_FULL, Action.SKIP_STEP, Action.ROLLBACK, Action.CORRECT):
        run.phases.force_full(settings.recovery_full_steps or 2 * run.config.full_steps, by_alarm=True)
