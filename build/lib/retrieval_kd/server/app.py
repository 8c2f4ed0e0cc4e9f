"""The application: all routes over the same models."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from retrieval_kd import __version__
from retrieval_kd.server import openai, page, search, tei
from retrieval_kd.server.batching import Batching
from retrieval_kd.server.errors import Limits, Refusal, on_http, on_invalid, on_refusal
from retrieval_kd.server.gate import Gate
from retrieval_kd.server.models import Model
from retrieval_kd.server.monitor import Monitor
from retrieval_kd.server.service import Service


def create_app(
    models: Sequence[Model],
    limits: Limits | None = None,
    batching: Batching | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The application that serves `models`; of those that fit a request without a name, the first answers.

    With an `api_key`, all routes but /, /health and /metrics ask for it. Raises InputError for two of one name.
    """
    limits, batching = limits or Limits(), batching or Batching()
    monitor = Monitor()
    service = Service(models, limits, batching, monitor)
    app = FastAPI(
        title="retrieval_kd",
        version=__version__,
        description=f"Vectors and search of {', '.join(service.models)}.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Gate, limits=limits, monitor=monitor, api_key=api_key)
    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    openai.add_routes(app, service)
    tei.add_routes(app, service)
    search.add_routes(app, service)
    page.add_routes(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answers as long as the process does."""
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(monitor.expose(service.waiting()), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
