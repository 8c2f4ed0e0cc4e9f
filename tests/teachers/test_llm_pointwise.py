"""Language models that judge documents one by one, here and behind an endpoint alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint, Reply, chat_answer, ok, serve
from plain_lm import DOCUMENTS, LEFT, QUERIES, RIGHT, Plain, load, remote

from retrieval_kd import endpoint as endpoint_module
from retrieval_kd.teachers import Metered, Teacher
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted

JUDGE = "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
JUDGE += 'Note that the answer can only be "yes" or "no".'
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"


def test_qwen3_reranker(language_models: dict[str, Path], plain: dict[str, Plain], chat_server: FakeEndpoint) -> None:
    """The authors' prompt, byte for byte, and l_yes - l_no; the same over HTTP."""
    teacher = load("llm_pointwise", model=str(language_models["qwen3"]), batch_tokens=1500)
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, Metered)
    scores = teacher.score(LEFT, RIGHT)
    model, want = plain["qwen3"], []
    for query, document in zip(LEFT, RIGHT, strict=True):
        logits = model.logits(
            f"<|im_start|>system\n{JUDGE}<|im_end|>\n<|im_start|>user\n<Instruct>: {INSTRUCT}\n<Query>: {query}\n"
            f"<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        want.append(float(logits[model.token("yes")] - logits[model.token("no")]))
    np.testing.assert_allclose(scores, want, atol=1e-4)
    assert scores.dtype == np.float32
    assert scores.std() > 0.01
    over_http = load("llm_pointwise", **remote(chat_server))
    np.testing.assert_allclose(over_http.score(LEFT, RIGHT), scores, atol=1e-4)
    assert over_http.usage.requests == 10
    assert over_http.usage.tokens > 1000
    assert over_http.usage.bounded == 0


def test_mono_t5(language_models: dict[str, Path], plain: dict[str, Plain]) -> None:
    teacher = load("llm_pointwise", model=str(language_models["t5"]), style="mono_t5")
    model, want = plain["t5"], []
    for query, document in zip(LEFT, RIGHT, strict=True):
        logits = model.logits(f"Query: {query} Document: {document} Relevant:")
        want.append(float(logits[model.token("true")] - logits[model.token("false")]))
    np.testing.assert_allclose(teacher.score(LEFT, RIGHT), want, atol=1e-4)


def test_own_prompt_and_answers(language_models: dict[str, Path], plain: dict[str, Plain]) -> None:
    own = {"prompt": "{query}? {document}", "answers": ["A", "B"], "system": "", "document_words": 2}
    teacher = load("llm_pointwise", model=str(language_models["qwen3"]), **own)
    model = plain["qwen3"]
    asked = "<|im_start|>user\nsort a list? the list<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    logits = model.logits(asked)
    want = float(logits[model.token("A")] - logits[model.token("B")])
    np.testing.assert_allclose(teacher.score(QUERIES[:1], DOCUMENTS[2:3]), [want], atol=1e-4)


def test_tokens_that_a_server_does_not_show() -> None:
    """The least that is shown bounds what is not; neither of the two is no answer."""

    def reply(path: str, body: Any) -> Reply:
        text = body["messages"][-1]["content"]
        if "both" in text:
            return ok(chat_answer("yes", {"yes": -0.1, "no": -2.5, "maybe": -9.0}))
        if "one" in text:
            return ok(chat_answer("yes", {"yes": -0.1, "Yes": -3.0, "maybe": -9.0}))
        return ok(chat_answer("Sure", {"Sure": -0.1, "Yes": -3.0}))

    with serve(reply) as clipped:
        teacher = load("llm_pointwise", model="m", endpoint={"url": clipped.url, "concurrency": 1})
        scores = teacher.score(["q"] * 3, ["both", "one", "other"])
        assert {body["top_logprobs"] for _, body in clipped.asked} == {20}
    np.testing.assert_allclose(scores, [2.4, 8.9, np.nan], atol=1e-6)
    assert teacher.usage.bounded == 1
    assert teacher.usage.unread == ["Sure"]


def test_grades() -> None:
    """Where there are no probabilities; a refusal, a filter, and what is no grade are no answer."""
    refusal = {"choices": [{"message": {"refusal": "I cannot", "content": None}, "finish_reason": "stop"}]}
    filtered = {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}
    replies = {
        "good": chat_answer("3"),
        "fair": chat_answer("Grade: 1."),
        "nonsense": chat_answer("It depends."),
        "refusal": refusal,
        "filtered": filtered,
        "null": {"choices": [{"message": {"content": None}}]},
    }

    def reply(path: str, body: Any) -> Reply:
        found = re.search(r"Document: (\w+)", body["messages"][-1]["content"])
        assert found
        return ok(replies[found[1]])

    with serve(reply) as server:
        endpoint = {"url": server.url, "body": {"max_completion_tokens": 500}}
        teacher = load("llm_pointwise", model="m", style="grade", endpoint=endpoint)
        scores = teacher.score(["q"] * 6, list(replies))
        body = server.asked[0][1]
    np.testing.assert_array_equal(scores, [3, 1, np.nan, np.nan, np.nan, np.nan])
    assert set(teacher.usage.unread) <= {"It depends.", "I cannot", "content_filter"}
    assert body["max_completion_tokens"] == 500
    assert "max_tokens" not in body
    assert "logprobs" not in body
    assert "from 0 (not at all) to 3 (completely)" in body["messages"][0]["content"]


def test_endpoints_that_are_none() -> None:
    with serve(lambda path, body: ok(chat_answer("yes"))) as server:
        with pytest.raises(InputError, match=r'gives no log-probabilities.*style = "grade"'):
            load("llm_pointwise", model="m", endpoint={"url": server.url}).score(["q"], ["d"])
        server.reply = lambda path, body: ok({"error": "no"})
        with pytest.raises(InputError, match="does not answer as OpenAI's chat completions do"):
            load("llm_pointwise", model="m", endpoint={"url": server.url}).score(["q"], ["d"])


def test_scores_before_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)

    def reply(path: str, body: Any) -> Reply:
        if "bad" in body["messages"][-1]["content"]:
            return 500, {}, ""
        return ok(chat_answer("yes", {"yes": -1.0, "no": -2.0}))

    with serve(reply) as server:
        endpoint = {"url": server.url, "concurrency": 1, "retries": 1}
        with pytest.raises(Interrupted) as stop:
            load("llm_pointwise", model="m", endpoint=endpoint).score(["q"] * 4, ["a", "b", "bad", "c"])
        assert list(stop.value.places) == [0, 1]
        np.testing.assert_array_equal(stop.value.answers, [1, 1])
        pairs = load("llm_pairwise", model="m", endpoint=endpoint, answers=["yes", "no"])
        with pytest.raises(Interrupted) as stop:
            pairs.prefer(["q"] * 3, ["a", "b", "bad"], ["x", "y", "z"])
        assert list(stop.value.places) == [0, 1]
        np.testing.assert_allclose(stop.value.answers, [0.5, 0.5])
