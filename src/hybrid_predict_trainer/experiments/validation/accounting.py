"""What a run costs, plain and with half of it predicted: FLOPs counted and by formula, passes, memory, energy, CO2."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...records import ConfigError
from ...safe_files import read_json_object, write_text
from ...tell.sinks import jsonable
from .forced import ForcedRun, Outcome, forced, plain
from .loop import Loop, task_of
from .plain import SCALES, Scale
from .stored import read_from

FORMAT = 1

#: kg of CO2 equivalent per kWh, world average of electricity in 2023 (Ember, Global Electricity Review 2024: 480 g).
GRID_FACTOR = 0.48
#: FLOPs of a weight and token: 2 forward, 4 backward (arXiv 2001.08361, section 2.1).
FORWARD_FLOPS, BACKWARD_FLOPS = 2, 4
#: Runs of the account are this share of the scale's.
SHARE = 0.2
MIN_STEPS = 40
RAPL = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


class Energy:
    """Joules since it was made, from the counters that can be read; None with the reason where none can."""

    def __init__(self, rapl: Path = RAPL) -> None:
        """Look for counters: RAPL packages, and NVML where ``pynvml`` is installed."""
        self._counters: list[Callable[[], float]] = []
        reasons = [self._add_rapl(rapl), self._add_nvml()]
        self.reason = "" if self._counters else "; ".join(reasons)
        self._first = [read() for read in self._counters]

    def _add_rapl(self, folder: Path) -> str:
        packages = sorted(folder.glob("intel-rapl:?")) if folder.is_dir() else []
        for package in packages:
            path = package / "energy_uj"
            try:
                path.read_text(encoding="ascii")
            except OSError as error:
                return f"RAPL: {error.strerror or error}"
            self._counters.append(lambda path=path: 1e-6 * float(path.read_text(encoding="ascii")))  # type: ignore[misc]
        return "RAPL: no counters here" if not packages else ""

    def _add_nvml(self) -> str:
        if not torch.cuda.is_available():
            return "NVML: no GPU"
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception as error:
            return f"NVML: {error}"
        self._counters.append(lambda: 1e-3 * float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
        return ""

    def joules(self) -> float | None:
        """So far; None where a counter went round."""
        if not self._counters:
            return None
        used = [read() - first for read, first in zip(self._counters, self._first, strict=True)]
        return sum(used) if min(used) >= 0 else None


def step_flops(loop: Loop) -> dict[str, float]:
    """FLOPs of one step by torch's counter and by formula, forward and backward; the loop makes no step.

    Attention runs unfused for it: the counter does not know every fused kernel.
    """
    batch = loop.probe_batches(1)[0]
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            loss: torch.Tensor = loop.task.loss_fn(loop.model, batch)
        forward = float(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(loss)
        backward = float(counter.get_total_flops())
    loop.model.zero_grad()
    first = batch[0] if isinstance(batch, Sequence) else batch
    tokens = int(first.numel()) if not first.is_floating_point() else len(first)
    weights = sum(p.numel() for p in loop.model.parameters())
    return {
        "forward": forward, "backward": backward, "forward_by_formula": FORWARD_FLOPS * weights * tokens,
        "backward_by_formula": BACKWARD_FLOPS * weights * tokens,
    }  # fmt: skip


def memory_of(loop: Loop) -> dict[str, int]:
    """Bytes by what holds them; on an accelerator the peak that was allocated as well."""
    weights = sum(p.numel() * p.element_size() for p in loop.model.parameters())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in loop.model.parameters() if p.grad is not None)
    state = sum(
        v.numel() * v.element_size()
        for values in loop.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)
    )  # fmt: skip
    basis = sum(loop.basis.memory_bytes().values())
    predictors = sum(p.memory_bytes() for p in loop.predictors.values())
    found = {"weights": weights, "gradients": gradients, "optimizer": state, "basis": basis, "predictor": predictors}
    device = next(loop.model.parameters()).device
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated(device)
    return found


def measure(scale: Scale, seed: int, tell: Callable[[str], None], grid_factor: float = GRID_FACTOR) -> dict[str, Any]:
    """A plain run and one with half of its steps predicted, a fifth as long as the scale's.

    Args:
        scale: Sizes.
        seed: Of both.
        tell: Takes a line about every run.
        grid_factor: kg of CO2 equivalent per kWh.
    """
    task = task_of(scale)
    sized = replace(scale, steps=max(MIN_STEPS, round(SHARE * scale.steps)))
    flops = step_flops(Loop(sized, seed, task=task))
    plan = ForcedRun(share=0.5, horizon=dict(scale.jump_steps)[50], predictor=scale.forced)
    rows = {}
    runs: dict[str, Callable[[], tuple[Loop, Outcome]]] = {
        "plain": lambda: plain(sized, seed, task), "50 % predicted": lambda: forced(sized, seed, task, plan)
    }  # fmt: skip
    for name, train in runs.items():
        meter, began = Energy(), time.perf_counter()
        loop, outcome = train()
        joules, seconds = meter.joules(), time.perf_counter() - began
        memory = memory_of(loop)
        kwh = None if joules is None else joules / JOULES_PER_KWH
        rows[name] = {
            "forwards": loop.num_real, "backwards": loop.num_real, "jumps": outcome.jumps,
            "flops": loop.num_real * (flops["forward"] + flops["backward"]),
            "flops_by_formula": loop.num_real * (flops["forward_by_formula"] + flops["backward_by_formula"]),
            "memory": memory, "memory_total": memory.get("peak", sum(memory.values())), "seconds": seconds,
            "cpu_seconds": outcome.seconds, "joules": joules, "no_energy": meter.reason,
            "co2_kg": None if kwh is None else kwh * grid_factor, "loss": outcome.loss,
        }  # fmt: skip
        tell(f"account, {name}: {loop.num_real} real steps, {outcome.seconds:.1f} s of the processor")
    return {"per_step": flops, "runs": rows, "grid_factor": grid_factor, "steps": sized.steps}


def kept(out: Path, scale_name: str, tell: Callable[[str], None], grid_factor: float = GRID_FACTOR) -> dict[str, Any]:
    """The account of a scale, measured where it is not kept in ``out`` yet.

    Raises:
        ConfigError: the one that is kept is damaged or of another version or size.
    """
    scale, path = SCALES[scale_name], out / f"account-{scale_name}.json"
    if not path.exists():
        found = {"format": FORMAT, "config": asdict(scale), **measure(scale, 0, tell, grid_factor)}
        write_text(path, json.dumps(jsonable(found), indent=1) + "\n")
    stored = read_json_object(path)
    whole = isinstance(stored.get("runs"), dict) and isinstance(stored.get("per_step"), dict)
    if not whole or stored.get("format") != FORMAT or stored.get("config") != jsonable(asdict(scale)):
        raise ConfigError(f"{path}: is of another version or size, or damaged; delete it or choose another --out")
    with read_from(path):
        for run in stored["runs"].values():  # the factor is applied afresh: it is no measurement
            joules = run["joules"]
            run["co2_kg"] = None if joules is None else joules / JOULES_PER_KWH * grid_factor
    return {**stored, "grid_factor": grid_factor}
