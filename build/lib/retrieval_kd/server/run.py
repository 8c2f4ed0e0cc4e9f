"""Listening: a socket, uvicorn, the log, and an end that loses no request."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Sequence

import uvicorn

from retrieval_kd.server.app import create_app
from retrieval_kd.server.batching import Batching
from retrieval_kd.server.errors import Limits
from retrieval_kd.server.models import Model
from retrieval_kd.server.monitor import JsonLines, logger
from retrieval_kd.types import InputError

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def serve(
    models: Sequence[Model],
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    batching: Batching | None = None,
    api_key: str | None = None,
) -> None:
    """Serve `models` until SIGTERM or Ctrl+C; requests that have come in are answered before it returns.

    Logs JSON lines to standard error. Port 0 takes a free one, which the log names. Raises InputError before anything
    listens.
    """
    limits = limits or Limits()
    app = create_app(models, limits, batching, api_key)
    _log_lines()
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise InputError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port."
        ) from None
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.seconds) + 5,
    )
    facts = {"address": f"http://{host}:{listener.getsockname()[1]}", "models": [model.name for model in models]}
    logger.info("listening", extra={"facts": facts})
    if api_key is None and host not in _LOOPBACK:
        logger.warning("anybody who reaches this address may ask; set RKD_API_KEY to refuse requests without a key")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])
    logger.info("stopped")


def _log_lines() -> None:
    """Let this server and uvicorn write JSON lines to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("retrieval_kd.server", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
