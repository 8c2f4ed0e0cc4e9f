"""TEI's routes: requests as its documentation and clients send them get answers of its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fastapi.testclient import TestClient
from served import dense_run, sparse_run

from retrieval_kd.encoder import Encoder
from retrieval_kd.server import Limits, Model, create_app, load_model


@pytest.fixture(scope="module")
def runs(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    dense_run(folder / "tiny", exported, {"widths": [16]})
    sparse_run(folder / "free", exported)
    dense_run(folder / "one-side", exported, {"document_identity": {"student": "tiny-document"}})
    return folder


@pytest.fixture(scope="module")
def client(runs: Path) -> TestClient:
    names = {"tiny": "fp32", "free": None, "one-side": "fp32"}
    models = [load_model(str(runs / name), form) for name, form in names.items()]
    return TestClient(create_app(models, Limits(texts=8)))


@pytest.fixture(scope="module")
def encoder(exported: Path) -> Encoder:
    return Encoder.load(exported / "fp32")


# Bodies as in TEI's README, its OpenAPI examples, and the clients of Haystack, LangChain and LlamaIndex.
RECORDED: list[dict[str, Any]] = [
    {"inputs": "What is Deep Learning?"},
    {"inputs": ["What is Deep Learning?"]},
    {"inputs": ["What is Deep Learning?", "read a file"], "truncate": True},
    {"inputs": "sort a list", "normalize": True, "truncate": False},
    {"inputs": "sort a list", "truncation_direction": "Right", "prompt_name": None},
    {"inputs": "sort a list", "prompt_name": "query", "dimensions": None},
]


@pytest.mark.parametrize("body", RECORDED)
def test_embed(client: TestClient, encoder: Encoder, body: dict[str, Any]) -> None:
    """A list of lists of numbers, also for one text."""
    answer = client.post("/embed", json=body)
    assert answer.status_code == 200
    texts = [body["inputs"]] if isinstance(body["inputs"], str) else body["inputs"]
    np.testing.assert_allclose(np.array(answer.json()), encoder.encode(texts), atol=1e-6)


def test_embed_width(client: TestClient, encoder: Encoder) -> None:
    (short,) = client.post("/embed", json={"inputs": "sort", "dimensions": 16}).json()
    whole = encoder.encode(["sort"])[0, :16]
    np.testing.assert_allclose(short, whole / np.linalg.norm(whole), atol=1e-6)


def test_embed_sparse(client: TestClient, runs: Path) -> None:
    """A list of lists of {"index", "value"}; the sparse model answers though it is not the first."""
    table = Encoder.load(runs / "free/served/fp32")
    for body in ({"inputs": "a file"}, {"inputs": ["a file"], "truncate": True}, {"inputs": "a file", "model": "free"}):
        (found,) = client.post("/embed_sparse", json=body).json()
        ((terms, weights),) = table.terms(["a file"])
        assert [entry["index"] for entry in found] == terms.tolist()
        assert [entry["value"] for entry in found] == pytest.approx(weights.tolist())
        assert {frozenset(entry) for entry in found} == {frozenset({"index", "value"})}
    long = "a file " * 500  # looked up in another thread
    assert client.post("/embed_sparse", json={"inputs": long}).json()[0] == found


def test_tokenize(client: TestClient) -> None:
    (tokens,) = client.post("/tokenize", json={"inputs": "Sort it", "add_special_tokens": True}).json()
    assert [token["text"] for token in tokens] == ["[CLS]", "Sort", "i", "t", "[SEP]"]
    assert tokens[0] == {"id": 2, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert (tokens[1]["special"], tokens[1]["start"], tokens[1]["stop"]) == (False, 0, 4)
    (plain,) = client.post("/tokenize", json={"inputs": ["Sort it"], "add_special_tokens": False}).json()
    assert [token["text"] for token in plain] == ["Sort", "i", "t"]


def test_info(client: TestClient, encoder: Encoder) -> None:
    info = client.get("/info").json()
    assert info["model_id"] == "tiny"
    assert info["model_sha"] == encoder.manifest["fingerprints"]["model.onnx"]
    assert (info["model_dtype"], info["max_input_length"], info["max_client_batch_size"]) == ("fp32", 24, 8)
    assert set(info["model_type"]["embedding"]) == {"pooling"}
    others = {"max_concurrent_requests", "max_batch_tokens", "tokenization_workers", "auto_truncate", "version"}
    assert others < set(info)


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/embed", {"inputs": []}, 400, "Empty"),
        ("/embed", {"inputs": ""}, 422, "Validation"),
        ("/embed", {"inputs": ["a", ""]}, 422, "Validation"),
        ("/embed", {"inputs": ["a"] * 9}, 413, "Validation"),
        ("/embed", {"inputs": "list " * 30, "truncate": False}, 422, "Validation"),
        ("/embed", {"inputs": "a", "truncation_direction": "Left"}, 422, "Validation"),
        ("/embed", {"inputs": "a", "prompt_name": "passage"}, 422, "Validation"),
        ("/embed", {"inputs": "a", "prompt_name": "document", "model": "one-side"}, 422, "Validation"),
        ("/embed", {"inputs": "a", "dimensions": 7}, 422, "Validation"),
        ("/embed", {"inputs": "a", "model": "free"}, 400, "Empty"),
        ("/embed", {"inputs": 3}, 422, "Validation"),
        ("/embed", {"input": "a"}, 422, "Validation"),
        ("/embed_sparse", {"inputs": "list " * 30, "truncate": False}, 422, "Validation"),
        ("/embed_sparse", {"inputs": "a", "model": "none"}, 404, "Validation"),
        ("/tokenize", {"inputs": {}}, 422, "Validation"),
    ],
)
def test_errors(client: TestClient, path: str, body: dict[str, Any], status: int, kind: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == kind


def test_no_sparse_model(exported: Path) -> None:
    client = TestClient(create_app([load_model(str(exported / "fp32"))]))
    assert client.post("/embed_sparse", json={"inputs": "a"}).status_code == 404


class Graph:
    """A sparse student with a graph: as a server sees it."""

    manifest: ClassVar[dict[str, Any]] = {"vectors": "sparse", "identity": {}, "document_identity": {}, "max_length": 8}

    def __init__(self, table: Encoder) -> None:
        self.dimension = table.dimension
        self.terms = table.terms


def test_a_sparse_student_with_a_graph(runs: Path) -> None:
    """Is batched like a dense one, and gives the same terms and documents as the table that it stands for."""
    free = load_model(str(runs / "free"))
    graph = Model("graph", Graph(free.encoder), free.tokenizer)
    client = TestClient(create_app([graph, free]))
    texts = ["a file", "zzz", "list of the thread"]
    answers = [client.post("/embed_sparse", json={"inputs": texts, "model": name}).json() for name in ("graph", "free")]
    assert answers[0] == answers[1]
    assert [bool(terms) for terms in answers[0]] == [True, True, True]
    assert client.post("/embed", json={"inputs": "a"}).status_code == 404
    described = client.get("/info").json()["models"][0]
    assert (described["vectors"], described["sides"]) == ("sparse", ["query", "document"])
