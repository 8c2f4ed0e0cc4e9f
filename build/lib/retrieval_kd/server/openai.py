"""OpenAI's routes: `POST /v1/embeddings` with the side that texts are for, and `GET /v1/models`."""

from __future__ import annotations

import base64
import time
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from retrieval_kd.forms import cut_width
from retrieval_kd.server.errors import Refusal, check_texts
from retrieval_kd.server.models import Model
from retrieval_kd.server.service import Service

Form = Literal["float", "base64"]


class EmbeddingsBody(BaseModel):
    """The body of `POST /v1/embeddings`: OpenAI's, and `input_type`, also as Cohere spells it."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: Any  # a text or several; checked by `check_texts`, which stops at the first mistake
    encoding_format: Form = "float"
    dimensions: int | None = None
    input_type: Literal["query", "document", "search_query", "search_document"] | None = None
    user: str | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    """Add OpenAI's routes."""
    started = int(time.time())

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> JSONResponse:
        """Dense vectors of texts."""
        model = service.find(body.model)
        if model.vectors != "dense":
            message = f"The model {model.name!r} gives no dense vectors; ask /search, or /embed_sparse for sparse ones."
            raise Refusal(400, message, "model")
        texts = check_texts(body.input, service.limits, "input", wrong=400)
        check_width(model, body.dimensions, 400)
        check_side(model, body.input_type, "input_type", 400)
        rows, tokens = await service.encode(request, model, texts)
        data = [
            {"object": "embedding", "index": place, "embedding": _packed(vector, body.encoding_format)}
            for place, vector in enumerate(cut(np.stack(rows), body.dimensions))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "retrieval_kd"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names of all models."""
        return {"object": "list", "data": [entry(name) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model of one name."""
        return entry(service.find(name).name)


def check_width(model: Model, width: int | None, status: int) -> None:
    """Refuse a width that the student was not trained for."""
    if width is not None and width not in model.widths:
        given = " or ".join(map(str, model.widths))
        message = f"This model was not trained for vectors of {width}: dimensions must be {given}, or left out."
        raise Refusal(status, message, "dimensions")


def check_side(model: Model, side: str | None, param: str, status: int) -> None:
    """Refuse documents where only queries are encoded."""
    if side is not None and side.removeprefix("search_") not in model.sides:
        raise Refusal(
            status,
            "This server has the query side of an asymmetric student; its documents are encoded by another "
            "tower, and their vectors are in the index.",
            param,
        )


def cut(vectors: NDArray[np.float32], width: int | None) -> NDArray[np.float32]:
    """The first `width` numbers of each vector (n, D), if there is one; vectors of length 1 are made so again."""
    if width is None or width == vectors.shape[1]:
        return vectors
    unit = np.abs(np.linalg.norm(vectors, axis=1, keepdims=True) - 1) < 1e-3  # no manifest says it
    return np.where(unit, *(cut_width(vectors, width, again) for again in (True, False)))


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors (n, D) at length 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)


def _packed(vector: NDArray[np.float32], form: Form) -> list[float] | str:
    """A vector as numbers, or as the base64 of its little-endian float32 bytes."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
