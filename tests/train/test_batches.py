"""The draw of a step: what it depends on, and that everything in it points to the right place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from retrieval_kd.stages import Stage, Term
from retrieval_kd.train.batches import Draw, draw
from retrieval_kd.trainset import Tokens, TrainSet
from retrieval_kd.types import Hits

QUERIES, WIDTH, DOCUMENTS = 11, 7, 40


def stage(**settings: object) -> Stage:
    return Stage(steps=100, terms=(Term(loss="info_nce"),), **{"batch_size": 4, "candidates": 3, **settings})


@pytest.fixture
def trainset() -> TrainSet:
    """Lists of 2 to 7 distinct documents; query 0 has no positive, query 1 has three, query 2 no scores."""
    rng = np.random.default_rng(5)
    rows = np.stack([rng.choice(DOCUMENTS, WIDTH, replace=False) for _ in range(QUERIES)]).astype(np.int32)
    for number in range(QUERIES):
        rows[number, 2 + number % 6 :] = -1
    rows[1] = rng.choice(DOCUMENTS, WIDTH, replace=False)
    scores = rng.normal(size=(2, QUERIES, WIDTH)).astype(np.float32)
    scores[:, rows < 0] = -np.inf
    scores[0, 2, rows[2] >= 0] = np.nan
    positive = np.zeros(rows.shape, bool)
    positive[np.arange(3, QUERIES), 1] = True
    positive[1, [2, 4, 5]] = True
    hits = Hits(rows, np.where(rows >= 0, 0, -np.inf).astype(np.float32))
    tokens = Tokens.pack([[1]] * QUERIES)
    return TrainSet(tokens, Tokens.pack([[1]] * DOCUMENTS), hits, ["a", "b"], scores, positive)


def same(left: Draw, right: Draw) -> bool:
    return all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(Draw)
    )


def test_a_draw_depends_on_seed_stage_and_step_alone(trainset: TrainSet) -> None:
    first = [draw(trainset, stage(), (3, 1), step) for step in range(6)]
    np.random.default_rng(0).random()
    np.random.seed(9)  # noqa: NPY002  the global generator plays no part
    again = {step: draw(trainset, stage(), (3, 1), step) for step in (5, 0, 3, 1, 4, 2)}
    assert all(same(first[step], again[step]) for step in range(6))
    for other in (draw(trainset, stage(), (3, 2), 0), draw(trainset, stage(), (4, 1), 0), first[1]):
        assert not same(first[0], other)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 30])
def test_each_epoch_visits_every_query_once(trainset: TrainSet, batch_size: int) -> None:
    drawn = [draw(trainset, stage(batch_size=batch_size), (0, 0), step).queries for step in range(44)]
    assert {len(queries) for queries in drawn} == {batch_size}
    visits = np.concatenate(drawn)[: 44 // QUERIES * QUERIES].reshape(-1, QUERIES)
    assert (np.sort(visits, axis=1) == np.arange(QUERIES)).all()
    assert len({tuple(epoch) for epoch in visits.tolist()}) == len(visits)  # each in an order of its own


@pytest.mark.parametrize("sampling", ["random", "top"])
@pytest.mark.parametrize("candidates", [2, 3, 7, 20])
def test_columns_point_to_the_right_rows(trainset: TrainSet, sampling: str, candidates: int) -> None:
    assert trainset.hits is not None
    assert trainset.positive is not None
    leads: dict[int, set[int]] = {number: set() for number in range(QUERIES)}
    for step in range(30):
        drawn = draw(trainset, stage(sampling=sampling, candidates=candidates), (0, 0), step)
        assert drawn.columns.shape == drawn.places.shape == (4, min(candidates, WIDTH))
        assert (np.diff(drawn.rows) > 0).all()
        assert (drawn.rows >= 0).all()
        assert set(drawn.columns[drawn.columns >= 0]) == set(range(len(drawn.rows)))
        for query, columns, places in zip(drawn.queries, drawn.columns, drawn.places, strict=True):
            known = trainset.hits.rows[query]
            met = np.where(columns >= 0, drawn.rows[columns], -1)
            assert met.tolist() == known[places].tolist()
            real = met[met >= 0].tolist()
            assert len(set(real)) == len(real) == min(candidates, (known >= 0).sum())
            leads[int(query)].add(int(places[0]))
            if sampling == "top":  # the first of the list, but for the leading one
                rest = [place for place in range((known >= 0).sum()) if place != places[0]]
                assert places[1 : len(real)].tolist() == rest[: len(real) - 1]
    assert trainset.scores is not None
    assert leads[0] == {int(trainset.scores[0, 0].argmax())}  # no positive: the first teacher's best
    assert leads[1] == {2, 4, 5}  # one of several positives, drawn
    assert leads[2] == {0}  # neither positive nor score: the first
    assert all(leads[number] == {1} for number in range(3, QUERIES))


def test_every_candidate_takes_part_in_turn(trainset: TrainSet) -> None:
    seen = [set(draw(trainset, stage(batch_size=QUERIES), (0, 0), step).rows.tolist()) for step in range(40)]
    assert trainset.hits is not None
    assert set.union(*seen) == set(trainset.hits.rows[trainset.hits.valid].tolist())


def test_the_train_set_stays_as_it_is(trainset: TrainSet) -> None:
    before = np.array(trainset.positive), np.array(trainset.scores)
    draw(trainset, stage(batch_size=QUERIES), (0, 0), 0)
    np.testing.assert_array_equal(trainset.positive, before[0])
    np.testing.assert_array_equal(trainset.scores, before[1])


def test_without_candidates_documents_are_drawn() -> None:
    trainset = TrainSet(Tokens.pack([[1]] * QUERIES))
    none = draw(trainset, stage(), (0, 0), 0)
    assert (none.rows.tolist(), none.columns.shape) == ([], (4, 0))
    drawn = [draw(trainset, stage(), (0, 0), step, documents=6).rows for step in range(20)]
    assert all(len(set(rows.tolist())) == 4 for rows in drawn)
    assert set(np.concatenate(drawn).tolist()) == set(range(6))
    assert draw(trainset, stage(), (0, 0), 0, documents=2).rows.tolist() == [0, 1]


def test_bins_take_all_margins_alike(trainset: TrainSet) -> None:
    """Nine negatives close to the positive and one far from it: the far one is drawn as often as not."""
    rows = np.arange(11, dtype=np.int32)[None].repeat(2, 0)
    scores = np.full((1, 2, 11), 0.0, np.float32)
    scores[0, :, 0], scores[0, :, 1:10] = 10.0, 9.0
    positive = np.zeros((2, 11), bool)
    positive[:, 0] = True
    few = TrainSet(Tokens.pack([[1], [2]]), hits=Hits(rows, scores[0]), scores=scores, positive=positive)
    places = np.concatenate(
        [draw(few, stage(sampling="bins", candidates=2), (0, 0), step).places for step in range(200)]
    )
    assert (places[:, 0] == 0).all()
    assert 0.4 < (places[:, 1] == 10).mean() < 0.6
    assert set(places[:, 1]) == set(range(1, 11))
    plain = np.concatenate([draw(few, stage(candidates=2), (0, 0), step).places for step in range(200)])
    assert (plain[:, 1] == 10).mean() < 0.2


def test_unscored_candidates_come_last_in_bins(trainset: TrainSet) -> None:
    for step in range(20):
        drawn = draw(trainset, stage(sampling="bins", batch_size=QUERIES), (0, 0), step)
        rows = np.take_along_axis(trainset.hits.rows[drawn.queries], drawn.places, axis=1)
        assert ((rows >= 0).sum(1) == np.minimum(3, (trainset.hits.rows[drawn.queries] >= 0).sum(1))).all()


def test_a_batch_comes_from_one_cluster(trainset: TrainSet) -> None:
    clusters = np.array([0, 1, 0, 2, 1, 1, 0, 2, 1, 0, 0], np.int32)
    grouped = dataclasses.replace(trainset, clusters=clusters)
    settings = stage(batching="cluster", cluster_by="a")
    seen = set()
    for step in range(60):
        queries = draw(grouped, settings, (0, 0), step).queries
        assert len(set(clusters[queries])) == 1
        assert len(queries) == len(set(queries.tolist())) == min(4, (clusters == clusters[queries[0]]).sum())
        seen |= set(queries.tolist())
    assert seen == set(range(QUERIES))


def test_no_duplicates_keeps_equal_texts_and_positives_apart() -> None:
    """Queries 0 and 1 have one text, 2 and 3 one positive; every epoch still has each query once."""
    tokens = Tokens.pack([[7], [7], [1], [2], [3], [4]])
    rows = np.array([[0, 9], [1, 9], [5, 9], [5, 8], [2, 9], [3, 9]], np.int32)
    positive = np.array([[True, False]] * 6)
    data = TrainSet(tokens, hits=Hits(rows, np.zeros(rows.shape, np.float32)), positive=positive)
    settings = stage(batching="no_duplicates", batch_size=3, candidates=2)
    visited: list[int] = []
    for step in range(40):
        queries = set(draw(data, settings, (0, 0), step).queries.tolist())
        assert not {0, 1} <= queries
        assert not {2, 3} <= queries
        visited += sorted(queries)
    counts = np.bincount(visited, minlength=6)
    assert counts.max() - counts.min() <= 1
    plain = [set(draw(data, stage(batch_size=3, candidates=2), (0, 0), step).queries.tolist()) for step in range(40)]
    assert any({0, 1} <= queries for queries in plain)
