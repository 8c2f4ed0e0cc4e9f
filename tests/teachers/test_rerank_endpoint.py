"""Rerank endpoints: what each form asks and answers, and what cannot be right is no answer."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint, Reply, ok, serve

from retrieval_kd import endpoint as endpoint_module
from retrieval_kd.tables import Component
from retrieval_kd.teachers import Metered, Teacher, load_teacher
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted

QUERIES = ["sort", "sort", "read", "read", "read", "read", "read", "sort"]
DOCUMENTS = ["a", "b", "a", "c", "d", "e", "f", "c"]


def worth(query: str, document: str) -> float:
    return zlib.crc32(f"{query}|{document}".encode()) / 2**32 - 0.5


def rerank(path: str, body: Any) -> Reply:
    """What the documentation of TEI, Cohere (Jina, vLLM, Infinity) and vLLM's /score says, best first."""
    if path == "/v1/info":
        return ok({"model_id": "BAAI/bge-reranker-base", "model_sha": "abc", "max_client_batch_size": 32})
    if "texts" in body:
        assert (path, body["raw_scores"], body["truncate"]) == ("/v1/rerank", True, True)
        scores = [worth(body["query"], text) for text in body["texts"]]
        return ok([{"index": place, "score": scores[place]} for place in np.argsort(scores)[::-1].tolist()])
    assert body["model"] == "m"
    if "text_2" in body:
        assert path == "/v1/score"
        scores = [worth(body["text_1"], text) for text in body["text_2"]]
        data = [{"index": place, "object": "score", "score": score} for place, score in enumerate(scores)]
        return ok({"object": "list", "data": data, "usage": {"prompt_tokens": 9, "total_tokens": 9}})
    assert (path, body["top_n"]) == ("/v1/rerank", len(body["documents"]))
    scores = [worth(body["query"], text) for text in body["documents"]]
    results = [{"index": place, "relevance_score": scores[place]} for place in np.argsort(scores)[::-1].tolist()]
    return ok({"results": results, "usage": {"total_tokens": 9}})


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    with serve(rerank) as endpoint:
        yield endpoint


def load(url: str, api: str = "cohere", model: str = "m", endpoint: Any = None, **options: Any) -> Any:
    where = {"url": url, **(endpoint or {})}
    return load_teacher(Component(kind="rerank_endpoint", api=api, model=model, endpoint=where, **options), [])


@pytest.mark.parametrize(("api", "model"), [("tei", "BAAI/bge-reranker-base"), ("cohere", "m"), ("vllm", "m")])
def test_scores_of_each_form(api: str, model: str, server: FakeEndpoint) -> None:
    teacher = load(server.url, api, model, documents=3)
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, Metered)
    scores = teacher.score(QUERIES, DOCUMENTS)
    np.testing.assert_allclose(scores, [worth(*pair) for pair in zip(QUERIES, DOCUMENTS, strict=True)], rtol=1e-6)
    assert scores.dtype == np.float32
    bodies = [body for path, body in server.asked if path != "/v1/info"]
    assert len(bodies) == 1 + 2 + 1  # 2 of a query, 5 of another by threes, 1
    assert teacher.usage.tokens == {"tei": 0, "cohere": 36, "vllm": 36}[api]


def test_documents_are_cut(server: FakeEndpoint) -> None:
    np.testing.assert_allclose(load(server.url, document_words=1).score(["q"], ["a b"]), [worth("q", "a")], rtol=1e-6)


def test_another_model_is_served(server: FakeEndpoint) -> None:
    with pytest.raises(InputError, match="serves model 'BAAI/bge-reranker-base', and the recipe names 'other'"):
        load(server.url, "tei", "other").score(["q"], ["d"])
    right = {"api": "tei", "model": "BAAI/bge-reranker-base"}
    with pytest.raises(InputError, match=r"serves revision 'abc' of .*names 'xyz'"):
        load(server.url, **right, revision="xyz").score(["q"], ["d"])
    load(server.url, **right, revision="abc").score(["q"], ["d"])
    with pytest.raises(InputError, match='revision can be checked with api = "tei" alone'):
        load(server.url, revision="abc")


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ({"results": [{"index": 1, "relevance_score": 0.5}]}, [np.nan, 0.5]),
        ({"results": [{"index": 1, "relevance_score": None}, {"index": 0, "relevance_score": 2}]}, [2, np.nan]),
        ({"results": [{"index": 2, "relevance_score": 0.5}, {"index": 0, "relevance_score": 2}]}, [np.nan, np.nan]),
        ({"results": [{"index": 0, "relevance_score": 0.5}, {"index": 0, "relevance_score": 2}]}, [np.nan, np.nan]),
        ({"results": [{"relevance_score": 0.5}]}, [np.nan, np.nan]),
        ({"detail": "busy"}, [np.nan, np.nan]),
        ("nonsense", [np.nan, np.nan]),
    ],
)
def test_answers_that_cannot_be_right(answer: Any, scores: list[float]) -> None:
    with serve(lambda path, body: (200, {}, answer) if answer != "nonsense" else ok(["x"])) as server:
        teacher = load(server.url)
        np.testing.assert_array_equal(teacher.score(["q", "q"], ["a", "b"]), scores)
        assert bool(teacher.usage.unread) == bool(np.isnan(scores).all())


def test_scores_before_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)

    def reply(path: str, body: Any) -> Reply:
        return (500, {}, "") if "d" in body["documents"] else rerank(path, body)

    with serve(reply) as server, pytest.raises(Interrupted) as stop:
        load(server.url, documents=2, endpoint={"concurrency": 1, "retries": 1}).score(QUERIES, DOCUMENTS)
    assert list(stop.value.places) == [0, 1, 2, 3]  # the third request held d
    np.testing.assert_allclose(
        stop.value.answers, [worth(*p) for p in zip(QUERIES[:4], DOCUMENTS[:4], strict=True)], rtol=1e-6
    )


def test_identity() -> None:
    base = load("https://h/v1").identity
    assert base == {"kind": "rerank_endpoint", "endpoint": "https://h/v1", "api": "cohere", "model": "m"} | {
        "revision": None,
        "document_words": None,
    }
    assert load("https://h/v1", documents=7, endpoint={"api_key": "K", "input_price": 2}).identity == base
    for changed in (load("https://h/v2"), load("https://h/v1", "vllm"), load("https://h/v1", model="n")):
        assert changed.identity != base
