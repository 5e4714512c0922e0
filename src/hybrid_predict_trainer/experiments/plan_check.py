"""Estimates of ``hpt plan`` beside the peaks of real runs on the CPU, by the allocations that torch's profiler sees."""

from __future__ import annotations

import gc
from itertools import islice
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..config.settings import HybridTrainerConfig
from ..config.toml import with_values
from ..tasks import TaskSettings, make_task
from ..trainer import HybridTrainer
from . import plan

#: Real steps of a run with this library: the guard copies the state at the first multiple of 32.
NUM_STEPS = 70
#: How far an estimate may be from the measured peak.
TOLERANCE = 0.1

Row = dict[str, Any]


def rows(presets: tuple[str, ...] = ("0.3M", "0.9M"), *, batch_size: int = 4) -> list[Row]:
    """Every combination that a small GPT tries in seconds: the plain loop and this library's, and each remedy."""
    found = []
    for preset in presets:
        subject = plan.of_task("gpt", preset=preset)
        for changes in ({}, {"bf16": True}, {"checkpointing": True}):
            for ours in (False, True):
                setup = plan.Setup(batch_size=batch_size, ours=ours, **changes)
                found.append(compared(preset, subject, setup))
    return found


def compared(preset: str, subject: plan.Subject, setup: plan.Setup) -> Row:
    """Estimate and measured peak of one setup, in bytes; all of it is host memory on the CPU."""
    estimated = plan.estimate(subject, setup)
    measured = peak(preset, setup)
    total = estimated.total + estimated.host
    return {
        "preset": preset, "ours": setup.ours, "bf16": setup.bf16, "checkpointing": setup.checkpointing,
        "estimated_bytes": total, "measured_bytes": measured, "error": total / measured - 1,
        "within": abs(total / measured - 1) <= TOLERANCE,
    }  # fmt: skip


def peak(preset: str, setup: plan.Setup) -> int:
    """Most bytes allocated at once in a real run of the gpt task with AdamW, what it began with included."""
    settings = TaskSettings(
        preset=preset, batch_size=setup.batch_size, autocast_bf16=setup.bf16,
        gradient_checkpointing=setup.checkpointing,
    )  # fmt: skip
    task = make_task("gpt", settings)
    model = task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * NUM_STEPS)
    config = with_values(HybridTrainerConfig(), {"training.enabled": setup.ours, "training.warmup_steps": 2})
    batches = list(islice(task.batches(0), NUM_STEPS if setup.ours else 3))
    before = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer = HybridTrainer(model, optimizer, config, task.loss_fn, schedule)
        trainer.force_full_phase(len(batches))
        for batch in batches:
            trainer.step(batch)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = before
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
