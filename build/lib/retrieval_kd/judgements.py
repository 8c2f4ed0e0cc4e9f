"""Judges that compare documents, at work through the store: what they said is kept, and scores are made of it.

A judge sees the candidates of a query in the order of their scores: in training lists judged positives come
first, and a judge that leans towards the beginning of a list would find them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.answers import Chunk, answer, keep, recording
from retrieval_kd.progress import progress
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Keys, Store
from retrieval_kd.teachers import ListJudge, Metered, PairJudge, Teacher
from retrieval_kd.types import Hits
from retrieval_kd.usage import Interrupted

CHUNK = 64  # questions that a judge gets at once, unless it says how many

_List = tuple[int, tuple[int, ...]]  # keys of a query and of its documents, best first
_Pair = tuple[int, int, int]  # keys of a query and of two documents


@dataclass(frozen=True)
class _Lists:
    """The candidates of every query as texts that the judge reads; each distinct list stands once.

    `lists` maps the key of a query and those of its documents to their texts; `keys[i]` is that of query i.
    """

    lists: dict[_List, tuple[str, list[str]]]
    keys: list[_List]
    document_keys: Keys

    @classmethod
    def of(cls, judge: Teacher, queries: Sequence[str], documents: Sequence[str], hits: Hits) -> _Lists:
        rendered, texts = judge.render(queries, "query"), judge.render(documents, "document")
        query_keys, document_keys = text_keys(rendered).tolist(), text_keys(texts)
        lists: dict[_List, tuple[str, list[str]]] = {}
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

    def grid(self, hits: Hits, scores: dict[_List, NDArray[np.float32]]) -> NDArray[np.float32]:
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
    chosen = _chosen(judge, read)
    known = _preferences(store, read)
    if _open_pairs(read, chosen, known):
        with store.alone(name):
            _compare(store, name, judge, _open_pairs(read, chosen, _preferences(store, read)))
        known = _preferences(store, read)
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
    tops = _tops(judge, read)
    known = _ranked(store, tops)
    if tops.keys() - known.keys():
        with store.alone(name):
            known = _ranked(store, tops)
            _rank(store, name, judge, {key: question for key, question in tops.items() if key not in known})
        known = _ranked(store, tops)
    scores = {}
    for key, inside in read.lists:
        ranks = np.full(len(inside), np.nan)
        if inside:
            ranks[: judge.depth] = known[key, inside[: judge.depth]]
        scores[key, inside] = judge.score_ranks(ranks)
    return read.grid(hits, scores)


def _chosen(judge: PairJudge, read: _Lists) -> dict[_List, NDArray[np.int64]]:
    """The pairs (P, 2) of places that are asked of each list."""
    return {key: judge.choose_pairs(query, len(texts)) for key, (query, texts) in read.lists.items()}


def _open_pairs(
    read: _Lists, chosen: Mapping[_List, NDArray[np.int64]], known: Mapping[_Pair, float]
) -> dict[_Pair, tuple[str, str, str]]:
    """The chosen pairs that are not known, each once, whichever stands first: query, first and second document."""
    asked: dict[_Pair, tuple[str, str, str]] = {}
    for (key, inside), (query, texts) in read.lists.items():
        for first, second in chosen[key, inside].tolist():
            pair = (key, inside[first], inside[second])
            if pair not in known and (key, pair[2], pair[1]) not in asked:
                asked.setdefault(pair, (query, texts[first], texts[second]))
    return asked


def _tops(judge: ListJudge, read: _Lists) -> dict[_List, tuple[str, list[str]]]:
    """The lists that are ranked: the best documents of each."""
    return {
        (key, inside[: judge.depth]): (query, texts[: judge.depth])
        for (key, inside), (query, texts) in read.lists.items()
        if inside
    }


def _compare(store: Store, name: str, judge: PairJudge, asked: Mapping[_Pair, tuple[str, str, str]]) -> None:
    """Ask for preferences, and keep them as they come."""
    keys, questions = np.array(list(asked), np.uint64).reshape(-1, 3), list(asked.values())
    size = _size(judge)
    chunks = (
        Chunk(tuple(keys[start : start + size].T), tuple(map(list, zip(*questions[start : start + size], strict=True))))
        for start in range(0, len(keys), size)
    )
    with recording(store, name, judge) as count, progress(f"ask {name}", len(keys)) as advance:

        def note(answered: int, silent: int) -> None:
            count(answered, silent)
            advance(answered)

        keep(answer(judge.prefer, chunks), store.append_preferences, note)


def _rank(store: Store, name: str, judge: ListJudge, asked: Mapping[_List, tuple[str, list[str]]]) -> None:
    """Ask for rankings, and keep them after every chunk, also of one that the judge cuts short."""
    lists, size = list(asked), _size(judge)
    with recording(store, name, judge) as count, progress(f"ask {name}", len(lists)) as advance:
        for start in range(0, len(lists), size):
            chunk, stop = lists[start : start + size], None
            try:
                orders = judge.rank([asked[key][0] for key in chunk], [asked[key][1] for key in chunk])
            except Interrupted as interruption:
                stop = interruption
                chunk, orders = [chunk[place] for place in stop.places], stop.answers
            silent = [key for key, order in zip(chunk, orders, strict=True) if order is None]
            ranked = [(*key, order) for key, order in zip(chunk, orders, strict=True) if order is not None]
            inside_of = [np.array(inside, np.uint64)[order] for _, inside, order in ranked]
            store.append_rankings(np.array([query for query, _, _ in ranked], np.uint64), inside_of)
            pairs = _pairs_of(silent)
            store.append_scores(pairs[:, 0], pairs[:, 1], np.full(len(pairs), np.nan, np.float32))
            count(len(chunk), len(silent))
            if stop:
                raise stop
            advance(len(chunk))


def _size(judge: Teacher) -> int:
    return judge.chunk if isinstance(judge, Metered) else CHUNK


def _pairs_of(lists: Sequence[_List]) -> Keys:
    """The keys (n, 2) of the query and each document of lists, one list after another."""
    return np.array([(query, key) for query, inside in lists for key in inside], np.uint64).reshape(-1, 2)


def _preferences(store: Store, read: _Lists) -> dict[_Pair, float]:
    """The stored preferences of some queries, both ways; of several, one with an answer before NaN, then the oldest."""
    table = store.preferences(np.array(list({query for query, _ in read.lists}), np.uint64))
    columns = [table.column(name).to_pylist() for name in ("query_key", "first_key", "second_key", "probability")]
    known: dict[_Pair, float] = {}
    for query, first, second, chance in zip(*columns, strict=True):
        if np.isnan(known.get((query, first, second), np.nan)):
            known[query, first, second], known[query, second, first] = chance, 1 - chance
    return known


def _ranked(store: Store, lists: Iterable[_List]) -> dict[_List, NDArray[np.float64]]:
    """The ranks that the store has for lists, from the oldest ranking that holds them whole; NaN if unanswered."""
    table = store.rankings(np.array(list({query for query, _ in lists}), np.uint64))
    stored: dict[int, list[dict[int, int]]] = {}
    for query, keys in zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True):
        stored.setdefault(query, []).append({key: place for place, key in enumerate(keys)})
    known: dict[_List, NDArray[np.float64]] = {}
    others: list[_List] = []
    for query, inside in lists:
        covering = [ranking for ranking in stored.get(query, ()) if set(inside) <= ranking.keys()]
        if covering:
            order = np.argsort([covering[0][document] for document in inside], kind="stable")
            known[query, inside] = _ranks(order)
        else:
            others.append((query, inside))
    pairs = _pairs_of(others)
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
    return list(_open_pairs(read, _chosen(judge, read), _preferences(store, read) if store else {}).values())


def open_rankings(
    store: Store | None, judge: ListJudge, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> list[tuple[str, list[str]]]:
    """The lists that `fill_rankings` would have ranked: a query and its best documents, as the judge reads them."""
    tops = _tops(judge, _Lists.of(judge, queries, documents, hits))
    known = _ranked(store, tops) if store else {}
    return [question for key, question in tops.items() if key not in known]
