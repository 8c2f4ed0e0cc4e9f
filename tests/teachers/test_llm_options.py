"""Options of language models as teachers: what is refused, and what is part of the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_lm import load

from retrieval_kd.types import InputError


@pytest.mark.parametrize("kind", ["llm_pointwise", "llm_pairwise", "llm_listwise"])
def test_identities(kind: str, language_models: dict[str, Path]) -> None:
    """What changes answers changes the identity; how they are asked for and used does not."""
    local = {"model": str(language_models["qwen3"])}
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
