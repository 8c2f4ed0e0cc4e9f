"""Sparse students: what is saved is what was trained, as Sentence Transformers' SparseEncoder sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import DOCUMENTS, QUERIES, batch_of
from safetensors.torch import load_file
from sentence_transformers import SparseEncoder
from tiny import stored_as, tiny_masked_lm, tiny_sentence_transformer
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from retrieval_kd import gather
from retrieval_kd.sparse_student import SparseStudent
from retrieval_kd.sparse_towers import encode_sparse, load_sparse_towers
from retrieval_kd.students import Batch, Outputs, inference_free, load_student, splade
from retrieval_kd.tables import Component
from retrieval_kd.types import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_masked_lm(folder / "mlm", layers=3)
    tiny_masked_lm(folder / "small", layers=1, width=16, seed=1)
    tiny_sentence_transformer(folder / "t", layers=2, width=128).save(str(folder / "plain"))
    chosen = inference_free.Options(model=str(folder / "mlm"), max_length=24)
    inference_free.begin(chosen, DOCUMENTS, folder / "started")
    names = {name: str(folder / name) for name in ("mlm", "small", "plain")}
    return names | {"free": str(folder / "started/model")}


def make(models: dict[str, str], kind: str = "splade", model: str = "mlm", **options: Any) -> SparseStudent:
    if "document" in options:
        options["document"] = {**options["document"], "model": models[options["document"].get("model", "mlm")]}
    student = load_student(Component(kind=kind, model=models[model], **options), seed=0)
    assert isinstance(student, SparseStudent)
    return student.eval()


def outputs(student: SparseStudent, queries: Sequence[str] = QUERIES, documents: Sequence[str] = DOCUMENTS) -> Outputs:
    found: Outputs = student(batch_of(student, queries, documents, micro_batch_tokens=50))
    return found


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    assert left is not None
    assert right is not None
    return left.shape == right.shape and torch.allclose(left, right, atol=1e-4)


def shake(student: SparseStudent) -> None:
    """As if trained."""
    make = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=make)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("splade", "mlm", {}),
    ("splade", "mlm", {"pooling": "sum"}),
    ("splade", "mlm", {"double_log": True}),
    ("splade", "mlm", {"pooling": "sum", "double_log": True, "layers": [2]}),
    ("splade", "mlm", {"top_k": 5, "max_length": 9}),
    ("splade", "mlm", {"query_prompt": "find: ", "document_prompt": "read: "}),
    ("splade", "small", {"document": {}}),
    ("splade", "small", {"document": {"frozen": True, "pooling": "sum"}, "document_prompt": "read: "}),
    ("inference_free", "free", {}),
    ("inference_free", "free", {"train_table": True, "double_log": True, "layers": [0, 2]}),
    ("inference_free", "free", {"top_k": 4, "document_prompt": "read: ", "pooling": "sum", "max_length": 12}),
]


@pytest.mark.parametrize(("kind", "model", "options"), CASES, ids=str)
def test_saved_and_loaded_it_gives_the_same_vectors(
    kind: str, model: str, options: dict[str, Any], models: dict[str, str], tmp_path: Path
) -> None:
    student = make(models, kind, model, **options)
    with torch.no_grad():
        whole = outputs(student)
        for name in set(options) - {"train_table"}:
            without = outputs(
                make(models, kind, model, **{key: value for key, value in options.items() if key != name})
            )
            assert not (same(whole.queries, without.queries) and same(whole.documents, without.documents)), name
        shake(student)
        found = outputs(student)
    assert found.queries is not None
    assert found.documents is not None
    student.save(tmp_path)
    loaded = SparseEncoder(str(tmp_path), device="cpu")
    queries = loaded.encode_query(QUERIES, convert_to_sparse_tensor=False).numpy()
    documents = loaded.encode_document(DOCUMENTS, convert_to_sparse_tensor=False).numpy()
    near = 2e-6 if "sum" not in str(options) else 5e-6  # rounding of logits of size 10, and of sums of them
    np.testing.assert_allclose(found.queries.numpy(), queries, atol=near, rtol=near)
    np.testing.assert_allclose(found.documents.numpy(), documents, atol=near, rtol=near)
    np.testing.assert_allclose(found.scores.numpy(), loaded.similarity(queries, documents).numpy(), rtol=1e-5)
    assert loaded.similarity_fn_name == "dot"
    for vectors in (queries, documents):
        active = (vectors > 0).sum(1)
        assert (active > 0).all()
        assert (active < vectors.shape[1]).all()
        assert (active <= options.get("top_k", 10**6)).all()
    # and as this package encodes a collection
    towers = load_sparse_towers(str(tmp_path))
    for side, texts, expected in (("query", QUERIES, queries), ("document", DOCUMENTS, documents)):
        vectors = encode_sparse(towers, towers.render(texts, side), side, "fp32")
        assert (vectors.dtype, vectors.shape) == (np.float32, expected.shape)
        np.testing.assert_allclose(vectors.toarray(), expected, atol=near, rtol=near)
        assert (vectors.data != 0).all()
    again = load_student(Component(kind=kind, model=str(tmp_path)), 0) if "document" not in options else student
    torch.testing.assert_close(outputs(again.eval()).scores, found.scores, atol=1e-5, rtol=1e-5)


def test_one_of_several_processes_encodes_alone(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others wait for it: nothing is gathered, and every text is encoded here."""
    towers = load_sparse_towers(models["mlm"])
    alone = encode_sparse(towers, DOCUMENTS, "document", "fp32")
    monkeypatch.setattr(gather, "process", lambda: (0, 2))  # gathering would now fail, or wait for ever
    told: list[int] = []
    found = encode_sparse(towers, DOCUMENTS, "document", "fp32", 40, told.append)
    np.testing.assert_allclose(found.toarray(), alone.toarray(), atol=1e-5)
    assert sum(told) == len(DOCUMENTS)
    assert len(told) > 3
    assert encode_sparse(towers, [], "document", "fp32").shape == (0, alone.shape[1])


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_gradients_are_those_of_the_modules_that_are_saved(pooling: str, models: dict[str, str]) -> None:
    """Against Sentence Transformers' own forward pass, through a tied table; with and without gradient caching."""
    found: list[dict[str, torch.Tensor]] = []
    for way in ("ours", "cached", "theirs"):
        student = make(models, pooling=pooling)
        if way == "theirs":
            student.train()  # no dropout in it; in inference the pooling works in place
            sides = []
            for texts in (QUERIES, DOCUMENTS):
                features = student.towers.model.preprocess(texts)
                sides.append(student.towers.model(features)["sentence_embedding"])
            queries, documents = sides
        else:
            tokens = [
                [np.array(ids, np.int32) for ids in student.tokenize(texts, "query")] for texts in (QUERIES, DOCUMENTS)
            ]
            batch = Batch(*tokens, torch.zeros(6, 1, dtype=torch.int64), None, 60, way == "cached")
            given = student(batch)
            queries, documents = given.queries, given.documents
        loss = (queries @ documents.T).square().mean() + documents.mean(0).square().sum()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert len(found[0]) > 20
    scale = max(float(gradient.abs().max()) for gradient in found[2].values())
    for name, gradient in found[2].items():
        for mine in found[:2]:
            torch.testing.assert_close(mine[name], gradient, atol=2e-6 * scale, rtol=1e-3, msg=name)


