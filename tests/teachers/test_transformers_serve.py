"""A real server that speaks OpenAI's chat completions says what the model says here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny_lm import save_tiny_lm
from transformers import AutoTokenizer

from retrieval_kd.chat_model import ChatEndpoint, ChatModel
from retrieval_kd.language_model import LanguageModelOptions, LocalModel
from retrieval_kd.prompts import fill_template
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher
from retrieval_kd.types import InputError

pytestmark = pytest.mark.slow

PROMPTS = [
    fill_template("{query}: {document}", {"query": "sort"}, {"document": [text]}, "Be brief.")
    for text in ("a list", "read a file", "naïve 列")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose template knows no thinking, since this server passes nothing on to it."""
    folder = save_tiny_lm(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking is defined", "false")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=file,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_completions_are_those_of_the_local_model(model: Path, url: str) -> None:
    served = ChatModel(str(model), ChatEndpoint(url=url, retries=1))
    local = LocalModel(LanguageModelOptions(model=str(model)))
    assert served.complete(PROMPTS, 6) == local.complete(PROMPTS, 6)
    assert served.usage.input_tokens == local.usage.input_tokens


def test_it_gives_no_probabilities_and_says_so(model: Path, url: str) -> None:
    teacher = load_teacher(Component(kind="llm_pairwise", model=str(model), endpoint={"url": url}), [])
    with pytest.raises(InputError, match=r'gives no log-probabilities.*llm_pairwise: read = "text"'):
        teacher.prefer(["q"], ["a"], ["b"])  # type: ignore[attr-defined]
