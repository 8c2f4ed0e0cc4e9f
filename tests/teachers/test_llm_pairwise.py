"""Language models that judge pairs of documents, here and behind an endpoint alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint
from plain_lm import DOCUMENTS, QUERIES, Plain, Scripted, load, remote

from retrieval_kd.teachers import PairJudge
from retrieval_kd.teachers.llm_pairwise import LLMPairwise
from retrieval_kd.teachers.llm_pairwise import Options as PairOptions
from retrieval_kd.types import InputError


def test_prp(language_models: dict[str, Path], plain: dict[str, Plain], chat_server: FakeEndpoint) -> None:
    """Both orders, each with a softmax over the two answers; the same over HTTP, and turned round."""
    teacher = load("llm_pairwise", model=str(language_models["qwen3"]))
    assert isinstance(teacher, PairJudge)
    one, other = DOCUMENTS[:4], DOCUMENTS[1:]
    got = teacher.prefer(QUERIES * 2, one, other)
    model, want = plain["qwen3"], []
    for query, left, right in zip(QUERIES * 2, one, other, strict=True):
        chances = []
        for shown in ((left, right), (right, left)):
            question = (
                f'Given a query "{query}", which of the following two passages is more relevant to the query?\n\n'
                f'Passage A: "{shown[0]}"\n\nPassage B: "{shown[1]}"\n\nAnswer with A or B alone.'
            )
            logits = model.logits(
                f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            )
            chances.append(float(logits[[model.token("A"), model.token("B")]].softmax(0)[0]))
        want.append((chances[0] + 1 - chances[1]) / 2)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(teacher.prefer(QUERIES * 2, other, one), 1 - got, atol=1e-5)
    over_http = load("llm_pairwise", **remote(chat_server))
    np.testing.assert_allclose(over_http.prefer(QUERIES * 2, one, other), got, atol=1e-5)
    with pytest.raises(InputError, match="scores no single pair"):
        teacher.score(QUERIES, DOCUMENTS[:2])


def test_duo_t5(language_models: dict[str, Path], plain: dict[str, Plain]) -> None:
    teacher = load("llm_pairwise", model=str(language_models["t5"]), style="duo_t5")
    model, chances = plain["t5"], []
    for first, second in (("a b", "c"), ("c", "a b")):
        logits = model.logits(f"Query: q Document0: {first} Document1: {second} Relevant:")
        chances.append(float(logits[[model.token("true"), model.token("false")]].softmax(0)[0]))
    np.testing.assert_allclose(teacher.prefer(["q"], ["a b"], ["c"]), [(chances[0] + 1 - chances[1]) / 2], atol=1e-5)


def test_choices_in_words() -> None:
    """Won in both orders 1, in one 0.5; without an answer in one order, none at all."""
    said = {("a", "b"): "A", ("b", "a"): "B", ("a", "c"): "Passage A.", ("c", "a"): "A", ("b", "c"): "neither"}
    model = Scripted(lambda prompt: said.get(prompt.documents, "A"))  # type: ignore[call-overload]
    teacher = LLMPairwise(PairOptions(model="m", read="text"), model)
    got = teacher.prefer(["q"] * 3, ["a", "a", "b"], ["b", "c", "c"])
    np.testing.assert_array_equal(got, [1, 0.5, np.nan])
    assert model.usage.unread == ["neither"]


def test_pairs_that_are_asked() -> None:
    def chosen(count: int, query: str = "q", **options: Any) -> list[list[int]]:
        return load("llm_pairwise", model="m", **options).choose_pairs(query, count).tolist()

    every = [[i, j] for i in range(6) for j in range(i + 1, 6)]
    assert chosen(6) == every
    assert chosen(9, depth=6) == every
    assert chosen(6, window=2) == [[i, j] for i, j in every if j <= i + 2]
    drawn = chosen(6, pairs=5)
    assert len({tuple(pair) for pair in drawn}) == 5
    assert all(pair in every for pair in drawn)
    assert chosen(6, pairs=5) == drawn
    assert chosen(6, "another", pairs=5) != drawn
    assert chosen(6, pairs=5, seed=1) != drawn
    assert chosen(6, pairs=99) == every
    assert chosen(1) == chosen(0) == []


def test_scores_of_preferences() -> None:
    """By hand: a beats b with 0.9, c with 0.6; b and c were not asked, d never."""
    matrix = np.full((4, 4), np.nan)
    matrix[0, 1], matrix[0, 2] = 0.9, 0.6
    wins = load("llm_pairwise", model="m", scores="wins").score_list(matrix)
    np.testing.assert_allclose(wins, [(0.9 + 0.6) / 2, 0.1, 0.4, np.nan], rtol=1e-6)
    fitted = load("llm_pairwise", model="m").score_list(matrix)
    assert fitted[0] - fitted[1] == pytest.approx(math.log(9), abs=0.15)  # the ridge pulls a little
    assert fitted[0] - fitted[2] == pytest.approx(math.log(1.5), abs=0.15)
    assert np.isnan(fitted[3])
