"""HTTP: vectors as OpenAI gives them, and search with the student that made the index.

One encoder serves one side. An index made by another document tower is refused when the server
starts, and so is a document sent to an encoder of queries.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from retrieval_kd.data.beir import read_texts
from retrieval_kd.encoder import Encoder, check_index
from retrieval_kd.index import Index, open_index
from retrieval_kd.types import InputError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is answered with 413."""

    texts: int = 256
    characters: int = 100_000  # of one text
    body_bytes: int = 64 * 2**20


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbeddingsBody(_Body):
    """The body of `POST /v1/embeddings`: OpenAI's, and the side that the texts are for."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    input_type: Literal["query", "document", "search_query", "search_document"] | None = None
    user: str | None = None


class SearchBody(_Body):
    """The body of `POST /search`: one query, or several."""

    query: str | None = None
    queries: list[str] | None = None
    k: Annotated[int, Field(ge=1, le=1000)] = 10


class _Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer in the form of OpenAI's errors."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def create_app(
    encoder: Encoder,
    index: Index | None,
    model_name: str,
    texts: Sequence[str] | None = None,
    limits: Limits = Limits(),
) -> FastAPI:
    """The application: `encoder` answers as `model_name`; `texts`, one a row of `index`, go into results.

    Raises InputError when the index was not made by the document tower of this encoder.
    """
    if index is not None:
        check_index(encoder.manifest, index.manifest)
    assert texts is None or (index is not None and len(texts) == len(index.document_ids)), "one text a row"
    symmetric = encoder.manifest["document_identity"] == encoder.manifest["identity"]
    busy = threading.Lock()  # one batch at a time: more would only share the same cores
    app = FastAPI(title="retrieval_kd", description=f"Vectors and search of {model_name}.")
    app.add_middleware(_BodyLimit, limit=limits.body_bytes)
    app.add_exception_handler(_Refusal, _on_refusal)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)

    def encode(batch: Sequence[str]) -> Any:
        with busy:
            return encoder.encode(batch)

    @app.post("/v1/embeddings")
    def embeddings(body: EmbeddingsBody) -> JSONResponse:
        """Vectors of texts."""
        if body.model != model_name:
            message = f"The model {body.model!r} does not exist; this server has {model_name!r}."
            raise _Refusal(404, message, "model", "model_not_found")
        batch = _texts_of(body.input)
        _check_texts(batch, limits, "input")
        if body.dimensions not in (None, encoder.dimension):
            raise _Refusal(
                400,
                f"This model was not trained for shorter vectors: dimensions must be {encoder.dimension} or left out.",
                "dimensions",
            )
        if body.input_type in ("document", "search_document") and not symmetric:
            raise _Refusal(
                400,
                "This server has the query side of an asymmetric student; its documents are encoded by another "
                "tower, and their vectors are in the index.",
                "input_type",
            )
        vectors = encode(batch)
        tokens = sum(encoder.count_tokens(batch))
        data = [
            {"object": "embedding", "index": place, "embedding": _packed(vector, body.encoding_format)}
            for place, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": model_name, "usage": usage})

    @app.post("/search")
    def search(body: SearchBody) -> JSONResponse:
        """The best documents of each query."""
        if index is None:
            raise _Refusal(404, "This server has no index; start it with one to search.", code="no_index")
        if (body.query is None) == (body.queries is None):
            raise _Refusal(422, "Give either 'query', a text, or 'queries', a list of texts.", "query")
        queries = [body.query] if body.query is not None else body.queries or []
        _check_texts(queries, limits, "query" if body.query is not None else "queries")
        start = perf_counter()
        vectors = encode(queries)
        encoded = perf_counter()
        hits = index.search(vectors, body.k)
        searched = perf_counter()
        results = [
            [_result(index, texts, int(row), float(score), rank) for rank, (row, score) in found if row >= 0]
            for found in (
                enumerate(zip(rows, scores, strict=True), start=1)
                for rows, scores in zip(hits.rows, hits.scores, strict=True)
            )
        ]
        milliseconds = {"encode_ms": (encoded - start) * 1e3, "search_ms": (searched - encoded) * 1e3}
        return JSONResponse({"results": results, **milliseconds})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answers as long as the process does."""
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What is served: encoder, index and limits."""
        return {
            "model": model_name,
            "sides": ["query", "document"] if symmetric else ["query"],
            "encoder": encoder.manifest,
            "index": None if index is None else index.manifest,
            "limits": asdict(limits),
        }

    return app


def serve(
    encoder_folder: Path,
    index_folder: Path | None = None,
    documents: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | None = None,
    threads: int = 1,
) -> None:
    """Serve an exported encoder until interrupted, with an index and its texts where given.

    `documents` is a JSON Lines file of `{"_id", "title", "text"}`, as BEIR's corpus.jsonl; the model
    is called after its folder unless `model_name` is given. Raises InputError before anything listens.
    """
    encoder = Encoder.load(encoder_folder, threads)
    index = None if index_folder is None else open_index(index_folder, threads)
    if documents is not None and index is None:
        raise InputError(f"the texts of {documents} are shown with search results, which need an index; give one too.")
    texts = None if documents is None or index is None else _texts_in_order(documents, index.document_ids)
    app = create_app(encoder, index, model_name or encoder_folder.resolve().name, texts)
    uvicorn.run(app, host=host, port=port)


def _texts_in_order(path: Path, document_ids: Sequence[str]) -> list[str]:
    """The texts of `document_ids`, in their order, title first; InputError if one is missing."""
    texts = read_texts(path, with_title=True)
    for document_id in document_ids:
        if document_id not in texts:
            raise InputError(f"{path} lacks document {document_id!r} of the index; give the file that was indexed.")
    return [texts[document_id] for document_id in document_ids]


def _texts_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str]:
    """The texts of an `input`; refuses token ids, which belong to another tokenizer."""
    if isinstance(given, str):
        return [given]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise _Refusal(400, "This server takes texts, not lists of token ids: send strings.", "input")
    return texts


def _check_texts(texts: Sequence[str], limits: Limits, param: str) -> None:
    if not texts:
        raise _Refusal(400, f"{param!r} is an empty list; send at least one text.", param)
    if len(texts) > limits.texts:
        raise _Refusal(413, f"{len(texts)} texts in one request; at most {limits.texts} are taken.", param)
    longest = max(map(len, texts))
    if longest > limits.characters:
        raise _Refusal(413, f"A text of {longest} characters; at most {limits.characters} are taken.", param)


def _packed(vector: NDArray[np.float32], form: Literal["float", "base64"]) -> list[float] | str:
    """A vector as numbers, or as the base64 of its little-endian float32 bytes."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers


def _result(index: Index, texts: Sequence[str] | None, row: int, score: float, rank: int) -> dict[str, Any]:
    result = {"id": index.document_ids[row], "score": score, "rank": rank}
    return result if texts is None else {**result, "text": texts[row]}


class _BodyLimit:
    """Refuses a body before it is read: one that is too long, or does not say how long it is."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            length = dict(scope["headers"]).get(b"content-length")
            if length is None:
                return await _answer(411, "Send a Content-Length.")(scope, receive, send)
            if int(length) > self.limit:
                return await _answer(413, f"At most {self.limit} bytes are taken.")(scope, receive, send)
        return await self.app(scope, receive, send)


def _answer(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


async def _on_refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _Refusal)
    return _answer(error.status, error.message, error.param, error.code)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, f"{error.detail}: {request.method} {request.url.path}.")


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body of the wrong shape: 400 where OpenAI's clients ask, 422 elsewhere."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = [part for part in problem["loc"][1:2] if isinstance(part, str)]  # the field, if it is about one
    param = place[0] if place else None
    message = f"{param}: {problem['msg']}." if param else f"{problem['msg']}."
    return _answer(400 if request.url.path.startswith("/v1/") else 422, message, param)
