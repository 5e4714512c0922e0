"""The gate against known answers: quantiles, bounds, lengths, verdicts on made-up losses, error rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hybrid_predict_trainer.judge import gate
from hybrid_predict_trainer.numerics import quantiles
from hybrid_predict_trainer.propose.confidence import TrackRecord
from hybrid_predict_trainer.propose.proposal import within_radius
from hybrid_predict_trainer.records import Reason, Verdict

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 10, 30, 31, 100, 1000])
@pytest.mark.parametrize("level", [0.01, 0.025, 0.05, 0.1, 0.25, 0.5])
def test_t_quantile(level: float, freedom: int) -> None:
    tolerance = 1e-3 if level == 0.05 and freedom <= 30 else 0.025
    assert quantiles.t_quantile(level, freedom) == pytest.approx(stats.t.isf(level, freedom), rel=tolerance, abs=1e-6)


def test_t_quantile_without_freedom_is_infinite() -> None:
    assert quantiles.t_quantile(0.05, 0) == math.inf


@pytest.mark.parametrize("level", [1e-6, 0.001, 0.025, 0.05, 0.5, 0.9])
def test_normal_quantile(level: float) -> None:
    assert quantiles.normal_quantile(level) == pytest.approx(stats.norm.isf(level), abs=1e-9)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20).filter(lambda v: np.ptp(v) > 1e-6),
    st.sampled_from([0.05, 0.1]),
)
@settings(max_examples=60, deadline=None)
def test_upper_bound_is_the_paired_t_interval(differences: list[float], level: float) -> None:
    interval = stats.ttest_1samp(differences, 0.0, alternative="less").confidence_interval(1 - level)
    assert quantiles.upper_bound(differences, level) == pytest.approx(
        interval.high, rel=0.01, abs=1e-3 * np.ptp(differences)
    )


@pytest.mark.parametrize("values", [[], [-5.0]])
def test_one_pair_proves_nothing(values: list[float]) -> None:
    assert quantiles.upper_bound(values, 0.05) == math.inf


def test_upper_bound_covers_at_its_level() -> None:
    generator = np.random.default_rng(0)
    misses = sum(quantiles.upper_bound(list(generator.normal(0.0, 1.0, 6)), 0.05) < 0 for _ in range(4000))
    assert misses / 4000 == pytest.approx(0.05, abs=0.012)


# ---------------------------------------------------------------- length


@given(st.floats(-0.5, 3.0), st.floats(0.1, 10.0), st.floats(-5.0, 5.0))
@settings(max_examples=80, deadline=None)
def test_parabola_is_found_exactly(minimum: float, curvature: float, level: float) -> None:
    scales = [0.0, 0.5, 1.0, 2.0]
    losses = [level + curvature * (a - minimum) ** 2 for a in scales]
    found = gate.parabola_minimum(scales, losses)
    rise = next((b for a, b in pairwise(scales) if (b - minimum) ** 2 > (a - minimum) ** 2), 2.0)
    assert found == pytest.approx(min(max(minimum, 0.0), rise), abs=1e-6)


@pytest.mark.parametrize(
    ("scales", "losses", "wanted"),
    [
        ([0, 1, 2], [3.0, 2.0, 1.0], 2.0),  # a line: the longest
        ([0, 1, 2], [0.0, 1.0, 1.5], 0.0),  # opens downwards, rises at once: the best measured
        ([0, 1, 2], [0.0, 1.0, -3.0], 1.0),  # falls again behind a rise: not beyond the rise
        ([2, 0, 1], [1.0, 1.0, 0.0], 1.0),  # in any order
        ([0, 1], [2.0, 1.0], 1.0),  # two points: the better
        ([0, 1, 2, 4], [1.0, 0.9, 5.0, 0.0], 2.0),  # clipped where it first rises
    ],
)
def test_parabola_table(scales: Sequence[float], losses: Sequence[float], wanted: float) -> None:
    assert gate.parabola_minimum(scales, losses) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("jump", "span", "rho", "inside"),
    [
        ([1.0], [1.0], 1.0, True),
        ([1.1], [1.0], 1.0, False),
        ([0.0, 5.0], [0.0, 1.0], 4.0, False),
        ([0.0], [0.0], 4.0, True),
        ([1e-9], [0.0], 1e9, False),
        ([math.inf], [1.0], 1e9, False),
        ([math.nan], [1.0], 1e9, False),
    ],
)
def test_trust_radius(jump: list[float], span: list[float], rho: float, inside: bool) -> None:
    assert within_radius(jump, span, rho) is inside


@pytest.mark.parametrize(
    ("measured", "predicted", "ratio", "agree"),
    [
        (1.0, 1.0, 0.5, True), (0.4, 1.0, 0.5, False), (0.5, 1.0, 0.5, True),
        (1e-9, 0.0, 0.5, True),  # a division by the prediction would be infinite
        (1e-30, 1e-300, 1.0, True), (0.0, 0.0, 1.0, True),
        (0.1, -5.0, 1.0, True),  # a predicted rise is no excuse to refuse a measured fall
        (-0.1, 0.0, 0.0, False), (1.0, math.nan, 0.5, False),
    ],
)  # fmt: skip
def test_reductions_are_compared_by_multiplication(
    measured: float, predicted: float, ratio: float, agree: bool
) -> None:
    assert gate.agrees(measured, predicted, ratio) is agree


# ---------------------------------------------------------------- exact losses


class Curve:
    """Losses of candidates along ``a``, and how often they were asked for."""

    def __init__(self, *losses: Callable[[float], float]) -> None:
        self.losses, self.asked = losses, []

    def __call__(self, candidate: int, scale: float, part: str) -> list[float]:
        self.asked.append((candidate, scale, part))
        return [self.losses[candidate](scale)]


def quadratic(minimum: float, depth: float = 1.0) -> Callable[[float], float]:
    return lambda a: 2.0 + depth * ((a / minimum - 1) ** 2 - 1)


@pytest.mark.parametrize(
    ("curves", "max_scale", "candidate", "scale"),
    [
        ([quadratic(1.0)], 8.0, 0, 1.0),
        ([quadratic(2.0)], 8.0, 0, 2.0),
        ([quadratic(4.0)], 8.0, 0, 4.0),
        ([quadratic(100.0)], 8.0, 0, 8.0),
        ([quadratic(100.0)], 1.0, 0, 1.0),
        ([quadratic(100.0)], 3.0, 0, 3.0),
        ([quadratic(1.0, 0.5), quadratic(1.0, 0.9), quadratic(1.0, 0.2)], 1.0, 1, 1.0),
        ([quadratic(0.4), quadratic(1.0)], 1.0, 1, 1.0),  # the first is too long, the second is not
    ],
)
def test_exact_takes_the_best(curves: list, max_scale: float, candidate: int, scale: float) -> None:
    evaluate = Curve(*curves)
    verdict = gate.judge_exact(evaluate, len(curves), max_scale=max_scale)
    assert verdict.accepted
    assert (verdict.candidate, verdict.scale) == (candidate, scale)
    assert verdict.loss_before == 2.0
    assert verdict.loss_after == pytest.approx(curves[candidate](scale))
    assert verdict.gain == pytest.approx(2.0 - curves[candidate](scale)) == pytest.approx(-verdict.upper_bound)
    assert verdict.num_forward == len(evaluate.asked)


def test_exact_stops_at_the_first_worse_candidate() -> None:
    evaluate = Curve(quadratic(1.0, 0.5), quadratic(1.0, 0.2), quadratic(1.0, 0.9))
    verdict = gate.judge_exact(evaluate, 3, max_scale=1.0)
    assert verdict.candidate == 0
    assert all(candidate < 2 for candidate, _, _ in evaluate.asked)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda a: 1.0 + a, Reason.NO_DESCENT),
        (lambda a: 1.0, Reason.NO_DESCENT),  # equal is not better
        (lambda a: NAN if a else 1.0, Reason.NO_DESCENT),
        (lambda a: -INF if a else 1.0, Reason.NO_DESCENT),
        (lambda a: NAN, Reason.LOSS_NOT_FINITE),
        (lambda a: INF, Reason.LOSS_NOT_FINITE),
    ],
    ids=["rises", "flat", "nan", "minus infinity", "all nan", "all inf"],
)
def test_exact_refuses(loss: Callable[[float], float], reason: Reason) -> None:
    verdict = gate.judge_exact(Curve(loss), 1, max_scale=8.0)
    assert not verdict.accepted
    assert verdict.reason is reason
    assert verdict.scale == 0.0


def test_exact_lengthening_stops_at_infinity() -> None:
    verdict = gate.judge_exact(Curve(lambda a: 1.0 - a if a < 3 else NAN), 1, max_scale=1024.0)
    assert verdict.accepted
    assert verdict.scale == 2.0


def test_exact_disagreement() -> None:
    verdict = gate.judge_exact(Curve(quadratic(1.0)), 1, max_scale=1.0, predicted_reduction=10.0, min_ratio=0.5)
    assert verdict.reason is Reason.MODEL_DISAGREES
    assert not verdict.accepted
    assert gate.judge_exact(Curve(quadratic(1.0)), 1, max_scale=1.0, predicted_reduction=1.9, min_ratio=0.5).accepted


# ---------------------------------------------------------------- noisy losses


class NoisyCurve:
    """A quadratic with a known minimum; every sample has its own offset and its own slope along ``a``."""

    def __init__(self, minimum: float, depth: float, noise: float, seed: int, chunks: int = 8) -> None:
        generator = np.random.default_rng(seed)
        self.minimum, self.depth = minimum, depth
        self.offsets = {part: generator.normal(0, 3.0, chunks) for part in ("length", "judge")}
        self.slopes = {part: generator.normal(0, noise, chunks) for part in ("length", "judge")}

    def __call__(self, candidate: int, scale: float, part: str) -> list[float]:
        fall = self.depth * ((scale / self.minimum - 1) ** 2 - 1) if math.isfinite(self.minimum) else 0.0
        return list(10.0 + fall + self.offsets[part] + self.slopes[part] * scale)


def judge(evaluate: gate.Evaluate, **kwargs) -> Verdict:
    values = {"max_scale": 2.0, "level": 0.05, "price": lambda forwards: 0.0, "split": True}
    return gate.judge_noisy(evaluate, **(values | kwargs))


def test_false_acceptance_is_at_the_level() -> None:
    """A jump that does nothing on average: accepted in at most 5 % of all cases, whatever the length search chose."""
    accepted = sum(judge(NoisyCurve(math.inf, 0.0, 1.0, seed)).accepted for seed in range(2000))
    assert accepted / 2000 <= 0.05
    proposed = sum(judge(NoisyCurve(math.inf, 0.0, 1.0, seed)).reason is not Reason.NO_DESCENT for seed in range(2000))
    assert accepted / proposed == pytest.approx(0.05, abs=0.02)


def test_choosing_and_judging_on_the_same_noise_would_be_worse() -> None:
    """Why the batch is split."""

    class Same(NoisyCurve):
        def __call__(self, candidate: int, scale: float, part: str) -> list[float]:
            return super().__call__(candidate, scale, "judge")

    wrong = sum(judge(Same(math.inf, 0.0, 1.0, seed)).accepted for seed in range(1000))
    right = sum(judge(NoisyCurve(math.inf, 0.0, 1.0, seed)).accepted for seed in range(1000))
    assert wrong > 1.5 * right


def test_real_gains_are_found() -> None:
    accepted = [judge(NoisyCurve(1.0, 1.0, 0.3, seed)) for seed in range(200)]
    assert sum(v.accepted for v in accepted) > 190
    assert np.mean([v.scale for v in accepted if v.accepted]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("minimum", [0.4, 0.7, 1.0, 1.5, 2.0])
def test_length_is_found_without_noise(minimum: float) -> None:
    verdict = judge(NoisyCurve(minimum, 1.0, 0.0, 0))
    assert verdict.accepted
    assert verdict.scale == pytest.approx(minimum, rel=1e-6)
    assert verdict.gain == pytest.approx(1.0, rel=1e-6)


def test_length_stays_below_the_predictors_limit() -> None:
    assert judge(NoisyCurve(3.0, 1.0, 0.0, 0), max_scale=1.0).scale <= 1.0


def test_price_is_asked_for_what_was_spent_and_must_be_beaten() -> None:
    spent = []
    verdict = judge(NoisyCurve(1.0, 1.0, 0.0, 0), price=lambda forwards: spent.append(forwards) or 0.5)
    assert verdict.accepted
    assert verdict.price == 0.5
    assert spent == [verdict.num_forward]
    dear = judge(NoisyCurve(1.0, 1.0, 0.0, 0), price=lambda forwards: 1.5)
    assert (dear.accepted, dear.reason) == (False, Reason.NOT_SIGNIFICANT)


def test_exactly_the_price_is_not_more_than_the_price() -> None:
    class Half(NoisyCurve):
        def __call__(self, candidate: int, scale: float, part: str) -> list[float]:
            return [1.0 - 0.5 * scale] * 4 if part == "length" else [1.0] * 4

    assert judge(Half(1.0, 1.0, 0.0, 0)).reason is Reason.NOT_SIGNIFICANT


@given(st.floats(0, 3), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_dearer_jump_is_not_easier(price: float, more: float) -> None:
    cheap = judge(NoisyCurve(1.0, 1.0, 0.2, 1), price=lambda forwards: price)
    dear = judge(NoisyCurve(1.0, 1.0, 0.2, 1), price=lambda forwards: price + more)
    assert cheap.accepted or not dear.accepted


@given(st.floats(0.1, 5), st.floats(0, 5), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_monotone_in_the_loss_after(depth: float, deeper: float, seed: int) -> None:
    """A jump that lowers every loss more is not refused where the smaller one was accepted."""
    small, large = judge(NoisyCurve(1.0, depth, 0.1, seed)), judge(NoisyCurve(1.0, depth + deeper, 0.1, seed))
    assert large.accepted or not small.accepted


def test_noisy_counts_forwards() -> None:
    asked = []

    def evaluate(candidate: int, scale: float, part: str) -> list[float]:
        asked.append(part)
        return NoisyCurve(1.0, 1.0, 0.0, 0)(candidate, scale, part)

    verdict = judge(evaluate)
    assert verdict.num_forward == pytest.approx(0.5 * len(asked))
    whole = judge(NoisyCurve(1.0, 1.0, 0.0, 0), split=False)
    assert whole.num_forward == 2 * verdict.num_forward


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda a, part: 1.0 + a, Reason.NO_DESCENT),
        (lambda a, part: 1.0, Reason.NO_DESCENT),
        (lambda a, part: NAN if a else 1.0, Reason.NO_DESCENT),
        (lambda a, part: NAN, Reason.LOSS_NOT_FINITE),
        (lambda a, part: NAN if part == "judge" and a else 1.0 - a, Reason.LOSS_NOT_FINITE),
        (lambda a, part: NAN if part == "judge" else 1.0 - a, Reason.LOSS_NOT_FINITE),
        (lambda a, part: 1.0 + a if part == "judge" else 1.0 - a, Reason.NOT_SIGNIFICANT),
    ],
    ids=["rises", "flat", "nan", "all nan", "nan after", "nan before", "only on the first half"],
)
def test_noisy_refuses(loss: Callable[[float, str], float], reason: Reason) -> None:
    verdict = judge(lambda candidate, scale, part: [loss(scale, part)] * 4)
    assert not verdict.accepted
    assert verdict.reason is reason
    assert math.isfinite(verdict.gain)


def test_noisy_disagreement() -> None:
    verdict = judge(NoisyCurve(1.0, 1.0, 0.0, 0), predicted_reduction=100.0, min_ratio=0.1)
    assert verdict.reason is Reason.MODEL_DISAGREES


def test_gate_has_no_side_effects() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    judge(NoisyCurve(1.0, 1.0, 0.2, 0))
    gate.judge_exact(Curve(quadratic(1.0)), 1, max_scale=2.0)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- confidence


def test_confidence_starts_at_a_half() -> None:
    assert TrackRecord().confidence == 0.5


def test_confidence_known_values() -> None:
    record = TrackRecord(forgetting=0.5)
    for kept in (True, True, False):
        record.record(kept)
    assert (record.successes, record.failures) == (0.75, 1.0)
    assert record.confidence == pytest.approx(1.75 / 3.75)


@given(st.lists(st.booleans(), max_size=200))
@settings(max_examples=50, deadline=None)
def test_confidence_is_a_probability(outcomes: list[bool]) -> None:
    record = TrackRecord()
    for kept in outcomes:
        before = record.confidence
        record.record(kept)
        assert 0 < record.confidence < 1
        assert (record.confidence > before) is kept or record.confidence == pytest.approx(before, abs=1e-3)
    assert record.num_outcomes == len(outcomes)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_confidence_is_calibrated(share: float) -> None:
    generator = np.random.default_rng(0)
    record, seen = TrackRecord(), []
    for _ in range(3000):
        record.record(bool(generator.random() < share))
        seen.append(record.confidence)
    assert np.mean(seen[100:]) == pytest.approx(share, abs=0.07)
