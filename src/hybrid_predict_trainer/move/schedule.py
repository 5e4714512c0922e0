"""The learning-rate schedule on the run's clock, and the factor beside it that recovery lowers rates by.

The rate of a real step is ``factor * schedule(position)``.  The factor is applied to the optimizer's groups for the
length of one optimizer step and taken out again, so that no number of the schedule's own (``base_lrs``,
``initial_lr``, ``max_lr``, the groups' ``lr``) ever changes: what a schedule computes its next rate from differs from
class to class, and for some it is the groups' last rate.

``num_steps`` counts what the schedule has been advanced by.  It is compared with the schedule's own count, where it
has one: a schedule that the caller's loop steps as well would run at double speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LambdaLR, LinearLR, MultiStepLR, StepLR

from ..config.settings import Interval
from ..notices import warn
from ..records import StateDict

#: Nested schedulers that are looked into for a count of steps: a chain of chains.
MAX_DEPTH = 8

#: Share of its first value below which a rate is none any more; OneCycleLR ends at a ten-thousandth.
VANISHED = 1e-6

#: A step beyond the end of any run; and the share of an earlier rate that a decay ends below.
FAR, HALF = 10_000_000, 0.5
#: Ratio of the distances at which a factor without a planned end is looked at: no period hides between them.
GRID = 1.37


class LrSchedule:
    """A scheduler, where it stands, and by what its rates are lowered.

    Attributes:
        scheduler: The caller's; anything with ``step()``, or None.
        interval: What one step of the schedule stands for: a step of the run's clock or a pass over the data.
        factor: Of every rate, in (0, 1]; 1 until recovery lowers it.
        num_steps: Steps of the schedule that are accounted for.
        num_epochs: Passes over the data that have ended.
        in_epoch: Whether there was a step since.
        owned: Whether we step it; if not the caller's loop does, once per step of the optimizer.
        end: Position on the clock at which a planned run ends, None while there is no plan.
        peak: Highest rate that the optimizer has stepped with.
    """

    def __init__(self, scheduler: Any, interval: Interval = "step", *, owned: bool = True) -> None:
        """Bind to a scheduler that stands where training begins."""
        self.scheduler, self.interval, self.owned = scheduler, interval, owned
        self.factor = 1.0
        self.num_steps = 0
        self.num_epochs = 0
        self.in_epoch = False
        self.end: int | None = None
        self.peak = 0.0
        self._seen = count_of(scheduler)  # the schedule's own count when it was last looked at
        self._first = self._seen or 0  # likewise, when the run began
        self._num_beyond = 0  # steps that a loop of its own has made beyond one per step of the optimizer
        self._under_way = False  # a step of ours has begun, and perhaps was interrupted
        self._rates: list[Any] = []  # the schedule's, of the last real step before the planned end
        self._annealing: tuple[int, bool] | None = None  # (last step looked at, answer)
        self._warned = self._doubted = False  # each is said once

    # ---- what happens -----------------------------------------------------------------------------

    def plan(self, end: int | None) -> None:
        """A run to a planned end begins (None: it is over)."""
        self.end = end

    def begin_step(self) -> None:
        """A step of the present pass over the data."""
        self.in_epoch = True

    def go_back(self, num_steps: int) -> None:
        """The schedule's state of so many steps was put back."""
        self.num_steps = num_steps

    def update_peak(self, rate: float) -> None:
        """The optimizer has stepped with this rate."""
        self.peak = max(rate, self.peak)

    # ---- rates ------------------------------------------------------------------------------------

    def lower(self, factor: float) -> None:
        """Multiply every rate from here on by ``factor``."""
        self.factor *= factor

    def rate(self, optimizer: Optimizer) -> float:
        """Of the first group that has one: the schedule's, times what recovery has lowered it by."""
        rate = optimizer.param_groups[0].get("lr")
        return 0.0 if rate is None else self.factor * float(rate)

    @contextmanager
    def applied(self, optimizer: Optimizer, position: int) -> Iterator[None]:
        """The block in which the optimizer steps: every group's rate is the schedule's times the factor.

        A run goes on beyond its planned end while a jump is on probation.  The schedule is at its last rate there,
        which may be 0 and which plain training never uses: those steps are made at the rate of the last one before.

        Args:
            optimizer: Its groups' ``lr`` are as they were when the block is left.
            position: Of the run on its clock, before this step.
        """
        rated = [group for group in optimizer.param_groups if isinstance(group.get("lr"), float | int | Tensor)]
        beyond = self.end is not None and position >= self.end and len(self._rates) == len(rated)
        if self.end is not None and not beyond:
            self._rates = [copied(group["lr"]) for group in rated]
        changed = beyond or self.factor != 1.0
        own = [(group, group["lr"], copied(group["lr"]) if changed else None) for group in rated]
        try:  # twice: where putting the rates back is interrupted it is done again
            try:
                if changed:
                    rates = self._rates if beyond else [copied for _, _, copied in own]
                    for (group, live, _), rate in zip(own, rates, strict=True):
                        set_value(group, "lr", live, rate * self.factor)
                yield
            finally:
                if changed:
                    _put_back(own)
        except BaseException:
            _put_back(own)
            raise

    def planned(self, rate: float, num_steps: int) -> float:
        """Sum of the learning rate over the next steps; exact for ``LambdaLR`` per step, else held constant.

        Args:
            rate: Of the next step, the factor included.
            num_steps: Steps ahead.
        """
        schedule = self.scheduler
        if isinstance(schedule, LambdaLR) and self.interval == "step":
            base, factor, now = schedule.base_lrs[0], schedule.lr_lambdas[0], schedule.last_epoch
            return self.factor * float(sum(base * factor(now + i) for i in range(num_steps)))
        return rate * num_steps

    @property
    def anneals(self) -> bool:
        """Whether the rate will have fallen by the end of the run, as far as can be told.

        What settles at a higher noise is settled by a decay.  A constant schedule has none, nor has one that only
        warms up.  Of a ``LambdaLR`` the factor is looked at: at the planned end it must be below half of what it is
        before; without a plan, at some step of the next ten million below half of what it is at an earlier one.
        """
        last = FAR if self.end is None or self.interval == "epoch" else max(self.end - 1, 1)
        if self._annealing is None or self._annealing[0] != last:
            self._annealing = (last, _falls(self.scheduler, last, planned=last != FAR))
        return self._annealing[1]

    # ---- position -----------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """A pass over the data has ended; :meth:`advance` does the rest.

        A schedule meant per epoch that is stepped at every batch takes the rate to nothing within an epoch or two.
        """
        self.in_epoch, self.num_epochs = False, self.num_epochs + 1
        groups = getattr(getattr(self.scheduler, "optimizer", None), "param_groups", None)
        if self.interval == "epoch" or self._doubted or not groups or "initial_lr" not in groups[0]:
            return
        rate, first = float(groups[0]["lr"]), float(groups[0]["initial_lr"])
        if 0 < rate < VANISHED * first:
            self._doubted = True
            warn(
                f"after {self.num_epochs} epochs and {self.num_steps} steps the learning rate has fallen from "
                f"{first:g} to {rate:.1e}: if {type(self.scheduler).__name__} counts epochs, pass "
                'lr_interval="epoch"',
            )

    def advance(self, position: int) -> None:
        """Bring the schedule to the clock's position, or to the number of passes that have ended."""
        target = position if self.interval == "step" else self.num_epochs
        # OneCycleLR raises beyond its end, which the last steps on probation may pass
        target = min(target, getattr(self.scheduler, "total_steps", None) or target)
        if self.scheduler is None or not self.owned:
            self.num_steps = max(self.num_steps, target)
            return
        self.notice()
        while self.num_steps < target:
            self._under_way = True
            self.scheduler.step()
            self._seen, self.num_steps, self._under_way = count_of(self.scheduler), self.num_steps + 1, False

    def owed(self, position: int, num_loop_steps: int) -> int:
        """Steps that the clock is ahead of a schedule that its loop steps.

        The loop makes one per step of the optimizer, before or after it asks; what it has made beyond is paid.

        Args:
            position: Of the run on its clock.
            num_loop_steps: Steps of the optimizer that the loop has attempted.

        Returns:
            0 for a schedule that counts passes over the data: no step of the clock is one of its own.
        """
        if self.interval == "epoch":
            return 0
        made = (count_of(self.scheduler) or 0) - self._first
        self._num_beyond = max(self._num_beyond, made - num_loop_steps)
        return max(position - num_loop_steps - self._num_beyond, 0)

    def settle(self) -> None:
        """Account for a step of ours that was interrupted: its count says whether it was made."""
        if self._under_way:
            seen = count_of(self.scheduler)
            taken = seen is None or seen != self._seen
            self._seen, self.num_steps, self._under_way = seen, self.num_steps + taken, False

    def notice(self) -> None:
        """Count a step that somebody else made as one of ours, and say so once.

        Any other change of the schedule's count is a state that was loaded: the schedule goes on from there.
        """
        self.settle()
        seen = count_of(self.scheduler)
        if seen is None or self._seen is None or seen == self._seen:
            self._seen = seen
            return
        if seen != self._seen + 1:
            self._seen = seen
            return
        self._seen, self.num_steps = seen, self.num_steps + 1
        if not self._warned:
            self._warned = True
            warn(
                f"the schedule {type(self.scheduler).__name__} was stepped outside the trainer, which steps it itself: "
                "that step is counted as one of the trainer's own.  Do not step it (for a schedule in epochs pass "
                'lr_interval="epoch")',
            )

    def resynchronize(self) -> None:
        """The schedule's state was put back: its count is what it is."""
        self._seen, self._under_way = count_of(self.scheduler), False

    # ---- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """What is not the scheduler's own."""
        self.settle()
        return {
            "factor": self.factor, "num_epochs": self.num_epochs, "in_epoch": self.in_epoch,
            "rates": [float(rate) for rate in self._rates], "num_steps": self.num_steps, "peak": self.peak,
            **({} if self.owned else {"first": self._first, "num_beyond": self._num_beyond}),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, after the scheduler's; nothing known: rates are not lowered."""
        self.factor, self.num_epochs = float(state.get("factor", 1.0)), int(state.get("num_epochs", 0))
        self.in_epoch, self._rates = bool(state.get("in_epoch", False)), [float(r) for r in state.get("rates", ())]
        self.num_steps, self.peak = int(state["num_steps"]), float(state["peak"])
        self._first, self._num_beyond = int(state.get("first", self._first)), int(state.get("num_beyond", 0))
        self.resynchronize()


def count_of(scheduler: Any) -> int | None:
    """How often a schedule was stepped by its own count; None if it has none.

    Wrappers (``.scheduler``) and chains (``._schedulers``) without a count of their own are looked into.
    """
    for _ in range(MAX_DEPTH):
        for name in ("last_epoch", "_step_count"):
            count = getattr(scheduler, name, None)
            if isinstance(count, int):
                return count
        inner = getattr(scheduler, "_schedulers", None)
        scheduler = inner[0] if isinstance(inner, list | tuple) and inner else getattr(scheduler, "scheduler", None)
    return None


def _falls(scheduler: Any, last: int, *, planned: bool) -> bool:
    """Whether a schedule's rate falls; of wrappers and chains whether one inside does."""
    for _ in range(MAX_DEPTH):
        inner = getattr(scheduler, "_schedulers", None)
        if isinstance(inner, list | tuple) and inner:
            return any(_falls(one, last, planned=False) for one in inner)  # the end is another one's position
        if not hasattr(scheduler, "scheduler"):
            break
        scheduler = scheduler.scheduler
    if isinstance(scheduler, ConstantLR):
        return False
    if isinstance(scheduler, LinearLR):
        return scheduler.end_factor < scheduler.start_factor
    if isinstance(scheduler, StepLR | MultiStepLR | ExponentialLR):
        return scheduler.gamma < 1
    if not isinstance(scheduler, LambdaLR):
        return scheduler is not None
    factor, now = scheduler.lr_lambdas[0], scheduler.last_epoch
    try:
        if planned:
            return float(factor(last)) < HALF * max(float(factor(now)), float(factor(last // 2)))
        factors = [float(factor(now + int(GRID**k))) for k in range(int(math.log(FAR, GRID)) + 1)]
    except Exception:  # a table that ends, say: nobody makes one for a constant
        return True
    highest = accumulate(factors, max)
    return any(factor < HALF * peak for factor, peak in zip(factors, highest, strict=True))


def copied(rate: Any) -> Any:
    """A copy of a setting: a tensor is written in place."""
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def set_value(group: dict[str, Any], key: str, live: Any, value: Any) -> None:
    """Write a group's setting; a tensor in place, because compiled and captured steps hold it."""
    if isinstance(live, Tensor):
        live.detach().fill_(value)
        value = live
    group[key] = value


#: Settings of a group that schedules write (OneCycleLR the momentum too).
SCHEDULED = ("lr", "initial_lr", "momentum", "betas", "weight_decay")


@contextmanager
def scheduled_settings_stay(optimizer: Optimizer) -> Iterator[None]:
    """A block that puts back an optimizer's state: what a schedule writes stays where the schedule stands."""
    kept = [{k: copied(group[k]) for k in SCHEDULED if k in group} for group in optimizer.param_groups]
    yield
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        for key, value in values.items():
            set_value(group, key, group.get(key), value)


def _put_back(rates: Sequence[tuple[dict[str, Any], Any, Any]]) -> None:
    """Every group's rate as it was: group, the object that stood there, and a copy of it where it was written."""
    for group, live, copied in rates:
        if isinstance(live, Tensor) and copied is not None:
            live.detach().copy_(copied)
        group["lr"] = live
