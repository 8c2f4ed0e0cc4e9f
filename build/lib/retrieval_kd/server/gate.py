"""What every request passes: its id, the key, limits of size, number and time, metrics and the log.

Written as plain ASGI, so that it costs a request some microseconds.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from time import perf_counter
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retrieval_kd.server.errors import Limits, Refusal, answer
from retrieval_kd.server.monitor import Monitor, logger

PUBLIC = {"/", "/health", "/metrics"}  # without a key, and however much is going on
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """The middleware around all routes; with an `api_key`, clients send `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, limits: Limits, monitor: Monitor, api_key: str | None) -> None:
        self._app, self._limits, self._monitor = app, limits, monitor
        self._key = None if api_key is None else api_key.encode()
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send, self._limits.body_bytes)
        refusal = self._refusal(scope, request.headers)
        self._in_flight += 1
        self._monitor.in_flight.inc()
        try:
            if refusal is None:
                async with asyncio.timeout(self._limits.seconds) as timeout:
                    await self._app(scope, request.receive, request.send)
            else:
                await request.refuse(refusal)
        except TimeoutError:
            if not timeout.expired():
                raise
            status = 504 if request.read else 408
            await request.refuse(Refusal(status, f"No answer within {self._limits.seconds:g} seconds.", code="timeout"))
        except Exception:
            logger.exception("fault", extra={"facts": request.facts})
            await request.refuse(Refusal(500, "The server failed at this request; its log says why."))
        finally:
            self._in_flight -= 1
            self._monitor.in_flight.dec()
            request.finish(self._monitor)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Refusal | None:
        """Why a request is not even read, if there is a reason."""
        if scope["path"] in PUBLIC:
            return None
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                return Refusal(
                    401, "Send the API key of this server: Authorization: Bearer KEY.", code="invalid_api_key"
                )
        if self._in_flight >= self._limits.requests:
            return Refusal(429, "Too many requests at once; try again in a moment.", code="rate_limit_exceeded")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return Refusal(400, "Content-Length is not a number.")
        if int(length[:20]) > self._limits.body_bytes:
            return Refusal(413, f"At most {self._limits.body_bytes} bytes are taken.")
        return None


class _Request:
    """One request: its body is counted as it is read, its answer gets the request's id."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_bytes: int) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.facts: dict[str, Any] = {}
        self.read = scope["method"] in ("GET", "HEAD")  # the whole body
        self._scope, self._receive, self._send = scope, receive, send
        self._start = perf_counter()
        self._status = 0
        self._left = self._most = body_bytes
        given = self.headers.get(b"x-request-id", b"")
        self._id = given if _ID.fullmatch(given) else uuid4().hex.encode()
        scope["facts"] = self.facts  # where routes say what they were asked
        self.facts |= {
            "request_id": self._id.decode(),
            "method": scope["method"],
            "path": scope["path"],
            "client": scope["client"][0] if scope.get("client") else None,
        }

    async def receive(self) -> Message:
        """Some of the body; refuses what is too long though it did not say so."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self.read = not message.get("more_body", False)
            if self._left < 0:
                raise HTTPException(413, f"At most {self._most} bytes are taken")
        return message

    async def send(self, message: Message) -> None:
        """Some of the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id)]
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, unless an answer has begun."""
        if not self._status:
            await answer(self._scope["path"], refusal)(self._scope, self._receive, self.send)

    def finish(self, monitor: Monitor) -> None:
        """Count and log the request."""
        seconds = perf_counter() - self._start
        route = getattr(self._scope.get("route"), "path", "unknown")
        monitor.request(route, self._status, seconds)
        logger.info("request", extra={"facts": {**self.facts, "status": self._status, "ms": round(seconds * 1e3, 3)}})
