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
#: Of gradients that are not those of the loss.
CHANGED = (
    "gradients were multiplied by {factor:.2g} between backward and optimizer.step(): where the loop clips, call "
    "engine.after_backward() before it does; where a scaler unscales, pass attach(..., grad_scaler=scaler)"
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
            warn(text, stacklevel=5)
