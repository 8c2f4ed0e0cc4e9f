"""Judges that compare documents, at work through the store: what they said is kept, and scores are made of it.

A judge sees the candidates of a query in the order of their scores: in training lists judged positives come
first, and a judge that leans towards the beginning of a list would find them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.answers import recording
from retrieval_kd.progress import progress
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Keys, Store
from retrieval_kd.teachers import ListJudge, Metered, PairJudge, Teacher
from retrieval_kd.types import Hits
from retrieval_kd.usage import Interrupted

CHUNK = 64  # questions that a judge gets at once, unless it says how many


@dataclass(frozen=True)
class _Lists:
    """The candidates of every query as texts that the judge reads; each distinct list stands once.

    `lists` maps the key of a query and those of its documents to their texts; `keys[i]` is that of query i.
    """

    lists: dict[tuple[int, tuple[int, ...]], tuple[str, list[str]]]
    keys: list[tuple[int, tuple[int, ...]]]
    document_keys: Keys

    @classmethod
    def of(cls, judge: Teacher, queries: Sequence[str], documents: Sequence[str], hits: Hits) -> _Lists:
        rendered, texts = judge.render(queries, "query"), judge.render(documents, "document")
        query_keys, document_keys = text_keys(rendered).tolist(), text_keys(texts)
        lists: dict[tuple[int, tuple[int, ...]], tuple[str, list[str]]] = {}
        keys = []
        for query, (rows, scores) in enumerate(zip(hits.rows, hits.scores, strict=True)):
            order = np.argsort(-scores, kind="stable")
            row_of: dict[int, int] = {}
            for row in rows[order][rows[order] >= 0].tolist():
                row_of.setdefault(int(document_keys[row]), row)  # equal texts are one document
            inside = tuple(row_of)
            key = (query_keys[query], inside)
            keys.append(key)
            lists[key] = (rendered[query], [texts[row_of[document]] for document in inside])
        return cls(lists, keys, document_keys)

    def grid(self, hits: Hits, scores: dict[tuple[int, tuple[int, ...]], NDArray[np.float32]]) -> NDArray[np.float32]:
        """Scores of lists at the places of their documents: (Q, K), -inf where there is no candidate."""
        grid = np.full(hits.rows.shape, -np.inf, np.float32)
        for query, key in enumerate(self.keys):
            score_of = dict(zip(key[1], scores[key], strict=True))
            for place in np.flatnonzero(hits.valid[query]):
                grid[query, place] = score_of[int(self.document_keys[hits.rows[query, place]])]
        return grid


def fill_preferences(
    root: Path, name: str, judge: PairJudge, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> NDArray[np.float32]:
    """Ask for the preferences that the store lacks, and score every list by those among its chosen pairs.

    Shapes: hits (Q, K) to scores (Q, K) float32; -inf where there is no candidate, NaN for a document that
    was compared with none. A preference that is kept as NaN was asked, and had no answer.
    """
    read = _Lists.of(judge, queries, documents, hits)
    store = Store.open(root, name, judge.identity)
    chosen = {key: judge.choose_pairs(query, len(texts)) for key, (query, texts) in read.lists.items()}
    known: dict[tuple[int, int, int], float] = {}

    def unanswered() -> dict[tuple[int, int, int], tuple[str, str, str]]:
        known.update(_preferences(store, {query for query, _ in read.lists}))
        asked: dict[tuple[int, int, int], tuple[str, str, str]] = {}
        for (key, inside), (query, texts) in read.lists.items():
            for first, second in chosen[key, inside].tolist():
                pair = (key, inside[first], inside[second])
                if pair not in known and (key, pair[2], pair[1]) not in asked:
                    asked.setdefault(pair, (query, texts[first], texts[second]))
        return asked

    def put(pairs: Sequence[tuple[int, int, int]], chances: Sequence[float]) -> None:
        query_keys, first, second = np.array(pairs, np.uint64).reshape(-1, 3).T
        store.append_preferences(query_keys, first, second, np.array(chances, np.float32))
        known.update(_both_ways(pairs, chances))

    def prefer(questions: Sequence[tuple[str, str, str]]) -> list[float]:
        return [float(chance) for chance in judge.prefer(*(list(c) for c in zip(*questions, strict=True)))]

    if unanswered():
        with store.alone(name):
            _ask(store, name, judge, unanswered(), prefer, put)
    scores = {}
    for (key, inside), pairs in chosen.items():
        matrix = np.full((len(inside), len(inside)), np.nan)
        for first, second in pairs.tolist():
            matrix[first, second] = known[key, inside[first], inside[second]]
        scores[key, inside] = judge.score_list(matrix)
    return read.grid(hits, scores)


def fill_rankings(
    root: Path, name: str, judge: ListJudge, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> NDArray[np.float32]:
    """Ask for the rankings that the store lacks, and score every document by its rank.

    A stored ranking that holds all documents of a list answers for it. A list that had no answer is kept
    as NaN scores of its documents. Shapes: hits (Q, K) to scores (Q, K) float32; -inf where there is no candidate,
    NaN below the judge's depth and in a list without an answer.
    """
    read = _Lists.of(judge, queries, documents, hits)
    store = Store.open(root, name, judge.identity)
    tops = {
        (key, inside[: judge.depth]): (query, texts[: judge.depth])
        for (key, inside), (query, texts) in read.lists.items()
        if inside
    }
    known: dict[tuple[int, tuple[int, ...]], NDArray[np.float64]] = {}

    def unanswered() -> dict[tuple[int, tuple[int, ...]], tuple[str, list[str]]]:
        known.update(_ranked(store, list(tops)))
        return {key: question for key, question in tops.items() if key not in known}

    def put(lists: Sequence[tuple[int, tuple[int, ...]]], orders: Sequence[NDArray[np.int64] | None]) -> None:
        ranked = [(key, inside, order) for (key, inside), order in zip(lists, orders, strict=True) if order is not None]
        inside_of = [np.array(inside, np.uint64)[order] for _, inside, order in ranked]
        store.append_rankings(np.array([key for key, _, _ in ranked], np.uint64), inside_of)
        for (key, inside), order in zip(lists, orders, strict=True):
            known[key, inside] = np.full(len(inside), np.nan) if order is None else _ranks(order)
            if order is None:
                keys = np.full(len(inside), key, np.uint64)
                store.append_scores(keys, np.array(inside, np.uint64), np.full(len(inside), np.nan, np.float32))

    def rank(questions: Sequence[tuple[str, list[str]]]) -> list[NDArray[np.int64] | None]:
        return judge.rank([query for query, _ in questions], [texts for _, texts in questions])

    if unanswered():
        with store.alone(name):
            _ask(store, name, judge, unanswered(), rank, put)
    scores = {}
    for key, inside in read.lists:
        ranks = np.full(len(inside), np.nan)
        if inside:
            ranks[: judge.depth] = known[key, inside[: judge.depth]]
        scores[key, inside] = judge.score_ranks(ranks)
    return read.grid(hits, scores)


def _ask(
    store: Store,
    name: str,
    judge: Teacher,
    asked: dict[Any, Any],
    answer: Callable[[Sequence[Any]], Sequence[Any]],
    put: Callable[[Sequence[Any], Sequence[Any]], None],
) -> None:
    """Put questions to a judge, and its answers into the store after every chunk, also of one that it cuts short."""
    keys, size = list(asked), judge.chunk if isinstance(judge, Metered) else CHUNK
    with recording(store, name, judge) as count, progress(f"ask {name}", len(keys)) as advance:
        for start in range(0, len(keys), size):
            chunk, stop = keys[start : start + size], None
            try:
                answers = answer([asked[key] for key in chunk])
            except Interrupted as interruption:
                stop = interruption
                chunk, answers = [chunk[place] for place in stop.places], stop.answers
            if chunk:
                put(chunk, answers)
            count(len(chunk), sum(one is None or bool(np.isnan(one).any()) for one in answers))
            if stop:
                raise stop
            advance(len(chunk))


def _preferences(store: Store, queries: set[int]) -> dict[tuple[int, int, int], float]:
    """The stored preferences of some queries, both ways; of several, one with an answer before NaN, then the oldest."""
    table = store.preferences(np.array(list(queries), np.uint64))
    columns = [table.column(name).to_pylist() for name in ("query_key", "first_key", "second_key", "probability")]
    known: dict[tuple[int, int, int], float] = {}
    for *pair, chance in zip(*columns, strict=True):
        if np.isnan(known.get(tuple(pair), np.nan)):
            known.update(_both_ways([tuple(pair)], [chance]))
    return known


def _both_ways(
    pairs: Sequence[tuple[int, int, int]], chances: Sequence[float]
) -> Iterator[tuple[tuple[int, int, int], float]]:
    for (query, first, second), chance in zip(pairs, chances, strict=True):
        yield (query, first, second), float(chance)
        yield (query, second, first), 1 - float(chance)


def _ranked(
    store: Store, lists: Sequence[tuple[int, tuple[int, ...]]]
) -> dict[tuple[int, tuple[int, ...]], NDArray[np.float64]]:
    """The ranks that the store has for lists, from the oldest ranking that holds them whole; NaN if unanswered."""
    table = store.rankings(np.array(list({query for query, _ in lists}), np.uint64))
    stored: dict[int, list[dict[int, int]]] = {}
    for query, keys in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
        stored.setdefault(query, []).append({key: place for place, key in enumerate(keys)})
    known, others = {}, []
    for query, inside in lists:
        covering = [ranking for ranking in stored.get(query, ()) if set(inside) <= ranking.keys()]
        if covering:
            order = np.argsort([covering[0][document] for document in inside], kind="stable")
            known[query, inside] = _ranks(order)
        else:
            others.append((query, inside))
    pairs = np.array([(query, key) for query, inside in others for key in inside], np.uint64).reshape(-1, 2)
    _, asked = store.find_scores(pairs[:, 0], pairs[:, 1])
    ends = np.cumsum([len(inside) for _, inside in others], dtype=np.int64)
    for (query, inside), end in zip(others, ends, strict=True):
        if asked[end - len(inside) : end].all():
            known[query, inside] = np.full(len(inside), np.nan)
    return known


def _ranks(order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ranks from 1 of the documents of a list, from their order."""
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


