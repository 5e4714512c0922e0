"""What `hpt compare` is to do, and whether an interrupted comparison was to do the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...safe_files import read_json_object
from ...tell.sinks import jsonable
from ..arms.options import InputError, Options, as_input_error, build_experiment
from ..run_arm import Experiment
from ..run_folder import MAX_RUN_JSON_BYTES, absolute, agree_plan, of_type
from ..run_folder import options_of as stored_options

#: Of the plain arm, in multiples of the run's length.
BUDGETS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What to compare.

    Attributes:
        setup: what the arms share.
        seeds: of the runs; every arm runs from each.
        budgets: of the plain arm, in multiples of ``setup.steps``; 1 is always among them.
        tune: choose the learning rate on ``recipe.lr_grid``, with equally many trials for both arms.
        out: folder of the results.
        about: what the command line said, for the record.
        resume: take runs that an interrupted comparison in ``out`` has finished.
    """

    setup: Experiment
    seeds: tuple[int, ...]
    budgets: tuple[float, ...] = BUDGETS
    tune: bool = False
    out: Path
    about: Mapping[str, Any]
    resume: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the command line says of a comparison; None where it says nothing."""

    options: Options
    seed: int | None = None
    seeds: int | None = None
    budgets: tuple[float, ...] | None = None
    tune: bool = False


def planned(said: Said, out: Path, *, resume: bool) -> tuple[Comparison, dict[str, Any]]:
    """The plan, and what of it is kept in ``plan.json``.

    Args:
        said: On the command line; where it is resumed, the rest is as it was.
        out: Folder of the comparison.
        resume: Go on with the comparison there.

    Raises:
        InputError: the plan cannot be carried out, or it is not that of the comparison to be resumed.
    """
    then: Mapping[str, Any] = read_plan(out) if resume else {}
    options = said.options
    if resume:
        before = then["options"]
        kept = {k: getattr(before, k) if v in (None, (), "") else v for k, v in asdict(options).items()}
        if said.options.data is None and then["data_path"] is not None:
            kept["data"] = then["data_path"]
        options = Options(**{**kept, "set": tuple(kept["set"])})
    setup = build_experiment(options)
    seeds = then["seeds"] if said.seeds is None and resume else (said.seeds or 1)
    first = then["seed"] if said.seed is None and resume else (said.seed or 0)
    budgets = then["budgets"] if said.budgets is None and resume else (said.budgets or BUDGETS)
    tune = said.tune or bool(resume and then["tune"])
    told = {
        "options": asdict(options), "data_path": absolute(options.data), "seed": first, "seeds": seeds,
        "budgets": list(budgets), "tune": tune, "task": setup.task.describe(),
    }  # fmt: skip
    if resume:
        agree_plan(out, {**then, "options": jsonable(asdict(then["options"]))}, told)
    about = {k: v for k, v in asdict(options).items() if v not in (None, ())}
    plan = Comparison(
        setup=setup, seeds=tuple(range(first, first + seeds)), budgets=tuple(budgets), tune=tune, out=out, about=about,
        resume=resume,
    )  # fmt: skip
    return plan, told


def read_plan(out: Path) -> dict[str, Any]:
    """``plan.json``, every value checked.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = out / "plan.json"
    with as_input_error():
        if not path.exists():
            raise InputError(f"{out}: there is no comparison to resume (no plan.json); leave out --resume to start one")
        found = read_json_object(path, MAX_RUN_JSON_BYTES)
        try:
            budgets = [float(of_type("budget", b, float)) for b in found["budgets"]]
            if not budgets or not all(0 < b <= 1000 for b in budgets):
                raise ValueError("budgets must be numbers above 0")
            if not 1 <= of_type("seeds", found["seeds"], int) <= 1000:
                raise ValueError("seeds is out of range")
            data = None if found["data_path"] is None else of_type("data_path", found["data_path"], str)
            return {
                "options": stored_options(found["options"]), "data_path": data, "budgets": budgets,
                "seed": of_type("seed", found["seed"], int), "seeds": found["seeds"],
                "tune": of_type("tune", found["tune"], bool), "task": dict(found["task"]),
            }  # fmt: skip
        except (KeyError, ValueError, TypeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{path}: is damaged: {what}; start a new comparison with another --out") from None
