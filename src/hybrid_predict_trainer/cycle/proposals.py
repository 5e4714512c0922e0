"""Proposals between the steps of a loop that somebody else owns, and what is decided of the step that comes then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ..records import Decision, Phase, Reason, StateDict, StepResult
from ..weights.offload import own_defaults
from . import outside
from .handover import Call, MicroBatches, StepLoss, is_whole
from .hooks import OwnForwards
from .learning import enter
from .loop import Stopwatch, close_step, decide, look_at, prepare
from .said import NO_BATCH, NO_LOSS, NO_LOSS_FN, NOT_ASKED, REPLACED, SaidOnce
from .state import State
from .transaction import execute

#: In the place of the batch of the coming step, where it was looked at before the run was resumed.
_ANY = object()


class Proposals:
    """Asks the controller between two steps, and keeps its decision until the real step comes.

    Attributes:
        decision: Of the real step to come; None before it is made.
        lack: What a proposal cannot be judged for, as things stand; empty if for nothing.
        unasked: The loop would have to call ``between_steps``, and does not.
    """

    def __init__(self, run: State, own: OwnForwards, said: SaidOnce, *, auto: bool) -> None:
        """Before the first step.

        Args:
            run: Of the engine.
            own: Told of forwards of our own.
            said: What was said already.
            auto: Nobody has to ask for proposals.
        """
        self._run, self._own, self._said, self._auto = run, own, said, auto
        self.decision: Decision | None = None
        self.lack = ""
        self.unasked = False
        self._batch: Any = None  # of the last step
        self._lost = False  # the last step had no loss
        self._looked: list[Any] = []  # the batch of the coming step, once looked at
        self._spent = 0.0  # forwards for that
        self._consumed: Any = None  # batch that an accepted jump was judged on

    # ---- between two steps ---------------------------------------------------------------------------

    def made(self, batch: Any) -> Iterator[StepResult]:
        """Propose for as long as the controller asks for it, and know what comes then.

        Args:
            batch: That comes next; None: proposals are judged on that of the last step.

        Yields:
            What became of each proposal.
        """
        run, fresh = self._run, batch is not None
        judged = batch if fresh else self._batch
        judgeable = self.judgeable(judged) if run.windows.observing else False
        judged = judged if judgeable else None
        while self.decision is None:
            called = time.perf_counter()
            with own_defaults():
                outside.notice(run)
            with self._own.evaluating():
                if judged is not None and (fresh or run.full_batch):
                    self._spent += look_at(run, judged)
                    self._looked = [judged]
                decision = self._decide(can_judge=judgeable)
                if decision.phase is not Phase.PREDICT:
                    self.decision = decision
                    return
                result = self._propose(judged, decision, called)
            yield result
            if not fresh:
                run.batches.used(True)  # another one comes next
            elif result.consumed:
                self._consumed, self._looked = judged, []
                return

    def _propose(self, batch: Any, decision: Decision, called: float) -> StepResult:
        run = self._run
        enter(run, decision)
        prepare(run, decision)
        outcome = execute(run, batch, decision)
        outcome.forwards, self._spent, self._looked = outcome.forwards + self._spent, 0.0, []
        result = close_step(run, decision, outcome, Stopwatch(called, called, None))
        outside.remember(run)
        return result

    def judgeable(self, batch: Any) -> bool:
        """Whether a proposal can be judged on a batch; if not, why is said once."""
        why = ""
        loss_fn = self._run.subject.loss_fn
        if batch is None or not is_whole(batch):
            why = NO_LOSS if self._lost else NO_BATCH
        elif isinstance(loss_fn, StepLoss) and loss_fn.is_default:
            each = batch[0] if isinstance(batch, MicroBatches) else batch
            if not isinstance(each, Mapping | Call):
                why = NO_LOSS_FN.format(name=type(each).__name__)
        self.lack = why
        if why and self._auto:
            self._said.say(why)
        return not why

    def on_replaced(self) -> None:
        """The weights were trained by somebody else's step: there is nothing that a proposal could begin from."""
        self.lack = REPLACED.format(name=type(self._run.subject.optimizer).__name__)
        self._said.say(self.lack)

    def _decide(self, *, can_judge: bool) -> Decision:
        """What comes next; no proposal where there is nothing to judge it on."""
        run = self._run
        if not can_judge and run.windows.observing:
            run.proposer.go_on_with(None)
            phases = run.phases
            phases.force_full(1, by_alarm=phases.forced_by_alarm and phases.num_forced_full_steps > 0)
        return decide(run)

    # ---- the real step -------------------------------------------------------------------------------

    def asked(self) -> None:
        """The loop has called ``between_steps``."""
        self.unasked = False

    def next_decision(self) -> Decision:
        """Of the real step that comes: made between the steps, or now, when it is too late for a proposal."""
        decision, self.decision = self.decision, None
        if decision is None:
            if not self._auto and self._run.meter.num_real_steps > 1 and self._consumed is None:
                self.unasked = True
                self._said.say(NOT_ASKED)
            decision = self._decide(can_judge=False)
        return decision

    def look(self, batch: Any) -> float:
        """Look at the batch of a step, unless that was done before it; returns forwards spent."""
        run, looked = self._run, self._looked
        spent = self.taken_price()
        if (
            batch is None
            or not self.judgeable(batch)
            or (looked and (looked[0] is batch or (looked[0] is _ANY and run.full_batch)))
        ):
            return spent
        if batch is self._consumed:  # an accepted jump used it, and it is trained on all the same
            run.batches.used(False)
        return spent + look_at(run, batch)

    def taken_price(self) -> float:
        """Forwards that were spent on looking at the batch of the coming step, whose price the caller books."""
        spent, self._looked, self._spent = self._spent, [], 0.0
        return spent

    def on_step(self, batch: Any, *, lost: bool) -> None:
        """A real step was made.

        Args:
            batch: It was trained on; None if it is not known.
            lost: Nobody has handed its loss over.
        """
        self._batch, self._lost = batch, lost
        if not lost:
            self._consumed = None

    # ---- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Plain containers; batches stay behind."""
        decision = self.decision
        return {
            "decision": None if decision is None else {
                "phase": decision.phase.value, "reason": decision.reason.value, "horizon": decision.horizon,
                "confidence": decision.confidence, "fallback_threshold": decision.fallback_threshold,
            },
            "looked": bool(self._looked), "spent": self._spent,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._batch = self._consumed = None
        self.decision = None
        if state["decision"] is not None:
            found = state["decision"]
            self.decision = Decision(**{**found, "phase": Phase(found["phase"]), "reason": Reason(found["reason"])})
        self._looked, self._spent = [_ANY] if state["looked"] else [], state["spent"]
