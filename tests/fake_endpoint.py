"""A local HTTP server that answers as it is told, for teachers that are asked over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a server answers: a status, headers, and a body, which is sent as JSON unless it is a string.
Reply = tuple[int, dict[str, str], Any]


@dataclass
class FakeEndpoint:
    """`reply(path, body)` is what it answers; what it is asked is kept."""

    reply: Callable[[str, Any], Reply]
    url: str = ""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serve(reply: Callable[[str, Any], Reply]) -> Iterator[FakeEndpoint]:
    """Serve on the loopback until the block ends."""
    endpoint = FakeEndpoint(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            endpoint.asked.append((self.path, body))
            endpoint.headers.append(dict(self.headers))
            status, headers, answer = endpoint.reply(self.path, body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def ok(body: Any) -> Reply:
    """A good answer."""
    return 200, {}, body


def chat_answer(text: str, top: dict[str, float] | None = None, tokens: tuple[int, int] = (10, 1)) -> dict[str, Any]:
    """A chat completion with `text`, and log-probabilities of its first token if `top` gives them."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if top is not None:
        shown = [{"token": token, "logprob": value} for token, value in sorted(top.items(), key=lambda item: -item[1])]
        choice["logprobs"] = {"content": [{**shown[0], "top_logprobs": shown}]}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)}
    return {"object": "chat.completion", "choices": [choice], "usage": usage}
