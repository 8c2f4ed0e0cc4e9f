"""Sparse encoders as teachers: the numbers of Sentence Transformers' SparseEncoder, for pairs and for a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, SparseStaticEmbedding
from tiny import collection_of, tiny_masked_lm, tiny_sentence_transformer

from retrieval_kd.sparse_towers import encode_sparse
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher, sparse_encoder
from retrieval_kd.types import InputError

QUERIES = ["sort a list", "read", "", "open (the) file!"]
DOCUMENTS = ["read a file line by line and close it.", "set", "a map, a key: a value", "path " * 30, "lock", "set"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain SPLADE; one with a static query side and prompts; one of cosine and few active terms."""
    root = tmp_path_factory.mktemp("sparse")
    plain = SparseEncoder(str(tiny_masked_lm(root / "lm")), device="cpu")
    plain.max_seq_length = 24
    plain.save(str(root / "plain"))
    weight = torch.linspace(0.1, 2.0, len(plain.tokenizer.get_vocab()))
    router = Router.for_query_document([SparseStaticEmbedding(plain.tokenizer, weight)], list(plain))
    asymmetric = SparseEncoder(modules=[router], device="cpu", prompts={"query": "find: ", "document": "text: "})
    asymmetric.save(str(root / "asymmetric"))
    few = SparseEncoder(str(root / "plain"), device="cpu", max_active_dims=5, similarity_fn_name="cosine")
    few.save(str(root / "few"))
    return {path.name: path for path in root.iterdir()}


def load(folder: Path, **options: Any) -> sparse_encoder.SparseEncoder:
    teacher = load_teacher(Component(kind="sparse_encoder", model=str(folder), **options), collection_of(DOCUMENTS))
    assert isinstance(teacher, sparse_encoder.SparseEncoder)
    return teacher


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
@pytest.mark.parametrize("name", ["lm", "plain", "asymmetric", "few"])
def test_scores_are_those_of_sentence_transformers(name: str, batch_tokens: int, folders: dict[str, Path]) -> None:
    reference = SparseEncoder(str(folders[name]), device="cpu")
    full = reference.similarity(reference.encode_query(QUERIES), reference.encode_document(DOCUMENTS)).numpy()
    teacher = load(folders[name], batch_tokens=batch_tokens)
    left, right = teacher.render(QUERIES, "query"), teacher.render(DOCUMENTS, "document")
    pairs = [(query, document) for query in left for document in right]
    got = teacher.score([query for query, _ in pairs], [document for _, document in pairs])
    np.testing.assert_allclose(got.reshape(full.shape), full, rtol=1e-5, atol=1e-6)
    hits = teacher.retrieve(left, 4)
    for rows, scores, expected in zip(hits.rows, hits.scores, full, strict=True):
        best = [row for row in np.argsort(-expected.round(4), kind="stable")[:4] if expected[row] > 0]
        assert rows.tolist() == best + [-1] * (4 - len(best))
        np.testing.assert_allclose(scores[: len(best)], expected[best], rtol=1e-5)
    assert (full > 0).any()
    assert full.std() > 0


def test_the_sides_of_an_asymmetric_model_differ(folders: dict[str, Path]) -> None:
    teacher = load(folders["asymmetric"])
    assert teacher.render(["x"], "query") == ["find: x"]
    kinds = {side: [module["module"] for module in teacher.identity[side]["modules"]] for side in ("query", "document")}
    assert kinds == {"query": ["SparseStaticEmbedding"], "document": ["MLMTransformer", "SpladePooling"]} or kinds == {
        "query": ["SparseStaticEmbedding"],
        "document": ["Transformer", "SpladePooling"],
    }
    short = load(folders["asymmetric"], max_length=2, query_prompt="")
    np.testing.assert_array_equal(short.score(["sort list file"], ["set"]), short.score(["sort list"], ["set"]))


def test_every_text_is_encoded_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load(folders["plain"])
    encoded: list[str] = []

    def counting(towers: Any, texts: list[str], *settings: Any) -> Any:
        encoded.extend(texts)
        return encode_sparse(towers, texts, *settings)

    monkeypatch.setattr(sparse_encoder, "encode_sparse", counting)
    teacher.score(QUERIES * 6, [document for document in DOCUMENTS for _ in range(4)])
    assert sorted(encoded) == sorted([*set(QUERIES), *set(DOCUMENTS)])


def test_no_texts_have_no_scores(folders: dict[str, Path]) -> None:
    teacher = load(folders["few"])
    assert teacher.score([], []).shape == (0,)
    assert teacher.retrieve([], 3).rows.shape == (0, 3)


def test_other_modules_are_run_as_they_stand(tmp_path: Path) -> None:
    """A dense encoder whose vectors are made sparse (CSR), which has no language model's head."""
    dense = tiny_sentence_transformer(tmp_path / "bert", normalize=False)
    torch.manual_seed(0)
    coder = SparseAutoEncoder(input_dim=32, hidden_dim=64, k=8)
    SparseEncoder(modules=[*dense, coder], device="cpu").save(str(tmp_path / "csr"))
    reference = SparseEncoder(str(tmp_path / "csr"), device="cpu")
    full = reference.similarity(reference.encode_query(QUERIES), reference.encode_document(DOCUMENTS)).numpy()
    teacher = load(tmp_path / "csr")
    got = teacher.score([query for query in QUERIES for _ in DOCUMENTS], DOCUMENTS * len(QUERIES))
    np.testing.assert_allclose(got.reshape(full.shape), full, rtol=1e-4, atol=1e-5)
    assert full.std() > 0


def test_a_random_head_is_refused(tmp_path: Path) -> None:
    tiny_sentence_transformer(tmp_path / "bert")
    with pytest.raises(InputError, match="bert' is no sparse encoder"):
        load(tmp_path / "bert")


def test_tokens_are_counted_once_a_text(folders: dict[str, Path]) -> None:
    teacher = load(folders["plain"])
    tokenizer = teacher.towers.model.tokenizer
    expected = sum(len(tokenizer(text)["input_ids"]) for text in ("read", "set", "lock"))
    assert teacher.count_tokens(["read", "read"], ["set", "lock"]) == expected


def test_a_table_reads_no_special_tokens(folders: dict[str, Path]) -> None:
    teacher = load(folders["asymmetric"])
    assert teacher.count_tokens(["sort list", "read"], []) == 3
    assert teacher.count_tokens([], ["sort list"]) == 4
    assert teacher.count_tokens([], []) == 0


def test_no_pair_has_no_score(folders: dict[str, Path]) -> None:
    scores = load(folders["plain"]).score([], [])
    assert (scores.shape, scores.dtype) == ((0,), np.float32)
