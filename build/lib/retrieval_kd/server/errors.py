"""What is refused, and the form of the answer: OpenAI's on most routes, TEI's on those of TEI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TEI_ROUTES = {"/embed", "/embed_sparse", "/tokenize", "/info", "/health", "/metrics"}
_TEI_TYPES = {400: "Empty", 401: "Unauthorized", 424: "Backend", 429: "Overloaded", 503: "Unhealthy", 504: "Overloaded"}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may be going on; more is refused with the status named."""

    texts: int = 256  # of one request: 413
    characters: int = 100_000  # of one text: 413
    body_bytes: int = 4 * 2**20  # of one request: 413
    seconds: float = 30.0  # from its first byte to the answer: 408 while it is being read, then 504
    requests: int = 512  # at once: 429
    waiting_texts: int = 4096  # for one model: 429


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """An answer other than what was asked for; `param` is the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def answer(path: str, refusal: Refusal) -> JSONResponse:
    """A refusal in the form that the clients of the route `path` expect."""
    status, message = refusal.status, _printable(refusal.message)
    headers = {429: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(status)
    body: dict[str, Any]
    if path in TEI_ROUTES:
        body = {"error": message, "error_type": _TEI_TYPES.get(status, "Backend" if status >= 500 else "Validation")}
    else:
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        param = refusal.param and _printable(refusal.param)
        body = {"error": {"message": message, "type": kind, "param": param, "code": refusal.code}}
    return JSONResponse(body, status, headers)


async def on_refusal(request: Request, error: Exception) -> JSONResponse:
    """The answer to what a route refuses."""
    assert isinstance(error, Refusal)
    return answer(request.url.path, error)


async def on_http(request: Request, error: Exception) -> JSONResponse:
    """The answer to a route or method that does not exist, and to a body that is no JSON."""
    assert isinstance(error, HTTPException)
    return answer(request.url.path, Refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path}."))


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body of the wrong shape: 400 where OpenAI's clients ask, 422 elsewhere."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = [part for part in problem["loc"][1:2] if isinstance(part, str)]  # the field, if it is about one
    param = place[0] if place else None
    message = f"{param}: {problem['msg']}." if param else f"{problem['msg']}."
    status = 400 if request.url.path.startswith("/v1/") else 422
    return answer(request.url.path, Refusal(status, message, param))


def check_texts(given: Any, limits: Limits, param: str, empty: int = 400, wrong: int = 422) -> list[str]:
    """`given`, a text or a list of texts, as a list; refuses other things, and more than the limits allow.

    `empty` and `wrong` are the statuses of an empty list and of what is not text.
    """
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list):
        raise Refusal(wrong, f"{param!r} must be a text or a list of texts.", param)
    if not texts:
        raise Refusal(empty, f"{param!r} is an empty list; send at least one text.", param)
    if len(texts) > limits.texts:
        raise Refusal(413, f"{len(texts)} texts in one request; at most {limits.texts} are taken.", param)
    if all(_is_number_or_numbers(text) for text in texts):
        raise Refusal(wrong, "This server takes texts, not lists of token ids: send strings.", param)
    for text in texts:
        if not isinstance(text, str):
            raise Refusal(wrong, f"{param!r} must be a text or a list of texts.", param)
        if _printable(text) != text:
            raise Refusal(wrong, f"{param!r} has half of a surrogate pair, which is no character.", param)
    longest = max(map(len, texts))
    if longest > limits.characters:
        raise Refusal(413, f"A text of {longest} characters; at most {limits.characters} are taken.", param)
    return texts


def _is_number_or_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(number, int) for number in value)
    return isinstance(value, int)


def _printable(text: str) -> str:
    """The text with half surrogates written out, for they cannot be sent."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def names(found: Sequence[str]) -> str:
    """Names in a message: 'a', 'b'."""
    return ", ".join(map(repr, found))
