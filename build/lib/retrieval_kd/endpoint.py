"""Questions over HTTP to whoever judges there: retried, paced, counted, and stopped before they cost too much."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Annotated, Any

import httpx
from pydantic import Field, field_validator

from retrieval_kd.tables import Positive, Table
from retrieval_kd.types import InputError
from retrieval_kd.usage import Interrupted, Usage

AGAIN = {408, 409, 425, 429}  # statuses that another try may change, as may any from 500
FILTERED = {"content_filter", "content_policy_violation"}  # error codes of a refused question
FIRST_WAIT = 0.5  # seconds before the second try, on average; doubled before each other, up to a minute
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not waited for

NotNegative = Annotated[float, Field(ge=0)]


class Endpoint(Table):
    """Where a teacher is asked, how fast, and what it may cost in one run.

    The API key is read from the environment variable that `api_key` names, and is kept nowhere. The
    URL is part of who the teacher is, unless `served_by` stands for it, for a server that may move.
    Requests in flight when a budget is reached are still paid for.
    """

    url: str
    served_by: str | None = None
    api_key: str | None = None  # the name of an environment variable
    concurrency: Positive = 8
    requests_per_minute: Annotated[float | None, Field(gt=0)] = None
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 6
    input_price: NotNegative = 0.0  # of a million tokens
    output_price: NotNegative = 0.0
    request_price: NotNegative = 0.0  # of one request
    budget_tokens: Positive | None = None
    budget_money: Annotated[float | None, Field(gt=0)] = None

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = httpx.URL(url)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError(f"{url!r} is no address; give one such as 'https://api.openai.com/v1'")
        if parts.userinfo or parts.query:
            raise ValueError(
                "the URL carries a user, a password or a query, which would be kept with the scores; "
                "put a key into an environment variable, and its name into api_key"
            )
        return url.rstrip("/")

    @field_validator("api_key")
    @classmethod
    def _names_a_variable(cls, name: str | None) -> str | None:
        if name is not None and not (name.isidentifier() and name.isupper()):
            raise ValueError("api_key is the NAME of an environment variable, such as OPENAI_API_KEY, not a key")
        return name

    @property
    def who(self) -> str:
        """Who answers here, as the teacher's identity has it."""
        return self.served_by or self.url


@dataclass(frozen=True)
class Refused:
    """The answer to a question that the server declines to put."""

    reason: str


