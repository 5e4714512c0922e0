"""Searches over recorded runs: what each way of stopping spends, and what it finds.

Nothing is trained: a trial "trains" by having more of its recorded rows read.  One problem is a random order of a
random three quarters of a grid, so that ways whose result does not hang on the order still meet different problems.
A search spends CPU seconds as they were recorded; its regret is how much worse its best complete trial ends than the
best of the problem.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...sweeps.allocate import Rules, first_look, next_slice, wants_new
from ...sweeps.curves import LATE, LOOKS, TrialCurve
from ...sweeps.decide import bar_of, cannot_win
from ...sweeps.joint import ends_jointly, spread_first
from ...sweeps.looks import spent_at_a_look
from .grids import Trial

#: A regret that counts as none.
REGRET = 0.002
RATE_NAMES = ("lr", "schedule")
KEPT = 0.75
QUARTER = 0.25
#: Trials of a search that are begun before any is preferred.
FIRST = 6


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one search.

    Attributes:
        spent: CPU seconds over those of running all trials.
        regret: relative; infinite where no trial was completed.
        winner_stopped: the best trial of the problem was stopped.
        found_after: share of the compute at which the first trial within :data:`REGRET` was complete; 1 where none was.
        quarter: the regret if the search had ended at a quarter of the compute.
    """

    spent: float
    regret: float
    winner_stopped: bool
    found_after: float
    quarter: float


