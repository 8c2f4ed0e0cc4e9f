"""The train set on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retrieval_kd.trainset import Tokens, TrainSet, mark_positives
from retrieval_kd.types import Hits

LISTS = [[5, 6, 7], [], [8], [9, 10]]
HITS = Hits(np.array([[3, 1, 0], [2, -1, -1]], np.int32), np.array([[1, 0.5, 0], [1, -np.inf, -np.inf]], np.float32))


def test_tokens_come_back_as_packed() -> None:
    tokens = Tokens.pack(LISTS)
    assert len(tokens) == 4
    assert [tokens[place].tolist() for place in range(4)] == LISTS
    assert tokens.ids.dtype == np.int32
    assert len(Tokens.pack([])) == 0


def test_round_trip_memory_mapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    saved = TrainSet(
        query_tokens=Tokens.pack(LISTS[:2]),
        document_tokens=Tokens.pack(LISTS),
        hits=HITS,
        teachers=["bm25", "a.b-c"],
        scores=rng.normal(size=(2, 2, 3)).astype(np.float32),
        positive=np.array([[True, False, True], [False] * 3]),
        query_vectors={"a.b-c": rng.normal(size=(2, 5)).astype(np.float32)},
        document_vectors={
            "bm25": rng.normal(size=(4, 5)).astype(np.float32),
            "a.b-c": rng.normal(size=(4, 3)).astype(np.float32),
        },
        frozen=rng.normal(size=(4, 6)).astype(np.float32),
    )
    saved.save(tmp_path)
    opened = TrainSet.load(tmp_path)
    assert len(opened) == 2
    assert opened.document_tokens is not None
    assert opened.hits is not None
    pairs = [
        (opened.query_tokens.ids, saved.query_tokens.ids),
        (opened.query_tokens.starts, saved.query_tokens.starts),
        (opened.document_tokens.ids, Tokens.pack(LISTS).ids),
        (opened.hits.rows, HITS.rows),
        (opened.hits.scores, HITS.scores),
        *((getattr(opened, name), getattr(saved, name)) for name in ("scores", "positive", "frozen")),
    ]
    for side in ("query_vectors", "document_vectors"):
        assert getattr(opened, side).keys() == getattr(saved, side).keys()
        pairs += [(getattr(opened, side)[name], vectors) for name, vectors in getattr(saved, side).items()]
    for got, expected in pairs:
        assert isinstance(got, np.memmap)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert list(opened.teachers) == ["bm25", "a.b-c"]
    assert [opened.document_tokens[place].tolist() for place in range(4)] == LISTS


def test_what_is_absent_stays_absent(tmp_path: Path) -> None:
    TrainSet(Tokens.pack(LISTS)).save(tmp_path)
    opened = TrainSet.load(tmp_path)
    assert (opened.document_tokens, opened.hits, opened.scores, opened.positive, opened.frozen) == (None,) * 5
    assert (opened.query_vectors, opened.document_vectors) == ({}, {})


def test_positives_by_hand() -> None:
    qrels = [{3: 1, 0: 0, 1: 2, 77: 1}]  # grade 0 is judged not relevant; the second query is a pseudo-query
    assert mark_positives(HITS, qrels).tolist() == [[True, True, False], [False] * 3]
    assert not mark_positives(HITS, [{}, {0: 1}]).any()
    assert not mark_positives(HITS, []).any()
