"""The final loss of a run in progress, learnt from runs that have ended: :func:`forecast_among`.

A law says where a run goes; short runs, and small models early in their training, do not follow it yet, but they do
much alike.  What the first terms of the law get wrong is learnt from the finished runs by the process of ``ends``, from
the very share of the run that is known.  How far its ends are off is measured on the finished runs as well, each model
foretold from the others, and the interval is widened, or narrowed, by what that asks for (split conformal prediction:
Papadopoulos et al., ECML 2002; Lei et al., JASA 113, 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..forecast.curve import Curve
from ..forecast.final_loss import Forecast, last_value, log_line, notes_of, power_law
from ..forecast.law import Plan
from ..records import ConfigError
from .curves import Array, TrialCurve
from .ends import End, ends_of
from .looks import optimistic, pessimistic

#: Fewer finished runs say nothing of what runs have in common.
MIN_FINISHED = 3
#: Ratio of two looks at a run, and the look before the one that is asked about: a run tells as much in each.
LOOK_RATIO = 1.4
#: A finished run that lacks more of its end than this share has not ended.
ENDED = 0.98
NAME = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run that has ended.

    Attributes:
        steps, losses: (n,) optimizer steps taken, and losses above 0 there.
        rates: (T,) learning rate of each step.
        model: runs of one model have one name; empty: it is taken for a model of its own.
        size: of the model, its width or number of weights, where sizes are what models differ by: what changes with
            size is then carried on beyond the finished ones.
    """

    steps: Sequence[float] | Array
    losses: Sequence[float] | Array
    rates: Sequence[float] | Array
    model: str = ""
    size: float | None = None


def forecast_among(
    steps: Sequence[float] | Array, losses: Sequence[float] | Array, rates: Sequence[float] | Array,
    finished: Sequence[Finished], *, model: str = "", size: float | None = None, level: float = 0.9,
) -> Forecast:  # fmt: skip
    """Forecast the final loss of a run from its beginning and from whole runs.

    Args:
        steps: (n,) optimizer steps taken when each loss was measured.
        losses: (n,) above 0.
        rates: (T,) learning rate of each step of the whole run, past and planned.
        finished: At least three, with losses of the same kind.  The more alike in data, rate and length, the better.
        model: Name of the run's own; empty: another one than those of the finished runs.
        size: Of its model, where all finished runs have one.
        level: Of the interval.

    Returns:
        The forecast; its ``points`` are the last observed step and the end.

    Raises:
        ConfigError: too few finished runs, one that has not ended, losses that are not finite and above 0, a run that
            is too short for a slope, or scipy is missing.
    """
    return Among(finished, level=level).forecast(steps, losses, rates, model=model, size=size)


class Among:
    """Finished runs that several runs are foretold from: what is learnt for a share of a run is kept."""

    def __init__(self, finished: Sequence[Finished], *, level: float = 0.9) -> None:
        """Args: finished, level: as :func:`forecast_among` takes them.

        Raises:
            ConfigError: the level is none, there are too few runs, or some have a size and others none.
        """
        if not 0 < level < 1:
            raise ConfigError(f"the level of an interval lies between 0 and 1, not at {level:g}")
        if len(finished) < MIN_FINISHED:
            raise ConfigError(f"{len(finished)} finished runs are too few to learn from: give at least {MIN_FINISHED}")
        self._finished, self._level = list(finished), level
        self._known: dict[tuple[float, ...], tuple[list[TrialCurve], float]] = {}

    def _at(self, looks: tuple[float, ...]) -> tuple[list[TrialCurve], float]:
        """The runs as they are seen at the looks, and the factor of an interval."""
        if looks not in self._known:
            others = [_whole(k, run, looks) for k, run in enumerate(self._finished)]
            self._known[looks] = others, widening(others, self._level)
        return self._known[looks]

    def forecast(
        self, steps: Sequence[float] | Array, losses: Sequence[float] | Array, rates: Sequence[float] | Array, *,
        model: str = "", size: float | None = None,
    ) -> Forecast:  # fmt: skip
        """As :func:`forecast_among`."""
        curve, plan = Curve.of(steps, losses), Plan.of(rates)
        if any((run.size is None) != (size is None) for run in self._finished):
            raise ConfigError("either the run and all finished runs have a size, or none of them")
        return _foretold(self._at, curve, plan, (rates, model, size), self._level)


