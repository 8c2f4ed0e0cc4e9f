"""Sparse encoders: any Sentence Transformers SparseEncoder, SPLADE or inference-free, scored by sparse dot products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray

from retrieval_kd.progress import progress
from retrieval_kd.sparse_towers import BATCH_TOKENS, encode_sparse, has_head, sparse_form
from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.towers import Towers, count_tokens, describe, load_towers
from retrieval_kd.types import Collection, Hits, InputError, Side
from retrieval_kd.weights import locate_model


class Options(Table):
    """Which model, and how it reads."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None
    precision: Precision = "fp32"
    batch_tokens: Positive = BATCH_TOKENS  # padding included; each token has a logit for every word of the vocabulary


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
        left, right = self._encode_once(queries, "query"), self._encode_once(documents, "document")
        return np.asarray(left.multiply(right).sum(axis=1), np.float32)

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        k = min(k, len(self.collection))
        hits = Hits.none(len(queries), k)
        if not hits.rows.size:
            return hits
        vectors = self._encode(queries, "query")
        for place in range(len(queries)):
            products = (vectors[[place]] @ self._documents).toarray()[0].astype(np.float32)
            order = np.argsort(-products, kind="stable")[:k]  # ties by row
            order = order[products[order] > 0]  # the others share no term with the query
            hits.rows[place, : len(order)], hits.scores[place, : len(order)] = order, products[order]
        return hits

    @cached_property
    def _documents(self) -> Any:
        """All documents of the collection by term: (V, N), so that a query walks the lists of its own terms alone."""
        texts = self.render(self.collection.documents, "document")
        with progress("encode documents", len(set(texts))) as advance:
            return self._encode_once(texts, "document", advance).T.tocsr()

    def _encode_once(self, texts: Sequence[str], side: Side, advance: Callable[[int], object] = int) -> Any:
        """As `_encode`; a text that comes twice has one vector, whoever it is batched with, so that its scores tie."""
        distinct, places = np.unique(np.array(texts, object), return_inverse=True)
        return self._encode(distinct.tolist(), side, advance)[places]

    def _encode(self, texts: Sequence[str], side: Side, advance: Callable[[int], object] = int) -> Any:
        """Vectors (n, V) of texts: csr_array float64, so that sums do not depend on who is summed with whom.

        They are of unit length if similarity is cosine.
        """
        found = encode_sparse(self.towers, texts, side, self.precision, self.batch_tokens, advance).astype(np.float64)
        if self.towers.model.similarity_fn_name != "cosine":
            return found
        return scipy.sparse.diags_array(1 / np.maximum(scipy.sparse.linalg.norm(found, axis=1), 1e-12)) @ found


def load(options: Options, collection: Collection) -> SparseEncoder:
    """Load the model; a language model without modules of its own is a SPLADE with max pooling.

    Raises InputError for a model whose sparse head would be a random one, and for a similarity that no sparse
    product gives.
    """
    folder = locate_model(options.model, options.revision)
    if not (folder / "modules.json").exists() and not has_head(folder):
        raise InputError(
            f"model {options.model!r} is no sparse encoder, and has no language model's head to be one; train it first."
        )
    prompts = options.query_prompt, options.document_prompt
    towers = load_towers(options.model, options.revision, options.max_length, *prompts, sparse_form(folder))
    if towers.model.similarity_fn_name not in ("dot", "cosine"):
        raise InputError(
            f"model {options.model!r} declares similarity {towers.model.similarity_fn_name!r}; a sparse_encoder "
            "teacher scores by dot product or cosine."
        )
    return SparseEncoder(towers, collection, options.precision, options.batch_tokens)
