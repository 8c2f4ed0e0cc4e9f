"""Fusion of two lists, by hand and against a plain computation; the weight that a measure likes best."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.fusion import RELATIVE_WEIGHTS, fuse_hits, tune_weight
from retrieval_kd.types import Hits, InputError


def hits(*lists: list[tuple[int, float]]) -> Hits:
    made = Hits.none(len(lists), max(map(len, lists)))
    for query, pairs in enumerate(lists):
        for place, (row, score) in enumerate(pairs):
            made.rows[query, place], made.scores[query, place] = row, score
    return made


def test_fusion_by_hand() -> None:
    dense = hits([(7, 0.9), (2, 0.5)], [(1, 0.3)], [])
    sparse = hits([(2, 10.0), (5, 4.0), (9, 2.0)], [], [(4, 6.0)])
    fused = fuse_hits(dense, sparse, 0.1)
    # query 0: 2 has both, 7 gets the sparse minimum 2, 5 and 9 the dense minimum 0.5
    assert fused.rows.tolist() == [[2, 7, 5, 9, -1], [1, -1, -1, -1, -1], [4, -1, -1, -1, -1]]
    np.testing.assert_allclose(fused.scores[0, :4], [0.5 + 1.0, 0.9 + 0.2, 0.5 + 0.4, 0.5 + 0.2], rtol=1e-6)
    np.testing.assert_allclose([fused.scores[1, 0], fused.scores[2, 0]], [0.3, 0.6], rtol=1e-6)
    assert fuse_hits(dense, sparse, 0.1, k=2).rows.tolist() == [[2, 7], [1, -1], [4, -1]]


results = st.dictionaries(st.integers(0, 8), st.integers(-3, 9), max_size=6)


@given(first=results, second=results, weight=st.sampled_from([0.0, 0.25, 1.0, 2.0]))
def test_fusion_is_what_its_definition_says(first: dict[int, int], second: dict[int, int], weight: float) -> None:
    fused = fuse_hits(hits(list(first.items())), hits(list(second.items())), weight)
    expected = {
        row: first.get(row, min(first.values(), default=0)) + weight * second.get(row, min(second.values(), default=0))
        for row in {*first, *second}
    }
    order = sorted(expected, key=lambda row: (-expected[row], row))
    assert fused.rows[0, : len(order)].tolist() == order
    assert fused.scores[0, : len(order)].tolist() == [expected[row] for row in order]
    assert (fused.rows[0, len(order) :] == -1).all()


def test_the_weight_that_is_best_is_found_at_any_scale() -> None:
    """Row 3 is first from 1 < 0.6 + 0.6 w on; the second list's scores are 100 times as large."""
    dense = hits([(1, 1.0), (3, 0.6), (2, 0.0)])
    sparse = hits([(2, 100.0), (3, 60.0), (1, 0.0)])
    weight, found = tune_weight(dense, sparse, lambda fused: float(fused.rows[0, 0] == 3), 3)
    assert len(found) == len(RELATIVE_WEIGHTS)
    assert weight == pytest.approx(0.8 / 100), "the lowest of those that are best"
    assert found[weight] == 1.0
    constant, _ = tune_weight(dense, sparse, lambda fused: 1.0, 3)
    assert constant == 0.0


def test_lists_of_other_queries_are_refused() -> None:
    with pytest.raises(InputError, match="hits of 1 and of 2 queries"):
        fuse_hits(hits([(1, 1.0)]), hits([(1, 1.0)], []), 1.0)
