"""Questions over HTTP: tried again, paced, paid for once, and never more than the budget allows."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from fake_endpoint import Reply, chat_answer, ok, serve

from retrieval_kd import endpoint as module
from retrieval_kd.chat_model import ChatEndpoint, ChatModel
from retrieval_kd.endpoint import Client, Endpoint, Refused, count_tokens
from retrieval_kd.prompts import Prompt
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted, Usage

BODIES = [{"number": number} for number in range(12)]
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


def client(url: str, **options: Any) -> Client:
    return Client(Endpoint(url=url, **options), Usage())


def echo(path: str, body: Any) -> Reply:
    return ok({"number": body["number"], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


def numbers(answers: list[Any]) -> list[int]:
    return [answer["number"] for answer in answers]


def test_answers_come_in_order_several_at_once() -> None:
    together, most, lock = 0, 0, threading.Lock()

    def reply(path: str, body: Any) -> Reply:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.03 if body["number"] % 2 else 0.01)
        with lock:
            together -= 1
        return echo(path, body)

    with serve(reply) as server:
        asked = client(server.url, concurrency=4, input_price=2.0, output_price=50.0, request_price=0.001)
        assert numbers(asked.post_all("/x", BODIES)) == list(range(12))
        assert {path for path, _ in server.asked} == {"/v1/x"}
    assert 2 <= most <= 4
    usage = asked.usage
    assert (usage.requests, usage.input_tokens, usage.output_tokens, usage.tokens) == (12, 1200, 120, 1320)
    assert usage.money == pytest.approx((1200 * 2 + 120 * 50) / 1e6 + 12 * 0.001)


@pytest.mark.parametrize(
    "fault",
    [(500, {}, "oops"), (503, {}, {}), (429, {}, {}), (408, {}, ""), (200, {}, "<html>"), "stall"],
)
def test_what_fails_for_now_is_tried_again(fault: Any) -> None:
    tries: Counter[int] = Counter()

    def reply(path: str, body: Any) -> Reply:
        tries[body["number"]] += 1
        if tries[body["number"]] > 2:
            return echo(path, body)
        if fault == "stall":
            time.sleep(0.4)
            return echo(path, body)
        return fault  # type: ignore[no-any-return]

    with serve(reply) as server:
        asked = client(server.url, timeout_seconds=0.15 if fault == "stall" else 30)
        assert numbers(asked.post_all("/x", BODIES[:3])) == [0, 1, 2]
    assert tries == {0: 3, 1: 3, 2: 3}
    assert asked.usage.requests == 3


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Client, "_sleep", lambda self, seconds: waits.append(seconds) if seconds > 0 else None)
    monkeypatch.setattr(module, "FIRST_WAIT", 0.5)
    with serve(lambda path, body: (500, {}, "")) as server, pytest.raises(Interrupted, match="status 500"):
        client(server.url, retries=9).post_all("/x", BODIES[:1])
    assert len(waits) == 9
    for number, wait in enumerate(waits):
        assert 0.5 <= wait / min(60, 0.5 * 2**number) <= 1.5
    assert len({wait / min(60, 0.5 * 2**number) for number, wait in enumerate(waits)}) == 9  # jitter


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_for_everybody(form: str) -> None:
    began, refused, after = time.monotonic(), [], []

    def reply(path: str, body: Any) -> Reply:
        if not refused:
            refused.append(time.monotonic())
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # to whole seconds
            return 429, {"Retry-After": "0.4" if form == "seconds" else date}, {"error": "slow down"}
        after.append(time.monotonic() - refused[0])
        return echo(path, body)

    with serve(reply) as server:
        assert numbers(client(server.url, concurrency=1).post_all("/x", BODIES[:3])) == [0, 1, 2]
    assert min(after) >= (0.39 if form == "seconds" else 0.9)
    assert time.monotonic() - began < 5


def test_a_long_wait_is_not_waited_for() -> None:
    with serve(lambda path, body: (429, {"Retry-After": "86400"}, {})) as server:
        with pytest.raises(Interrupted, match="asks to wait 86400 s"):
            client(server.url).post_all("/x", BODIES[:1])
        assert len(server.asked) == 1


def test_what_was_answered_before_a_failure_is_handed_over() -> None:
    def reply(path: str, body: Any) -> Reply:
        return echo(path, body) if body["number"] < 5 else (500, {}, "broken for good")

    with serve(reply) as server:
        with pytest.raises(Interrupted, match=r"/x gives no answer: status 500: 'broken.*run again") as stop:
            client(server.url, concurrency=1, retries=1).post_all("/x", BODIES)
        assert list(stop.value.places) == numbers(stop.value.answers) == [0, 1, 2, 3, 4]
        assert len(server.asked) == 5 + 2


def test_nobody_listens() -> None:
    with pytest.raises(Interrupted, match="ConnectError"):
        client("http://127.0.0.1:9/v1", retries=1).post_all("/x", BODIES[:1])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_budget_is_kept(concurrency: int) -> None:
    """Each request is 110 tokens: the fifth is the first that finds 440 of 400 spent."""
    with serve(echo) as server:
        asked = client(server.url, concurrency=concurrency, budget_tokens=400)
        with pytest.raises(Interrupted, match=r"budget_tokens = 400 is spent .*run again to go on") as stop:
            asked.post_all("/x", BODIES)
        assert 4 <= len(server.asked) <= 4 + concurrency - 1
        assert len(stop.value.answers) == len(server.asked) == asked.usage.requests  # all that was paid for
        money = client(server.url, concurrency=1, input_price=1e4, budget_money=2.5)
        with pytest.raises(Interrupted, match=r"budget_money = 2\.5 is spent \(3"):
            money.post_all("/x", BODIES)
        assert money.usage.requests == 3


def test_a_budget_needs_a_count() -> None:
    with serve(lambda path, body: ok({})) as server:
        with pytest.raises(Interrupted, match="does not say how many tokens"):
            client(server.url, budget_tokens=400).post_all("/x", BODIES)
        by_request = client(server.url, concurrency=1, request_price=1, budget_money=2)
        with pytest.raises(Interrupted, match="budget_money = 2 is spent"):
            by_request.post_all("/x", BODIES)
        assert by_request.usage.requests == 2


def test_requests_are_paced() -> None:
    with serve(echo) as server:
        began = time.monotonic()
        client(server.url, requests_per_minute=1200).post_all("/x", BODIES[:7])
        assert 0.3 <= time.monotonic() - began < 3


def test_the_key_is_sent_and_kept_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def reply(path: str, body: Any) -> Reply:
        return 401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}}

    with serve(reply) as server:
        options = ChatEndpoint(url=server.url, api_key="TEST_API_KEY")
        with pytest.raises(InputError, match="the environment variable TEST_API_KEY holds no API key"):
            ChatModel("m", options).complete([Prompt("", ("hi",), ())], 1)
        assert not server.asked
        monkeypatch.setenv("TEST_API_KEY", KEY)
        model = ChatModel("m", options)
        with pytest.raises(InputError, match=r"status 401.*check the key in the environment variable") as error:
            model.complete([Prompt("", ("hi",), ())], 1)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert "***" in str(error.value)
    for text in (str(error.value), repr(error.value), str(model.identity), options.model_dump_json(), caplog.text):
        assert KEY not in text
    assert "TEST_API_KEY" not in str(model.identity)


@pytest.mark.parametrize(("status", "remedy"), [(400, "the options"), (404, "the url"), (413, "fewer documents")])
def test_requests_at_fault(status: int, remedy: str) -> None:
    with serve(lambda path, body: (status, {}, {"error": "no such thing"})) as server:
        with pytest.raises(Interrupted, match=f"status {status}: .*no such thing.*{remedy}"):
            client(server.url).post_all("/x", BODIES[:1])
        assert len(server.asked) == 1


def test_a_filtered_question_is_refused() -> None:
    with serve(lambda path, body: (400, {}, {"error": {"code": "content_filter", "message": "no"}})) as server:
        assert client(server.url).post_all("/x", BODIES[:2]) == [Refused("content_filter")] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "is no address"),
        ({"url": "https://user:pass@host/v1"}, "put a key into an environment variable"),
        ({"url": "https://host/v1?key=abc"}, "put a key into an environment variable"),
        ({"url": "https://host/v1", "api_key": KEY}, "the NAME of an environment variable"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Endpoint(**options)
    del error


def test_who_answers() -> None:
    assert Endpoint(url="https://host/v1/").who == "https://host/v1"
    assert Endpoint(url="https://host/v1/", served_by="vllm on our cluster").who == "vllm on our cluster"


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (chat_answer("x", tokens=(7, 2)), (7, 2)),
        ({"usage": {"total_tokens": 9}}, (9, 0)),  # Jina
        ({"usage": {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}}, (9, 0)),  # vLLM
        ({"meta": {"tokens": {"input_tokens": 9, "output_tokens": 0}}}, (9, 0)),  # Cohere
        ({"meta": {"billed_units": {"search_units": 1}}}, None),
        ([{"index": 0, "score": 1.0}], None),  # TEI
    ],
)
def test_tokens_are_read(answer: Any, tokens: tuple[int, int] | None) -> None:
    assert count_tokens(answer) == tokens
