"""Bi-encoders: any Sentence Transformers model, or any transformer with mean pooling.

A trained student is one too, so the same file scores with it, mines with it and evaluates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from retrieval_kd.engines import Engine, EnginePrecision, calibration_pairs, check_engine, engine_identity
from retrieval_kd.tables import Positive, Table
from retrieval_kd.towers import Towers, compile_tower, count_tokens, describe, embed, load_towers
from retrieval_kd.types import Collection, Side


class Options(Table):
    """Which model, and how it reads."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None
    engine: Engine = "torch"
    precision: EnginePrecision = "fp32"  # int8: OpenVINO alone
    batch_size: Positive = 32

    @model_validator(mode="after")
    def _engine_can(self) -> Options:
        check_engine(self.engine, self.precision)
        return self


class BiEncoder:
    """Scores by the similarity that its model declares: dot product, or cosine.

    An int8 model is calibrated on pairs of texts of the collection, each tower on its side of them.
    """

    def __init__(
        self,
        towers: Towers,
        precision: EnginePrecision = "fp32",
        batch_size: int = 32,
        engine: Engine = "torch",
        calibration: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.towers = towers
        self.precision = precision
        self.batch_size = batch_size
        self.engine = engine
        self._calibration = {
            "query": towers.render([query for query, _ in calibration], "query"),
            "document": towers.render([document for _, document in calibration], "document"),
        }
        # Vectors that leave a Normalize module need no second normalisation.
        self._cosine = towers.model.similarity_fn_name == "cosine" and not towers.normalized
        self._describe = cache(lambda side: describe(towers.side(side), precision))  # weights are hashed once
        # One tower for both sides is compiled once, unless each side calibrates it.
        self._compiles = "both" if towers.query is towers.document and precision != "int8" else "each"
        self._compiled = cache(lambda side: compile_tower(towers.side(side), precision, self._calibration[side]))

    @property
    def identity(self) -> dict[str, Any]:
        sides = {side: self.tower_identity(side) for side in ("query", "document")}
        return {"kind": "bi_encoder", **sides}

    def tower_identity(self, side: Side) -> dict[str, Any]:
        engine = engine_identity(self.engine, self.precision, self._calibration[side])
        return {"normalize": self._cosine, **self._describe(side), **engine}

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        return self.towers.render(texts, side)

    def embed(self, texts: Sequence[str], side: Side) -> NDArray[np.float32]:
        if self.engine == "torch":
            vectors = embed(self.towers, texts, side, self.precision, self.batch_size)
        else:
            vectors = self._compiled("document" if self._compiles == "both" else side)(texts, self.batch_size)
        if self._cosine:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        return count_tokens(self.towers, queries, documents)

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
    calibration = calibration_pairs(collection) if options.precision == "int8" else ()
    return BiEncoder(towers, options.precision, options.batch_size, options.engine, calibration)
