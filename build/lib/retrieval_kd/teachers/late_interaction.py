"""Late-interaction models: ColBERT and its like, scored by MaxSim of token vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.token_vectors import describe_token_encoder, load_token_encoder, set_query_length
from retrieval_kd.towers import autocast
from retrieval_kd.types import Collection, InputError, Side


class Options(Table):
    """Which model, and how it reads: a MultiVectorEncoder, a PyLate model, or a Stanford ColBERT checkpoint."""

    model: str
    revision: str | None = None
    query_length: Positive | None = None  # tokens; with expansion, exactly so many; absent: the model's own
    document_length: Positive | None = None
    query_prompt: str | None = None  # absent: the one saved with the model, its marker included
    document_prompt: str | None = None
    precision: Precision = "fp32"
    batch_size: Positive = 32


class LateInteraction:
    """Scores by MaxSim, or by its mean over the query's tokens where the model declares that."""

    def __init__(self, model: Any, precision: Precision = "fp32", batch_size: int = 32) -> None:
        self.model = model
        self.precision = precision
        self.batch_size = batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {"kind": "late_interaction", **describe_token_encoder(self.model, self.precision)}

    def render(self, texts: Sequence[str], side: Side) -> list[str]:
        return [self.model.prompts[side] + text for text in texts]

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        first, count = self.model[0], 0
        sides = ((queries, first.query_length, first.query_expansion), (documents, first.document_length, None))
        for texts, limit, expansion in sides:
            distinct = list(dict.fromkeys(texts))
            if not distinct:
                continue
            least = int(expansion["length"]) if expansion else 0  # they are filled up
            if expansion and (limit or expansion["strategy"] == "fixed"):
                limit = max(limit or 0, least) if expansion["strategy"] == "min" else least
            tokens = first.tokenizer(distinct, truncation=True, max_length=limit or first.max_seq_length)
            count += sum(max(least, len(ids)) for ids in tokens["input_ids"])
        return count

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores of pairs; every distinct text is encoded once."""
        query_vectors = self._encode(queries, "query")
        document_vectors = self._encode(documents, "document")
        left, right = [query_vectors[text] for text in queries], [document_vectors[text] for text in documents]
        return np.asarray(self.model.similarity_pairwise(left, right).numpy(), np.float32)

    def _encode(self, texts: Sequence[str], side: Side) -> dict[str, Any]:
        """Token vectors (L, D) float32 of each distinct text, those that are scored."""
        distinct = list(dict.fromkeys(texts))
        with autocast(self.precision):
            vectors = self.model.encode(
                distinct, prompt="", task=side, batch_size=self.batch_size, show_progress_bar=False
            )
        return dict(zip(distinct, (matrix.float() for matrix in vectors), strict=True))


def load(options: Options, collection: Collection) -> LateInteraction:
    """Load the model."""
    model, projects = load_token_encoder(options.model, options.revision, options.query_prompt, options.document_prompt)
    if not projects:
        raise InputError(
            f"model {options.model!r} has no projection of token vectors: it was not trained for late interaction; "
            "train a late_interaction student from it first."
        )
    set_query_length(model, options.query_length)
    if options.document_length is not None:
        model[0].document_length = options.document_length
    return LateInteraction(model, options.precision, options.batch_size)
