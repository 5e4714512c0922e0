"""Gradient health: norms per layer, gradient over weight, and two checklists, as data and as text.

The zones are absolute (methodology document, "Gradient Health Indicators") and so depend on how the
loss is scaled; they describe, they decide nothing.  What acts on a run are the *relative* signals of
``divergence``.  Everything here reads gradients as a backward pass left them and changes nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import algebra as weights

#: Healthy gradient norm; outside these a warning, beyond CRITICAL_NORMS critical (also per layer).
HEALTHY_NORMS = (0.1, 10.0)
CRITICAL_NORMS = (0.01, 100.0)
#: Healthy norm of the gradient over that of the weights; 1e-3 is ideal.
HEALTHY_RATIOS = (1e-4, 1e-2)
#: The norm of a running run should stay within this factor of its warm-up baseline.
BASELINE_FACTOR = 2.0
#: Growth of the norms' variance that counts as rising.  Arbitrary: the document has no number.  Two
#: estimates from 32 steps each of the same noise differ by more in fewer than 1 in 1000 cases.
VARIANCE_FACTOR = 4.0
#: Layers named in the text of a check.
NUM_NAMED = 3


class Zone(StrEnum):
    """Where a gradient norm lies."""

    HEALTHY = "healthy"
    HIGH = "high"
    LOW = "low"
    CRITICAL = "critical"
    NOT_FINITE = "not finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHealth:
    """One layer: a module with trainable parameters of its own."""

    name: str
    num_parameters: int
    gradient_norm: float
    parameter_norm: float
    ratio: float | None  # gradient over weights; None for weights of zero
    zone: Zone


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a checklist."""

    name: str
    passed: bool
    value: str
    legal: str
    advice: str  # what to do where it failed; empty where it passed


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """The whole model after one backward pass."""

    gradient_norm: float
    parameter_norm: float
    ratio: float | None
    zone: Zone
    layers: tuple[LayerHealth, ...]
    checks: tuple[Check, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def critical_layers(self) -> tuple[LayerHealth, ...]:
        """Layers whose gradient vanishes, explodes or is not finite."""
        return tuple(layer for layer in self.layers if layer.zone in (Zone.CRITICAL, Zone.NOT_FINITE))

    def as_dict(self) -> dict[str, Any]:
        """Plain containers and values, for a JSON file or a checkpoint."""
        layers = [{**asdict(layer), "zone": layer.zone.value} for layer in self.layers]
        checks = [asdict(check) for check in self.checks]
        return {**asdict(self), "zone": self.zone.value, "layers": layers, "checks": checks, "ok": self.ok}


# ---- measuring ----------------------------------------------------------------------------------


def zone_of(norm: float) -> Zone:
    """Zone of a gradient norm."""
    if not math.isfinite(norm):
        return Zone.NOT_FINITE
    if norm > CRITICAL_NORMS[1] or norm < CRITICAL_NORMS[0]:
        return Zone.CRITICAL
    if norm > HEALTHY_NORMS[1]:
        return Zone.HIGH
    return Zone.LOW if norm < HEALTHY_NORMS[0] else Zone.HEALTHY


def gradient_to_parameter(gradient_norm: float, parameter_norm: float) -> float | None:
    """Ratio of the norms; None for weights of zero, which have no scale yet."""
    return gradient_norm / parameter_norm if parameter_norm > 0 else None


@torch.no_grad()
def measure(model: nn.Module) -> HealthReport:
    """Norms of all layers from the gradients the last backward pass left; one wait for the device.

    Parameters without a gradient (frozen or unused) are left out; a shared one belongs to the layer
    that comes first.
    """
    names, sizes, gradients, parameters = [], [], [], []
    seen: set[int] = set()
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if id(p) in seen or p.grad is None:
                continue
            seen.add(id(p))
            names.append(name or "(model)")
            sizes.append(p.numel())
            gradients.append(p.grad.coalesce().values() if p.grad.is_sparse else p.grad)
            parameters.append(p.detach())
    squares = [[norm * norm for norm in _norms(tensors)] for tensors in (gradients, parameters)]
    layers = []
    for name in dict.fromkeys(names):
        mine = [i for i, other in enumerate(names) if other == name]
        g, w = (math.sqrt(sum(column[i] for i in mine)) for column in squares)
        layers.append(
            LayerHealth(
                name=name, num_parameters=sum(sizes[i] for i in mine), gradient_norm=g, parameter_norm=w,
                ratio=gradient_to_parameter(g, w), zone=zone_of(g),
            )
        )  # fmt: skip
    total_g, total_w = (math.sqrt(sum(column)) for column in squares)
    return HealthReport(
        gradient_norm=total_g, parameter_norm=total_w, ratio=gradient_to_parameter(total_g, total_w),
        zone=zone_of(total_g), layers=tuple(layers),
    )  # fmt: skip


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    norms = weights.on_host([torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors])
    return [float(n) for n in norms.tolist()]


def _wide(t: Tensor) -> torch.dtype | None:
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else None


def norm_variance(norms: Sequence[float]) -> float:
    """Relative variance of gradient norms, from squared differences of neighbours: a trend does not count.

    The mean of (x_{i+1} - x_i)^2 / 2 estimates the variance of independent noise around any slow
    curve (von Neumann, 1941); NaN below two norms.
    """
    if len(norms) < 2:
        return math.nan
    mean = sum(norms) / len(norms)
    half = sum((b - a) ** 2 for a, b in itertools.pairwise(norms)) / (2 * (len(norms) - 1))
    return half / (mean * mean) if mean > 0 else math.nan


# ---- checklists ---------------------------------------------------------------------------------


def _check(name: str, passed: bool, value: str, legal: str, advice: str) -> Check:
    return Check(name=name, passed=passed, value=value, legal=legal, advice="" if passed else advice)


def check_finite(report: HealthReport) -> Check:
    """No NaN and no infinity in any gradient."""
    bad = [layer.name for layer in report.layers if layer.zone is Zone.NOT_FINITE]
    return _check(
        "gradients finite", not bad and math.isfinite(report.gradient_norm), _named(bad) if bad else "all", "all",
        "go back to the last checkpoint, divide the learning rate by 10, clip gradients at 1.0",
    )  # fmt: skip


def check_norm(report: HealthReport) -> Check:
    """Global norm in the healthy range."""
    if report.gradient_norm > HEALTHY_NORMS[1]:
        advice = "reduce the learning rate or clip gradients at 1.0"
    else:
        advice = "raise the learning rate, or check the initialisation and the scale of the loss"
    passed = report.zone is Zone.HEALTHY
    return _check("gradient norm", passed, _number(report.gradient_norm), _range(HEALTHY_NORMS), advice)


def check_layers(report: HealthReport) -> Check:
    """No layer's norm below 0.01 or above 100."""
    bad = report.critical_layers
    value = _named([f"{layer.name} {_number(layer.gradient_norm)}" for layer in bad]) if bad else "all"
    return _check(
        "layer norms", not bad, value, _range(CRITICAL_NORMS),
        "vanishing: residual connections, a normalisation layer, another initialisation; exploding: clip gradients",
    )  # fmt: skip


def check_ratio(report: HealthReport) -> Check:
    """Gradient over weights in the healthy range."""
    ratio = report.ratio
    low, high = HEALTHY_RATIOS
    passed = ratio is not None and low <= ratio <= high
    advice = "reduce the learning rate" if ratio is not None and ratio > high else "raise the learning rate"
    value = "weights are 0" if ratio is None else _number(ratio)
    return _check("gradient / weights", passed, value, _range(HEALTHY_RATIOS), advice)


def check_baseline(report: HealthReport, baseline: float) -> Check:
    """Global norm within a factor of two of its warm-up baseline; passes where there is none."""
    ratio = report.gradient_norm / baseline if baseline > 0 else 1.0
    passed = 1 / BASELINE_FACTOR <= ratio <= BASELINE_FACTOR
    high, low = "halve the learning rate, clip gradients at 1.0", "expected near a minimum; if not, see layer norms"
    advice = high if ratio > 1 else low
    return _check("norm / baseline", passed, _number(ratio), _range((1 / BASELINE_FACTOR, BASELINE_FACTOR)), advice)


def check_variance(norms: Sequence[float]) -> Check:
    """Variance of the norms not rising: second half of what is given against the first."""
    middle = len(norms) // 2
    before, after = norm_variance(norms[:middle]), norm_variance(norms[middle:])
    known = math.isfinite(before) and math.isfinite(after) and before > 0
    growth = after / before if known else 1.0
    value, legal = _number(growth) if known else "unknown", f"at most {VARIANCE_FACTOR:g}"
    advice = "a larger batch or a lower learning rate"
    return _check("norm variance, growth", growth <= VARIANCE_FACTOR, value, legal, advice)


def pre_training(report: HealthReport) -> HealthReport:
    """The report with the checklist for after the first backward pass."""
    checks = (check_norm(report), check_layers(report), check_ratio(report), check_finite(report))
    return replace(report, checks=checks)


def periodic(report: HealthReport, *, baseline: float, norms: Sequence[float]) -> HealthReport:
    """The report with the checklist for every 100 steps.

    Args:
        report: Of the present step.
        baseline: Mean gradient norm over warm-up.
        norms: Of the latest steps, oldest first.
    """
    checks = (
        check_baseline(report, baseline), check_layers(report), check_variance(norms), check_ratio(report),
        check_finite(report),
    )  # fmt: skip
    return replace(report, checks=checks)


# ---- text ---------------------------------------------------------------------------------------


def as_text(report: HealthReport) -> str:
    """Layers and checklist as a table for a terminal."""
    head = ("layer", "weights", "gradient norm", "weight norm", "ratio", "zone")
    rows = [
        (
            layer.name, f"{layer.num_parameters:,}", _number(layer.gradient_norm), _number(layer.parameter_norm),
            "-" if layer.ratio is None else _number(layer.ratio), layer.zone.value,
        )
        for layer in report.layers
    ]  # fmt: skip
    total = "-" if report.ratio is None else _number(report.ratio)
    count = sum(layer.num_parameters for layer in report.layers)
    norms = (_number(report.gradient_norm), _number(report.parameter_norm))
    rows.append(("all", f"{count:,}", *norms, total, report.zone.value))
    lines = _aligned([head, *rows])
    if report.checks:
        marks = [("ok  " if c.passed else "FAIL", c.name, c.value, f"({c.legal})", c.advice) for c in report.checks]
        lines += ["", *_aligned(marks)]
    return "\n".join(line.rstrip() for line in lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _number(value: float) -> str:
    return f"{value:.3g}"


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:g} to {limits[1]:g}"


def _named(names: Sequence[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
