"""What the tensors of a checkpoint are for, and how large each kind is against the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .state_tree import TensorSpec

#: Beginning of a tensor's name in its part -> what it is for; the first that fits.
PURPOSES: dict[str, tuple[tuple[str, str], ...]] = {
    "model": (("", "weights and buffers"),),
    "optimizer": (("", "optimizer state"),),
    "trainer": (
        ("run.optimizer_step.lookahead", "lookahead: weights at its last application, drift"),
        ("run.optimizer_step", "step modifiers"),
        ("run.safety.safe_point", "guard: the state to come back to"),
        ("run.safety.raise_point", "multiplier: the state before a raise on trial"),
        ("run.safety.best_point", "validation: the state of its best answer"),
        ("run.judge.probation", "jump on trial: the state before it"),
        ("run.rollback", "readings that come late: the state before them"),
        ("run.proposer", "corrections learnt, pieces of a jump"),
        ("run.windows", "last window, sketch of the weights"),
        ("run.batches", "batches that may come round again"),
        ("", "random states and counts"),
    ),
    "predictor": (
        ("basis.columns", "basis: displacements, differences of gradients"),
        ("basis.sum_", "basis: sums of the open window"),
        ("basis.x", "basis: mean weights of the last window"),
        ("basis.g.", "basis: mean gradient of the last window"),
        ("basis.before", "basis: weights before a window's last step"),
        ("basis", "basis: inner products"),
        ("observer", "observer"),
        ("", "predictor"),
    ),
}


@dataclass(frozen=True, slots=True)
class Held:
    """What a checkpoint holds for one purpose.

    Attributes:
        part: Of the checkpoint: ``model``, ``optimizer``, ``trainer``, ``predictor`` or the caller's own.
        purpose: In words.
        bytes: As stored.
        times_weights: Against the part ``model``; NaN without one.
    """

    part: str
    purpose: str
    bytes: int
    times_weights: float


def inventory(tensors: Mapping[str, Mapping[str, TensorSpec]]) -> list[Held]:
    """Sizes by purpose, in the order of :data:`PURPOSES`; purposes without a byte are left out.

    Args:
        tensors: Part -> name -> type and shape, as a manifest lists them.
    """
    sizes: dict[tuple[str, str], int] = {}
    for part in (*(p for p in PURPOSES if p in tensors), *sorted(tensors.keys() - PURPOSES.keys())):
        kinds = PURPOSES.get(part, (("", "of the caller"),))
        found = {purpose: 0 for _, purpose in kinds}
        for name, spec in tensors[part].items():
            found[next(purpose for start, purpose in kinds if name.startswith(start))] += _size(spec)
        sizes |= {(part, purpose): size for purpose, size in found.items() if size}
    weights = sum(size for (part, _), size in sizes.items() if part == "model")
    return [
        Held(part, purpose, size, size / weights if weights else math.nan) for (part, purpose), size in sizes.items()
    ]


def _size(spec: TensorSpec) -> int:
    kind = getattr(torch, spec.dtype, None)
    return math.prod(spec.shape) * (kind.itemsize if isinstance(kind, torch.dtype) else 1)
