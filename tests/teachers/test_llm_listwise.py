"""Language models that order lists of documents, here and behind an endpoint alike."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import Reply, chat_answer, ok, serve
from plain_lm import Scripted, load

from retrieval_kd import endpoint as endpoint_module
from retrieval_kd.prompts import Prompt
from retrieval_kd.teachers import ListJudge
from retrieval_kd.teachers.llm_listwise import LLMListwise
from retrieval_kd.teachers.llm_listwise import Options as ListOptions
from retrieval_kd.usage import Interrupted


def numbered(prompt: Prompt) -> str:
    """Passages that hold a number, in the order of these, as a model would say it."""
    numbers = [int(re.findall(r"\d+", text)[-1]) for text in prompt.documents]
    order = sorted(range(len(numbers)), key=lambda place: numbers[place])
    return " > ".join(f"[{place + 1}]" for place in order)


def test_windows_bring_up_the_best() -> None:
    """One pass of windows of 20, step 10, brings the 10 best of 100 to the front, wherever they stood."""
    model = Scripted(numbered)
    teacher = LLMListwise(ListOptions(model="m"), model)
    assert isinstance(teacher, ListJudge)
    numbers = random.Random(0).sample(range(100), 100)
    orders = teacher.rank(["q", "r"], [[f"number {n}" for n in numbers], ["number 2", "number 1", "number 3"]])
    assert orders[0] is not None
    assert orders[1] is not None
    assert [numbers[place] for place in orders[0][:10]] == list(range(10))
    assert sorted(orders[0].tolist()) == list(range(100))
    assert orders[1].tolist() == [1, 0, 2]
    assert len(model.asked) == 9 + 1
    first = model.asked[0]
    assert first.documents == tuple(f"number {n}" for n in numbers[80:])
    assert first.text().startswith("I will provide you with 20 passages, each indicated by a numerical identifier [].")
    assert f"search query: q.\n\n[1] number {numbers[80]}\n[2] number" in first.text()
    # the slow way: the same windows, one list, sorted outright
    want = list(numbers)
    for start in range(80, -1, -10):
        want[start : start + 20] = sorted(want[start : start + 20])
    assert [numbers[place] for place in orders[0]] == want


def test_lists_without_an_answer() -> None:
    """One window without an identifier is enough; the list is not asked on."""
    model = Scripted(lambda prompt: "I cannot." if "number 7" in prompt.documents else numbered(prompt))
    teacher = LLMListwise(ListOptions(model="m", window=4, step=2), model)
    bad, good = [f"number {n}" for n in (5, 4, 3, 2, 7, 1)], [f"number {n}" for n in (6, 5, 4)]
    orders = teacher.rank(["q"] * 4, [bad, good, ["one 1"], []])
    assert orders[0] is None
    assert [None if order is None else order.tolist() for order in orders[1:]] == [[2, 1, 0], [0], []]
    assert len(model.asked) == 2
    assert model.usage.unread == ["I cannot."]


def test_an_identifier_inside_a_passage_is_none() -> None:
    model = Scripted(numbered)
    LLMListwise(ListOptions(model="m", document_words=3), model).rank(["q"], [["see [2] 5 x", "and 4"]])
    assert model.asked[0].documents == ("see (2) 5", "and 4")


def test_scores_of_ranks() -> None:
    ranks = np.array([2.0, 1.0, np.nan])
    for name, want in {"reciprocal": [0.5, 1], "negative_log": [-math.log(2), 0], "negative": [-1, 0]}.items():
        got = load("llm_listwise", model="m", scores=name).score_ranks(ranks)
        np.testing.assert_allclose(got, [*want, np.nan], rtol=1e-6)
        assert got.dtype == np.float32


def test_lists_finished_before_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of one window is done in the first round; a longer one is not, when the second round fails."""
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)
    rounds = 0

    def reply(path: str, body: Any) -> Reply:
        nonlocal rounds
        rounds += 1
        return ok(chat_answer("[2] > [1]")) if rounds <= 2 else (500, {}, "")

    with serve(reply) as server:
        endpoint = {"url": server.url, "concurrency": 1, "retries": 0}
        teacher = load("llm_listwise", model="m", endpoint=endpoint, window=2, step=1)
        with pytest.raises(Interrupted) as stop:
            teacher.rank(["q"] * 3, [["a", "b", "c"], ["d", "e"], ["f"]])
        assert list(stop.value.places) == [1, 2]
        assert [order.tolist() for order in stop.value.answers] == [[1, 0], [0]]


def test_listwise_here_and_there(language_models: dict[str, Path]) -> None:
    """A random model says nothing that can be read, and that is no answer, here and there."""
    local = load("llm_listwise", model=str(language_models["qwen3"]), max_tokens=3, max_length=900)
    assert local.rank(["q"], [["a", "b"]]) == [None]
    assert local.usage.output_tokens > 0
    with serve(lambda path, body: ok(chat_answer("[2] > [1]"))) as server:
        there = load("llm_listwise", model="m", endpoint={"url": server.url})
        orders = there.rank(["q"], [["a", "b"]])
        assert orders[0].tolist() == [1, 0]
        body = server.asked[0][1]
        assert body["max_tokens"] == 256
        assert body["messages"][0]["role"] == "system"
