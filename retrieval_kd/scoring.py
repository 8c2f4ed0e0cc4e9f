"""Teachers at work through the store: nothing that is stored is computed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.judgements import fill_preferences, fill_rankings, recording
from retrieval_kd.progress import progress, say
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.teachers import Archive, Embedder, ListJudge, Metered, PairJudge, Retriever, Side, Teacher
from retrieval_kd.types import Hits, InputError
from retrieval_kd.usage import Interrupted

CHUNK = 512  # texts or pairs that a teacher gets at once
COMMIT_SECONDS = 5.0  # a killed run loses at most this much work, or one chunk


def fill_scores(
    root: Path, name: str, teacher: Teacher, queries: Sequence[str], documents: Sequence[str], hits: Hits
) -> NDArray[np.float32]:
    """Score all pairs of `hits` that the teacher's store lacks, and return every score.

    Shapes: hits (Q, K) to scores (Q, K) float32; -inf where there is no candidate, NaN where
    the teacher gave no answer. An Embedder's pairs are dot products of its stored vectors; an
    Archive is read when a pair is missing, and what it lacks is no answer.
    The scores of a judge that compares documents are those of `judgements`.
    """
    if isinstance(teacher, PairJudge):
        return fill_preferences(root, name, teacher, queries, documents, hits)
    if isinstance(teacher, ListJudge):
        return fill_rankings(root, name, teacher, queries, documents, hits)
    rendered_queries = teacher.render(queries, "query")
    rendered_documents = teacher.render(documents, "document")
    query_keys, document_keys = text_keys(rendered_queries), text_keys(rendered_documents)
    query_of, place = np.nonzero(hits.valid)  # (P,) each
    row_of = hits.rows[query_of, place]
    store = Store.open(root, name, teacher.identity)
    _, found = store.find_scores(query_keys[query_of], document_keys[row_of])
    if isinstance(teacher, Archive) and not found.all():
        counts = teacher.read_into(store)
        say(f"{name}: {', '.join(f'{what} {count:,}' for what, count in counts.items() if count) or 'nothing new'}")
        known, found = store.find_scores(query_keys[query_of], document_keys[row_of])
        say(f"{name}: {np.isfinite(known).sum():,} of {len(known):,} candidate pairs have a score")
    missing = _first_of_each(query_keys[query_of], document_keys[row_of], ~found)
    if isinstance(teacher, Embedder) and len(missing):
        wanted_queries, wanted_rows = np.unique(query_of[missing]), np.unique(row_of[missing])
        left = fill_vectors(root, name, teacher, [queries[i] for i in wanted_queries], "query")
        right = fill_vectors(root, name, teacher, [documents[i] for i in wanted_rows], "document")
    committed = time.monotonic()
    waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def commit() -> None:
        pairs = np.concatenate([pairs for pairs, _ in waiting])
        scores = np.concatenate([scores for _, scores in waiting])
        store.append_scores(query_keys[query_of[pairs]], document_keys[row_of[pairs]], scores)
        waiting.clear()

    with recording(store, name, teacher) as count, progress(f"score {name}", len(missing)) as advance:
        size = teacher.chunk if isinstance(teacher, Metered) else CHUNK
        size = 100 * CHUNK if isinstance(teacher, Embedder) else size
        stop = None
        for start in range(0, len(missing), size):
            pairs = missing[start : start + size]
            if isinstance(teacher, Embedder):
                places = (
                    np.searchsorted(wanted_queries, query_of[pairs]),
                    np.searchsorted(wanted_rows, row_of[pairs]),
                )
                scores = np.einsum("nd,nd->n", left[places[0]], right[places[1]])
            else:
                try:
                    scores = teacher.score(
                        [rendered_queries[i] for i in query_of[pairs]], [rendered_documents[i] for i in row_of[pairs]]
                    )
                except Interrupted as interruption:  # what it answered is kept
                    stop = interruption
                    pairs, scores = pairs[list(stop.places)], np.asarray(stop.answers, np.float32)
            waiting.append((pairs, scores))
            count(len(pairs), int(np.isnan(scores).sum()))
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit()
                committed = time.monotonic()
            if stop:
                break
            advance(len(pairs))
        if waiting:
            commit()
        if stop:
            raise stop
    scores, _ = store.find_scores(query_keys[query_of], document_keys[row_of])
    grid = np.full(hits.rows.shape, -np.inf, np.float32)
    grid[query_of, place] = scores
    return grid


def fill_vectors(root: Path, name: str, embedder: Embedder, texts: Sequence[str], side: Side) -> NDArray[np.float32]:
    """Encode the texts that the store lacks, and return every vector: (n, D), in the order given.

    Vectors are kept under the identity of the tower that makes them, so that models which share a
    tower (a query student and its document teacher) share its vectors.
    """
    rendered = embedder.render(texts, side)
    keys = text_keys(rendered)
    store = Store.open(root, f"{name}.{side}", embedder.tower_identity(side))
    _, found = store.find_embeddings(keys)
    missing = _first_of_each(keys, np.zeros_like(keys), ~found)
    missing = missing[np.argsort([-len(rendered[i]) for i in missing], kind="stable")]  # little padding
    began = committed = time.monotonic()
    waiting: list[tuple[NDArray[np.uint64], NDArray[np.float32]]] = []

    def commit() -> None:
        store.append_embeddings(
            np.concatenate([keys for keys, _ in waiting]), np.concatenate([vectors for _, vectors in waiting])
        )
        waiting.clear()

    with progress(f"encode {side} {name}", len(missing)) as advance:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            waiting.append((keys[chunk], embedder.embed([rendered[i] for i in chunk], side)))
            if time.monotonic() - committed > COMMIT_SECONDS:
                commit()
                committed = time.monotonic()
            advance(len(chunk))
        if waiting:
            commit()
    if len(missing):
        store.record(pairs=0, texts=len(missing), tokens=None, seconds=time.monotonic() - began)
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
    table = Store.open(root, name, teacher.identity).preferences()
    columns = [table.column(column).to_numpy() for column in ("query_key", "first_key", "second_key", "probability")]
    by_query: dict[int, list[tuple[int, int, float]]] = {}
    for query, first, second, chance in zip(*(column.tolist() for column in columns), strict=True):
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


def _first_of_each(left: NDArray[np.uint64], right: NDArray[np.uint64], wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions of the wanted key pairs, each distinct pair once, in the order of first occurrence."""
    positions = np.flatnonzero(wanted)
    pairs = np.stack([left[positions], right[positions]], axis=1)
    _, first = np.unique(pairs, axis=0, return_index=True)
    return positions[np.sort(first)]
