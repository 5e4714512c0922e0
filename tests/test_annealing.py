"""Whether a schedule's rate will have fallen by the end of a run, and what is raised only then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as S

from cases import OPTIMIZERS, config, full_batch, make_batches, setup
from hybrid_predict_trainer.move.schedule import LrSchedule

# ---------------------------------------------------------------- does the rate fall?


def _wrapped(scheduler: object) -> object:
    class Wrapper:
        def __init__(self) -> None:
            self.scheduler = scheduler

        def step(self) -> None:
            self.scheduler.step()

    return Wrapper()


def warm_up(optimizer: torch.optim.Optimizer) -> S.LRScheduler:
    return S.LinearLR(optimizer, start_factor=0.01, total_iters=10)


TABLE = [1.0] * 50 + [0.1] * 50
#: Name -> schedule, whether it anneals without a plan, and in a run of 100 steps.
FALLING: dict[str, tuple[Any, bool, bool]] = {
    "none": (lambda _: None, False, False),
    "ConstantLR": (lambda o: S.ConstantLR(o, 0.3, 10), False, False),
    "LinearLR up": (warm_up, False, False),
    "LinearLR down": (lambda o: S.LinearLR(o, 1.0, 0.0, 100), True, True),
    "StepLR": (lambda o: S.StepLR(o, 30), True, True),
    "StepLR constant": (lambda o: S.StepLR(o, 30, gamma=1.0), False, False),
    "MultiStepLR": (lambda o: S.MultiStepLR(o, [30, 60]), True, True),
    "ExponentialLR": (lambda o: S.ExponentialLR(o, 0.99), True, True),
    "ExponentialLR constant": (lambda o: S.ExponentialLR(o, 1.0), False, False),
    "CosineAnnealingLR": (lambda o: S.CosineAnnealingLR(o, 100), True, True),
    "CosineAnnealingWarmRestarts": (lambda o: S.CosineAnnealingWarmRestarts(o, 25), True, True),
    "PolynomialLR": (lambda o: S.PolynomialLR(o, 100), True, True),
    "OneCycleLR": (lambda o: S.OneCycleLR(o, 0.1, total_steps=100), True, True),
    "CyclicLR": (lambda o: S.CyclicLR(o, 0.01, 0.1), True, True),
    "MultiplicativeLR": (lambda o: S.MultiplicativeLR(o, lambda t: 0.99), True, True),
    "SequentialLR, no decay": (
        lambda o: S.SequentialLR(o, [warm_up(o), S.ConstantLR(o, 1.0, 1)], milestones=[10]),
        False,
        False,
    ),
    "SequentialLR": (
        lambda o: S.SequentialLR(o, [warm_up(o), S.CosineAnnealingLR(o, 90)], milestones=[10]),
        True,
        True,
    ),
    "ChainedScheduler": (
        lambda o: S.ChainedScheduler([warm_up(o), S.ExponentialLR(o, 0.99)]),
        True,
        True,
    ),
    "ChainedScheduler, no decay": (
        lambda o: S.ChainedScheduler([warm_up(o), S.ConstantLR(o, 1.0, 1)]),
        False,
        False,
    ),
    "wrapped": (lambda o: _wrapped(S.StepLR(o, 30)), True, True),
    "wrapped constant": (lambda o: _wrapped(S.LambdaLR(o, lambda t: 1.0)), False, False),
    "LambdaLR constant": (lambda o: S.LambdaLR(o, lambda t: 1.0), False, False),
    "LambdaLR warm-up": (lambda o: S.LambdaLR(o, lambda t: min(1.0, (t + 1) / 20)), False, False),
    "LambdaLR linear": (lambda o: S.LambdaLR(o, lambda t: max(0.0, 1 - t / 100)), True, True),
    "LambdaLR below zero": (lambda o: S.LambdaLR(o, lambda t: 1 - t / 100), True, True),
    "LambdaLR WSD": (
        lambda o: S.LambdaLR(o, lambda t: 1.0 if t < 80 else max(0.0, (100 - t) / 20)),
        True,
        True,
    ),
    "LambdaLR cosine for ever": (
        lambda o: S.LambdaLR(o, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 100)),
        True,
        True,
    ),
    "LambdaLR back at its peak": (
        lambda o: S.LambdaLR(o, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / 50)),
        True,
        False,
    ),
    "LambdaLR root": (lambda o: S.LambdaLR(o, lambda t: (1 + t / 10) ** -0.5), True, True),
    "LambdaLR table that ends": (lambda o: S.LambdaLR(o, lambda t: TABLE[t]), True, True),
    "LambdaLR that falls later": (lambda o: S.LambdaLR(o, lambda t: 1.0 if t < 1000 else 0.1), True, False),
    "LambdaLR that falls a little": (lambda o: S.LambdaLR(o, lambda t: max(0.7, 1 - t / 100)), False, False),
}


@pytest.mark.parametrize("name", FALLING)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_whether_the_rate_will_have_fallen(name: str) -> None:
    make, without, planned = FALLING[name]
    schedule = LrSchedule(make(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)))
    assert schedule.anneals is without
    schedule.end = 100
    assert schedule.anneals is planned
    schedule.end = None
    assert schedule.anneals is without


@pytest.mark.parametrize("name", ["sgd", "muon"])
@pytest.mark.parametrize(
    ("data", "scheduler", "raised"),
    [("noisy", "flat", False), ("noisy", "decay", True), ("exact", "flat", True), ("exact", "decay", True)],
)
def test_where_raises_are_made(data: str, scheduler: str, raised: bool, name: str) -> None:
    """Noise that a decay does not take out again is not raised; and never steps that are orthogonal."""
    if name not in OPTIMIZERS:
        pytest.skip("this torch has no Muon")
    made = setup("matrices", name)
    made.optimizer.param_groups[0]["lr"] = 5e-4
    last = 1.0 if scheduler == "flat" else 0.01
    made.scheduler = S.LambdaLR(made.optimizer, lambda t: 1.0 if t < 85 else last)
    exact = "always" if data == "exact" else "auto"
    budget = {"gate__overhead_budget": 0.0, "gate__overhead_budget_exact": 0.0}
    trainer = made.trainer(config(max_lr_multiplier=100.0, gate__exact=exact, **budget))
    batches = make_batches(90, 64, noise=0.02) if data == "noisy" else full_batch(90, 64)
    highest = 1.0
    for batch in batches:
        trainer.step(batch)
        highest = max(highest, trainer.run.optimizer_step.scale.learned)
    assert (highest > 1) is (raised and name != "muon")
