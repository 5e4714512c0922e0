"""Steps that an interruption leaves whole: as they were before, or as they are after.

A ``KeyboardInterrupt``, or whatever a signal's handler raises, can arise between any two lines.  A step is in three
parts.  Before the weights move nothing need be done: what is half remembered of a step that never was is forgotten or
overwritten by the next one.  A proposal is undone: weights and books are put back.  A real step whose weights have
moved is carried to its end: it is counted, and where it was the last on probation the jump is kept or taken back.
Then the interruption is passed on.

What is undone or redone writes absolute values, so that it may be begun again where it was itself interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..keep.failures import Place
from ..keep.memento import Memento
from ..records import Decision, Execution, Phase, Reason, Verdict
from ..weights import algebra as weights
from .correct_step import conclude
from .loop import EXECUTORS
from .motions import look_ahead
from .real_step import count_real
from .state import Run


def books(run: Run) -> Memento:
    """What a run remembers of its jumps: counts, ledger, adaptation, probation, and the run's own numbers."""
    a = run.adaptation
    return Memento([
        run, run.meter, run.phases, run.ledger, run.monitor, run.switchback, run.probation, run.segment, a, a.record,
        a.confidence, a.bandit,
    ])  # fmt: skip


def execute(run: Run, batch: Any, decision: Decision) -> Execution:
    """One step of a phase, whole even if it is interrupted.

    Args:
        run: In the decided phase.
        batch: Of the step.
        decision: What the controller said.
    """
    if decision.phase is Phase.PREDICT:
        return _proposal(run, batch, decision)
    if decision.phase is Phase.CORRECT:
        return _on_probation(run, batch, decision)
    return _real(run, batch, decision, EXECUTORS[decision.phase])


def _proposal(run: Run, batch: Any, decision: Decision) -> Execution:
    """Undone if it is interrupted."""
    before, generator = books(run), run.generator.get_state()
    moved = Memento([run.basis, run.lookahead, run.scale])
    try:
        execution = EXECUTORS[Phase.PREDICT](run, batch, decision)
    except BaseException as error:
        if run.held:
            weights.copy_(run.parameters, run.held)
        before.restore()
        moved.restore()
        run.generator.set_state(generator)
        run.held = []
        if not isinstance(error, Exception):
            raise
        run.failures.note(Place.GATE, error)  # in the books, after the judgement: a refusal like any other
        execution = Execution(torch.tensor(math.nan, device="cpu"), consumed=False)
        execution.verdict = Verdict(accepted=False, reason=Reason.CANNOT_EVALUATE)
    run.held = []
    run.step_scheduler()
    return execution


def _real(run: Run, batch: Any, decision: Decision, executor: Callable[[Run, Any, Decision], Execution]) -> Execution:
    """Carried to its end and counted if its weights have moved."""
    versions, num_attempted = _versions(run.parameters), run.meter.num_attempted_steps
    done = run.scale.num_steps, run.lookahead.num_steps
    try:
        return executor(run, batch, decision)
    except BaseException:
        if _versions(run.parameters) != versions and run.meter.num_attempted_steps == num_attempted:
            _finish(run, *done)
        raise


def _on_probation(run: Run, batch: Any, decision: Decision) -> Execution:
    """Carried to its end once its weights have moved."""
    before, versions, done = books(run), _versions(run.parameters), (run.scale.num_steps, run.lookahead.num_steps)
    execution: Execution | None = None
    after: Memento | None = None
    try:
        execution = EXECUTORS[Phase.CORRECT](run, batch, decision)
        after = books(run)
        conclude(run, execution)
    except BaseException:
        if execution is not None:
            if after is not None:
                after.restore()
            conclude(run, execution)
        elif _versions(run.parameters) != versions:
            before.restore()
            _finish(run, *done)
            assert run.probation is not None, "CORRECT without a jump on probation"
            conclude(run, Execution(run.probation.under_way))
        raise
    return execution


def _finish(run: Run, num_scaled: int, num_looked: int) -> None:
    """What follows the optimizer's own step, unless it was done: the counts are those before the step."""
    if run.scale.num_steps == num_scaled:
        run.scale.after_step(run.parameters)
    if run.lookahead.num_steps == num_looked:
        look_ahead(run, run.learning_rate)
    count_real(run)


def interrupted(run: Run) -> None:
    """A step was left by an exception: account for a step of the schedule, and forget a window half closed."""
    run.schedule.settle()
    if run.closing:
        run.basis.restart()
        run.closing = False


def _versions(parameters: Iterable[Tensor]) -> list[int]:
    """Counts of the in-place changes of every parameter."""
    return [0 if p.is_inference() else p._version for p in parameters]
