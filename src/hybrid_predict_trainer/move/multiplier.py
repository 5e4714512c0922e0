"""Bookkeeping of the learning-rate multiplier m: when it is raised, when a raise is settled, when it goes back.

Cosines and losses come in, advice comes out.  The caller keeps the state of a raise's start and puts it back
(:mod:`..cycle.withdrawal`); :mod:`.lr_multiplier` measures and applies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ..numerics.sequential import Moments, mean, spent, variance
from ..records import StateDict
from .edge_test import Edge, locate

#: Factor of one raise in the slow start.  At 2 per 5 to 10 steps a rate that is 10 times too small is made up for in 20
#: to 40 steps; what that overshoots group warm-up takes back, group by group.
GROWTH = 2.0
#: Where the rate was below the edge at the start, the edge itself moves: a network trained at it grows flatter.
#: There m follows, by this factor and to so many times its value at the edge.
CREEP, ROOM = 1.3, 2.0
#: Level of one test in the slow start, where a wrong raise is soon seen, and of all later ones together.
LEVEL, CREEP_LEVEL = 0.05, 0.05
#: Checks after which a raise is settled, and how many standard errors of the smoothed loss count as worse.
PATIENCE = 4
SIGMAS = 2.0
#: Checks before the first cosine counts.  In the first steps of any training h is as negative at a rate three times too
#: high as at a tenth of the best one (LOG.md).
FIRST_CHECKS = 4
#: Largest factor in the slow start that the loss has not been asked about.
MOST_UNSETTLED = GROWTH**2
#: Cosines of one look at what a raise has led to, and those that count for nothing before it: while the optimizer's
#: averages and the weights answer to the new length, h still is that of the old one.
NUM_ARRIVED, NUM_UNSTEADY = 24, 10
#: Least m that is halved on the word of h.  It is as positive at the best rate as at two or three times it (LOG.md):
#: halved further, m lost what it had won where twice the rate was better.  Steps of SGD grow with the gradient, where
#: those of Adam do not: there twice the best rate is beyond the edge, h says so, and m may go back to 1 (LOG.md).
UNTOLD, UNTOLD_BY_SGD = GROWTH, 1.0
#: Looks at one raise at most: a bound may hold m below the edge for as long as the run lasts.
MAX_LOOKS = 10
#: Takebacks after which m is 1 for good.  One is enough to end all raises (``learning`` is False from there on), so a
#: second can only meet what an earlier, settled raise has left: it is a bound that a run hardly ever reaches.
MAX_TAKEN_BACK = 2
#: A rate that moves by less than this share between checks does not rise: rounding only, because a warm-up rises by
#: the less from check to check the longer it is.  Below ``PEAK_SHARE`` of its peak a rate falls.
STILL, PEAK_SHARE = 1e-9, 0.97
#: Factor over the largest of the last losses that is no swing any more, where losses are exact.
EXPLOSION = 4.0
#: What groups of an optimizer say that makes its steps orthogonal, in torch's, pytorch_optimizer's and Keller Jordan's.
NEWTON_SCHULZ = {"adjust_lr_fn", "ns_steps", "ns_coefficients"}
#: Parts of the names of optimizers that estimate their step size (those that keep the estimate in ``d`` need none).
OWN_RATE = ("dadapt", "prodigy", "mechanic", "adamg")
#: Losses at either end that are compared to see whether the loss has fallen yet.
NUM_ENDS = 5


def orthogonalizes(optimizer: Any) -> bool:
    """Whether an optimizer makes its steps orthogonal, as Muon and its kin do, or holds one that does.

    Their steps have the same length in every direction, so that h says nothing of how long they should be: Muon at its
    usual rate on small images was raised to 8 times it and ended 6 % higher (LOG.md).  Known by its name, or by its
    groups, which stay what they are in a wrapper of any name.
    """
    held = [v for v in vars(optimizer).values() if hasattr(v, "param_groups")]
    named = any("muon" in kind.__name__.lower() for o in (optimizer, *held) for kind in type(o).__mro__)
    return named or any(group.get("use_muon") or NEWTON_SCHULZ & group.keys() for group in optimizer.param_groups)


def chooses_its_rate(optimizer: Any) -> bool:
    """Whether an optimizer estimates its own step size, as D-Adaptation and Prodigy do, or holds one that does.

    Its ``lr`` is a factor of that estimate, which grows by itself for as long as steps are too short: raised as well it
    is double (LOG.md).  Known by the estimate that its groups hold, or by its name.
    """
    held = [v for v in vars(optimizer).values() if hasattr(v, "param_groups")]
    kinds = [kind.__name__.lower() for o in (optimizer, *held) for kind in type(o).__mro__]
    named = any(name in kind for kind in kinds for name in OWN_RATE)
    return named or any("lr" in group and "d" in group for group in optimizer.param_groups)


class Advice(StrEnum):
    """What follows from a check."""

    NOTHING = "nothing"
    RAISED = "raised"  # m is larger from the next step on: keep the state as it is now
    SETTLED = "settled"  # the raise stays: its start is needed no more
    TAKEN_BACK = "taken_back"  # m is what it was: put the kept state back


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a check looks at.

    Attributes:
        lr: The schedule's learning rate, without m.
        loss: Smoothed training loss, or the smoothed loss that stands for it.
        noise: Its standard error.
        newest: Losses of the last steps, newest last.
        exact: Whether losses have no noise: every batch is the same.
        allowed: Whether a raise may be made now.
    """

    lr: float
    loss: float
    noise: float
    newest: Sequence[float]
    exact: bool = False
    allowed: bool = True


