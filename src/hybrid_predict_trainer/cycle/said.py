"""What the engine tells the loop that it rides along with, each thing once."""

from __future__ import annotations

from ..notices import warn
from .state import State

#: Of a second look at the gradients of one step.
TWICE = (
    "engine.after_backward() was called twice with no step of the optimizer between: call it once per step, after the "
    "last backward and before you clip"
)
#: Of what was not handed over.
NO_BATCH = "no batch was handed over: call engine.note(loss, batch) before optimizer.step(), and do not free it before"
NO_LOSS = "no loss was handed over before optimizer.step(): call engine.note(loss, batch); the step is only counted"
NO_LOSS_FN = "there is no loss_fn for batches of type {name}: pass attach(..., loss_fn=lambda model, batch: ...)"
#: Of a loss whose step has been made.
LATE = (
    "engine.note(loss, batch) came behind optimizer.step(), whose loss it is: it counts for the next step, and every "
    "loss is one step late; call it before optimizer.step()"
)
#: Of weights that move while the optimizer stands still.
REPLACED = (
    "the weights were trained without a step of the {name} that attach() was given, the steps of which are seen alone: "
    "if another optimizer trains them now, call engine.detach() and attach(model, optimizer) with that one"
)
#: Of a state that is asked for in the middle of a step.
MID_STEP = (
    "the engine's state was saved in the middle of a step: what was noted for that step is not in it, nor are the "
    "gradients that were added up; save after optimizer.step()"
)
#: Of gradients that are not those of the loss.
CHANGED = (
    "gradients were multiplied by {factor:.2g} between backward and optimizer.step(): where the loop clips, call "
    "engine.after_backward() before it does; where a scaler unscales, pass attach(..., grad_scaler=scaler)"
)
#: Of a loop that goes on behind the end that it has told.
PAST_END = (
    "the run of total_steps={end} is at its end on its clock, and the loop makes another step, beyond its schedule: "
    "leave it where engine.finished"
)
#: Of a loop that would have to ask for proposals.
NOT_ASKED = "auto=False, and the loop does not call engine.between_steps()"


class SaidOnce:
    """What was said already; a run that observes nothing has nothing to say."""

    def __init__(self, run: State) -> None:
        """Nothing was said yet.

        Args:
            run: Of the engine.
        """
        self._run, self._said = run, set[str]()

    def say(self, text: str) -> None:
        """Warn, the first time."""
        if text not in self._said and self._run.windows.observing:
            self._said.add(text)
            warn(text)
