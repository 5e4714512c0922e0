"""What the learned multiplier looks at, in a setting of ordinary training: h at several rates of the bare loop.

``python -m hybrid_predict_trainer.experiments.harm.cosines SETTING [SETTING ...]``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev

import torch

from ...move.edge_test import step_cosines
from ...weights import algebra as weights
from ...weights.parameters import predicted_parameters
from ..report.text import aligned
from .runs import Parts
from .settings import Setting, select

#: Multiples of the setting's own rate, and the steps between which h is averaged.
MULTIPLES = (1 / 10, 1 / 3, 1.0, 3.0, 10.0)
ENDS = (0, 24, 100, 300, 1000)


def cosines(setting: Setting, multiple: float, seed: int = 0) -> tuple[float, list[float]]:
    """Run the bare loop at a multiple of its rate; returns the final loss and h of every step but the first."""
    setting = replace(setting, lr=setting.lr * multiple)
    parts = Parts.build(setting, seed, "plain")
    parameters, groups = predicted_parameters(parts.model, parts.optimizer)
    before: list[torch.Tensor] = []
    found: list[float] = []
    for batch, _ in zip(parts.batches, range(setting.steps), strict=False):
        parts.optimizer.zero_grad(set_to_none=True)
        parts.problem.loss(parts.model, batch).backward()
        if before and len(found) < ENDS[-1]:
            now = [p.detach() for p in parameters]
            found.append(float(step_cosines([p.grad for p in parameters], before, now, groups)[0]))
        if setting.clip > 0:
            torch.nn.utils.clip_grad_norm_(parts.model.parameters(), setting.clip)
        before = weights.clone(parameters)
        parts.optimizer.step()
        if parts.schedule is not None:
            parts.schedule.step()
    return parts.problem.validate(parts.model), found


def measure(setting: Setting) -> list[list[str]]:
    """A line per multiple: final loss, then mean of h over its standard error, part by part, and mean over spread."""
    found = []
    for multiple in MULTIPLES:
        loss, h = cosines(setting, multiple)
        parts = [h[a:b] for a, b in pairwise(ENDS) if len(h) > a + 1]
        shown = [f"{fmean(p):+.3f} ({fmean(p) / stdev(p):+.1f})" for p in parts]
        found.append([setting.name, f"{multiple:.3g}", f"{loss:.4g}", *shown])
    return found


def main(names: Sequence[str]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    chosen = select(names or ("mlp-b8-wsd", "mlp-b64-wsd", "mlp-b16-dropout-smoothing"))
    head = ("setting", "rate x", "loss", *(f"{a} - {b}" for a, b in pairwise(ENDS)))
    print("mean of h (over its spread in single steps)")
    print("\n".join(aligned(head, [row for setting in chosen for row in measure(setting)])))


if __name__ == "__main__":
    main(sys.argv[1:])
