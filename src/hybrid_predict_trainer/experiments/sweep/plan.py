"""What a search is: what it trains, what varies, how it samples.  The same command later goes on with it."""

from __future__ import annotations

import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import read_json_object
from ...tasks.base import with_steps
from ...tell.sinks import jsonable
from ..arms.drive import write_json
from ..arms.options import InputError, Options, as_input_error, build_experiment, config_of, recipe_of
from ..run_arm import Experiment
from ..run_folder import absolute, agree_plan
from .space import extremes, with_params

#: File of the plan in the search's folder, and attribute of the study.
PLAN = "sweep.json"
SAMPLERS = ("tpe", "random", "joint")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A search.

    Attributes:
        options: of a run, before a trial's values.
        space: name -> distribution.
        sampler: one of :data:`SAMPLERS`.
        seed: of the sampler, and of every run unless ``seed`` varies.
        plain: runs are trained without prediction.
        first: trials that are begun before any is preferred.
        confidence: 1 - the probability that the winner is stopped.
        min_gain: share of the loss by which the best has to be beaten.
    """

    options: Options
    space: Mapping[str, Any] = field(hash=False)
    sampler: str = "tpe"
    seed: int = 0
    plain: bool = False
    first: int = 8
    confidence: float = 0.95
    min_gain: float = 0.002

    def to_store(self) -> dict[str, Any]:
        """As JSON."""
        from optuna.distributions import distribution_to_json

        space = {name: distribution_to_json(found) for name, found in self.space.items()}
        known = {name: getattr(self, name) for name in ("sampler", "seed", "plain", "first", "confidence", "min_gain")}
        options = {**asdict(self.options), "data": absolute(self.options.data) or self.options.data}
        found: dict[str, Any] = json.loads(json.dumps(jsonable({**known, "options": options, "space": space})))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a search may use; it may be more the next time.

    Attributes:
        budget: compute of all trials, in runs of the plan's length.
        trials: number of them; None: as the budget allows.
        patience: seconds that a storage may not answer.
    """

    budget: float
    trials: int | None = None
    patience: float = 60.0


def checked(plan: Plan) -> Experiment:
    """Build what every trial needs, and hold the ends of every range against it.

    Raises:
        InputError: a trial of the search could not be trained; the line names the parameter.
    """
    setup = build_experiment(plan.options)
    if setup.config.clock != "cost" or "training.clock" in plan.space:
        raise InputError("hpt sweep spends cost: training.clock must be 'cost'")
    for name, value in extremes(plan.space):
        options = with_params(plan.options, {name: value})
        try:
            config_of(options, recipe_of(setup.task.defaults, options), setup.task.steps_per_epoch)
        except (ConfigError, ValueError) as error:
            raise InputError(f"space: {name} = {value}: {' '.join(str(error).split())}") from None
    return setup


def schedule_of(setup: Experiment, plan: Plan, params: Mapping[str, Any]) -> tuple[str, int]:
    """A trial's schedule as ``forecast.schedules`` reads it, and its number of steps."""
    recipe = recipe_of(setup.task.defaults, with_params(plan.options, params))
    recipe = with_steps(recipe, recipe.steps)
    said = [f"warmup={recipe.warmup_steps}"] * bool(recipe.warmup_steps)
    said += [f"decay={recipe.decay_frac}"] * (recipe.schedule == "wsd")
    return f"{recipe.schedule}:{','.join(said)}".rstrip(":"), recipe.steps


def agreed(out: Path, plan: Plan) -> None:
    """Write the plan into a new folder, or hold it against the one that is there.

    Raises:
        InputError: the folder holds something else, or another search.
    """
    with as_input_error():
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file, --out must name a folder")
        if (out / PLAN).exists():
            agree_plan(out, read_json_object(out / PLAN), plan.to_store())
            return
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out}: holds something else than a search; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, plan.to_store())


def host() -> str:
    """Name of this machine."""
    return platform.node() or "localhost"


def seed_of(plan: Plan, begun: int, shared: bool) -> int:
    """Of what is drawn for the next trial; see :func:`sampler_of`."""
    return zlib.crc32(f"{plan.seed}:{begun}:{host() if shared else ''}".encode())


def sampler_of(plan: Plan, begun: int, shared: bool) -> Any:
    """Optuna's sampler for the next trial.

    It is made anew for each, from the number of trials before it: a search that was interrupted goes on as one that was
    not, and never draws the same numbers twice.

    Args:
        plan: Of the search.
        begun: Trials so far.
        shared: Several machines take part, which may ask at the same moment.
    """
    import optuna

    seed = seed_of(plan, begun, shared)
    if plan.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=plan.first)
