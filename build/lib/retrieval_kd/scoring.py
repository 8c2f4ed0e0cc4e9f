"""Teachers at work through the store: nothing that is stored is computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.answers import Chunk, answer, keep, recording
from retrieval_kd.judgements import fill_preferences, fill_rankings
from retrieval_kd.progress import say
from retrieval_kd.store.keys import first_of_each, text_keys
from retrieval_kd.store.store import Keys, Store
from retrieval_kd.teachers import Archive, Embedder, ListJudge, Metered, PairJudge, Retriever, Teacher
from retrieval_kd.types import SIDES, Hits, InputError, Side
from retrieval_kd.workers import Crew, Work, work_through

PRODUCTS = 2**16  # dot products at once


def fill_scores(
    root: Path,
    name: str,
    teacher: Teacher,
    queries: Sequence[str],
    documents: Sequence[str],
    hits: Hits,
    crew: Crew | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Score all pairs of `hits` that the teacher's store lacks, and return every score, in `out` if it is given.

    Shapes: hits (Q, K) to scores (Q, K) float32; -inf where there is no candidate, NaN where
    the teacher gave no answer. An Embedder's pairs are dot products of its stored vectors; an
    Archive is read when a pair is missing, and what it lacks is no answer.
    The scores of a judge that compares documents are those of `judgements`.
    A `crew` works for a teacher that another process can make: not for those that are metered, or hold a collection.
    """
    grid = np.empty(hits.rows.shape, np.float32) if out is None else out
    if isinstance(teacher, PairJudge):
        grid[:] = fill_preferences(root, name, teacher, queries, documents, hits)
        return grid
    if isinstance(teacher, ListJudge):
        grid[:] = fill_rankings(root, name, teacher, queries, documents, hits)
        return grid
    if isinstance(teacher, Archive | Metered | Retriever):
        crew = None
    texts = teacher.render(queries, "query"), teacher.render(documents, "document")
    keys = text_keys(texts[0]), text_keys(texts[1])
    store = Store.open(root, name, teacher.identity)
    places = store.find_grid(keys[0][: len(hits)], keys[1], hits.rows, grid)
    if len(places):
        pairs = np.stack([places[:, 0], hits.rows[places[:, 0], places[:, 1]]], axis=1)
        with store.alone(name) as lock:
            missing = _missing(store, keys, pairs)
            if isinstance(teacher, Archive) and len(missing):
                counts = teacher.read_into(store)
                say(f"{name}: {', '.join(f'{what} {n:,}' for what, n in counts.items() if n) or 'nothing new'}")
                missing = _missing(store, keys, missing)
            if len(missing):
                if isinstance(teacher, Embedder):
                    _multiply(root, name, teacher, (queries, documents), store, keys, missing, crew)
                else:
                    work_through(store, name, teacher, Work("score", texts, keys, missing), lock, crew)
        grid[places[:, 0], places[:, 1]], _ = store.find_scores(keys[0][pairs[:, 0]], keys[1][pairs[:, 1]])
    return grid


