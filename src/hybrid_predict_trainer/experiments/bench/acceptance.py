"""The founding acceptance test of a 100M-class model: baseline and hybrid, loss within 5 %, wall-clock ratio.

It is read from comparisons (``compare.json``, one or more seeds each) and, where they exist, from the table of the
whole stack and from memory as the device's allocator counts it.  Beside the published criteria stands the figure this
project claims, S: "loss within 5 %" is not equal loss, and a run that merely stops earlier passes it, too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...tell.sinks import jsonable
from ..arms.options import InputError
from ..statistics import log_interval, paired_t, significant

#: Published for 100M (validation protocol, D-5): must pass, should pass.
MAX_LOSS_GAP_PCT = 5.0
MIN_SPEEDUP_MUST, MIN_SPEEDUP_SHOULD = 4.0, 5.0
MAX_MEMORY_OVERHEAD_PCT = 3.0
MIN_SEEDS = 3

NOTE = (
    "losses are nats per byte, so the published absolute limit (3.68 per token) does not apply; a published speed-up "
    "is against conventional training: here the wall-clock ratio to the same stack without prediction times what that "
    "stack gains over conventional training"
)

Comparison = Mapping[str, Any]


def judge(
    comparisons: Sequence[Comparison], stack: Mapping[str, Any] | None = None, memory: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hold comparisons of one task against the criteria.

    Args:
        comparisons: Objects ``hpt compare`` wrote, of the same task and recipe and different seeds.
        stack: What :func:`.stack.rows` returned; None: the ratio to conventional training is unknown.
        memory: What :func:`.accelerator.rows` returned; None: memory is unknown.

    Returns:
        Figures, criteria (each with value, limit and whether it is met; None where it is unknown) and ``passed``.

    Raises:
        InputError: nothing to judge, seeds that occur twice, or comparisons of different tasks.
    """
    if not comparisons:
        raise InputError("no comparison to judge: give at least one compare.json")
    about = {(c["task"], c["settings"]["task"].get("preset"), c["settings"]["steps"]) for c in comparisons}
    if len(about) > 1:
        raise InputError("the comparisons are of different tasks, presets or lengths")
    seeds = [seed for c in comparisons for seed in c["seeds"]]
    if len(set(seeds)) < len(seeds):
        raise InputError("a seed occurs twice among the comparisons")
    gaps = [g for c in comparisons for g in c["loss_gap_per_seed"]]
    finite = all(g is not None and math.isfinite(g) for g in gaps)
    gap = log_interval([1 + g / 100 for g in gaps] if finite else []).mapped(lambda ratio: 100 * (ratio - 1))
    walls = [(arm_of(c, "plain")["wall_s"] / arm_of(c, "hybrid")["wall_s"], len(c["seeds"])) for c in comparisons]
    wall = math.exp(sum(n * math.log(w) for w, n in walls) / len(seeds))
    conventional = to_conventional(stack)
    overhead = memory_overhead_pct(memory)
    to_usual = None if conventional is None else wall * conventional
    figures: dict[str, Any] = {
        "seeds": seeds,
        "loss_gap_pct": gap.mean if finite else None,
        "loss_gap_pct_std": statistics.stdev(gaps) if finite and len(gaps) > 1 else None,
        "loss_gap_ci95": gap.ends,
        "loss_gap_ci95_bootstrap_t": gap.bootstrap_t,
        "loss_gap_t": paired_t(gaps) if finite else None,
        "loss_gap_significant": significant(gaps) if finite else None,
        "wall_clock_ratio": wall,
        "conventional_ratio_of_stack": conventional,
        "wall_clock_ratio_to_conventional": to_usual,
        "speedup_at_equal_loss": _combined(comparisons, "speedup_at_equal_loss"),
        "speedup_wall_at_equal_loss": _combined(comparisons, "speedup_wall"),
        "speedup_kinds": sorted({c["speedup_kind"] for c in comparisons}),
        "backward_reduction_claimed_pct": statistics.fmean(c["backward_reduction_claimed_pct"] for c in comparisons),
        "memory_overhead_pct": overhead,
    }
    worst = max(gaps) if finite else math.nan
    criteria = [
        _criterion("loss within 5 % of the baseline on every seed, %", worst, "<", MAX_LOSS_GAP_PCT, must=True),
        _criterion("runs whose loss is not finite", sum(_failed(c) for c in comparisons), "<", 1, must=True),
        _criterion("seeds", len(seeds), ">=", MIN_SEEDS, must=True),
        _criterion("wall-clock over conventional training, x", to_usual, ">=", MIN_SPEEDUP_MUST, must=True),
        _criterion("the same, should pass, x", to_usual, ">=", MIN_SPEEDUP_SHOULD, must=False),
        _criterion("peak memory on the device with offload, %", overhead, "<", MAX_MEMORY_OVERHEAD_PCT, must=False),
    ]
    musts = [c["passed"] for c in criteria if c["must"]]
    return jsonable({  # type: ignore[no-any-return]
        "schema": 1, "what": "acceptance", "figures": figures, "criteria": criteria,
        "passed": False if False in musts else None if None in musts else True,
        "task": comparisons[0]["settings"]["task"], "clock": comparisons[0]["settings"]["trainer"]["clock"],
        "environment": comparisons[0]["environment"],
        "note": NOTE,
    })  # fmt: skip


