"""Sparse encoders: any Sentence Transformers SparseEncoder, SPLADE or inference-free, scored by sparse dot products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder as Model

from retrieval_kd.files import read_json
from retrieval_kd.progress import progress
from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.towers import Side, Towers, autocast, count_tokens, describe, load_towers, tokenize
from retrieval_kd.types import Collection, Hits, InputError
from retrieval_kd.weights import locate_model

CHUNK = 1024  # documents encoded between two looks at the progress


class Options(Table):
    """Which model, and how it reads."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None
    precision: Precision = "fp32"
    batch_tokens: Positive = 2048  # padding included; each token has a logit for every word of the vocabulary


@dataclass(frozen=True)
class Vectors:
    """Sparse vectors of n texts: the non-zero weights of one after those of the other, by rising term."""

    starts: NDArray[np.int64]  # (n + 1,)
    terms: NDArray[np.int32]
    weights: NDArray[np.float32]

    def __getitem__(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        inside = slice(self.starts[place], self.starts[place + 1])
        return self.terms[inside], self.weights[inside]


class SparseEncoder:
    """Scores by the similarity that its model declares, dot product or cosine, over the terms that two texts share.

    It can search the collection too: exactly, over documents that are encoded once in a process, and kept in memory.
    """

    def __init__(self, towers: Towers, collection: Collection, precision: Precision, batch_tokens: int) -> None:
        self.towers = towers
        self.collection = collection
        self.precision = precision
        self.batch_tokens = batch_tokens

    @cached_property
    def identity(self) -> dict[str, Any]:
        model = self.towers.model
        sides = {side: describe(self.towers.side(side), self.precision) for side in ("query", "document")}
        similarity = {"similarity": model.similarity_fn_name, "max_active_dims": model.max_active_dims}
        return {"kind": "sparse_encoder", **sides, **similarity}

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        return self.towers.render(texts, side)

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        return count_tokens(self.towers, queries, documents)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores of pairs; every distinct text is encoded once."""
        places = [{text: place for place, text in enumerate(dict.fromkeys(texts))} for texts in (queries, documents)]
        left, right = self._encode(list(places[0]), "query"), _Inverted(self._encode(list(places[1]), "document"))
        grid: dict[int, NDArray[np.float32]] = {}
        asked = [places[0][query] for query in queries]
        for place in set(asked):
            grid[place] = right.products(*left[place])
        rows = [places[1][document] for document in documents]
        return np.array([grid[place][row] for place, row in zip(asked, rows, strict=True)], np.float32)

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        vectors, count = self._encode(queries, "query"), len(self.collection)
        k = min(k, count)
        rows, scores = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
        for place in range(len(queries)):
            products = self._documents.products(*vectors[place])
            order = np.argsort(-products, kind="stable")[:k]  # ties by row
            order = order[products[order] > 0]  # the others share no term with the query
            rows[place, : len(order)], scores[place, : len(order)] = order, products[order]
        return Hits(rows, scores)

    @cached_property
    def _documents(self) -> _Inverted:
        """All documents of the collection, by term."""
        texts = self.render(self.collection.documents, "document")
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        pieces = []
        with progress("encode documents", len(texts)) as advance:
            for start in range(0, len(texts), CHUNK):
                chunk = order[start : start + CHUNK]
                pieces.append(self._encode([texts[place] for place in chunk], "document"))
                advance(len(chunk))
        return _Inverted(_join(pieces), np.array(order, np.int64))

    def _encode(self, texts: Sequence[str], side: Side) -> Vectors:
        """Encode texts in batches of similar length, in the order given; of unit length if similarity is cosine."""
        lengths = [len(ids) for ids in tokenize(self.towers.side(side), texts)] if texts else []
        order = sorted(range(len(texts)), key=lambda place: -lengths[place])
        pieces, start = [], 0
        while start < len(order):
            batch = order[start : start + max(1, self.batch_tokens // max(1, lengths[order[start]]))]
            pieces.append(self._encode_batch([texts[place] for place in batch], side))
            start += len(batch)
        return _reorder(_join(pieces), np.array(order, np.int64))

    def _encode_batch(self, texts: Sequence[str], side: Side) -> Vectors:
        with autocast(self.precision):
            found: Any = self.towers.model.encode(
                list(texts), prompt="", task=side, batch_size=len(texts), show_progress_bar=False
            )
        found = found.coalesce()
        rows, terms = found.indices().numpy()
        weights = found.values().float().numpy()
        if self.towers.model.similarity_fn_name == "cosine":
            norms = np.sqrt(np.bincount(rows, weights.astype(np.float64) ** 2, len(texts)))
            weights = (weights / np.maximum(norms[rows], 1e-12)).astype(np.float32)
        starts = np.searchsorted(rows, np.arange(len(texts) + 1))
        return Vectors(starts, terms.astype(np.int32), weights)


class _Inverted:
    """Vectors by term; `rows` are the numbers of their texts, where these are not in order."""

    def __init__(self, vectors: Vectors, rows: NDArray[np.int64] | None = None) -> None:
        self.count = len(vectors.starts) - 1
        numbers = np.arange(self.count) if rows is None else rows
        texts = np.repeat(numbers, np.diff(vectors.starts))
        order = np.lexsort((texts, vectors.terms))
        self._texts, self._weights = texts[order], vectors.weights[order]
        self._terms, self._starts = np.unique(vectors.terms[order], return_index=True)
        self._ends = np.append(self._starts[1:], len(order))

    def products(self, terms: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Dot products (n,) of every text with a vector."""
        sums = np.zeros(self.count)
        places = np.searchsorted(self._terms, terms)
        for term, place, weight in zip(terms, places, weights, strict=True):
            if place < len(self._terms) and self._terms[place] == term:
                inside = slice(self._starts[place], self._ends[place])
                sums[self._texts[inside]] += np.float64(weight) * self._weights[inside]
        return sums.astype(np.float32)


def _join(pieces: Sequence[Vectors]) -> Vectors:
    """The texts of all pieces, one after the other."""
    counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(piece.starts) for piece in pieces)])
    terms = np.concatenate([np.zeros(0, np.int32), *(piece.terms for piece in pieces)])
    return Vectors(np.cumsum(counts), terms, np.concatenate([np.zeros(0, np.float32), *(p.weights for p in pieces)]))


