"""Fusion of lists, by hand and against its definition in plain dictionaries; the weight that a measure likes best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.fusion import RELATIVE_WEIGHTS, fuse_hits, normalise_hits, tune_weight
from retrieval_kd.types import Hits, InputError


def hits(*lists: Sequence[tuple[int, float]]) -> Hits:
    made = Hits.none(len(lists), max(1, *map(len, lists)))
    for query, pairs in enumerate(lists):
        for place, (row, score) in enumerate(pairs):
            made.rows[query, place], made.scores[query, place] = row, score
    return made


def test_fusion_by_hand() -> None:
    dense = hits([(7, 0.9), (2, 0.5)], [(1, 0.3)], [])
    sparse = hits([(2, 10.0), (5, 4.0), (9, 2.0)], [], [(4, 6.0)])
    fused = fuse_hits([dense, sparse], [1.0, 0.1])
    # query 0: 2 has both, 7 gets the sparse minimum 2, 5 and 9 the dense minimum 0.5
    assert fused.rows.tolist() == [[2, 7, 5, 9, -1], [1, -1, -1, -1, -1], [4, -1, -1, -1, -1]]
    np.testing.assert_allclose(fused.scores[0, :4], [0.5 + 1.0, 0.9 + 0.2, 0.5 + 0.4, 0.5 + 0.2], rtol=1e-6)
    np.testing.assert_allclose([fused.scores[1, 0], fused.scores[2, 0]], [0.3, 0.6], rtol=1e-6)
    assert fuse_hits([dense, sparse], [1.0, 0.1], 2).rows.tolist() == [[2, 7], [1, -1], [4, -1]]


def test_comb_sum_by_hand() -> None:
    one = hits([(4, 10.0), (1, 6.0), (2, 2.0)])  # 1, 0.5, 0
    two = hits([(1, 3.0), (7, 1.0)])  # 1, 0
    fused = fuse_hits([normalise_hits(one), normalise_hits(two)], [1.0, 0.25], 3)
    assert fused.rows.tolist() == [[4, 1, 2]]  # 2 and 7 both have 0: the lower row comes first
    assert fused.scores[0] == pytest.approx([1, 0.75, 0], abs=1e-5)
    nothing = normalise_hits(Hits.none(1, 2))
    assert fuse_hits([nothing, nothing], [1.0, 1.0], 5).rows.tolist() == [[-1] * 4]


@pytest.mark.parametrize("constant", [[(5, 3.0)], [(5, 3.0), (1, 3.0)]])
def test_a_list_of_equal_scores_changes_no_order(constant: list[tuple[int, float]]) -> None:
    other = hits([(1, 9.0), (2, 8.0), (5, 7.0)])
    for fused in (
        fuse_hits([other, hits(constant)], [1.0, 1.0]),
        fuse_hits([normalise_hits(other), normalise_hits(hits(constant))], [1.0, 1.0]),
    ):
        assert fused.rows[0, :3].tolist() == [1, 2, 5]
    assert normalise_hits(hits(constant)).scores.tolist() == [[0.0] * len(constant)]


results = st.dictionaries(st.integers(0, 8), st.integers(-3, 9), max_size=6)
weights = st.sampled_from([0.0, 0.25, 1.0, 2.0])


@given(lists=st.lists(st.tuples(results, weights), min_size=1, max_size=4))
def test_fusion_is_what_its_definition_says(lists: list[tuple[dict[int, int], float]]) -> None:
    fused = fuse_hits([hits(list(found.items())) for found, _ in lists], [weight for _, weight in lists])
    expected = {
        row: sum(weight * found.get(row, min(found.values(), default=0)) for found, weight in lists)
        for row in {row for found, _ in lists for row in found}
    }
    order = sorted(expected, key=lambda row: (-expected[row], row))
    assert fused.rows[0, : len(order)].tolist() == order
    assert fused.scores[0, : len(order)].tolist() == [expected[row] for row in order]
    assert (fused.rows[0, len(order) :] == -1).all()


@given(lists=st.lists(results, min_size=1, max_size=3))
def test_comb_sum_is_what_its_definition_says(lists: list[dict[int, int]]) -> None:
    """Each list from 0 to 1; what a list lacks is 0 there."""
    fused = fuse_hits([normalise_hits(hits(list(found.items()))) for found in lists], [1.0] * len(lists))
    expected: dict[int, float] = dict.fromkeys((row for found in lists for row in found), 0.0)
    for found in lists:
        low, high = min(found.values(), default=0), max(found.values(), default=0)
        for row, score in found.items():
            expected[row] += (score - low) / ((high - low) or 1)
    valid = fused.valid[0]
    got = dict(zip(fused.rows[0, valid].tolist(), fused.scores[0, valid].tolist(), strict=True))
    assert got == pytest.approx(expected, abs=1e-5)  # minmax divides by the range + 1e-6
    assert (np.diff(fused.scores[0, valid]) <= 0).all()


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
        fuse_hits([hits([(1, 1.0)]), hits([(1, 1.0)], [])], [1.0, 1.0])
