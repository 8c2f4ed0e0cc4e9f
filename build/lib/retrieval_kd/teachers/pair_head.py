"""Bi-encoders with a learned head over pairs of vectors: trained pair_head students."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval_kd.pair_head import PairHead, load_head, load_pair_encoder
from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.towers import Towers, count_tokens, describe, embed
from retrieval_kd.types import Collection, Side
from retrieval_kd.weights import hash_weights, locate_model

CHUNK = 1024  # pairs that the head reads at once


class Options(Table):
    """Which saved student, and how it reads."""

    model: str
    revision: str | None = None
    max_length: Positive | None = None  # tokens; absent: the model's own
    query_prompt: str | None = None  # absent: the one saved with the model
    document_prompt: str | None = None
    precision: Precision = "fp32"
    batch_size: Positive = 32


class PairHeadScorer:
    """Scores by what the head makes of two vectors."""

    def __init__(self, towers: Towers, head: PairHead, precision: Precision = "fp32", batch_size: int = 32) -> None:
        self.towers = towers
        self.head = head
        self.precision = precision
        self.batch_size = batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        head = {**self.head.settings, "weights": hash_weights(self.head)}
        return {"kind": "pair_head", "encoder": describe(self.towers.query, self.precision), "head": head}

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        return self.towers.render(texts, side)

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        return count_tokens(self.towers, queries, documents)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores of pairs; every distinct text is encoded once."""
        query_vectors, query_places = self._encode(queries, "query")
        document_vectors, document_places = self._encode(documents, "document")
        scores = []
        with torch.inference_mode():
            for start in range(0, len(queries), CHUNK):
                left = query_vectors[query_places[start : start + CHUNK]]
                right = document_vectors[document_places[start : start + CHUNK]]
                scores.append(self.head(left, right).numpy())
        return np.concatenate(scores)

    def _encode(self, texts: Sequence[str], side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of the distinct texts, and each text's place among them."""
        place_of = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        vectors = embed(self.towers, list(place_of), side, self.precision, self.batch_size)
        return torch.from_numpy(vectors), torch.tensor([place_of[text] for text in texts])


def load(options: Options, collection: Collection) -> PairHeadScorer:
    """Load the encoder and the head."""
    folder = locate_model(options.model, options.revision)
    head = load_head(folder)
    towers = load_pair_encoder(folder, options.max_length, options.query_prompt, options.document_prompt)
    return PairHeadScorer(towers, head, options.precision, options.batch_size)
