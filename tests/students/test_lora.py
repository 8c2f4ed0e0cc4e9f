"""LoRA: the base stays as it is, updates begin at nothing, and what is saved has them in its weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import batch_of
from sentence_transformers import SentenceTransformer
from tiny import CHECK_TEXTS, tiny_sentence_transformer

from retrieval_kd.students import load_student
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

LORA = {"rank": 2, "alpha": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    tiny_sentence_transformer(folder / "t").save(str(folder / "model"))
    return str(folder / "model")


def load(model: str, **options: Any) -> Any:
    return load_student(Component(kind="dense", model=model, **options), 0).eval()


def outputs(student: Any, **settings: Any) -> Any:
    return student(batch_of(student, CHECK_TEXTS, CHECK_TEXTS, **settings))


def train(student: Any, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs(student).scores.softmax(1).diagonal().log().mean().neg().backward()
        optimizer.step()


def test_only_the_updates_are_trained(model: str) -> None:
    student = load(model, lora=LORA)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 2  # layers, targets, and a pair of matrices each
    with torch.no_grad():
        torch.testing.assert_close(outputs(student).queries, outputs(load(model)).queries)
    train(student)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LORA},
        {"lora": {**LORA, "targets": ["query", "key", "intermediate.dense"], "dropout": 0.1}, "project": 6},
        {"document": {"lora": {"rank": 1}}},
    ],
    ids=str,
)
def test_saved_it_is_an_ordinary_model_with_the_same_vectors(
    options: dict[str, Any], model: str, tmp_path: Path
) -> None:
    if "document" in options:
        options = {"document": {**options["document"], "model": model}}
    student = load(model, **options)
    train(student)
    with torch.no_grad():
        found = outputs(student)
        assert not torch.allclose(found.documents, outputs(load(model, **options)).documents, atol=1e-3)
    student.save(tmp_path)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert not any("lora" in name for name in loaded.state_dict())
    np.testing.assert_allclose(loaded.encode_query(CHECK_TEXTS), found.queries, atol=2e-6)
    np.testing.assert_allclose(loaded.encode_document(CHECK_TEXTS), found.documents, atol=2e-6)
    with torch.no_grad():  # saving is no end of training
        assert torch.equal(outputs(student).queries, found.queries)
    assert any("lora" in name for name in student.state_dict())


def test_by_formula(model: str) -> None:
    """W + alpha / rank * B A."""
    student = load(model, lora={**LORA, "targets": ["query"]})
    plain = load(model)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        tensors = student.state_dict()
        for number, layer in enumerate(plain.query[0].model.encoder.layer):
            up, down = (
                next(t for name, t in tensors.items() if f"layer.{number}." in name and f"lora_{part}" in name)
                for part in "BA"
            )
            layer.attention.self.query.weight += 3.0 * up @ down
        torch.testing.assert_close(outputs(student).queries, outputs(plain).queries, atol=1e-5, rtol=0)


def test_gradient_caching_changes_nothing(model: str) -> None:
    student = load(model, lora={**LORA, "dropout": 0.0}).train()
    found = []
    for caching in (False, True):
        student.zero_grad()
        outputs(student, micro_batch_tokens=2, gradient_caching=caching).scores.softmax(1)[:, 0].sum().backward()
        found.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert len(found[0]) == 8
    for plain, cached in zip(*found, strict=True):
        torch.testing.assert_close(plain, cached, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"targets": ["q_proj"]}}, r"no layer called 'q_proj'; its layers are called .*query"),
        ({"document": {"frozen": True, "lora": {}}}, "student.document.lora would train nothing"),
    ],
)
def test_what_cannot_work(options: dict[str, Any], message: str, model: str) -> None:
    if "document" in options:
        options = {"document": {**options["document"], "model": model}}
    with pytest.raises(InputError, match=message):
        load(model, **options)


def test_without_peft(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    load(model)
    with pytest.raises(InputError, match=r"needs the package 'peft'.*retrieval-kd\[train\]"):
        load(model, lora=LORA)
