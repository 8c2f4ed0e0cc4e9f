"""Language models behind an endpoint that speaks OpenAI's chat completions: OpenAI, vLLM, and many others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from retrieval_kd.endpoint import Client, Endpoint, Refused, ask
from retrieval_kd.prompts import Prompt
from retrieval_kd.types import InputError
from retrieval_kd.usage import Usage

PATH = "/chat/completions"


class ChatEndpoint(Endpoint):
    """An endpoint whose url, up to its version, is followed by /chat/completions.

    `body` is added to every request: {"chat_template_kwargs": {"enable_thinking": false}}, a seed,
    `max_completion_tokens` for models that refuse `max_tokens`.
    """

    top_logprobs: Annotated[int, Field(ge=2)] = 20  # OpenAI's maximum; vLLM gives more (--max-logprobs)
    body: dict[str, Any] = Field(default={})

    @field_validator("body")
    @classmethod
    def _leaves_the_question(cls, body: dict[str, Any]) -> dict[str, Any]:
        if taken := {"model", "messages", "logprobs", "top_logprobs", "stream", "n"} & body.keys():
            raise ValueError(f"body holds {sorted(taken)[0]!r}, which the teacher sets itself")
        return body


class ChatModel:
    """Asks at temperature 0. A refused question has no answer: NaN, or None."""

    def __init__(self, model: str, endpoint: ChatEndpoint) -> None:
        self.model = model
        self.endpoint = endpoint
        self.usage = Usage()
        self.at_once = endpoint.concurrency

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that its answers depend on, as far as it can be known from here."""
        endpoint = self.endpoint
        known = {"model": self.model, "endpoint": endpoint.who, "top_logprobs": endpoint.top_logprobs}
        return {**known, "temperature": 0, "body": endpoint.body}

    def log_probabilities(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> NDArray[np.float64]:
        """Log-probabilities (n, A) that each of A answers is the next token after each of n prompts.

        One that is not among the most likely tokens, which is all that a server shows, has the
        probability of the last of these, the most that it can have, and is counted in `usage.bounded`. NaN where
        none is among them, or the server refuses.
        """
        asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": self.endpoint.top_logprobs}
        bodies = [self._body(prompt, asked) for prompt in prompts]
        rows = ask(self._client, PATH, bodies, lambda answer: self._read_logprobs(answer, answers))
        return np.array(rows, np.float64).reshape(len(prompts), len(answers))

    def complete(self, prompts: Sequence[Prompt], max_tokens: int) -> list[str | None]:
        """The text that follows each prompt; None where the server refuses."""
        bodies = [self._body(prompt, {"max_tokens": max_tokens}) for prompt in prompts]
        return ask(self._client, PATH, bodies, self._read_text)

    @cached_property
    def _client(self) -> Client:
        return Client(self.endpoint, self.usage)

    def _body(self, prompt: Prompt, asked: dict[str, Any]) -> dict[str, Any]:
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages = [*system, {"role": "user", "content": prompt.text()}]
        body = {"model": self.model, "messages": messages, "temperature": 0, **asked, **self.endpoint.body}
        if "max_completion_tokens" in body:
            del body["max_tokens"]
        return body

    def _choice(self, answer: Any) -> dict[str, Any] | None:
        """The one choice of an answer; None for a refusal."""
        if isinstance(answer, Refused):
            self.usage.note(answer.reason)
            return None
        try:
            choice: dict[str, Any] = answer["choices"][0]
            message = choice["message"]
            refusal = message.get("refusal") or (choice.get("finish_reason") == "content_filter" and "content_filter")
        except (TypeError, LookupError, AttributeError):
            raise InputError(
                f"{self.endpoint.url}{PATH} does not answer as OpenAI's chat completions do: {str(answer)[:200]!r}; "
                "check the url."
            ) from None
        if refusal:
            self.usage.note(str(refusal))
            return None
        return choice

    def _read_logprobs(self, answer: Any, wanted: Sequence[str]) -> list[float]:
        choice = self._choice(answer)
        if choice is None:
            return [np.nan] * len(wanted)
        try:
            top = choice["logprobs"]["content"][0]["top_logprobs"]
            shown = {entry["token"]: float(entry["logprob"]) for entry in reversed(top)}
            least = min(shown.values())
        except (TypeError, LookupError, ValueError):
            raise InputError(
                f"{self.endpoint.url} gives no log-probabilities with its answers; ask it for text instead "
                '(llm_pointwise: style = "grade", llm_pairwise: read = "text").'
            ) from None
        if not shown.keys() & set(wanted):
            self.usage.note(max(shown, key=lambda token: shown[token]))
            return [np.nan] * len(wanted)
        self.usage.bounded += len(set(wanted) - shown.keys())
        return [shown.get(token, least) for token in wanted]

    def _read_text(self, answer: Any) -> str | None:
        choice = self._choice(answer)
        content = None if choice is None else choice["message"].get("content")
        return content if isinstance(content, str) else None
