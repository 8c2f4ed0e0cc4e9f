"""The server's routes, through its test client and through OpenAI's client over a socket."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from served import DOCUMENTS, TEXTS, dense_run, running, sparse_run

from retrieval_kd import server
from retrieval_kd.encoder import Encoder
from retrieval_kd.index import build_index
from retrieval_kd.server import Batching, Limits, create_app, load_bm25, load_model
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

ONE_SIDE = {"document_identity": {"student": "tiny-document"}}


@pytest.fixture(scope="module")
def runs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by name: dense `tiny`, one that is asymmetric, one with widths, and an inference-free one."""
    folder = tmp_path_factory.mktemp("runs")
    dense_run(folder / "tiny", exported)
    dense_run(folder / "one-side", exported, ONE_SIDE)
    dense_run(folder / "nested", exported, {"widths": [8, 16]})
    sparse_run(folder / "free", exported)
    return folder


@pytest.fixture(scope="module")
def encoder(exported: Path) -> Encoder:
    return Encoder.load(exported / "fp32")


@pytest.fixture(scope="module")
def client(runs: Path) -> TestClient:
    models = [load_model(str(runs / name), "fp32") for name in ("tiny", "one-side", "nested")]
    return TestClient(create_app([*models, load_model(str(runs / "free")), load_bm25(str(runs / "tiny"))]))


def embed(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": "tiny", **body})


def test_embeddings(client: TestClient, encoder: Encoder) -> None:
    texts = ["sort the list", "", "xylophone"]
    answer = embed(client, input=texts).json()
    assert [answer["object"], answer["model"]] == ["list", "tiny"]
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", n) for n in range(3)]
    vectors = np.array([item["embedding"] for item in answer["data"]], np.float32)
    np.testing.assert_allclose(vectors, encoder.encode(texts), atol=1e-6)
    tokens = sum(encoder.count_tokens(texts))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    packed = embed(client, input=texts[0], encoding_format="base64", dimensions=32, user="u").json()
    vector = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, vectors[0], atol=1e-6)


def test_usage_counts_what_is_read_of_a_long_text(client: TestClient, encoder: Encoder) -> None:
    long = "sort a list " * 400  # beyond the model's length, and beyond what is tokenised at once
    assert embed(client, input=long).json()["usage"]["total_tokens"] == encoder.count_tokens([long])[0] == 24


@pytest.mark.parametrize("side", ["query", "document", "search_query", "search_document"])
def test_sides(client: TestClient, side: str) -> None:
    assert embed(client, input="sort", input_type=side).status_code == 200
    answer = embed(client, model="one-side", input="sort", input_type=side)
    assert answer.status_code == (400 if side.endswith("document") else 200)
    if side.endswith("document"):
        assert answer.json()["error"]["param"] == "input_type"
        assert "query side of an asymmetric student" in answer.json()["error"]["message"]


def test_widths(client: TestClient, encoder: Encoder) -> None:
    """A student trained for shorter vectors gives them, at length 1; another one refuses."""
    whole = encoder.encode(["sort a list"])[0]
    for width in (8, 16, 32):
        (item,) = embed(client, model="nested", input="sort a list", dimensions=width).json()["data"]
        np.testing.assert_allclose(item["embedding"], whole[:width] / np.linalg.norm(whole[:width]), atol=1e-6)
    refused = embed(client, model="nested", input="a", dimensions=9).json()["error"]
    assert (refused["param"], "8 or 16 or 32" in refused["message"]) == ("dimensions", True)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "gpt", "input": "a"}, 404, "model", "The model 'gpt' does not exist; this server has 'tiny'"),
        ({"model": "free", "input": "a"}, 400, "model", "gives no dense vectors"),
        ({"model": "bm25", "input": "a"}, 400, "model", "gives no dense vectors"),
        ({"input": [1, 2]}, 400, "input", "not lists of token ids"),
        ({"input": [[1, 2], [3]]}, 400, "input", "not lists of token ids"),
        ({"input": ["a", 3]}, 400, "input", "a text or a list of texts"),
        ({"input": []}, 400, "input", "empty list"),
        ({"input": "a", "dimensions": 16}, 400, "dimensions", "not trained for vectors of 16"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "input_type": "passage"}, 400, "input_type", "'query', 'document'"),
        ({"input": {"text": "a"}}, 400, "input", "a text or a list of texts"),
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


