"""``hpt bench memory``: what each predictor, its basis and a snapshot hold, measured on a full basis.

``--held``: what default settings hold between two steps on the training device, over what the bare loop holds there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...predictors import PREDICTORS
from ...tasks import TaskSettings, build_optimizer, build_scheduler, make_task
from ...trainer import HybridTrainer

Row = dict[str, Any]

#: Storage variants of the basis.
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"predictor.basis_dtype": "bfloat16"})


def measure(predictors: Sequence[str] = tuple(PREDICTORS), *, preset: str = "0.3M", batch_size: int = 2) -> list[Row]:
    """One row per predictor and storage of the basis, after enough windows of one step to fill it.

    Args:
        predictors: Names.
        preset: Size of the gpt task's model.
        batch_size: Small: the batch does not matter here.
    """
    return [_measured(name, variant, preset, batch_size) for name in predictors for variant in VARIANTS]


def _measured(name: str, variant: dict[str, Any], preset: str, batch_size: int) -> Row:
    task = make_task("gpt", TaskSettings(preset=preset, batch_size=batch_size))
    model = task.build_model(0)
    optimizer = build_optimizer(model, task.defaults)
    settings = {
        "predictor.type": name, "predictor.keep_basis": True,
        "predictor.window": 1, "predictor.rest_windows": 0, "training.warmup_steps": 0,
        **variant,
    }  # fmt: skip
    trainer = HybridTrainer(model, optimizer, with_values(HybridTrainerConfig(), settings), loss_fn=task.loss_fn)
    num_steps = trainer.run.proposer.predictor.spec.num_displacements + 2
    trainer.force_full_phase(num_steps)
    for _, batch in zip(range(num_steps), task.batches(0), strict=False):
        trainer.step(batch)
    used = trainer.memory_usage()
    weights = sum(p.numel() * p.element_size() for p in trainer.run.subject.parameters)
    basis = sum(size for key, size in used.items() if key.startswith("basis_"))
    return {
        "predictor": name,
        "basis_dtype": trainer.config.predictor.basis_dtype,
        "weights_bytes": weights,
        "predictor_bytes": used["predictor"],
        "corrector_bytes": used["corrector"],
        "basis_bytes": basis,
        "basis_in_weights": basis / weights,
        "snapshot_bytes": trainer.run.take_snapshot().memory_bytes(),
    }


def on_training_device(usage: Mapping[str, int], device: str, *, offload: bool) -> int:
    """Of what a trainer holds the bytes that lie where the weights are, or would where that is an accelerator.

    Args:
        usage: From ``HybridTrainer.memory_usage``.
        device: Type of the weights' device.
        offload: The basis is kept in host memory.
    """
    elsewhere = offload or device != "cpu"  # on the CPU host and training device are one memory: by what was asked for
    gone = [name for name in usage if name.endswith("_host") or (elsewhere and name == "basis_cpu")]
    return sum(size for name, size in usage.items() if name not in gone)


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers, gradients and optimizer state: what any loop holds between steps."""
    held = [*model.parameters(), *model.buffers()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    held += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in held)


def held(*, preset: str = "10M", device: str = "cpu", num_steps: int = 60) -> list[Row]:
    """The most that default settings hold on the training device between two steps, without and with offload.

    Args:
        preset: Size of the gpt task's model.
        device: Where it is trained.
        num_steps: Real steps; three windows are closed in sixty.
    """
    return [_held(preset, device, num_steps, offload=offload) for offload in (False, True)]


def _held(preset: str, device: str, num_steps: int, *, offload: bool) -> Row:
    task = make_task("gpt", TaskSettings(preset=preset, batch_size=1, context=32, device=device))
    model = task.build_model(0)
    optimizer = build_optimizer(model, task.defaults)
    schedule = build_scheduler(optimizer, task.defaults.schedule, 10 * num_steps)
    config = with_values(HybridTrainerConfig(), {"training.warmup_steps": 2, "predictor.offload": offload})
    trainer = HybridTrainer(model, optimizer, config, loss_fn=task.loss_fn, lr_scheduler=schedule)
    trainer.force_full_phase(num_steps)
    most, parts = 0, dict[str, int]()
    for _, batch in zip(range(num_steps), task.batches(0), strict=False):
        trainer.step(batch)
        usage = trainer.memory_usage()
        used = on_training_device(usage, torch.device(device).type, offload=offload)
        if used >= most:
            most, parts = used, usage
    bare = state_bytes(model, optimizer)
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "settings": "offload" if offload else "default",
        "weights_bytes": copy,
        "bare_bytes": bare,
        "held_bytes": most,
        "ratio": 1 + most / bare,
        "in_weights": ", ".join(f"{name} {size / copy:.3f}" for name, size in parts.items() if size),
    }
