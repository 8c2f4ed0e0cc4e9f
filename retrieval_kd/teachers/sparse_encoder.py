"""Sparse encoders: any Sentence Transformers SparseEncoder, SPLADE or inference-free, scored by sparse dot products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from numpy.typing import NDArray
from sentence_transformers import SparseEncoder as Model

from retrieval_kd.files import read_json
from retrieval_kd.gather import batches
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
        if not len(queries):
            return np.zeros(0, np.float32)
        vectors: list[Any] = []
        sides: tuple[tuple[Sequence[str], Side], ...] = ((queries, "query"), (documents, "document"))
        for texts, side in sides:
            distinct, places = np.unique(np.array(texts, object), return_inverse=True)
            vectors.append(self._encode(distinct.tolist(), side)[places])
        left, right = vectors
        return np.asarray(left.multiply(right).sum(axis=1), np.float32)

    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        k = min(k, len(self.collection))
        rows, scores = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -np.inf, np.float32)
        if not rows.size:
            return Hits(rows, scores)
        vectors = self._encode(queries, "query")
        for place in range(len(queries)):
            products = (self._documents @ vectors[[place]].T).toarray()[:, 0].astype(np.float32)
            order = np.argsort(-products, kind="stable")[:k]  # ties by row
            order = order[products[order] > 0]  # the others share no term with the query
            rows[place, : len(order)], scores[place, : len(order)] = order, products[order]
        return Hits(rows, scores)

    @cached_property
    def _documents(self) -> Any:
        """All documents of the collection: (N, V)."""
        texts = self.render(self.collection.documents, "document")
        pieces = []
        with progress("encode documents", len(texts)) as advance:
            for start in range(0, len(texts), CHUNK):
                pieces.append(self._encode(texts[start : start + CHUNK], "document"))
                advance(len(texts[start : start + CHUNK]))
        return scipy.sparse.vstack(pieces, format="csr")

    def _encode(self, texts: Sequence[str], side: Side) -> Any:
        """Vectors (n, V) of texts: csr_array float64, so that sums do not depend on who is summed with whom.

        Texts of similar length are encoded together; vectors are of unit length if similarity is cosine.
        """
        lengths = [len(ids) for ids in tokenize(self.towers.side(side), texts)]
        batched = list(batches(lengths, self.batch_tokens))
        pieces = [self._encode_batch([texts[place] for place in places], side) for places in batched]
        return scipy.sparse.vstack(pieces, format="csr")[np.argsort(np.concatenate(batched))]

    def _encode_batch(self, texts: Sequence[str], side: Side) -> Any:
        with autocast(self.precision):
            found: Any = self.towers.model.encode(
                list(texts), prompt="", task=side, batch_size=len(texts), show_progress_bar=False
            )
        found = found.coalesce()
        vectors = scipy.sparse.csr_array((found.values().double().numpy(), found.indices().numpy()), found.shape)
        if self.towers.model.similarity_fn_name == "cosine":
            norms = np.maximum(scipy.sparse.linalg.norm(vectors, axis=1), 1e-12)
            vectors = scipy.sparse.diags_array(1 / norms) @ vectors
        return vectors


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