class Book:
    """What a search has spent and found so far."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        """Args: trials: of the problem."""
        self._trials = trials
        self._total = sum(trial.cost for trial in trials)
        self._best = min(trial.final for trial in trials)
        self.rows = [0] * len(trials)
        self.spent, self.found, self.found_after, self.quarter = 0.0, math.inf, 1.0, math.inf

    def read(self, i: int, rows: int) -> None:
        """A trial has trained until a row."""
        trial = self._trials[i]
        rows = min(rows, len(trial.at))
        self.spent += (
            trial.cost * float(trial.at[rows - 1] - (trial.at[self.rows[i] - 1] if self.rows[i] else 0)) / trial.steps
        )
        self.rows[i] = rows
        if math.isfinite(trial.final) and rows == len(trial.at):
            self.found = min(self.found, trial.final)
            if self.spent <= QUARTER * self._total:
                self.quarter = self.found
            if trial.final <= self._best * (1 + REGRET):
                self.found_after = min(self.found_after, self.spent / self._total)

    def outcome(self) -> Outcome:
        """At the end."""
        winner = min(range(len(self._trials)), key=lambda i: self._trials[i].final)
        return Outcome(
            self.spent / self._total, self.found / self._best - 1, self.rows[winner] < len(self._trials[winner].at),
            self.found_after, self.quarter / self._best - 1,
        )  # fmt: skip


def problem(trials: Sequence[Trial], seed: int, kept: float = KEPT) -> list[Trial]:
    """A random part of a grid, in random order."""
    rng = random.Random(seed)
    return rng.sample(list(trials), max(2, round(kept * len(trials))))


def curve_of(key: int, trial: Trial, rows: int) -> TrialCurve:
    """A trial as it is seen after some rows."""
    whole = rows == len(trial.at) and math.isfinite(trial.final)
    reports = list(zip(trial.at[:rows].tolist(), np.log(trial.valid[:rows]).tolist(), strict=True))
    return TrialCurve.of(key, reports, trial.rates, params=trial.params, complete=whole)


def run_all(trials: Sequence[Trial]) -> Outcome:
    """Every trial to its end."""
    book = Book(trials)
    for i, trial in enumerate(trials):
        book.read(i, len(trial.at))
    return book.outcome()


def random_search(trials: Sequence[Trial], share: float) -> Outcome:
    """Trials to their ends, one after another, until a share of the compute is spent."""
    book = Book(trials)
    total = sum(t.cost for t in trials)
    for i, trial in enumerate(trials):
        if i and book.spent + trial.cost > share * total:
            break
        book.read(i, len(trial.at))
    return book.outcome()


def one_by_one(trials: Sequence[Trial], *, confidence: float = 0.95, min_gain: float = REGRET) -> Outcome:
    """What ``HybridPruner`` does where trials come one after another: the same functions, without a study."""
    book, error = Book(trials), spent_at_a_look(confidence)
    seen: list[TrialCurve] = []
    for i, trial in enumerate(trials):
        whole = curve_of(i, trial, len(trial.at))
        rows = len(trial.at)
        for k in range(len(LOOKS) - 1) if seen else ():
            row = int(np.searchsorted(trial.at, LOOKS[k] * trial.steps - 1e-6)) + 1
            if row >= len(trial.at):
                break
            now = curve_of(i, trial, row)
            if max(now.stands, default=-1) != k:
                continue
            curves = [now, *seen]
            ends = ends_jointly(curves, rate_names=RATE_NAMES)
            bar = bar_of(curves, ends, error, [False, *[c.complete for c in seen]])
            if cannot_win(now, ends[0], bar, error, math.log1p(min_gain)):
                rows = row
                break
        book.read(i, rows)
        seen.append(whole if rows == len(trial.at) else curve_of(i, trial, rows))
    return book.outcome()


def freeze_thaw(
    trials: Sequence[Trial], *, share: float = 1.0, first: int = FIRST, confidence: float = 0.95,
    min_gain: float = REGRET,
) -> Outcome:  # fmt: skip
    """What ``hpt sweep`` does: the most promising trial goes on to its next look.

    Args:
        trials: Of the problem; the search may begin any of them at any time.
        share: Of the compute of all, after which it ends.
        first: Trials that are begun before any is preferred, as different from one another as can be.
        confidence: Of stopping.
        min_gain: Of stopping.
    """
    book = Book(trials)
    rules = Rules(error=spent_at_a_look(confidence), min_gain=math.log1p(min_gain), rate_names=RATE_NAMES)
    curves = [curve_of(i, trial, 0) for i, trial in enumerate(trials)]
    alive, new = [True] * len(trials), set(range(len(trials)))

    def go_on(i: int, until: float) -> None:
        new.discard(i)
        _read(book, curves, alive, i, trials[i], until)

    for i in spread_first(curves, first, RATE_NAMES):
        go_on(i, LOOKS[first_look(curves[i])] * trials[i].steps)
    total = sum(trial.cost for trial in trials)
    while book.spent < share * total:
        step, stop, _ = next_slice(curves, alive, rules, new=sorted(new))
        for i in stop:
            alive[i] = False
        if step is None:
            break
        done = min(step.until / trials[step.index].steps, 1.0) - curves[step.index].share
        if book.spent + done * trials[step.index].cost > share * total + 1e-9:
            break
        go_on(step.index, step.until)
    return book.outcome()


def one_at_a_time(trials: Sequence[Trial], *, share: float, first: int = FIRST, forecast: bool = False) -> Outcome:
    """As :func:`freeze_thaw` where new trials are given one at a time, as ``hpt sweep`` asks for them.

    Args:
        trials: Of the problem; the first ones, and where forecasts have no say all, come in this order.
        share: Of the compute of all, after which it ends.
        first: Trials that are begun before any is preferred.
        forecast: Later ones are those that are foretold to end best, of all that are left (``--sampler joint``).
    """
    book = Book(trials)
    rules = Rules(error=spent_at_a_look(0.95), min_gain=math.log1p(REGRET), rate_names=RATE_NAMES)
    curves = [curve_of(i, trial, 0) for i, trial in enumerate(trials)]
    alive, total = [True] * len(trials), sum(trial.cost for trial in trials)
    begun: list[int] = []
    while True:
        step, stop, ends = next_slice([curves[i] for i in begun], [alive[i] for i in begun], rules)
        for k in stop:
            alive[begun[k]] = False
        left = [i for i in range(len(trials)) if i not in begun]
        if left and (len(begun) < first or wants_new(ends, None if step is None else step.index)):
            i = left[0]
            if forecast and len(begun) >= first:
                told = ends_jointly([curves[j] for j in (*begun, *left)], rate_names=RATE_NAMES)[len(begun) :]
                i = left[min(range(len(left)), key=lambda k: told[k].mean)]
            until = LOOKS[first_look(curves[i])] * trials[i].steps
        elif step is not None:
            i, until = begun[step.index], float(step.until)
        else:
            break
        done = min(until / trials[i].steps, 1.0) - curves[i].share
        if book.spent + done * trials[i].cost > share * total + 1e-9:
            break
        if i in left:
            begun.append(i)
        _read(book, curves, alive, i, trials[i], until)
    return book.outcome()


def lowest_first(trials: Sequence[Trial]) -> Outcome:
    """As :func:`freeze_thaw` without forecasts: whichever trial shows the lowest loss goes on, and none is stopped.

    It ends where the first trial within :data:`REGRET` is complete, which a search would not know: only
    ``found_after`` and ``quarter`` say something.
    """
    book = Book(trials)
    curves = [curve_of(i, trial, 0) for i, trial in enumerate(trials)]
    alive = [True] * len(trials)
    for i, trial in enumerate(trials):
        _read(book, curves, alive, i, trial, LOOKS[first_look(curves[i])] * trial.steps)
    while any(alive) and (book.found_after == 1.0 or not math.isfinite(book.quarter)):
        going = [i for i, a in enumerate(alive) if a]
        chosen = min(going, key=lambda i: float(curves[i].values[-1]) if len(curves[i].values) else -math.inf)
        share = curves[chosen].share
        until = next(look for look in LOOKS if look > share + LATE) if share < 1 - LATE else 1.0
        _read(book, curves, alive, chosen, trials[chosen], until * trials[chosen].steps)
    return book.outcome()


def foretold(trials: Sequence[Trial], at: float, error: float, seed: int) -> float:
    """Share of the compute after which the best is complete, with forecasts that are this good.

    All trials train until a share of their runs; then they are completed in the order of forecasts that are their ends
    with normal errors.

    Args:
        trials: Of the problem.
        at: Share of a run.
        error: Standard deviation of the forecasts, of the loss's logarithm.
        seed: Of the errors.
    """
    ends = np.log([min(trial.final, 1e30) for trial in trials])
    order = np.argsort(ends + error * np.random.default_rng(seed).standard_normal(len(ends)))
    total, best = sum(trial.cost for trial in trials), math.log1p(REGRET) + float(ends.min())
    upto = next(k for k, i in enumerate(order) if ends[i] <= best) + 1
    share = sum(trials[i].cost for i in order[:upto]) / total
    return float(at + (1 - at) * share)


def _read(book: Book, curves: list[TrialCurve], alive: list[bool], i: int, trial: Trial, until: float) -> None:
    rows = min(int(np.searchsorted(trial.at, until - 1e-6)) + 1, len(trial.at))
    book.read(i, rows)
    curves[i] = curve_of(i, trial, rows)
    if rows == len(trial.at):
        alive[i] = False


def with_optuna(trials: Sequence[Trial], pruner: Any, report_every: int = 1) -> Outcome:
    """A pruner of Optuna's (or ours) in a real study, one trial after another."""
    import optuna

    book = Book(trials)
    # a bracket of Hyperband hangs on the study's name, which is random where nobody says one
    name = f"{zlib.crc32(repr([trial.params for trial in trials]).encode()):x}"
    study = optuna.create_study(pruner=pruner, study_name=name)
    for i, trial in enumerate(trials):
        asked = study.ask()
        rows, pruned = len(trial.at), False
        for row in range(report_every - 1, len(trial.at), report_every):
            asked.report(float(trial.valid[row]), int(trial.at[row]))
            if row + 1 < len(trial.at) and asked.should_prune():
                rows, pruned = row + 1, True
                break
        book.read(i, rows)
        if pruned:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        elif math.isfinite(trial.final):
            study.tell(asked, trial.final)
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
    return book.outcome()


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Over problems."""
    spent = np.array([o.spent for o in outcomes])
    return {
        "problems": len(outcomes), "compute": float(spent.mean()), "compute_95": float(np.quantile(spent, 0.95)),
        "regret_met": float(np.mean([o.regret <= REGRET for o in outcomes])),
        "regret_95": float(np.quantile([min(o.regret, 10.0) for o in outcomes], 0.95)),
        "winner_stopped": float(np.mean([o.winner_stopped for o in outcomes])),
        "found_after": float(np.median([o.found_after for o in outcomes])),
        "found_after_95": float(np.quantile([o.found_after for o in outcomes], 0.95)),
        "quarter": float(np.median([min(o.quarter, 10.0) for o in outcomes])),
    }  # fmt: skip


Way = Callable[[Sequence[Trial]], Outcome]
