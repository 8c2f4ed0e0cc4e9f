"""The language models that the tests of their teachers share, and an endpoint of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint, Reply, chat_answer, ok, serve
from plain_lm import Plain
from tiny_lm import save_tiny_lm


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": save_tiny_lm(folder / "qwen3", "qwen3"),
        "t5": save_tiny_lm(folder / "t5", "t5", chat=False),
    }


@pytest.fixture(scope="session")
def plain(language_models: dict[str, Path]) -> dict[str, Plain]:
    return {name: Plain(folder) for name, folder in language_models.items()}


@pytest.fixture(scope="session")
def chat_server(plain: dict[str, Plain]) -> Iterator[FakeEndpoint]:
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
