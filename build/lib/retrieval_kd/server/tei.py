"""The routes of text-embeddings-inference (TEI): `/embed`, `/embed_sparse`, `/tokenize` and `/info`.

Requests are TEI's, and `model` besides, since TEI serves one model and we may serve several. What differs: texts are
cut at the model's length unless `truncate` is false, and always at the side that the student was trained with;
vectors are as the student was trained to give them unless `normalize` is true.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from retrieval_kd import __version__
from retrieval_kd.server.errors import Refusal, check_texts
from retrieval_kd.server.models import Model
from retrieval_kd.server.openai import check_side, check_width, cut, normalized
from retrieval_kd.server.service import Service


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inputs: Any  # a text or several; checked by `check_texts`, which stops at the first mistake
    prompt_name: str | None = None
    model: str | None = None


class SparseBody(_Body):
    """The body of `POST /embed_sparse`."""

    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None


class EmbedBody(SparseBody):
    """The body of `POST /embed`."""

    normalize: bool | None = None
    dimensions: int | None = None


class TokenizeBody(_Body):
    """The body of `POST /tokenize`."""

    add_special_tokens: bool = True


def add_routes(app: FastAPI, service: Service) -> None:
    """Add TEI's routes."""

    def check(body: _Body, model: Model) -> list[str]:
        texts = check_texts(body.inputs, service.limits, "inputs")
        if not all(texts):
            raise Refusal(422, "`inputs` cannot be empty", "inputs")
        if body.prompt_name not in (None, "query", "document"):
            message = f"prompt_name {body.prompt_name!r} is unknown; there are 'query' and 'document'."
            raise Refusal(422, message, "prompt_name")
        check_side(model, body.prompt_name, "prompt_name", 422)
        side = str(model.manifest.get("truncation_side", "right"))
        if isinstance(body, SparseBody) and (body.truncation_direction or side).lower() != side:
            raise Refusal(422, f"This model's texts are cut at the {side}.", "truncation_direction")
        return texts

    @app.post("/embed")
    async def embed(body: EmbedBody, request: Request) -> JSONResponse:
        """Dense vectors of texts."""
        model = service.choose(body.model, "dense")
        texts = check(body, model)
        check_width(model, body.dimensions, 422)
        rows, _ = await service.encode(request, model, texts, cut=body.truncate is not False)
        vectors = cut(np.stack(rows), body.dimensions)
        return JSONResponse((normalized(vectors) if body.normalize else vectors).tolist())

    @app.post("/embed_sparse")
    async def embed_sparse(body: SparseBody, request: Request) -> JSONResponse:
        """Terms of texts, by their number in the vocabulary, and their weights."""
        model = service.choose(body.model, "sparse")
        texts = check(body, model)
        found, _ = await service.encode(request, model, texts, cut=body.truncate is not False)
        return JSONResponse(
            [
                [
                    {"index": term, "value": weight}
                    for term, weight in zip(terms.tolist(), weights.tolist(), strict=True)
                ]
                for terms, weights in found
            ]
        )

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> JSONResponse:
        """Tokens of texts, none cut off; places are those of characters."""
        model = service.find(body.model) if body.model is not None else next(iter(service.models.values()))
        texts = check(body, model)
        if model.tokenizer is None:
            raise Refusal(400, f"The model {model.name!r} has no tokenizer.", "model")
        prompt = model.manifest.get("prompt", "") if body.prompt_name else ""
        return JSONResponse([_tokens(model.tokenizer, prompt + text, body.add_special_tokens) for text in texts])

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """What is served: the first model as TEI says it, all models, and limits."""
        first, *_ = service.models.values()
        limits, batching = service.limits, service.batching
        return {
            "model_id": first.name,
            "model_sha": first.manifest.get("fingerprints", {}).get("model.onnx"),
            "model_dtype": first.manifest.get("form"),
            "model_type": {"embedding": {"pooling": _pooling(first)}},
            "max_concurrent_requests": limits.requests,
            "max_input_length": first.max_length,
            "max_batch_tokens": batching.tokens,
            "max_batch_requests": batching.texts,
            "max_client_batch_size": limits.texts,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": __version__,
            "models": [model.describe() for model in service.models.values()],
            "limits": asdict(limits),
            "batching": asdict(batching),
        }


def _pooling(model: Model) -> str | None:
    """How the student pools, as its manifest says."""
    modules = model.manifest.get("identity", {}).get("modules", [])
    found = [module.get("config", {}).get("pooling_mode") for module in modules if module.get("module") == "Pooling"]
    return found[0] if found else None


def _tokens(tokenizer: Any, text: str, special: bool) -> list[dict[str, Any]]:
    """The tokens of a text; special ones have no place in it."""
    found = tokenizer.encode(text, add_special_tokens=special)
    tokens = []
    for number, token, mask, (start, stop) in zip(
        found.ids, found.tokens, found.special_tokens_mask, found.offsets, strict=True
    ):
        place = {"text": token, "special": True, "start": None, "stop": None}
        if not mask:
            place = {"text": text[start:stop], "special": False, "start": start, "stop": stop}
        tokens.append({"id": number, **place})
    return tokens
