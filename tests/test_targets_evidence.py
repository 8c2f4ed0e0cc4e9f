"""Targets of what is no score: probabilities, ranks, preferences between two; softening and interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, logit, softmax
from scipy.stats import entropy

from retrieval_kd.targets import (
    bradley_terry,
    interpolate,
    log_odds,
    rank_to_score,
    soften_power,
    soften_top,
    soften_uniform,
)
from retrieval_kd.types import InputError

NAN = np.nan
P = softmax(np.array([3.0, 2.5, -1.0, 0.0]))
quick = settings(max_examples=60, deadline=None, derandomize=True)


def test_log_odds_agrees_with_scipy() -> None:
    chances = np.array([0.0, 1e-3, 0.5, 0.8, 1.0, NAN, np.inf])
    got = log_odds(chances)
    np.testing.assert_allclose(got[1:4], logit(chances[1:4]))
    np.testing.assert_allclose(got[[0, 4]], [logit(1e-6), -logit(1e-6)], rtol=1e-9)
    assert np.isnan(got[5:]).all()
    np.testing.assert_allclose(log_odds(expit(np.linspace(-9, 9, 7))), np.linspace(-9, 9, 7))
    assert log_odds(np.float32([0.2])).dtype == np.float32
    for wrong in (-0.1, 1.5):
        with pytest.raises(InputError, match=f"probabilities, from 0 to 1; it was given {wrong}"):
            log_odds(np.array([0.5, wrong]))


def test_rank_to_score_by_hand() -> None:
    ranks = np.float32([1, 2, 4, NAN, 2.5])
    np.testing.assert_allclose(rank_to_score(ranks), [1, 0.5, 0.25, NAN, 0.4])
    np.testing.assert_allclose(
        rank_to_score(ranks, "negative_log"), [0, *-np.log([2, 4]), NAN, -np.log(2.5)], rtol=1e-6
    )
    np.testing.assert_array_equal(rank_to_score(ranks, "negative"), [0, -1, -3, NAN, -1.5])
    assert rank_to_score(ranks).dtype == np.float32


def test_interpolate_arrays_and_tensors() -> None:
    student, teacher = np.array([[2.0, 1.0]]), np.array([[3.0, -1.0]])
    np.testing.assert_allclose(interpolate(student, teacher, 0.4), [[2.4, 0.2]])
    tensor = interpolate(torch.tensor(student), torch.tensor(teacher), 0.4)
    assert tensor.tolist() == [pytest.approx([2.4, 0.2])]
    np.testing.assert_array_equal(interpolate(student, teacher, 1.0), teacher)
    np.testing.assert_array_equal(interpolate(student, teacher, 0.0), student)


# Bradley-Terry


def preferences(size: int, share: float, seed: int) -> np.ndarray:
    """Some pairs asked, each with any answer, so that they contradict one another."""
    rng = np.random.default_rng(seed)
    grid = rng.random((size, size))
    grid[rng.random((size, size)) > share] = NAN
    return grid


def penalised(scores: np.ndarray, wins: np.ndarray, ridge: float) -> float:
    """Minus the log-likelihood plus the ridge, by loops."""
    total = ridge / 2 * (scores**2).sum()
    for i, j in zip(*np.nonzero(np.isfinite(wins)), strict=True):
        if i != j:
            gap = scores[i] - scores[j]
            total += wins[i, j] * np.logaddexp(0, -gap) + (1 - wins[i, j]) * np.logaddexp(0, gap)
    return float(total)


@pytest.mark.parametrize(("size", "share", "ridge"), [(6, 1.0, 0.01), (12, 0.4, 0.1), (9, 0.3, 1.0)])
def test_bradley_terry_agrees_with_scipy(size: int, share: float, ridge: float) -> None:
    wins = preferences(size, share, seed=size)
    found = minimize(penalised, np.zeros(size), (wins, ridge), method="BFGS", options={"gtol": 1e-9})
    asked = np.isfinite(wins) & ~np.eye(size, dtype=bool)
    known = (asked | asked.T).any(1)
    assert known.sum() >= size - 1
    np.testing.assert_allclose(bradley_terry(wins, ridge), np.where(known, found.x, NAN), atol=2e-5)


def test_bradley_terry_is_at_its_maximum() -> None:
    """The slope of the penalised likelihood is 0, to 1e-8, also where one document wins always."""
    for seed, ridge in ((0, 0.01), (1, 1e-6), (2, 5.0)):
        wins = preferences(10, 0.5, seed)
        wins[3], wins[:, 3] = 1.0, 0.0
        scores = bradley_terry(wins, ridge)
        asked = np.isfinite(wins) & ~np.eye(10, dtype=bool)
        surplus = np.where(asked, wins - expit(scores[:, None] - scores), 0)
        slope = surplus.sum(1) - surplus.sum(0) - ridge * scores
        assert np.abs(slope).max() < 1e-8
        assert scores.argmax() == 3


def test_bradley_terry_finds_the_scores_that_made_the_preferences() -> None:
    scores = np.array([2.0, -1.0, 0.5, 0.0, -1.5])
    got = bradley_terry(expit(scores[:, None] - scores), ridge=1e-9)
    np.testing.assert_allclose(got, scores - scores.mean(), atol=1e-6)
    # one answer is the log-odds of it, shared between the two
    np.testing.assert_allclose(
        bradley_terry(np.array([[NAN, 0.8], [NAN, NAN]]), 1e-9), [logit(0.8) / 2, -logit(0.8) / 2]
    )


def test_documents_in_no_pair_have_no_score() -> None:
    wins = np.full((4, 4), NAN)
    wins[2, 0] = 0.7
    wins[1, 1] = 0.9  # itself: no pair
    got = bradley_terry(wins)
    assert np.isnan(got).tolist() == [False, True, False, True]
    assert got[2] > 0 > got[0]
    assert bradley_terry(np.full((2, 2), NAN)).tolist() == pytest.approx([NAN, NAN], nan_ok=True)
    assert bradley_terry(np.zeros((0, 0))).shape == (0,)


def test_bradley_terry_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(InputError, match=r"bradley_terry takes probabilities, from 0 to 1; it was given 1\.2"):
        bradley_terry(np.array([[0.5, 1.2], [0.0, 0.5]]))
    with pytest.raises(InputError, match="ridge is 0"):
        bradley_terry(np.array([[0.5, 0.2], [0.8, 0.5]]), ridge=0)
    chain = np.array([[NAN, 1.0, NAN], [NAN, NAN, 1.0], [NAN, NAN, NAN]])
    assert np.diff(bradley_terry(chain, 1e-6)).max() < 0
    with pytest.raises(InputError, match="no maximum found in 100 steps; raise the ridge, which is 1e-11"):
        bradley_terry(chain, 1e-11)  # wins that nothing holds back


# Softening: the five axioms, for each operator along its own path from p to uniform

PATHS: dict[str, tuple[Callable[..., np.ndarray], list[Any]]] = {
    "power": (soften_power, [1.0, 1.5, 2.0, 5.0, 50.0, 1e9]),
    "uniform": (soften_uniform, [0.0, 0.1, 0.3, 0.7, 0.95, 1.0]),
    "top": (soften_top, [9, 4, 3, 2, 1, 0]),
}
operators = pytest.mark.parametrize("name", PATHS)
distributions = st.lists(st.floats(0.01, 10), min_size=2, max_size=5).map(
    lambda numbers: np.array(numbers) / sum(numbers)
)


def test_softening_golden_numbers() -> None:
    """Section 31 of the specification."""
    np.testing.assert_allclose(soften_power(P, 2.0), [0.467887, 0.364391, 0.063322, 0.104400], atol=5e-7)
    np.testing.assert_allclose(soften_power(P, 2.0), softmax(np.array([3.0, 2.5, -1.0, 0.0]) / 2))
    np.testing.assert_allclose(soften_uniform(P, 0.3), [0.493002, 0.328531, 0.082656, 0.095811], atol=5e-7)


def test_softening_what_a_source_cut_off() -> None:
    np.testing.assert_allclose(soften_top(np.array([0.5, 0.2, 0.0, 0.0, 0.0]), 2), [0.5, 0.2, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(soften_top(np.array([0.1, 0.5, 0.15, 0.25]), 1), [0.5 / 3, 0.5, 0.5 / 3, 0.5 / 3])


@operators
@given(p=distributions)
@quick
def test_softened_lists_are_distributions_at_any_place(name: str, p: np.ndarray) -> None:
    operator, path = PATHS[name]
    holed = np.insert(p, 1, NAN)
    for value in path:
        got = operator(holed, value)
        assert np.isnan(got).tolist() == np.isnan(holed).tolist()
        assert np.nansum(got) == pytest.approx(1)
        np.testing.assert_allclose(got[np.isfinite(got)], operator(p, value), rtol=1e-9)


@operators
@given(p=distributions)
@quick
def test_softening_keeps_the_ranking(name: str, p: np.ndarray) -> None:
    """No two places change order; some may become equal."""
    operator, path = PATHS[name]
    for value in path:
        got = operator(p, value)
        above = p[:, None] > p
        assert ((got[:, None] - got)[above] >= -1e-12).all()


@operators
@given(p=distributions, nudge=st.lists(st.floats(-1, 1), min_size=5, max_size=5))
@quick
def test_softening_is_continuous(name: str, p: np.ndarray, nudge: list[float]) -> None:
    """A list a little different gives a result a little different; of the top, up to which place is in it."""
    operator, path = PATHS[name]
    near = p * (1 + 1e-9 * np.array(nudge[: len(p)]))
    for value in path:
        results = operator(p, value), operator(near / near.sum(), value)
        left, right = (np.sort(result) if name == "top" else result for result in results)
        np.testing.assert_allclose(left, right, atol=1e-7)


@operators
@given(p=distributions)
@quick
def test_softening_raises_the_entropy_all_along(name: str, p: np.ndarray) -> None:
    operator, path = PATHS[name]
    entropies = [entropy(operator(p, value)) for value in path]
    assert (np.diff(entropies) >= -1e-9).all()


@operators
@given(p=distributions)
@quick
def test_softening_begins_at_p_and_ends_at_uniform(name: str, p: np.ndarray) -> None:
    operator, path = PATHS[name]
    np.testing.assert_allclose(operator(p, path[0]), p, rtol=1e-9)
    np.testing.assert_allclose(operator(p, path[-1]), 1 / len(p), rtol=1e-6)


@operators
def test_softening_keeps_type_and_argument(name: str) -> None:
    operator, path = PATHS[name]
    lists = np.stack([P, P[::-1]]).astype(np.float32)
    before = lists.copy()
    got = operator(lists, path[2])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(lists, before)
    np.testing.assert_allclose(got[1], got[0][::-1], rtol=1e-6)
