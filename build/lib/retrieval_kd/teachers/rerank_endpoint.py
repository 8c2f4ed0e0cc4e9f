"""Rerankers behind an endpoint: Text Embeddings Inference, Cohere, Jina, vLLM, Infinity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from retrieval_kd.endpoint import Client, Endpoint, Refused, ask
from retrieval_kd.prompts import cut_words
from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted, Usage

PATHS = {"tei": "/rerank", "cohere": "/rerank", "vllm": "/score"}


class Options(Table):
    """Which model, where, and in which form it is asked.

    `tei`: url/rerank gives raw scores, and url/info must name this model. `cohere`: url/rerank, as Cohere, Jina,
    vLLM and Infinity have it; scores are what they give, mostly from 0 to 1 (normalize = "log_odds" undoes it).
    `vllm`: url/score. The url goes up to the version, if it has one: "https://api.jina.ai/v1".
    """

    model: str
    endpoint: Endpoint
    api: Literal["tei", "cohere", "vllm"] = "cohere"
    revision: str | None = None  # tei alone can say which one it has
    documents: Positive = 32  # in one request
    document_words: Positive | None = None  # words of a document that are sent

    @model_validator(mode="after")
    def _revision_can_be_checked(self) -> Options:
        if self.revision and self.api != "tei":
            raise ValueError('revision can be checked with api = "tei" alone, which says what it serves')
        return self


class RerankEndpoint:
    """Scores as the endpoint gives them, several documents of one query in a request."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.usage = Usage()
        self.chunk = options.documents * options.endpoint.concurrency

    @property
    def identity(self) -> dict[str, Any]:
        chosen = self.options.model_dump(include={"api", "model", "revision", "document_words"})
        return {"kind": "rerank_endpoint", "endpoint": self.options.endpoint.who, **chosen}

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Scores (n,) of pairs; NaN where a request is refused, or its answer names no score, or a document twice."""
        places = [
            run[start : start + self.options.documents]
            for run in (list(run) for _, run in groupby(range(len(queries)), key=lambda place: queries[place]))
            for start in range(0, len(run), self.options.documents)
        ]
        read = [cut_words(document, self.options.document_words) for document in documents]
        bodies = [self._body(queries[run[0]], [read[place] for place in run]) for run in places]
        self._check_server()
        scores = np.full(len(queries), np.nan, np.float32)
        try:
            answers, stopped = ask(self._client, PATHS[self.options.api], bodies, _pairs), None
            asked = list(range(len(bodies)))
        except Interrupted as stop:
            answers, stopped, asked = stop.answers, stop, list(stop.places)
        for run, pairs in zip([places[number] for number in asked], answers, strict=True):
            scores[run] = self._aligned(pairs, len(run))
        if stopped:
            known = [place for number in asked for place in places[number]]
            raise Interrupted(str(stopped), known, scores[known]) from None
        return scores

    @cached_property
    def _client(self) -> Client:
        return Client(self.options.endpoint, self.usage)

    def _body(self, query: str, documents: list[str]) -> dict[str, Any]:
        if self.options.api == "tei":
            return {"query": query, "texts": documents, "raw_scores": True, "return_text": False, "truncate": True}
        if self.options.api == "vllm":
            return {"model": self.options.model, "text_1": query, "text_2": documents}
        return {"model": self.options.model, "query": query, "documents": documents, "top_n": len(documents)}

    def _check_server(self) -> None:
        """InputError where a server that says what it serves serves something else."""
        if self.options.api != "tei" or not self._served:
            return
        served, wanted = self._served.get("model_id"), self.options.model
        if served != wanted:
            raise InputError(f"{self.options.endpoint.url} serves model {served!r}, and the recipe names {wanted!r}.")
        revision = self._served.get("model_sha")
        if self.options.revision and revision != self.options.revision:
            raise InputError(
                f"{self.options.endpoint.url} serves revision {revision!r} of {served!r}, and the recipe names "
                f"{self.options.revision!r}."
            )

    @cached_property
    def _served(self) -> dict[str, Any]:
        answer = self._client.get("/info")
        return answer if isinstance(answer, dict) else {}

    def _aligned(self, pairs: Any, count: int) -> NDArray[np.float32]:
        """Scores (count,) by the places that the answer gives them; all NaN if it cannot be right."""
        scores = np.full(count, np.nan, np.float32)
        if isinstance(pairs, Refused):
            self.usage.note(pairs.reason)
            return scores
        try:
            found = [(int(pair["index"]), pair) for pair in pairs]
            if len({place for place, _ in found}) < len(found) or not all(0 <= place < count for place, _ in found):
                raise ValueError
            for place, pair in found:
                value = next(pair[key] for key in ("relevance_score", "score") if key in pair)
                scores[place] = np.nan if value is None else float(value)
        except (TypeError, ValueError, LookupError, StopIteration):
            self.usage.note(str(pairs))
            scores[:] = np.nan
        scores[~np.isfinite(scores)] = np.nan
        return scores


def _pairs(answer: Any) -> Any:
    """The list of indexes and scores in an answer."""
    if isinstance(answer, dict):
        return answer.get("results", answer.get("data", answer))
    return answer


def load(options: Options, collection: object) -> RerankEndpoint:
    """Make the teacher; nothing is asked yet."""
    return RerankEndpoint(options)
