"""Runs of a benchmark on disk, one JSON file each, under a name made of everything that determines it.

An interrupted benchmark resumes from them, an added arm leaves the others alone, and regimes that share a
run (the sweep of the plain arm, its budgets at the tuned rate) share its file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...config.toml import to_toml
from ...safe_files import read_json, write_text
from ...tell.sinks import jsonable
from ..arms.environment import cpu_model
from ..run_arm import Arm, ArmRun, Experiment

#: Bump where the meaning of a stored run changes.
FORMAT = 3

PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRun:
    """A run, and what of its time went into predicting (None: it does not predict)."""

    run: ArmRun
    time_share: float | None = None


def identity(setup: Experiment, arm: Arm, seed: int, *, timed_threads: int | None = None) -> dict[str, Any]:
    """Everything that determines a run, JSON-able.

    The name of the arm counts for peers only, so that ``plain`` at budget 2 is one run wherever it is
    wanted.  A plain run knows nothing of prediction: of the trainer's settings only those that it reads count.

    Args:
        setup: Of the case.
        arm: Which.
        seed: Of the run.
        timed_threads: Where its wall-clock is used, the number of threads; processor and torch count too then.
    """
    recipe = asdict(replace(setup.recipe, lr=arm.lr, lr_grid=(), predictor="", steps=setup.steps))
    config = setup.config
    read: Any = to_toml(config)
    if arm.kind in ("plain", "peer"):  # a setting of prediction that is added later leaves their runs valid
        read = {"gradient_clip_norm": config.gradient_clip_norm, "divergence": asdict(config.divergence)}
        read["seed"] = config.seed
    found: dict[str, Any] = {
        "format": FORMAT, "version": __version__, "code": code_of(arm.kind), "task": setup.task.describe(),
        "settings": asdict(setup.settings), "recipe": recipe, "config": read, "kind": arm.kind,
        "peer": arm.name if arm.kind == "peer" else None, "budget": arm.budget, "seed": seed,
    }  # fmt: skip
    if timed_threads is not None:
        found["timed"] = {"threads": timed_threads, "torch": str(torch.__version__), "cpu": cpu_model()}
    plain_json: dict[str, Any] = json.loads(json.dumps(jsonable(found)))
    return plain_json


def code_of(kind: str) -> str:
    """Fingerprint of the source that an arm's result depends on beside the version.

    The version of a source tree stays the same while the method is worked on: a stored run of yesterday's method
    must not stand for today's.  Plain training is held bit for bit by tests and has no fingerprint.
    """
    if kind in ("hybrid", "jump-of-zero"):
        return fingerprint(*(f"{folder}*.py" for folder in METHOD))
    if kind == "peer":
        return fingerprint("experiments/baselines/*.py")
    return ""


#: Folders that a run of ours depends on: the product without what it only tells.
METHOD = (
    "", "config/", "weights/", "numerics/", "keep/", "observe/", "predictors/", "propose/", "judge/", "move/", "cycle/",
)  # fmt: skip
#: Modules in them that no run depends on.
NOT_THE_METHOD = frozenset({"__main__.py", "gradient_health.py", "former_names.py", "version.py"})


@functools.cache
def fingerprint(*patterns: str) -> str:
    """Hash of the package's files that match."""
    digest_ = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in PACKAGE.glob(pattern)}):
        if path.name not in NOT_THE_METHOD:
            digest_.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest_.hexdigest()[:16]


def digest(key: Mapping[str, Any]) -> str:
    """Short hash of an identity, the same in every process."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]


class RunStore:
    """The folder of stored runs."""

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        """Args: folder: made when needed.  fresh: take nothing that was there before."""
        self._folder, self._fresh = folder, fresh
        self._written: set[str] = set()

    def path(self, key: Mapping[str, Any]) -> Path:
        """Where the run of an identity is, readable as far as a name can be."""
        what = key["peer"] or key["kind"]
        name = f"{key['task'].get('task', 'task')}-{what}-b{key['budget']:g}-s{key['seed']}-{digest(key)}.json"
        return self._folder / name

    def get(self, key: Mapping[str, Any]) -> TimedRun | None:
        """The stored run; None where there is none, or its file is damaged."""
        path = self.path(key)
        if self._fresh and path.name not in self._written:
            return None
        try:
            found = read_json(path)
            return measured_of(found["measured"]) if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: Mapping[str, Any], measured: TimedRun) -> None:
        """Write it whole or not at all: an interrupted benchmark leaves no half file."""
        path = self.path(key)
        write_text(path, json.dumps({"key": key, "measured": jsonable(asdict(measured))}, allow_nan=False) + "\n")
        self._written.add(path.name)


def measured_of(value: Mapping[str, Any]) -> TimedRun:
    """Inverse of ``jsonable(asdict(measured))``: JSON has no NaN and no tuples."""
    told = {f.name: value["run"][f.name] for f in fields(ArmRun) if f.name in value["run"]}
    run = ArmRun(
        **{
            **told,
            "arm": Arm(**told["arm"]),
            "final_val_loss": _number(told["final_val_loss"]),
            "wall_s": _number(told["wall_s"]),
            "cpu_s": _number(told["cpu_s"]),
            "solution_error": _number(told.get("solution_error")),
            "counts": {k: _number(v) for k, v in told["counts"].items()},
            "curve": tuple(_pairs(told["curve"])),
        }
    )
    return TimedRun(run=run, time_share=value["time_share"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _pairs(value: Iterable[tuple[float, float | None]]) -> Iterable[tuple[float, float]]:
    return ((float(cost), _number(loss)) for cost, loss in value)
