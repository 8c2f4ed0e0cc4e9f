"""The page at `/`: a query, and the results of two systems side by side. One file, nothing loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")
# What the file itself holds may run, and it may ask this server; nothing else.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_routes(app: FastAPI) -> None:
    """Add the page."""
    html = _FILE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """The page."""
        return HTMLResponse(html, headers={"content-security-policy": _POLICY})
