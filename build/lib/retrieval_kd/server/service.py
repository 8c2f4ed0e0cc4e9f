"""The models of one server and what they do for its routes, however many ask at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from retrieval_kd.server.batching import Batcher, Batching
from retrieval_kd.server.errors import Limits, Refusal, names
from retrieval_kd.server.models import Model
from retrieval_kd.server.monitor import Monitor
from retrieval_kd.types import InputError

Answer = TypeVar("Answer")
_INLINE = 2000  # characters that are tokenised at once: faster than asking another thread


class Service:
    """Models by name. Encoders run in threads of their own, so that no search waits for one."""

    def __init__(self, models: Sequence[Model], limits: Limits, batching: Batching, monitor: Monitor) -> None:
        if not models:
            raise InputError("nothing to serve; give at least one folder.")
        self.models = {model.name: model for model in models}
        if len(self.models) < len(models):
            raise InputError(f"models of one name: {names([model.name for model in models])}; name them NAME=FOLDER.")
        self.limits, self.batching, self.monitor = limits, batching, monitor
        encoding = ThreadPoolExecutor(batching.workers, "encode")
        self._pool = ThreadPoolExecutor(max(2, batching.workers), "search")
        self._encoders: dict[str, Batcher[str, Any]] = {}
        self._searchers: dict[str, Batcher[tuple[Any, int], Any]] = {}
        for model in models:
            if model.vectors != "none" and not model.looks_up:
                observe = partial(monitor.batch, model.name, "encode")
                own = replace(batching, texts=1) if model.one_by_one else batching
                self._encoders[model.name] = Batcher(model.encode, encoding, own, limits.waiting_texts, observe)
            if model.searchable:
                observe = partial(monitor.batch, model.name, "search")
                self._searchers[model.name] = Batcher(
                    model.search_together, self._pool, batching, limits.waiting_texts, observe
                )

    def find(self, name: str) -> Model:
        """The model of this name; Refusal 404 if there is none."""
        if name not in self.models:
            message = f"The model {name!r} does not exist; this server has {names(list(self.models))}."
            raise Refusal(404, message, "model", "model_not_found")
        return self.models[name]

    def choose(self, name: str | None, vectors: Literal["dense", "sparse"]) -> Model:
        """The model of this name, or the first one of these vectors; Refusal if it gives others."""
        if name is not None:
            model = self.find(name)
            if model.vectors == vectors:
                return model
            message = f"The model {name!r} gives {model.vectors.replace('none', 'no')} vectors, not {vectors} ones."
            raise Refusal(400, message, "model")
        for model in self.models.values():
            if model.vectors == vectors:
                return model
        raise Refusal(404, f"This server has no model of {vectors} vectors.", "model", "model_not_found")

    async def tokenize(self, model: Model, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, none cut off."""
        if sum(map(len, texts)) <= _INLINE:
            return model.tokenize(texts)
        return await self._apart(lambda: model.tokenize(texts))

    async def encode(
        self, request: Request, model: Model, texts: Sequence[str], cut: bool = True
    ) -> tuple[Sequence[Any], int]:
        """A row of each text, and how many tokens were read; unless `cut`, texts that are too long are refused.

        A row is a vector (D,), or of a sparse model terms and weights.
        """
        lengths = [len(ids) for ids in await self.tokenize(model, texts)]
        most = model.max_length or max(lengths)
        if not cut and max(lengths) > most:
            raise Refusal(422, f"`inputs` must have less than {most} tokens. Given: {max(lengths)}", "inputs")
        tokens = [min(length, most) for length in lengths]
        request.scope["facts"] |= {"model": model.name, "texts": len(texts), "tokens": sum(tokens)}
        if not model.looks_up:
            return await self._encoders[model.name].do(texts, tokens), sum(tokens)
        if sum(map(len, texts)) <= _INLINE:
            return model.encode(texts), sum(tokens)
        return await self._apart(lambda: model.encode(texts)), sum(tokens)

    async def search(
        self, request: Request, model: Model, queries: Sequence[str], k: int
    ) -> tuple[list[tuple[NDArray[np.int32], NDArray[np.float32]]], dict[str, float]]:
        """(rows, scores) of the best documents of each query, and the milliseconds of encoding and of search."""
        start = perf_counter()
        asked: Sequence[Any] = queries
        if model.vectors != "none":
            asked, _ = await self.encode(request, model, queries)
        request.scope["facts"] |= {"model": model.name, "texts": len(queries)}
        encoded = perf_counter()
        found = await self._searchers[model.name].do([(row, k) for row in asked], [1] * len(asked))
        return found, {"encode_ms": (encoded - start) * 1e3, "search_ms": (perf_counter() - encoded) * 1e3}

    def waiting(self) -> dict[str, int]:
        """The texts that wait for each encoder."""
        return {name: batcher.waiting for name, batcher in self._encoders.items()}

    async def _apart(self, work: Callable[[], Answer]) -> Answer:
        """Do the work in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
