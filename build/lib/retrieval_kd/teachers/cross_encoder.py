"""Cross-encoders: any sequence-classification model of transformers, or a Sentence Transformers CrossEncoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from retrieval_kd.engines import (
    Engine,
    EnginePrecision,
    Forward,
    calibration_pairs,
    check_engine,
    compile_module,
    engine_identity,
)
from retrieval_kd.first_token import trim_last_layer
from retrieval_kd.gather import batches
from retrieval_kd.tables import Positive, Table
from retrieval_kd.towers import autocast
from retrieval_kd.types import Collection, InputError
from retrieval_kd.weights import hash_weights, locate_model

EXAMPLE = ["what", "which words", ""], ["a text of a few words", "another", "none"]  # what a graph is traced with


class Options(Table):
    """Which model, how it reads, and what runs it."""

    model: str
    revision: str | None = None
    max_length: Positive = 512  # tokens of query and document together
    query_prompt: str = ""
    document_prompt: str = ""
    engine: Engine = "torch"
    precision: EnginePrecision = "fp32"  # int8: OpenVINO alone
    batch_tokens: Positive | None = None  # padding included; absent: 1,024 on a CPU, 131,072 on a GPU

    @model_validator(mode="after")
    def _engine_can(self) -> Options:
        check_engine(self.engine, self.precision)
        return self


class CrossEncoder:
    """Reads query and document together; its score is the raw logit (relevant minus not, for two classes).

    On a GPU where there is one, unless OpenVINO runs it. An int8 model is calibrated on pairs of the collection.
    """

    def __init__(self, options: Options, calibration: Sequence[tuple[str, str]] = ()) -> None:
        self.options = options
        self._calibration = (
            self.render([query for query, _ in calibration], "query"),
            self.render([document for _, document in calibration], "document"),
        )
        on_gpu = options.engine == "torch" and torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._batch_tokens = options.batch_tokens or (2**17 if on_gpu else 1024)

    @cached_property
    def _loaded(self) -> tuple[Any, str]:
        """The model, and the hash of its weights."""
        folder = locate_model(self.options.model, self.options.revision)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        if model.config.num_labels not in (1, 2):
            raise InputError(
                f"model {self.options.model!r} has {model.config.num_labels} classes; a cross-encoder teacher "
                "has one (relevance) or two (not relevant, relevant)."
            )
        weights = hash_weights(model)
        trim_last_layer(model)
        return model.to(self._device), weights

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(locate_model(self.options.model, self.options.revision))

    @cached_property
    def identity(self) -> dict[str, Any]:
        options = self.options.model_dump(exclude={"query_prompt", "document_prompt", "batch_tokens"})
        read = [*self._calibration[0], *self._calibration[1]]
        engine = engine_identity(self.options.engine, self.options.precision, read)
        return {"kind": "cross_encoder", **options, **engine, "activation": "none", "weights": self._loaded[1]}

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        prompt = self.options.query_prompt if side == "query" else self.options.document_prompt
        return [prompt + text for text in texts]

    def count_tokens(self, queries: Sequence[str], documents: Sequence[str]) -> int:
        return sum(map(len, self._tokenize(queries, documents)["input_ids"]))

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw logits of pairs, batched by length so that little is padding."""
        tokens = self._tokenize(queries, documents)
        scores = np.empty(len(queries), np.float32)
        for places in batches([len(ids) for ids in tokens["input_ids"]], self._batch_tokens):
            logits = self._forward(self._pad(tokens, places))
            scores[places] = logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]
        return scores

    def _tokenize(self, queries: Sequence[str], documents: Sequence[str]) -> dict[str, list[list[int]]]:
        if not len(queries):
            return {"input_ids": []}
        return dict(
            self._tokenizer(list(queries), list(documents), truncation=True, max_length=self.options.max_length)
        )

    def _pad(self, tokens: dict[str, list[list[int]]], places: Iterable[int]) -> dict[str, Tensor]:
        batch = {name: [lists[place] for place in places] for name, lists in tokens.items()}
        return dict(self._tokenizer.pad(batch, return_tensors="pt"))

    @cached_property
    def _forward(self) -> Forward:
        """Logits (n, classes) of a batch, by the engine."""
        model, _ = self._loaded
        if self.options.engine == "openvino":
            example, sample = self._tokenize(*EXAMPLE), self._tokenize(*self._calibration)
            return compile_module(
                _Logits(model),
                self._pad(example, range(len(EXAMPLE[0]))),
                self.options.precision,
                [self._pad(sample, [place]) for place in range(len(sample["input_ids"]))],
            )

        def forward(features: Any) -> NDArray[np.float32]:
            features = {name: tensor.to(self._device, non_blocking=True) for name, tensor in features.items()}
            with torch.inference_mode(), autocast(self.options.precision, self._device.type):
                logits: NDArray[np.float32] = model(**features).logits.float().cpu().numpy()
            return logits

        return forward


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **features: Tensor) -> Tensor:
        logits: Tensor = self.model(**features).logits
        return logits


def load(options: Options, collection: Collection) -> CrossEncoder:
    """Make the teacher; the model is loaded when first needed."""
    return CrossEncoder(options, calibration_pairs(collection) if options.precision == "int8" else ())
