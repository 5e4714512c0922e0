"""Samples of residuals: known answers, what they must never leave out, and what they may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import WIDTH, loss_fn
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.propose.sources import gauss_newton as module
from hybrid_predict_trainer.propose.sources.gauss_newton import GaussNewton
from hybrid_predict_trainer.propose.sources.jacobian import Dense, Jacobian, Outer
from hybrid_predict_trainer.propose.sources.sample import probabilities, systematic
from hybrid_predict_trainer.propose.sources.solve import Linearized, Sampled
from hybrid_predict_trainer.records import ConfigError

R, P = 240, 30
DOUBLE = torch.float64


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def spread(kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squared norms of rows, and residuals, (R,) each."""
    even = torch.ones(R, dtype=DOUBLE)
    heavy = even.clone()
    heavy[[0, 77, R - 1]] = 1e9
    drawn = torch.rand(R, generator=generator, dtype=DOUBLE)
    return {
        "even": (even, even), "no residuals": (even, 0 * even), "no rows": (0 * even, even),
        "heavy rows": (heavy, even),
        "heavy residuals": (even, heavy), "drawn": (drawn.exp(), drawn), "nothing": (0 * even, 0 * even),
    }[kind]  # fmt: skip


KINDS = ("even", "no residuals", "no rows", "heavy rows", "heavy residuals", "drawn", "nothing")


# ---- which rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 7, 80, R - 1, R])
def test_probabilities_are_those_of_so_many_rows(kind: str, number: int, generator: torch.Generator) -> None:
    chance = probabilities(*spread(kind, generator), number)
    assert bool((chance > 0).all())
    assert bool((chance <= 1).all())
    assert float(chance.sum()) == pytest.approx(number, rel=0.02, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_are_a_sample_of_all_rows(kind: str, generator: torch.Generator) -> None:
    for start in (0.0, 0.3, 0.999):
        assert len(systematic(probabilities(*spread(kind, generator), R), start)) >= R - 1
    assert len(systematic(torch.ones(R, dtype=DOUBLE), 0.7)) == R


@pytest.mark.parametrize("kind", ["heavy rows", "heavy residuals"])
def test_a_few_rows_of_a_large_weight_are_always_there(kind: str, generator: torch.Generator) -> None:
    """Boundary points among a thousand inside: without them the rest says nothing."""
    chance = probabilities(*spread(kind, generator), 24)
    for k in range(50):
        rows = systematic(chance, k / 50)
        assert {0, 77, R - 1} <= set(rows.tolist())
        assert abs(len(rows) - 24) <= 1


@pytest.mark.parametrize("number", [5, 24, 100])
def test_every_row_is_there_as_often_as_it_should(number: int, generator: torch.Generator) -> None:
    chance = probabilities(*spread("drawn", generator), number)
    count, starts = torch.zeros(R, dtype=DOUBLE), 2000
    for k in range(starts):
        count[systematic(chance, k / starts)] += 1
    torch.testing.assert_close(count / starts, chance, atol=2 / starts, rtol=0)


# ---- what a sample is worth --------------------------------------------------------------------------


def problem(generator: torch.Generator) -> tuple[Jacobian, Tensor]:
    """Rows of two outer products and of a part that is written out."""
    left, right = (torch.randn(R, 2, n, generator=generator, dtype=DOUBLE) for n in (5, 4))
    written = torch.randn(R, P - 20, generator=generator, dtype=DOUBLE)
    like = torch.zeros((), dtype=DOUBLE)
    blocks = [Outer(left, right, torch.arange(20)), Dense(written, torch.arange(20, P))]
    return Jacobian(blocks, R, P, like), torch.randn(R, generator=generator, dtype=DOUBLE)


def solver(part: Jacobian) -> Linearized:
    return Linearized(part, "kernel" if part.num_rows < P else "weight", rank=5, max_iterations=50, seed=0)


def test_weighted_rows_and_their_squares(generator: torch.Generator) -> None:
    A, _ = problem(generator)
    rows, factors = torch.tensor([3, 200, 50]), torch.tensor([1.0, 2.0, -3.0], dtype=DOUBLE)
    torch.testing.assert_close(A.weighted(rows, factors).dense(), A.dense()[rows] * factors[:, None])
    torch.testing.assert_close(A.row_squares(), A.dense().square().sum(1))


def test_a_sample_is_unbiased(generator: torch.Generator) -> None:
    """Its weighted matrix and gradient are those of all rows on the average over where it starts."""
    A, rho = problem(generator)
    full, starts = A.dense(), 400
    matrix, gradient = torch.zeros(P, P, dtype=DOUBLE), torch.zeros(P, dtype=DOUBLE)
    for k in range(starts):
        sample = Sampled(A, rho, 40, solver, start=k / starts)
        part = sample._part
        matrix += part.normal() / starts
        gradient += part.vjp(sample._picked(rho)) / starts
    torch.testing.assert_close(matrix, full.T @ full, atol=0.02 * float((full.T @ full).abs().max()), rtol=0)
    torch.testing.assert_close(gradient, full.T @ rho, atol=0.02 * float((full.T @ rho).abs().max()), rtol=0)


def test_a_sample_that_has_grown_to_all_rows_is_the_whole(generator: torch.Generator) -> None:
    A, rho = problem(generator)
    sample, whole = Sampled(A, rho, 20, solver, start=0.4), solver(A)
    assert sample.num_rows < 30
    while sample.num_rows < R:
        before = sample.price
        sample.enlarge(1.5)
        assert sample.price > before + 0.9 * Sampled(A, rho, sample.num_rows, solver, start=0.4).price
    assert sample.scale == pytest.approx(whole.scale)
    for damping in (1e-3, 10.0):
        d = sample.move(rho, damping)
        torch.testing.assert_close(d, whole.move(rho, damping))
        after = rho + A.jvp(d)
        assert sample.promised(d) == pytest.approx(0.5 * float(rho @ rho - after @ after))


# ---- in a run ----------------------------------------------------------------------------------------


def residuals(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1])[:, 0]


