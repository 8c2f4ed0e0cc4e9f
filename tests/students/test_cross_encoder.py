"""Cross-encoder students: saved, they are what Sentence Transformers loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from batches import batch_of
from sentence_transformers import CrossEncoder
from tiny import WORDS, collection_of, stored_as, tiny_classifier, tiny_sentence_transformer

from retrieval_kd.students import load_student
from retrieval_kd.students.cross_encoder import CrossEncoderStudent
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher

RNG = np.random.default_rng(0)
QUERIES = [" ".join(RNG.choice(WORDS, RNG.integers(1, 5))) for _ in range(4)]
DOCUMENTS = [" ".join(RNG.choice(WORDS, RNG.integers(1, 30))) for _ in range(6)]  # the longest are cut
MAX_LENGTH = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_classifier(tmp_path_factory.mktemp("model")))


def load(model: str, seed: int = 0, dropout: float | None = None) -> CrossEncoderStudent:
    chosen = Component(kind="cross_encoder", model=model, max_length=MAX_LENGTH, dropout=dropout)
    student = load_student(chosen, seed)
    assert isinstance(student, CrossEncoderStudent)
    return student.eval()


def score(student: CrossEncoderStudent, columns: torch.Tensor, micro_batch_tokens: int = 5) -> torch.Tensor:
    return student(batch_of(student, QUERIES, DOCUMENTS, columns, micro_batch_tokens=micro_batch_tokens)).scores


EVERY = torch.arange(6).repeat(4, 1)


def test_saved_it_scores_the_same_elsewhere(model: str, tmp_path: Path) -> None:
    student = load(model)
    with torch.no_grad():
        for parameter in student.parameters():  # as if trained
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        scores = score(student, EVERY).numpy()
    assert scores.std() > 1e-3
    student.save(tmp_path)
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    loaded = CrossEncoder(str(tmp_path), device="cpu")
    expected = loaded.predict(pairs, activation_fn=torch.nn.Identity()).reshape(4, 6)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    teacher = load_teacher(
        Component(kind="cross_encoder", model=str(tmp_path), max_length=MAX_LENGTH), collection_of(DOCUMENTS)
    )
    got = teacher.score([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    np.testing.assert_allclose(scores, got.reshape(4, 6), atol=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1, 5, 100])
def test_columns_and_missing_candidates(model: str, micro_batch_tokens: int) -> None:
    student = load(model)
    columns = torch.tensor([[5, 0, -1], [2, -1, -1], [1, 1, 4], [0, 3, 5]])
    grid = score(student, columns, micro_batch_tokens)
    with torch.no_grad():
        full = score(student, EVERY)
    for query in range(4):
        for place, row in enumerate(columns[query].tolist()):
            expected = 0.0 if row < 0 else full[query, row].item()
            assert grid[query, place].item() == pytest.approx(expected, abs=1e-5)
    grid[columns < 0].sum().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.abs().any() for p in student.parameters())
    grid.sum().backward()
    assert any(p.grad is not None and p.grad.abs().any() for p in student.parameters())


def test_a_head_is_drawn_with_the_seed_where_there_is_none(tmp_path: Path) -> None:
    tiny_sentence_transformer(tmp_path)  # saves a BertModel
    heads = [load(str(tmp_path), seed).model.classifier.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (1, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_weights_kept_as_halves_are_trained_in_fp32(model: str, tmp_path: Path) -> None:
    student = load(str(stored_as(tmp_path / "half", Path(model), torch.float16)))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dropout", "same"), [(0.0, True), (0.5, False)])
def test_dropout(model: str, dropout: float, same: bool) -> None:
    student = load(model, dropout=dropout).train()
    with torch.no_grad():
        assert torch.equal(score(student, EVERY), score(student, EVERY)) == same
