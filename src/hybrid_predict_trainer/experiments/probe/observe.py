"""What can be seen of a run from outside: its noise, how far its displacements go on, how it came to where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .subject import LossFn, Subject

NUM_GRADIENTS = 8
WINDOWS = (5, 10, 20, 40)
#: A loss after shuffling the weights that is so many times the model's own: it was trained before.
PRETRAINED_RATIO = 1.3
#: Relative change of the weights below which a run stays near its start.
LAZY_CHANGE = 0.1


def noise_scale(model: nn.Module, loss_fn: LossFn, batches: Iterator[Any]) -> dict[str, float | None]:
    """Gradient noise in batches: tr(covariance of a batch's gradient) / |mean gradient|^2 (arXiv 1812.06162).

    With g_i independent, |g|^2 in the mean is |G|^2 + tr / B and g_i . g_j is |G|^2.

    Returns:
        ``batches``: the scale in units of the batch; None where the mean gradient is lost in the noise.  ``cosine``: of
        two gradients.
    """
    vectors = []
    for _ in range(NUM_GRADIENTS):
        model.zero_grad()
        loss_fn(model, next(batches)).backward()
        vectors.append(
            torch.cat([p.grad.detach().flatten().double() for p in model.parameters() if p.grad is not None])
        )
    model.zero_grad()
    gram = torch.stack([torch.stack([a @ b for b in vectors]) for a in vectors])
    total = float(gram.diagonal().mean())
    shared = float((gram.sum() - gram.diagonal().sum()) / (NUM_GRADIENTS * (NUM_GRADIENTS - 1)))
    scale = None if shared <= 0 else max(total - shared, 0.0) / shared
    return {"batches": scale, "cosine": shared / total if total > 0 else 0.0}


class Displacements:
    """Cosines of successive displacements of the mean weights over windows of several lengths."""

    def __init__(self, model: nn.Module) -> None:
        """Args: model: before its first step."""
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._first = self._flat()
        self._sums = {n: torch.zeros_like(self._first) for n in WINDOWS}
        self._means: dict[int, Tensor] = {}
        self._moved: dict[int, Tensor] = {}
        self.cosines: dict[int, list[float]] = {n: [] for n in WINDOWS}
        self._count = 0

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().flatten().float() for p in self._weights])

    def step(self) -> None:
        """A step was made."""
        self._count += 1
        now = self._flat()
        for n, total in self._sums.items():
            total += now
            if self._count % n:
                continue
            mean = total / n
            total.zero_()
            if n in self._means:
                moved = mean - self._means[n]
                if n in self._moved:
                    self.cosines[n].append(float(torch.cosine_similarity(moved, self._moved[n], dim=0)))
                self._moved[n] = moved
            self._means[n] = mean

    def table(self) -> dict[int, float]:
        """Mean cosine by window, over the later half of the run; windows seen too seldom are left out."""
        found = {}
        for n, cosines in self.cosines.items():
            later = cosines[len(cosines) // 2 :]
            if len(later) >= 2:
                found[n] = sum(later) / len(later)
        return found

    def change(self) -> float:
        """|now - start| / |start|."""
        return float((self._flat() - self._first).norm() / self._first.norm().clamp(min=1e-30))


def is_deterministic(subject: Subject, model: nn.Module, loss_fn: LossFn) -> bool:
    """Whether two batches in a row have exactly the same loss, twice."""
    batches = subject.batches(0)
    one, other = next(batches), next(batches)
    state = torch.get_rng_state()
    losses = []
    for batch in (one, other, one):
        losses.append(float(loss_fn(model, batch).detach()))
    torch.set_rng_state(state)
    return len(set(losses)) == 1 and math.isfinite(losses[0])


@torch.no_grad()
def _shuffled(model: nn.Module) -> None:
    """Put the entries of every weight in another order: what was learnt is gone, and their size stays."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        order = torch.randperm(p.numel(), generator=generator).to(p.device)
        p.copy_(p.flatten()[order].reshape(p.shape))


def is_pretrained(subject: Subject, held: list[Any]) -> bool:
    """Whether the model does much better than it does with the entries of its weights shuffled, or has frozen ones."""
    model, _, loss_fn = subject.copy()
    if any(not p.requires_grad for p in model.parameters()):
        return True
    losses = []
    for prepare in (lambda _: None, _shuffled):
        prepare(model)
        losses.append(sum(float(loss_fn(model, batch).detach()) for batch in held) / len(held))
    return losses[0] > 0 and losses[1] / losses[0] > PRETRAINED_RATIO
