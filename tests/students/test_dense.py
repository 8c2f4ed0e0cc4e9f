"""Dense students: what is saved is what was trained, whatever was changed in the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import DOCUMENTS, QUERIES, batch_of
from sentence_transformers import SentenceTransformer
from tiny import tiny_sentence_transformer

from retrieval_kd.students import Batch, dense, load_student
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_sentence_transformer(folder / "t", layers=4).save(str(folder / "model"))
    tiny_sentence_transformer(folder / "w", width=16, seed=1).save(str(folder / "narrow"))
    return {"model": str(folder / "model"), "narrow": str(folder / "narrow")}


def make(models: dict[str, str], **options: Any) -> dense.DenseStudent:
    """A student of `model`, or of the one named; weights that are new are drawn with a seed."""
    document = options.pop("document", None)
    if document is not None:
        options["document"] = {**document, "model": models[document.get("model", "model")]}
    options["model"] = models[options.get("model", "model")]
    student = load_student(Component(kind="dense", **options), seed=0)
    assert isinstance(student, dense.DenseStudent)
    return student.eval()


def vectors(student: dense.DenseStudent, queries: Sequence[str], documents: Sequence[str]) -> tuple[Any, Any, Any]:
    """Vectors of both sides and all scores, through the forward pass that training uses."""
    with torch.no_grad():
        outputs = student(batch_of(student, queries, documents, micro_batch_tokens=4))
    assert outputs.queries is not None
    assert outputs.documents is not None
    return outputs.queries.numpy(), outputs.documents.numpy(), outputs.scores.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": False},
        {"pooling": "cls", "normalize": False},
        {"pooling": "max"},
        {"project": 12},
        {"project": 12, "normalize": False},
        {"layers": [0, 3]},
        {"layers": [2]},
        {"query_prompt": "find: ", "document_prompt": "read: "},
        {"max_length": 7},
        {"dropout": 0.5},
        {"document": {}},
        {"document": {"frozen": True}, "layers": [1], "query_prompt": "find: "},
        {"model": "narrow", "project": 32, "document": {"frozen": True}, "max_length": 9},
        {"project": 5, "document": {"layers": [0], "project": 5, "normalize": False}, "document_prompt": "read: "},
    ],
    ids=str,
)
def test_saved_and_loaded_it_gives_the_same_vectors(
    options: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    student = make(models, **options)
    with torch.no_grad():
        for parameter in student.parameters():  # as if trained
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    queries, documents, scores = vectors(student, QUERIES, DOCUMENTS)
    np.testing.assert_allclose(scores, queries @ documents.T, atol=1e-5)
    student.save(tmp_path)
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(loaded.encode_query(QUERIES), queries, atol=2e-6)
    np.testing.assert_allclose(loaded.encode_document(DOCUMENTS), documents, atol=2e-6)
    assert loaded.similarity_fn_name == "dot"
    tied = "document" not in options
    assert ("document." in " ".join(name for name, _ in student.named_parameters())) == (
        not tied and not options["document"].get("frozen", False)
    )


def test_without_options_it_is_the_model(models: dict[str, str]) -> None:
    plain = SentenceTransformer(models["model"], device="cpu")
    queries, documents, _ = vectors(make(models), QUERIES, DOCUMENTS)
    np.testing.assert_allclose(queries, plain.encode(QUERIES), atol=1e-6)
    np.testing.assert_allclose(documents, plain.encode(DOCUMENTS), atol=1e-6)


def test_what_the_options_do(models: dict[str, str]) -> None:
    plain = SentenceTransformer(models["model"], device="cpu")
    tokens = plain.encode(QUERIES, output_value="token_embeddings")
    cls, _, _ = vectors(make(models, pooling="cls", normalize=False), QUERIES, DOCUMENTS)
    np.testing.assert_allclose(cls, np.stack([states[0].numpy() for states in tokens]), atol=1e-5)
    mean, _, _ = vectors(make(models, normalize=False), QUERIES, DOCUMENTS)
    np.testing.assert_allclose(mean, np.stack([states.mean(0).numpy() for states in tokens]), atol=1e-5)
    student = make(models, project=12, normalize=False)
    projected, _, _ = vectors(student, QUERIES, DOCUMENTS)
    matrix = next(p for name, p in student.named_parameters() if p.shape == (12, 32)).detach().numpy()
    np.testing.assert_allclose(projected, mean @ matrix.T, atol=1e-5)
    unit, _, _ = vectors(make(models, project=12, normalize=True), QUERIES, DOCUMENTS)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=1e-5)
    prompted, _, _ = vectors(make(models, query_prompt="find: "), QUERIES, DOCUMENTS)
    np.testing.assert_allclose(prompted, plain.encode([f"find: {text}" for text in QUERIES]), atol=1e-6)
    short = make(models, max_length=7)
    assert max(map(len, short.tokenize(DOCUMENTS, "document"))) == 7
    assert make(models, max_length=999).towers.query[0].max_seq_length == 24  # can only shorten


def test_new_weights_depend_on_the_seed(models: dict[str, str]) -> None:
    draws = [
        load_student(Component(kind="dense", model=models["model"], project=4), seed).state_dict() for seed in (0, 0, 1)
    ]
    matrix = next(name for name, tensor in draws[0].items() if tensor.shape == (4, 32))
    assert torch.equal(draws[0][matrix], draws[1][matrix])
    assert not torch.equal(draws[0][matrix], draws[2][matrix])


def test_layers_are_kept_in_the_order_given(models: dict[str, str], tmp_path: Path) -> None:
    whole = make(models).towers.query[0].model.encoder.layer
    kept = make(models, layers=[3, 0]).towers.query[0].model
    assert kept.config.num_hidden_layers == len(kept.encoder.layer) == 2
    for got, expected in zip(kept.encoder.layer, (whole[3], whole[0]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), expected.parameters(), strict=True))


def test_dropout_and_embeddings(models: dict[str, str]) -> None:
    student = make(models, dropout=0.25, freeze_embeddings=True)
    rates = {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    fixed = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert len(fixed) == 1
    assert fixed[0].endswith("word_embeddings.weight")
    student.train()
    once, _, _ = vectors(student, QUERIES, DOCUMENTS)
    again, _, _ = vectors(student, QUERIES, DOCUMENTS)
    assert not np.allclose(once, again)


def test_a_frozen_tower_takes_no_part_in_training(models: dict[str, str]) -> None:
    student = make(models, document={"frozen": True}).train()
    assert student.frozen_documents
    assert not any(module.training for module in student.towers.document[0].modules())  # no dropout in it
    assert not any(parameter.requires_grad for parameter in student.towers.document.parameters())
    assert not any("document" in name for name in student.state_dict())


def test_micro_batches_and_missing_candidates(models: dict[str, str]) -> None:
    student = make(models)
    queries = [np.array(ids, np.int32) for ids in student.tokenize(QUERIES, "query")]
    documents = [np.array(ids, np.int32) for ids in student.tokenize(DOCUMENTS, "document")]
    columns = torch.tensor([[0, 8], [3, -1], [5, 2], [1, 1], [7, 4], [6, 0]])
    with torch.no_grad():
        grids = [student(Batch(queries, documents, columns, micro_batch_tokens=size)).scores for size in (1, 4, 100)]
        alone = student(Batch(queries, [], columns[:, :0], micro_batch_tokens=4))
    for grid in grids:
        torch.testing.assert_close(grid, grids[0], atol=1e-5, rtol=0)
    full = vectors(student, QUERIES, DOCUMENTS)[2]
    np.testing.assert_allclose(grids[0][:, 0], full[np.arange(6), columns[:, 0]], atol=1e-5)
    assert (alone.scores.shape, alone.grid.shape) == ((6, 0), (6, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, 4]}, "names layer 4; the model has layers 0 to 3"),
        ({"layers": [-1]}, "names layer -1"),
        ({"model": "narrow", "document": {}}, r"gives 16 numbers and the document tower 32; set student.project = 32"),
        ({"project": 8, "document": {}}, "gives 8 numbers and the document tower 32"),
    ],
)
def test_what_cannot_work(options: dict[str, Any], message: str, models: dict[str, str]) -> None:
    with pytest.raises(InputError, match=message):
        make(models, **options)


def test_a_student_of_two_towers_does_not_start_a_student(models: dict[str, str], tmp_path: Path) -> None:
    make(models, document={}).save(tmp_path)
    with pytest.raises(InputError, match="has two towers; start a student from a model that has one"):
        dense.load(dense.Options(model=str(tmp_path)))


def test_a_frozen_tower_s_space_has_unit_vectors_or_not(models: dict[str, str]) -> None:
    document = {"frozen": True, "normalize": False}
    with pytest.raises(InputError, match="one gives unit vectors and the other does not"):
        make(models, document=document)
    assert make(models, document=document, normalize=False).frozen_documents
