"""One step around its outcome: look at the batch -> decide -> execute -> check, learn, describe.

:func:`take_step` does all of it in a row, for a trainer that owns forward and backward.  A loop that owns them itself
goes the same way through :mod:`.engine`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from ..records import Decision, Phase, StepOutcome, StepResult
from ..weights.offload import own_defaults
from . import noise_check, outside
from .agreement import agree, agreed_decision
from .inputs import inputs, preview_proposal
from .jump_check import after_step, before_jump
from .learning import describe, enter, judge_lookahead, monitor, observe, rescale
from .predictor_change import choose_by_losses
from .real_step import run_plain
from .recovered import recovery_of
from .state import State
from .transaction import execute
from .withdrawal import compare_with_anchor


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """When a step began, by ``time.perf_counter``, and what its execution took.

    Attributes:
        called: The step was asked for.
        began: Its own work began, what the decision took left out.
        seconds: Time of forward, backward and optimizer step by the proposer's clock; None for a proposal.
    """

    called: float
    began: float
    seconds: float | None


def look_at(run: State, batch: Any) -> float:
    """Look at the batch of a step before it is decided what to do with it; returns forwards spent."""
    run.see(batch)
    same = run.batches.same or run.meets_new_batches
    asks = run.judge.asks_for_exactness(run.meter, same=same, observing=run.windows.observing)
    measured = run.judge.measure_exactness(batch, run.meter) if agree(run, asks) else 0.0
    run.judge.ledger.losses_are(exact=run.judged_exactly)  # which does not change before the next batch
    return measured + noise_check.ask_if_due(run, batch)


def decide(run: State) -> Decision:
    """What comes next; the only question to the predictor before it is behind that."""
    with own_defaults():
        return agreed_decision(run, lambda: run.phases.controller.decide(inputs(run, preview_proposal(run))))


def prepare(run: State, decision: Decision) -> None:
    """In the decided phase, before the step: the predictor that suits the losses."""
    run.schedule.begin_step()
    with own_defaults():
        if decision.phase is Phase.PREDICT:
            before_jump(run)
        else:
            choose_by_losses(run)


def close_step(run: State, decision: Decision, outcome: StepOutcome, watch: Stopwatch) -> StepResult:
    """After a step of any phase: check its loss, learn from it, record it.

    Raises:
        DivergenceError: too many consecutive steps were not finite.
    """
    run.batches.used(outcome.consumed)
    with own_defaults():
        alarm = monitor(run, run.recorder, outcome)
        rescale(run, outcome)
        judge_lookahead(run, outcome)
        after_step(run, outcome)
        noise_check.after_step(run, outcome)
        observe(run, run.recorder, outcome, watch.began)
        run.proposer.add_time(watch.seconds)
        result = describe(run, decision, outcome, alarm, watch.called)
        if (recovery := recovery_of(run, outcome, alarm)) is not None:
            result = replace(result, recovery=recovery)
        run.recorder.record(run, decision, outcome, result)
        return result


def take_step(run: State, batch: Any) -> StepResult:
    """One step with one batch: real, or a predicted jump judged on it.

    Raises:
        TypeError: ``loss_fn`` did not return a scalar tensor with a graph.
        DivergenceError: too many consecutive steps were not finite.
    """
    called = time.perf_counter()
    with own_defaults():
        outside.notice(run)
    looked = time.perf_counter()
    measured = look_at(run, batch)
    looked = time.perf_counter() - looked
    decision = decide(run)
    enter(run, decision)
    began = time.perf_counter() - looked
    prepare(run, decision)
    compare_with_anchor(run, batch)
    executor = execute if run.config.enabled else run_plain
    clock, entered = run.proposer.time.clock, run.proposer.time.clock()
    outcome = executor(run, batch, decision)
    seconds = clock() - entered if outcome.backwards else None
    outcome.forwards += measured
    return close_step(run, decision, outcome, Stopwatch(called, began, seconds))
