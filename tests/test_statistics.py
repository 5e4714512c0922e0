"""Intervals over seeds: coverage, bounds, and values that have no interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid_predict_trainer.experiments import statistics
from hybrid_predict_trainer.experiments.statistics import (
    Bound,
    always_valid,
    bca_interval,
    bonferroni,
    bootstrap_t,
    bounded_interval,
    equivalent,
    holm,
    log_interval,
    paired_interval,
    paired_tests,
    t_interval,
    t_quantile,
)

NUM_TRIALS = 2000


@pytest.mark.parametrize("level", [0.2, 0.05, 0.025, 0.005])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 19, 100])
def test_quantiles_are_those_of_scipy(level: float, freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(level, freedom) == pytest.approx(stats.t.isf(level, freedom), rel=1e-9)


def paired_samples(n: int, seed: int = 0) -> np.ndarray:
    """[trials, 2, n]: log-normal losses of two arms; the second is 0.9 of the first in the geometric mean."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(NUM_TRIALS, 1, n))
    own = rng.normal(size=(NUM_TRIALS, 2, n)) * 0.05
    return np.exp(shared + own) * np.array([1.0, 0.9])[None, :, None]


@pytest.fixture
def _without_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of intervals in a second."""
    monkeypatch.setattr(statistics, "MIN_BOOTSTRAP", 1000)


@pytest.mark.usefixtures("_without_bootstrap")
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_the_t_interval_holds_95_percent(n: int) -> None:
    found = [paired_interval(ours, plain) for plain, ours in paired_samples(n)]
    held = np.mean([i.low <= 0.9 <= i.high for i in found])
    assert 0.935 <= held <= 0.965
    assert all(i.low < i.mean < i.high for i in found)


@pytest.mark.parametrize(("n", "low", "high"), [(3, 0.70, 0.79), (5, 0.80, 0.87)])
def test_the_percentile_bootstrap_that_stood_here_does_not(n: int, low: float, high: float) -> None:
    picks = np.random.default_rng(0).integers(n, size=(1000, n))
    logs = [np.log(ours / plain) for plain, ours in paired_samples(n)]
    ends = [np.quantile(v[picks].mean(axis=1), (0.025, 0.975)) for v in logs]
    assert low < np.mean([a <= math.log(0.9) <= b for a, b in ends]) < high


@pytest.mark.parametrize("n", [4, 5])
def test_the_bootstrap_t_holds_its_level(n: int) -> None:
    rng = np.random.default_rng(1)
    ends = [bootstrap_t(rng.normal(size=n)) for _ in range(600)]
    assert 0.92 < np.mean([e is not None and e[0] <= 0 <= e[1] for e in ends]) < 0.975


def test_the_bootstrap_t_is_repeatable_and_stands_beside() -> None:
    values = [0.8, 1.0, 1.1, 1.3, 0.9, 1.05, 1.15]
    found = t_interval(values)
    assert found.bootstrap_t == bootstrap_t(values) == bootstrap_t(list(values))
    assert found.bootstrap_t is not None
    assert found.bootstrap_t[0] < found.mean < found.bootstrap_t[1]
    assert bootstrap_t(values, seed=1) != found.bootstrap_t
    assert t_interval(values[:3]).bootstrap_t is None


def test_the_bootstrap_t_reaches_further_on_the_side_of_the_tail() -> None:
    """The quantiles of the statistic change sides: on symmetric values nobody would see it if they did not."""
    low, high = bootstrap_t([1.0, 1.1, 1.2, 1.4, 3.0], 0.9)
    mean = np.mean([1.0, 1.1, 1.2, 1.4, 3.0])
    assert high - mean > 1.5 * (mean - low) > 0
    mirrored = bootstrap_t([-1.0, -1.1, -1.2, -1.4, -3.0], 0.9)
    assert mirrored == pytest.approx((-high, -low))


def test_a_known_interval() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n, found.note) == (2.0, 3, "")
    assert found.ends == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    one_sided = t_interval([1.0, 2.0, 3.0], 0.90)
    assert one_sided.high == pytest.approx(2 + 2.919986 / math.sqrt(3))


def test_pairing_takes_out_what_seeds_share() -> None:
    plain = [1.0, 10.0, 100.0]
    found = paired_interval([0.9, 9.1, 89.0], plain)
    assert found.ends is not None
    assert 0.85 < found.ends[0] < 0.9 < found.ends[1] < 0.95
    assert paired_interval(plain, [0.9, 9.1, 89.0]).mean == pytest.approx(1 / found.mean)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_interval([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("values", "note"),
    [([], "no value"), ([1.0], "one seed"), ([1.0, math.nan], "not finite"), ([1.0, math.inf], "not finite")],
)
def test_without_an_interval_the_note_says_why(values: list[float], note: str) -> None:
    for found in (t_interval(values), log_interval(values), paired_interval(values, values)):
        assert found.ends is None
        assert note in found.note


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, -1.0]])
def test_logarithms_need_positive_values(values: list[float]) -> None:
    assert "not finite and above 0" in log_interval(values).note
    assert paired_interval([1.0, 1.0], values).ends is None


def test_equal_values_have_an_interval_of_no_width_and_say_so() -> None:
    found = t_interval([0.1, 0.1, 0.1])
    assert found.ends == (0.1, 0.1)
    assert "do not differ" in found.note


@pytest.mark.parametrize(
    ("values", "bounds", "low_known", "high_known"),
    [
        ([16.0, 16.0, 16.0], ["at least"] * 3, False, False),
        ([0.5, 0.5], ["at most"] * 2, False, False),
        ([3.98, 3.99, 4.0], ["at least"] * 3, False, False),
        ([7.0, 16.0, 16.0], ["exact", "at least", "at least"], True, False),
        ([0.5, 0.9, 0.8], ["at most", "exact", "exact"], False, True),
        ([0.5, 16.0, 2.0], ["at most", "at least", "exact"], False, False),
        ([1.0, 2.0, 3.0], ["exact"] * 3, True, True),
    ],
)
def test_a_bounded_seed_opens_the_interval(
    values: list[float], bounds: list[Bound], low_known: bool, high_known: bool
) -> None:
    found = bounded_interval(values, bounds)
    assert (found.low is not None, found.high is not None) == (low_known, high_known)
    assert found.mean == pytest.approx(math.exp(np.log(values).mean()))
    assert bool(found.note) == (set(bounds) != {"exact"})


@pytest.mark.usefixtures("_without_bootstrap")
def test_the_lower_end_of_cut_off_seeds_is_one() -> None:
    rng = np.random.default_rng(2)
    true = np.exp(rng.normal(1.0, 0.3, size=(NUM_TRIALS, 5)))
    bound = math.e
    held = []
    for seeds in true:
        found = bounded_interval(np.minimum(seeds, bound), ["at least" if v > bound else "exact" for v in seeds])
        held.append(found.low is None or found.low <= math.e)
    assert np.mean(held) > 0.97


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(), max_size=7), st.sampled_from([0.5, 0.95, 0.99]))
@example([0.0, 9e307, 9e307, -1.7976931348623157e308], 0.5)
def test_no_values_make_it_raise(values: list[float], level: float) -> None:
    for found in (t_interval(values, level), log_interval(values, level), paired_interval(values, values[::-1], level)):
        assert found.n == len(values)
        if found.low is not None and found.high is not None:
            assert found.low <= found.high


def test_a_level_that_is_none() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_interval([1.0, 2.0], 95)


# ---------------------------------------------------------------- tests over seeds


def pairs_of(n: int, ratio: float, seed: int, spread: float = 0.01) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(size=n))
    return list(zip(base, base * ratio * np.exp(spread * rng.normal(size=n)), strict=True))


def test_identical_arms_are_rejected_one_time_in_twenty() -> None:
    found = np.array([
        [t.t, t.wilcoxon, t.permutation] for t in (paired_tests(pairs_of(8, 1.0, seed)) for seed in range(400))
    ])  # fmt: skip
    rejected = (found < 0.05).mean(axis=0)
    assert ((rejected > 0.02) & (rejected < 0.085)).all(), rejected


@pytest.mark.parametrize("n", [3, 4, 6])
def test_few_pairs_have_a_least_p(n: int) -> None:
    found = paired_tests(pairs_of(n, 0.5, 0))
    assert found.least == 2 / 2**n
    assert found.permutation == pytest.approx(found.least)
    assert found.wilcoxon == pytest.approx(found.least)
    assert found.t is not None
    assert found.t < found.least


def test_two_pairs_have_no_test_and_equal_ones_no_difference() -> None:
    assert paired_tests([(1.0, 2.0), (1.0, 3.0)]).permutation is None
    same = paired_tests([(1.0, 1.0)] * 4)
    assert (same.t, same.wilcoxon, same.permutation) == (1.0, 1.0, 1.0)
    assert paired_tests([(1.0, math.nan)] * 3).wilcoxon is None


def test_five_percent_are_not_equal_at_a_margin_of_two() -> None:
    assert not equivalent(pairs_of(5, 1.05, 0, 0.001), 0.02).equal
    assert not equivalent(pairs_of(5, 0.95, 0, 0.001), 0.02).equal
    near = equivalent(pairs_of(5, 1.005, 0, 0.001), 0.02)
    assert near.equal
    assert 1 / 1.02 < near.interval.low < near.interval.high < 1.02


def test_not_significant_is_not_equal() -> None:
    pairs = pairs_of(3, 1.0, 1, spread=0.05)
    assert paired_tests(pairs).t > 0.05
    found = equivalent(pairs, 0.02)
    assert not found.equal
    assert found.p > 0.05


def test_equivalence_is_claimed_wrongly_one_time_in_twenty() -> None:
    found = np.mean([equivalent(pairs_of(5, 1.02, seed, 0.005), 0.02).equal for seed in range(1000)])
    assert 0.03 < found < 0.07


def test_a_margin_and_a_seed_that_are_none() -> None:
    with pytest.raises(ValueError, match="margin"):
        equivalent([(1.0, 1.0)], 0.0)
    assert equivalent([(1.0, 1.0)], 0.02).p is None
    assert equivalent([(2.0, 2.0)] * 3, 0.02).equal
    assert not equivalent([(2.0, 2.2)] * 3, 0.02).equal


def test_many_tests_are_adjusted() -> None:
    assert bonferroni([0.01, 0.04, 0.5]) == pytest.approx([0.03, 0.12, 1.0])
    assert holm([0.04, 0.01, 0.5]) == pytest.approx([0.08, 0.03, 0.5])
    assert holm([0.03, 0.04]) == pytest.approx([0.06, 0.06])
    rng = np.random.default_rng(0)
    wrong = np.mean([min(holm(rng.uniform(size=10))) < 0.05 for _ in range(2000)])
    assert 0.03 < wrong < 0.065


def test_the_accelerated_bootstrap_holds_less_than_it_says_of_few_seeds() -> None:
    rng = np.random.default_rng(0)
    found = [bca_interval(rng.normal(size=10)) for _ in range(60)]
    assert 0.8 <= np.mean([low < 0 < high for low, high in found]) <= 1.0
    skewed = [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 3.0]
    drawn = np.random.default_rng(1).choice(skewed, size=(20_000, len(skewed))).mean(axis=1)
    low, high = bca_interval(skewed)
    assert low > np.quantile(drawn, 0.025) + 0.005  # both ends go to the side of the tail
    assert high > np.quantile(drawn, 0.975) + 0.05
    assert bca_interval([1.0] * 6) is None
    assert bca_interval([1.0, 2.0, 3.0, 4.0]) is None


def test_looking_often_does_not_break_the_always_valid_interval() -> None:
    rng = np.random.default_rng(0)
    broken = always = 0
    for _ in range(300):
        values = rng.normal(size=30)
        looks = range(4, 31, 2)
        always += any((e := always_valid(values[:n])) is not None and not e[0] < 0 < e[1] for n in looks)
        broken += any(
            abs(values[:n].mean()) > t_quantile(0.025, n - 1) * values[:n].std(ddof=1) / n**0.5 for n in looks
        )
    assert always <= 0.06 * 300
    assert broken > 0.1 * 300
