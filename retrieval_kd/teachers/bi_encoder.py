"""Bi-encoders: any Sentence Transformers model, or any transformer with mean pooling.

A trained student is one too, so the same file scores with it, mines with it and evaluates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.towers import Side, Towers, describe, embed, load_towers
from retrieval_kd.types import Collection


class Options(Table):
    """Which model, and how it reads."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None
    precision: Precision = "fp32"
    batch_size: Positive = 32


class BiEncoder:
    """Scores by the similarity that its model declares: dot product, or cosine."""

    def __init__(self, towers: Towers, precision: Precision = "fp32", batch_size: int = 32) -> None:
        self.towers = towers
        self.precision = precision
        self.batch_size = batch_size
        # Vectors that leave a Normalize module need no second normalisation.
        self._cosine = towers.model.similarity_fn_name == "cosine" and not towers.normalized
        self._describe = cache(lambda side: describe(towers.side(side), precision))  # weights are hashed once

    @property
    def identity(self) -> dict[str, Any]:
        sides = {side: self.tower_identity(side) for side in ("query", "document")}
        return {"kind": "bi_encoder", **sides}

    def tower_identity(self, side: Side) -> dict[str, Any]:
        return {"normalize": self._cosine, **self._describe(side)}

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        return self.towers.render(texts, side)

    def embed(self, texts: Sequence[str], side: Side) -> NDArray[np.float32]:
        vectors = embed(self.towers, texts, side, self.precision, self.batch_size)
        if self._cosine:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores of pairs; every distinct text is encoded once."""
        query_places = {text: place for place, text in enumerate(dict.fromkeys(queries))}
        document_places = {text: place for place, text in enumerate(dict.fromkeys(documents))}
        query_vectors = self.embed(list(query_places), "query")
        document_vectors = self.embed(list(document_places), "document")
        left = query_vectors[[query_places[text] for text in queries]]
        right = document_vectors[[document_places[text] for text in documents]]
        return np.asarray(np.einsum("nd,nd->n", left, right), np.float32)


def load(options: Options, collection: Collection) -> BiEncoder:
    """Load the model."""
    towers = load_towers(
        options.model, options.revision, options.max_length, options.query_prompt, options.document_prompt
    )
    return BiEncoder(towers, options.precision, options.batch_size)