def _missing(store: Store, keys: tuple[Keys, Keys], pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pairs (n, 2) of places that the store has no answer for, one for each distinct pair of keys, in order."""
    left, right = keys[0][pairs[:, 0]], keys[1][pairs[:, 1]]
    _, found = store.find_scores(left, right)
    places = np.flatnonzero(~found)
    return pairs[places[first_of_each(left[places], right[places])]]


def _multiply(
    root: Path,
    name: str,
    teacher: Embedder,
    texts: tuple[Sequence[str], Sequence[str]],
    store: Store,
    keys: tuple[Keys, Keys],
    pairs: NDArray[np.int64],
    crew: Crew | None,
) -> None:
    """Score pairs by the dot products of their texts' vectors."""
    sides = []
    for side, some, places in zip(SIDES, texts, pairs.T, strict=True):
        wanted, at = np.unique(places, return_inverse=True)
        sides.append((fill_vectors(root, name, teacher, [some[place] for place in wanted], side, crew), at))
    (left, left_at), (right, right_at) = sides

    def chunks() -> Iterator[Chunk]:
        for start in range(0, len(pairs), PRODUCTS):
            at = slice(start, start + PRODUCTS)
            yield Chunk((keys[0][pairs[at, 0]], keys[1][pairs[at, 1]]), (left[left_at[at]], right[right_at[at]]))

    with recording(store, name, teacher) as count:
        keep(answer(lambda one, other: np.einsum("nd,nd->n", one, other), chunks()), store.append_scores, count)


def fill_vectors(
    root: Path, name: str, embedder: Embedder, texts: Sequence[str], side: Side, crew: Crew | None = None
) -> NDArray[np.float32]:
    """Encode the texts that the store lacks, and return every vector: (n, D), in the order given.

    Vectors are kept under the identity of the tower that makes them, so that models which share a
    tower (a query student and its document teacher) share its vectors.
    """
    rendered = embedder.render(texts, side)
    keys = text_keys(rendered)
    store = Store.open(root, f"{name}.{side}", embedder.tower_identity(side))
    vectors, found = store.find_embeddings(keys)
    if found.all():
        return vectors
    with store.alone(name) as lock:
        _, found = store.find_embeddings(keys)
        _, first = np.unique(keys[~found], return_index=True)
        places = np.flatnonzero(~found)[np.sort(first)]
        if len(places):
            work = Work("embed", (rendered,), (keys,), places[:, None], (side,))
            work_through(store, name, embedder, work, lock, crew)
    vectors, _ = store.find_embeddings(keys)
    return vectors


def find_preferences(
    root: Path, name: str, teacher: Teacher, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The teacher's stored preferences among the candidates, by their places in the lists.

    Shapes: hits (Q, K) to pairs (Q, P, 2) int32 and probabilities (Q, P) float32 that the first beats the
    second, NaN beyond a query's last. Raises InputError when none is stored.
    """
    query_keys = text_keys(teacher.render(queries, "query"))
    document_keys = text_keys(teacher.render(documents, "document"))
    table = Store.open(root, name, teacher.identity).preferences(query_keys)
    by_query: dict[int, list[tuple[int, int, float]]] = {}
    for query, first, second, chance in zip(*(column.to_pylist() for column in table.columns), strict=True):
        by_query.setdefault(query, []).append((first, second, chance))
    lists = []
    for key, rows in zip(query_keys.tolist(), hits.rows, strict=True):
        place_of = {int(document_keys[row]): place for place, row in enumerate(rows) if row >= 0}
        lists.append(
            [
                (place_of[first], place_of[second], chance)
                for first, second, chance in by_query.get(key, ())
                if first in place_of and second in place_of and not np.isnan(chance)  # NaN: asked in vain
            ]
        )
    width = max(map(len, lists), default=0)
    if not width:
        raise InputError(
            f"teacher {name!r} has no stored preference among the candidates; import or ask for them first."
        )
    pairs = np.zeros((len(lists), width, 2), np.int32)
    chances = np.full((len(lists), width), np.nan, np.float32)
    for number, found in enumerate(lists):
        for place, (first, second, chance) in enumerate(found):
            pairs[number, place], chances[number, place] = (first, second), chance
    return pairs, chances


def retrieve(root: Path, name: str, teacher: Teacher, queries: Sequence[str], documents: Sequence[str], k: int) -> Hits:
    """The `k` best documents of each query by a teacher that can search."""
    if isinstance(teacher, Embedder):
        left = fill_vectors(root, name, teacher, queries, "query")
        right = fill_vectors(root, name, teacher, documents, "document")
        scores, rows = faiss.knn(left, right, min(k, len(documents)), metric=faiss.METRIC_INNER_PRODUCT)
        return Hits(rows.astype(np.int32), scores)
    if isinstance(teacher, Retriever):
        return teacher.retrieve(teacher.render(queries, "query"), k)
    raise InputError(f"teacher {name!r} cannot search a collection; give it candidates from bm25 or a bi_encoder.")


def rerank(hits: Hits, scores: NDArray[np.float32]) -> Hits:
    """The candidates of `hits` in the order of `scores` (Q, K); unscored ones are left out."""
    scores = np.where(hits.valid & np.isfinite(scores), scores, -np.inf).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=1)
    rows = np.where(np.isfinite(ordered), np.take_along_axis(hits.rows, order, axis=1), -1)
    return Hits(rows.astype(np.int32), ordered)
