"""Language models to compare teachers with: one called with one text at a time, and one that says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_endpoint import FakeEndpoint
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from retrieval_kd.prompts import Prompt
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher
from retrieval_kd.usage import Usage

QUERIES = ["sort a list", "read a file"]
DOCUMENTS = ["sorting lists", "open, read, close", "the list is sorted in place", "a lock", "naïve 列"]
LEFT, RIGHT = [q for q in QUERIES for _ in DOCUMENTS], DOCUMENTS * 2


def load(kind: str, **options: Any) -> Any:
    return load_teacher(Component(kind=kind, **options), [])


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


def remote(server: FakeEndpoint, **options: Any) -> dict[str, Any]:
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    return {"model": "tiny", "endpoint": {"url": server.url, "top_logprobs": 500, "body": body, **options}}


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
