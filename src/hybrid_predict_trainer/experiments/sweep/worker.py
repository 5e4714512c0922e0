"""One worker of a search: it chooses, trains a slice, reports, and chooses again.

All that is decided rests on the study and on the trials' folders, so that workers need not know of one another, and one
that was killed is missed by nobody: its trial goes on from its last checkpoint under whoever takes it next.  A turn may
be repeated at any point: what was trained is not trained again, and a report that is there already changes nothing.
"""

from __future__ import annotations

import datetime
import enum
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...sweeps.allocate import Rules, kept_for, next_slice, next_stop, wants_new
from ...sweeps.curves import Array, Scale, TrialCurve
from ...sweeps.ends import End
from ...sweeps.looks import optimistic, pessimistic, spent_at_a_look
from ..arms.options import InputError
from ..run_arm import Experiment
from . import storage as storages
from . import trials as runs
from .plan import PLAN, Allowance, Plan, host, sampler_of, schedule_of, seed_of
from .proposals import proposed
from .space import RATE_NAMES
from .storage import StorageError, storage_errors

#: Attributes of a trial: the machine that has its folder, the forecasts before its end, seconds, why it ended.
HOST, FORECASTS, SECONDS, WHY = "host", "forecasts", "seconds", "why"
#: A trial that nobody has taken so long after it was begun was begun by a worker that is no more.
ORPHANED_S = 120.0
#: Trials that have ended and are still learnt from: the newest.  More would cost time and say little.
MOST_ENDED = 64
#: Seconds between two looks where others have all the trials, and between two tries of a storage.
PAUSE_S, MOST_PAUSE_S = 0.5, 10.0


class Turn(enum.Enum):
    """What a turn came to."""

    WORKED = "worked"
    WAITING = "others have all there is to do"
    DONE = "nothing is left to do"


