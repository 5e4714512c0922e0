"""A gradient scaler that looks for its scale is not a run that diverges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid_predict_trainer import DivergenceError, HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.move.overflow import LEAST_SCALE, ScaleSearch

CONFIG = HybridTrainerConfig()


class Scaler:
    """As much of a scaler as a search looks at."""

    def __init__(self, scale: float, *, enabled: bool = True) -> None:
        self.scale, self.enabled = scale, enabled

    def is_enabled(self) -> bool:
        return self.enabled

    def get_scale(self) -> float:
        return self.scale


def test_a_search_goes_on_while_the_scale_falls() -> None:
    scaler = Scaler(2.0**16)
    search = ScaleSearch(scaler)
    for _ in range(20):
        scaler.scale /= 2
        assert search.look(overflowed=True)
    assert not search.look(overflowed=True), "it stands still"
    search.found()
    assert search.look(overflowed=True), "a new search"
    scaler.scale = LEAST_SCALE / 2
    assert not search.look(overflowed=True), "no gradient needs that"


@pytest.mark.parametrize("scaler", [None, Scaler(8.0, enabled=False), object()], ids=["none", "disabled", "foreign"])
def test_without_a_scaler_nothing_is_a_search(scaler: Any) -> None:
    assert not ScaleSearch(scaler).look(overflowed=True)


def test_a_loss_that_is_not_finite_is_no_search() -> None:
    assert not ScaleSearch(Scaler(8.0)).look(overflowed=False)


def run(num_overflows: int, *, ours: bool, hopeless: bool = False) -> tuple[Any, Any, HybridTrainer | None]:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-19)
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(70)]

    def loss_fn(m: torch.nn.Module, b: Any) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(m(b[0] * 1e9), b[1])
        return loss + (m.weight.sum() * 0).sqrt() if hopeless else loss  # the slope of the root at 0 is infinite

    loss_fn(model, batches[0]).backward()
    assert model.weight.grad is not None
    steepest = float(model.weight.grad.abs().max())
    optimizer.zero_grad()
    start = 1.0 if hopeless else min(3.4e38 / steepest * 2.0 ** (num_overflows - 0.5), 1e38)
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=1000)
    if not ours:
        for batch in batches:
            optimizer.zero_grad()
            scaler.scale(loss_fn(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        return model, optimizer, None
    config = with_values(CONFIG, {"training.max_predict_steps": 0})
    trainer = HybridTrainer(model, optimizer, config, loss_fn, grad_scaler=scaler)
    for batch in batches:
        trainer.step(batch)
    return model, optimizer, trainer


@pytest.mark.parametrize("num_overflows", [1, 4, 6, 12, 26])
def test_a_search_lowers_no_rate_and_ends_no_run(num_overflows: int) -> None:
    model, optimizer, trainer = run(num_overflows, ours=True)
    plain, _, _ = run(num_overflows, ours=False)
    assert trainer is not None
    assert trainer.run.learning_rate == optimizer.param_groups[0]["lr"] == 1e-19
    assert trainer.run.monitor.num_consecutive_critical == 0
    assert trainer.statistics()["num_divergence_events"] == 0
    assert trainer.statistics()["num_skipped_steps"] >= num_overflows - 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_gradient_that_no_scale_helps_is_a_divergence() -> None:
    """The scale falls to its floor, and then there is an end of it."""
    with pytest.raises(DivergenceError, match="21 steps in a row"):
        run(0, ours=True, hopeless=True)
