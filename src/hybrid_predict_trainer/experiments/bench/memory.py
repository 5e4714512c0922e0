"""``hpt bench memory``: what each predictor, its basis and a snapshot hold, measured on a full basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...predictors import PREDICTORS
from ...tasks import TaskSettings, build_optimizer, make_task
from ...trainer import HybridTrainer

Row = dict[str, Any]

#: Storage variants of the basis.
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"predictor.basis_dtype": "bfloat16"})


def rows(predictors: Sequence[str] = tuple(PREDICTORS), *, preset: str = "0.3M", batch_size: int = 2) -> list[Row]:
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
        "predictor.type": name, "predictor.window": 1, "predictor.rest_windows": 0, "training.warmup_steps": 0,
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