def open_comparisons(
    store: Store | None, judge: PairJudge, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> list[tuple[str, str, str]]:
    """The comparisons that `fill_preferences` would ask for: query, first and second document, as the judge reads them.

    Without a store nothing is known yet.
    """
    read = _Lists.of(judge, queries, documents, hits)
    known = _preferences(store, {query for query, _ in read.lists}) if store else {}
    asked: dict[tuple[int, int, int], tuple[str, str, str]] = {}
    for (key, inside), (query, texts) in read.lists.items():
        for first, second in judge.choose_pairs(query, len(texts)).tolist():
            pair = (key, inside[first], inside[second])
            if pair not in known and (key, pair[2], pair[1]) not in asked:
                asked.setdefault(pair, (query, texts[first], texts[second]))
    return list(asked.values())


def open_rankings(
    store: Store | None, judge: ListJudge, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> list[tuple[str, list[str]]]:
    """The lists that `fill_rankings` would have ranked: a query and its best documents, as the judge reads them."""
    read = _Lists.of(judge, queries, documents, hits)
    depth = judge.depth
    tops = {
        (key, inside[:depth]): (query, texts[:depth]) for (key, inside), (query, texts) in read.lists.items() if inside
    }
    known = _ranked(store, list(tops)) if store else {}
    return [question for key, question in tops.items() if key not in known]