def _reorder(vectors: Vectors, order: NDArray[np.int64]) -> Vectors:
    """The vectors whose texts are numbered by `order`, in the order of these numbers."""
    counts = np.diff(vectors.starts)
    places = np.argsort(order)
    inside = [np.arange(vectors.starts[place], vectors.starts[place + 1]) for place in places]
    kept = np.concatenate([np.zeros(0, np.int64), *inside])
    starts = np.concatenate([[0], np.cumsum(counts[places])]).astype(np.int64)
    return Vectors(starts, vectors.terms[kept], vectors.weights[kept])


def load(options: Options, collection: Collection) -> SparseEncoder:
    """Load the model; a masked language model without modules of its own is a SPLADE with max pooling.

    Raises InputError for a model whose sparse head would be a random one, and for a similarity that no sparse
    product gives.
    """
    folder = locate_model(options.model, options.revision)
    if not (folder / "modules.json").exists():
        architectures = read_json(folder / "config.json").get("architectures") or ["none"]
        if not architectures[0].endswith("ForMaskedLM"):
            raise InputError(
                f"model {options.model!r} ({architectures[0]}) is no sparse encoder, and has no language model's head "
                "to be one; train it first."
            )
    towers = load_towers(
        options.model, options.revision, options.max_length, options.query_prompt, options.document_prompt, Model
    )
    if towers.model.similarity_fn_name not in ("dot", "cosine"):
        raise InputError(
            f"model {options.model!r} declares similarity {towers.model.similarity_fn_name!r}; a sparse_encoder "
            "teacher scores by dot product or cosine."
        )
    return SparseEncoder(towers, collection, options.precision, options.batch_tokens)