def _foretold(
    known: Callable[[tuple[float, ...]], tuple[list[TrialCurve], float]], curve: Curve, plan: Plan,
    run: tuple[Sequence[float] | Array, str, float | None], level: float,
) -> Forecast:  # fmt: skip
    """The forecast of a checked curve; ``run`` is its rates, model and size."""
    if not len(curve.steps):
        raise ConfigError("there are no losses to forecast from")
    now = float(curve.steps[-1])
    if now >= plan.steps:
        raise ConfigError(f"the run is at step {now:g} of {plan.steps}: there is nothing left to forecast")
    looks = looks_from(now / plan.steps)
    others, factor = known(looks)
    own = _trial(len(others), curve, run, looks)
    (end,) = ends_of([*others, own], asked=[len(others)])[-1:]
    if not math.isfinite(end.mean):
        raise ConfigError(
            f"the losses up to step {now:g} say too little: a slope needs several rows after the warm-up "
            f"({plan.warmup} steps), and finished runs that have rows around the same share of theirs"
        )
    half = 0.5 * factor * (pessimistic(end, (1 - level) / 2) - optimistic(end, (1 - level) / 2))
    found, low, high = (math.exp(end.mean + s * half) for s in (0, -1, 1))
    here = last_value(curve)
    return Forecast(
        final_loss=found, low=low, high=high, level=level, step=int(now), total_steps=plan.steps, last_value=here,
        power_law=power_law(curve, plan), log_line=log_line(curve, plan),
        points=((now, here, here, here), (float(plan.steps), found, low, high)),
        prior=((f"{len(others)} finished runs", 1.0),), notes=tuple(notes_of(curve, plan)),
    )  # fmt: skip


def looks_from(share: float) -> tuple[float, ...]:
    """Looks at equal steps of the logarithm from one before a share of a run to its end."""
    count = max(1, round(math.log(1 / share) / math.log(LOOK_RATIO)))
    after = [share ** (1 - k / count) for k in range(count)]
    return (share / LOOK_RATIO, *after, 1.0)


def _trial(
    key: int, curve: Curve, run: tuple[Sequence[float] | Array, str, float | None], looks: tuple[float, ...]
) -> TrialCurve:  # fmt: skip
    rates, model, size = run
    if size is not None and not (math.isfinite(size) and size > 0):
        raise ConfigError(f"the size of a model must be above 0, not {size:g}")
    params = {NAME: model or f"run {key}"} if size is None else {NAME: math.log(size)}
    blocks = curve.blocks()
    reports = list(zip(blocks.steps.tolist(), np.log(blocks.losses).tolist(), strict=True))
    if len(blocks.steps) < len(curve.steps):  # the last block lies before the step that is known
        reports.append((float(curve.steps[-1]), reports[-1][1]))
    return TrialCurve.of(key, reports, np.asarray(rates, dtype=np.float64), params=params, looks=looks)


def _whole(key: int, run: Finished, looks: tuple[float, ...]) -> TrialCurve:
    curve, name = Curve.of(run.steps, run.losses), f"finished run {key + 1}"
    total = len(run.rates)
    if not len(curve.steps) or curve.steps[-1] < ENDED * total:
        last = curve.steps[-1] if len(curve.steps) else 0
        raise ConfigError(f"{name} ends at step {last:g} of {total}: only runs that have ended can be learnt from")
    return replace(_trial(key, curve.until(total), (run.rates, run.model, run.size), looks), complete=True)


def widening(finished: Sequence[TrialCurve], level: float) -> float:
    """Factor at which intervals hold a share of the ends of finished runs, each model foretold from the others.

    Where all are of one model each run is foretold from the others of it.  The quantile has the correction for a finite
    sample, (n + 1) level / n; with fewer runs than that needs the factor is at least 1.
    """
    names = [curve.params[NAME] for curve in finished]
    groups = [[i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)]
    if len(groups) < 2:
        groups = [[i] for i in range(len(finished))]
    sizes = []
    for group in groups:
        curves = [_beginning(c) if i in group else c for i, c in enumerate(finished)]
        ends = ends_of(curves, asked=group)
        sizes += [_size(ends[i], float(finished[i].values[-1]), level) for i in group]
    known = sorted(s for s in sizes if math.isfinite(s))
    rank = math.ceil(level * (len(known) + 1))
    if rank > len(known):
        return max(1.0, *known) if known else 1.0
    return known[rank - 1]


def _beginning(curve: TrialCurve) -> TrialCurve:
    """What was known of a finished run at the look that is asked about."""
    kept = curve.steps <= curve.looks[1] * curve.total_steps + 1e-9
    return replace(curve, steps=curve.steps[kept], values=curve.values[kept], complete=False)


def _size(end: End, truth: float, level: float) -> float:
    """How far off an end was, in halves of its interval."""
    if not math.isfinite(end.mean):
        return math.nan
    half = 0.5 * (pessimistic(end, (1 - level) / 2) - optimistic(end, (1 - level) / 2))
    return abs(truth - end.mean) / half if half > 0 else math.inf