def test_the_table_learns_if_told(models: dict[str, str]) -> None:
    for learns in (False, True):
        student = make(models, "inference_free", "free", train_table=learns)
        found = outputs(student)
        found.scores.sum().backward()
        table: Any = student.towers.query[0]
        assert (table.weight.grad is not None) == learns
        if learns:
            assert found.documents is not None
            assert found.queries is not None
            expected = ((found.queries > 0).float().sum(0) * found.documents.detach().sum(0)).numpy()
            np.testing.assert_allclose(table.weight.grad.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_a_table_that_learns_has_no_weights_below_0(models: dict[str, str], tmp_path: Path) -> None:
    """Which no index takes: neither in the step that follows nor in what is saved."""
    student = make(models, "inference_free", "free", train_table=True)
    table: Any = student.towers.query[0]
    heavy = int(table.weight.argmax())
    for way in ("read", "saved"):
        with torch.no_grad():
            table.weight[[heavy, heavy - 1]] = torch.tensor([-0.5, 0.25])
        if way == "read":
            outputs(student)
        else:
            student.save(tmp_path)
            table = load_sparse_towers(str(tmp_path)).query[0]
        assert table.weight[[heavy, heavy - 1]].tolist() == [0.0, 0.25]


def test_queries_are_looked_up(models: dict[str, str]) -> None:
    """Each term counts once, with its inverse document frequency in the student's tokens; special tokens not at all."""
    documents = ["sort the list", "sort a file", "xq"]
    tokenizer = make(models).towers.query[0].tokenizer
    weights = inference_free.query_weights(tokenizer, documents)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("sort", "list", "thread", "[CLS]", "[UNK]", "x")}
    assert weights[ids["sort"]] == pytest.approx(math.log(1 + 1.5 / 2.5))
    assert weights[ids["list"]] == weights[ids["x"]] == pytest.approx(math.log(1 + 2.5 / 1.5))
    assert weights[ids["thread"]] == pytest.approx(math.log(1 + 3.5 / 0.5))
    assert weights[ids["[CLS]"]] == weights[ids["[UNK]"]] == 0
    student = make(models, "inference_free", "free")
    found = outputs(student, ["sort sort list"], documents).queries
    assert found is not None
    table = inference_free.query_weights(tokenizer, DOCUMENTS)
    assert {int(place): float(found[0, place]) for place in found[0].nonzero()} == pytest.approx(
        {ids["sort"]: float(table[ids["sort"]]), ids["list"]: float(table[ids["list"]])}
    )


