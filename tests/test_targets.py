"""Targets by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax as scipy_softmax
from scipy.stats import rankdata
from scipy.stats import zscore as scipy_zscore

from retrieval_kd.targets import fuse, log_odds, minmax, rank, softmax, zscore
from retrieval_kd.types import InputError

NAN, INF = np.nan, np.inf
TWO = np.array([[[2, 1, 0, -1]], [[3, 2.5, -1, 0]]], np.float32)  # (T=2, Q=1, K=4)


def test_fused_minmax_golden() -> None:
    """Section 31 of the specification: the mean of two teachers' lists, times 30."""
    got = fuse(TWO, "minmax", scale=30.0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[29.999991, 23.124993, 4.999998, 3.749999]], rtol=3e-7)


def test_minmax_by_hand() -> None:
    got = minmax(
        np.array([[2.0, NAN, 4.0, -INF, 3.0], [7.0, 7.0, 7.0, NAN, 7.0], [NAN, -INF, NAN, NAN, NAN]], np.float32)
    )
    expected = [[0, NAN, 1, NAN, 0.5], [0, 0, 0, NAN, 0], [NAN] * 5]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32


def test_zscore_agrees_with_scipy() -> None:
    scores = np.random.default_rng(0).normal(5, 3, (2, 4, 9)).astype(np.float32)
    scores[0, 1, 3] = -INF
    scores[1, 2, :4] = NAN
    finite = np.where(np.isfinite(scores), scores, NAN)
    got = zscore(scores)
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, scipy_zscore(finite.astype(np.float64), axis=-1, nan_policy="omit"), rtol=1e-4, atol=1e-6
    )
    assert (np.isnan(got) == ~np.isfinite(scores)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -3e4 / 7])
@pytest.mark.parametrize("normalize", [zscore, minmax])
def test_a_constant_list_says_nothing(normalize: object, value: float) -> None:
    """Not 0.98 for each, as the rounded mean of a list in float32 would have it."""
    for length in (1, 7, 50):
        got = normalize(np.full((1, length), value, np.float32))  # type: ignore[operator]
        np.testing.assert_allclose(got, 0.0, atol=1e-6)


def test_shares_are_divided_by_their_sum() -> None:
    np.testing.assert_allclose(fuse(TWO, shares=(1.0, 3.0)), (TWO[0] + 3 * TWO[1]) / 4, rtol=1e-6)
    np.testing.assert_allclose(fuse(TWO, shares=(0.25, 0.75)), fuse(TWO, shares=(1.0, 3.0)), rtol=1e-6)
    np.testing.assert_allclose(fuse(TWO), TWO.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(fuse(TWO[:1]), TWO[0])


def test_a_place_that_one_teacher_leaves_open_is_open() -> None:
    scores = TWO.copy()
    scores[0, 0, 1], scores[1, 0, 2] = NAN, -INF
    before = scores.copy()
    for normalize in ("none", "minmax", "zscore"):
        assert np.isnan(fuse(scores, normalize)).tolist() == [[False, True, True, False]]
    np.testing.assert_array_equal(scores, before)  # arguments are not modified


def test_each_teacher_is_normalised_over_its_own_places() -> None:
    scores = TWO.copy()
    scores[0, 0, 0] = NAN  # the first teacher's highest
    np.testing.assert_allclose(fuse(scores, "minmax")[0, 1], (1 + 3.5 / 4) / 2, rtol=1e-5)


def test_rank_agrees_with_scipy() -> None:
    scores = np.random.default_rng(2).integers(0, 5, (3, 6, 9)).astype(np.float32)
    scores[0, 1, 3], scores[1, 2, :4], scores[2, 5] = -INF, NAN, NAN
    expected = rankdata(np.where(np.isfinite(scores), -scores, NAN), axis=-1, nan_policy="omit")
    got = rank(scores)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32


def test_normalised_by_rank_and_by_log_odds() -> None:
    ranked = np.array([[1, 1 / 2, 1 / 3, 1 / 4], [1, 1 / 2, 1 / 4, 1 / 3]])
    np.testing.assert_allclose(fuse(TWO, "rank")[0], ranked.mean(0), rtol=1e-6)
    chances = np.array([[[0.5, 0.9]], [[0.2, 0.5]]], np.float32)
    np.testing.assert_allclose(fuse(chances, "log_odds")[0], [np.log(1 / 4) / 2, np.log(9) / 2], rtol=1e-5)
    with pytest.raises(InputError, match="log_odds takes probabilities, from 0 to 1; it was given 2"):
        fuse(TWO, "log_odds")


def test_each_teacher_may_be_normalised_in_its_own_way() -> None:
    got = fuse(np.stack([TWO[0], np.float32([[0.5, 0.9, 0.2, 0.5]])]), ("zscore", "log_odds"))
    np.testing.assert_allclose(got, (zscore(TWO[0]) + log_odds(np.float32([[0.5, 0.9, 0.2, 0.5]]))) / 2, rtol=1e-5)
    with pytest.raises(ValueError, match="zip"):
        fuse(TWO, ("zscore",))


def test_a_query_may_choose_its_teachers() -> None:
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(3, 5, 4)).astype(np.float32)
    scores[1, :, 2] = NAN  # what a teacher that is not chosen leaves open does not count
    select = np.array([[1, 0, 1, 0, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]], bool)
    before = select.copy()
    got = fuse(scores, shares=(1.0, 2.0, 3.0), scale=2.0, select=select)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], 2 * (scores[0, 0] + 2 * scores[1, 0] + 3 * scores[2, 0]) / 6, rtol=1e-5)
    np.testing.assert_allclose(got[1], 2 * scores[1, 1], rtol=1e-5)
    np.testing.assert_allclose(got[2], 2 * (scores[0, 2] + 3 * scores[2, 2]) / 4, rtol=1e-5)
    np.testing.assert_allclose(got[3], 2 * scores[2, 3], rtol=1e-5)
    np.testing.assert_allclose(got[4], 2 * scores[0, 4], rtol=1e-5)
    np.testing.assert_array_equal(select, before)
    everyone = fuse(scores, "zscore", shares=(1.0, 2.0, 3.0), select=np.ones((3, 5), bool))
    np.testing.assert_allclose(everyone, fuse(scores, "zscore", shares=(1.0, 2.0, 3.0)), rtol=1e-5, atol=1e-6)


def test_a_query_that_chooses_none_has_no_target() -> None:
    got = fuse(np.concatenate([TWO, TWO], 1), select=np.array([[False, True], [False, False]]))
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1], TWO[0, 0])


def test_softmax_of_what_is_scored() -> None:
    lists = np.array([[1.0, np.nan, 3.0], [-np.inf, np.nan, -np.inf], [700.0, 0.0, -700.0]])
    found = softmax(lists)
    np.testing.assert_allclose(found[0, [0, 2]], scipy_softmax([1.0, 3.0]), rtol=1e-12)
    assert found[0, 1] == 0
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(found[2], scipy_softmax(lists[2]), rtol=1e-9)
