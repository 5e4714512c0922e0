"""What only an accelerator shows: the price of reading losses late, and memory as its allocator counts it.

On the CPU every loss is read at once and host and device are one memory: there each row says that it is not here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...tell.sinks import jsonable
from ..arms.drive import wait_for
from ..arms.environment import environment
from ..arms.options import as_input_error
from ..report.text import aligned
from . import overhead
from .factors import NOT_HERE

Row = dict[str, Any]

#: Steps between two readings of the losses: every step waits; the default; late.
INTERVALS = (1, 10, 50)

#: What is kept where, beside the loop a user would write.
STORES: Mapping[str, Mapping[str, Any]] = {
    "bare loop": {},
    "trainer": {},
    "trainer, bfloat16 basis": {"basis_dtype": "bfloat16"},
    "trainer, offload": {"offload": True},
}


def measure(
    *,
    preset: str = "124M",
    device: str = "cuda",
    batch_size: int = 8,
    context: int = 128,
    pairs: int = 40,
    intervals: Sequence[int] = INTERVALS,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time a full step at several reading intervals, and measure peak memory of several stores.

    Args:
        preset: Size of the gpt task's model.
        device: Where.
        batch_size: Sequences per batch.
        context: Tokens per sequence.
        pairs: Pairs of steps (bare loop, trainer) per interval.
        intervals: Values of ``divergence.check_interval_steps``.
        note: Takes lines for a person who waits.

    Raises:
        InputError: a name or size does not fit, or there is no such device.
    """
    workload = overhead.Workload(
        preset=preset, batch_size=batch_size, context=context, device=device, num_pairs=pairs
    )  # fmt: skip
    with as_input_error():
        prepared = overhead.prepare(workload)
    found: dict[str, Any] = {"schema": 1, "what": "accelerator", "environment": environment(device)}
    if torch.device(device).type == "cpu":
        reason = "the CPU reads every loss at once, and host and device are one memory"
        found["late_reading"] = [{"interval": i, "status": NOT_HERE, "reason": reason} for i in intervals]
        found["memory"] = [{"store": name, "status": NOT_HERE, "reason": reason} for name in STORES]
    else:
        # memory first: what timing leaves in the allocator's pools would not change the peak, but its models would
        found["memory"] = [peak(prepared, name) for name in STORES]
        found["late_reading"] = [late(prepared, interval, note) for interval in intervals]
    found["task"] = prepared.task.describe()
    return jsonable(found)  # type: ignore[no-any-return]


def late(prepared: overhead.PreparedWorkload, interval: int, note: Callable[[str], None]) -> Row:
    """Full step over bare step with losses read every ``interval`` steps."""
    divergence = replace(prepared.config.divergence, check_interval_steps=interval)
    told = overhead.measure(replace(prepared, config=replace(prepared.config, divergence=divergence)), note)
    names = (
        "full_step_ratio_median", "full_step_ratio_mean", "ratio_p10", "ratio_p90", "bare_step_ms_median", "num_pairs",
        "host_syncs_per_step", "host_syncs_per_step_bare",
    )  # fmt: skip
    return {"interval": interval, "status": "measured", "reason": "", **{name: told[name] for name in names}}


def peak(prepared: overhead.PreparedWorkload, store: str) -> Row:
    """Most bytes the device's allocator ever held while windows were observed, activations included."""
    device = torch.device(prepared.workload.device)
    gc.collect()  # what is freed later would be taken from what this store holds
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    batches = prepared.task.batches(0)
    if store == "bare loop":
        bare = overhead.BareLoop(prepared.task, overhead.MAX_PREPARING_STEPS)
        for _ in range(3):
            bare.step(next(batches))
    else:
        basis = replace(prepared.config.predictor, **STORES[store])
        trainer = overhead.build(
            replace(prepared, config=replace(prepared.config, predictor=basis)), overhead.MAX_PREPARING_STEPS,
            offload=basis.offload,
        )  # fmt: skip
        overhead.bring_up(trainer, None, batches)
    wait_for(device)
    held = torch.accelerator.max_memory_allocated(device) - before
    return {"store": store, "status": "measured", "reason": "", "peak_bytes": held}


def format_text(result: Mapping[str, Any]) -> str:
    """Both tables."""
    bare = next((r["peak_bytes"] for r in result["memory"] if r["store"] == "bare loop" and "peak_bytes" in r), None)
    late_rows = [
        (str(r["interval"]), f"{r['full_step_ratio_median']:.4f}", f"{r['host_syncs_per_step']:g}")
        if r["status"] == "measured"
        else (str(r["interval"]), NOT_HERE, "-")
        for r in result["late_reading"]
    ]
    memory_rows = [
        (r["store"], f"{r['peak_bytes'] / 2**20:.0f}", f"{r['peak_bytes'] / bare:.3f}")
        if bare
        else (r["store"], NOT_HERE, "-")
        for r in result["memory"]
    ]
    reasons = sorted({r["reason"] for r in (*result["late_reading"], *result["memory"]) if r["reason"]})
    return "\n".join([
        *aligned(("losses read every", "full step / bare step", "waits per step"), late_rows),
        "",
        *aligned(("memory", "peak MiB", "over bare loop"), memory_rows),
        *(f"{NOT_HERE}: {reason}" for reason in reasons),
    ])  # fmt: skip
