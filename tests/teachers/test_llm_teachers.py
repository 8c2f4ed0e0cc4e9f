"""Language models as teachers: here and behind an endpoint alike, one by one, by pairs and by lists."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_endpoint import FakeEndpoint, Reply, chat_answer, ok, serve
from tiny_lm import save_tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from retrieval_kd import endpoint as endpoint_module
from retrieval_kd.prompts import Prompt
from retrieval_kd.tables import Component
from retrieval_kd.teachers import ListJudge, Metered, PairJudge, Teacher, load_teacher
from retrieval_kd.teachers.llm_listwise import LLMListwise
from retrieval_kd.teachers.llm_listwise import Options as ListOptions
from retrieval_kd.teachers.llm_pairwise import LLMPairwise
from retrieval_kd.teachers.llm_pairwise import Options as PairOptions
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted, Usage

QUERIES = ["sort a list", "read a file"]
DOCUMENTS = ["sorting lists", "open, read, close", "the list is sorted in place", "a lock", "naïve 列"]
LEFT, RIGHT = [q for q in QUERIES for _ in DOCUMENTS], DOCUMENTS * 2
JUDGE = "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
JUDGE += 'Note that the answer can only be "yes" or "no".'
INSTRUCT = "Given a web search query, retrieve relevant passages that answer the query"


def load(kind: str, **options: Any) -> Any:
    return load_teacher(Component(kind=kind, **options), [])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": save_tiny_lm(folder / "qwen3", "qwen3"),
        "t5": save_tiny_lm(folder / "t5", "t5", chat=False),
    }


class Plain:
    """A model and its tokenizer, called with one text at a time."""

    def __init__(self, folder: Path) -> None:
        kind: Any = AutoModelForSeq2SeqLM if folder.name == "t5" else AutoModelForCausalLM
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = kind.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            if self.model.config.is_encoder_decoder:
                return self.model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
            return self.model(input_ids=ids).logits[0, -1]

    def token(self, text: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(text))


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, Plain]:
    return {name: Plain(folder) for name, folder in models.items()}


@pytest.fixture(scope="module")
def server(plain: dict[str, Plain]) -> Iterator[FakeEndpoint]:
    """Chat completions of the tiny decoder, without batches; thinking is left out if the request says so."""
    model = plain["qwen3"]

    def reply(path: str, body: Any) -> Reply:
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"], body["max_tokens"], body["logprobs"]) == ("tiny", 0, 1, True)
        text = model.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, **body["chat_template_kwargs"]
        )
        likely = model.logits(text).log_softmax(-1).topk(min(body["top_logprobs"], len(model.tokenizer)))
        pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        top = {model.tokenizer.convert_ids_to_tokens(token): value for token, value in pairs}
        return ok(chat_answer("?", top, tokens=(len(text), 1)))

    with serve(reply) as endpoint:
        yield endpoint


def remote(server: FakeEndpoint, **options: Any) -> dict[str, Any]:
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    return {"model": "tiny", "endpoint": {"url": server.url, "top_logprobs": 500, "body": body, **options}}


def test_qwen3_reranker(models: dict[str, Path], plain: dict[str, Plain], server: FakeEndpoint) -> None:
    """The authors' prompt, byte for byte, and l_yes - l_no; the same over HTTP."""
    teacher = load("llm_pointwise", model=str(models["qwen3"]), batch_tokens=1500)
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
    over_http = load("llm_pointwise", **remote(server))
    np.testing.assert_allclose(over_http.score(LEFT, RIGHT), scores, atol=1e-4)
    assert over_http.usage.requests == 10
    assert over_http.usage.tokens > 1000
    assert over_http.usage.bounded == 0


def test_mono_t5(models: dict[str, Path], plain: dict[str, Plain]) -> None:
    teacher = load("llm_pointwise", model=str(models["t5"]), style="mono_t5")
    model, want = plain["t5"], []
    for query, document in zip(LEFT, RIGHT, strict=True):
        logits = model.logits(f"Query: {query} Document: {document} Relevant:")
        want.append(float(logits[model.token("true")] - logits[model.token("false")]))
    np.testing.assert_allclose(teacher.score(LEFT, RIGHT), want, atol=1e-4)


def test_own_prompt_and_answers(models: dict[str, Path], plain: dict[str, Plain]) -> None:
    own = {"prompt": "{query}? {document}", "answers": ["A", "B"], "system": "", "document_words": 2}
    teacher = load("llm_pointwise", model=str(models["qwen3"]), **own)
    model = plain["qwen3"]
    asked = "<|im_start|>user\nsort a list? the list<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    logits = model.logits(asked)
    want = float(logits[model.token("A")] - logits[model.token("B")])
    np.testing.assert_allclose(teacher.score(QUERIES[:1], DOCUMENTS[2:3]), [want], atol=1e-4)


def test_tokens_that_a_server_does_not_show(server: FakeEndpoint) -> None:
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


