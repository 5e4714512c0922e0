"""Closed form on batches that are new at every step: turns, memory, ways back, checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.propose.sources.gauss_newton import GaussNewton
from hybrid_predict_trainer.propose.sources.jacobian import Dense, Jacobian
from hybrid_predict_trainer.propose.sources.solve import Averaged
from hybrid_predict_trainer.propose.sources.stream import JUMP, NUM_JUMPS, NUM_STEPS, PLAIN, Stream
from hybrid_predict_trainer.records import StepResult
from hybrid_predict_trainer.tasks import TaskSettings, make_task

Batch = tuple[Tensor, Tensor]
WIDTH = 6


def residuals(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1])[:, 0]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return residuals(model, batch).square().mean()


@torch.no_grad()
def truth(x: Tensor) -> Tensor:
    """A network of the same shape as those that are trained: without noise their loss can be zero."""
    answer: Tensor = network(seed=7, width=4)(x)
    return answer


def samples(seed: int, *, noise: float = 0.0, size: int = 64, linear: bool = False, every: int = 1) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
        y = x.sum(1, keepdim=True) if linear else truth(x)
        y = y + noise * torch.randn(size, 1, generator=generator, dtype=torch.float64)
        yield from itertools.repeat((x, y), every)


def network(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, 1)).double()


def built(model: nn.Module, lr: float = 1e-2, **values: Any) -> HybridTrainer:
    config = with_values(HybridTrainerConfig(), {
        "predictor.type": "gauss_newton", "training.warmup_steps": 3,
        **{key.replace("__", "."): value for key, value in values.items()},
    })  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return HybridTrainer(model, optimizer, config, loss_fn=loss_fn, residual_fn=residuals)


def source(trainer: HybridTrainer) -> GaussNewton:
    found = trainer.run.proposer.source
    assert isinstance(found, GaussNewton)
    return found


def validation(model: nn.Module, **values: Any) -> float:
    with torch.no_grad():
        return loss_fn(model, next(samples(999, size=4000, **values))).item()


def plain(model: nn.Module, batches: Iterator[Batch], steps: int, lr: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for batch in itertools.islice(batches, steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


# ---- recursive least squares ---------------------------------------------------------------------------


def test_averaged_steps_on_a_linear_model_solve_for_all_samples_seen() -> None:
    """theta_t from theta_{t-1} and one batch is the least-squares solution of batches 1 to t."""
    torch.manual_seed(0)
    theta, H = torch.zeros(5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    rows, values = [], []
    for t in range(1, 7):
        X, y = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
        rows.append(X)
        values.append(y)
        H = H + (X.T @ X - H) / t
        A = Jacobian([Dense(X, torch.arange(5))], 9, 5, X)
        theta = theta + Averaged(A, H, t).move(X @ theta - y, 1e-14)
        expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(values)[:, None]).solution[:, 0]
        torch.testing.assert_close(theta, expected, rtol=1e-9, atol=1e-9)


def test_noise_is_averaged_over_batches() -> None:
    """The error of one batch's least-squares fit is sigma^2 P / R; remembered batches divide it."""
    model = nn.Linear(WIDTH, 1).double()
    trainer = built(model)
    trainer.fit(samples(0, noise=1.0, size=16, linear=True), total_steps=600)
    one_batch = (WIDTH + 1) / 16
    assert source(trainer).stream.memory >= 16
    assert validation(model, linear=True) < one_batch / 10
    assert trainer.statistics()["num_predictor_failures"] == 0


def test_without_noise_nothing_is_remembered_and_the_loss_falls_far_below_the_optimizers() -> None:
    model, alone = network(), network()
    trainer = built(model)
    trainer.fit(samples(0), total_steps=400)
    plain(alone, samples(0), 400)
    assert validation(model) < 0.1 * validation(alone)


@pytest.mark.parametrize("every", [5, 40])
def test_points_that_change_now_and_then_are_trained_on_as_long_as_they_last(every: int) -> None:
    model, alone = network(), network()
    trainer = built(model)
    trainer.fit(samples(0, every=every), total_steps=400)
    plain(alone, samples(0, every=every), 400)
    assert trainer.statistics()["num_jumps_accepted"] > 10
    assert validation(model) < 0.3 * validation(alone)


