"""A trainer to and from a checkpoint: which parts there are, and in which order they are taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .metrics import Metrics
from .records import CheckpointError, State
from .run import Run
from .snapshot import optimizer_parameters, restore_optimizer, rng_state, set_rng_state
from .toml_io import to_toml


def parts(run: Run, metrics: Metrics) -> dict[str, State]:
    """Everything a bitwise resume needs, by part."""
    saved: dict[str, State] = {
        "model": dict(run.model.state_dict()),
        "optimizer": _optimizer_state(run),
        "trainer": {
            "run": run.state_dict(),
            "metrics": metrics.state_dict(),
            "scheduler": None if run.lr_scheduler is None else run.lr_scheduler.state_dict(),
            "scaler": None if run.grad_scaler is None else run.grad_scaler.state_dict(),
            "rng": rng_state(),
            "identity": _identity(run),
        },
    }
    if run.config.checkpoint.include_predictor:
        saved["predictor"] = {
            "name": run.predictor.name, "predictor": run.predictor.state_dict(), "basis": run.basis.state_dict(),
            "observer": run.observer.state_dict(),
        }  # fmt: skip
    return saved


def save(run: Run, metrics: Metrics, directory: Path, extra: dict[str, State] | None = None) -> Path:
    """Write ``directory/checkpoint_step_N``.

    Args:
        run: In a consistent state, between steps.
        metrics: Of that run.
        directory: Made if missing.
        extra: More parts, such as a data position.

    Raises:
        CheckpointError: it could not be written.
    """
    return checkpoint.save(
        directory,
        run.counters.num_steps,
        {**parts(run, metrics), **(extra or {})},
        config_toml=to_toml(run.config),
        summary={
            "loss": run.history.loss_ema.mean, "phase": run.phase.value,
            "phase_step": getattr(run.counters, f"{run.phase.value}_steps"), "confidence": run.stated_confidence,
            "num_real_steps": run.counters.num_real_steps, "cost_units": run.counters.cost_units,
        },
        keep_last_n=run.config.checkpoint.keep_last_n,
    )  # fmt: skip


def load(run: Run, metrics: Metrics, path: Path) -> dict[str, State]:
    """Take a checkpoint back: all of it is read and checked before anything is changed.

    Returns:
        All parts, for what the caller added.

    Raises:
        CheckpointError: missing, damaged, or of another model, optimizer or predictor.
    """
    loaded = checkpoint.load(path)
    for part in ("model", "optimizer", "trainer"):
        if part not in loaded.parts:
            raise CheckpointError(f"{path}: has no part {part!r}: it was not written by a trainer")
    model_state, optimizer_state, own = (loaded.parts[p] for p in ("model", "optimizer", "trainer"))
    checkpoint.check_compatible(model_state, run.model.state_dict())
    _check_identity(path, own["identity"], _identity(run))
    predictor = loaded.parts.get("predictor")
    if predictor is not None and predictor["name"] != run.predictor.name:
        raise CheckpointError(
            f"{path}: was written with predictor {predictor['name']!r}, this run has {run.predictor.name!r}: "
            "set predictor.type to match"
        )
    if predictor is not None:
        run.observer.check_state(predictor.get("observer", {}))

    run.model.load_state_dict(model_state)
    with torch.no_grad():
        for live, extra in zip(_unowned(run), optimizer_state["unowned"], strict=True):
            live.copy_(extra)
    restore_optimizer(run.optimizer, optimizer_state["state"], optimizer_state["groups"])
    if run.lr_scheduler is not None:
        run.lr_scheduler.load_state_dict(own["scheduler"])
    if run.grad_scaler is not None:
        run.grad_scaler.load_state_dict(own["scaler"])
    if predictor is not None:
        run.predictor.load_state_dict(predictor["predictor"])
        run.basis.load_state_dict(predictor["basis"])
        run.observer.load_state_dict(predictor.get("observer", {}))
    run.load_state_dict(own["run"])
    metrics.load_state_dict(own["metrics"])
    set_rng_state(own["rng"])
    return loaded.parts


def _unowned(run: Run) -> list[Tensor]:
    """Parameters the optimizer holds but the model does not."""
    owned = {id(p) for p in run.model.parameters()}
    return [p for p in optimizer_parameters(run.optimizer) if id(p) not in owned]


def _optimizer_state(run: Run) -> State:
    optimizer = run.optimizer
    parameters = optimizer_parameters(optimizer)
    return {
        "state": {i: dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "unowned": [p.detach() for p in _unowned(run)],
    }


def _identity(run: Run) -> dict[str, Any]:
    """What must agree between the run that wrote a checkpoint and the one that reads it."""
    return {
        "optimizer": type(run.optimizer).__name__,
        "group_sizes": [len(g["params"]) for g in run.optimizer.param_groups],
        "parameters": [list(p.shape) for p in optimizer_parameters(run.optimizer)],
        "scheduler": None if run.lr_scheduler is None else type(run.lr_scheduler).__name__,
        "scaler": run.grad_scaler is not None,
    }


def _check_identity(path: Path, saved: dict[str, Any], live: dict[str, Any]) -> None:
    for key, value in live.items():
        if saved.get(key) != value:
            raise CheckpointError(f"{path}: {key} is {saved.get(key)!r} in the checkpoint and {value!r} in this run")


def memory_usage(run: Run) -> dict[str, int]:
    """Bytes held beside model and optimizer: ``predictor``, ``corrector``, ``basis_<device>``, ``snapshots``."""
    snapshots = [run.anchor, run.old_anchor, None if run.probation is None else run.probation.snapshot]
    return {
        "predictor": run.predictor.memory_bytes(),
        "corrector": run.adaptation.memory_bytes(),
        **({"encoder": run.observer.memory_bytes()} if run.observer.memory_bytes() else {}),
        **{f"basis_{device}": size for device, size in run.basis.memory_bytes().items()},
        **({"scale": run.scale.memory_bytes()} if run.scale.memory_bytes() else {}),
        **({"lookahead": run.lookahead.memory_bytes()} if run.lookahead.memory_bytes() else {}),
        "snapshots": sum(s.memory_bytes() for s in snapshots if s is not None),
    }
