"""Passes over the data: batches of a loader, round after round, and what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from torch import Tensor

from ..records import ConfigError, EpochResult, Phase
from ..tell.figures import statistics
from ..weights import algebra as weights
from .inputs import affordable, predictor_ready, windows_to_wait
from .state import State


class Rounds:
    """The batches of one pass over a loader, or of one pass after the other until it gives no more.

    A first pass without a batch is tried again: a loader whose state was saved in its last batch resumes there.
    """

    def __init__(self, loader: Iterable[Any], end: Callable[[], None], *, endless: bool) -> None:
        """Nothing is asked of the loader yet.

        Args:
            loader: Anything that can be iterated; a list or a data loader as often as one likes, an iterator once.
            end: Called after the last one, and after an empty pass.
            endless: Go round.
        """
        self.loader, self._end, self._endless = loader, end, endless
        self._num_given = 0  # in this pass

    def __iter__(self) -> Iterator[Any]:
        """Batches.

        Raises:
            ConfigError: it goes round, and there is no batch at all.
        """
        num_passes = num_empty = 0
        while True:
            self._num_given = 0
            for batch in self.loader:
                self._num_given += 1
                yield batch
            self._end()
            empty = self._num_given == 0
            num_passes, num_empty = num_passes + (not empty), num_empty + empty
            if num_passes == 0 and num_empty == 2 and self._endless:
                raise ConfigError("the loader gave no batch in two passes: nothing can be trained on it")
            if (num_passes and (empty or not self._endless)) or num_empty == 2:
                return
            if not empty:
                next_epoch(self.loader, num_passes)

    @property
    def at_end(self) -> bool:
        """Whether the last batch was that of a pass, which an iteration left there would not find out."""
        try:
            return self._num_given == len(self.loader)  # type: ignore[arg-type]
        except TypeError:  # it has no length
            return False


def goes_round(loader: Iterable[Any], total_steps: int | None, position: int) -> bool:
    """Whether the rest of a run takes more batches than one pass over a loader of known length has."""
    if total_steps is None or not isinstance(loader, Sized):
        return False
    try:
        return total_steps - position > len(loader)
    except TypeError:  # a data loader over an iterable data set says that it has a length, and has none
        return False


def next_epoch(loader: Any, number: int) -> None:
    """Tell whatever shuffles by an epoch's number that the next one begins.

    Args:
        loader: It, its data set and its samplers are told, if they have ``set_epoch``.
        number: Of the epoch, for those that do not know theirs.
    """
    batches = getattr(loader, "batch_sampler", None)
    places: tuple[Any, ...] = (loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None), batches,
              getattr(batches, "sampler", None))  # fmt: skip
    for place in {id(p): p for p in places if hasattr(p, "set_epoch")}.values():
        epoch = getattr(place, "epoch", None)
        place.set_epoch(epoch + 1 if isinstance(epoch, int) else number)


def replaying(batches: Iterable[Any], unused: Callable[[], Any]) -> Iterator[Any]:
    """Every batch, given again for as long as ``unused`` returns it."""
    for batch in batches:
        yield batch
        while (again := unused()) is not None:
            yield again


def has_ended(run: State, total_steps: int | None) -> bool:
    """Whether a planned run is at its end, with no jump on probation."""
    settled = run.judge.probation is None and run.proposer.segment is None
    return total_steps is not None and run.position >= total_steps and settled


def owes_proposal(run: State, *, stopped: bool) -> bool:
    """Whether a run that might end goes on for one step, because its weights may be worse than others that it knows.

    Args:
        run: Between two steps.
        stopped: Somebody wants it to end here: it may be resumed, and goes on then.
    """
    source = run.proposer.source
    if source is None:
        return not stopped and _has_left_a_jump(run)
    if not source.owes:
        return False
    source.on_asked()
    return predictor_ready(run)


def _has_left_a_jump(run: State) -> bool:
    """Whether the last real step stands alone behind an accepted jump, and a proposal would judge where it has led to.

    Where losses are exact the next proposal leads on from there, or back.  Without it the run would end where the
    optimizer's own step goes from a place that it has not come to by itself: Rprop's by a loss of 0.08 to 11.
    """
    windows, phases = run.windows, run.phases
    jumped = windows.just_closed and windows.last is not None and windows.last.jumped
    due = run.full_batch and phases.current is Phase.FULL and jumped
    if not due or phases.num_forced_full_steps or run.proposes_nothing:
        return False
    off = run.judge.ledger.switched_off or run.safety.guard.comparing or run.judge.probation is not None
    return not off and windows_to_wait(run) == 0 and predictor_ready(run) and affordable(run)


class Tally:
    """What a stretch of training did, from its beginning on."""

    def __init__(self, run: State) -> None:
        """It begins."""
        self._run = run
        self._started = time.perf_counter()
        self._before, self._phases_before = statistics(run), phase_counts(run)
        self.losses: list[Tensor] = []
        self.num_steps = 0

    def count_step(self) -> None:
        """A step was taken."""
        self.num_steps += 1

    def result(self, *, stopped_early: bool) -> EpochResult:
        """It has ended."""
        before, after, losses = self._before, statistics(self._run), self.losses
        mean = float(weights.on_host([v.detach() for v in losses]).float().mean()) if losses else float("nan")
        counts = {phase: n - self._phases_before[phase] for phase, n in phase_counts(self._run).items()}
        counted = (
            "num_real_steps", "num_claimed_steps", "num_credited_steps", "num_forward", "num_backward",
            "num_jumps_proposed", "num_jumps_accepted", "cost_units",
        )  # fmt: skip
        done = {name: after[name] - before[name] for name in counted}
        claimed, backward = done["num_claimed_steps"], done["num_backward"]
        return EpochResult(
            num_steps=self.num_steps,
            mean_loss=mean,
            final_loss=float(losses[-1]) if losses else float("nan"),
            phase_counts=counts,
            backward_reduction_pct=100.0 * claimed / (claimed + backward) if claimed + backward else 0.0,
            epoch_time_s=time.perf_counter() - self._started,
            stopped_early=stopped_early,
            **done,
        )


def phase_counts(run: State) -> dict[str, int]:
    """Steps by phase so far."""
    return {phase.value: n for phase, n in run.meter.steps_by_phase.items()}
