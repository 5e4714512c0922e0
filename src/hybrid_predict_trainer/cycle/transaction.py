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
from torch import Tensor, nn

from ..keep.failures import Place
from ..keep.memento import Memento
from ..records import Decision, Phase, Reason, StepOutcome, Verdict
from ..weights import algebra as weights
from ..weights.real_views import owner
from ..weights.trained import sign
from .correct_step import conclude, run_correct
from .predict_step import run_predict
from .real_step import count_real, run_full
from .state import State

PhaseStep = Callable[[State, Any, Decision], StepOutcome]

#: Which function takes the step of which phase.
STEP_OF_PHASE: dict[Phase, PhaseStep] = {
    Phase.WARMUP: run_full,
    Phase.FULL: run_full,
    Phase.PREDICT: run_predict,
    Phase.CORRECT: run_correct,
}


def books(run: State) -> Memento:
    """What a run remembers of its jumps: counts, ledger, adaptation, probation, and the run's own numbers."""
    p, j = run.proposer, run.judge
    a = p.feedback
    return Memento([
        run.meter, run.phases, run.windows, run.monitor, run.safety, run.optimizer_step, run.optimizer_step.switchback,
        p, a, a.record, a.confidence, a.bandit, p.segment, j, j.ledger, j.evaluation, j.probation,
        p.source,
    ])  # fmt: skip


def execute(run: State, batch: Any, decision: Decision) -> StepOutcome:
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
    return _real(run, batch, decision, STEP_OF_PHASE[decision.phase])


def _proposal(run: State, batch: Any, decision: Decision) -> StepOutcome:
    """Undone if it is interrupted."""
    before, generator = books(run), run.judge.generator.get_state()
    moved = Memento([run.windows.basis, run.optimizer_step.lookahead, run.optimizer_step.scale])
    try:
        outcome = STEP_OF_PHASE[Phase.PREDICT](run, batch, decision)
    except BaseException as error:
        if run.judge.held:
            weights.copy_(run.subject.parameters, run.judge.held)
        before.restore()
        moved.restore()
        run.judge.generator.set_state(generator)
        run.judge.release()
        if not isinstance(error, Exception):
            raise
        run.failures.note(Place.GATE, error)  # in the books, after the judgement: a refusal like any other
        outcome = StepOutcome(torch.tensor(math.nan, device="cpu"), consumed=False)
        outcome.verdict = Verdict(accepted=False, reason=Reason.CANNOT_EVALUATE)
    run.judge.release()
    run.step_scheduler()
    return outcome


def _real(run: State, batch: Any, decision: Decision, executor: PhaseStep) -> StepOutcome:
    """Carried to its end and counted if its weights have moved."""
    versions, num_attempted = versions_of(run.subject.parameters), run.meter.num_attempted_steps
    done = run.optimizer_step.scale.num_steps, run.optimizer_step.lookahead.num_steps
    try:
        return executor(run, batch, decision)
    except BaseException:
        if versions_of(run.subject.parameters) != versions and run.meter.num_attempted_steps == num_attempted:
            finish_real(run, *done)
        raise


def _on_probation(run: State, batch: Any, decision: Decision) -> StepOutcome:
    """Carried to its end once its weights have moved."""
    before, versions, done = (
        books(run),
        versions_of(run.subject.parameters),
        (run.optimizer_step.scale.num_steps, run.optimizer_step.lookahead.num_steps),
    )
    outcome: StepOutcome | None = None
    after: Memento | None = None
    try:
        outcome = STEP_OF_PHASE[Phase.CORRECT](run, batch, decision)
        after = books(run)
        conclude(run, outcome)
    except BaseException:
        if outcome is not None:
            if after is not None:
                after.restore()
            conclude(run, outcome)
        elif versions_of(run.subject.parameters) != versions:
            before.restore()
            finish_real(run, *done)
            assert run.judge.probation is not None, "CORRECT without a jump on probation"
            conclude(run, StepOutcome(run.judge.probation.under_way))
        raise
    return outcome


def finish_real(run: State, num_scaled: int, num_looked: int) -> None:
    """What follows the optimizer's own step, unless it was done: the counts are those before the step."""
    step = run.optimizer_step
    if step.scale.num_steps == num_scaled:
        step.measure()
    if step.lookahead.num_steps == num_looked:
        step.look_ahead(run.learning_rate, exact=run.full_batch, resting=run.safety.guard.comparing)
    count_real(run)


def interrupted(run: State) -> None:
    """A step was left by an exception: account for a step of the schedule, and forget a window half closed."""
    run.schedule.settle()
    run.windows.interrupted()


def versions_of(parameters: Iterable[Tensor]) -> list[int]:
    """Counts of the in-place changes of every parameter."""
    return [0 if p.is_inference() else p._version if type(p) is nn.Parameter else sign(owner(p))[0] for p in parameters]
