"""Weight moves around an unchanged optimizer: SNOO and EMA-Nesterov.

Letters: w weights, s displacement of an outer step, b outer momentum, m mean displacement of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...weights import algebra as weights
from ..arms.drive import Hooks
from .base import BaselineRun

#: When EMA-Nesterov begins, as a share of the run: step 300 of 2,890 in the record with its author's settings.
EMA_NESTEROV_START = 0.1
#: When it ends where no decay phase is set apart: 2,400 of 3,125 and 1,950 of 2,890 steps in the records.
EMA_NESTEROV_END = 2 / 3


@torch.no_grad()
def snoo_step_(w: Sequence[Tensor], w_old: Sequence[Tensor], b: Sequence[Tensor], *, eta: float, mu: float) -> None:
    """One outer step in place: s = w_old - w; b <- mu b + s; w <- w_old - eta (mu b + s); w_old <- w.

    Written as a change of ``w``, so that eta = 1, mu = 0 leaves it bit for bit.

    Args:
        w: Weights after K inner steps; receives the new ones.
        w_old: Weights after the last outer step.
        b: Outer momentum, of the shapes of ``w``.
        eta: Outer rate.
        mu: Outer momentum's share.
    """
    s = torch._foreach_sub(list(w_old), list(w))
    torch._foreach_mul_(list(b), mu)
    torch._foreach_add_(list(b), s)
    if eta != 1:
        torch._foreach_add_(list(w), s, alpha=1 - eta)
    if mu != 0:
        torch._foreach_add_(list(w), list(b), alpha=-eta * mu)
    torch._foreach_copy_(list(w_old), list(w))


def snoo(session: BaselineRun) -> Hooks:
    """Nesterov momentum on the displacement of K optimizer steps (arXiv 2510.15830)."""
    w = session.run.subject.parameters
    every, eta, mu = int(session.values["every"]), session.values["eta"], session.values["mu"]
    w_old, b = weights.clone(w), [torch.zeros_like(p) for p in w]

    def after_step() -> None:
        if session.run.meter.num_real_steps % every == 0:
            snoo_step_(w, w_old, b, eta=eta, mu=mu)
            session.charge_passes(6)  # reads and writes of w, w_old and b

    return Hooks(after_step=after_step)


@torch.no_grad()
def track_(m: Sequence[Tensor], w: Sequence[Tensor], w_old: Sequence[Tensor], gamma: float) -> None:
    """m <- gamma m + (1 - gamma)(w - w_old); w_old <- w, in place."""
    torch._foreach_lerp_(list(m), torch._foreach_sub(list(w), list(w_old)), 1 - gamma)
    torch._foreach_copy_(list(w_old), list(w))


def ema_nesterov(session: BaselineRun) -> Hooks:
    """Move ahead along the mean displacement before every forward and step from there (arXiv 2605.25395).

    beta_t = beta lr / lr_max from the end of the warm-up (a tenth of the run at least) to the decay phase.
    """
    run, recipe, values = session.run, session.recipe, session.values
    w = run.subject.parameters
    beta = values["beta_muon" if recipe.optimizer == "muon" else "beta"]
    start = max(recipe.warmup_steps, round(EMA_NESTEROV_START * recipe.steps))
    end = round((1 - recipe.decay_frac if recipe.schedule == "wsd" else EMA_NESTEROV_END) * recipe.steps)
    m, w_old = [torch.zeros_like(p) for p in w], weights.clone(w)

    def before_step() -> None:
        if start <= run.position < end:
            with torch.no_grad():
                torch._foreach_add_(w, m, alpha=beta * run.learning_rate / recipe.lr)
            session.charge_passes(3)  # reads w and m, writes w

    def after_step() -> None:
        if run.position < end:  # nobody looks at m afterwards
            track_(m, w, w_old, values["gamma"])
            session.charge_passes(5)  # reads w, w_old and m, writes m and w_old

    return Hooks(before_step=before_step, after_step=after_step)
