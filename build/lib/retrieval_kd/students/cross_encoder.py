"""Cross-encoder students: read query and document together. Train one to make a teacher of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retrieval_kd.gather import encode_sorted
from retrieval_kd.students import Batch, Outputs
from retrieval_kd.tables import Positive, Table
from retrieval_kd.towers import pad, set_dropout
from retrieval_kd.types import Side
from retrieval_kd.weights import locate_model

TEACHER = "cross_encoder"  # the kind that reads a saved student
VECTORS = None  # a text has not one of its own
SEARCHES = False  # it re-ranks and nothing else

Ids = NDArray[np.int32]


class Options(Table):
    """Any transformer; a classification head of one output is added where it has none."""

    model: str
    revision: str | None = None
    max_length: Positive = 256  # tokens of query and document together
    dropout: float | None = Field(default=None, ge=0, lt=1)  # absent: the model's own


class CrossEncoderStudent(nn.Module):
    """A sequence-classification model with one output, the raw relevance logit."""

    frozen_documents = False

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        # The frame that the tokenizer puts around a pair, read off an example: [CLS] a [SEP] b [SEP].
        frame = tokenizer("a", "b")
        inner = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b")]
        ids = frame["input_ids"]
        first = next(i for i in range(len(ids)) if ids[i : i + len(inner[0])] == inner[0])
        second = next(i for i in range(first + len(inner[0]), len(ids)) if ids[i : i + len(inner[1])] == inner[1])
        self._frame = (ids[:first], ids[first + len(inner[0]) : second], ids[second + len(inner[1]) :])
        self._typed = "token_type_ids" in frame

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        limit = self.max_length if side == "document" else self.max_length // 2
        encoded = self.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=limit)
        return list(encoded["input_ids"])

    def forward(self, batch: Batch) -> Outputs:
        """Score every candidate pair; places without a candidate get 0 and no gradient."""
        query_of, place = torch.nonzero(batch.columns >= 0, as_tuple=True)
        rows = batch.columns[query_of, place].tolist()
        pairs = [self._pair(batch.queries[q], batch.documents[d]) for q, d in zip(query_of.tolist(), rows, strict=True)]
        lengths = [len(ids) for ids, _ in pairs]
        scores = encode_sorted(pairs, lengths, self._run, batch.micro_batch_tokens, batch.gradient_caching)
        grid = scores.new_zeros(batch.columns.shape)
        return Outputs(grid.index_put((query_of.to(grid.device), place.to(grid.device)), scores))

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _pair(self, query: Ids, document: Ids) -> tuple[Ids, int]:
        """Token ids of a pair, the document cut to fit, and where the second segment begins."""
        before, between, after = self._frame
        room = self.max_length - len(before) - len(between) - len(after) - len(query)
        ids = [*before, *query, *between, *document[: max(0, room)], *after]
        return np.array(ids, np.int32), len(before) + len(query) + len(between)

    def _run(self, pairs: Sequence[tuple[Ids, int]]) -> Tensor:
        features = pad([ids for ids, _ in pairs], self.tokenizer.pad_token_id or 0, self.model.device)
        if self._typed:
            types = torch.zeros_like(features["input_ids"])
            for number, (ids, second) in enumerate(pairs):
                types[number, second : len(ids)] = 1
            features["token_type_ids"] = types
        return cast(Tensor, self.model(**features).logits[:, 0].float())


def load(options: Options) -> CrossEncoderStudent:
    """Load the model with one output."""
    folder = locate_model(options.model, options.revision)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = options.max_length
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    set_dropout(model, options.dropout)
    return CrossEncoderStudent(model, tokenizer, options.max_length)