@dataclass(slots=True)
class Account:
    """A raise that is not settled yet."""

    checks_left: int
    value: float  # m before it
    loss: float  # smoothed, before it
    ceiling: float  # largest of the last losses before it


class Multiplier:
    """m and what it rests on."""

    def __init__(self, maximum: float, *, pretrained: bool = False) -> None:
        """Nothing is known yet.

        Args:
            maximum: Bound on m; 1: no raises.
            pretrained: The weights are known to have been trained before.  A mean of h below zero is evidence enough
                then: it vanishes at the best rate (measured at batches of 2 to 16; LOG.md), where that of a new
                network stays below zero for hundreds of steps whatever the rate.
        """
        self._enough = (Edge.SHORT, Edge.SHORT_IN_NOISE) if pretrained else (Edge.SHORT,)
        self._least_halved = UNTOLD  # bound from below on a value that is halved
        self.value = 1.0
        self.cap = maximum
        self.touched = False  # the edge of stability has been seen
        self.num_raises = 0
        self.num_taken_back = 0
        self.best = math.inf  # lowest smoothed loss
        self.peak_lr = 0.0
        self.account: Account | None = None
        self.learning = False  # the rate does not rise, and there is room to grow
        self.arrived = True  # no raise is waiting to be seen to end above the bottom
        self._last_lr = math.nan
        self._num_checks = 0
        self._num_tests = 0  # after the edge
        self._arrivals = Moments()  # h since the last change of m, or the last look at it
        self._num_unsteady = 0  # cosines that still count for nothing
        self._num_looks = 0  # at the last change of m
        self._first: list[float] = []  # losses of the first steps
        self._fallen = False  # the loss has been below them

    # ---- losses -------------------------------------------------------------------------------------

    def watch(self, reading: Reading) -> Advice:
        """After every real step: where losses are exact a raise that makes the loss rise ends at once."""
        newest = reading.newest
        if newest and len(self._first) < NUM_ENDS:
            self._first.append(newest[-1])
        if self.value == 1.0 or not reading.exact or len(newest) < 2:
            return Advice.NOTHING
        account = self.account
        ceiling = explosion(newest[:-1]) if account is None else account.ceiling
        return Advice.NOTHING if newest[-1] <= ceiling else self.take_back()

    def settle(self, reading: Reading) -> Advice:
        """At a check: judge the open raise by the loss that is left some checks later."""
        if reading.loss < self.best:
            self.best = reading.loss
        account = self.account
        if account is None:
            return Advice.NOTHING
        account.checks_left -= 1
        if account.checks_left > 0:
            return Advice.NOTHING
        limit = min(account.loss, self.best) + SIGMAS * reading.noise
        if not reading.loss <= limit:  # also when it is not a number
            return self.take_back()
        self.account = None
        return Advice.SETTLED

    def take_back(self, *, for_good: bool = False) -> Advice:
        """m as it was before the open raise (without one: 1), and never more; 1 for good if it happens again."""
        before = 1.0 if self.account is None else self.account.value
        self.num_taken_back += 1
        if for_good or self.num_taken_back >= MAX_TAKEN_BACK:
            before = 1.0
        self.cap = self.value = before
        self.account = None
        self.learning, self.arrived = False, True
        return Advice.TAKEN_BACK

    def level(self) -> None:
        """1 from here on, without a word on what m did."""
        self.value = self.cap = 1.0
        self.account = None
        self.learning, self.arrived = False, True

    def begin_anew(self) -> None:
        """Weights of before have come back on somebody else's account: losses since are no measure, nor a raise."""
        if self.account is not None:
            self.value, self.account = self.account.value, None
        self.best = math.inf

    def has_fallen(self, reading: Reading) -> bool:
        """Whether the loss has ever stood below its beginning, by more than chance allows; remembered.

        Under noise it is a test of ``SIGMAS`` standard errors that is made again at every check until it is passed, so
        over many checks chance passes it more often than at its level.  It only opens the door to raises: each has
        evidence of its own, which is valid at every look.
        """
        if not self._fallen and len(self._first) == NUM_ENDS and len(reading.newest) >= NUM_ENDS:
            newest = list(reading.newest)[-NUM_ENDS:]
            error = math.sqrt((variance(self._first) + variance(newest)) / NUM_ENDS)
            drop = mean(self._first) - mean(newest)
            self._fallen = drop > 0 if reading.exact else drop > SIGMAS * error
        return self._fallen

    # ---- raises -------------------------------------------------------------------------------------

    def follow(self, lr: float) -> bool:
        """Take the schedule's rate at a check; returns whether m may be decided on."""
        self._num_checks += 1
        last, self._last_lr = self._last_lr, lr
        self.peak_lr = max(self.peak_lr, lr)
        rising = not lr <= last * (1 + STILL)  # at the first check too
        falling = lr < self.peak_lr * PEAK_SHARE
        allowed = not rising and not (self.touched and falling) and self._num_checks >= FIRST_CHECKS
        self.learning = (allowed and self.value < self.cap) or not (self.arrived or rising)
        return allowed

    def decide(self, cosines: Moments, reading: Reading) -> tuple[Advice, bool]:
        """Raise m, call the edge touched, or wait.

        Args:
            cosines: Moments of h since the last decision.
            reading: Of this check.

        Returns:
            The advice, and whether the cosines were decided on and a new test begins.
        """
        if not self.touched:
            edge = locate(cosines, LEVEL)
            if edge in self._enough and self._must_settle(reading):
                return Advice.NOTHING, True
            if edge in self._enough:
                return self._raise(GROWTH, reading)
            if edge is not Edge.UNKNOWN:
                self._touch(exact=reading.exact)
                return Advice.NOTHING, True
            return Advice.NOTHING, False
        edge = locate(cosines, spent(CREEP_LEVEL, self._num_tests + 1), patient=True)
        if edge is Edge.UNKNOWN:
            return Advice.NOTHING, False
        short = edge is Edge.SHORT or edge is Edge.SHORT_IN_NOISE
        advice, decided = self._raise(CREEP, reading) if short else (Advice.NOTHING, True)
        self._num_tests += decided
        return advice, decided

    def _must_settle(self, reading: Reading) -> bool:
        """Whether the open raise is as large as one may be before the loss is asked; exact losses are asked at once."""
        return self.account is not None and not reading.exact and self.value >= MOST_UNSETTLED * self.account.value

    def halve_down_to(self, least: float) -> None:
        """Bound from below on a value that is halved."""
        self._least_halved = least

    def arrive(self, cosines: Sequence[float]) -> None:
        """Halve m where the steps that raises have led to end beyond the bottom; ends once they do so no more.

        A raise is decided on by few steps, of a network whose curvature still grows: when the raise shows in h, m may
        be far beyond the edge, and the loss, which falls fastest at first, does not say so for hundreds of steps.
        While h is significantly negative it is looked at again, ``MAX_LOOKS`` times: the edge is not there yet.

        Args:
            cosines: h of the steps since the last check.
        """
        if self.arrived:
            return
        skipped = min(self._num_unsteady, len(cosines))
        self._num_unsteady -= skipped
        self._arrivals.push(cosines[skipped:])
        if self._arrivals.num < NUM_ARRIVED:
            return
        found = locate(self._arrivals, LEVEL)
        self._num_looks += 1
        if self._arrivals.mean > 0:
            self.value = max(self.value / GROWTH, self._least_halved)
            self.cap = min(self.cap, ROOM * self.value)
            if self.account is not None:
                self.account = replace(self.account, value=min(self.account.value, self.value))
            self._await_arrival()
        elif found is Edge.NEAR or self._num_looks >= MAX_LOOKS:
            self.arrived = True
        self._arrivals = Moments()

    def _await_arrival(self, *, exact: bool = False) -> None:
        self.arrived = exact or self.value <= self._least_halved  # where losses are exact they have judged the raise
        self._arrivals, self._num_unsteady, self._num_looks = Moments(), NUM_UNSTEADY, 0

    def _touch(self, *, exact: bool = False) -> None:
        self.touched = True
        self.cap = min(self.cap, ROOM * self.value)
        self._await_arrival(exact=exact)

    def _raise(self, factor: float, reading: Reading) -> tuple[Advice, bool]:
        if not reading.allowed or not self.has_fallen(reading):
            return Advice.NOTHING, not reading.allowed  # the evidence stands until the loss has fallen
        if self.value >= self.cap:
            return Advice.NOTHING, True
        first = self.account is None
        if first:
            ceiling = max(list(reading.newest)[-NUM_ENDS:])
            self.account = Account(PATIENCE, self.value, reading.loss, ceiling)
        self.value = min(self.value * factor, self.cap)
        self.num_raises += 1
        if self.touched or self.value >= self.cap:
            self._await_arrival(exact=reading.exact)
        self.learning = self.learning and (self.value < self.cap or not self.arrived)
        return (Advice.RAISED if first else Advice.NOTHING), True

    # ---- state --------------------------------------------------------------------------------------

    _NAMES = (
        "value", "cap", "touched", "num_raises", "num_taken_back", "best", "peak_lr", "learning",
        "_last_lr", "_num_checks", "_num_tests", "_fallen", "arrived",
        "_num_unsteady", "_num_looks",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """Plain numbers and the open account."""
        a = self.account
        state: StateDict = {name.lstrip("_"): getattr(self, name) for name in self._NAMES}
        account = None if a is None else [a.checks_left, a.value, a.loss, a.ceiling]
        seen = self._arrivals
        arrivals = [seen.num, seen.mean, seen.squares]
        return {**state, "first": list(self._first), "account": account, "arrivals": arrivals}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name.lstrip("_")])
        self._first = [float(v) for v in state["first"]]
        num, mean_, squares = state["arrivals"]
        self._arrivals = Moments(int(num), float(mean_), float(squares))
        a = state["account"]
        self.account = None if a is None else Account(int(a[0]), float(a[1]), float(a[2]), float(a[3]))


def explosion(losses: Sequence[float]) -> float:
    """The loss from which on it is no swing any more; losses may be negative."""
    largest = max(losses)
    return largest + (EXPLOSION - 1) * abs(largest)