def smooth(rows: int, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """A smooth function of few inputs at many points, in float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(rows, WIDTH, generator=generator, dtype=DOUBLE) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:2] + x[:, 2:3].square()
    return x, y + noise * torch.randn(rows, 1, generator=generator, dtype=DOUBLE)


def built(model: nn.Module, **values: Any) -> HybridTrainer:
    config = with_values(HybridTrainerConfig(), {
        "predictor.type": "gauss_newton", "training.warmup_steps": 3,
        **{f"predictor.gauss_newton.{key}": value for key, value in values.items()},
    })  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return HybridTrainer(model, optimizer, config, loss_fn=loss_fn, residual_fn=residuals)


def wide(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 1)).double()


def source_of(trainer: HybridTrainer) -> GaussNewton:
    source = trainer.run.proposer.source
    assert isinstance(source, GaussNewton)
    return source


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all samples that are drawn."""
    drawn: list[int] = []
    draw = Sampled._draw

    def told(self: Sampled, number: int) -> None:
        draw(self, number)
        drawn.append(self.num_rows)

    monkeypatch.setattr(Sampled, "_draw", told)
    return drawn


def test_few_residuals_are_all_taken(samples: list[int]) -> None:
    built(wide()).fit([smooth(100)], total_steps=30)
    assert not samples


def test_many_residuals_take_a_fraction_of_the_cost(samples: list[int]) -> None:
    """The same loss as with all rows, for a third of what these cost."""
    batch = smooth(2000)
    some, every = built(wide()), built(wide(), rows="all")
    every.fit([batch], total_steps=200)
    assert not samples
    wanted = loss_fn(every.run.subject.model, batch).item()
    some.fit([batch], total_steps=200, should_stop=lambda: loss_fn(some.run.subject.model, batch).item() <= wanted)
    assert samples
    assert max(samples[:3]) < 1000
    assert loss_fn(some.run.subject.model, batch).item() <= wanted
    assert some.run.meter.cost_units < every.run.meter.cost_units / 3


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_linear_model_on_many_points_is_solved_by_one_jump(noise: float, samples: list[int]) -> None:
    """Nothing but the sample keeps such a model from the least-squares solution, so that it grows at once."""
    torch.manual_seed(0)
    features = 1200
    model = nn.Linear(features, 1).double()
    x = torch.randn(3000, features, dtype=DOUBLE)
    y = x @ torch.randn(features, 1, dtype=DOUBLE) + noise * torch.randn(3000, 1, dtype=DOUBLE)
    trainer = built(model)
    while trainer.run.meter.num_jumps_accepted < 1:
        trainer.step((x, y))
    assert samples
    X = torch.cat([x, torch.ones(3000, 1, dtype=DOUBLE)], 1)
    expected = torch.linalg.lstsq(X, y).solution[:, 0]
    found = torch.cat([model.weight[0], model.bias]).detach()
    assert float((found - expected).norm() / expected.norm()) < 1e-10


def test_a_sample_that_tells_nothing_of_the_rest_grows(samples: list[int]) -> None:
    """More weights than rows in the sample, and targets that are noise: it fits itself, and nothing else."""
    x, y = smooth(1500)
    y = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    trainer = built(wide(), initial_damping=1e-8)
    while trainer.run.meter.num_jumps_proposed < 1:
        trainer.step((x, y))
    assert len(samples) > 3
    assert source_of(trainer)._growth >= module.GROWTH**2
    assert samples[1] > 1.3 * samples[0]


@pytest.mark.parametrize("at", [4, 7])
def test_resume_is_bitwise(at: int, tmp_path: Path, samples: list[int]) -> None:
    batch = smooth(2000, noise=0.3)
    whole = built(wide(), linearizations=2)
    for _ in range(at):
        whole.step(batch)
    source_of(whole)._growth *= 1.7
    path = whole.save_checkpoint(tmp_path)
    other = built(wide(9), linearizations=2)
    other.load_checkpoint(path)
    ends = []
    for trainer in (whole, other):
        samples.clear()
        for _ in range(6):
            trainer.step(batch)
        ends.append(([p.detach().clone() for p in trainer.run.subject.parameters], list(samples)))
    assert ends[0][1] == ends[1][1]
    assert ends[0][1]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))


