"""The dense form of ``quasi_newton``: the formulas, runs, refusals, checkpoints."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import full_batch, loss_fn, make_model, plain_loop
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.numerics.dense_inverse import DenseInverse, broyden_scaling
from hybrid_predict_trainer.predictors import QuasiNewton
from hybrid_predict_trainer.predictors.quasi_newton import MIN_TAU
from hybrid_predict_trainer.propose.sources import price
from hybrid_predict_trainer.propose.sources.dense import DenseQuasiNewton, LimitedQuasiNewton
from hybrid_predict_trainer.propose.sources.limited_inverse import LimitedInverse
from hybrid_predict_trainer.records import ConfigError


def built(model: nn.Module, **values: Any) -> HybridTrainer:
    config = with_values(HybridTrainerConfig.preset("full_batch"), {
        "predictor.quasi_newton.form": "dense", "training.warmup_steps": 3, "gate.holdout_fraction": 0.0,
        **{key.replace("__", "."): value for key, value in values.items()},
    })  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return HybridTrainer(model, optimizer, config, loss_fn=loss_fn)


def loss_at(model: nn.Module, batch: Any) -> float:
    return loss_fn(model, batch).item()


# ---- formulas ------------------------------------------------------------------------------------------


def expected(H: Tensor, s: Tensor, y: Tensor, tau: float, phi: float) -> Tensor:
    """Broyden's family written out: phi = 1 is BFGS, phi = 0 DFP."""
    s_y, Hy = s @ y, H @ y
    v = (y @ Hy).sqrt() * (s / s_y - Hy / (y @ Hy))
    return (H - torch.outer(Hy, Hy) / (y @ Hy) + phi * torch.outer(v, v)) / tau + torch.outer(s, s) / s_y


@pytest.mark.parametrize("update", ["bfgs", "ssbfgs", "ssbroyden"])
def test_an_update_is_the_published_one_and_has_the_secant_property(update: Any) -> None:
    torch.manual_seed(0)
    n = 5
    M = torch.randn(n, n, dtype=torch.float64)
    B = M @ M.T + torch.eye(n, dtype=torch.float64)
    g = torch.randn(n, dtype=torch.float64)
    inverse = DenseInverse(g, update)
    scaled = []
    for k in range(4):
        H = inverse.H.clone()
        t = 0.3 + 0.2 * k
        s = -t * inverse.Hg
        y, first = B @ s, inverse.first
        inverse.learn(s, y, g, g + y, t)
        if first:
            H = H * float(s @ y) / float(y @ y)
        b = 1.0 if first else float(s @ torch.linalg.solve(H, s)) / float(s @ y)
        tau, phi = (1.0, 1.0) if update == "bfgs" else (min(1.0, 1 / b), 1.0)
        if update == "ssbroyden":
            tau, phi = broyden_scaling(b, float(y @ H @ y) / float(s @ y), n)
        scaled.append((tau, phi))
        torch.testing.assert_close(inverse.H, expected(H, s, y, tau, phi))
        torch.testing.assert_close(inverse.H @ y, s)
        g = g + y
        torch.testing.assert_close(inverse.Hg, inverse.H @ g)
    assert (update == "bfgs") == all(pair == (1.0, 1.0) for pair in scaled)


