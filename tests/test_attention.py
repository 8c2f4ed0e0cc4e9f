"""Attention in float32 under autocast: the same model, saved as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_sentence_transformer

from retrieval_kd.students import Batch, dense
from retrieval_kd.towers import attend_in_float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "parts").save(str(folder / "model"))
    return folder / "model"


def batch_of(student: Any) -> Batch:
    tokens = [
        np.array(ids, np.int32) for ids in student.tokenize(["one two three four five", "six", "two five"], "query")
    ]
    return Batch(tokens, tokens, torch.tensor([[0, 1], [1, 2], [2, 0]]))


def test_vectors_and_gradients_are_the_same(model: Path) -> None:
    found = []
    for change in (False, True):
        student = dense.load(dense.Options(model=str(model), dropout=0.0))
        if change:
            attend_in_float32(student)
        outputs = student(batch_of(student))
        outputs.scores.square().sum().backward()
        found.append([outputs.queries.detach(), *[p.grad for p in student.parameters() if p.grad is not None]])
    for plain, changed in zip(*found, strict=True):
        assert torch.allclose(plain, changed, atol=1e-6)


def test_attention_sees_float32_under_autocast(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return attend(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    student = dense.load(dense.Options(model=str(model)))
    for change, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        if change:
            attend_in_float32(student)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            student(batch_of(student))
        assert set(seen) == {dtype}


def test_it_is_saved_as_before(model: Path, tmp_path: Path) -> None:
    for name in ("before", "after"):
        student = dense.load(dense.Options(model=str(model)))
        if name == "after":
            attend_in_float32(student)
        (tmp_path / name).mkdir()
        student.save(tmp_path / name)
    files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*.json")]
    assert any(path.name == "config.json" for path in files)
    for path in files:
        assert (tmp_path / "before" / path).read_text() == (tmp_path / "after" / path).read_text()
