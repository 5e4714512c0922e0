"""What the protocol asks to be kept of every run: JSON lines for metrics and events, safetensors for vectors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...safe_files import write_text
from ...tell.sinks import jsonable
from .plain import Recorded

#: A file that each experiment leaves; the fourth trains whole runs and leaves none.
LEAVES = {1: "metrics.jsonl", 2: "metrics.jsonl", 3: "predictions.jsonl", 5: "corrections.jsonl"}
#: Steps between two gradient vectors that are kept.
GRADIENTS_EVERY = 10


def collect(folder: Path, number: int, log: Mapping[str, Any], recorded: Recorded | None) -> None:
    """Write what an experiment has seen.

    Args:
        folder: Of the scale and seed; made if need be.
        number: Of the experiment.
        log: Its result.
        recorded: The plain run of experiments 1 and 2.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = log["results"]
    if number in (1, 2) and recorded is not None:
        norms = recorded.gradient_norms
        _lines(folder / "metrics.jsonl", (
            {"step": step + 1, "loss": loss, "gradient_norm": norm, "learning_rate": rate}
            for step, (loss, norm, rate) in enumerate(zip(recorded.losses, norms, recorded.rates, strict=True))
        ))  # fmt: skip
        kept = {
            f"gradient.{step}": torch.tensor(g)
            for step, g in enumerate(recorded.gradients)
            if step % GRADIENTS_EVERY == 0
        }
        _save(kept, folder / "gradients.safetensors")
        for step, weights in recorded.snapshots.items():
            _save({"weights": weights}, folder / f"weights-{step:06d}.safetensors")
    elif number == 3:
        _lines(folder / "predictions.jsonl", results["points"])
        _lines(folder / "predicted_losses.jsonl", results["losses"])
    elif number == 5:
        _lines(folder / "corrections.jsonl", results["events"])
        _lines(folder / "transitions.jsonl", (
            {"step": e["step"], "from": a, "to": b}
            for e in results["events"]
            for a, b in (("FULL", "PREDICT"), ("PREDICT", "CORRECT"), ("CORRECT", "FULL"))
        ))  # fmt: skip


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Tensors into a file, whose name a refusal says.

    Raises:
        OSError: the disk refused.
    """
    try:
        save_file(tensors, str(path))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def kept(folder: Path, number: int) -> bool:
    """Whether an experiment's run left something in the folder of its scale and seed."""
    return (folder / LEAVES[number]).is_file()


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(jsonable(dict(row)), allow_nan=False) + "\n" for row in rows))