def test_a_pair_without_curvature_changes_nothing() -> None:
    g = torch.tensor([1.0, 2.0])
    inverse = DenseInverse(g, "ssbfgs")
    inverse.learn(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), g, torch.tensor([0.0, 2.0]), 1.0)
    assert torch.equal(inverse.H, torch.eye(2))
    assert torch.equal(inverse.Hg, torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("history", [3, 8, 100])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_last_pairs_make_the_matrix_that_their_updates_make(history: int, scaled: bool) -> None:
    """Against H written out: scaled and updated by the pairs in memory, from gamma times the unit matrix."""
    torch.manual_seed(1)
    n = 12
    M = torch.randn(n, n, dtype=torch.float64)
    B = M @ M.T + torch.eye(n, dtype=torch.float64)
    g = torch.randn(n, dtype=torch.float64)
    inverse, pairs = LimitedInverse(g, history, scaled=scaled), list[tuple[Tensor, Tensor, float]]()
    for k in range(30):  # the block of products slides, and comes back to its beginning
        t = 0.5 + 0.01 * k if pairs else 0.01
        s = -t * inverse.Hg
        y = B @ s
        tau = min(1.0, max(float(s @ y) / (-t * float(s @ g)), MIN_TAU)) if pairs and scaled else 1.0
        inverse.learn(s, y, g, g + y, t)
        g = g + y
        pairs = [*pairs, (s, y, tau)][-history:]
        H = max(float(s @ y) / float(y @ y) for s, y, _ in pairs) * torch.eye(n, dtype=torch.float64)
        for s, y, tau in pairs:
            H = expected(H, s, y, tau, 1.0)
        torch.testing.assert_close(inverse.Hg, H @ g, rtol=1e-6, atol=1e-9)
        if k == 17:
            other = LimitedInverse(g, history, scaled=scaled)
            other.load_state_dict(inverse.state_dict())
            inverse = other
    assert inverse.num_pairs == min(history, 30)


# ---- in a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "update"), [
    *itertools.product(["dense", "auto"], ["bfgs", "ssbfgs", "ssbroyden"]), ("wolfe", "bfgs"), ("wolfe", "ssbfgs"),
])  # fmt: skip
def test_it_ends_far_below_the_optimizer_alone(update: str, form: str) -> None:
    (x, y), *_ = full_batch(1)
    batch = x.double(), y.double()
    model, plain = make_model("mlp").double(), make_model("mlp").double()
    trainer = built(model, predictor__quasi_newton__update=update, predictor__quasi_newton__form=form)
    assert isinstance(trainer.run.proposer.source, LimitedQuasiNewton if form == "wolfe" else DenseQuasiNewton)
    trainer.fit([batch], total_steps=150)
    plain_loop(plain, torch.optim.Adam(plain.parameters(), lr=0.01), [batch] * 150)
    assert loss_at(model, batch) < 0.05 * loss_at(plain, batch)
    assert trainer.statistics()["num_predictor_failures"] == 0


def test_auto_takes_the_limited_form_where_the_matrix_does_not_fit() -> None:
    trainer = built(make_model("mlp"), predictor__quasi_newton__form="auto", predictor__quasi_newton__memory_mb=1e-3)
    assert isinstance(trainer.run.proposer.predictor, QuasiNewton)


def test_predictor_auto_takes_the_dense_form_that_was_asked_for() -> None:
    trainer = built(make_model("mlp"), predictor__type="auto")
    trainer.fit(full_batch(1), total_steps=60)
    assert isinstance(trainer.run.proposer.source, DenseQuasiNewton)
    assert trainer.statistics()["num_jumps_accepted"] > 0


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"needs \d+ MB for \d+ weights: raise predictor\.quasi_newton\.memory_mb"):
        built(make_model("mlp"), predictor__quasi_newton__memory_mb=1e-3)
    with pytest.raises(ConfigError, match="needs the whole matrix"):
        built(make_model("mlp"), predictor__quasi_newton__form="limited", predictor__quasi_newton__update="ssbroyden")


def test_limited_bfgs_is_the_form_without_self_scaling() -> None:
    runs = []
    for values in ({"update": "bfgs"}, {"self_scaling": False}, {}):
        model = make_model("mlp")
        trainer = built(model, predictor__quasi_newton__form="limited",
                        **{f"predictor__quasi_newton__{k}": v for k, v in values.items()})  # fmt: skip
        trainer.fit(full_batch(1), total_steps=60)
        runs.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("form", ["dense", "wolfe"])
@pytest.mark.parametrize("at", [4, 12])
def test_a_resumed_run_is_the_whole_one(at: int, form: str, tmp_path: Path) -> None:
    (batch,) = full_batch(1)
    whole, other = (built(make_model("mlp", seed=s), predictor__quasi_newton__form=form) for s in (0, 9))
    for _ in range(at):
        whole.step(batch)
    other.load_checkpoint(whole.save_checkpoint(tmp_path))
    for _ in range(20):
        assert whole.step(batch).reason == other.step(batch).reason
    for p, q in zip(whole.run.subject.parameters, other.run.subject.parameters, strict=True):
        assert torch.equal(p, q)


def test_frozen_weights_stay() -> None:
    model = make_model("mlp")
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = copy.deepcopy(frozen)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trainer = HybridTrainer(model, optimizer, built(make_model("mlp")).config, loss_fn=loss_fn)
    trainer.fit(full_batch(1), total_steps=60)
    assert trainer.statistics()["num_jumps_accepted"] > 0
    assert torch.equal(frozen, before)