@pytest.mark.parametrize(("more", "start"), [(11, "model"), (11, "lexical"), (-3, "model")])
def test_embeddings_padded_beyond_the_tokenizer_are_cut(
    more: int, start: str, models: dict[str, str], tmp_path: Path
) -> None:
    """As those of ModernBERT are, and missing ones added: table and documents have the tokenizer's terms."""
    source = models["mlm" if start == "model" else "plain"]
    model = (AutoModelForMaskedLM if start == "model" else AutoModel).from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer) + more)
    model.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    options = inference_free.Options(model=str(tmp_path / "padded"), max_length=24, start=start)
    inference_free.begin(options, DOCUMENTS, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "padded"] == ["model"]
    student = inference_free.load(inference_free.Options(model=str(tmp_path / "model"))).eval()
    found = outputs(student)
    assert found.queries is not None
    assert found.documents is not None
    assert found.queries.shape[1] == found.documents.shape[1] == len(tokenizer)
    whole = inference_free.Options(model=source, max_length=24, start=start)
    if more > 0 and start == "model":  # what is left has not changed
        inference_free.begin(whole, DOCUMENTS, tmp_path / "whole")
        same = outputs(inference_free.load(whole.model_copy(update={"model": str(tmp_path / "whole/model")})).eval())
        torch.testing.assert_close(found.scores, same.scores)


def test_a_table_of_other_terms_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    towers = load_sparse_towers(models["free"])
    first: Any = towers.document[0]
    first.auto_model.resize_token_embeddings(150)
    towers.model.save(str(tmp_path))
    with pytest.raises(InputError, match=r"its table weighs \d+ terms and its documents have"):
        make({**models, "padded": str(tmp_path)}, "inference_free", "padded")


def test_a_frozen_tower_does_not_learn(models: dict[str, str]) -> None:
    student = make(models, document={"frozen": True}).train()
    assert not any(module.training for module in student.towers.document.modules())
    outputs(student).scores.sum().backward()
    learned = {name.split(".")[0] for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert learned == {"query"}


def test_without_documents(models: dict[str, str]) -> None:
    found = outputs(make(models), QUERIES, [])
    assert (found.scores.shape, found.documents.shape[0] if found.documents is not None else None) == ((6, 0), 0)


def test_a_lexical_start_reads_halves_in_fp32(models: dict[str, str], tmp_path: Path) -> None:
    half = stored_as(tmp_path / "half", Path(models["plain"]), torch.float16)
    splade.begin(splade.Options(model=str(half), start="lexical"), DOCUMENTS, tmp_path / "begun")
    weights = [load_file(path) for path in (tmp_path / "begun").rglob("*.safetensors")]
    assert {tensor.dtype for part in weights for tensor in part.values()} == {torch.float32}


def test_a_lexical_start_is_made_of_a_model_without_a_head(models: dict[str, str], tmp_path: Path) -> None:
    options = splade.Options(model=models["plain"], start="lexical")
    assert splade.reads_collection(options)
    splade.begin(options, DOCUMENTS, tmp_path)
    again = options.model_copy(update={"model": str(tmp_path / "model"), "start": "model"})
    assert not splade.reads_collection(again)
    assert outputs(splade.load(again).eval()).scores.shape == (len(QUERIES), len(DOCUMENTS))
    with pytest.raises(InputError, match=r"makes a new head, and .* has one"):
        splade.reads_collection(splade.Options(model=models["mlm"], start="lexical"))
    with pytest.raises(InputError, match="begins with a collection"):
        splade.load(options)
    for change in ({"layers": (0,)}, {"pooling": "sum"}, {"echo": True}):
        with pytest.raises(InputError, match="leave `layers`, `pooling` and `echo` out"):
            splade.reads_collection(options.model_copy(update=change))


@pytest.mark.parametrize(
    ("kind", "model", "options", "message"),
    [
        ("splade", "plain", {}, 'no language model\'s head .* start = "lexical"'),
        ("inference_free", "plain", {}, "no language model's head"),
        ("inference_free", "mlm", {}, "has no table of query weights"),
        ("splade", "free", {}, "has two towers"),
        ("splade", "mlm", {"layers": [7]}, "names layer 7"),
    ],
)
def test_what_cannot_work(kind: str, model: str, options: dict[str, Any], message: str, models: dict[str, str]) -> None:
    with pytest.raises(InputError, match=message):
        make(models, kind, model, **options)
