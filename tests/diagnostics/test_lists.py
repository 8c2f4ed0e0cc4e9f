"""Statistics of lists against scipy, list by list, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy, kendalltau, mannwhitneyu, rankdata

from retrieval_kd.diagnostics.lists import (
    auc,
    kendall_tau,
    margins,
    mean_margin,
    midranks,
    pairs_in,
    perplexity,
    quantiles,
    temperature_for,
    tied_pairs,
    top_overlap,
)

A = np.array([3.0, 1.0, 2.0, 2.0, 5.0, 7.0, 7.0, 7.0])
B = np.array([9.0, 8.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0])
STARTS = np.array([0, 4, 5, 8])  # 3 1 2 2 | 5 | 7 7 7


def cut(values: NDArray[np.floating], starts: NDArray[np.int64]) -> list[NDArray[np.floating]]:
    return np.split(values, starts[1:-1])


@st.composite
def two_values(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Lists with many ties, some of one document, and two values of each document."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    grades = st.lists(st.integers(-3, 4), min_size=int(starts[-1]), max_size=int(starts[-1]))
    return starts, *(np.array(draw(grades), np.float32) / 3 for _ in range(2))


@given(two_values())
@settings(max_examples=150, deadline=None)
def test_each_list_is_as_scipy_has_it(
    given_: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]],
) -> None:
    starts, left, right = given_
    positive = right > 0.4
    lists = list(zip(*(cut(values, starts) for values in (left, right, positive)), strict=True))
    tau = [kendalltau(one, two).statistic if len(one) > 1 else np.nan for one, two, _ in lists]
    np.testing.assert_allclose(kendall_tau(starts, left, right), tau, atol=1e-12)
    chances = [
        mannwhitneyu(one[mark], one[~mark]).statistic / (mark.sum() * (~mark).sum())
        if 0 < mark.sum() < len(mark)
        else np.nan
        for one, _, mark in lists
    ]
    np.testing.assert_allclose(auc(starts, left, positive), chances, atol=1e-12)
    np.testing.assert_array_equal(midranks(starts, left), np.concatenate([rankdata(one) for one, _, _ in lists]))
    for temperature in (1.0, 0.2):
        counts = [np.exp(entropy(softmax(one.astype(float) / temperature))) for one, _, _ in lists]
        np.testing.assert_allclose(perplexity(starts, left, temperature), counts, rtol=1e-9)


def test_long_lists_are_as_scipy_has_them() -> None:
    rng = np.random.default_rng(0)
    starts = np.array([0, 1500, 1501, 4000])
    left, noise = rng.normal(size=4000), rng.normal(size=4000)
    right = np.round(left + noise, 1)
    expected = [
        kendalltau(one, two).statistic if len(one) > 1 else np.nan
        for one, two in zip(cut(left, starts), cut(right, starts), strict=True)
    ]
    np.testing.assert_allclose(kendall_tau(starts, left, right), expected, atol=1e-12)


def test_by_hand() -> None:
    assert pairs_in(STARTS).tolist() == [6, 0, 3]
    assert tied_pairs(STARTS, A).tolist() == [1, 0, 3]
    assert tied_pairs(STARTS, A, B).tolist() == [1, 0, 0]
    assert midranks(STARTS, A).tolist() == [4, 1, 2.5, 2.5, 1, 2, 2, 2]
    positive = np.array([False, False, True, False, True, True, False, False])
    # 2 against 3, 1, 2: lost, won, tied; a list of one has no other; three alike are a draw
    np.testing.assert_array_equal(auc(STARTS, A, positive), [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(mean_margin(STARTS, A, positive), [0, np.nan, 0])
    np.testing.assert_array_equal(mean_margin(STARTS, B, positive), [1 - 6, np.nan, 1 - 2.5])
    # pairs of A and B that agree: 3-1, 3-2, 3-2; that differ: 1-2, 1-2; tied in both: 2-2
    np.testing.assert_allclose(kendall_tau(STARTS, A, B), [1 / 5, np.nan, np.nan])
    np.testing.assert_array_equal(top_overlap(STARTS, A, B, 1), [1, np.nan, 0])  # of equal ones the first
    np.testing.assert_array_equal(top_overlap(STARTS, A, B, 2), [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(top_overlap(STARTS, A, B, 3), [2 / 3, np.nan, np.nan])
    np.testing.assert_allclose(perplexity(STARTS, A)[1:], [1, 3])


def test_margins_go_by_the_positive_or_else_the_best() -> None:
    positive = np.array([False, True, True, False, False, False, False, False])
    # the best positive of the first list is 2: -1 to the 3 above it, 0 to the other 2; then 7 to 7 and 7
    assert margins(STARTS, A, positive).tolist() == [-1, 0, 0, 0]
    assert margins(STARTS, A, np.zeros(8, bool)).tolist() == [2, 1, 1, 0, 0]


def test_the_temperature_makes_the_effective_number_asked_for() -> None:
    rng = np.random.default_rng(1)
    starts = np.array([0, 50, 51, 101])
    for scale in (0.02, 1.0, 400.0):
        values = scale * rng.normal(size=101)
        temperature = temperature_for(starts, values, 0.25)
        assert temperature is not None
        counts = [np.exp(entropy(softmax(one / temperature))) for one in cut(values, starts) if len(one) > 1]
        assert np.mean(counts) == pytest.approx(50 / 4, rel=1e-4)
    two = np.array([0.0, 1.0])
    assert temperature_for(np.array([0, 2]), two, 0.4) is None  # of two documents one at least is at work, a half
    assert temperature_for(np.array([0, 3]), np.ones(3), 0.5) is None
    assert temperature_for(np.array([0, 1]), two[:1], 0.5) is None
    assert temperature_for(np.array([0, 4]), np.array([1.0, 1.0, 1.0, 0.0]), 0.25) is None  # three are tied at the top


def test_quantiles_of_a_histogram() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(size=1001), [40.0]])
    low, high, bins = values.min(), values.max(), 4096
    counts = np.histogram(values, bins, (low, high))[0]
    shares = np.array([0.0, 0.05, 0.5, 0.95, 1.0])
    below = np.quantile(values, shares, method="lower") - quantiles(counts, low, high, shares)
    assert below.min() > -1e-9
    assert below.max() < (high - low) / bins * (1 + 1e-9)
    thirds = np.array([7, 0, 2, 0, 1])  # of 0 to 4: seven 0, two 2, one 4
    assert quantiles(thirds, 0, 5, np.array([0.5, 0.7, 0.9, 1.0])).tolist() == [0, 0, 2, 4]
