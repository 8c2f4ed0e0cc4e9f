"""What every request passes: ids, the key, limits, the log, metrics; and requests that nobody should send."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from served import ask, dense_run, sparse_run

from retrieval_kd.server import Limits, Model, create_app, load_bm25, load_model
from retrieval_kd.server.monitor import JsonLines


class Slow:
    """An encoder that takes its time, or fails."""

    dimension = 2

    def __init__(self, seconds: float = 0.0) -> None:
        self.manifest: dict[str, Any] = {"identity": {}, "document_identity": {}}
        self.seconds = seconds
        self.asked = 0

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += 1
        time.sleep(self.seconds)
        if "fault" in texts:
            raise ZeroDivisionError("by design")
        return np.ones((len(texts), 2), np.float32)


def slow_app(seconds: float = 0.0, limits: Limits | None = None, **others: Any) -> Any:
    return create_app([Model("slow", Slow(seconds))], limits, **others)


def body(text: str) -> bytes:
    return json.dumps({"model": "slow", "input": text}).encode()


@pytest.fixture(scope="module")
def runs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    dense_run(folder / "tiny", exported)
    sparse_run(folder / "free", exported)
    return folder


def load(runs: Path) -> list[Model]:
    return [load_model(str(runs / "tiny")), load_model(str(runs / "free")), load_bm25(str(runs / "tiny"))]


@pytest.fixture(scope="module")
def models(runs: Path) -> list[Model]:
    return load(runs)


def test_request_ids(models: list[Model]) -> None:
    client = TestClient(create_app(models))
    given = client.get("/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = [
        client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 129)
    ]
    assert len(set(made)) == 3
    assert all(len(one) == 32 for one in made)
    refused = client.post("/embed", json={}, headers={"x-request-id": "abc-2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (422, "abc-2")


def test_the_key(models: list[Model]) -> None:
    client = TestClient(create_app(models, api_key="sécret"))
    key = "sécret".encode()
    for header in (None, b"Bearer", b"Bearer s", b"Basic " + key, key, b"Bearer " + key + b"x"):
        headers = {} if header is None else {b"authorization": header}
        for path in ("/v1/models", "/info", "/openapi.json", "/nowhere"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert client.get("/info").json()["error_type"] == "Unauthorized"
    for scheme in (b"Bearer ", b"bearer "):
        assert client.get("/v1/models", headers={b"authorization": scheme + key}).status_code == 200
    for path in ("/", "/health", "/metrics"):
        assert client.get(path).status_code == 200


def test_too_many_requests_at_once() -> None:
    app = slow_app(0.2, Limits(requests=3))

    async def run() -> None:
        tasks = [asyncio.create_task(ask(app, "POST", "/v1/embeddings", body("a"))) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert (await ask(app, "GET", "/health"))[0] == 200  # is answered nevertheless
        status, headers, text = await ask(app, "POST", "/embed", b'{"inputs": "a"}')
        assert (status, headers["retry-after"], json.loads(text)["error_type"]) == (429, "1", "Overloaded")
        answers = await asyncio.gather(*tasks)
        assert sorted(status for status, _, _ in answers) == [200, 200, 200, 429, 429]
        refused = next(json.loads(text) for status, _, text in answers if status == 429)
        assert (refused["error"]["type"], refused["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert (await ask(app, "POST", "/v1/embeddings", body("a")))[0] == 200

    asyncio.run(run())


def test_a_request_that_takes_too_long() -> None:
    app = slow_app(0.3, Limits(seconds=0.1))

    async def run() -> None:
        status, _, text = await ask(app, "POST", "/v1/embeddings", body("a"))
        assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(9)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/embed", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        assert sent[0]["status"] == 408

    asyncio.run(run())


def test_a_fault_is_an_answer_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(slow_app())
    with caplog.at_level(logging.ERROR, "retrieval_kd.server"):
        answer = client.post("/v1/embeddings", content=body("fault"), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    (line,) = [JsonLines().format(record) for record in caplog.records]
    assert "ZeroDivisionError: by design" in json.loads(line)["traceback"]
    assert json.loads(line)["request_id"] == answer.headers["x-request-id"]
    assert client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_the_log_says_who_asked_what_but_no_texts(models: list[Model], caplog: pytest.LogCaptureFixture) -> None:
    client = TestClient(create_app(models))
    with caplog.at_level(logging.INFO, "retrieval_kd.server"):
        client.post("/embed", json={"inputs": ["secret words", "b"]}, headers={"x-request-id": "abc"})
    (line,) = [JsonLines().format(record) for record in caplog.records if record.name == "retrieval_kd.server"]
    found = json.loads(line)
    assert (found["request_id"], found["path"], found["status"], found["level"]) == ("abc", "/embed", 200, "info")
    assert (found["model"], found["texts"]) == ("tiny", 2)
    assert found["tokens"] > 4
    assert found["ms"] > 0
    assert "secret" not in line


def test_metrics(models: list[Model]) -> None:
    client = TestClient(create_app(models))
    for _ in range(3):
        client.post("/embed", json={"inputs": ["a", "b"]})
    client.post("/embed", json={})
    client.get("/nowhere/1")
    client.get("/v1/models/none")
    exposed = client.get("/metrics")
    assert exposed.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(exposed.text)
        for sample in family.samples
    }
    assert samples["rkd_requests_total", "/embed", "200"] == 3
    assert samples["rkd_requests_total", "/embed", "422"] == 1
    assert samples["rkd_requests_total", "404", "unknown"] == 1  # paths that do not exist are not labels
    assert samples["rkd_requests_total", "/v1/models/{name:path}", "404"] == 1
    encoded = [samples[f"rkd_batch_texts_{what}", "encode", "tiny"] for what in ("sum", "count")]
    assert encoded == [6, 6]  # an int8 graph takes texts one by one
    assert samples["rkd_tokens_total", "tiny"] == 3 * 2 * 3
    assert samples["rkd_waiting_texts", "tiny"] == 0
    assert samples["rkd_requests_in_flight",] == 1  # this one
    assert ("process_resident_memory_bytes",) in samples or sys.platform != "linux"


ROUTES = ["/v1/embeddings", "/embed", "/embed_sparse", "/tokenize", "/search"]
KEYS = ["model", "input", "inputs", "query", "queries", "k", "dimensions", "encoding_format", "input_type", "truncate"]
KEYS += ["normalize", "prompt_name", "truncation_direction", "add_special_tokens", "user", "\ud800", "", "x" * 1000]
TEXTS = [
    "",
    "a",
    "sort a list",
    "\x00",
    "\ud800",
    "\udfff\ud800",
    "é" * 100,
    "日本語",
    "🧠🏽",
    "\u202e",
    "a" * 30_000,
    "[MASK] [PAD]",
]
TEXTS += ["tiny", "free", "bm25", "query", "document", "Left", "base64", "\n" * 500, "\ufffe", "a\u0300" * 50]
NUMBERS = [0, -1, 1, 2, 3.5, 1e308, -(10**30), 2**63, 10, 32, float("nan"), float("inf"), True, None]


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value that may be in JSON, more often than not of the wrong type."""
    kind = rng.randrange(9 if depth < 4 else 5)
    if kind < 3:
        return rng.choice(TEXTS)
    if kind < 5:
        return rng.choice(NUMBERS)
    if kind < 8:
        return [anything(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 300 if depth == 0 else 4]))]
    return {rng.choice(KEYS): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def hostile(rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and headers of a request that a client may send by mistake, or on purpose."""
    path = rng.choice(
        [*ROUTES, *ROUTES, *ROUTES, "/", "/info", "/metrics", "/v1/models/" + rng.choice(TEXTS), "/x\ud800"]
    )
    method = rng.choices(["POST", "GET", "PUT", "DELETE", "OPTIONS", "HEAD", "BREW"], [30, 2, 1, 1, 1, 1, 1])[0]
    headers = {}
    kind = rng.randrange(10)
    if kind == 0:
        body = rng.randbytes(rng.choice([0, 1, 10, 1000]))
    elif kind == 1:
        body = rng.choice(
            [b"[" * 100_000, b"{" * 5000, b'{"a":' * 5000, b"9" * 50_000, b'"' + b"a" * 200_000, b"[" + b"1e999," * 9]
        )
    elif kind == 2:
        text = json.dumps({rng.choice(KEYS): anything(rng)})
        body = text[: rng.randrange(len(text) + 1)].encode("utf-8", "surrogatepass")
    elif kind == 3:
        body = json.dumps(anything(rng), ensure_ascii=False).encode(
            rng.choice(["utf-16", "utf-32", "utf-8"]), "surrogatepass"
        )
    else:
        given = {key: anything(rng) for key in rng.sample(KEYS, rng.choice([0, 0, 0, 1, 4]))}
        field = {"/v1/embeddings": "input", "/search": "query"}.get(path, "inputs")
        key = field if rng.random() < 0.9 else rng.choice(KEYS)
        given[key] = rng.choice(TEXTS) if rng.random() < 0.6 else anything(rng)
        if path in ("/v1/embeddings", "/search") or rng.random() < 0.2:
            given["model"] = rng.choice(["tiny", "free", "bm25"])
        body = json.dumps(given).encode()
    if rng.random() < 0.1:
        headers["content-length"] = rng.choice(["-1", "x", "", "9" * 30, "²", "0", " 1", str(2**40)])
    if rng.random() < 0.1:
        headers["content-type"] = rng.choice(
            ["text/plain", "application/json; charset=x", "", "x" * 500, "multipart/form-data"]
        )
    if rng.random() < 0.05:
        headers["authorization"] = rng.choice(["Bearer", "Bearer é", "", "a" * 5000])
    return method, path, body, headers


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_request_makes_the_server_fail(models: list[Model], count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Random bytes, wrong types, half surrogates, bombs of brackets: never a 500, and then it still answers."""
    caplog.set_level(logging.CRITICAL, "retrieval_kd.server")
    app = create_app(models, Limits(body_bytes=150_000))
    rng = random.Random(count)

    async def run() -> dict[int, int]:
        statuses: dict[int, int] = {}
        for _ in range(count):
            method, path, given, headers = hostile(rng)
            status, _, text = await ask(app, method, path, given, headers)
            assert status < 500, (method, path, given[:300], headers, text)
            if status >= 400 and method != "HEAD":
                assert isinstance(json.loads(text)["error"], str | dict)
            statuses[status] = statuses.get(status, 0) + 1
        found = await ask(app, "POST", "/embed", b'{"inputs": "sort a list"}')
        assert found[0] == 200
        return statuses

    statuses = asyncio.run(run())
    assert {200, 400, 404, 405, 413, 422} <= set(statuses)
    assert statuses[200] > count / 20


def memory_held(runs: Path, counts: Sequence[int]) -> list[int]:
    """Bytes that a process holds after so many requests to a server of `runs`, asked in eight lanes."""
    logging.getLogger("retrieval_kd.server").setLevel(logging.CRITICAL)
    app = create_app(load(runs))

    def request(number: int) -> tuple[str, str, bytes]:
        text = f"read file {number} and sort the list"
        bodies = {
            "/v1/embeddings": {"model": "tiny", "input": text},
            "/embed_sparse": {"inputs": text},
            "/search": {"model": "free", "query": text},
            "/tokenize": {"inputs": text},
            "/embed": {"inputs": number},
        }
        path = list(bodies)[number % 5]
        return "POST", path, json.dumps(bodies[path]).encode()

    async def lane(numbers: range) -> None:
        for number in numbers:
            await ask(app, *request(number))

    async def run(begin: int, end: int) -> int:
        await asyncio.gather(*(lane(range(begin + start, end, 8)) for start in range(8)))
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    return [asyncio.run(run(begin, end)) for begin, end in itertools.pairwise([0, *counts])]


@pytest.mark.slow
def test_memory_stays_level(runs: Path) -> None:
    """100,000 requests, in a process of their own: what it holds after 20,000 is what it holds at the end."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        early, late = pool.submit(memory_held, runs, (20_000, 100_000)).result()
    assert late - early < 8 * 2**20, f"{early / 2**20:.1f} MB, then {late / 2**20:.1f}"


SERVER = """
import sys, threading
sys.path[:0] = [{tests!r}]
from test_server_gate import Slow
from retrieval_kd.server import Batching, Model, serve
serve([Model("slow", Slow({seconds}))], port=0, batching=Batching(texts=4))
"""


def start(seconds: float) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    code = SERVER.format(tests=str(Path(__file__).parent), seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if '"listening"' in line:
            return process, json.loads(line)["address"]
    raise AssertionError("it did not start")


def test_sigterm_under_load_finishes_what_is_in_flight() -> None:
    """Sixteen clients wait when it comes: all get their answers whole, and the process ends by itself with 0."""
    process, address = start(0.5)
    port, given = int(address.rpartition(":")[2]), body("a")
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(given)}"
    clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(16)]
    for client in clients:
        client.sendall(head.encode() + b"\r\n\r\n" + given)
    with httpx.Client() as watcher:
        for _ in range(200):
            if "rkd_requests_in_flight 17.0" in watcher.get(f"{address}/metrics").text:  # 16, and this one
                break
        else:
            raise AssertionError("they are not all in flight")
    os.kill(process.pid, signal.SIGTERM)
    for client in clients:
        answer = client.makefile("rb").read()  # until the server closes it
        assert b" 200 " in answer[:20]
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["data"]) == 1
    assert process.wait(timeout=10) == 0
    assert process.stderr is not None
    lines = [json.loads(line) for line in process.stderr]
    assert lines[-1]["message"] == "stopped"
    assert len([line for line in lines if line.get("path") == "/v1/embeddings" and line["status"] == 200]) == 16
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
