"""Whole runs: where the learned multiplier and the early cuts must do no harm, and where they must help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, LookaheadConfig
from hybrid_predict_trainer.move.group_warmup import MUST_FALL
from hybrid_predict_trainer.move.lr_multiplier import CHECK_STEPS, LrMultiplier

Batch = tuple[Tensor, Tensor]


def classified(mode: str, batch_size: int, num_steps: int, rate: float, seed: int) -> tuple[float, float]:
    """A student of a fixed teacher, a tenth of whose labels are drawn by lot, always on new data, by a WSD schedule.

    Returns:
        Validation loss, and the largest m.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))
    for p in teacher.parameters():
        p.data.normal_(0, 0.6, generator=generator)
    generator.manual_seed(seed)

    def data(n: int) -> Batch:
        x = torch.randn(n, 16, generator=generator)
        with torch.no_grad():
            y = teacher(x).argmax(1)
        flipped = torch.rand(n, generator=generator) < 0.1
        y[flipped] = torch.randint(10, (int(flipped.sum()),), generator=generator)
        return x, y

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    held_out = data(4000)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 20, max(0.0, num_steps - t) / (num_steps / 4))
    )
    settings = HybridTrainerConfig(enabled=mode == "hybrid", warmup_steps=20)
    trainer = HybridTrainer(model, optimizer, settings, loss_fn, schedule)
    most = 1.0
    for _ in range(num_steps):
        trainer.step(data(batch_size))
        most = max(most, trainer.run.optimizer_step.scale.learned)
    with torch.no_grad():
        return float(loss_fn(model, held_out)), most


@pytest.mark.parametrize("seed", [1, 2])
def test_with_small_batches_at_a_good_rate_it_does_not_creep(seed: int) -> None:
    """Noise hides where steps end; raised for that it once reached 18 to 100, and the run ended at chance."""
    plain, _ = classified("plain", 8, 300, 5e-3, seed)
    ours, most = classified("hybrid", 8, 300, 5e-3, seed)
    assert most <= 4
    assert ours < 1.02 * plain


def test_a_rate_far_too_small_is_made_up_for() -> None:
    """A twentieth of the best one, with batches that show where steps end."""
    plain, _ = classified("plain", 64, 250, 3e-4, 0)
    ours, most = classified("hybrid", 64, 250, 3e-4, 0)
    assert most > 3
    assert ours < 0.8 * plain


@pytest.mark.parametrize("own", [False, True])
def test_what_chooses_its_rate_is_not_raised(own: bool) -> None:
    model = nn.Linear(4, 2)
    says = {"d": 1e-6} if own else {}
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), **says}], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), lambda m, b: m(b).square().mean(), schedule)
    assert trainer.run.optimizer_step.scale.may_grow is not own


# ---------------------------------------------------------------- early cuts where they do harm


class Block(nn.Module):
    """A residual MLP block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class OnlyBlocks(nn.Module):
    """What surrounds the block is trained and has next to no effect: only the block can lower the loss."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.before, self.block = nn.Linear(width, width), Block(width)
        self.register_buffer("head", torch.randn(width, 1) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + 1e-3 * self.before(x)) @ self.head


def only_blocks(num_steps: int, **changes: Any) -> tuple[float, int]:
    """Mean loss at the end, and the step from which on nothing is cut."""
    generator = torch.Generator().manual_seed(100)
    truth = torch.randn(12, 1, generator=generator)
    torch.manual_seed(0)
    model = OnlyBlocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / num_steps))
    settings = HybridTrainerConfig(
        max_lr_multiplier=1.0, lookahead=LookaheadConfig(extrapolation=0.0, damping=0.0), **changes
    )
    roles = {f"block.{part}.{kind}": f"mlp_{part}" for part in ("up", "down") for kind in ("weight", "bias")}
    trainer = HybridTrainer(
        model, optimizer, settings, lambda model, b: nn.functional.mse_loss(model(b[0]), b[1]), schedule, roles=roles
    )
    losses, last_cut = [], 0
    for i in range(num_steps):
        x = torch.randn(16, 12, generator=generator)
        y = torch.sin(x @ truth) + 0.1 * torch.randn(16, 1, generator=generator)
        losses.append(trainer.step((x, y)).loss)
        if trainer.run.optimizer_step.scale.shortening:
            last_cut = i + 1
    if changes.get("enabled", True):
        assert isinstance(trainer.run.optimizer_step.scale, LrMultiplier)
    return sum(losses[-50:]) / 50, last_cut


def test_cuts_that_only_cost_are_found_out_and_end() -> None:
    plain, _ = only_blocks(400, enabled=False)
    ours, last_cut = only_blocks(400)
    assert 0 < last_cut <= MUST_FALL + CHECK_STEPS, "they began, and ended because nothing fell"
    assert ours < 1.05 * plain
