"""`HybridPruner`: a pruner for Optuna that knows the learning-rate schedules.

    pruner = HybridPruner(schedule=lambda trial: lambda step: rate_of(step, trial.params), total_steps=5000)
    study = optuna.create_study(pruner=pruner)

Any training loop may report, at any steps::

    trial.report(validation_loss, step)
    if trial.should_prune():
        raise optuna.TrialPruned

Nothing is kept in the pruner that a resumed study or another worker would miss: what was decided stands in the trials'
system attributes, and everything else is read from the study.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..forecast.schedules import planned_rates
from ..notices import warn
from ..records import ConfigError
from .curves import LATE, LOOKS, Array, Scale, TrialCurve, checked_rates
from .decide import bar_of, cannot_win
from .ends import End, nearest
from .joint import Surface, ends_jointly
from .looks import spent_at_a_look

try:
    import optuna
    from optuna.pruners import BasePruner
    from optuna.trial import TrialState
except ModuleNotFoundError:
    raise ConfigError('sweeps need optuna; run: pip install "hybrid-predict-trainer[sweep]"') from None

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

#: What `schedule=` may return for a trial: the rate of step 1, 2, ..., T by a function, a vector of them, or a text as
#: ``forecast.schedules`` reads it.
Schedule = Callable[[int], float] | Sequence[float] | Array | str
#: Trials that tell something; a pruned or failed one as far as it came.
SEEN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL)
#: User attributes of a trial that are read where no arguments say it.
SCHEDULE, TOTAL_STEPS = "schedule", "total_steps"
#: System attribute: the trial's number and the last look that was decided on; a trial that is retried has a copy of it.
LOOKED = "hybrid_predict_trainer:look"
#: Trials that a forecast learns from: the nearest ones.  More would cost time and say little.
MOST_KNOWN = 64
#: A trial that reports beyond this share of its planned steps, or is complete before the first look, counts in other
#: units than its schedule does.
BEYOND = 1.05
#: Steps of which a rate is asked; between them it is taken to change evenly.
MOST_RATES = 20_000
#: Names of parameters that are about learning rate and schedule.
RATE_NAMES = ("lr", "learning_rate", "max_lr", "peak_lr", "schedule", "lr_scheduler", "warmup", "warmup_steps", "decay")


class HybridPruner(BasePruner):  # type: ignore[misc]
    """Prunes a trial when its forecast says with stated confidence that it will not end below the best one.

    The final value is foretold from the trial's own curve and learning rates, and from what the other trials did, the
    more the nearer their parameters are (``sweeps.joint``).  A trial is judged at the first report after 6, 9, 13, 19,
    27, 38, 53 and 73 % of its run, and the confidence holds for all of these looks together (``sweeps.looks``).  Before
    two reports after its warm-up nothing is decided, and the best trial so far is never pruned.

    Example::

        study = optuna.create_study(pruner=HybridPruner(schedule="cosine:warmup=100", total_steps=5000))
    """

    def __init__(
        self,
        *,
        schedule: Schedule | Callable[[FrozenTrial], Schedule] | None = None,
        total_steps: int | Callable[[FrozenTrial], int] | None = None,
        confidence: float = 0.95,
        min_gain: float = 0.0,
        rate_names: Sequence[str] = RATE_NAMES,
        count_running: bool = False,
        surface: Surface = Surface(),  # noqa: B008
    ) -> None:
        """Args: schedule: of all trials, or trial -> its own; None: each trial's user attribute ``schedule``.

        total_steps: of all trials, or trial -> its own; None: each trial's user attribute ``total_steps``.
        confidence: 1 - the probability that the winner is pruned.
        min_gain: what a trial has to be better by: a share of the value where all are above 0 and minimized, else in
            the value's units.
        rate_names: parameters about learning rate and schedule; trials that share all others share what they do.
        count_running: a running trial's forecast is a bar, too.  Off by default: one that was killed never ends.
        surface: of the forecast.

        Raises:
            ConfigError: a value is out of range, or scipy is missing.
        """
        self._error = spent_at_a_look(confidence)
        if not (math.isfinite(min_gain) and min_gain >= 0):
            raise ConfigError(f"min_gain must be at least 0, not {min_gain}")
        self._schedule, self._total_steps = schedule, total_steps
        self._min_gain, self._rate_names, self._surface = min_gain, tuple(rate_names), surface
        self._count_running = count_running
        self._rates: dict[_Key, Array | None] = {}
        self._finished: dict[_Key, tuple[Scale, TrialCurve | None]] = {}
        self._warned = False

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        """Whether a trial should stop now.

        Raises:
            ConfigError: the trial has no schedule or number of steps, or they make no sense.
        """
        reports = trial.intermediate_values
        if not reports:
            return False
        last = max(reports)
        if math.isnan(reports[last]):
            return True  # it has diverged: what it would return ends the trial as failed
        rates = self._rates_of(trial, needed=True)
        assert rates is not None, "a schedule that is missing has raised"
        self._compare_units(trial, last, len(rates))
        if len(reports) == 1 and not self._warned:
            for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[-1:]:
                known = self._rates_of(other, needed=False)
                if known is not None and other.intermediate_values:
                    self._compare_units(other, max(other.intermediate_values), len(known))
        done = _looked(trial)
        due = max((k for k, look in enumerate(LOOKS[:-1]) if look <= last / len(rates) + LATE), default=-1)
        if due <= done or last >= len(rates):
            return False
        maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
        lost = reports[last] == (-math.inf if maximize else math.inf)
        # whether the reports say enough for the look does not hang on the values
        if not lost and TrialCurve.of(trial.number, [(float(step), 0.0) for step in reports], rates).standing != due:
            return False
        study._storage.set_trial_system_attr(trial._trial_id, LOOKED, [trial.number, due])
        others = [t for t in study.get_trials(deepcopy=False, states=SEEN) if t.number != trial.number]
        if lost:  # a first report may be infinite; one that still is at a look loses against any end
            return any(_has_ended(t) for t in others)
        values = [v for t in (trial, *others) for v in t.intermediate_values.values()]
        scale = Scale.of(values + [t.value for t in others if t.value is not None], maximize=maximize)
        own = self._curve(trial, scale)
        assert own is not None, "its schedule is known"
        return own.standing is not None and self._judged(own, others, scale)

    def _judged(self, own: TrialCurve, others: Sequence[FrozenTrial], scale: Scale) -> bool:
        """Whether a trial cannot win against the others."""
        curves, competing = [own], [False]
        apart: list[TrialCurve] = []
        for other in others:
            curve = self._curve(other, scale)
            if curve is None or not len(curve.values):
                continue
            if self._rates_of(other, needed=False) is None:
                apart.append(curve)
            else:
                counts = other.state == TrialState.RUNNING and self._count_running
                curves.append(curve)
                competing.append(curve.complete or counts)
        if not any(competing) and not apart:
            return False
        kept = nearest(curves, 0, MOST_KNOWN, self._rate_names)
        near = [curves[i] for i in kept]
        found = ends_jointly(near, surface=self._surface, rate_names=self._rate_names)
        ends = dict(zip(kept, found, strict=True))
        for i, curve in enumerate([*curves, *apart]):
            if i not in ends and curve.complete:  # too far off, or of a schedule that nobody knows: it has an end
                ends[i] = End(float(curve.values[-1]), 0.0, math.inf, 1.0)
        curves, competing = [*curves, *apart], [*competing, *[True] * len(apart)]
        known = sorted(ends)
        bar = bar_of([curves[i] for i in known], [ends[i] for i in known], self._error, [competing[i] for i in known])
        gain = math.log1p(self._min_gain) if scale.logarithmic else self._min_gain / scale.unit
        return cannot_win(own, ends[0], bar, self._error, gain)

    # ---- reading trials --------------------------------------------------------------------------------------

    def _curve(self, trial: FrozenTrial, scale: Scale) -> TrialCurve | None:
        """A trial as forecasts see it; of one whose schedule is not known its end alone, None where it has none.

        The value that a complete trial returned is its last one, whatever it reported before.
        """
        key = _key(trial)
        if trial.state.is_finished():  # it does not change any more
            if key not in self._finished or self._finished[key][0] != scale:
                self._finished[key] = (scale, self._new_curve(trial, scale))
            return self._finished[key][1]
        return self._new_curve(trial, scale)

    def _new_curve(self, trial: FrozenTrial, scale: Scale) -> TrialCurve | None:
        rates = self._rates_of(trial, needed=False)
        complete = _has_ended(trial)
        if rates is None:
            if not complete:
                return None
            rates = np.ones(1)
        reports = [(float(step), scale.into(value)) for step, value in trial.intermediate_values.items()]
        if complete:
            assert trial.value is not None, "complete"
            reports = [*[r for r in reports if r[0] < len(rates)], (float(len(rates)), scale.into(trial.value))]
        return TrialCurve.of(trial.number, reports, rates, params=trial.params, complete=complete)

    def _compare_units(self, trial: FrozenTrial, last: int, steps: int) -> None:
        """Warn, once, of a trial whose reports cannot be counted in the steps of its schedule: it is never judged."""
        early = trial.state.is_finished() and last < LOOKS[0] * steps
        if not self._warned and (early or last > BEYOND * steps):
            self._warned = True
            warn(
                f"HybridPruner: trial {trial.number} {'was complete' if early else 'reports'} at step {last} of a "
                f"schedule of {steps} steps: report in the steps of the schedule, or nothing is pruned"
            )

    def _rates_of(self, trial: FrozenTrial, *, needed: bool) -> Array | None:
        key = _key(trial)
        if key not in self._rates or (needed and self._rates[key] is None):
            try:
                self._rates[key] = checked_rates(trial.number, self._planned(trial))
            except ConfigError:
                if needed:
                    raise
                self._rates[key] = None
        return self._rates[key]

    def _planned(self, trial: FrozenTrial) -> Array:
        """The rate of every step of a trial, (T,).

        Raises:
            ConfigError: nothing says it, or what says it makes no sense.
        """
        said = self._total_steps if self._total_steps is not None else trial.user_attrs.get(TOTAL_STEPS)
        total = said = said(trial) if callable(said) else said
        schedule: Any = self._schedule if self._schedule is not None else trial.user_attrs.get(SCHEDULE)
        if callable(schedule):
            try:
                schedule = schedule(trial)
            except Exception as error:
                raise ConfigError(
                    f"trial {trial.number}: schedule= is called with the trial and returns its rates, a text or a "
                    f"function of the step; it raised {type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
        if schedule is None:
            raise ConfigError(
                f"trial {trial.number}: its learning-rate schedule is not known; say HybridPruner(schedule=...) or "
                f"trial.set_user_attr({SCHEDULE!r}, 'cosine:warmup=100'); 'constant' if the rate stays"
            )
        if not callable(schedule) and not isinstance(schedule, str):
            try:
                return np.asarray(schedule, dtype=np.float64)
            except (TypeError, ValueError):
                raise ConfigError(
                    f"trial {trial.number}: its schedule must be a text, a function of the step, or a rate for every "
                    f"step, not {type(schedule).__name__}"
                ) from None
        total = _whole(total)
        if total is None or total < 1:
            raise ConfigError(
                f"trial {trial.number}: needs the number of steps of its run, not {said!r}; say "
                f"HybridPruner(total_steps=...) or trial.set_user_attr({TOTAL_STEPS!r}, 5000)"
            )
        return (
            _sampled(schedule, total) if callable(schedule) else _peaked(planned_rates(schedule, total), trial.params)
        )


#: Trial, number and start: studies may share their names, and the numbers that a storage gives.
_Key = tuple[int, int, Any]


def _key(trial: FrozenTrial) -> _Key:
    return trial._trial_id, trial.number, trial.datetime_start


def _looked(trial: FrozenTrial) -> int:
    """Index of the last look that was decided on; -1 before the first."""
    said: Any = trial.system_attrs.get(LOOKED, -1)
    if isinstance(said, list):
        number, look = said
        return int(look) if number == trial.number else -1
    return int(said)  # of a study of before, which kept no number


def _has_ended(trial: FrozenTrial) -> bool:
    """Complete, with a number."""
    return trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value)


def _whole(value: Any) -> int | None:
    """A whole number, of whatever type; None where it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


def _sampled(rate_of: Callable[[int], float], total: int) -> Array:
    """Rates of steps 1 to T, asked for at not too many of them."""
    at = np.unique(np.linspace(1, total, min(total, MOST_RATES)).astype(np.int64))
    found: Array = np.interp(np.arange(1, total + 1), at, [float(rate_of(int(step))) for step in at])
    return found


def _peaked(rates: Array, params: Mapping[str, Any]) -> Array:
    """A named schedule has its trial's peak, so that rates are compared between trials."""
    peak = next((params[name] for name in RATE_NAMES[:4] if isinstance(params.get(name), int | float)), 1.0)
    return rates * float(peak) if peak > 0 else rates


__all__ = ["LOOKS", "HybridPruner"]