class Worker:
    """Of a search."""

    def __init__(
        self, plan: Plan, setup: Experiment, allowance: Allowance, out: Path, *, url: str | None = None,
        name: str | None = None,
    ) -> None:  # fmt: skip
        """Open the study, or make it.

        Args:
            plan: Of the search.
            setup: What the plan's options come to.
            allowance: What it may use.
            out: Folder of the search.
            url: Of the storage; None: the journal in the folder.
            name: Of the study; None: the folder's.

        Raises:
            InputError: the storage cannot be used, or the study is another search's.
            StorageError: it does not answer.
        """
        self._plan, self._setup, self._allowance, self._out = plan, setup, allowance, out
        self._url, self._name = url, name or out.absolute().name
        self._rules = Rules(
            error=spent_at_a_look(plan.confidence), min_gain=math.log1p(plan.min_gain), rate_names=RATE_NAMES
        )
        self._shapes: dict[int, Any] = {}
        self.status = 0
        with runs.claimed(out, "study", wait=True):
            self.study = self._opened()

    @property
    def steps(self) -> int:
        """Of a run of the plan."""
        return self._setup.steps

    # ---- the study ---------------------------------------------------------------------------------------------

    def _opened(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = self._out / storages.JOURNAL
        lost = self._url is None and not (journal.is_file() and journal.stat().st_size)
        with storage_errors():
            study = optuna.create_study(
                storage=storages.opened(self._url, self._out), study_name=self._name, load_if_exists=True,
                direction="minimize",
            )  # fmt: skip
            then = study.user_attrs.get(PLAN)
            if then is None:
                if study.directions != [optuna.study.StudyDirection.MINIMIZE] or study.get_trials(deepcopy=False):
                    raise InputError(f"the study {self._name!r} is not one of hpt sweep; choose another --study")
                study.set_user_attr(PLAN, self._plan.to_store())
            elif then != self._plan.to_store():
                raise InputError(f"the study {self._name!r} is of another search; choose another --study or --out")
        if lost:
            self._made_anew(study)
        return study

    def _made_anew(self, study: Any) -> None:
        """Begin the trials of a study that is gone again, from their folders; they are trained no second time."""
        for number, notes in runs.kept(self._out):
            while len(study.get_trials(deepcopy=False)) < number:  # its folder is gone as well
                self._end(study, study.ask(), "nothing of it is left", failed=True)
            study.enqueue_trial(notes.get("params", {}))
            trial = study.ask(fixed_distributions=dict(self._plan.space))
            self._introduce(trial)
            for step, loss in runs.reports_of(runs.folder_of(self._out, number)):
                if math.isfinite(loss):
                    trial.report(loss, step)
            why = notes.get("stopped") or notes.get("failed")
            if why:
                self._end(study, trial, why, failed="failed" in notes)

    def _introduce(self, trial: Any) -> None:
        schedule, steps = schedule_of(self._setup, self._plan, trial.params)
        trial.set_user_attr("schedule", schedule)
        trial.set_user_attr("total_steps", steps)
        if "lr" not in trial.params:
            trial.set_user_attr("peak", self._setup.recipe.lr)
        trial.set_user_attr(HOST, host())

    @staticmethod
    def _end(study: Any, trial: Any, why: str, *, failed: bool) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr(WHY, why)
        study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED, skip_if_finished=True)

    # ---- going on ------------------------------------------------------------------------------------------------

    def work(self, tell: Callable[[Worker], None]) -> int:
        """Take turns until nothing is left to do.

        Args:
            tell: Called after every turn.

        Returns:
            0, or the exit status of the signal that has stopped it.

        Raises:
            InputError: the storage has not answered for longer than may be, or no trial can be trained.
        """
        away: float | None = None
        pause = PAUSE_S
        while self.status == 0:
            try:
                turn = self.turn()
                tell(self)
                away = None
            except StorageError as error:
                now = time.monotonic()
                away = now if away is None else away
                if now - away > self._allowance.patience:
                    raise InputError(
                        f"the storage does not answer: {error}; what was trained is kept in {self._out}: the same "
                        "command goes on"
                    ) from None
                turn = Turn.WAITING
            if turn is Turn.DONE:
                break
            if turn is Turn.WAITING:
                time.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_S) if turn is Turn.WAITING else PAUSE_S
        return self.status

    def turn(self) -> Turn:
        """Choose and train one slice.

        Raises:
            StorageError: the storage did not answer; nothing is lost, and the turn may be taken again.
            InputError: the journal is gone, or no trial can be trained.
        """
        if self._url is None and not (self._out / storages.JOURNAL).exists():
            raise InputError(
                f"{self._out / storages.JOURNAL}: is gone; the same command makes it anew from the trials' folders"
            )
        with storage_errors(), ExitStack() as stack:
            found = self.standing()
            self._bury(found)
            if self.spent(found) >= self._allowance.budget:
                return Turn.DONE
            ready, curves, alive, busy = self._ready(found)
            kept = self._kept(found, curves, [a and i not in busy for i, a in enumerate(alive)])
            while True:
                chosen, stop, ends = next_slice(curves, alive, self._rules, busy, only=kept)
                for i in stop:
                    self._stop(found[ready[i]])
                    alive[i] = False
                if kept and chosen is not None and chosen.index in busy:
                    return Turn.WAITING  # the rest of the budget is for the one that another worker has
                if (
                    not kept
                    and self._may_begin(found)
                    and (
                        self._begun(found) < self._plan.first
                        or wants_new(ends, None if chosen is None else chosen.index)
                    )
                ):
                    return self._begin()
                if chosen is None and kept:
                    kept = []  # none of them can win: the rest is for whoever can
                    continue
                if chosen is None:
                    return Turn.WAITING if busy else Turn.DONE
                number = found[ready[chosen.index]].number
                if stack.enter_context(runs.claimed(self._out, f"{number:05d}")):
                    break
                busy.append(chosen.index)
            self._train(number, chosen.until, ends[chosen.index])
            return Turn.WORKED

    def _ready(self, found: Sequence[Any]) -> tuple[list[int], list[TrialCurve], list[bool], list[int]]:
        """Of the trials that count: which of all they are, curves, whether they may go on, which are out of reach."""
        from optuna.trial import TrialState

        scale = Scale.of([v for t in found for v in t.intermediate_values.values()], maximize=False)
        ended = [i for i, t in enumerate(found) if t.state.is_finished() and t.intermediate_values]
        best = min(
            (i for i in ended if found[i].state == TrialState.COMPLETE), key=lambda i: found[i].value, default=-1
        )
        shown = {*ended[-MOST_ENDED:], best}
        ready: list[int] = []
        curves: list[TrialCurve] = []
        alive: list[bool] = []
        busy: list[int] = []
        for i, trial in enumerate(found):
            running = trial.state == TrialState.RUNNING
            if not (running and HOST in trial.user_attrs) and i not in shown:
                continue
            if running and trial.user_attrs[HOST] != host() and not runs.folder_of(self._out, trial.number).exists():
                busy.append(len(ready))
            ready.append(i)
            curves.append(curve_of(trial, scale))
            alive.append(running)
        return ready, curves, alive, busy

    # ---- one trial -----------------------------------------------------------------------------------------------

    def _begin(self) -> Turn:
        """Ask for a trial and train it to its first look."""
        with ExitStack() as stack:
            with runs.claimed(self._out, "ask", wait=True):
                found = self.standing()
                _, curves, alive, _ = self._ready(found)
                if not self._may_begin(found) or self._kept(found, curves, alive):
                    return Turn.WORKED  # another one was quicker
                self.study.sampler = sampler_of(self._plan, len(found), self._url is not None)
                self._propose(found, curves)
                trial = self.study.ask(fixed_distributions=dict(self._plan.space))
                stack.enter_context(runs.claimed(self._out, f"{trial.number:05d}"))
                runs.note(self._out, trial.number, params=trial.params)
                self._introduce(trial)
            now = self._frozen(trial.number)
            curve = TrialCurve.of(trial.number, [], rates_of(now), params=trial.params)
            self._train(trial.number, next_stop(curve), None)
        return Turn.WORKED

    def _propose(self, found: Sequence[Any], curves: Sequence[TrialCurve]) -> None:
        """Have the forecast's own choice asked for next, where the plan wants it and nothing else waits."""
        if self._plan.sampler != "joint" or self._begun(found) < self._plan.first:
            return
        if any(t.state.name == "WAITING" for t in found):
            return  # proposed by a worker that was killed before it asked
        seed = seed_of(self._plan, len(found), self._url is not None)
        params = proposed(self._plan, self._setup, [t.params for t in found], curves, seed)
        if params is not None:
            self.study.enqueue_trial(params)

    def _train(self, number: int, until: float, end: End | None) -> None:
        """Train a claimed trial and report what it shows."""
        import optuna

        now = self._frozen(number)
        if now.state.is_finished():
            return  # whoever had it before has ended it meanwhile
        trial = optuna.trial.Trial(self.study, now._trial_id)
        if end is not None and math.isfinite(end.scale) and end.scale > 0:
            told = [end.look, *(round(v, 6) for v in (optimistic(end, 0.05), end.mean, pessimistic(end, 0.05)))]
            before = now.user_attrs.get(FORECASTS, [])
            if told not in before:
                trial.set_user_attr(FORECASTS, [*before, told])
        found = runs.advance(self._plan, self._out, number, now.params, until)
        self.status = found.status
        for step, loss in found.reports:
            if step not in now.intermediate_values and math.isfinite(loss):
                trial.report(loss, step)
        if math.isfinite(found.seconds):
            trial.set_user_attr(SECONDS, found.seconds)
        if found.failed:
            self._end(self.study, trial, found.failed, failed=True)
            self._refuse_where_none_can_be_trained()
        elif found.final is not None:
            self.study.tell(trial, found.final, skip_if_finished=True)

    def _stop(self, trial: Any) -> None:
        """End a trial that cannot win, unless another worker has it."""
        import optuna

        with runs.claimed(self._out, f"{trial.number:05d}") as ours:
            now = self._frozen(trial.number)
            if ours and not now.state.is_finished() and now.intermediate_values == trial.intermediate_values:
                share = 100 * now.last_step / now.user_attrs["total_steps"]
                why = f"stopped at {share:.0f} %: it cannot end best"
                runs.note(self._out, trial.number, stopped=why)
                self._end(self.study, optuna.trial.Trial(self.study, now._trial_id), why, failed=False)

    def _refuse_where_none_can_be_trained(self) -> None:
        """Raises: InputError: the first trials have all failed."""
        found = self.standing()
        failed = [t for t in found if t.state.name == "FAIL" and WHY in t.user_attrs]
        if len(failed) == len(found) >= min(self._plan.first, self._allowance.trials or self._plan.first):
            raise InputError(
                f"all of the first {len(found)} trials have failed, the last one: {failed[-1].user_attrs[WHY]}; mend "
                "the space and choose another --out"
            )

    # ---- counting ------------------------------------------------------------------------------------------------

    def standing(self) -> list[Any]:
        """All trials, as the storage has them."""
        with storage_errors():
            try:
                found: list[Any] = self.study.get_trials(deepcopy=False)
            except KeyError:
                raise InputError(f"the study {self._name!r} is gone from its storage; choose another --study") from None
        return found

    def _frozen(self, number: int) -> Any:
        return next(t for t in self.standing() if t.number == number)

    def spent(self, found: Sequence[Any]) -> float:
        """Compute of trials, in runs of the plan's length."""
        return sum((t.last_step or 0) for t in found) / self._setup.steps

    def _kept(self, found: Sequence[Any], curves: Sequence[TrialCurve], alive: Sequence[bool]) -> list[int]:
        """Indices of the trials that the rest of the budget is kept for."""
        return kept_for(curves, alive, self._allowance.budget - self.spent(found), self.steps)

    def _bury(self, found: Sequence[Any]) -> None:
        """End trials whose worker was killed before it could introduce them."""
        import optuna

        now = datetime.datetime.now()
        for t in found:
            lost = not t.state.is_finished() and HOST not in t.user_attrs
            if lost and (now - (t.datetime_start or now)).total_seconds() > ORPHANED_S:
                self._end(self.study, optuna.trial.Trial(self.study, t._trial_id), "never trained", failed=True)

    @staticmethod
    def _begun(found: Sequence[Any]) -> int:
        """Trials that count: not those that nobody could train."""
        return sum(HOST in t.user_attrs or not t.state.is_finished() for t in found)

    def _may_begin(self, found: Sequence[Any]) -> bool:
        limit = self._allowance.trials
        return limit is None or self._begun(found) < limit


def curve_of(trial: Any, scale: Scale) -> TrialCurve:
    """A trial of a study of ``hpt sweep`` as forecasts see it."""
    from optuna.trial import TrialState

    rates = rates_of(trial)
    reports = [(float(step), scale.into(value)) for step, value in trial.intermediate_values.items()]
    complete = trial.state == TrialState.COMPLETE
    if complete:
        reports = [*[r for r in reports if r[0] < len(rates)], (float(len(rates)), scale.into(trial.value))]
    return TrialCurve.of(trial.number, reports, rates, params=trial.params, complete=complete)


def rates_of(trial: Any) -> Array:
    """Learning rate of every step of a trial, (T,).

    Raises:
        ConfigError: the study is not one of ``hpt sweep``.
    """
    from ...forecast.schedules import planned_rates

    said = trial.user_attrs
    if "schedule" not in said or "total_steps" not in said:
        raise ConfigError(f"trial {trial.number}: nothing says its schedule")
    peak = trial.params.get("lr", said.get("peak", 1.0))
    rates: Array = planned_rates(said["schedule"], said["total_steps"]) * float(peak)
    return rates
