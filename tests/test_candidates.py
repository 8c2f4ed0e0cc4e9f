"""Merged candidates against a plain round robin, and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_kd import candidates
from retrieval_kd.candidates import Candidates, merge, provenance
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
        if rank < len(lists[source]) and len(taken) < depth:
            row = lists[source][rank]
            if row not in taken and row not in positives:
                taken.append(row)
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


def test_quotas_are_filled_and_the_rest_is_shared() -> None:
    bm25, dense, splade = [10, 11, 12, 13], [20, 10, 21, 22, 23, 24], [30, 31, 32, 33]
    sources = [hits(bm25), hits(dense), hits(splade)]
    plain = merge(sources, depth=8)
    assert plain.hits.rows.tolist() == [[10, 20, 30, 11, 31, 12, 21, 32]]  # dense lost a turn to bm25's 10
    some = merge(sources, depth=8, quotas=[None, 4, None])
    # dense: 20, 10, 21, 22, then the two others share what is left, of the same ranks in order
    assert some.hits.rows.tolist() == [[20, 30, 11, 10, 31, 12, 21, 22]]
    assert merge(sources, depth=8, quotas=[1, 1, None]).hits.rows.tolist() == [[10, 20, 30, 31, 32, 33, -1, -1]]
    dry = merge([hits([10]), hits(dense)], depth=5, quotas=[3, None])
    assert dry.hits.rows.tolist() == [[10, 20, 21, 22, 23]]  # what one has not got another one fills
    full = merge(sources, depth=4, positives=[{11, 99}], quotas=[2, 2, None])
    assert full.hits.rows.tolist() == [[11, 99, 10, 20]]  # positives take no place of a quota, and the ranks go first
    assert full.ranks[:, 0].tolist() == [[2, 0, 1, 0], [0, 0, 2, 1], [0, 0, 0, 0]]


def test_positives_that_come_last_take_no_place_of_a_quota() -> None:
    merged = merge([hits([3, 10, 11])], depth=4, positives=[{1, 2, 3}], quotas=[1])
    assert merged.hits.rows.tolist() == [[1, 2, 10, 3]]
    assert merged.ranks.tolist() == [[[0, 0, 2, 1]]]


def test_first_ranks_are_left_out_and_known() -> None:
    merged = merge([hits([1, 2, 3, 4]), hits([3, 1, 9])], depth=6, positives=[{2}], skips=[2, 0])
    # the positive is where the first source's second rank was; 3 is at rank 3 of the one and 1 of the other
    assert merged.hits.rows.tolist() == [[2, 3, 4, 1, 9, -1]]
    assert merged.ranks[:, 0].tolist() == [[2, 3, 4, 1, 0, 0], [0, 1, 0, 2, 3, 0]]


@given(st.data())
def test_quotas_hold(data: st.DataObject) -> None:
    """Of each source with a quota: so many that it was dealt, or all it has; and lists as full as they can be."""
    lists = [data.draw(ranked) for _ in range(data.draw(st.integers(1, 3)))]
    depth = data.draw(st.integers(1, 8))
    quotas = [data.draw(st.one_of(st.none(), st.integers(1, max(1, depth // len(lists))))) for _ in lists]
    skips = [data.draw(st.integers(0, 2)) for _ in lists]
    merged = merge([hits(list_, width=6) for list_ in lists], depth, quotas=quotas, skips=skips)
    rows = [row for row in merged.hits.rows[0].tolist() if row >= 0]
    assert len(set(rows)) == len(rows)
    offered = [set(list_[skip:]) for list_, skip in zip(lists, skips, strict=True)]
    assert set(rows) <= set().union(*offered)
    for own, quota in zip(offered, quotas, strict=True):
        if quota is not None:
            assert len(own & set(rows)) >= min(quota, len(own), depth - sum(q or 0 for q in quotas) + quota)
    free = [own for own, quota in zip(offered, quotas, strict=True) if quota is None]
    if free and len(rows) < depth:
        assert set().union(*free) <= set(rows)
    if not free:
        assert len(rows) <= sum(quota or 0 for quota in quotas)


def test_provenance_counts_places(monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge([hits([5, 3, 1], [7]), hits([3, 8], [])], depth=4, positives=[{9, 1}, set()])
    negatives = merged.hits.valid & ~np.isin(merged.hits.rows, [9, 1])
    names = ["bm25", "bi"]
    for block in (1, 100):
        monkeypatch.setattr(candidates, "BLOCK", block)
        assert provenance(merged.ranks, names, negatives) == {"bm25": 2, "bm25 + bi": 1}
        everything = {"no source": 1, "bm25": 3, "bm25 + bi": 1}
        assert provenance(merged.ranks, names, merged.hits.valid) == everything
    assert provenance(merged.ranks, names, np.zeros_like(negatives)) == {}
