"""What is measured of a server, for Prometheus, and its log: one JSON object a line."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

logger = logging.getLogger("retrieval_kd.server")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Monitor:
    """The metrics of one application; labels are routes and models, of which there are few."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "rkd_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )  # exposed as rkd_requests_total
        self._seconds = Histogram(
            "rkd_request_seconds", "From request to answer.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._texts = Histogram(
            "rkd_batch_texts",
            "Texts encoded or searched together.",
            ["model", "stage"],
            buckets=_SIZES,
            registry=self._registry,
        )
        self._batch = Histogram(
            "rkd_batch_seconds",
            "Time that a batch takes.",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("rkd_tokens", "Tokens encoded.", ["model"], registry=self._registry)
        self._waiting = Gauge("rkd_waiting_texts", "Texts that wait for a batch.", ["model"], registry=self._registry)
        self.in_flight = Gauge("rkd_requests_in_flight", "Requests being answered.", registry=self._registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, model: str, stage: str, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch that is finished; the stage is "encode" or "search"."""
        self._texts.labels(model, stage).observe(texts)
        self._batch.labels(model, stage).observe(seconds)
        if stage == "encode":
            self._tokens.labels(model).inc(tokens)

    def expose(self, waiting: Mapping[str, int]) -> bytes:
        """All metrics as Prometheus reads them; `waiting` are the texts in each model's queue now."""
        for model, texts in waiting.items():
            self._waiting.labels(model).set(texts)
        return generate_latest(self._registry)


class JsonLines(logging.Formatter):
    """A log record as one JSON object; `extra={"facts": {...}}` adds keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
