"""The server, through its test client and through OpenAI's client over a socket."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient

from retrieval_kd import server
from retrieval_kd.encoder import Encoder
from retrieval_kd.index import build_index, open_index
from retrieval_kd.server import Limits, create_app
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

FLAT = Component(kind="faiss")
DOCUMENTS = {
    "sorted": "sort a list",
    "open": "open a file",
    "dict": "key and value",
    "lock": "lock of a thread",
    "date": "date",
}


@pytest.fixture(scope="module")
def encoder(exported: Path) -> Encoder:
    return Encoder.load(exported / "fp32")


@pytest.fixture(scope="module")
def index_folder(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    vectors = encoder.encode(list(DOCUMENTS.values()))
    build_index(FLAT, vectors, folder, document_ids=list(DOCUMENTS), identity={"student": "tiny"})
    return folder


@pytest.fixture(scope="module")
def client(encoder: Encoder, index_folder: Path) -> TestClient:
    return TestClient(create_app(encoder, open_index(index_folder), "tiny", list(DOCUMENTS.values())))


def asymmetric(encoder: Encoder) -> Encoder:
    """The same encoder, trained with another document tower."""
    return Encoder(
        encoder._session, encoder._tokenizer, encoder.manifest | {"document_identity": {"student": "tiny-document"}}
    )


def embed(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": "tiny", **body})


def test_embeddings(client: TestClient, encoder: Encoder) -> None:
    texts = ["sort the list", "", "xylophone"]
    answer = embed(client, input=texts).json()
    assert [answer["object"], answer["model"]] == ["list", "tiny"]
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", n) for n in range(3)]
    vectors = np.array([item["embedding"] for item in answer["data"]], np.float32)
    np.testing.assert_array_equal(vectors, encoder.encode(texts))
    tokens = sum(encoder.count_tokens(texts))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    packed = embed(client, input=texts[0], encoding_format="base64", dimensions=32, user="u").json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, vectors[0], atol=1e-6)


@pytest.mark.parametrize("side", ["query", "document", "search_query", "search_document"])
def test_sides(client: TestClient, encoder: Encoder, side: str) -> None:
    assert embed(client, input="sort", input_type=side).status_code == 200
    one_side = TestClient(create_app(asymmetric(encoder), None, "tiny"))
    answer = embed(one_side, input="sort", input_type=side)
    assert answer.status_code == (400 if side.endswith("document") else 200)
    assert one_side.get("/info").json()["sides"] == ["query"]
    if side.endswith("document"):
        assert answer.json()["error"]["param"] == "input_type"
        assert "query side of an asymmetric student" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "gpt", "input": "a"}, 404, "model", "The model 'gpt' does not exist; this server has 'tiny'"),
        ({"input": [1, 2]}, 400, "input", "not lists of token ids"),
        ({"input": [[1, 2], [3]]}, 400, "input", "not lists of token ids"),
        ({"input": []}, 400, "input", "empty list"),
        ({"input": "a", "dimensions": 16}, 400, "dimensions", "not trained for shorter vectors"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "input_type": "passage"}, 400, "input_type", "'query', 'document'"),
        ({"input": {"text": "a"}}, 400, "input", "valid string"),
        ({"input": "a", "truncate": True}, 400, "truncate", "not permitted"),
        ({}, 400, "input", "required"),
        ({"input": ["a"] * 257}, 413, "input", "257 texts in one request; at most 256"),
        ({"input": ["a", "b" * 100_001]}, 413, "input", "100001 characters; at most 100000"),
    ],
)
def test_embeddings_errors(client: TestClient, body: dict[str, Any], status: int, param: str, message: str) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", **body})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]
    assert error["code"] == ("model_not_found" if status == 404 else None)


def test_largest_requests_are_taken(client: TestClient) -> None:
    assert embed(client, input=["a"] * 256).status_code == 200
    assert embed(client, input="b" * 100_000).status_code == 200


def test_bodies_that_are_no_texts(client: TestClient, encoder: Encoder) -> None:
    broken = client.post("/v1/embeddings", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, None)
    surrogate = client.post("/v1/embeddings", content=b'{"model": "tiny", "input": "\\ud800"}')
    assert surrogate.status_code == 400
    streamed = client.post("/v1/embeddings", content=iter([b"{}"]))
    assert streamed.status_code == 411
    narrow = TestClient(create_app(encoder, None, "tiny", limits=Limits(body_bytes=100)))
    assert embed(narrow, input="a" * 101).status_code == 413
    assert embed(narrow, input="a").status_code == 200


def test_search(client: TestClient) -> None:
    answer = client.post("/search", json={"query": "open a file", "k": 3}).json()
    (results,) = answer["results"]
    assert [result["rank"] for result in results] == [1, 2, 3]
    assert results[0]["id"] == "open"
    assert results[0]["text"] == "open a file"
    assert results[0]["score"] == pytest.approx(1, abs=1e-5)
    assert results[0]["score"] > results[1]["score"] > results[2]["score"]
    assert answer["encode_ms"] > 0
    assert answer["search_ms"] > 0
    several = client.post("/search", json={"queries": ["date", "sort a list"], "k": 1000}).json()["results"]
    assert [found[0]["id"] for found in several] == ["date", "sorted"]
    assert [len(found) for found in several] == [5, 5]


def test_search_leaves_out_empty_places_and_texts(encoder: Encoder, tmp_path: Path) -> None:
    vectors = encoder.encode(list(DOCUMENTS.values()))
    lists = Component(kind="faiss", factory="IVF3,Flat", nprobe=1)
    build_index(lists, vectors, tmp_path / "i", document_ids=list(DOCUMENTS), identity={"student": "tiny"})
    client = TestClient(create_app(encoder, open_index(tmp_path / "i"), "tiny"))
    (results,) = client.post("/search", json={"query": "date", "k": 5}).json()["results"]
    assert 0 < len(results) < 5
    assert set(results[0]) == {"id", "score", "rank"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"query": "a", "queries": ["a"]}, 422),
        ({"query": 3}, 422),
        ({"query": "a", "k": 0}, 422),
        ({"query": "a", "k": 1001}, 422),
        ({"query": "a", "top": 3}, 422),
        ({"queries": []}, 400),
        ({"queries": ["a"] * 257}, 413),
        ({"query": "a" * 100_001}, 413),
    ],
)
def test_search_errors(client: TestClient, body: dict[str, Any], status: int) -> None:
    answer = client.post("/search", json=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_search_without_index(encoder: Encoder) -> None:
    client = TestClient(create_app(encoder, None, "tiny"))
    answer = client.post("/search", json={"query": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")
    assert client.get("/info").json()["index"] is None


def test_health_info_and_unknown_routes(client: TestClient, encoder: Encoder) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    info = client.get("/info").json()
    assert info["model"] == "tiny"
    assert info["sides"] == ["query", "document"]
    assert info["encoder"] == encoder.manifest
    assert info["index"]["documents"] == 5
    assert info["limits"]["texts"] == 256
    unknown = client.get("/v2")
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "Not Found: GET /v2.")


def test_index_of_another_tower_is_refused(encoder: Encoder, index_folder: Path) -> None:
    with pytest.raises(InputError, match=r"another document tower .* differ in student"):
        create_app(asymmetric(encoder), open_index(index_folder), "tiny")
    index = open_index(index_folder)
    index.manifest["dimension"] = 16
    with pytest.raises(InputError, match="vectors of width 16 and the encoder gives 32"):
        create_app(encoder, index, "tiny")


def test_index_of_the_document_tower_is_taken(encoder: Encoder, tmp_path: Path) -> None:
    vectors = encoder.encode(list(DOCUMENTS.values()))
    identity = {"student": "tiny-document"}
    build_index(FLAT, vectors, tmp_path / "index", document_ids=list(DOCUMENTS), identity=identity)
    client = TestClient(create_app(asymmetric(encoder), open_index(tmp_path / "index"), "tiny"))
    assert client.post("/search", json={"query": "date"}).status_code == 200


def test_serve_refuses_before_it_listens(
    exported: Path, index_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: started.append((app, settings)))
    lines = [json.dumps({"_id": name, "title": "", "text": text}) for name, text in DOCUMENTS.items()]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join([*lines[1:], '{"_id": "more", "text": "x"}']))
    with pytest.raises(InputError, match="lacks document 'sorted'"):
        server.serve(exported / "fp32", index_folder, corpus)
    with pytest.raises(InputError, match="need an index"):
        server.serve(exported / "fp32", None, corpus)
    corpus.write_text("\n".join([*lines, '{"id": "more"}']))
    with pytest.raises(InputError, match=r"corpus\.jsonl:6: '_id' must be a string"):
        server.serve(exported / "fp32", index_folder, corpus)
    assert not started
    corpus.write_text("\n".join(reversed(lines)))
    server.serve(exported / "fp32", index_folder, corpus, port=1)
    ((app, settings),) = started
    assert settings == {"host": "127.0.0.1", "port": 1}
    client = TestClient(app)
    assert client.get("/info").json()["model"] == "fp32"
    assert client.post("/search", json={"query": "date"}).json()["results"][0][0]["text"] == "date"


@pytest.fixture(scope="module")
def address(encoder: Encoder, index_folder: Path) -> Iterator[str]:
    """The server behind a real socket, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(encoder, open_index(index_folder), "tiny")
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        for _ in range(200):
            if running.started:
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join(timeout=10)


def test_openai_client(address: str, encoder: Encoder) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    texts = ["sort a list", "read a file"]
    for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="tiny", input=texts, **form)
        vectors = [item.embedding for item in answer.data]
        if form.get("encoding_format") == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(np.array(vectors), encoder.encode(texts), atol=1e-6)
        assert answer.usage.total_tokens == sum(encoder.count_tokens(texts))
    assert client.embeddings.create(model="tiny", input="a", extra_body={"input_type": "query"}).data[0].index == 0
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="gpt", input="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model="tiny", input=[1, 2, 3])


def test_many_clients_at_once(address: str, encoder: Encoder) -> None:
    """Each gets its own vectors, though the requests arrive together."""
    texts = [f"read file {number} of {'list ' * number}" for number in range(16)]
    found: dict[str, list[float]] = {}

    def ask(text: str) -> None:
        answer = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": text}, timeout=30)
        found[text] = answer.json()["data"][0]["embedding"]

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([found[text] for text in texts], encoder.encode(texts), atol=1e-5)


def test_imports_without_torch() -> None:
    code = "import sys, retrieval_kd.server; print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
