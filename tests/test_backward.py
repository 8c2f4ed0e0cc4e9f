"""Cheaper backward passes: the same gradients, and the same model on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_sentence_transformer
from torch import nn

from retrieval_kd.backward import add_rows_in_place, attend_plainly
from retrieval_kd.students import Batch, dense

TEXTS = ["one two three four five", "six", "two five"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_sentence_transformer(folder / "parts").save(str(folder / "model"))
    return folder / "model"


def gradients(model: Path, change: Callable[[nn.Module], None] | None, bf16: bool, **settings: Any) -> list[Any]:
    """Vectors, and every parameter's gradient of a quadratic in the scores."""
    student = dense.load(dense.Options(model=str(model)))
    if change is not None:
        change(student)
    tokens = [np.array(ids, np.int32) for ids in student.tokenize(TEXTS, "query")]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = student(Batch(tokens, tokens, torch.tensor([[0, 1], [1, 2], [2, 0]]), **settings))
    outputs.scores.square().sum().backward()
    return [outputs.queries, *(p.grad for p in student.parameters() if p.grad is not None)]


@pytest.mark.parametrize("caching", [False, True])
def test_rows_added_in_place_are_the_gradient(model: Path, caching: bool) -> None:
    """Over several micro-batches, also when they are encoded twice."""
    expected = gradients(model, None, False)
    found = gradients(model, add_rows_in_place, False, micro_batch_tokens=8, gradient_caching=caching)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_padding_row_gets_no_gradient() -> None:
    tables = [nn.Embedding(4, 2, padding_idx=1) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    add_rows_in_place(tables[1])
    for table in tables:
        for ids in ([[0, 1, 3], [3, 1, 1]], [[2, 1, 3]]):
            (table(torch.tensor(ids)) * torch.arange(2.0)).sum().backward()
    assert tables[0].weight.grad is not None
    assert torch.equal(tables[0].weight.grad, tables[1].weight.grad)
    assert tables[1].weight.grad[:, 1].tolist() == [1, 0, 1, 3]


@pytest.mark.parametrize("caching", [False, True])
def test_plain_attention_is_attention(model: Path, caching: bool) -> None:
    """Vectors and gradients in bf16 are as near to those in float32 as the fused attention's."""
    exact, fused = gradients(model, None, False), gradients(model, None, True)
    plain = gradients(model, attend_plainly, True, gradient_caching=caching)

    def distance(found: list[Any]) -> float:
        return max(
            ((one - other).norm() / (other.norm() + 1e-3)).item() for one, other in zip(found, exact, strict=True)
        )

    assert 0 < distance(plain) < 2 * distance(fused)


def test_plain_attention_does_without_the_fused_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return attend(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    gradients(model, None, True)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    gradients(model, attend_plainly, True)
    assert seen == []
    gradients(model, attend_plainly, False)
    assert set(seen) == {torch.float32}


def test_the_model_is_saved_as_before(model: Path, tmp_path: Path) -> None:
    for name in ("before", "after"):
        student = dense.load(dense.Options(model=str(model)))
        if name == "after":
            attend_plainly(student)
            add_rows_in_place(student)
        (tmp_path / name).mkdir()
        student.save(tmp_path / name)
    files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*") if path.is_file()]
    assert any(path.name == "config.json" for path in files)
    for path in files:
        assert (tmp_path / "before" / path).read_bytes() == (tmp_path / "after" / path).read_bytes()
