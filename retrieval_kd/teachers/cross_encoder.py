"""Cross-encoders: any sequence-classification model of transformers, or a Sentence Transformers CrossEncoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retrieval_kd.tables import Positive, Precision, Table
from retrieval_kd.towers import autocast
from retrieval_kd.types import Collection, InputError
from retrieval_kd.weights import hash_weights, locate_model


class Options(Table):
    """Which model, and how it reads."""

    model: str
    revision: str | None = None
    max_length: Positive = 512  # tokens of query and document together
    query_prompt: str = ""
    document_prompt: str = ""
    precision: Precision = "fp32"
    batch_tokens: Positive = 4096  # padding included


class CrossEncoder:
    """Reads query and document together; its score is the raw logit (relevant minus not, for two classes)."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @cached_property
    def _model(self) -> Any:
        folder = locate_model(self.options.model, self.options.revision)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        if model.config.num_labels not in (1, 2):
            raise InputError(
                f"model {self.options.model!r} has {model.config.num_labels} classes; a cross-encoder teacher "
                "has one (relevance) or two (not relevant, relevant)."
            )
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(locate_model(self.options.model, self.options.revision))

    @property
    def identity(self) -> dict[str, Any]:
        options = self.options.model_dump(exclude={"query_prompt", "document_prompt", "batch_tokens"})
        return {"kind": "cross_encoder", **options, "activation": "none", "weights": hash_weights(self._model)}

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        prompt = self.options.query_prompt if side == "query" else self.options.document_prompt
        return [prompt + text for text in texts]

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw logits of pairs, batched by length so that little is padding."""
        tokens = self._tokenizer(list(queries), list(documents), truncation=True, max_length=self.options.max_length)
        lengths = np.array([len(ids) for ids in tokens["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        scores = np.empty(len(order), np.float32)
        start = 0
        with torch.inference_mode(), autocast(self.options.precision):
            while start < len(order):
                places = order[start : start + max(1, self.options.batch_tokens // int(lengths[order[start]]))]
                features = self._tokenizer.pad(
                    {key: [tokens[key][place] for place in places] for key in tokens}, return_tensors="pt"
                )
                logits = self._model(**features).logits.float()
                scores[places] = (logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]).numpy()
                start += len(places)
        return scores


def load(options: Options, collection: Collection) -> CrossEncoder:
    """Make the teacher; the model is loaded when first needed."""
    return CrossEncoder(options)