def test_points_that_change_keep_the_curvature_and_lose_the_loss() -> None:
    model = make_model("mlp").double()
    trainer = built(model)
    for x, y in full_batch(1) * 1:
        for k in range(6):
            batch = x.double() + 0.1 * k, y.double()
            for _ in range(15):
                trainer.step(batch)
    assert trainer.statistics()["num_jumps_accepted"] > 10
    assert trainer.statistics()["num_predictor_failures"] == 0


# ---- prices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "weights", "of_product", "of_matrix", "units", "measured"),
    # benchmarks/matrix_price.py, one run: (kernel + factor + a product) / forward, in CPU time
    [(258, 2209, 1.63e6, 7.37e7, 4.95e4, 8.4), (130, 2209, 8.2e5, 1.87e7, 2.5e4, 4.1),
     (512, 4897, 2.51e6, 7.62e7, 5.12e4, 25.1), (612, 2243, 5.13e6, 4.25e8, 1.5e5, 17.9),
     (1217, 3297, 1.52e7, 2.46e9, 4.67e5, 75.4), (1092, 2241, 1.14e7, 1.35e9, 3.49e5, 42.7),
     (258, 10151, 7.71e6, 1.26e8, 1.8e5, 9.7), (512, 10221, 5.23e6, 1.03e8, 1.43e5, 17.4),
     (1217, 10221, 4.9e7, 4.82e9, 1.36e6, 60.2), (258, 50084, 3.84e7, 2.44e8, 2.8e5, 6.8),
     (512, 50241, 2.57e7, 2.05e8, 2.4e5, 10.9), (1217, 50241, 2.43e8, 9.33e9, 2.3e6, 34.1),
     (258, 200026, 1.54e8, 4.6e8, 4.9e5, 5.8), (512, 200341, 1.03e8, 3.92e8, 4.8e5, 7.4),
     (1217, 200341, 9.72e8, 1.75e10, 4.6e6, 24.9)],
)  # fmt: skip
def test_matrices_are_charged_what_they_take(
    rows: int, weights: int, of_product: float, of_matrix: float, units: float, measured: float
) -> None:
    counts = price.Counts(rows, weights, of_product, of_matrix, math.inf, units)
    charged = price.least_squares(counts, of_matrix, num_products=1, num_factors=1)
    assert measured / 2.5 < charged < 2.5 * measured


def test_what_was_not_factorised_is_charged_for_its_products_alone() -> None:
    counts = price.Counts(9000, 8000, 1e10, math.inf, math.inf)
    one, ten = (price.least_squares(counts, 0.0, num_products=n, num_factors=0) for n in (1, 10))
    assert ten == pytest.approx(10 * one, rel=0.02)
    assert one == pytest.approx(price.PRODUCT, rel=0.05)


def test_every_damping_is_charged_a_factor() -> None:
    counts = price.Counts(1000, 8000, 1e6, 1e9, math.inf)
    none, one, three = (price.least_squares(counts, 1e9, num_products=1, num_factors=n) for n in (0, 1, 3))
    assert three - none == pytest.approx(3 * (one - none))
    assert one - none == pytest.approx(price.FACTOR * 1000**3 / 6 / (price.CALLS + 1e6))


def test_a_forward_in_float64_is_worth_up_to_two() -> None:
    narrow, wide = (price.Counts(100, 8000, n, 1e9, math.inf) for n in (1e4, 1e9))
    for counts, ratio in ((narrow, 1.0), (wide, 0.5)):
        single, double = (
            price.least_squares(replace(counts, double=d), 1e9, num_products=1, num_factors=1) for d in (False, True)
        )
        assert double / single == pytest.approx(ratio, rel=0.01)


def test_rows_one_by_one_are_dearer_than_rows_at_once() -> None:
    wide, narrow = price.rows_one_by_one(512, 200_000, 64), price.rows_one_by_one(512, 100, 64)
    assert 400 < wide < 512 + 8
    assert 8 <= narrow < 12, "nearly all of it is calls, of which there are 512 / 64"


def test_steps_are_charged_alike() -> None:
    assert price.dense_steps(3, 2209, 256) == pytest.approx(3 * price.dense_steps(1, 2209, 256))
