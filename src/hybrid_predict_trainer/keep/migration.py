"""Checkpoints of older formats, brought to the present one before they are checked.

Format 4 stored equal tensors and empty columns in full.  Format 3 kept what the library remembers of a run by what it
is, the present one by who owns it.  Format 2 knew neither
names of the optimizer's parameters nor what hangs on it besides, and library state that came later.  What is missing is
taken from the live run, which then begins anew in that respect; what has another form today, too.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..records import CheckpointError, StateDict
from . import schema

#: What format 3 knows of the model beside its state; nothing in format 2.
NOTHING_KNOWN: StateDict = {"frozen": {}, "buffers": {}, "hidden": {}}

#: Where the library's state stood until format 3 -> where it stands today.  What is inside another comes first.
OWNED: dict[str, str] = {
    "ledger.planned_units": "meter.planned_units",
    "monitor.num_rollbacks": "judge.num_rollbacks",
    "scalars.horizon": "proposer.horizon",
    "scalars.refused": "proposer.refused",
    "scalars.num_windows_since_proposal": "proposer.num_windows_since_proposal",
    "scalars.window_just_closed": "windows.just_closed",
    "scalars.num_windows": "windows.num_closed",
    "scalars.num_rest_steps": "windows.num_rest_steps",
    "scalars.lr_integral": "windows.lr_integral",
    "scalars.loss_slope": "windows.slope",
    "scalars.window_loss": "windows.loss",
    "scalars.num_real_steps_since_predict": "phases.num_real_steps_since_predict",
    "scalars.num_forced_full_steps": "phases.num_forced_full_steps",
    "scalars.forced_by_alarm": "phases.forced_by_alarm",
    "scalars.num_schedule_steps": "schedule.num_steps",
    "scalars.peak_rate": "schedule.peak",
    "scalars.needs_grad_mode": "judge.evaluation.needs_grad_mode",
    "scalars.quiet_fails": "judge.evaluation.quiet_fails",
    "scalars.loss_writes": "judge.evaluation.loss_writes",
    "scalars.batch_free": "batches.free",
    "scalars.anchor_real_steps": "rollback.num_real_steps",
    "scalars.anchor_schedule_steps": "rollback.num_schedule_steps",
    "predictor": "proposer.predictor",
    "adaptation": "proposer.feedback",
    "segment": "proposer.segment",
    "confidence": "proposer.confidence",
    "phase": "phases.current",
    "counters": "meter",
    "history": "losses",
    "monitor": "monitor",
    "window": "windows.last",
    "ledger": "judge.ledger",
    "exactness": "judge.exactness",
    "probation": "judge.probation",
    "generator": "judge.generator",
    "cuts": "judge.evaluation.cuts",
    "scale": "optimizer_step.scale",
    "lookahead": "optimizer_step.lookahead",
    "switchback": "optimizer_step.switchback",
    "schedule": "schedule",
    "anchor": "rollback.point",
    "guard": "safety.guard",
    "validation": "safety.validation",
    "raise_point": "safety.raise_point",
    "safe_point": "safety.safe_point",
    "data": "batches.same_batch",
    "recurrence": "batches.recurrence",
    "failures": "failures",
    "trained": "watch",
}


def upgraded(parts: dict[str, StateDict], live: dict[str, StateDict], format_version: int) -> dict[str, StateDict]:
    """The parts of a checkpoint as the present format has them.

    Args:
        parts: As read.
        live: Parts of the run that is to take them.
        format_version: Of the checkpoint.
    """
    own = dict(parts["trainer"])
    if format_version >= 4:
        own["run"] = with_later(own["run"], live["trainer"]["run"])
        return {**parts, "trainer": own}
    own["run"] = with_later(by_owner(own["run"]), live["trainer"]["run"])
    # a basis was kept in any case; whether that is worth its memory is asked from here on
    sketch = copy.deepcopy(live["trainer"]["run"]["windows"]["sketch"])
    own["run"]["proposer"]["feedback"]["confidence"].setdefault("num_new", 0)  # every outcome was learnt at once
    own["run"]["windows"] = {"keeping": True, "sketch": sketch, **own["run"].get("windows", {})}
    own["run"]["optimizer_step"] = {"modifiers": [], **own["run"].get("optimizer_step", {})}  # there were none
    if format_version < 3:
        own["model"] = NOTHING_KNOWN
        for name in ("run", "metrics"):
            own[name] = _filled(own[name], live["trainer"][name], (name,))
    return {**parts, "trainer": own}


def with_later(run: StateDict, live: StateDict) -> StateDict:
    """The library's state with what format 4 did not have from its beginning.

    That is the run's whole loss curve, what settings put around the optimizer's step, what the embedding's factor hangs
    on, the guard's second try, what the validation says of jumps, what losses are of and whether noise is left of them,
    which of the passes have a price
    of their own, how many gradients in a row were large, narrow drifts, and whether a raise of the multiplier still
    waits to be seen to end above the bottom.
    """
    losses, around, safety = run.get("losses"), run.get("optimizer_step"), run.get("safety")
    if isinstance(run.get("meter"), dict):
        run = {**run, "meter": {"num_priced_passes": 0.0, **run["meter"]}}
    if isinstance(run.get("monitor"), dict):
        run = {**run, "monitor": {"num_large": 0, **run["monitor"]}}
    if isinstance(run.get("judge"), dict):
        run = {**run, "judge": {"of_labels": None, "num_samples": None, "noise": None, **run["judge"]}}  # nobody asked
    if isinstance(losses, dict) and "curve" not in losses:
        run = {**run, "losses": {**losses, "curve": copy.deepcopy(live["losses"]["curve"])}}
    around = _with_arrivals(around)
    if isinstance(around, dict):
        run = {**run, "optimizer_step": around}
    if isinstance(around, dict) and "of_settings" not in around:
        run = {**run, "optimizer_step": {**around, "of_settings": {}}}
    elif isinstance(around, dict) and isinstance(around["of_settings"], dict):
        modifiers = dict(around["of_settings"])
        if isinstance(modifiers.get("RoleRates"), dict):
            none = {"table_least": 0.0, "table_length": 0.0, "table_most": 0.0}
            modifiers["RoleRates"] = {**none, **modifiers["RoleRates"]}
        run = {**run, "optimizer_step": {**around, "of_settings": modifiers}}
    if isinstance(safety, dict) and isinstance(safety.get("guard"), dict):
        safety = {"best_point": None, **safety, "guard": {"num_retries": 0, "exact": False, **safety["guard"]}}
        if isinstance(safety.get("validation"), dict):
            safety["validation"] = {"jumps": None, **safety["validation"]}  # begins anew
        run = {**run, "safety": safety}
    drift = live["optimizer_step"]["lookahead"].get("b")
    return _with_drift_like(run, drift[0]) if drift else run


def _with_arrivals(around: Any) -> Any:
    """What is around the optimizer's step with a multiplier whose raises have all arrived, if it says nothing of it."""
    scale = around.get("scale") if isinstance(around, dict) else None
    if not isinstance(scale, dict) or not isinstance(scale.get("multiplier"), dict):
        return around
    all_arrived = {"arrived": True, "arrivals": [0, 0.0, 0.0], "num_unsteady": 0, "num_looks": 0}
    return {**around, "scale": {**scale, "multiplier": {**all_arrived, **scale["multiplier"]}}}