def test_bodies_that_are_no_texts(client: TestClient, runs: Path) -> None:
    broken = client.post("/v1/embeddings", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, None)
    untyped = client.post("/v1/embeddings", content=b'{"model": "tiny", "input": "a"}')
    assert untyped.status_code == 400
    for body in (b'{"model": "tiny", "input": "\\ud800"}', b'{"model": "tiny", "input": "a", "\\ud800": 1}'):
        surrogate = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
        assert surrogate.status_code == 400
    narrow = TestClient(create_app([load_model(str(runs / "tiny"))], Limits(body_bytes=100)))
    assert embed(narrow, input="a" * 101).status_code == 413
    assert embed(narrow, input="a").status_code == 200
    streamed = narrow.post("/v1/embeddings", content=iter([b'{"model": "tiny", "input": "', b"a" * 101, b'"}']))
    assert streamed.status_code == 413
    json_type = {"content-type": "application/json"}
    short = narrow.post("/v1/embeddings", content=iter([b'{"model": "tiny", ', b'"input": "a"}']), headers=json_type)
    assert short.status_code == 200


@pytest.mark.parametrize("model", ["tiny", "free", "bm25"])
def test_search(client: TestClient, model: str) -> None:
    """Dense, sparse and BM25 from one process; each finds the document that is the query."""
    answer = client.post("/search", json={"model": model, "query": "open a file", "k": 3}).json()
    (results,) = answer["results"]
    assert answer["model"] == model
    assert [result["rank"] for result in results] == list(range(1, len(results) + 1))
    assert (results[0]["id"], results[0]["text"]) == ("open", "open a file")
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert answer["encode_ms"] >= 0
    assert answer["search_ms"] > 0
    several = client.post("/search", json={"model": model, "queries": ["date", "sort a list"]}).json()["results"]
    assert [found[0]["id"] for found in several] == ["date", "sorted"]


def test_which_encoders_take_texts_together(runs: Path) -> None:
    folder = str(runs / "tiny")
    assert [load_model(folder, form).one_by_one for form in ("fp32", "int8")] == [False, True]


def test_searches_that_share_a_batch(runs: Path) -> None:
    """Queries with results of different numbers are searched together, each with its own number of documents."""
    for name, form in (("tiny", "fp32"), ("free", None)):
        model = load_model(str(runs / name), form)
        asked = list(zip(model.encode(["a file", "date", "sort a list", "a file"]), [3, 1, 3, 2], strict=True))
        for (row, k), (rows, scores) in zip(asked, model.search_together(asked), strict=True):
            alone = model.search([row], k)
            assert len(rows) == k
            assert rows.tolist() == alone.rows[0].tolist()
            np.testing.assert_allclose(scores, alone.scores[0], atol=1e-6)


def test_search_scores(client: TestClient, encoder: Encoder, runs: Path) -> None:
    """Scores are inner products: with the encoder's vectors, and with the table's."""
    (dense,) = client.post("/search", json={"query": "read the file"}).json()["results"]
    expected = encoder.encode(TEXTS) @ encoder.encode(["read the file"])[0]
    assert {result["id"]: result["score"] for result in dense} == pytest.approx(
        dict(zip(DOCUMENTS, expected.tolist(), strict=True)), abs=1e-5
    )
    table = Encoder.load(runs / "free/served/fp32")
    (sparse,) = client.post("/search", json={"model": "free", "query": "a file"}).json()["results"]
    products = (table.encode(TEXTS) @ table.encode(["a file"]).T).toarray()[:, 0]
    expected = {name: product for name, product in zip(DOCUMENTS, products, strict=True) if product > 0}
    assert {result["id"]: result["score"] for result in sparse} == pytest.approx(expected, abs=1e-5)
    (nothing,) = client.post("/search", json={"model": "bm25", "query": "zzz"}).json()["results"]
    assert nothing == []


