"""Merged candidates against a plain round robin, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd.candidates import Candidates, merge
from retrieval_kd.types import Hits


def hits(*lists: list[int], width: int | None = None) -> Hits:
    """Hits of these rows, best first, with falling scores."""
    width = max(map(len, lists), default=0) if width is None else width
    rows = np.full((len(lists), width), -1, np.int32)
    scores = np.full((len(lists), width), -np.inf, np.float32)
    for query, list_ in enumerate(lists):
        rows[query, : len(list_)] = list_
        scores[query, : len(list_)] = -np.arange(len(list_))
    return Hits(rows, scores)


def naive(lists: list[list[int]], depth: int, positives: set[int]) -> list[int]:
    """Draw in turn from queues, the way cards are dealt."""
    taken = sorted(positives)[: max(1, depth // 2)]
    longest = max(len(list_) for list_ in lists)
    for turn in range(longest * len(lists)):
        rank, source = divmod(turn, len(lists))
        if rank < len(lists[source]) and lists[source][rank] not in taken and len(taken) < depth:
            taken.append(lists[source][rank])
    return (taken + [row for row in sorted(positives) if row not in taken])[:depth]


ranked = st.lists(st.integers(0, 9), unique=True, max_size=6)


@given(st.data())
def test_merge_deals_in_turn(data: st.DataObject) -> None:
    count, number = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    lists = [[data.draw(ranked) for _ in range(count)] for _ in range(number)]
    positives = [data.draw(st.sets(st.integers(0, 11), max_size=3)) for _ in range(count)]
    if data.draw(st.booleans()):
        positives = []
    depth = data.draw(st.integers(1, 8))
    merged = merge([hits(*source) for source in lists], depth, positives)
    assert merged.hits.rows.shape == (count, depth)
    assert merged.ranks.shape == (number, count, depth)
    for query in range(count):
        mine = [source[query] for source in lists]
        expected = naive(mine, depth, positives[query] if positives else set())
        missing = depth - len(expected)
        assert merged.hits.rows[query].tolist() == expected + [-1] * missing
        ranks = [[list_.index(row) + 1 if row in list_ else 0 for row in expected] + [0] * missing for list_ in mine]
        assert merged.ranks[:, query].tolist() == ranks
        for place, row in enumerate(expected):
            known = [list_.index(row) + 1 for list_ in mine if row in list_]
            assert merged.hits.scores[query, place] == np.float32(1 / min(known) if known else 0)
        assert (merged.hits.scores[query, len(expected) :] == -np.inf).all()


def test_merge_by_hand() -> None:
    merged = merge([hits([5, 3, 1], [7]), hits([3, 8], [])], depth=4, positives=[{9, 1}, set()])
    assert merged.hits.rows.tolist() == [[1, 9, 5, 3], [7, -1, -1, -1]]
    assert merged.ranks.tolist() == [[[3, 0, 1, 2], [1, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(merged.hits.scores, np.float32([[1 / 3, 0, 1, 1], [1, -np.inf, -np.inf, -np.inf]]))


def test_gaps_in_a_source_are_no_ranks() -> None:
    gap = Hits(np.array([[4, -1, 6]], np.int32), np.array([[2, -np.inf, 1]], np.float32))
    merged = merge([gap], depth=3)
    assert merged.hits.rows.tolist() == [[4, 6, -1]]
    assert merged.ranks.tolist() == [[[1, 2, 0]]]


def test_positives_come_first_and_leave_half_of_the_room() -> None:
    merged = merge([hits(list(range(20)))], depth=5, positives=[{30, 2, 31}])
    assert merged.hits.rows.tolist() == [[2, 30, 0, 1, 3]]
    assert merged.ranks.tolist() == [[[3, 0, 1, 2, 4]]]


def test_no_positive_is_lost_while_there_is_room() -> None:
    merged = merge([hits([0])], depth=5, positives=[{30, 2, 31}])
    assert merged.hits.rows.tolist() == [[2, 30, 0, 31, -1]]


@pytest.mark.parametrize("width", [0, 3])
def test_sources_without_results(width: int) -> None:
    merged = merge([hits([], [], width=width)] * 2, depth=2)
    assert merged.hits.rows.tolist() == [[-1, -1], [-1, -1]]
    assert not merged.hits.valid.any()
    assert not merged.ranks.any()


def test_sources_are_not_modified() -> None:
    source = hits([1, 2], [3])
    before = source.rows.copy(), source.scores.copy()
    merge([source, source], depth=3, positives=[{2}, {9}])
    np.testing.assert_array_equal(source.rows, before[0])
    np.testing.assert_array_equal(source.scores, before[1])


def test_round_trip(tmp_path: Path) -> None:
    made = merge([hits([5, 3, 1], [7]), hits([3, 8], [])], depth=4, positives=[{9}, set()])
    made.save(tmp_path)
    loaded = Candidates.load(tmp_path)
    np.testing.assert_array_equal(loaded.hits.rows, made.hits.rows)
    np.testing.assert_array_equal(loaded.hits.scores, made.hits.scores)
    np.testing.assert_array_equal(loaded.ranks, made.ranks)
