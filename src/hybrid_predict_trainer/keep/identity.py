"""What must agree between the run that wrote a checkpoint and the one that reads it, setting by setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.settings import FOR_EXACT, NOISY, PORTFOLIO
from ..config.toml import flatten, parse
from ..records import CheckpointError, StateDict
from ..weights.parameters import optimizer_parameters
from .optimizer_state import check_names

if TYPE_CHECKING:
    from ..cycle.state import State

#: Settings of each predictor that the form of its state depends on.
STRUCTURAL: dict[str, tuple[str, ...]] = {
    "secant": ("num_displacements",),
    "quasi_newton": ("history", "memory_mb"),
    "linear": ("feature_dim", "num_displacements"),
    "dmd": ("num_displacements", "delays"),
    "mlp": ("hidden", "num_displacements", "replay_windows"),
    "rssm": (
        "deterministic_dim", "stochastic_dim", "num_categoricals", "ensemble_size", "hidden_dim", "num_displacements",
        "replay_windows",
    ),
}  # fmt: skip
#: Library state that is empty where a setting switches it off, and the setting.
SWITCHES = {"scale": "training.max_lr_multiplier", "lookahead": "lookahead.extrapolation"}
#: Settings that switch all of it off.
PREDICTING = ("training.enabled", "training.max_predict_steps", "training.confidence_threshold")


def identity(run: State) -> StateDict:
    """Of the objects that were handed in, and of the settings that the form of the state depends on."""
    return {
        "optimizer": type(run.subject.optimizer).__name__,
        "group_sizes": [len(g["params"]) for g in run.subject.optimizer.param_groups],
        "parameters": [list(p.shape) for p in optimizer_parameters(run.subject.optimizer)],
        "scheduler": None if run.schedule.scheduler is None else type(run.schedule.scheduler).__name__,
        "scaler": run.subject.grad_scaler is not None,
        "roles": {
            name: run.subject.groups.roles[g]
            for name, g in zip(run.subject.groups.names, run.subject.groups.index, strict=True)
        },
        "settings": _structural(run),
    }


def _structural(run: State) -> dict[str, Any]:
    table = getattr(run.config.predictor, run.proposer.predictor.name, None)
    names = STRUCTURAL.get(run.proposer.predictor.name, ()) if table is not None else ()
    values = {f"predictor.{run.proposer.predictor.name}.{name}": getattr(table, name) for name in names}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def check_identity(run: State, parts: Mapping[str, StateDict], live: Mapping[str, StateDict], config_toml: str) -> None:
    """Refuse a checkpoint of a run over other objects or with settings that its state does not fit.

    Raises:
        CheckpointError: the message names the first object or setting.
    """
    saved, now = parts["trainer"]["identity"], live["trainer"]["identity"]
    if not isinstance(saved, dict):
        raise CheckpointError("the identity of the run that wrote it cannot be read")
    for key in ("optimizer", "group_sizes", "parameters", "scheduler", "scaler"):
        if saved.get(key) != now[key]:
            raise CheckpointError(f"{key} is {saved.get(key)!r} in the checkpoint and {now[key]!r} in this run")
    check_names(parts["optimizer"], run.subject.model, run.subject.optimizer)
    predictor = parts.get("predictor")
    chosen = (NOISY, *FOR_EXACT) if run.proposer.chooses else (run.proposer.predictor.name,)
    if predictor is not None and predictor["name"] not in chosen:
        raise CheckpointError(
            f"it was written with predictor {predictor['name']!r}, this run has {run.proposer.predictor.name!r}: "
            "set predictor.type to match"
        )
    if predictor is not None and predictor["name"] == PORTFOLIO and not run.subject.can_solve:
        raise CheckpointError(
            "it was written by a run in closed form, and this run has no residuals to solve for: pass the same "
            "residual_fn or output_fn, train in one process, and add no weight decay to the gradient"
        )
    settings = _settings(config_toml)
    same = predictor is not None and predictor["name"] == run.proposer.predictor.name
    if predictor is not None:
        for key, value in now["settings"].items() if same else ():
            old = saved.get("settings", {}).get(key, settings.get(key, value))
            if old != value:
                raise CheckpointError(f"{key} is {old!r} in the checkpoint and {value!r} in this run: set it to match")
        for name, role in now["roles"].items():
            old = saved.get("roles", {}).get(name, role)
            if old != role:
                raise CheckpointError(
                    f"the role of {name} is {old!r} in the checkpoint and {role!r} in this run: give the same roles"
                )
    theirs, ours = (own["trainer"]["run"].get("optimizer_step", {}) for own in (parts, live))
    for key, setting in SWITCHES.items():
        if theirs.get(key) == {} and ours.get(key):
            named = [k for k in (setting, *PREDICTING) if k in settings and settings[k] != _value(run, k)]
            raise CheckpointError(
                f"{named[0] if named else setting} is switched off in the checkpoint, on in this run: set it to match"
            )


def _settings(config_toml: str) -> dict[str, Any]:
    """Dotted key -> value of a checkpoint's own configuration."""
    return flatten(parse(config_toml))


def _value(run: State, key: str) -> Any:
    return getattr(run.config, key.partition(".")[2], None)


def check_parts(path: Path, parts: Mapping[str, StateDict]) -> None:
    """Refuse what no trainer wrote.

    Raises:
        CheckpointError: a part is missing or is no table.
    """
    for part in ("model", "optimizer", "trainer"):
        if not isinstance(parts.get(part), dict):
            raise CheckpointError(f"{path}: has no part {part!r}: it was not written by a trainer")
    wanted = {
        "optimizer": ("state", "groups", "unowned"),
        "trainer": ("run", "metrics", "scheduler", "scaler", "rng", "identity"),
        "predictor": ("name", "predictor", "basis"),
    }
    for part, keys in wanted.items():
        for key in keys if part in parts else ():
            if not isinstance(parts[part], dict) or key not in parts[part]:
                raise CheckpointError(f"{path}: the part {part!r} lacks {key!r}; use another checkpoint")
