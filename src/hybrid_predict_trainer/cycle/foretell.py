"""The final loss of the run itself: its own loss curve and schedule, handed to the forecast."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch

from ..forecast.curve import Array
from ..forecast.final_loss import Forecast, forecast
from ..records import ConfigError
from .state import State

#: Settings of a group that schedules read and write.
SCALARS = (int, float)


def foretell(run: State, total_steps: int | None, level: float) -> Forecast:
    """Forecast the training loss at the end of a run; changes nothing.

    Args:
        run: Between two steps.
        total_steps: End of the run on its clock; None: as planned by ``fit``.
        level: Of the interval.

    Raises:
        ConfigError: the end is not known, prediction is off (no losses are kept then), or there are too few losses.
    """
    end = total_steps if total_steps is not None else run.schedule.end
    if end is None:
        raise ConfigError("the end of the run is not known: call forecast(total_steps)")
    points = seen(run)
    if not len(points):
        why = "no real step has been taken" if run.config.enabled else "with enabled = False no losses are kept"
        raise ConfigError(f"there is nothing to forecast from: {why}")
    now = run.position
    if end < now:
        raise ConfigError(f"the run is at step {now}, beyond total_steps = {end}")
    return forecast(points[:, 0], points[:, 1], planned(run, end), level=level)


def seen(run: State) -> Array:
    """(step, loss, learning rate) of the real steps so far, (n, 3)."""
    return np.array(run.losses.curve.points(), dtype=np.float64).reshape(-1, 3)


def planned(run: State, end: int) -> Array:
    """Learning rates of all steps of the clock until the end, past and planned, (end,); needs one loss at least."""
    points, now = seen(run), run.position
    past = np.interp(np.arange(1, now + 1), points[:, 0], points[:, 2])
    found: Array = np.concatenate([past, rates_ahead(run, end - now)])
    return found


def rates_ahead(run: State, num_steps: int) -> Array:
    """Learning rates of the next steps of the clock, (num_steps,), from a copy of the schedule.

    A schedule per epoch takes its steps as far apart as it did so far; without a schedule the rate stays.
    """
    schedule, rate = run.schedule, run.learning_rate
    if schedule.scheduler is None or num_steps == 0:
        return np.full(num_steps, rate)
    scheduler, optimizer = _copied(schedule.scheduler, run.subject.optimizer)
    apart = 1
    if schedule.interval == "epoch":
        apart = max(1, run.position // max(schedule.num_epochs, 1))
    found = np.empty(num_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy's optimizer never steps
        for n in range(num_steps):
            found[n] = schedule.factor * float(optimizer.param_groups[0]["lr"])
            if (n + 1) % apart == 0:
                try:
                    scheduler.step()
                except ValueError:  # OneCycleLR beyond its end
                    found[n + 1 :] = found[n]
                    break
    return found


def _copied(scheduler: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, torch.optim.Optimizer]:
    """A copy of a scheduler, bound to an optimizer of its own that has the same rates and no weights.

    Raises:
        ConfigError: the schedule cannot be copied.
    """
    stand_in = torch.optim.SGD([torch.zeros((), device="cpu")], lr=0.0)
    stand_in.param_groups = [
        {**{k: copy.copy(v) for k, v in group.items() if k != "params"}, "params": []}
        for group in optimizer.param_groups
    ]
    try:
        return copy.deepcopy(scheduler, {id(optimizer): stand_in}), stand_in
    except Exception as error:
        raise ConfigError(
            f"the schedule {type(scheduler).__name__} cannot be copied to look ahead ({error}): use hpt forecast with "
            "--schedule"
        ) from error
