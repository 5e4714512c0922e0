"""Training as it is, read out at averaged weights: LAWA and EMA."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...weights import algebra as weights
from ..arms.drive import Hooks
from .base import BaselineRun


@torch.no_grad()
def mean(checkpoints: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Mean of lists of tensors, tensor by tensor."""
    total = [t.clone() for t in checkpoints[0]]
    for other in checkpoints[1:]:
        torch._foreach_add_(total, list(other))
    torch._foreach_div_(total, float(len(checkpoints)))
    return total


def lawa(session: BaselineRun) -> Hooks:
    """Mean of the last checkpoints of the run (Kaddour, arXiv 2209.14981; windows as in arXiv 2502.06761)."""
    run = session.run
    every = max(1, round(session.values["spacing_frac"] * session.recipe.steps))
    kept: deque[list[Tensor]] = deque(maxlen=int(session.values["num_checkpoints"]))
    taken = 0

    def after_step() -> None:
        nonlocal taken
        if run.position // every > taken:
            taken = run.position // every
            kept.append(weights.clone(run.subject.parameters))
            session.charge_passes(2)  # read and written

    def evaluation() -> AbstractContextManager[None]:
        return session.swapped(mean(list(kept)) if kept else run.subject.parameters)

    return Hooks(after_step=after_step, evaluation=evaluation)


def ema(session: BaselineRun) -> Hooks:
    """Exponential moving average of the weights, its time constant a share of the run."""
    run = session.run
    tau = max(1.0, session.values["tau_frac"] * session.recipe.steps)
    # parameters only: running statistics stay those of the raw weights, as copied at each update
    average = AveragedModel(run.subject.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / tau))
    names = dict(average.module.named_parameters())
    averaged = [names[name] for name in run.windows.groups.names]

    def after_step() -> None:
        average.update_parameters(run.subject.model)
        session.charge_passes(3)  # reads both, writes one

    return Hooks(after_step=after_step, evaluation=lambda: session.swapped(list(averaged)))
