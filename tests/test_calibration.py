"""Confidence: temperature, logistic model, reliability and the split of uncertainty."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from hybrid_predict_trainer.numerics import calibration
from hybrid_predict_trainer.numerics.calibration import ReliabilityBin
from hybrid_predict_trainer.propose import confidence as cal
from hybrid_predict_trainer.propose.confidence import Confidence, Evidence, TrackRecord

FLOATS = st.floats(allow_nan=True, allow_infinity=True)


def outcomes(generator, truth):
    return (generator.random(len(truth)) < truth).astype(float)


# ---------------------------------------------------------------- temperature


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-7, 7), st.booleans()), min_size=1, max_size=40))
def test_temperature_never_raises_the_log_loss_and_never_changes_the_order(pairs):
    logits, kept = np.array([z for z, _ in pairs]), np.array([float(y) for _, y in pairs])
    temperature = calibration.fit_temperature(logits, kept)
    assert 1 / 20 <= temperature <= 20
    assert calibration.log_loss(logits / temperature, kept) <= calibration.log_loss(logits, kept) + 1e-12
    order = np.argsort(logits, kind="stable")
    assert (np.diff(calibration.scaled(logits, temperature)[order]) >= 0).all()


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_temperature_is_recovered_from_many_outcomes(true):
    generator = np.random.default_rng(0)
    honest = 2 * generator.standard_normal(20_000)
    kept = outcomes(generator, calibration.sigmoid(honest))
    assert calibration.fit_temperature(true * honest, kept) == pytest.approx(true, rel=0.05)


def test_temperature_is_the_minimum_of_its_objective():
    generator = np.random.default_rng(1)
    logits = 3 * generator.standard_normal(60)
    kept = outcomes(generator, calibration.sigmoid(0.4 * logits))

    def objective(b):
        return 60 * calibration.log_loss(b * logits, kept) + 10 / 2 * (b - 1) ** 2

    best = minimize_scalar(objective, bounds=(1 / 20, 20), method="bounded", options={"xatol": 1e-9}).x
    assert 1 / calibration.fit_temperature(logits, kept, prior_weight=10) == pytest.approx(best, abs=1e-5)


def test_few_outcomes_hardly_move_the_temperature():
    logits, kept = np.array([3.0, 3.0, -3.0, 3.0]), np.array([0.0, 1.0, 1.0, 1.0])
    few, many = (calibration.fit_temperature(np.tile(logits, k), np.tile(kept, k)) for k in (1, 200))
    assert few < 2 < 4 < many


# ---------------------------------------------------------------- logistic


def test_logistic_agrees_with_scikit_learn():
    generator = np.random.default_rng(2)
    Z = generator.standard_normal((200, 4))
    kept = outcomes(generator, calibration.sigmoid(Z @ np.array([1.0, -2.0, 0.0, 0.5])))
    ours = calibration.fit_logistic(Z, kept, np.zeros(4), precision=2.0)
    theirs = LogisticRegression(C=1 / 2.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(Z, kept)
    np.testing.assert_allclose(ours, theirs.coef_[0], atol=1e-6)


def test_logistic_prior_is_where_no_outcomes_lead():
    prior = np.array([0.3, 1.0, -2.0])
    np.testing.assert_array_equal(calibration.fit_logistic(np.zeros((0, 3)), np.zeros(0), prior, 1.0), prior)
    generator = np.random.default_rng(3)
    Z, kept = 10 * generator.standard_normal((30, 3)), np.ones(30)  # separable: only the prior keeps it finite
    w = calibration.fit_logistic(Z, kept, prior, 1.0)
    gradient = Z.T @ (calibration.sigmoid(Z @ w) - kept) + (w - prior)
    assert np.abs(gradient).max() < 1e-4


# ---------------------------------------------------------------- reliability


def guo(stated, kept, num_bins):
    """ECE as it is printed: sum over bins of |B|/n |acc - conf|."""
    total = 0.0
    for m in range(num_bins):
        low, high = m / num_bins, (m + 1) / num_bins
        inside = [(p, y) for p, y in zip(stated, kept, strict=True) if low < p <= high or (m == 0 and p == 0)]
        if inside:
            total += abs(sum(y - p for p, y in inside)) / len(stated)
    return total


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_the_published_formula(pairs):
    stated, kept = [p for p, _ in pairs], [float(y) for _, y in pairs]
    error = calibration.calibration_error(calibration.reliability_curve(stated, kept, 10))
    assert error == pytest.approx(guo(stated, kept, 10), abs=1e-9)


@pytest.mark.parametrize(("kind", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_reliability_curve_agrees_with_scikit_learn(kind, strategy):
    generator = np.random.default_rng(4)
    stated = generator.beta(2, 1, 333)
    kept = outcomes(generator, stated)
    curve = calibration.reliability_curve(stated, kept, 10, kind)
    accuracy, confidence = calibration_curve(kept, stated, n_bins=10, strategy=strategy)
    np.testing.assert_allclose([b.accuracy for b in curve], accuracy)
    np.testing.assert_allclose([b.confidence for b in curve], confidence)
    assert sum(b.count for b in curve) == 333
    if kind == "mass":
        assert max(b.count for b in curve) - min(b.count for b in curve) <= 1
    else:
        assert [b.center for b in curve] == pytest.approx(np.arange(0.05, 1, 0.1))


def test_empty_curve():
    assert calibration.reliability_curve([], []) == []
    assert math.isnan(calibration.calibration_error([]))


def test_noise_of_the_calibration_error_is_what_honest_streams_show():
    generator = np.random.default_rng(5)
    errors, expected = [], []
    for _ in range(200):
        stated = generator.random(500)
        curve = calibration.reliability_curve(stated, outcomes(generator, stated))
        errors.append(calibration.calibration_error(curve))
        expected.append(calibration.calibration_noise(curve))
    assert np.mean(expected) == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(errors) > 0.03  # an ECE of 0.05 after 500 outcomes is hardly more than chance


# ---------------------------------------------------------------- uncertainty


def test_variances_add_up_to_that_of_the_mixture():
    means, stds = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    epistemic, aleatoric = cal.split_variance(means, stds**2)
    draws = (means[:, None] + stds[:, None] * torch.randn(3, 200_000, 4)).flatten(0, 1)
    torch.testing.assert_close(epistemic + aleatoric, draws.var(dim=0), rtol=0.02, atol=0.0)
    same = cal.split_variance(means[:1].expand(3, 4), stds**2)[0]
    torch.testing.assert_close(same, torch.zeros(4))


def test_entropies_of_members_that_agree_and_that_do_not():
    fair = torch.full((3, 2), 0.5)
    assert [float(v) for v in cal.split_entropy(fair)] == pytest.approx([0.0, math.log(2)], abs=1e-6)
    sure = torch.eye(3)
    assert [float(v) for v in cal.split_entropy(sure)] == pytest.approx([math.log(3), 0.0], abs=1e-6)


# ---------------------------------------------------------------- the model of a run


def drawn(generator, num):
    """A record, what a proposal promises, and the probability that follows from both."""
    record = generator.uniform(0.2, 0.6, num)
    worth = generator.standard_normal(num)
    return record, worth, calibration.sigmoid(np.log(record / (1 - record)) + 0.8 * worth - 0.3)


def truth_of(seed, num):
    """The probabilities behind :func:`stream`."""
    return drawn(np.random.default_rng(seed), num)[2]


def stream(seed, num):
    """Raw confidences that are far too sure and too high, a record worth something, and outcomes."""
    generator = np.random.default_rng(seed)
    record, worth, truth = drawn(generator, num)
    raw = calibration.sigmoid(3 * np.log(truth / (1 - truth)) + 2.0)  # the order is right, the numbers are not
    evidence = [
        Evidence(raw=float(r), record=float(t), reduction=math.exp(w), price=1.0, noise=0.05)
        for r, t, w in zip(raw, record, worth, strict=True)
    ]
    return evidence, outcomes(generator, truth), raw


@pytest.mark.parametrize("seed", range(5))
def test_calibrated_after_500_outcomes(seed):
    evidence, kept, raw = stream(seed, 4500)
    model = Confidence()
    for e, y in zip(evidence[:500], kept[:500], strict=True):
        model.observe(e, bool(y))
    later = [model.predict(e) for e in evidence[500:]]  # outcomes it never saw
    for kind in ("width", "mass"):
        assert calibration.calibration_error(calibration.reliability_curve(later, kept[500:], 10, kind)) < 0.05
        assert calibration.calibration_error(calibration.reliability_curve(raw[500:], kept[500:], 10, kind)) > 0.1
    report = model.report()
    assert report["num_outcomes"] == 500
    assert report["ece"] < report["ece_by_chance"] + 0.03
    assert report["log_loss"] < report["log_loss_raw"] - 0.1


def test_calibrated_as_stated_from_the_first_outcome_on():
    """Over 12 streams of 500: an estimator without the bias of fixed bins stays below 0.05 on every one.

    With ten fixed bins the true probabilities themselves show up to 0.07 by chance.
    """
    sweeps, debiased, plain, by_truth = [], [], [], []
    for seed in range(12):
        evidence, kept, _ = stream(seed, 500)
        model = Confidence()
        for e, y in zip(evidence, kept, strict=True):
            model.observe(e, bool(y))
        report = model.report()
        sweeps.append(report["ece_sweep"])
        debiased.append(report["ece_debiased"])
        plain.append(report["ece"])
        by_truth.append(calibration.calibration_error(calibration.reliability_curve(truth_of(seed, 500), kept)))
    assert max(sweeps) < 0.05
    assert max(debiased) < 0.05
    assert np.mean(plain) < 0.05 < max(by_truth)


def test_errors_without_bias_see_real_miscalibration():
    for seed in range(5):
        _, kept, raw = stream(seed, 500)
        curve = calibration.reliability_curve(raw, kept, 10, "mass")
        assert calibration.debiased_error(curve) > 0.1
        assert calibration.calibration_error(calibration.monotone_curve(raw, kept)) > 0.1


def test_debiased_error_of_known_gaps():
    honest = [ReliabilityBin(center=0.5, confidence=0.5, accuracy=0.5, count=100)]
    assert calibration.debiased_error(honest) == 0
    sure = [ReliabilityBin(center=0.5, confidence=0.7, accuracy=1.0, count=100)]
    assert calibration.debiased_error(sure) == pytest.approx(0.3)
    assert math.isnan(calibration.debiased_error([ReliabilityBin(center=0.5, confidence=0.5, accuracy=1.0, count=1)]))
    generator = np.random.default_rng(7)
    squares = []
    for _ in range(4000):  # unbiased before the root: the mean over streams is the true squared gap
        bins = [(0.3, 0.4), (0.8, 0.65)]
        curve = [
            ReliabilityBin(center=p, confidence=p, accuracy=float((generator.random(40) < q).mean()), count=40)
            for p, q in bins
        ]
        gaps = [(b.accuracy - b.confidence) ** 2 - b.accuracy * (1 - b.accuracy) / 39 for b in curve]
        squares.append(sum(gaps) / 2)
        assert calibration.debiased_error(curve) == pytest.approx(math.sqrt(max(squares[-1], 0)), abs=1e-6)
    assert np.mean(squares) == pytest.approx((0.1**2 + 0.15**2) / 2, rel=0.1)


def test_monotone_curve_has_as_many_bins_as_rise():
    stated = np.linspace(0, 1, 60)
    step = (stated > 0.5).astype(float)
    assert len(calibration.monotone_curve(stated, step)) == 60  # rises however fine
    falling = 1 - step
    assert len(calibration.monotone_curve(stated, falling)) == 1
    assert calibration.monotone_curve([], []) == []


def test_without_outcomes_the_track_record_speaks():
    for record in (0.05, 0.5, 0.8):
        stated = Confidence().predict(Evidence(raw=0.99, record=record, reduction=5.0, price=1.0, noise=0.3))
        assert stated == pytest.approx(record)


def test_what_is_scored_was_stated_before_the_outcome_was_known():
    model, evidence = Confidence(), Evidence(raw=0.5, record=0.5)
    before = model.predict(evidence)
    model.observe(evidence, True)
    assert model.report()["reliability"][0]["confidence"] == before != model.predict(evidence)


def test_learns_from_each_piece_of_evidence():
    generator = np.random.default_rng(6)
    names = {"raw": (0.1, 0.9), "record": (0.1, 0.9), "reduction": (0.1, 10.0), "noise": (0.001, 1.0)}
    for name, (low, high) in names.items():
        model = Confidence()
        for _ in range(200):
            good = generator.random() < 0.5
            values = {"raw": 0.5, "record": 0.5, "reduction": 1.0, "price": 1.0, "noise": 0.03}
            model.observe(Evidence(**{**values, name: high if good else low}), bool(good))
        neutral = {"raw": 0.5, "record": 0.5, "reduction": 1.0, "price": 1.0, "noise": 0.03}
        assert model.predict(Evidence(**{**neutral, name: high})) > 0.8, name
        assert model.predict(Evidence(**{**neutral, name: low})) < 0.2, name


@settings(max_examples=300, deadline=None)
@given(FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, st.booleans())
def test_a_probability_whatever_comes(raw, record, reduction, price, noise, kept):
    evidence = Evidence(raw=raw, record=record, reduction=reduction, price=price, noise=noise)
    model = Confidence()
    for _ in range(3):
        assert 0 < model.predict(evidence) < 1
        model.observe(evidence, kept)
    json.dumps(model.report(), allow_nan=False)


def test_forgets_beyond_its_capacity_and_learns_a_new_truth():
    model, evidence = Confidence(capacity=50), Evidence(raw=0.5, record=0.5)
    for _ in range(100):
        model.observe(evidence, True)
    assert model.predict(evidence) > 0.9
    for _ in range(50):
        model.observe(evidence, False)
    assert model.num_outcomes == 50
    assert model.temperature > 1.5  # it was sure and wrong, so it is modest for a while
    assert model.predict(evidence) < 0.4
    for _ in range(50):
        model.observe(evidence, False)
    assert model.predict(evidence) < 0.1


def test_state_goes_through_a_fresh_object():
    evidence, kept, _ = stream(0, 60)
    model = Confidence()
    for e, y in zip(evidence[:40], kept, strict=False):
        model.observe(e, bool(y))
    copy = Confidence()
    copy.load_state_dict(json.loads(json.dumps(model.state_dict())))
    for m in (model, copy):
        for e, y in zip(evidence[40:], kept[40:], strict=True):
            m.observe(e, bool(y))
    assert copy.report() == model.report()
    assert copy.predict(evidence[0]) == model.predict(evidence[0])


def test_empty_report_is_valid_json():
    report = json.loads(json.dumps(Confidence().report(), allow_nan=False))
    assert report["ece"] is None
    assert report["reliability"] == []


def test_track_record_starts_even_and_forgets():
    record = TrackRecord()
    assert record.confidence == 0.5
    for _ in range(50):
        record.record(True)
    assert record.confidence == pytest.approx(11 / 12, abs=0.01)
    for _ in range(50):
        record.record(False)
    assert record.confidence == pytest.approx(1 / 12, abs=0.01)


def test_a_fit_from_the_one_before_is_the_fit():
    evidence, kept, _ = stream(1, 200)
    Z, y, prior = np.array([e.features() for e in evidence]), np.array(kept, dtype=float), np.array(Confidence.PRIOR)
    before = calibration.fit_logistic(Z[:-1], y[:-1], prior, 2.0)
    cold, warm = (calibration.fit_logistic(Z, y, prior, 2.0, start) for start in (None, before))
    np.testing.assert_allclose(warm, cold, rtol=1e-5)
    temperature = calibration.fit_temperature(Z @ cold * 3, y)
    assert calibration.fit_temperature(Z @ cold * 3, y, start=5.0) == pytest.approx(temperature, rel=1e-10)


def test_of_many_outcomes_one_more_waits_and_a_checkpoint_knows_how_many_wait():
    evidence, kept, _ = stream(2, 300)
    model, fits = Confidence(), []
    for e, y in zip(evidence[:290], kept, strict=False):
        before = model._weights
        model.observe(e, bool(y))
        fits.append(model._weights is not before)
    assert all(fits[:127])
    assert fits[-32:].count(True) == 8  # every fourth of more than 256
    again = Confidence()
    again.load_state_dict(model.state_dict())
    for e, y in zip(evidence[290:], kept[290:], strict=True):
        for each in (model, again):
            each.observe(e, bool(y))
        assert again.state_dict() == model.state_dict()
