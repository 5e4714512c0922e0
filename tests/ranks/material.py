"""What the ranks train: small, and in double precision, so that a sum in another order is no other run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hybrid_predict_trainer import HybridTrainerConfig, preset_config, with_values

WIDTH, SAMPLES = 4, 16


def network(seed: int = 0, hidden: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * min(n / steps, 1))))


def batches(steps: int, *, full: bool, noise: float) -> list[tuple[Tensor, Tensor]]:
    """The whole batches, of ``SAMPLES`` samples each."""
    generator = torch.Generator().manual_seed(7)
    truth = torch.randn(WIDTH, 1, generator=generator).double()
    made = []
    for _ in range(1 if full else steps):
        x = torch.randn(SAMPLES, WIDTH, generator=generator).double()
        y = torch.tanh(x @ truth) + noise * torch.randn(SAMPLES, 1, generator=generator).double()
        made.append((x, y))
    return made * (steps if full else 1)


def share(whole: list[tuple[Tensor, Tensor]], rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """One rank's samples: every so-manieth, so that pieces of all ranks' shares are the pieces of the whole.

    The same whole batch gives the same share, not a copy.
    """
    known: dict[int, tuple[Tensor, Tensor]] = {}
    return [known.setdefault(id(b), (b[0][rank::size].clone(), b[1][rank::size].clone())) for b in whole]


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Attributes:
        about: For the list.
        settings: Makes the configuration.
        full: The same batch at every step.
        noise: Of the targets.
        lr: Learning rate.
    """

    about: str
    settings: Callable[[], HybridTrainerConfig]
    full: bool = False
    noise: float = 0.3
    lr: float = 1e-2


def _eager(**more: Any) -> HybridTrainerConfig:
    """Short phases, always willing to try, with multiplier, group warm-up and lookahead."""
    base = HybridTrainerConfig(
        warmup_steps=4, full_steps=2, max_predict_steps=20, correct_steps=3, explore_outcomes=1000, clock="cost",
    )  # fmt: skip
    values = {
        "predictor.window": 3, "gate.overhead_budget": 1.0, "gate.overhead_budget_exact": 1.0, "gate.max_backoff": 1,
        "gate.max_chunks": 4, "gate.holdout_fraction": 0.2, "gate.significance": 0.4,
        "lookahead.scope": "all", **more,
    }  # fmt: skip
    return with_values(replace(base), values)


CASES: dict[str, Case] = {
    "default": Case("the defaults, a rate far too small", HybridTrainerConfig, lr=1e-3, noise=0.05),
    "eager": Case("a gate that accepts much", _eager, noise=0.05),
    "full": Case(
        "full-batch training, jumps at every step", lambda: replace(preset_config("full_batch"), warmup_steps=5),
        full=True, noise=0.0,
    ),
    "network": Case(
        "a predictor that trains for as long as there is time",
        lambda: _eager(**{"predictor.type": "mlp"}), noise=0.05,
    ),
}  # fmt: skip