@pytest.mark.parametrize("kind", ["llm_pointwise", "llm_pairwise", "llm_listwise"])
def test_identities(kind: str, models: dict[str, Path]) -> None:
    """What changes answers changes the identity; how they are asked for and used does not."""
    local = {"model": str(models["qwen3"])}
    there = {"url": "https://h/v1"}
    base, far = load(kind, **local).identity, load(kind, model="m", endpoint=there).identity
    assert base["kind"] == kind
    documents = {"llm_pointwise": "{document}", "llm_pairwise": "{first}{second}", "llm_listwise": "{documents}"}[kind]
    for change in ({"document_words": 9}, {"max_length": 999}, {"system": "x"}, {"prompt": "{query}" + documents}):
        assert load(kind, **local, **change).identity != base
    assert load(kind, **local, batch_tokens=99).identity == base
    for change in ({"url": "https://other/v1"}, {"body": {"seed": 1}}, {"top_logprobs": 5}, {"served_by": "us"}):
        assert load(kind, model="m", endpoint={**there, **change}).identity != far
    cost = {"api_key": "K", "concurrency": 2, "retries": 1, "timeout_seconds": 1, "requests_per_minute": 9}
    cost |= {"input_price": 1, "output_price": 2, "budget_money": 3, "budget_tokens": 4}
    assert load(kind, model="m", endpoint={**there, **cost}).identity == far
    moved = [{"url": f"https://{host}/v1", "served_by": "us"} for host in "ab"]
    assert load(kind, model="m", endpoint=moved[0]).identity == load(kind, model="m", endpoint=moved[1]).identity


def test_prp(models: dict[str, Path], plain: dict[str, Plain], server: FakeEndpoint) -> None:
    """Both orders, each with a softmax over the two answers; the same over HTTP, and turned round."""
    teacher = load("llm_pairwise", model=str(models["qwen3"]))
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
    np.testing.assert_allclose(load("llm_pairwise", **remote(server)).prefer(QUERIES * 2, one, other), got, atol=1e-5)
    with pytest.raises(InputError, match="scores no single pair"):
        teacher.score(QUERIES, DOCUMENTS[:2])


def test_duo_t5(models: dict[str, Path], plain: dict[str, Plain]) -> None:
    teacher = load("llm_pairwise", model=str(models["t5"]), style="duo_t5")
    model, chances = plain["t5"], []
    for first, second in (("a b", "c"), ("c", "a b")):
        logits = model.logits(f"Query: q Document0: {first} Document1: {second} Relevant:")
        chances.append(float(logits[[model.token("true"), model.token("false")]].softmax(0)[0]))
    np.testing.assert_allclose(teacher.prefer(["q"], ["a b"], ["c"]), [(chances[0] + 1 - chances[1]) / 2], atol=1e-5)


class Scripted:
    """A model that says what a function of the prompt says."""

    def __init__(self, say: Callable[[Prompt], str | None]) -> None:
        self.say = say
        self.usage = Usage()
        self.at_once = 2
        self.identity = {"model": "scripted"}
        self.asked: list[Prompt] = []

    def log_probabilities(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        raise AssertionError("asked for probabilities")

    def complete(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str | None]:
        self.asked += prompts
        return [self.say(prompt) for prompt in prompts]


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


def test_listwise_here_and_there(models: dict[str, Path]) -> None:
    """A random model says nothing that can be read, and that is no answer, here and there."""
    local = load("llm_listwise", model=str(models["qwen3"]), max_tokens=3, max_length=900)
    assert local.rank(["q"], [["a", "b"]]) == [None]
    assert local.usage.output_tokens > 0
    with serve(lambda path, body: ok(chat_answer("[2] > [1]"))) as server:
        there = load("llm_listwise", model="m", endpoint={"url": server.url})
        orders = there.rank(["q"], [["a", "b"]])
        assert orders[0].tolist() == [1, 0]
        body = server.asked[0][1]
        assert body["max_tokens"] == 256
        assert body["messages"][0]["role"] == "system"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llm_pointwise", {"prompt": "{query}"}, "no place {document}"),
        ("llm_pairwise", {"prompt": "{query} {first}"}, "no place {second}"),
        ("llm_listwise", {"prompt": "{documents}"}, "no place {query}"),
        ("llm_listwise", {"window": 5, "step": 5}, "must be less than window"),
        ("llm_pointwise", {"style": "grade", "answers": ["a", "b"]}, "answers are for styles"),
        ("llm_pointwise", {"endpoint": {"url": "http://h"}, "precision": "bf16"}, "precision is for a model that runs"),
        ("llm_pointwise", {"endpoint": {"url": "http://h", "body": {"n": 2}}}, "body holds 'n'"),
        ("llm_pointwise", {"endpoint": {"url": "http://h", "timeout": 3}}, "unknown key 'endpoint.timeout'; did you"),
    ],
)
def test_options_are_checked(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(kind, model="m", **options)
