"""Corrector: bounded, zero when empty, and it learns what a predictor gets wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import assert_same, config, full_batch, make_batches, setup
from hybrid_predict_trainer.predictors import Hold
from hybrid_predict_trainer.propose import corrector as cor
from hybrid_predict_trainer.propose.corrector import Correction, NoCorrection, ResidualCorrector
from hybrid_predict_trainer.propose.residuals import extract
from hybrid_predict_trainer.records import BasisSpec, PhasePrediction, Residual

G, K, F = 2, 3, 4
SPEC = BasisSpec(num_displacements=2, lag=True)


def prediction(coefficients, horizon=10, loss=1.0):
    return PhasePrediction(coefficients=coefficients, horizon=horizon, predicted_loss=loss, predicted_reduction=0.5)


def made(**changes):
    return ResidualCorrector(SPEC, G, F, **changes)


def gram(generator, scale=1.0):
    columns = scale * torch.randn(G, K, 20, generator=generator, dtype=torch.float64)
    return torch.einsum("gkd,gld->gkl", columns, columns)


# ---------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(0, 30), st.sampled_from([1e-12, 1.0, 1e9]), st.sampled_from([1e-6, 1.0, 1e6]),
    st.floats(0.01, 3.0), st.integers(1, 400),
)  # fmt: skip
def test_bounded_and_finite_whatever_was_learnt(seed, count, residual_scale, gram_scale, limit, horizon):
    generator = torch.Generator().manual_seed(seed)
    corrector, BB = made(max_magnitude=limit), gram(generator, gram_scale)
    for _ in range(count):
        coefficients = residual_scale * torch.randn(G, K, generator=generator, dtype=torch.float64)
        loss = float(residual_scale * torch.randn((), generator=generator))
        corrector.observe(
            Residual(features=torch.randn(F, generator=generator), coefficients=coefficients, loss=loss, horizon=5)
        )
    jump = prediction(torch.randn(G, K, generator=generator, dtype=torch.float64), horizon, loss=2.0)
    found = corrector.correct(jump, torch.randn(F, generator=generator), BB)
    assert found.coefficients.shape == (G, K)
    assert bool(torch.isfinite(found.coefficients).all())
    long = cor.length(jump.coefficients, BB)
    assert cor.length(found.coefficients, BB) <= limit * long * (1 + 1e-9)
    assert found.magnitude <= limit * (1 + 1e-9)
    assert abs(found.loss) <= 2 * limit
    assert found.num_similar <= 5
    if count == 0:
        assert not found.coefficients.any()
        assert found.loss == 0
    if found.num_similar:
        assert sum(found.weights) == pytest.approx(1.0)


def test_an_outsized_residual_is_cut_to_the_bound_exactly():
    corrector, BB = made(max_magnitude=0.25), torch.eye(K, dtype=torch.float64).expand(G, K, K)
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.full((G, K), 1e3), loss=-1e3, horizon=10))
    found = corrector.correct(prediction(torch.ones(G, K, dtype=torch.float64), loss=4.0), torch.ones(F), BB)
    assert found.magnitude == pytest.approx(0.25)
    assert found.loss == pytest.approx(-1.0)
    assert corrector.correct(prediction(torch.zeros(G, K)), torch.ones(F), BB).magnitude == 0  # no jump, no correction


def test_nothing_that_is_not_finite_gets_in_or_out():
    corrector, BB = made(), torch.eye(K, dtype=torch.float64).expand(G, K, K)
    bad = torch.full((G, K), math.inf)
    corrector.observe(Residual(features=torch.ones(F), coefficients=bad, loss=0.0, horizon=1))
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.ones(G, K), loss=math.nan, horizon=1))
    assert len(corrector.store) == 0
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.ones(G, K), loss=0.1, horizon=1))
    jump = prediction(torch.ones(G, K, dtype=torch.float64))
    assert not corrector.correct(jump, torch.full((F,), math.nan), BB).coefficients.any()
    assert not corrector.correct(prediction(bad.double()), torch.ones(F), BB).coefficients.any()
    assert not cor.bounded(bad, BB.float(), 1.0).any()


def test_columns_without_data_are_left_alone():
    corrector, BB = made(), torch.eye(K, dtype=torch.float64).repeat(G, 1, 1)
    BB[1, 2, 2] = 0
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.ones(G, K), loss=0.0, horizon=10))
    found = corrector.correct(prediction(torch.ones(G, K, dtype=torch.float64)), torch.ones(F), BB).coefficients
    assert found[1, 2] == 0
    assert (found != 0).sum() == G * K - 1


# ---------------------------------------------------------------- formula


def test_blend_of_retrieved_and_modelled_scaled_to_the_horizon():
    BB = torch.eye(K, dtype=torch.float64).expand(G, K, K)
    jump = prediction(torch.full((G, K), 100.0, dtype=torch.float64), horizon=20, loss=100.0)
    one = Residual(features=torch.ones(F), coefficients=torch.full((G, K), 2.0), loss=0.5, horizon=10)

    def corrected(share):
        corrector = made(retrieved_share=share, max_magnitude=10.0, l2=1e-9)
        corrector.observe(one)
        return corrector.correct(jump, torch.ones(F), BB)

    # two windows ahead: drift doubles, the lag (third column) does not
    torch.testing.assert_close(corrected(1.0).coefficients, torch.tensor([[4.0, 4.0, 2.0]] * G, dtype=torch.float64))
    assert corrected(1.0).loss == pytest.approx(1.0)
    retrieved, modelled, blend = (corrected(share).coefficients for share in (1.0, 0.0, 0.7))
    torch.testing.assert_close(modelled, retrieved, rtol=1e-6, atol=1e-6)  # a bias learnt from one residual
    torch.testing.assert_close(blend, 0.7 * retrieved + 0.3 * modelled)


def test_without_similar_states_only_the_model_speaks():
    BB = torch.eye(K, dtype=torch.float64).expand(G, K, K)
    corrector = made(max_magnitude=10.0, l2=1e-9)
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.ones(G, K), loss=0.0, horizon=10))
    found = corrector.correct(prediction(torch.full((G, K), 10.0, dtype=torch.float64)), -torch.ones(F), BB)
    assert found.num_similar == 0
    torch.testing.assert_close(found.coefficients, torch.full((G, K), 0.3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0], ids=["model alone", "blend", "retrieval alone"])
def test_error_falls_with_experience(share):
    """The truth depends on the state, the predictor does not know it: what is left must shrink."""
    generator = torch.Generator().manual_seed(3)
    corrector, BB = made(retrieved_share=share, max_magnitude=1.0, forgetting=1.0, capacity=500), gram(generator)
    weight = torch.randn(F, G, K, generator=generator, dtype=torch.float64)
    predicted = prediction(torch.ones(G, K, dtype=torch.float64))
    raw, left = [], []
    for _ in range(300):
        x = torch.randn(F, generator=generator)
        truth = 1 + 0.15 * torch.einsum("f,fgk->gk", x.double(), weight)
        noisy = truth + 0.05 * torch.randn(G, K, generator=generator, dtype=torch.float64)
        corrected = cor.apply(predicted, corrector.correct(predicted, x, BB))
        raw.append(cor.length(truth - predicted.coefficients, BB))
        left.append(cor.length(truth - corrected.coefficients, BB))
        corrector.observe(Residual(features=x, coefficients=noisy - predicted.coefficients, loss=0.0, horizon=10))
    ratio = [sum(left[a:b]) / sum(raw[a:b]) for a, b in ((0, 20), (100, 300))]
    assert ratio[1] < {0.0: 0.4, 0.7: 0.6, 1.0: 0.8}[share]
    assert ratio[1] < 0.8 * ratio[0]


def test_corrects_a_biased_forecast_of_a_real_run_and_its_loss():
    """``hold`` with half the right length on a smooth run: residuals of real windows bring it back."""
    made_setup = setup("mlp", "sgd")

    class Timid(Hold):
        def predict(self, horizon):
            full = super().predict(horizon)
            return prediction(0.5 * full.coefficients, horizon, full.predicted_loss + 0.1)

    predictor = Timid()
    trainer = made_setup.trainer(config(gate__overhead_budget_exact=0.0, predictor__window=5), predictor=predictor)
    run = trainer.run
    corrector = ResidualCorrector(predictor.spec, run.windows.groups.num_groups, 32, max_magnitude=2.0)
    windows, raw, left = [], [], []
    observe = predictor.observe
    predictor.observe = lambda window: (windows.append(window), observe(window))[1]
    forecast = state = None
    for batch in full_batch(400):
        count = len(windows)
        trainer.step(batch)
        if len(windows) == count:
            continue
        window = windows[-1]
        if forecast is not None and window.hindsight is not None:
            corrected = cor.apply(forecast, corrector.correct(forecast, state, window.hindsight.BB))
            found = extract(window.hindsight, forecast, state, window.loss)
            again = extract(window.hindsight, corrected, state, window.loss)
            raw.append((cor.length(found.coefficients, window.hindsight.BB), abs(found.loss)))
            left.append((cor.length(again.coefficients, window.hindsight.BB), abs(again.loss)))
            corrector.observe(found)
        if predictor.ready:
            forecast, state = predictor.predict(window.num_steps), window.features
    assert len(raw) > 40
    for part in (0, 1):
        assert sum(x[part] for x in left[20:]) < 0.3 * sum(x[part] for x in raw[20:])


def test_a_correction_moves_every_predicted_tensor():
    made_setup = setup("mlp", "adam")
    trainer = made_setup.trainer(config(gate__overhead_budget=0.0), predictor=Hold())
    for batch in make_batches(20):
        trainer.step(batch)
    run = trainer.run
    corrector = ResidualCorrector(run.proposer.predictor.spec, run.windows.groups.num_groups, F)
    shape = (run.windows.groups.num_groups, run.proposer.predictor.spec.num_columns)
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.ones(shape), loss=0.0, horizon=3))
    jump = run.proposer.predictor.predict(3)
    deltas = run.windows.basis.combine(
        corrector.correct(jump, torch.ones(F), run.windows.basis.products().BB).coefficients
    )
    assert [d.shape for d in deltas] == [p.shape for p in run.subject.parameters]
    assert all(float(d.norm()) > 0 for d in deltas)
    whole = math.sqrt(sum(float(d.double().square().sum()) for d in run.windows.basis.combine(jump.coefficients)))
    length = math.sqrt(sum(float(d.double().square().sum()) for d in deltas))
    assert length == pytest.approx(0.2 * whole, rel=1e-4)  # the bound in coefficients is one in weights


# ---------------------------------------------------------------- the rest


def test_applied_correction_changes_what_it_says():
    jump = prediction(torch.ones(G, K, dtype=torch.float64))
    correction = Correction(coefficients=torch.full((G, K), 0.5, dtype=torch.float64), loss=0.2)
    result = cor.apply(jump, correction)
    assert_same(result.coefficients, torch.full((G, K), 1.5, dtype=torch.float64))
    assert_same(result.alternatives[0], jump.coefficients)
    assert result.predicted_loss == pytest.approx(1.2)
    assert result.predicted_reduction == pytest.approx(0.3)
    assert result.horizon == jump.horizon


def test_no_correction_corrects_nothing():
    corrector, jump = NoCorrection(), prediction(torch.ones(G, K, dtype=torch.float64))
    corrector.observe(Residual(features=torch.ones(F), coefficients=torch.ones(G, K), loss=1.0, horizon=1))
    result = cor.apply(jump, corrector.correct(jump, torch.ones(F), torch.eye(K).expand(G, K, K)))
    assert result == jump
    assert corrector.memory_bytes() == 0
    corrector.load_state_dict(corrector.state_dict())


@pytest.mark.parametrize("shape", [(G * K,), (G, K + 1)])
def test_a_prediction_of_the_wrong_shape_is_left_to_the_gate(shape):
    learnt = made()
    learnt.observe(Residual(features=torch.ones(F), coefficients=torch.ones(G, K), loss=1.0, horizon=1))
    jump = prediction(torch.ones(shape))
    for corrector in (learnt, NoCorrection()):
        assert cor.apply(jump, corrector.correct(jump, torch.ones(F), torch.eye(K).expand(G, K, K))) == jump


def test_state_goes_through_a_fresh_corrector():
    generator = torch.Generator().manual_seed(5)
    corrector, copy, BB = made(capacity=8), made(capacity=8), gram(generator)
    residuals = [
        Residual(
            features=torch.randn(F, generator=generator), horizon=5, loss=0.1,
            coefficients=torch.randn(G, K, generator=generator, dtype=torch.float64),
        )
        for _ in range(20)
    ]  # fmt: skip
    for r in residuals[:12]:
        corrector.observe(r)
    copy.load_state_dict(corrector.state_dict())
    for c in (corrector, copy):
        for r in residuals[12:]:
            c.observe(r)
    assert_same(copy.state_dict(), corrector.state_dict())
    jump = prediction(torch.ones(G, K, dtype=torch.float64))
    assert_same(*(c.correct(jump, residuals[0].features, BB).coefficients for c in (copy, corrector)))
    assert copy.memory_bytes() == corrector.memory_bytes() > 0
