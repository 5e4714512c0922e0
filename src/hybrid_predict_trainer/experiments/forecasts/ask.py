"""From a log and a schedule to a forecast: what ``hpt forecast`` does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...forecast.curve import Array, Curve
from ...forecast.final_loss import Forecast, forecast
from ...forecast.logs import Columns, Log, read_log
from ...forecast.prior import shipped
from ...forecast.schedules import agree, continued, planned_rates
from ...sweeps.finished import Finished, forecast_among
from ...tasks.recipes import lr_factor
from ..arms.options import InputError, build_experiment
from ..run_folder import stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the command line said; None where it said nothing.

    Attributes:
        run: a log, or a folder that holds one.
        schedule: as ``forecast.schedules`` describes it; None: the recipe of a run of ``hpt train``.
        steps: of the whole run; None: as the log or the recipe says.
        columns: names of columns in the log.
        level: of the interval.
        prior: one of ``forecast.prior.PRIORS``; None: all of them, weighed.
        until: last step that counts; None: all.
        like: runs that have ended, to learn from; empty: the law and its prior.
    """

    run: Path
    schedule: str | None = None
    steps: int | None = None
    columns: Columns | None = None
    level: float = 0.9
    prior: str | None = None
    until: int | None = None
    like: tuple[Path, ...] = ()


def answer(question: Question) -> dict[str, Any]:
    """Forecast.

    Returns:
        JSON-able: the fields of :class:`~...forecast.final_loss.Forecast`, the log, its loss column and its notes.

    Raises:
        InputError: the rest of the schedule is not known.
        ConfigError: the log cannot be read, or holds too little.
    """
    log = read_log(question.run, question.columns)
    plan, notes = _plan(question, log)
    curve = Curve.of(log.steps, log.losses)
    if question.until is not None:
        curve = curve.until(question.until)
    found = _foretold(question, curve, plan)
    said = asdict(found)
    return {"run": str(question.run), "loss": log.loss_name, **said, "notes": [*log.notes, *notes, *found.notes]}


def _foretold(question: Question, curve: Curve, plan: Array) -> Forecast:
    if not question.like:
        priors = None if question.prior is None else [shipped(question.prior)]
        return forecast(curve.steps, curve.losses, plan, level=question.level, priors=priors)
    if question.prior is not None:
        raise InputError("--prior is what the law is told; with --like it is not asked: leave out one of them")
    ended = [_ended(path, question) for path in question.like]
    return forecast_among(curve.steps, curve.losses, plan, ended, level=question.level)


def _ended(path: Path, question: Question) -> Finished:
    """A finished run: its rates are those of its log or recipe, or those of the schedule over its own length.

    Raises:
        InputError: none of the three is there.
    """
    log = read_log(path, question.columns)
    last = int(log.steps.max())
    kept = np.isfinite(log.rates) & (log.rate_steps >= 1)
    if path.is_dir() and (path / "run.json").is_file():
        rates = recipe_rates(path, last)
    elif kept.sum() >= 2:
        rates = np.interp(np.arange(1, last + 1), log.rate_steps[kept], log.rates[kept])
    elif question.schedule is not None:
        rates = planned_rates(question.schedule, last)
    else:
        raise InputError(f"{path}: holds no learning rates; give --schedule if the finished runs had the same")
    return Finished(steps=log.steps, losses=log.losses, rates=rates)


def _plan(question: Question, log: Log) -> tuple[Array, tuple[str, ...]]:
    """The rate of every step: logged ones as far as there are any, then the schedule's; a note where they differ."""
    if question.schedule is None and question.run.is_dir() and (question.run / "run.json").is_file():
        return recipe_rates(question.run, question.steps), ()
    total = question.steps or log.total_steps
    if question.schedule is None or total is None:
        missing = "--schedule" if question.schedule is None else "--steps"
        raise InputError(
            f"{question.run}: does not say which learning rates are still to come; give {missing}, "
            "such as --schedule cosine:warmup=2000,final=0.1 --steps 24000"
        )
    planned = planned_rates(question.schedule, total)
    kept = np.isfinite(log.rates) & (log.rate_steps >= 1)
    if kept.sum() < 2:
        return planned, ()
    steps, rates = log.rate_steps[kept], log.rates[kept]
    whole = continued(steps, rates, planned)
    note = (
        f"the logged learning rates do not follow --schedule {question.schedule} over {total:,} steps: the forecast is "
        f"of a run that goes on as that schedule does after step {steps[-1]:,.0f}"
    )
    return whole, () if agree(steps, rates, planned) else (note,)


def recipe_rates(folder: Path, steps: int | None) -> Array:
    """Those of a run of ``hpt train``, from its task's recipe.

    Raises:
        InputError: ``run.json`` is damaged, or the task's data are not there.
    """
    recipe = build_experiment(stored(folder).request.options).recipe
    total = steps or recipe.steps
    return np.array([
        lr_factor(
            n, schedule=recipe.schedule, total_steps=total, warmup_steps=min(recipe.warmup_steps, total // 10),
            decay_frac=recipe.decay_frac,
        )
        for n in range(total)
    ])  # fmt: skip


def format_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    percent = 100 * found["level"]
    power, line = ("-" if found[k] is None else f"{found[k]:.5g}" for k in ("power_law", "log_line"))
    weights = ", ".join(f"{name} {100 * w:.0f} %" for name, w in found["prior"] if w > 0)
    return "\n".join([
        f"{found['run']}: {found['loss']}, step {found['step']:,} of {found['total_steps']:,}",
        f"final loss {found['final_loss']:.5g}, {percent:g} % interval {found['low']:.5g} to {found['high']:.5g}",
        f"beside it: last value {found['last_value']:.5g}, power law without learning rates {power}, "
        f"line in the logarithm of the step {line}",
        f"known before: {weights}",
        *(f"note: {note}" for note in found["notes"]),
    ])  # fmt: skip