def arm_of(comparison: Comparison, name: str) -> Mapping[str, Any]:
    """The row of an arm.

    Raises:
        InputError: there is none.
    """
    for arm in comparison["arms"]:
        if arm["name"] == name:
            found: Mapping[str, Any] = arm
            return found
    raise InputError(f"the comparison has no arm {name!r}")


def to_conventional(stack: Mapping[str, Any] | None) -> float | None:
    """Speed of the stack without prediction over conventional training; None if it was not measured."""
    measured = [r for r in (stack or {"rows": []})["rows"] if r["status"] == "measured" and r["name"] != "prediction"]
    return float(measured[-1]["ratio"]) if measured else None


def memory_overhead_pct(memory: Mapping[str, Any] | None) -> float | None:
    """Peak memory of the trainer with offload over the bare loop's, in percent more; None if it was not measured."""
    peaks = {r["store"]: r.get("peak_bytes") for r in (memory or {"memory": []})["memory"]}
    bare, offload = peaks.get("bare loop"), peaks.get("trainer, offload")
    return None if not bare or offload is None else 100 * (offload / bare - 1)


def _combined(comparisons: Sequence[Comparison], name: str) -> float | None:
    """Geometric mean over seeds, as within one comparison; None if one is unknown."""
    values = [(c[name], len(c["seeds"])) for c in comparisons]
    if any(value is None for value, _ in values):
        return None
    total = sum(n for _, n in values)
    return math.exp(sum(n * math.log(value) for value, n in values) / total)


def _failed(comparison: Comparison) -> int:
    return sum(
        loss is None or not math.isfinite(loss)
        for name in ("plain", "hybrid")
        for loss in arm_of(comparison, name)["final_val_loss_per_seed"]
    )


def _criterion(name: str, value: float | None, sense: str, limit: float, *, must: bool) -> dict[str, Any]:
    known = value is not None and math.isfinite(value)
    met = None if not known or value is None else value < limit if sense == "<" else value >= limit
    return {"name": name, "value": value if known else None, "sense": sense, "limit": limit, "must": must,
            "passed": met}  # fmt: skip


def format_text(result: Mapping[str, Any]) -> str:
    """Criteria and figures for a person."""
    words = {True: "passed", False: "not passed", None: "unknown"}

    def told(c: Mapping[str, Any]) -> str:
        value = "-" if c["value"] is None else f"{c['value']:.4g}"
        return f"{words[c['passed']]:<11} {c['name']}: {value} ({c['sense']} {c['limit']:g})"

    figures = result["figures"]
    s, wall = figures["speedup_at_equal_loss"], figures["speedup_wall_at_equal_loss"]
    return "\n".join([
        *map(told, result["criteria"]),
        f"clock {result['clock']}: wall-clock {figures['wall_clock_ratio']:.3f} over the same stack without prediction",
        f"S at equal loss: {'unknown' if s is None else f'{s:.3f}'} by cost, "
        f"{'unknown' if wall is None else f'{wall:.3f}'} by wall-clock ({', '.join(figures['speedup_kinds'])})",
        f"acceptance: {words[result['passed']]}",
    ])  # fmt: skip