def test_search_leaves_out_empty_places_and_texts(encoder: Encoder, exported: Path, runs: Path, tmp_path: Path) -> None:
    lists = Component(kind="faiss", factory="IVF3,Flat", nprobe=1)
    identity = {"student": "tiny"}
    build_index(lists, encoder.encode(TEXTS), tmp_path / "i", document_ids=list(DOCUMENTS), identity=identity)
    model = server.Model("tiny", encoder, index=server.models.open_index(tmp_path / "i"))
    (results,) = TestClient(create_app([model])).post("/search", json={"query": "date", "k": 5}).json()["results"]
    assert 0 < len(results) < 5
    assert set(results[0]) == {"id", "score", "rank"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"query": "a", "queries": ["a"]}, 422),
        ({"query": 3}, 422),
        ({"query": ["a"]}, 422),
        ({"queries": [3, "a"]}, 422),
        ({"query": "a", "k": 0}, 422),
        ({"query": "a", "k": 1001}, 422),
        ({"query": "a", "top": 3}, 422),
        ({"queries": []}, 400),
        ({"queries": ["a"] * 257}, 413),
        ({"query": "a" * 100_001}, 413),
        ({"query": "a", "model": "none"}, 404),
    ],
)
def test_search_errors(client: TestClient, body: dict[str, Any], status: int) -> None:
    answer = client.post("/search", json=body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_search_without_index(exported: Path) -> None:
    """An exported folder alone has no index; the second of two models may have one."""
    client = TestClient(create_app([load_model(str(exported / "fp32"))]))
    answer = client.post("/search", json={"query": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_index")
    assert client.get("/info").json()["models"][0]["index"] is None
    named = client.post("/search", json={"query": "a", "model": "fp32"})
    assert "The model 'fp32' has no index" in named.json()["error"]["message"]


def test_what_is_served(client: TestClient, runs: Path) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    listed = client.get("/v1/models").json()
    assert [entry["id"] for entry in listed["data"]] == ["tiny", "one-side", "nested", "free", "bm25"]
    assert {"id", "object", "created", "owned_by"} == set(listed["data"][0])
    assert client.get("/v1/models/free").json()["id"] == "free"
    assert client.get("/v1/models/none").status_code == 404
    described = {model["name"]: model for model in client.get("/info").json()["models"]}
    assert {name: model["vectors"] for name, model in described.items()} == {
        "tiny": "dense",
        "one-side": "dense",
        "nested": "dense",
        "free": "sparse",
        "bm25": "none",
    }
    assert described["tiny"]["sides"] == ["query", "document"]
    assert described["one-side"]["sides"] == ["query"]
    assert described["nested"]["widths"] == [8, 16, 32]
    assert described["free"]["index"]["documents"] == described["bm25"]["documents"] == 5
    unknown = client.get("/v2")
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (404, "Not Found: GET /v2.")
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_forms_and_names(runs: Path, exported: Path, tmp_path: Path) -> None:
    assert load_model(str(runs / "tiny")).manifest["form"] == "int8"
    assert load_model(str(runs / "tiny"), "fp32").manifest["form"] == "fp32"
    assert load_model(f"small={exported / 'int8'}").name == "small"
    assert load_model(f"other={runs / 'free'}").name == "other"
    with pytest.raises(InputError, match=r"has no form 'fp16'; it has fp32, int8"):
        load_model(str(runs / "tiny"), "fp16")
    with pytest.raises(InputError, match="neither an exported encoder nor a finished run"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match=r"models of one name.*NAME=FOLDER"):
        create_app([load_model(str(runs / "tiny")), load_model(str(runs / "tiny"), "fp32")])
    with pytest.raises(InputError, match="nothing to serve"):
        create_app([])


def test_what_does_not_belong_together_is_refused(exported: Path, tmp_path: Path) -> None:
    run = dense_run(tmp_path / "run", exported)
    documents = run / "index/documents.jsonl"
    lines = documents.read_text().splitlines()
    documents.write_text("\n".join(lines[1:]))
    with pytest.raises(InputError, match="lacks document 'sorted'"):
        load_model(str(run))
    documents.write_text("\n".join([*lines, '{"id": "more"}']))
    with pytest.raises(InputError, match=r"documents\.jsonl:6: '_id' must be a string"):
        load_model(str(run))
    documents.write_text("\n".join(reversed(lines)))  # in another order: each text goes to its own row
    client = TestClient(create_app([load_model(str(run))]))
    assert client.post("/search", json={"query": "date"}).json()["results"][0][0]["text"] == "date"
    vectors, identity = Encoder.load(exported / "fp32").encode(TEXTS), {"student": "other"}
    build_index(Component(kind="faiss"), vectors, run / "index/index", document_ids=list(DOCUMENTS), identity=identity)
    with pytest.raises(InputError, match=r"another document tower .* differ in student"):
        load_model(str(run))
    identity = {"student": "tiny"}
    narrow = vectors[:, :16].copy()
    build_index(Component(kind="faiss"), narrow, run / "index/index", document_ids=list(DOCUMENTS), identity=identity)
    with pytest.raises(InputError, match="vectors of width 16 and the encoder gives 32"):
        load_model(str(run))


def test_port_in_use_is_an_input_error(exported: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(InputError, match="cannot listen on"):
        server.serve([load_model(str(exported / "fp32"))], port=listener.getsockname()[1])


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    """The server behind a real socket, in a thread, with small batches and two workers."""
    app = create_app([load_model(str(runs / "tiny"), "fp32")], batching=Batching(texts=4, workers=2))
    with running(app) as found:
        yield found


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
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="gpt", input="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model="tiny", input=[1, 2, 3])


def test_many_clients_at_once(address: str, encoder: Encoder) -> None:
    """Each gets its own vectors, though the requests arrive together and share batches."""
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
