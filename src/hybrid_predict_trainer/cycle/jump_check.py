"""The validation loss has the last word on jumps, where the same data come round again.

There a jump takes the training loss down whether or not anything is learnt of new data: a quasi-Newton model drives the
loss of a full batch to nothing in some dozen jumps, the noise of its targets included.  So the user's own measure is
asked before the first jump, and again as the training loss falls; the state of the best answer is kept, and comes back
when later ones say that jumps did harm.  Without ``val_fn`` nothing in here does anything.
"""

from __future__ import annotations

import math

from ..judge.validation import Finding, Validation
from ..notices import warn
from ..records import StepOutcome
from .state import State
from .withdrawal import end_jumps, keep


def ask(run: State, validation: Validation) -> float:
    """The validation's answer to a raise, charged; infinite if there is none."""
    run.meter.add_forwards(validation.cost)
    found = validation.ask(run.subject.model, run.meter.num_real_steps, run.subject.ranks)
    run.subject.reshard()
    return found


def before_jump(run: State) -> None:
    """A proposal is about to be made: have an answer to compare with."""
    validation = _asked(run)
    if validation is None:
        return
    if validation.jumps.due_before_jump(_kept_jumps(run), run.meter.num_real_steps):
        _ask_about_jumps(run, validation, run.losses.history.loss_ema.mean)


def after_step(run: State, outcome: StepOutcome) -> None:
    """After a step of any phase: ask what jumps have done, if it is time, and put back what they spoiled."""
    validation = _asked(run)
    if validation is None:
        return
    # a jump's own losses are on the host; those of real steps may not be, and are averaged
    verdict, smooth = outcome.verdict, run.losses.history.loss_ema.mean
    loss = verdict.loss_after if verdict is not None and verdict.accepted and run.judged_exactly else smooth
    if validation.jumps.due(loss, _kept_jumps(run), run.meter.num_real_steps):
        _ask_about_jumps(run, validation, loss)


def _asked(run: State) -> Validation | None:
    """Who is asked about jumps; None where nobody is, or they are no matter of validation."""
    validation = run.safety.validation
    if validation is None or not validation.guards_jumps or run.judge.ledger.switched_off:
        return None
    return validation if run.full_batch or run.batches.recurrence.recurs else None


def _ask_about_jumps(run: State, validation: Validation, loss: float) -> None:
    run.meter.add_forwards(validation.cost)
    answer = validation.value(run.subject.model, run.subject.ranks)
    run.subject.reshard()
    if validation.failed:
        run.safety.drop_best()
        return
    check, best = validation.jumps, validation.jumps.best
    finding = check.take(answer, loss, _kept_jumps(run), run.meter.num_real_steps)
    if finding is Finding.BEST:
        try:
            run.safety.keep_best(keep(run, run.safety.best_point))
        except Exception as error:  # no memory for it, say: there is no way back from a jump then
            check.give_up()
            _without(run, f"the state of the best answer cannot be kept ({type(error).__name__}: {error})")
    elif finding is Finding.MUTE:
        _without(run, f"val_fn returned {answer}")
    elif finding is Finding.HARM:
        end_jumps(run, f"val_fn says {_told(answer)}, and said {_told(best)} at real step {check.best_step}")


def _without(run: State, why: str) -> None:
    run.safety.drop_best()
    warn(f"{why}: jumps are judged without val_fn from here on")


def _kept_jumps(run: State) -> int:
    """Jumps that were accepted and not taken back."""
    return run.meter.num_jumps_accepted - run.meter.num_rollbacks


def _told(loss: float) -> str:
    return f"{loss:.4g}" if math.isfinite(loss) else "that it is infinite"
