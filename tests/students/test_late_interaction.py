"""Late-interaction students: ColBERT's scores, computed here token by token, and what is saved of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import colbert
import numpy as np
import pytest
import torch
from batches import batch_of
from numpy.typing import NDArray
from sentence_transformers import MultiVectorEncoder
from tiny import WORDS, tiny_sentence_transformer
from transformers import AutoTokenizer, BertModel

from retrieval_kd.students import Batch, late_interaction, load_student
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError

RNG = np.random.default_rng(0)
KNOWN = [word for word in WORDS if word not in colbert.MARKERS]
QUERIES = ["sort a list", "read", "a path (to the file), open!", " ".join(RNG.choice(KNOWN, 20))]
DOCUMENTS = [" ".join(RNG.choice(KNOWN, RNG.integers(1, 9))) + "." * (number % 2) for number in range(6)]
DOCUMENTS += [" ".join(RNG.choice(KNOWN, 30)), "is", "(map): a (key), a value."]
PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("colbert")
    made = {name: root / name for name in ("plain", "stanford", "attending", "pylate")}
    colbert.transformer(made["plain"])
    colbert.stanford(made["stanford"])
    colbert.stanford(made["attending"], attend_to_mask_tokens=True, mask_punctuation=False)
    colbert.pylate(made["pylate"])
    tiny_sentence_transformer(root / "t").save(str(root / "pooled"))
    return {**made, "pooled": root / "pooled"}


def load(folder: Path, seed: int = 0, **options: Any) -> late_interaction.LateInteractionStudent:
    student = load_student(Component(kind="late_interaction", model=str(folder), **options), seed)
    assert isinstance(student, late_interaction.LateInteractionStudent)
    return student.eval()


def batch(student: Any, columns: torch.Tensor | None = None, **settings: Any) -> Batch:
    return batch_of(student, QUERIES, DOCUMENTS, columns, **{"micro_batch_tokens": 4, **settings})


def maxsim(query: NDArray[Any], document: NDArray[Any]) -> float:
    """By its definition: for each token of the query the best product, one by one."""
    return sum(max(float(left @ right) for right in document) for left in query)


def by_hand(
    folder: Path, matrix: NDArray[Any], *, length: int, document_length: int, attend: bool, punctuation: bool
) -> NDArray[Any]:
    """ColBERT's grid of scores without this package or Sentence Transformers: one text at a time, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder.parent / "plain").eval()
    vocabulary = tokenizer.get_vocab()

    def vectors(ids: list[int], visible: list[int]) -> NDArray[Any]:
        with torch.no_grad():
            states = model(torch.tensor([ids]), attention_mask=torch.tensor([visible])).last_hidden_state[0]
        projected = states.numpy() @ matrix.T
        return projected / np.linalg.norm(projected, axis=1, keepdims=True)

    def framed(text: str, marker: str, limit: int) -> list[int]:
        words = tokenizer(text, add_special_tokens=False)["input_ids"][: limit - 3]
        return [vocabulary["[CLS]"], vocabulary[marker], *words, vocabulary["[SEP]"]]

    queries, documents = [], []
    for text in QUERIES:
        ids = framed(text, "[unused0]", length)
        masks = length - len(ids)
        queries.append(vectors(ids + [vocabulary["[MASK]"]] * masks, [1] * len(ids) + [int(attend)] * masks))
    skipped = set() if punctuation else {vocabulary[sign] for sign in PUNCTUATION if sign in vocabulary}
    for text in DOCUMENTS:
        ids = framed(text, "[unused1]", document_length)
        kept = [place for place, token in enumerate(ids) if token not in skipped]
        documents.append(vectors(ids, [1] * len(ids))[kept])
    return np.array([[maxsim(query, document) for document in documents] for query in queries])


