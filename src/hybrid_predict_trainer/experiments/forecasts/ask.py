"""From a log and a schedule to a forecast: what ``hpt forecast`` does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...forecast.curve import Array, Curve
from ...forecast.final_loss import forecast
from ...forecast.logs import Columns, Log, read_log
from ...forecast.prior import shipped
from ...forecast.schedules import continued, planned_rates
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
    """

    run: Path
    schedule: str | None = None
    steps: int | None = None
    columns: Columns | None = None
    level: float = 0.9
    prior: str | None = None
    until: int | None = None


def answer(question: Question) -> dict[str, Any]:
    """Forecast.

    Returns:
        JSON-able: the fields of :class:`~...forecast.final_loss.Forecast`, the log, its loss column and its notes.

    Raises:
        InputError: the rest of the schedule is not known.
        ConfigError: the log cannot be read, or holds too little.
    """
    log = read_log(question.run, question.columns)
    plan = _plan(question, log)
    curve = Curve.of(log.steps, log.losses)
    if question.until is not None:
        curve = curve.until(question.until)
    priors = None if question.prior is None else [shipped(question.prior)]
    found = forecast(curve.steps, curve.losses, plan, level=question.level, priors=priors)
    said = asdict(found)
    return {"run": str(question.run), "loss": log.loss_name, **said, "notes": [*log.notes, *found.notes]}


def _plan(question: Question, log: Log) -> Array:
    """The rate of every step: logged ones as far as there are any, then the schedule's."""
    if question.schedule is None and question.run.is_dir() and (question.run / "run.json").is_file():
        return recipe_rates(question.run, question.steps)
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
        return planned
    order = np.argsort(log.rate_steps[kept], kind="stable")
    return continued(log.rate_steps[kept][order], log.rates[kept][order], planned)


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
    power = "-" if found["power_law"] is None else f"{found['power_law']:.5g}"
    weights = ", ".join(f"{name} {100 * w:.0f} %" for name, w in found["prior"] if w > 0)
    return "\n".join([
        f"{found['run']}: {found['loss']}, step {found['step']:,} of {found['total_steps']:,}",
        f"final loss {found['final_loss']:.5g}, {percent:g} % interval {found['low']:.5g} to {found['high']:.5g}",
        f"beside it: last value {found['last_value']:.5g}, power law without learning rates {power}",
        f"known before: {weights}",
        *(f"note: {note}" for note in found["notes"]),
    ])  # fmt: skip
