"""Quality against trec_eval (pytrec_eval), and against numbers by hand."""

from math import log2

import numpy as np
import pytest

from retrieval_kd.evaluate import quality
from retrieval_kd.evaluate.quality import per_query, without_self
from retrieval_kd.metrics import STANDARD
from retrieval_kd.types import Hits, InputError, Queries

NONE = -np.inf


def hits_of(rows: list[list[int]], scores: list[list[float]]) -> Hits:
    return Hits(np.array(rows, np.int32), np.array(scores, np.float32))


def queries_of(*qrels: dict[int, int]) -> Queries:
    return Queries([f"q{n}" for n in range(len(qrels))], ["text"] * len(qrels), qrels)


def random_case(seed: int, count: int, documents: int, depth: int) -> tuple[Hits, Queries, list[str]]:
    """Runs with many ties in no order, short and empty lists; grades -1 to 3, some queries with no relevant one."""
    generator = np.random.default_rng(seed)
    rows = np.full((count, depth), -1, np.int32)
    scores = np.full((count, depth), NONE, np.float32)
    qrels = []
    for number in range(count):
        places = generator.permutation(depth)[: generator.choice([0, 1, depth // 2, depth])]  # gaps anywhere
        rows[number, places] = generator.choice(documents, len(places), replace=False)
        levels = generator.choice([3, 50, 10_000])  # few levels: long ties
        scores[number, places] = generator.integers(-levels, levels, len(places)) / np.float32(7)
        judged = generator.choice(documents, generator.integers(1, 40), replace=False)
        top = generator.choice([0, 1, 3])  # 0: nothing relevant
        qrels.append({int(row): int(generator.integers(-1, top + 1)) for row in judged})
    ids = [f"{'dD-é'[n % 4]}{n}" for n in generator.permutation(documents).tolist()]  # d10 < d9: not the order of rows
    return Hits(rows, scores), queries_of(*qrels), ids


def trec_eval(hits: Hits, queries: Queries, ids: list[str], relevance: int = 1) -> dict[str, list[float]]:
    import pytrec_eval

    qrels = {q: {ids[row]: grade for row, grade in queries.qrels[n].items()} for n, q in enumerate(queries.ids)}
    run = {
        q: {ids[hits.rows[n, k]]: float(hits.scores[n, k]) for k in np.flatnonzero(hits.rows[n] >= 0)}
        for n, q in enumerate(queries.ids)
    }
    # trec_eval -M 10: score descending, then id descending
    cut = {
        q: dict(sorted(found.items(), key=lambda one: (one[1], one[0]), reverse=True)[:10]) for q, found in run.items()
    }
    names = {"ndcg", "ndcg_cut.10", "recall.5,100,1000", "map", "map_cut.100", "recip_rank"}
    measured = pytrec_eval.RelevanceEvaluator(qrels, names, relevance_level=relevance).evaluate(run)
    first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}, relevance_level=relevance).evaluate(cut)
    keys = {"nDCG@10": "ndcg_cut_10", "R@100": "recall_100", "R@1000": "recall_1000", "MAP": "map"}
    keys |= {"nDCG": "ndcg", "R@5": "recall_5", "MAP@100": "map_cut_100", "MRR": "recip_rank"}
    expected = {name: [measured.get(q, {}).get(key, 0.0) for q in queries.ids] for name, key in keys.items()}
    return expected | {"MRR@10": [first.get(q, {}).get("recip_rank", 0.0) for q in queries.ids]}


@pytest.mark.parametrize(("seed", "documents", "depth"), [(0, 80, 40), (1, 1500, 1200), (2, 40, 7)])
def test_equals_trec_eval(seed: int, documents: int, depth: int) -> None:
    hits, queries, ids = random_case(seed, 150, documents, depth)
    got, expected = per_query(hits, queries, ids), trec_eval(hits, queries, ids)
    assert list(got) == list(STANDARD)
    for name in STANDARD:
        assert 0 < got[name].mean() < 1
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-9, err_msg=name)


EVERY = ("nDCG@10", "nDCG", "MRR@10", "MRR", "R@5", "R@100", "R@1000", "MAP", "MAP@100")


@pytest.mark.parametrize("relevance", [1, 2, 3])
def test_a_thousand_random_runs_equal_trec_eval(relevance: int) -> None:
    """Each query is a run of its own: ties, no results, no judgements of what was found, grades from -1 to 3."""
    hits, queries, ids = random_case(10 + relevance, 1000, 160, 130)
    got, expected = per_query(hits, queries, ids, EVERY, relevance), trec_eval(hits, queries, ids, relevance)
    assert (~hits.valid).all(1).sum() > 100  # runs that lack the query
    for name in EVERY:
        assert 0 < got[name].mean() < 1
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-9, err_msg=name)


def test_a_metric_may_say_what_is_relevant() -> None:
    hits, queries, ids = random_case(20, 60, 80, 40)
    got = per_query(hits, queries, ids, ["R(rel=2)@5", "RR(rel=3)", "R@5", "nDCG@10"], relevance=1)
    assert list(got) == ["R(rel=2)@5", "MRR(rel=3)", "R@5", "nDCG@10"]
    for name, key, relevance in (("R(rel=2)@5", "R@5", 2), ("MRR(rel=3)", "MRR", 3), ("R@5", "R@5", 1)):
        expected = trec_eval(hits, queries, ids, relevance)[key]
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-9, err_msg=name)
    assert (got["R(rel=2)@5"] != got["R@5"]).any()
    np.testing.assert_array_equal(got["nDCG@10"], per_query(hits, queries, ids, ["nDCG@10"], relevance=3)["nDCG@10"])