# ---- turns ---------------------------------------------------------------------------------------------


def run_block(stream: Stream, loss: float, factor: float) -> float:
    """A block of whoever's turn it is, in which the fresh loss falls by a factor per forward."""
    arm = stream.arm
    for _ in range(NUM_JUMPS if arm == JUMP else NUM_STEPS):
        if arm == JUMP:
            stream.on_jump(loss, 0.5 * loss, 3.0)
        else:
            stream.on_step(loss)
        loss *= factor**3
    return loss


@pytest.mark.parametrize(("jump", "step"), [(0.9, 0.99), (0.99, 0.9), (0.9, 1.01), (1.01, 0.99)])
def test_the_faster_one_has_most_of_the_turns(jump: float, step: float) -> None:
    stream, turns, loss = Stream(), {JUMP: 0, PLAIN: 0}, 1e100
    for _ in range(60):
        turns[stream.arm] += 1
        loss = run_block(stream, loss, jump if stream.arm == JUMP else step)
    faster, slower = (JUMP, PLAIN) if jump < step else (PLAIN, JUMP)
    assert turns[slower] <= 6
    assert turns[faster] >= 54


def test_who_becomes_faster_takes_over() -> None:
    stream, loss = Stream(), 1e100
    for number in range(80):
        rates = (0.9, 0.99) if number < 40 else (0.999, 0.95)
        loss = run_block(stream, loss, rates[stream.arm == PLAIN])
    assert stream.arm == PLAIN


def test_state_goes_round() -> None:
    stream, loss = Stream(), 1.0
    stream.on_data(5)
    for _ in range(7):
        loss = run_block(stream, loss, 0.97)
    stream.on_jump(loss, 0.1 * loss, 4.0)
    other = Stream()
    other.load_state_dict(stream.state_dict())
    assert repr(other.state_dict()) == repr(stream.state_dict())
    assert math.isfinite(other.kept)


# ---- in a run --------------------------------------------------------------------------------------------


def test_a_plain_block_that_ends_worse_is_taken_back() -> None:
    """Steps at a rate far too high between the jumps do not stay."""
    model = network()
    trainer = built(model, lr=0.3)
    trainer.fit(samples(0), total_steps=250)
    assert validation(model) < 1e-2


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_resumed_run_is_the_whole_one(noise: float, tmp_path: Path) -> None:
    batches = list(itertools.islice(samples(0, noise=noise, size=24), 130))
    whole, first, second = (built(network(width=4)) for _ in range(3))
    for batch in batches:
        whole.step(batch)
    for batch in batches[:70]:
        first.step(batch)
    second.load_checkpoint(first.save_checkpoint(tmp_path))
    for batch in batches[70:]:
        second.step(batch)
    assert whole.statistics()["num_jumps_accepted"] > 10
    for p, q in zip(whole.run.subject.parameters, second.run.subject.parameters, strict=True):
        assert torch.equal(p, q)
    assert repr(source(whole).state_dict()) == repr(source(second).state_dict())


def test_dropout_on_new_batches_leaves_the_plain_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, 1)).double()
    trainer = built(model)
    trainer.fit(samples(0), total_steps=40)
    assert trainer.statistics()["num_jumps_proposed"] == 0


def test_a_gradient_far_above_that_of_warm_up_skips_no_step() -> None:
    """Poisson's equation from a plateau: two jumps lead to gradients 125 times those of warm-up, and on from there."""
    task: Any = make_task("pinn-poisson", TaskSettings(dtype="float64"))
    model, steps = task.build_model(14), 300
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 1e-6))
    config = with_values(HybridTrainerConfig(), {"predictor.type": "gauss_newton"})
    trainer = HybridTrainer(
        model, optimizer, config, loss_fn=task.loss_fn, lr_scheduler=schedule, residual_fn=task.residual_fn
    )
    skipped = 0

    def seen(result: StepResult) -> None:
        nonlocal skipped
        skipped += result.skipped

    trainer.fit(task.new_batches(14, 1), total_steps=steps, progress_callback=seen)
    assert skipped == 0
    assert task.evaluate(model) < 1e-3  # 20 where steps were skipped
