"""`POST /search`: the documents of a model's index that answer a query, with their texts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from retrieval_kd.server.errors import Refusal, check_texts
from retrieval_kd.server.models import Model
from retrieval_kd.server.service import Service


class SearchBody(BaseModel):
    """The body of `POST /search`: one query, or several."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None  # the first that has documents
    query: Any = None  # a text
    queries: Any = None  # texts
    k: Annotated[int, Field(ge=1, le=1000)] = 10


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the route."""

    @app.post("/search")
    async def search(body: SearchBody, request: Request) -> JSONResponse:
        """The best documents of each query."""
        model = _model(service, body.model)
        if (body.query is None) == (body.queries is None):
            raise Refusal(422, "Give either 'query', a text, or 'queries', a list of texts.", "query")
        if body.query is not None and not isinstance(body.query, str):
            raise Refusal(422, "'query' must be a text.", "query")
        given, param = (body.queries, "queries") if body.query is None else (body.query, "query")
        found, milliseconds = await service.search(request, model, check_texts(given, service.limits, param), body.k)
        results = [
            [
                _result(model, int(row), float(score), rank)
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1)
                if row >= 0
            ]
            for rows, scores in found
        ]
        return JSONResponse({"model": model.name, "results": results, **milliseconds})


def _model(service: Service, name: str | None) -> Model:
    """The model of this name, or the first that has documents."""
    found = service.models.values() if name is None else [service.find(name)]
    for model in found:
        if model.searchable:
            return model
    who = "This server" if name is None else f"The model {name!r}"
    raise Refusal(404, f"{who} has no index; start the server with one to search.", code="no_index")


def _result(model: Model, row: int, score: float, rank: int) -> dict[str, Any]:
    result = {"id": model.document_ids[row], "score": score, "rank": rank}
    return result if model.texts is None else {**result, "text": model.texts[row]}
