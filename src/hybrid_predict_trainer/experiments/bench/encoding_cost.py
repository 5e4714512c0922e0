"""What encoding one window costs, part by part, on the gpt task's model.

Processor time of this process, not wall time: a busy machine does not change it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ...config.settings import EncoderConfig, HybridTrainerConfig
from ...config.toml import with_values
from ...observe.window_encoder import StateObserver
from ...tasks import TaskSettings, build_optimizer, make_task
from ...trainer import HybridTrainer

Row = dict[str, Any]

#: What is switched on beside the 32 loss features and the numbers of run and groups.
VARIANTS: dict[str, dict[str, Any]] = {
    "state": {"sketch_size": 0, "latent_dim": 0},
    "sketch": {"latent_dim": 0},
    "latent": {"sketch_size": 0},
    "default": {},
    "low_rank": {"sketch_size": 0, "latent_dim": 0, "low_rank": 4},
    "kfac": {"sketch_size": 0, "latent_dim": 0, "kfac": True},
}


def measure(preset: str = "10M", *, batch_size: int = 2, num_windows: int = 96) -> list[Row]:
    """One row per variant.

    Args:
        preset: Size of the model.
        batch_size: Of the few steps that fill a basis.
        num_windows: Encoded per variant; factors, which cost a hundred times more, get a twelfth of them.
    """
    task = make_task("gpt", TaskSettings(preset=preset, batch_size=batch_size))
    model = task.build_model(0)
    optimizer = build_optimizer(model, task.defaults)
    settings = {
        "predictor.type": "linear", "predictor.window": 1, "predictor.rest_windows": 0, "training.warmup_steps": 0,
        "encoder.latent_dim": 0, "encoder.sketch_size": 0,
    }  # fmt: skip
    trainer = HybridTrainer(model, optimizer, with_values(HybridTrainerConfig(), settings), loss_fn=task.loss_fn)
    trainer.force_full_phase(4)
    batches = task.batches(0)
    for _, batch in zip(range(4), batches, strict=False):
        trainer.step(batch)
    run = trainer.run
    window = run.windows.last
    assert window is not None, "four windows of one step have closed"
    found = []
    for name, values in VARIANTS.items():
        observer = StateObserver(
            EncoderConfig(**values), model, run.subject.parameters, run.windows.groups, run.windows.basis.spec
        )
        with observer.watching(last=True):
            loss = task.loss_fn(model, next(iter(batches)))
            observer.before_backward()
            loss.backward()
        observer.after_backward(run.losses.history, usable=True)
        times = []
        factors = name in ("low_rank", "kfac")
        for _ in range(max(num_windows // 12, 2) if factors else num_windows):
            began = time.process_time()
            observer.complete(window, run.windows.basis)
            times.append(1e3 * (time.process_time() - began))
        model.zero_grad(set_to_none=True)
        later = times[len(times) // 2 :]
        found.append(
            {
                "variant": name,
                "encode_ms_median": statistics.median(later), "encode_ms_mean": statistics.fmean(later),
                "bytes": observer.memory_bytes(), "passes_per_window": observer.passes,
                "num_weights": sum(p.numel() for p in run.subject.parameters), "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
    return found
