"""Estimates of ``hpt plan`` beside the peaks of real runs on the CPU, by the allocations that torch's profiler sees."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from ..config.settings import HybridTrainerConfig
from ..config.toml import with_values
from ..tasks import TaskSettings, make_task
from ..tasks.low_bit import ternary
from ..trainer import HybridTrainer
from ..weights.offload import activations_on_host
from ..weights.shards import local
from . import plan

#: Real steps of a run with this library: the guard copies the state at the first multiple of 32.
NUM_STEPS = 40
#: Of a plain loop; the second is the first with an optimizer state from the beginning.
NUM_PLAIN_STEPS = 3
#: How far an estimate may be from the measured peak.
TOLERANCE = 0.1
BATCH_SIZE = 4

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A GPT to be checked; context None means the preset's."""

    preset: str
    context: int | None = None


#: Up to 0.3 M the basis is held in float64; beyond 1 M weights states are kept in other places.
CASES = (Case("0.3M"), Case("0.9M"), Case("3M", context=128))
REMEDIES: tuple[dict[str, bool], ...] = (
    {}, {"bf16": True}, {"checkpointing": True}, {"activation_offload": True}, {"ternary": True},
)  # fmt: skip


def rows(cases: tuple[Case, ...] = CASES) -> Iterator[Row]:
    """One after the other: the plain loop and this library's, as they are and with each remedy."""
    for case in cases:
        subject = plan.of_task("gpt", preset=case.preset, context=case.context)
        task = make_task("gpt", TaskSettings(preset=case.preset, context=case.context, batch_size=BATCH_SIZE))
        batches = list(islice(task.batches(0), NUM_STEPS))
        for changes in REMEDIES:
            for ours in (False, True):
                setup = plan.Setup(batch_size=BATCH_SIZE, ours=ours, **changes)
                yield {"preset": case.preset} | compared(subject, setup, batches)


def compared(subject: plan.Subject, setup: plan.Setup, batches: list[Any]) -> Row:
    """Estimate and measured peak of one setup, in bytes; all of it is host memory on the CPU, what is offloaded too.

    Activations in host memory are left out of both: they are gone when the optimizer steps.

    Args:
        subject: What is trained.
        setup: How.
        batches: As many as the run takes, different ones, each of ``setup.batch_size``.
    """
    estimated = plan.estimate(subject, setup)
    measured, raised = peak(subject, setup, batches)
    total = estimated.total + estimated.host - estimated.activations_on_host
    total -= 0 if raised else estimated.copy_before_a_raise
    return {
        "ours": setup.ours, "bf16": setup.bf16, "checkpointing": setup.checkpointing,
        "activation_offload": setup.activation_offload, "ternary": setup.ternary,
        "num_parameters": estimated.num_parameters, "raised": raised,
        "estimated_bytes": total, "measured_bytes": measured,
        "error": total / measured - 1, "within": abs(total / measured - 1) <= TOLERANCE,
    }  # fmt: skip


class Elsewhere(saved_tensors_hooks):
    """What a backward needs lies where torch's profiler does not see it, as host memory is no accelerator's."""

    def __init__(self) -> None:
        """Nothing has been moved."""
        super().__init__(self._moved, self._back)

    @staticmethod
    def _moved(tensor: Tensor) -> tuple[Any, torch.dtype]:
        plain = tensor.detach()  # numpy knows no bfloat16
        plain = plain.view(torch.int16) if plain.dtype is torch.bfloat16 else plain
        return plain.numpy().copy(), tensor.dtype

    @staticmethod
    def _back(moved: tuple[Any, torch.dtype]) -> Tensor:
        return torch.from_numpy(moved[0]).clone().view(moved[1])


def peak(subject: plan.Subject, setup: plan.Setup, batches: list[Any]) -> tuple[int, bool]:
    """Most bytes allocated at once in a real run with AdamW, and whether the rate was raised on trial in it.

    What the run began with counts.  A state to come back to is held from a raise to its end, and not every run makes
    one.
    """
    model = subject.build(setup.checkpointing)
    model = ternary(model) if setup.ternary else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * NUM_STEPS)
    config = with_values(HybridTrainerConfig(), {"training.enabled": setup.ours, "training.warmup_steps": 2})
    batches = batches[: NUM_STEPS if setup.ours else NUM_PLAIN_STEPS]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if not setup.activation_offload or not torch.is_grad_enabled():
            return subject.loss(model, batch, setup.bf16)
        with activations_on_host(model.parameters(), Elsewhere()):
            return subject.loss(model, batch, setup.bf16)

    before = sum(t.nbytes for t in {*map(local, model.parameters()), *model.buffers()})
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer = HybridTrainer(model, optimizer, config, loss_fn, schedule)
        trainer.force_full_phase(len(batches))
        raised = False
        for batch in batches:
            trainer.step(batch)
            raised = raised or (setup.ours and trainer.run.safety.raise_point is not None)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = before
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, raised