class Client:
    """Posts JSON to one endpoint. Threads may share it."""

    def __init__(self, options: Endpoint, usage: Usage) -> None:
        self.options = options
        self.usage = usage
        self._lock = threading.Lock()
        self._next = 0.0  # when the next request may start
        self._stop = threading.Event()
        self._random = random.Random()

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Post every body to `path`, several at once; the JSON answers in their order, or Refused.

        A request that fails for now (a timeout, a lost connection, 408, 409, 425, 429, 5xx, no JSON)
        is tried again, after a wait that doubles, or that the server asks for. Raises Interrupted, with what was
        answered, for one that fails for good, and when a budget is spent.
        """
        self._stop.clear()
        answers: dict[int, Any] = {}
        failures: list[InputError] = []

        def work(place: int) -> None:
            if self._stop.is_set():
                return
            try:
                answers[place] = self._post(path, bodies[place])
            except InputError as error:
                failures.append(error)
                self._stop.set()

        with ThreadPoolExecutor(self.options.concurrency) as pool:
            try:
                list(pool.map(work, range(len(bodies))))
            except BaseException:
                self._stop.set()
                raise
        if failures:
            places = sorted(answers)
            raise Interrupted(str(failures[0]), places, [answers[place] for place in places])
        return [answers[place] for place in range(len(bodies))]

    def get(self, path: str) -> Any:
        """The JSON answer to one GET."""
        return self._send("GET", path, None)

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = self._send("POST", path, body)
        if not isinstance(answer, Refused):
            self._count(answer)
        return answer

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        address, problem = self.options.url + path, ""
        for attempt in range(self.options.retries + 1):
            self._wait_for_turn()
            asked = None
            try:
                response = self._http.request(method, address, json=body)
            except httpx.TransportError as error:  # timeouts are among them
                problem = self._redact(f"{type(error).__name__}: {error}")
            else:
                status = response.status_code
                problem = f"status {status}: {self._redact(response.text)[:200]!r}"
                if response.is_success:
                    try:
                        return response.json()
                    except ValueError:
                        problem = f"no JSON: {self._redact(response.text)[:200]!r}"
                elif status not in AGAIN and status < 500:
                    return self._declined(address, response)
                asked = _retry_after(response)
            wait = min(60.0, FIRST_WAIT * 2**attempt) * self._random.uniform(0.5, 1.5) if asked is None else asked
            if wait > LONGEST_WAIT:
                problem += f", and asks to wait {wait:.0f} s"
                break
            if attempt < self.options.retries:
                self._pause(wait, everybody=asked is not None)
        raise InputError(
            f"{address} gives no answer: {problem}. What it answered before is kept; run again to go on from there."
        )

    def _declined(self, address: str, response: httpx.Response) -> Refused:
        """Refused where the server will not put the question; InputError where the request is at fault."""
        code = None
        try:
            error = response.json().get("error")
            code = error.get("code") if isinstance(error, dict) else None
        except (ValueError, AttributeError):
            pass
        if code in FILTERED:
            return Refused(code)
        remedy = {
            401: "check the key in the environment variable that api_key names",
            403: "check the key in the environment variable that api_key names, and what it allows",
            404: "check the url and the model",
            413: "give fewer documents at once, or shorter ones (document_words)",
        }.get(response.status_code, "check the model and the options")
        raise InputError(
            f"{address} refuses the request with status {response.status_code}: "
            f"{self._redact(response.text)[:300]!r}; {remedy}."
        )

    @cached_property
    def _http(self) -> httpx.Client:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx.Limits(max_connections=self.options.concurrency)
        return httpx.Client(headers=headers, timeout=self.options.timeout_seconds, limits=limits)

    @cached_property
    def _key(self) -> str | None:
        name = self.options.api_key
        if name is None:
            return None
        if not os.environ.get(name):
            raise InputError(f"the environment variable {name} holds no API key for {self.options.url}; set it.")
        return os.environ[name]

    def _redact(self, text: str) -> str:
        """Without the key, which servers quote in their errors."""
        return text.replace(self._key, "***") if self._key else text

    def _wait_for_turn(self) -> None:
        """Wait as the pace demands; InputError if meanwhile others failed, or the budget is spent."""
        every = 60 / self.options.requests_per_minute if self.options.requests_per_minute else 0.0
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + every
        self._sleep(turn - time.monotonic())
        with self._lock:
            self._check_budget()

    def _pause(self, seconds: float, everybody: bool) -> None:
        if everybody:
            with self._lock:
                self._next = max(self._next, time.monotonic() + seconds)
        else:
            self._sleep(seconds)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0 and self._stop.wait(seconds):
            raise InputError("stopped, since another request failed.")

    def _count(self, answer: Any) -> None:
        """Add what a request cost; InputError where a budget is set and the server does not say."""
        tokens = count_tokens(answer)
        options = self.options
        with self._lock:
            self.usage.requests += 1
            if tokens is not None:
                self.usage.input_tokens += tokens[0]
                self.usage.output_tokens += tokens[1]
                self.usage.money += (tokens[0] * options.input_price + tokens[1] * options.output_price) / 1e6
            self.usage.money += options.request_price
        by_token = options.budget_tokens or (options.budget_money and not options.request_price)
        if tokens is None and by_token:
            raise InputError(
                f"{options.url} does not say how many tokens it used, so that no budget can be kept; "
                "leave the budget out, or give request_price."
            )

    def _check_budget(self) -> None:
        options, usage = self.options, self.usage
        spent = None
        if options.budget_tokens is not None and usage.tokens >= options.budget_tokens:
            spent = f"budget_tokens = {options.budget_tokens:,} is spent ({usage.tokens:,} tokens"
        if options.budget_money is not None and usage.money >= options.budget_money:
            spent = f"budget_money = {options.budget_money:g} is spent ({usage.money:.6g}"
        if spent:
            raise InputError(
                f"{options.url}: {spent}, {usage.requests:,} requests). What was answered is kept; "
                "run again to go on from there with the same budget again, or raise it."
            )


def count_tokens(answer: Any) -> tuple[int, int] | None:
    """Tokens read and written, as OpenAI, Jina, vLLM and Cohere say it; None where the answer does not."""
    if not isinstance(answer, dict):
        return None
    usage, meta = answer.get("usage"), answer.get("meta")
    if isinstance(usage, dict) and ("prompt_tokens" in usage or "total_tokens" in usage):
        written = int(usage.get("completion_tokens") or 0)
        return int(usage.get("prompt_tokens") or int(usage["total_tokens"]) - written), written
    tokens = meta.get("tokens") if isinstance(meta, dict) else None
    if isinstance(tokens, dict) and "input_tokens" in tokens:
        return int(tokens["input_tokens"]), int(tokens.get("output_tokens") or 0)
    return None


def ask(client: Client, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[Any], Any]) -> list[Any]:
    """Post every body and read every answer; what was answered before an interruption is read too."""
    try:
        return [read(answer) for answer in client.post_all(path, bodies)]
    except Interrupted as stop:
        raise Interrupted(str(stop), stop.places, [read(answer) for answer in stop.answers]) from None


def _retry_after(response: httpx.Response) -> float | None:
    """The seconds that a server asks to wait, which it gives as a number or as a date."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # no date either, or one without a time zone
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
