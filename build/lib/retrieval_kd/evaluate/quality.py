"""Quality of results, query by query: the numbers of trec_eval, computed by ranx.

ranx takes rankings in the order it is given; the order of ties, which trec_eval defines, is made
here. Arrays go in instead of its Run and Qrels, which replace ids by float64 hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.metrics import STANDARD, Metric, parse_metric
from retrieval_kd.types import Hits, InputError, Queries

BLOCK = 512  # queries handed to ranx at once: bounds memory at large Q x K


def per_query(
    hits: Hits,
    queries: Queries,
    document_ids: Sequence[str],
    metrics: Sequence[str] = STANDARD,
    relevance: int = 1,
) -> dict[str, NDArray[np.float64]]:
    """The value of each metric for each query, under the metric's canonical name.

    Equal to trec_eval: results ordered by score, ties by document id, both descending, whatever
    order the columns have; gains are the grades; a result is relevant from grade `relevance`, unless the
    metric says which (trec_eval's -l). A query without results, or without relevant documents, counts 0.

    Shapes: hits (Q, K); every value (Q,), in the order of `queries`. Raises InputError for a query
    without judgements (trec_eval would leave it out of the mean), and for hits that do not belong
    to these queries and documents, lack scores, or name a document twice.
    """
    wanted = [parse_metric(name) for name in metrics]
    _check(hits, queries, document_ids)
    values = {str(metric): np.zeros(len(queries)) for metric in wanted}
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        run = _ranked(Hits(hits.rows[block], hits.scores[block]), document_ids)  # (B, K, 2)
        qrels = {
            grade: _relevant(queries, range(len(queries))[block], grade)  # (B, J, 2)
            for grade in {_lowest(metric, relevance) for metric in wanted}
        }
        for metric in wanted:
            values[str(metric)][block] = _compute(metric, qrels[_lowest(metric, relevance)], run)
    return values


def without_self(hits: Hits, query_ids: Sequence[str], document_ids: Sequence[str]) -> Hits:
    """The hits without those whose document has the id of its query, the others moved up.

    ArguAna's and Quora's queries are documents of their collections, and would find themselves.
    Shapes: hits (Q, K), columns best first, to (Q, K).
    """
    row_of = {document_id: row for row, document_id in enumerate(document_ids)}
    own = np.array([row_of.get(query_id, -1) for query_id in query_ids], np.int64)[:, None]  # (Q, 1)
    gone = (hits.rows == own) & hits.valid
    order = np.argsort(gone, axis=1, kind="stable")  # the one that goes comes last
    rows, scores = (np.take_along_axis(array, order, 1) for array in (hits.rows, hits.scores))
    last = np.take_along_axis(gone, order, 1)
    return Hits(np.where(last, -1, rows).astype(np.int32), np.where(last, -np.inf, scores).astype(np.float32))


def _lowest(metric: Metric, relevance: int) -> int:
    """The lowest grade that counts."""
    return 1 if metric.kind == "nDCG" else metric.relevance or relevance


def _compute(metric: Metric, qrels: NDArray[np.float64], run: NDArray[np.float64]) -> NDArray[np.float64]:
    from ranx.metrics import average_precision, ndcg, recall, reciprocal_rank  # seconds to import

    function = {"nDCG": ndcg, "MRR": reciprocal_rank, "R": recall, "MAP": average_precision}[metric.kind]
    result: NDArray[np.float64] = function(qrels, run, k=metric.cutoff or 0)
    return result


def _relevant(queries: Queries, numbers: Sequence[int], lowest: int) -> NDArray[np.float64]:
    """(B, J, 2): row and grade of the documents from grade `lowest`, best first, padded with row -1 and grade 0."""
    graded = [
        sorted(
            ((row, grade) for row, grade in queries.qrels[number].items() if grade >= lowest), key=lambda pair: -pair[1]
        )
        for number in numbers
    ]
    table = np.zeros((len(graded), max(1, *map(len, graded)), 2))
    table[:, :, 0] = -1  # ranx ranks the judgements themselves for the ideal: row 0 would count again
    for place, pairs in enumerate(graded):
        if pairs:
            table[place, : len(pairs)] = pairs
    return table


def _ranked(hits: Hits, document_ids: Sequence[str]) -> NDArray[np.float64]:
    """(B, K, 2): rows in trec_eval's order, -1 after the last, and scores K to 1 that fix that order."""
    order = np.lexsort((-hits.scores, ~hits.valid))  # a query's missing places come last
    rows = np.take_along_axis(hits.rows, order, 1)
    scores = np.take_along_axis(hits.scores, order, 1)
    tied = np.zeros(rows.shape, bool)
    same = (scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)
    tied[:, 1:] |= same
    tied[:, :-1] |= same
    if tied.any():  # only tied documents need their ids compared
        known = np.unique(rows[tied]).tolist()
        place = np.zeros(len(known), np.int64)
        by_id = sorted(range(len(known)), key=lambda number: document_ids[known[number]], reverse=True)
        place[by_id] = np.arange(len(known))
        second = np.zeros(rows.shape, np.int64)
        second[tied] = place[np.searchsorted(known, rows[tied])]
        rows = np.take_along_axis(rows, np.lexsort((second, -scores, rows < 0)), 1)
    artificial = np.broadcast_to(np.arange(rows.shape[1], 0, -1), rows.shape)
    return np.stack([rows, artificial], axis=2).astype(np.float64)


def _check(hits: Hits, queries: Queries, document_ids: Sequence[str]) -> None:
    if not queries.qrels:
        raise InputError("these queries have no judgements (qrels), so nothing can be measured; use a judged split.")
    if len(hits) != len(queries):
        raise InputError(f"hits of {len(hits)} queries for a split of {len(queries)}; they belong to another split.")
    if hits.rows.size and hits.rows.max() >= len(document_ids):
        raise InputError(
            f"hits name document row {hits.rows.max()} of a collection of {len(document_ids)}; "
            "they were made from another collection."
        )
    for query_id, judged in zip(queries.ids, queries.qrels, strict=True):
        if not judged:
            raise InputError(f"query {query_id!r} has no judgements; leave it out of the split.")
    unscored = (np.isnan(hits.scores) & hits.valid).any(1)
    if unscored.any():
        raise InputError(
            f"query {queries.ids[int(unscored.argmax())]!r} has results without a score (NaN); "
            "score them or take them out before evaluation."
        )
    inside = np.sort(hits.rows, axis=1)
    doubled = ((inside[:, 1:] == inside[:, :-1]) & (inside[:, 1:] >= 0)).any(1)
    if doubled.any():
        raise InputError(f"query {queries.ids[int(doubled.argmax())]!r} has a document twice among its results.")
