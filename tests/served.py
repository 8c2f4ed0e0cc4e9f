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

import torch
import uvicorn
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from transformers import PreTrainedTokenizerFast

from retrieval_kd.encoder import Encoder
from retrieval_kd.export_table import export_table
from retrieval_kd.files import read_json, write_json
from retrieval_kd.index import build_index
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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(exported / "fp32" / "tokenizer.json"), model_max_length=8, pad_token="[PAD]"
    )
    module = SparseStaticEmbedding(tokenizer, torch.linspace(0.5, 2, tokenizer.vocab_size))
    identity, table = {"student": "free"}, folder / "served" / "fp32"
    export_table([module], table, "fp32", identity=identity, document_identity=identity, check_texts=TEXTS)
    vectors = Encoder.load(table).encode(TEXTS)
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