def _with_drift_like(state: Any, live: Any) -> Any:
    """Drifts in the form of the live one, wherever they are: format 4 has them wide, also of large models.

    A narrow one is told apart from the rest of a state by its two tensors (:class:`..move.drift_storage.Narrow`).
    """
    if isinstance(state, dict):
        found = {key: _with_drift_like(value, live) for key, value in state.items()}
        if "theta_0" in found and isinstance(found.get("b"), list):
            found["b"] = [_drift_like(b, live) for b in found["b"]]
        return found
    return [_with_drift_like(item, live) for item in state] if type(state) is list else state


def _drift_like(drift: Any, live: Any) -> Any:
    if isinstance(drift, Tensor) and isinstance(live, dict):
        unit = drift.abs().amax() if drift.numel() else drift.new_zeros(())
        return {"numbers": (drift / unit.clamp(min=torch.finfo(torch.float32).tiny)).half(), "unit": unit}
    if isinstance(drift, dict) and isinstance(live, Tensor):
        return drift["numbers"].float() * drift["unit"]
    return drift


def by_owner(run: StateDict) -> StateDict:
    """The library's state in format 3, sorted by who owns it today; what is not there is left out."""
    rest = {key: dict(value) if isinstance(value, dict) else value for key, value in run.items()}
    found: StateDict = {}
    for former, place in OWNED.items():
        *outer, name = former.split(".")
        holder = rest.get(outer[0]) if outer else rest
        if not isinstance(holder, dict) or name not in holder:
            continue
        *owners, last = place.split(".")
        target = found
        for owner in owners:
            target = target.setdefault(owner, {})
        value = holder.pop(name)
        target[last] = {**target.get(last, {}), **value} if isinstance(value, dict) else value
    return found


def _filled(saved: Any, live: Any, path: tuple[object, ...]) -> Any:
    """``saved`` with what it lacks from ``live``, and without what nobody reads today."""
    if isinstance(saved, dict) and isinstance(live, dict) and all(type(key) is str for key in live) and live:
        return {
            key: _filled(saved[key], v, (*path, key)) if key in saved else copy.deepcopy(v) for key, v in live.items()
        }
    try:
        schema.check(saved, live, path)
    except CheckpointError:
        return copy.deepcopy(live)
    return saved
