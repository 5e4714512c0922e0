"""``portfolio``: closed form, quasi-Newton steps and plain ones, whichever lowers the loss fastest here.

The sources are arms of :class:`.arms.Arms`.  They share what is known of good weights: whose turn it is begins where
the best of them are.  A source that raises is dropped, and the others go on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...cost import BACKWARD_UNITS, FORWARD_UNITS
from ...records import BasisSpec, PhasePrediction, StateDict, Verdict, Window
from ...weights import algebra as weights
from .arms import PLAIN, Arms
from .base import Material, Move, Source
from .gauss_newton import GaussNewton

log = logging.getLogger(__name__)

#: Forwards that a real step is worth.
REAL_STEP = 3.0
#: Forwards with which the gate judges a move.
JUDGED = 2.0


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds of this process where one thread does all the work, whatever else is running; else of the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _nothing(material: Material) -> Move:
    """No move: what it is to be made with has just been found to be too dear; a forward has told."""
    prediction = PhasePrediction(
        coefficients=torch.zeros(1, 1, dtype=torch.float64), horizon=1, predicted_loss=math.nan, loss_trajectory=(),
        predicted_reduction=0.0, max_scale=1.0,
    )  # fmt: skip
    delta = [torch.zeros_like(p) for p in material.parameters]
    return Move(prediction=prediction, delta=delta, num_forward=1, num_backward=0, num_matrix_forwards=0)


class Portfolio(Source):
    """Chooses between sources by what they bring per second; see the module.

    Attributes:
        sources: By name, in the order of their first trials.
        arms: Their turns.
        clock: Seconds; None: what calls cost is counted, not measured.
    """

    name = "portfolio"

    def __init__(self, sources: Mapping[str, Source], clock: Callable[[], float] | None = None) -> None:
        """Bind.

        Args:
            sources: At least one.
            clock: See the attribute.
        """
        self.sources = dict(sources)
        self.arms = Arms(list(self.sources), timed=clock is not None)
        self.spec = BasisSpec(num_displacements=1)
        self.clock = clock
        closed = self.sources.get("gauss_newton")
        self._closed = closed if isinstance(closed, GaussNewton) else None
        self.takes_fresh = self._closed is not None
        self._live: list[Tensor] | None = None  # that may be moved
        self._movable: list[bool] = []
        self._best: list[Tensor] | None = None
        self._best_loss, self._best_is_stale = math.inf, False
        self._asked = ""  # who has proposed last
        self._pending = False  # the verdict on that is to come
        self._forwards = 0.0  # that this proposal has cost
        self._plain_began = math.nan  # log of the best loss when plain steps got their turn

    # ---- as a source -------------------------------------------------------------------------------------

    @property
    def _fresh(self) -> bool:
        return self._closed is not None and self._closed.stream.fresh

    @property
    def chain(self) -> int:  # type: ignore[override]
        """That of the source whose turn it is; none where plain steps have theirs."""
        name = "gauss_newton" if self._fresh else self.arms.current
        return 0 if name == PLAIN else self.sources[name].chain

    @property
    def ready(self) -> bool:
        """Not while plain steps have their turn, unless the run ends; not without any source left."""
        if self._fresh and self._closed is not None:
            return self._closed.ready and not self.arms.arms["gauss_newton"].dropped
        return bool(self.arms.left) and (self.arms.choose() != PLAIN or self._num_asked > 0)

    def on_data(self, num_different: int) -> None:
        """See :class:`Source`."""
        if num_different:
            self._best_is_stale = True
        for source in self.sources.values():
            source.on_data(num_different)

    def on_proposal(self) -> None:
        """See :class:`Source`."""
        super().on_proposal()
        for source in self.sources.values():
            source.on_proposal()

    def on_asked(self) -> None:
        """See :class:`Source`."""
        super().on_asked()
        for source in self.sources.values():
            source.on_asked()

    def on_real_step(self) -> None:
        """See :class:`Source`."""
        super().on_real_step()
        for source in self.sources.values():
            source.on_real_step()

    def add_step_seconds(self, seconds: float) -> None:
        """See :class:`Source`."""
        if self.arms.measures(PLAIN):
            self.arms.add_seconds(PLAIN, seconds, REAL_STEP)

    def observe(self, window: Window) -> None:
        """A real step: plain steps have their turn, or one has come between two proposals."""
        for source in self.sources.values():
            source.observe(window)
        if self.arms.measures(PLAIN):  # no step is priced yet
            return
        forwards = REAL_STEP * window.num_steps
        if self._fresh or self.arms.current != PLAIN:
            self.arms.on_idle(forwards)
            return
        level = math.log(window.loss) if window.loss > 0 and math.isfinite(window.loss) else math.nan
        if math.isnan(self._plain_began):
            self._plain_began = level
        gain = self._plain_began - level
        self._plain_began = min(self._plain_began, level)
        self.arms.note(gain if gain > 0 else 0.0, forwards)
        if self.arms.current != PLAIN:
            self._plain_began = math.nan

    def propose(self, material: Material) -> Move:
        """A move of the source whose turn it is; one that raises is dropped, and the next one asked.

        Raises:
            Exception: what the last source has raised.
        """
        self._look_at(material)
        self.arms.plan(material.room)
        self._pending = False
        self._plain_began = math.nan  # what comes now is no plain step's
        if self._fresh and self._closed is not None:
            self._closed.allow(math.inf)
            move = self._closed.propose(material)
            self._asked, self._pending = "gauss_newton", True
            return move
        if self.arms.current == PLAIN:  # a run that ends goes back to the best weights
            self.arms.take(max(self.arms.left, key=lambda n: self.arms.arms[n].rate or 0.0))
        elif not self.arms.pass_over():
            return _nothing(material)
        while True:
            name = self.arms.current
            source = self.sources[name]
            self._hand_over(name)
            source.allow(self.arms.room_forwards)
            began = self.clock() if self.clock else 0.0
            try:
                move = source.propose(material)
            except ArithmeticError:  # nothing is to be had here; elsewhere there may be
                self.arms.note(0.0, REAL_STEP, over=True)
                if self.arms.current in (name, PLAIN):
                    raise
                continue
            except Exception as error:
                log.warning("portfolio: %s is dropped (%s: %s)", name, type(error).__name__, error)
                self.arms.drop(name)
                if not self.arms.left:
                    raise
                if self.arms.current == PLAIN:
                    self.arms.take(self.arms.left[0])
                continue
            self._asked, self._pending = name, True
            spent = move.num_forward + move.num_matrix_forwards
            self._forwards = spent + move.num_backward * BACKWARD_UNITS / FORWARD_UNITS
            if self.clock:
                self.arms.add_seconds(name, self.clock() - began, self._forwards)
            return move

    def _look_at(self, material: Material) -> None:
        """What may be moved, and what first trials will cost."""
        if self._movable != material.movable:
            self._best, self._best_loss = None, math.inf
            self._movable = list(material.movable)
            self._live = None
        if self._live is None:
            pairs = zip(material.parameters, material.movable, strict=True)
            self._live = [p for p, may in pairs if may]
            for name, source in self.sources.items():
                if not self.arms.arms[name].dropped and math.isnan(self.arms.arms[name].expected):
                    self._predict(name, source, material)

    def _predict(self, name: str, source: Source, material: Material) -> None:
        try:
            self.arms.expect(name, source.least_price(material))
        except Exception as error:
            log.warning("portfolio: %s is dropped (%s: %s)", name, type(error).__name__, error)
            self.arms.drop(name)

    def _hand_over(self, name: str) -> None:
        """The best weights known, where the weights are others and another source has found them."""
        if self._best is None or self._live is None or self._asked == name:
            return
        if not all(map(torch.equal, self._best, self._live)):
            self.sources[name].know(self._best, self._best_loss, stale=self._best_is_stale)

    # ---- what becomes of moves ---------------------------------------------------------------------------

    def on_verdict(self, verdict: Verdict) -> None:
        """What a move has brought beyond the best loss known, and what it has cost.

        Raises:
            Exception: what the source raises.
        """
        if not self._pending:
            return
        self._pending = False
        source, name = self.sources[self._asked], self._asked
        try:
            source.on_verdict(verdict)
        except Exception as error:
            self.arms.drop(name)
            if not self.arms.left:
                raise
            log.warning("portfolio: %s is dropped (%s: %s)", name, type(error).__name__, error)
            return
        if self._fresh:
            return
        loss = verdict.loss_after if verdict.accepted else verdict.loss_before
        known = verdict.loss_before if self._best_is_stale else min(self._best_loss, verdict.loss_before)
        if not math.isfinite(loss) or not math.isfinite(known):
            self.arms.note(0.0, self._forwards + JUDGED, over=True)
            return
        gain = math.log(known / loss) if 0 < loss < known else 0.0
        if self.arms.current == name:
            self.arms.note(gain, self._forwards + JUDGED, over=not verdict.accepted)
        if loss <= known or self._best is None:
            self._best_loss, self._best_is_stale = loss, False
            self._best = None if self._live is None else weights.clone(self._live)

    @property
    def knows_better(self) -> bool:
        """Whether there are weights to come back to."""
        if self._fresh and self._closed is not None:
            return self._closed.knows_better
        return self._best is not None and bool(self.arms.left)

    def overwritten(self) -> None:
        """Weights from before are of no use any more."""
        self._best, self._best_loss = None, math.inf
        for source in self.sources.values():
            source.overwritten()

    @property
    def regime(self) -> str:
        """What closed form says of it."""
        return "unknown" if self._closed is None else self._closed.regime

    def memory_bytes(self) -> int:
        """Of all sources."""
        own = sum(t.numel() * t.element_size() for t in self._best or ())
        return own + sum(source.memory_bytes() for source in self.sources.values())

    # ---- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Turns and times, the best weights, and the sources."""
        return {
            "arms": self.arms.state_dict(), "best": None if self._best is None else [t.clone() for t in self._best],
            "best_loss": self._best_loss, "best_is_stale": self._best_is_stale, "movable": list(self._movable),
            "asked": self._asked, "plain_began": self._plain_began, "num_in_chain": self.num_in_chain,
            "num_asked": self._num_asked,
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.arms.load_state_dict(state["arms"])
        self._best = None if state["best"] is None else [t.clone() for t in state["best"]]
        self._best_loss, self._best_is_stale = state["best_loss"], state["best_is_stale"]
        self._movable, self._asked = [bool(v) for v in state["movable"]], state["asked"]
        self._plain_began, self.num_in_chain = state["plain_began"], state["num_in_chain"]
        self._num_asked, self._live = state["num_asked"], None
        for name, source in self.sources.items():
            source.load_state_dict(state["sources"][name])