def test_a_state_of_before_samples_were_drawn_begins_with_the_first_one(tmp_path: Path) -> None:
    trainer = built(wide())
    state = source_of(trainer).state_dict()
    del state["growth"]
    source_of(trainer)._growth = 3.0
    source_of(trainer).load_state_dict(state)
    assert source_of(trainer)._growth == 1.0


@pytest.mark.parametrize("steps", [8, 15, 40, 100])
@pytest.mark.parametrize("noise", [0.0, 100.0])
def test_the_room_of_a_run_is_kept(steps: int, noise: float) -> None:
    """A sample that would grow beyond what is left of the plan stays as it is."""
    trainer = built(wide(), initial_damping=1e-8)
    trainer.fit([smooth(2000, noise=noise)], total_steps=steps)
    assert trainer.run.meter.cost_units <= 3 * steps + 20


def test_successive_samples_are_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    draw = Sampled._draw

    def told(self: Sampled, number: int) -> None:
        draw(self, number)
        starts.append(self._start)

    monkeypatch.setattr(Sampled, "_draw", told)
    built(wide()).fit([smooth(2000)], total_steps=40)
    assert len(set(starts)) > 5
    even = torch.full((R,), 0.25, dtype=DOUBLE)
    assert not set(systematic(even, 0.1).tolist()) & set(systematic(even, 0.6).tolist())


def test_a_word_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"predictor\.gauss_newton\.rows"):
        with_values(HybridTrainerConfig(), {"predictor.gauss_newton.rows": "some"})
    assert module.GROWTH > 1
