"""Tests and intervals against scipy, and by hand."""

import numpy as np
import pytest
from scipy import stats

from retrieval_kd.evaluate import significance
from retrieval_kd.evaluate.significance import (
    against_baseline,
    bootstrap_interval,
    detectable,
    holm,
    paired_t,
    paired_test,
    pairwise,
)
from retrieval_kd.types import InputError


def pair(seed: int, count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    a = generator.random(count)
    return np.clip(a + generator.normal(shift, 0.2, count), 0, 1), a


@pytest.mark.parametrize(("seed", "shift"), [(0, 0.0), (1, 0.05), (2, -0.1), (3, 0.1)])
def test_paired_test_agrees_with_every_flip(seed: int, shift: float) -> None:
    a, b = pair(seed, 11, shift)
    exact = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    ).pvalue
    error = 4 * np.sqrt(exact * (1 - exact) / 40_000) + 1e-4
    assert paired_test(a, b, rounds=40_000) == pytest.approx(exact, abs=error)


def test_paired_test_counts_equal_sums_as_extreme() -> None:
    # 0.1 + 0.2 against 0.2 + 0.1: of the 8 flips 2 are as extreme (exactly 1/4), though rounding differs
    a = np.array([0.1, 0.2, 0.3])
    assert paired_test(a, np.zeros(3), rounds=40_000) == pytest.approx(0.25, abs=0.01)
    assert paired_test(np.full(10, 0.1), np.zeros(10), 1000) < 0.02


def test_paired_test_is_never_zero_and_one_when_equal() -> None:
    a = np.linspace(0.5, 1, 200)
    assert paired_test(a, a - 0.4, rounds=999) == 1 / 1000
    assert paired_test(a, a, rounds=99) == 1.0


def test_paired_test_is_symmetric_reproducible_and_blind_to_unchanged_queries() -> None:
    a, b = pair(4, 60, 0.03)
    p = paired_test(a, b, 2000)
    assert p == paired_test(a, b, 2000) == paired_test(b, a, 2000)
    assert p == paired_test(np.append(a, [0.5] * 9), np.append(b, [0.5] * 9), 2000)
    assert p != paired_test(a, b, 2000, seed=1)


def test_portions_cover_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(significance, "CELLS", 600)
    a, b = pair(5, 50, 0.5)
    assert paired_test(a, b, rounds=1001) == 1 / 1002  # 12 rounds a portion, 1001 = 83 x 12 + 5
    assert list(significance._portions(1001, 50)) == [12] * 83 + [5]


def test_paired_t_is_scipys() -> None:
    a, b = pair(6, 40, 0.05)
    assert paired_t(a, b) == stats.ttest_rel(a, b).pvalue
    assert paired_t(a, a) == 1.0
    assert paired_t(a[:1], b[:1]) == 1.0  # scipy: NaN, which has no place in Holm's order nor in JSON
    (one,) = pairwise({"a": a[:1], "b": b[:1]}, 100)
    assert (one.p, one.adjusted_p, one.adjusted_t_p, one.detectable) == (1.0, 1.0, 1.0, None)


def test_holm_by_hand() -> None:
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and never falling: .02 .03 .06 .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_against_baseline() -> None:
    base = np.array([0.0, 0.5, 0.5, 1.0] * 10)
    better = np.array([0.5, 0.5, 1.0, 0.5] * 10)
    compared = against_baseline(base, {"better": better, "same": base.copy()}, rounds=500)
    assert list(compared) == ["better", "same"]
    one = compared["better"]
    assert (one.difference, one.wins, one.ties, one.losses) == (0.125, 20, 10, 10)
    assert one.p == paired_test(better, base, 500)
    assert one.adjusted_p == pytest.approx(2 * one.p)
    assert (compared["same"].p, compared["same"].adjusted_p, compared["same"].ties) == (1.0, 1.0, 40)


def test_every_pair_is_tested_and_corrected() -> None:
    systems = {name: pair(10, 50, shift)[0] for name, shift in (("a", 0.1), ("b", 0.02), ("c", 0.0))}
    pairs = pairwise(systems, rounds=500)
    assert [(one.first, one.second) for one in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    p_values = [paired_test(systems[one.first], systems[one.second], 500) for one in pairs]
    assert [one.p for one in pairs] == p_values
    assert [one.adjusted_p for one in pairs] == holm(p_values)
    t_values = [stats.ttest_rel(systems[one.first], systems[one.second]).pvalue for one in pairs]
    assert [one.adjusted_t_p for one in pairs] == pytest.approx(holm(t_values))
    for one in pairs:
        differences = systems[one.first] - systems[one.second]
        assert one.difference == differences.mean()
        assert one.interval == bootstrap_interval(differences, 500)
        assert (one.wins, one.losses) == ((differences > 1e-12).sum(), (differences < -1e-12).sum())
        assert one.detectable == detectable(differences, 0.05 / 3)


@pytest.mark.parametrize(("effect", "count"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_detectable_agrees_with_published_tables(effect: float, count: int) -> None:
    """Pairs that a two-sided paired t-test at 0.05 needs for 80 % power, as G*Power gives them: 199, 34 and 15."""
    for number, enough in ((count, True), (count - 1, False)):
        values = np.random.default_rng(0).normal(size=number)
        assert (detectable(values) / values.std(ddof=1) <= effect) == enough


def test_detectable_differences_are_found_four_times_in_five() -> None:
    generator, count, deviation = np.random.default_rng(1), 12, 0.3
    spread = generator.normal(size=count)
    least = detectable(spread / spread.std(ddof=1) * deviation, level=0.01)
    samples = generator.normal(least, deviation, (20_000, count))
    assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.01).mean() == pytest.approx(0.8, abs=0.01)


def test_nothing_is_known_of_a_spread_of_none() -> None:
    assert detectable(np.zeros(5)) is None
    assert detectable(np.full(5, 0.1)) is None
    assert detectable(np.array([0.3])) is None


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_of_many_queries_the_normal_distribution_says_what_is_detectable(count: int) -> None:
    expected = (stats.norm.ppf(1 - 0.05 / 90) + stats.norm.ppf(0.8)) / np.sqrt(count)
    values = np.random.default_rng(2).normal(size=count)
    assert detectable(values, 0.05 / 45) == pytest.approx(expected * values.std(ddof=1), rel=1e-3)


def test_bootstrap_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(7).beta(0.5, 0.5, 120)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=8).confidence_interval
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(expected.low, abs=0.003)
    assert high == pytest.approx(expected.high, abs=0.003)
    assert low < values.mean() < high
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert (low, high) == bootstrap_interval(values)


def test_bootstrap_interval_covers_the_mean() -> None:
    generator = np.random.default_rng(9)
    held = sum(low < 0.5 < high for low, high in (bootstrap_interval(generator.random(80), 500) for _ in range(300)))
    assert 0.90 < held / 300 < 0.99


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros(3), np.zeros(4), "shapes|these are"),
        (np.zeros(0), np.zeros(0), "these are"),
        (np.array([np.nan]), np.zeros(1), "NaN"),
    ],
)
def test_unpaired_values_are_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        paired_test(a, b)
    with pytest.raises(InputError, match=message):
        paired_t(a, b)


def test_no_values_have_no_interval() -> None:
    with pytest.raises(InputError, match="at least one query"):
        bootstrap_interval(np.zeros(0))
