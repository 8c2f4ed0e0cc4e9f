"""Folders of runs to serve, made in a moment, and an application behind a socket or asked without one."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from scipy.sparse import csr_array
from tokenizers import Tokenizer

from retrieval_kd.encoder import Encoder
from retrieval_kd.files import read_json, write_json
from retrieval_kd.index import build_index
from retrieval_kd.query_table import QueryTable, save_table
from retrieval_kd.tables import Component

DOCUMENTS = {
    "sorted": "sort a list",
    "open": "open a file",
    "dict": "key and value",
    "lock": "lock of a thread",
    "date": "date",
}
TEXTS = list(DOCUMENTS.values())


def write_documents(folder: Path) -> None:
    """The texts of the run's index."""
    lines = [json.dumps({"_id": name, "text": text}) for name, text in DOCUMENTS.items()]
    (folder / "index" / "documents.jsonl").write_text("\n".join(lines))


def dense_run(folder: Path, exported: Path, manifest: dict[str, Any] | None = None) -> Path:
    """A finished run of a dense student; `manifest` changes those of its encoders."""
    shutil.copytree(exported, folder / "served")
    for form in ("fp32", "int8"):
        path = folder / "served" / form / "encoder.json"
        write_json(path, read_json(path) | (manifest or {}))
    vectors = Encoder.load(folder / "served" / "fp32").encode(TEXTS)
    identity = (manifest or {}).get("document_identity", {"student": "tiny"})
    build_index(
        Component(kind="faiss"), vectors, folder / "index/index", document_ids=list(DOCUMENTS), identity=identity
    )
    write_documents(folder)
    return folder


def sparse_run(folder: Path, exported: Path) -> Path:
    """A finished run of an inference-free student: documents are the terms that they consist of."""
    table = folder / "served" / "table"
    table.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(exported / "fp32" / "tokenizer.json"))
    weights = np.linspace(0.5, 2, tokenizer.get_vocab_size()).astype(np.float32)
    save_table(table, tokenizer, 8, weights, {"student": "free"}, {"student": "free"})
    vectors = csr_array(QueryTable.load(table).encode(TEXTS))
    kind = Component(kind="impact", weights="float32")
    build_index(kind, vectors, folder / "index/index", document_ids=list(DOCUMENTS), identity={"student": "free"})
    write_documents(folder)
    return folder


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The application behind a socket, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)


async def ask(
    app: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a request put to an ASGI application."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if not parts:
            await asyncio.Event().wait()  # the client stays
        return parts.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    start, *rest = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(message.get("body", b"") for message in rest)
