"""Fusion against the same computed document by document, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_kd.fusion import fuse_runs
from retrieval_kd.types import Hits

NONE = -np.inf


def random_run(seed: int, depth: int) -> Hits:
    generator = np.random.default_rng(seed)
    rows = np.stack([generator.choice(60, depth, replace=False) for _ in range(20)]).astype(np.int32)
    scores = -np.sort(-generator.normal(seed, 3, (20, depth)).astype(np.float32), axis=1)
    rows[:, depth // 2 :][::3], scores[:, depth // 2 :][::3] = -1, NONE  # some lists are short
    return Hits(rows, scores)


def comb_sum(lists: list[dict[int, float]]) -> dict[int, float]:
    """The definition, in float64: each list from 0 to 1, what a list lacks is 0 there."""
    total: dict[int, float] = dict.fromkeys((row for one in lists for row in one), 0.0)
    for one in lists:
        low, high = min(one.values()), max(one.values())
        for row, score in one.items():
            total[row] += (score - low) / (high - low)
    return total


def test_equals_the_sum_of_normalised_scores() -> None:
    one, two = random_run(1, 30), random_run(2, 40)
    assert not one.valid.all()
    got = fuse_runs([one, two], 1000)
    for query, (rows, scores) in enumerate(zip(got.rows, got.scores, strict=True)):
        lists = [
            {int(row): float(score) for row, score in zip(run.rows[query], run.scores[query], strict=True) if row >= 0}
            for run in (one, two)
        ]
        found = {int(row): score for row, score in zip(rows, scores, strict=True) if row >= 0}
        assert found == pytest.approx(comb_sum(lists), abs=1e-5)  # minmax divides by the range + 1e-6
        assert (np.diff(scores[rows >= 0]) <= 0).all()
    assert (fuse_runs([one, two], 10).rows == got.rows[:, :10]).all()


def test_by_hand() -> None:
    one = Hits(np.array([[4, 1, 2]], np.int32), np.array([[10, 6, 2]], np.float32))  # 1, 0.5, 0
    two = Hits(np.array([[1, 7, -1]], np.int32), np.array([[3, 1, NONE]], np.float32))  # 1, 0
    fused = fuse_runs([one, two], 3, shares=[1, 0.25])
    assert fused.rows.tolist() == [[4, 1, 2]]  # 2 and 7 both have 0: the lower row comes first
    assert fused.scores[0] == pytest.approx([1, 0.75, 0], abs=1e-5)
    nothing = Hits.none(1, 2)
    assert fuse_runs([nothing, nothing], 5).rows.tolist() == [[-1] * 5]
