"""What a predictor may take of the wall clock: one that is too slow is dropped, after the call that shows it.

Two rules.  A single call of more than a second, and over a hundred real steps more than a twentieth of their time, as
far as it exceeds an absolute floor.  The floor is there because steps of a tenth of a millisecond leave no predictor
time to add two numbers.  Predictors that pace their own training are held to the first rule only, and so are those of
this package, with ten seconds: their costs are known and counted, their jumps at every step may pay for more, and
what a run comes to must not depend on how busy its machine is.

Time is not reproducible, so nothing but the decision is kept in a checkpoint: a predictor that was dropped stays so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds of one call, of any predictor and of one of this package.
MAX_CALL_SECONDS, OWN_CALL_SECONDS = 1.0, 10.0
#: The same of a source of proposals, whose calls are all of what it does.
SOURCE_CALL_SECONDS = 600.0
#: Share of the real steps' time, and steps that it is taken over.
MAX_SHARE, STEPS = 0.05, 100
#: Seconds per so many steps that are nobody's concern.
FLOOR_SECONDS = 0.05


class TimeBudget:
    """Sums over the steps since the last look.

    Attributes:
        objection: Why the predictor was found too slow, or None.
    """

    def __init__(
        self, *, own: bool, paced: bool, source: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Nothing measured yet.

        Args:
            own: The predictor is one of this package.
            paced: It keeps its training to a share of the run's time itself.
            source: It makes the moves that others are asked to judge.
            clock: Seconds.
        """
        self.clock = clock
        self.objection: str | None = None
        self._longest = SOURCE_CALL_SECONDS if source else OWN_CALL_SECONDS if own else MAX_CALL_SECONDS
        self._shares = not (own or paced)
        self._num_steps = 0
        self._step_seconds = self._call_seconds = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one call of the predictor."""
        began = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - began
            self._call_seconds += seconds
            if seconds > self._longest:
                self.objection = self.objection or f"one call took {seconds:.1f} s"

    def on_step(self, seconds: float) -> None:
        """A real step took so long, all that was done beside it excluded."""
        self._num_steps += 1
        self._step_seconds += seconds
        if self._num_steps < STEPS:
            return
        beyond = self._call_seconds - FLOOR_SECONDS
        if self._shares and beyond > MAX_SHARE * self._step_seconds:
            share = 100 * self._call_seconds / max(self._step_seconds, 1e-9)
            self.objection = self.objection or f"{STEPS} steps spent {share:.0f} % of their time on it"
        self._num_steps, self._step_seconds, self._call_seconds = 0, 0.0, 0.0
