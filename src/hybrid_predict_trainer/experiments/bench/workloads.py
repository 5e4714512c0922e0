"""Small models whose steps cost so little that everything beside them shows.

Shapes: N samples, D inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from ...tasks.base import unknown_name

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is stepped.

    Attributes:
        name: For the command line.
        about: One line for a person.
        model: seed -> a new model.
        optimizer: model -> its optimizer.
        loss_fn: (model, batch) -> loss.
        batches: Endless, the same from call to call.
        num_steps: Length that the schedule is made for.
    """

    name: str
    about: str
    model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[], Iterator[Any]]
    num_steps: int = 2000

    def parts(self) -> tuple[nn.Module, Optimizer, LRScheduler]:
        """Model, optimizer and a cosine schedule, new and always the same."""
        model = self.model(0)
        optimizer = self.optimizer(model)
        return model, optimizer, CosineAnnealingLR(optimizer, self.num_steps)


def _tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = (1, 32, 32, 32, 1)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _curve() -> Iterator[Batch]:
    """The same (128, 1) points of a curve at every step."""
    x = torch.linspace(-1, 1, 128)[:, None]
    return itertools.repeat((x, torch.sin(3 * x) + 0.3 * torch.cos(9 * x)))


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )  # fmt: skip


def _labelled() -> Iterator[Batch]:
    """(8, 64) fresh inputs at every step, with labels of a linear map under noise."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(64, 10, generator=generator)
    while True:
        x = torch.randn(8, 64, generator=generator)
        yield x, (x @ teacher + 0.5 * torch.randn(8, 10, generator=generator)).argmax(1)


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="tiny", about="2,209 weights, full batch: a jump is proposed after every step",
            model=_tiny, optimizer=lambda m: Adam(m.parameters(), lr=2e-3), batches=_curve,
            loss_fn=lambda m, b: functional.mse_loss(m(b[0]), b[1]),
        ),
        Workload(
            name="mlp", about="8,970 weights, fresh batches of 8: hardly a jump is proposed",
            model=_mlp, optimizer=lambda m: AdamW(m.parameters(), lr=1e-3), batches=_labelled,
            loss_fn=lambda m, b: functional.cross_entropy(m(b[0]), b[1]),
        ),
    )
}  # fmt: skip


def workload(name: str) -> Workload:
    """By name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in WORKLOADS:
        raise unknown_name("small model", name, WORKLOADS)
    return WORKLOADS[name]
