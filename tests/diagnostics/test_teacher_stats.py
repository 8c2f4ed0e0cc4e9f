"""A teacher summed up in blocks against numpy over everything at once; advice from planted faults."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

from retrieval_kd.diagnostics.teachers import (
    BINS,
    NOT_JUDGED,
    NOT_RELEVANT,
    RELEVANT,
    Agreement,
    Comparison,
    Extent,
    Tally,
    TeacherStats,
    advise,
    coarse,
    compare_in_words,
)


def summed(lists: list[np.ndarray], judged: list[np.ndarray], blocks: int = 1, **facts: Any) -> TeacherStats:
    """The statistics of these lists, added in `blocks`."""
    extent = Extent()
    for one in lists:
        extent.add(one)
    tally = Tally(extent)
    for numbers in np.array_split(np.arange(len(lists)), blocks):
        some = [lists[number][np.isfinite(lists[number])] for number in numbers]
        marks = [judged[number][np.isfinite(lists[number])] for number in numbers]
        starts = np.cumsum([0, *map(len, some)])
        sampled = np.ones(len(some), bool)
        tally.add(starts, np.concatenate(some), np.concatenate(marks), np.array([0.5]), sampled)
    return tally.finish(facts.get("queries"), facts.get("relevant"))


def test_in_blocks_as_over_everything_at_once() -> None:
    rng = np.random.default_rng(0)
    lists = [rng.normal(3, 2, size).astype(np.float32) for size in (40, 1, 7, 30, 12)]
    lists[0][:3] = lists[0][3]
    lists[3][5] = np.nan
    judged = [rng.choice([RELEVANT, NOT_RELEVANT, NOT_JUDGED], len(one), p=[0.2, 0.3, 0.5]) for one in lists]
    every = np.concatenate(lists).astype(np.float64)
    known = every[np.isfinite(every)]
    for blocks in (1, 3):
        stats = summed(lists, judged, blocks, queries=10, relevant=40)
        assert (stats.pairs, stats.answered, stats.queries, stats.coverage) == (90, 89, 5, 0.5)
        assert (stats.documents_min, stats.documents_median, stats.documents_max) == (1, 12, 40)
        assert (stats.min, stats.max) == (known.min(), known.max())
        assert (stats.mean, stats.std) == (pytest.approx(known.mean()), pytest.approx(known.std()))
        lower = np.quantile(known, [0.05, 0.25, 0.5, 0.75, 0.95], method="lower")
        np.testing.assert_allclose(list(stats.quantiles.values()), lower, atol=np.ptp(known) / BINS)
        pairs = sum(len(one) * (len(one) - 1) // 2 for one in (lists[0], lists[2], lists[3][1:], lists[4]))
        assert stats.tied == pytest.approx(6 / pairs)
        assert stats.relevant_scored == sum(
            (mark[np.isfinite(one)] == RELEVANT).sum() for one, mark in zip(lists, judged, strict=True)
        )
        assert stats.ndcg == 0.5
        chances = [np.exp(one[np.isfinite(one)].astype(float)) for one in lists]
        assert stats.entropy == pytest.approx(np.mean([entropy(one) for one in chances]))
        assert stats.effective == pytest.approx(
            np.mean([np.exp(entropy(one)) / len(one) for one in chances if len(one) > 1])
        )
    assert np.float64(stats.scale) == pytest.approx(1 / 6, rel=1)  # a few deviations of 2


def test_suggestions_by_hand() -> None:
    """Margins of 1 to 20 below the best: 95 % of them are within 19.05."""
    steps = np.arange(21, dtype=np.float32)
    stats = summed([steps], [np.full(21, NOT_JUDGED)])
    assert stats.scale == pytest.approx(1 / 19.05, rel=1e-2)
    assert stats.temperature is not None
    weights = np.exp(-steps / stats.temperature)
    assert np.exp(entropy(weights)) == pytest.approx(21 / 4, rel=1e-2)
    relevant = np.where(steps == 10, RELEVANT, NOT_JUDGED)
    assert summed([steps], [relevant]).scale == pytest.approx(0.1)  # from 10 either way
    one = summed([steps[:1]], [relevant[:1]])
    assert (one.scale, one.temperature, one.tied, one.effective) == (None, None, None, None)


def words(scores: Any, **facts: Any) -> str:
    lists = [np.asarray(one, np.float32) for one in scores]
    judged = facts.pop("judged", [np.full(len(one), NOT_JUDGED) for one in lists])
    return "\n".join(advise("ce", summed(lists, judged, **facts)))


def test_healthy_scores_need_no_word() -> None:
    rng = np.random.default_rng(0)
    assert words(rng.normal(size=(20, 30)), queries=20) == ""


def test_faults_are_told_with_their_numbers() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 30))
    some = logits.copy()
    some[0, :6] = np.nan
    assert words(some) == "ce: 6 of 600 pairs were asked in vain (NaN) and teach nothing."
    assert words(logits, queries=25) == "ce: 20.0% of the split's queries have no score; score them, or train without."
    assert words(np.ones((3, 4))) == "ce: every list is tied; the teacher tells no documents apart."
    assert "ce: 62% of the pairs in lists are tied" in words(np.array([[0] * 8 + [3, 9]] * 9))  # 28 of 45
    saturated = np.round(1 / (1 + np.exp(-12 * logits)), 4)
    ends = (saturated <= 0.001).mean() + (saturated >= 0.999).mean()
    assert f"scores are saturated: {ends:.0%} within 0.001 of the ends 0 and 1; take logits." in words(saturated)
    assert "of the scores lie at the end of their range, 0, with no order among them" in words(np.maximum(logits, 0))
    judged = [np.where(one < -1, RELEVANT, NOT_JUDGED) for one in logits]
    wrong = words(logits, judged=judged, relevant=1000)
    assert "the teacher prefers negatives: AUC 0.00" in wrong
    assert f"{1000 - sum((one == RELEVANT).sum() for one in judged)} of 1,000 relevant documents have no score" in wrong
    temperature = summed(list(np.float32(logits)), [np.full(30, NOT_JUDGED)] * 20).temperature
    assert f"one document taking all; teacher_temperature = {temperature * 100:.3g}"[:60] in words(100 * logits)
    assert f"flat, 100% of it at work; teacher_temperature = {temperature / 100:.1g}"[:55] in words(logits / 100)


def test_two_teachers() -> None:
    comparison = Comparison()
    steps = np.arange(12, dtype=np.float32)
    comparison.add(np.array([0, 12]), steps, steps)
    comparison.add(np.array([0, 2, 3]), steps[:3], -steps[:3])
    found = comparison.finish("a", "b")
    assert (found.pairs, found.queries, found.kendall_tau, found.overlap) == (15, 3, 0.0, 1.0)
    assert list(compare_in_words(found)) == []
    nothing = Comparison().finish("a", "b")
    assert nothing == Agreement(("a", "b"), 0, 0, None, None)
    assert list(compare_in_words(nothing)) == ["a and b have no scored pair in common."]
    (alike,) = compare_in_words(replace(found, kendall_tau=0.97))
    assert alike == "a and b order nearly alike (tau 0.97); one of them is enough."
    (opposed,) = compare_in_words(replace(found, kendall_tau=-0.3))
    assert opposed.startswith("a and b disagree on most pairs (tau -0.30)")


def test_coarser_histograms_lose_nothing() -> None:
    counts = np.arange(2 * BINS).reshape(2, BINS)
    assert coarse(counts, 4).sum(1).tolist() == counts.sum(1).tolist()
    assert coarse(counts, 4)[0, 0] == counts[0, : BINS // 4].sum()