def test_a_query_does_not_find_itself() -> None:
    # as in ArguAna: the query is a document, and comes first in its own results
    ids = ["a", "b", "q1", "q0"]
    hits = hits_of([[3, 0, 1], [0, 1, -1], [0, 2, 1]], [[9, 8, 7], [9, 8, NONE], [3, 2, 1]])
    queries = queries_of({0: 1}, {1: 1}, {2: 1})  # q2 is no document; for q0 document a is relevant, and second
    clean = without_self(hits, queries.ids, ids)
    assert clean.rows.tolist() == [[0, 1, -1], [0, 1, -1], [0, 2, 1]]
    assert clean.scores.tolist() == [[8, 7, NONE], [9, 8, NONE], [3, 2, 1]]
    before, after = (per_query(one, queries, ids, ["MRR"])["MRR"].tolist() for one in (hits, clean))
    assert before == [1 / 2, 1 / 2, 1 / 2]
    assert after == [1, 1 / 2, 1 / 2]
    assert hits.rows[0].tolist() == [3, 0, 1]  # what was given is as it was


def test_blocks_do_not_change_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    hits, queries, ids = random_case(3, 50, 80, 40)
    whole = per_query(hits, queries, ids)
    monkeypatch.setattr(quality, "BLOCK", 7)
    parts = per_query(hits, queries, ids)
    for name in STANDARD:
        np.testing.assert_array_equal(whole[name], parts[name])


def test_by_hand() -> None:
    hits = hits_of([[3, 0, 1, 2]], [[9, 8, 7, 6]])
    got = per_query(hits, queries_of({0: 1, 2: 3, 4: 2, 3: 0}), ["a", "b", "c", "d", "e"])
    gain = 1 / log2(3) + 3 / log2(5)  # grade 1 at rank 2, grade 3 at rank 4
    best = 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    expected = {"nDCG@10": gain / best, "MRR@10": 1 / 2, "R@100": 2 / 3, "R@1000": 2 / 3, "MAP": (1 / 2 + 2 / 4) / 3}
    assert {name: values.item() for name, values in got.items()} == pytest.approx(expected, abs=1e-12)


def test_ties_go_to_the_larger_id() -> None:
    # d9 > d10 as strings; float32 makes 1 and 1 + 1e-9 equal
    hits = hits_of([[0, 1, 2]], [[1 + 1e-9, 1, 0.5]])
    for ids, rank in ((["d10", "d9", "x"], 2), (["d9", "d10", "x"], 1)):
        assert per_query(hits, queries_of({0: 1}), ids, ["MRR@10"])["MRR@10"].item() == 1 / rank


def test_columns_may_come_in_any_order() -> None:
    queries = queries_of({0: 1})
    assert per_query(hits_of([[1, -1, 0]], [[1, NONE, 2]]), queries, ["a", "b"], ["MRR@10"])["MRR@10"].item() == 1


def test_a_result_of_score_minus_infinity_is_a_result() -> None:
    hits = hits_of([[-1, -1, 0, 1, 2]], [[NONE] * 5])
    assert per_query(hits, queries_of({0: 1}), ["a", "b", "c"], ["MRR"])["MRR"].item() == 1 / 3


def test_the_cutoff_counts() -> None:
    hits = hits_of([list(range(12))], [[-n for n in range(12)]])
    got = per_query(hits, queries_of({10: 1}), [f"{n:02}" for n in range(12)], ["MRR@10", "MRR", "R@10", "recall_11"])
    assert {name: values.item() for name, values in got.items()} == {"MRR@10": 0, "MRR": 1 / 11, "R@10": 0, "R@11": 1}


def test_nothing_found_and_nothing_relevant_are_zero() -> None:
    hits = hits_of([[-1, -1], [0, 1]], [[NONE, NONE], [2, 1]])
    for values in per_query(hits, queries_of({0: 1}, {0: 0, 1: -1}), ["a", "b"]).values():
        assert values.tolist() == [0, 0]
    empty = Hits(np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32))
    assert [values.item() for values in per_query(empty, queries_of({0: 1}), ["a"]).values()] == [0] * 5


def test_leaves_inputs_and_numba_alone() -> None:
    import numba

    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    hits, queries, ids = random_case(4, 5, 80, 40)  # ranx.evaluate would set one thread for fewer than 10 queries
    hits.rows.setflags(write=False)
    hits.scores.setflags(write=False)
    qrels = [dict(judged) for judged in queries.qrels]
    per_query(hits, queries, ids)
    assert qrels == list(queries.qrels)
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS


@pytest.mark.parametrize(
    ("hits", "queries", "message"),
    [
        (hits_of([[0]], [[1]]), Queries(["q"], ["text"]), "no judgements"),
        (hits_of([[0], [0]], [[1], [1]]), queries_of({0: 1}, {}), "'q1' has no judgements"),
        (hits_of([[0]], [[1]]), queries_of({0: 1}, {0: 1}), "1 queries for a split of 2"),
        (hits_of([[5]], [[1]]), queries_of({0: 1}), "row 5 of a collection of 3"),
        (hits_of([[0, 1]], [[1, np.nan]]), queries_of({0: 1}), "'q0' has results without a score"),
        (hits_of([[0, 1, 0]], [[3, 2, 1]]), queries_of({0: 1}), "'q0' has a document twice"),
    ],
)
def test_refuses(hits: Hits, queries: Queries, message: str) -> None:
    with pytest.raises(InputError, match=message):
        per_query(hits, queries, ["a", "b", "c"])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'nDCG@10'"):
        per_query(hits_of([[0]], [[1]]), queries_of({0: 1}), ["a"], ["ncdg@10"])