@pytest.mark.parametrize(
    ("name", "attend", "punctuation"), [("stanford", False, False), ("attending", True, True), ("pylate", False, False)]
)
def test_checkpoints_score_as_colbert_does(
    name: str, attend: bool, punctuation: bool, folders: dict[str, Path]
) -> None:
    student = load(folders[name])
    with torch.no_grad():
        outputs = student(batch(student))
    expected = by_hand(
        folders[name],
        colbert.projection().numpy(),
        length=12,
        document_length=16,
        attend=attend,
        punctuation=punctuation,
    )
    np.testing.assert_allclose(outputs.grid.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(outputs.scores, outputs.grid)
    assert outputs.queries is None
    assert outputs.documents is None


def test_a_plain_transformer_told_to_be_colbert(folders: dict[str, Path]) -> None:
    student = load(
        folders["plain"],
        dim=8,
        query_length=10,
        document_length=14,
        query_expansion=True,
        skip_punctuation=True,
        query_prompt="[unused0] ",
        document_prompt="[unused1] ",
    )
    matrix = next(p for p in student.parameters() if p.shape == (8, 32)).detach().numpy()
    expected = by_hand(folders["plain"], matrix, length=10, document_length=14, attend=False, punctuation=False)
    with torch.no_grad():
        np.testing.assert_allclose(student(batch(student)).grid, expected, atol=1e-5)


def test_golden_number_and_genuine_zeros(folders: dict[str, Path]) -> None:
    """Also where the best product is 0 or negative, though a token that does not count has a better one."""
    student = load(folders["plain"])
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    documents = [[[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]], [[2.0, 0.0], [1.0, -3.0], [9.0, 9.0]]]
    documents += [[[-2.0, -1.0], [-1.0, -3.0], [0.0, 0.0]]]
    query_mask = torch.tensor([[True, True, False], [True, True, False]])
    document_mask = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    grid = student.model.similarity(queries, torch.tensor(documents), a_mask=query_mask, b_mask=document_mask)
    torch.testing.assert_close(grid, torch.tensor([[1.8, 2.0, -2.0], [1.6, 0.0, -2.0]]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dim": 4, "normalize": False},
        {"query_length": 9, "query_expansion": True, "skip_punctuation": True, "dim": 6},
        {"query_length": 9, "query_expansion": True, "attend_to_expansion_tokens": True},
        {"document_length": 7, "query_length": 6, "query_prompt": "[unused0] ", "document_prompt": "file: "},
        {"lora": {"rank": 2}},
        {"model": "stanford"},
        {"model": "pylate", "query_expansion": False},
        {"model": "pooled", "dim": 5},
    ],
    ids=str,
)
def test_saved_and_loaded_it_gives_the_same_vectors(
    options: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    student = load(folders[options.get("model", "plain")], **{k: v for k, v in options.items() if k != "model"})
    with torch.no_grad():
        for parameter in student.parameters():  # as if trained
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        grid = student(batch(student)).grid.numpy()
    student.save(tmp_path)
    loaded = MultiVectorEncoder(str(tmp_path), device="cpu")
    queries, documents = loaded.encode_query(QUERIES), loaded.encode_document(DOCUMENTS)
    np.testing.assert_allclose(loaded.similarity(queries, documents), grid, atol=2e-6 * np.abs(grid).max())
    again = load(tmp_path)
    with torch.no_grad():
        mine, mask = again._encode(batch(again).documents, "document", batch(again))
    for vectors, counted, expected in zip(mine[:, 0], mask, documents, strict=True):
        torch.testing.assert_close(vectors[counted], expected, atol=1e-6, rtol=1e-6)
    assert grid.std() > 0.01


def gradients(student: Any, given: Batch, loss: Callable[[Any], torch.Tensor]) -> tuple[float, dict[str, Any]]:
    student.zero_grad()
    value = loss(student(given))
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [False, True])
def test_gradient_caching_and_micro_batches_change_nothing(layers: bool, folders: dict[str, Path]) -> None:
    student = load(folders["stanford"]).train()
    columns = torch.tensor([[0, 8], [3, -1], [5, 2], [7, 4]])

    def loss(outputs: Any) -> torch.Tensor:
        every = (outputs, *outputs.layers)
        return sum(o.scores.square().mean() + o.grid.softmax(1)[:, 0].sum() for o in every)

    expected, whole = gradients(student, batch(student, columns, micro_batch_tokens=100, layers=layers), loss)
    assert any(gradient.abs().max() > 1e-4 for gradient in whole.values())
    for caching in (False, True):
        settings = {"micro_batch_tokens": 2, "gradient_caching": caching, "layers": layers}
        value, found = gradients(student, batch(student, columns, **settings), loss)
        assert value == pytest.approx(expected, rel=1e-5)
        assert found.keys() == whole.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], atol=2e-5, rtol=1e-3, msg=name)


def test_columns_and_missing_candidates(folders: dict[str, Path]) -> None:
    student = load(folders["pylate"])
    columns = torch.tensor([[0, 8], [3, -1], [5, 2], [7, -1]])
    with torch.no_grad():
        outputs = student(batch(student, columns))
        alone = student(Batch(batch(student).queries, [], columns[:, :0]))
    expected = outputs.grid.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)
    torch.testing.assert_close(outputs.scores, expected)
    assert (alone.scores.shape, alone.grid.shape) == ((4, 0), (4, 0))


def test_layers_are_the_models_that_end_there(folders: dict[str, Path]) -> None:
    student = load(folders["plain"], dim=8)
    with torch.no_grad():
        outputs = student(batch(student, layers=True))
        assert len(outputs.layers) == 2
        torch.testing.assert_close(outputs.layers[-1].grid, outputs.grid)
        del student.model[0].model.encoder.layer[1]
        torch.testing.assert_close(student(batch(student)).grid, outputs.layers[0].grid, atol=1e-5, rtol=0)


def test_a_new_projection_depends_on_the_seed(folders: dict[str, Path]) -> None:
    draws = [next(p for p in load(folders["plain"], seed).parameters() if p.shape == (128, 32)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stanford", {"dim": 16}, "student.dim is 16; model .* projects to 8 already"),
        ("plain", {"query_expansion": True}, "set that too"),
        ("plain", {"attend_to_expansion_tokens": True}, "no meaning without student.query_expansion"),
    ],
)
def test_what_cannot_work(name: str, options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=message):
        load(folders[name], **options)
