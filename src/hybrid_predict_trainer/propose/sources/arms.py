"""Which source has its turn: the one that lowers the logarithm of the loss fastest, per second of this run.

Each source is an arm, and so are plain steps.  They take turns in blocks; at the end of a block its arm's rate is the
fall of log L per second.  The arm of the highest rate goes on.  The others are tried again, and what that may cost is
bounded: a block that is a trial takes a stated share of the time that the run has taken so far, or one proposal where
that takes longer, and no trial of the same arm begins before the run has gone on for :data:`WAIT` times its length,
twice that after another one that was lost, and so on.  A first trial waits until what it is predicted to cost is a
stated share of what was spent, and is not made where it is more than a share of what is left of the plan: on large
problems a factorisation may take longer than the whole run, and what is found at its end is of no use.

Closed form speeds up while its damping falls, quasi-Newton steps do not, and from raw weights they may end in spurious
solutions between the points (LOG.md): its rate counts :data:`ADVANTAGE` times, and so does the latter share.

Rates fall in the course of a run.  A rate of earlier is a promise, not a measurement: where the leader has become
slower than what another arm once was, that one is due after :data:`EARLY_WAIT` times its last trial, and is measured
again.

Time is counted: an arm's seconds are its forwards times the price of one.  That price is 1 for all of them, so that a
run comes to the same wherever and beside whatever it is made, or it is measured at an arm's first calls (the least of
:data:`CALLS` of them, since a busy machine only ever adds) and held.  All decisions follow from numbers that a
checkpoint holds, and a resumed run decides alike.

Sources: Gagliolo & Schmidhuber, Learning dynamic algorithm portfolios, Ann. Math. Artif. Intell. 47, 2006.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ...records import StateDict

#: Real steps of the base optimizer, as an arm.
PLAIN = "plain"
#: Length of a block, as a share of the time that the run has taken; that of a first trial is as long as it may cost.
BLOCK = 0.05
#: Time that passes before a trial that was lost is repeated, in lengths of the trial; longest multiple of it.
WAIT, MOST_LOST = 10.0, 4.0
#: The same where the leader has become slower than the arm was.
EARLY_WAIT = 2.0
#: Most that a first trial may be predicted to take, as a share of the time that the run has taken; where nothing but
#: plain steps is known.
FIRST_SHARE, FIRST_OF_ALL = 0.25, 1.0
#: Most that it may be predicted to take, as a share of the time that is left of the plan; all where plain steps lead.
LEFT_SHARE = 0.25
#: While an arm of advantage leads, the share that a first trial may take, unless its rate has fallen to so much of its
#: best one.
SHARE_BESIDE, STALLED = 0.1, 1 / 3
#: What a rate counts, and that share.
ADVANTAGE = {"gauss_newton": 3.0}
#: Weight of the newest block in the rate of an arm that goes on.
NEWEST = 0.5
#: Calls that an arm's price is the least of.
CALLS = 3


@dataclass(slots=True)
class Arm:
    """What is known of an arm.

    Attributes:
        prices: Seconds per forward, of its first calls.
        rate: Fall of log L per second in its last block; None: never tried.
        best: Highest rate so far.
        expected: Forwards that its least proposal takes, as predicted or as measured.
        due, due_early: Time from which on it is tried again; where the leader has fallen behind its rate.
        lost: Multiple of the wait, should it lose.
        spent: Seconds so far.
        dropped: It has raised.
    """

    prices: list[float] = field(default_factory=list)
    rate: float | None = None
    best: float = 0.0
    expected: float = math.nan
    due: float = 0.0
    due_early: float = 0.0
    lost: float = 1.0
    spent: float = 0.0
    dropped: bool = False


class Arms:
    """Turns of arms; pure numbers, no clock of its own.

    Attributes:
        timed: Prices are measured; else every forward costs 1.
        current: Whose turn it is.
        leader: Who had the highest rate.
        elapsed: Seconds so far, all arms together.
        arms: By name; plain steps are among them.
        end: Elapsed seconds at which the plan ends; infinite where there is none.
    """

    def __init__(self, names: Sequence[str], *, timed: bool = True) -> None:
        """Plain steps begin.

        Args:
            names: Of the sources, in the order in which they are tried first where several may be.
            timed: Measure prices.
        """
        self.timed = timed
        self.arms = {name: Arm() for name in (*names, PLAIN)}
        self.current = self.leader = PLAIN
        self.elapsed, self.end = 0.0, math.inf
        self._used = self._gain = 0.0  # of the block: seconds, fall of log L
        self._room = 0.0  # seconds of the block

    # ---- measurements ------------------------------------------------------------------------------------

    def measures(self, name: str) -> bool:
        """Whether the seconds of this arm's next call are of interest."""
        return self.timed and len(self.arms[name].prices) < CALLS

    def add_seconds(self, name: str, seconds: float, forwards: float) -> None:
        """A call of an arm took so long, and was worth so many forwards."""
        if self.measures(name) and forwards > 0 and math.isfinite(seconds):
            self.arms[name].prices.append(max(seconds, 0.0) / forwards)

    def price(self, name: str) -> float:
        """Seconds per forward; that of plain steps where nothing is known, and 1 where nothing at all is."""
        if not self.timed:
            return 1.0
        prices = self.arms[name].prices or self.arms[PLAIN].prices
        return min(prices) if prices and min(prices) > 0 else 1.0

    def expect(self, name: str, forwards: float) -> None:
        """The least proposal of an arm takes so many forwards."""
        self.arms[name].expected = forwards

    def plan(self, forwards: float) -> None:
        """So many forwards are left of the run."""
        self.end = self.elapsed + forwards * self.price(PLAIN)

    @property
    def room_forwards(self) -> float:
        """Forwards that are left of the block at the price of its arm."""
        return max(self._room - self._used, 0.0) / self.price(self.current)

    # ---- turns -------------------------------------------------------------------------------------------

    def note(self, gain: float, forwards: float, *, over: bool = False) -> None:
        """The current arm has lowered log L by ``gain`` for so many forwards.

        Args:
            gain: At least 0.
            forwards: Spent.
            over: Nothing more is to be had here; the block ends.
        """
        seconds, arm = forwards * self.price(self.current), self.arms[self.current]
        self.elapsed += seconds
        arm.spent += seconds
        self._used += seconds
        self._gain += max(gain, 0.0)
        if over or self._used >= self._room:
            rate = self._gain / self._used if self._used > 0 else 0.0
            goes_on = arm.rate is not None and self.current == self.leader
            arm.rate = NEWEST * rate + (1 - NEWEST) * (arm.rate or 0.0) if goes_on else rate
            arm.best = max(arm.best, arm.rate)
            self._turn()

    def on_idle(self, forwards: float) -> None:
        """Time that belongs to no arm: real steps before there is anything to choose, and between proposals."""
        self.elapsed += forwards * self.price(PLAIN)

    def drop(self, name: str) -> None:
        """This arm has raised, and is not asked any more."""
        self.arms[name].dropped = True
        self.arms[name].rate = None
        if self.current == name:
            self._turn()

    @property
    def left(self) -> list[str]:
        """Sources that have not been dropped."""
        return [name for name, arm in self.arms.items() if not arm.dropped and name != PLAIN]

    def choose(self) -> str:
        """Whose turn it is, now that more time may have passed: a first trial need not wait for the block's end."""
        if self.current == PLAIN and self._untried():
            self._begin(self._untried()[0], self._first_share)
        return self.current

    def pass_over(self) -> bool:
        """The current arm has turned out to be too dear for a first trial now; returns whether another one has it."""
        if self.arms[self.current].rate is not None:
            return True
        if self._may(self.current):
            if self._used == 0:  # the block may have begun before that was known
                self._begin(self.current, self._first_share)
            return True
        untried = self._untried()
        self._begin(untried[0] if untried else self.leader, self._first_share)
        return self.current != PLAIN

    def take(self, name: str) -> None:
        """It is this source's turn, whatever the rates."""
        self._begin(name, BLOCK)

    def _untried(self) -> list[str]:
        return [name for name in self.left if self.arms[name].rate is None and self._may(name)]

    def _may(self, name: str) -> bool:
        """Whether an arm's first trial is predicted to cost no more than its shares."""
        seconds = self.arms[name].expected * self.price(name)
        of_left = FIRST_OF_ALL if self.leader == PLAIN else LEFT_SHARE * ADVANTAGE.get(name, 1.0)
        may = seconds <= self._first_share * self.elapsed and seconds <= of_left * (self.end - self.elapsed)
        return not math.isfinite(seconds) or may

    @property
    def _first_share(self) -> float:
        """Of the time that the run has taken, that a first trial may take."""
        if self.leader == PLAIN:
            return FIRST_OF_ALL
        head = self.arms[self.leader]
        goes_well = self.leader in ADVANTAGE and (head.rate or 0.0) > STALLED * head.best
        return SHARE_BESIDE if goes_well else FIRST_SHARE

    def _turn(self) -> None:
        """A block has ended: who is next."""
        last, now = self.current, self.elapsed
        rates = {
            n: a.rate * ADVANTAGE.get(n, 1.0) for n, a in self.arms.items() if a.rate is not None and not a.dropped
        }  # fmt: skip
        leads = rates.get(self.leader)
        if last != self.leader and last in rates:  # a trial
            arm = self.arms[last]
            if leads is None or rates[last] > leads:
                former, self.leader, arm.lost = self.arms[self.leader], last, 1.0
                former.due, former.due_early = now + WAIT * BLOCK * now, now  # as soon as this one has become slower
            else:
                self._rest(last)
                arm.lost = min(2 * arm.lost, MOST_LOST)
        elif self.leader not in rates:
            self.leader = max(rates, key=lambda n: rates[n]) if rates else PLAIN
        leads = rates.get(self.leader, 0.0)
        if untried := self._untried():
            self._begin(untried[0], self._first_share)
            return
        due = [
            n for n, rate in rates.items() if n != self.leader
            and (now >= self.arms[n].due or (now >= self.arms[n].due_early and rate > leads))
        ]  # fmt: skip
        self._begin(max(due, key=lambda n: (rates[n], -self.arms[n].due)) if due else self.leader, BLOCK)

    def _rest(self, name: str) -> None:
        length = max(self._used, BLOCK * self.elapsed)
        self.arms[name].due_early = self.elapsed + EARLY_WAIT * length
        self.arms[name].due = self.elapsed + WAIT * length * self.arms[name].lost

    def _begin(self, name: str, share: float) -> None:
        self.current, self._used, self._gain = name, 0.0, 0.0
        self._room = share * self.elapsed
        if self.arms[name].rate is None and math.isfinite(self.arms[name].expected):
            self._room = max(self._room, self.arms[name].expected * self.price(name))

    # ---- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "current": self.current, "leader": self.leader, "elapsed": self.elapsed, "end": self.end,
            "used": self._used, "gain": self._gain, "room": self._room,
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.current, self.leader, self.elapsed = state["current"], state["leader"], state["elapsed"]
        self.end = state.get("end", math.inf)  # states of before it was held have none
        self._used, self._gain, self._room = state["used"], state["gain"], state["room"]
        self.arms = {name: Arm(**{**v, "prices": list(v["prices"])}) for name, v in state["arms"].items()}
