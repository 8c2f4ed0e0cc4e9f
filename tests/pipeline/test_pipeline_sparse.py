"""A sparse student through a whole run: start from the collection, training, index, look-up of queries, report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SparseEncoder
from tiny import tiny_masked_lm, tiny_sentence_transformer
from toy import draw_texts, own_document, write_beir

from retrieval_kd import pipeline
from retrieval_kd.encoder import Encoder
from retrieval_kd.export_table import export_table
from retrieval_kd.files import load_hits, read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.pipeline.evaluation import _searched_by
from retrieval_kd.tables import Component
from retrieval_kd.teachers import load_teacher
from retrieval_kd.types import InputError

RECIPE = """
[data]
collection = "{data}"

[candidates]
depth = 8

[[teachers]]
name = "bm25"
kind = "bm25"

[student]
kind = "{kind}"
model = "{model}"
{student}

[[stages]]
steps = 12
batch_size = 4
candidates = 4
learning_rate = 3e-3
terms = [{{ loss = "kl", teachers = ["bm25"] }}]
regularizers = [{regularizer}]

[index]
kind = "impact"
weights = "float32"

[evaluation]
depth = 10
latency_queries = 2
fused = false

[export]
forms = ["fp32"]
"""
PENALTY = '{ name = "flops", weight = { ramp = "quadratic", to = 1e-2, steps = 6 }, by_place = true }'
STAGES = ("student", "vectors", "index", "served", "runs")
STEERED = '{ name = "l1", weight = 1e-3, active_terms = 12 }'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BEIR collection (20 documents, 8 queries) and two models."""
    folder = tmp_path_factory.mktemp("sparse")
    tiny_masked_lm(folder / "masked")
    tiny_sentence_transformer(folder / "t", width=128).save(str(folder / "plain"))
    write_beir(folder / "toy", *draw_texts(), {"train": own_document(), "test": own_document()})
    return folder


def workspace_of(place: Path, name: str, kind: str, model: str, student: str = "", regularizer: str = PENALTY) -> Any:
    path = place / f"{name}.toml"
    data = str(place / "toy")
    path.write_text(RECIPE.format(data=data, kind=kind, model=place / model, student=student, regularizer=regularizer))
    return Workspace(path, place / "work" / name, place / "store")


@pytest.mark.parametrize(
    ("name", "kind", "model", "student", "regularizer"),
    [
        ("free", "inference_free", "masked", "max_length = 24", PENALTY),
        ("free-lexical", "inference_free", "plain", 'start = "lexical"\ntrain_table = true', STEERED),
        ("splade", "splade", "masked", "top_k = 30", PENALTY),
    ],
)
def test_a_whole_run(name: str, kind: str, model: str, student: str, regularizer: str, place: Path) -> None:
    workspace = workspace_of(place, name, kind, model, student, regularizer)
    pipeline.run(workspace)
    log = [json.loads(line) for line in (workspace.folder / "training/0/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for value in log[-1].values())
    assert log[-1]["active.document"] > 0
    loaded = SparseEncoder(str(workspace.folder / "student"), device="cpu")
    queries = loaded.encode_query(list(workspace.test_queries.texts), convert_to_sparse_tensor=False).numpy()
    documents = loaded.encode_document(list(workspace.collection.documents), convert_to_sparse_tensor=False).numpy()
    hits = load_hits(workspace.folder / "runs/student")
    scores = queries @ documents.T
    found = np.where(hits.rows >= 0, np.take_along_axis(scores, np.maximum(hits.rows, 0), 1), -np.inf)
    np.testing.assert_allclose(np.asarray(hits.scores), found, rtol=1e-3)
    best = scores.max(1)
    np.testing.assert_allclose(hits.scores[:, 0], np.where(best > 0, best, -np.inf), rtol=1e-3)
    report = read_json(workspace.folder / "report/report.json")
    system = report["systems"]["student"]
    assert system["engine"] == ("table fp32" if kind == "inference_free" else "onnx fp32")
    assert system["query_p50_ms"] > 0
    assert system["index_bytes"] > 0
    assert report["facts"]["active_terms_a_document"] == pytest.approx((documents > 0).sum(1).mean(), abs=0.06)
    assert report["facts"]["active_terms_a_query"] == pytest.approx((queries > 0).sum(1).mean(), abs=0.06)
    stamps = {path: path.stat().st_mtime_ns for path in workspace.folder.glob("*/manifest.json")}
    pipeline.run(workspace_of(place, name, kind, model, student, regularizer))
    assert stamps == {path: path.stat().st_mtime_ns for path in workspace.folder.glob("*/manifest.json")}


def test_what_searches_is_called_what_it_is(place: Path) -> None:
    collection = workspace_of(place, "called", "splade", "masked").collection
    for kind, options, engine in (
        ("bm25", {}, "bm25s"),
        ("sparse_encoder", {"model": str(place / "masked")}, "torch fp32"),
    ):
        assert _searched_by(load_teacher(Component(kind=kind, **options), collection)) == engine


def test_another_index_is_searched_anew(place: Path) -> None:
    """Nothing of the runs is kept, whether vectors come from a table or from a graph."""
    for kind in ("inference_free", "splade"):
        workspace = workspace_of(place, f"twice-{kind}", kind, "masked")
        pipeline.run(workspace)
        before = {name: read_json(workspace.folder / name / "manifest.json")["key"] for name in STAGES}
        again = Workspace(workspace.path, workspace.folder, workspace.store, ["index.weights=uint8"])
        pipeline.run(again)
        after = {name: read_json(workspace.folder / name / "manifest.json")["key"] for name in STAGES}
        assert read_json(workspace.folder / "index/index/index.json")["weights"] == "uint8"
        changed = {name for name in STAGES if before[name] != after[name]}
        assert changed == {"index", "runs", "served"}  # whose quality is that of a search


def test_another_index_of_a_dense_student_is_searched_and_measured_anew(place: Path) -> None:
    """The exported forms too, whose quality is that of a search in the index."""
    path, keys = place / "dense.toml", []
    path.write_text(RECIPE.format(data=place / "toy", kind="dense", model=place / "plain", student="", regularizer=""))
    for factory in ("Flat", "HNSW8"):
        index = f'index={{kind="faiss", factory="{factory}"}}'
        workspace = Workspace(path, place / "work/dense", place / "store", [index])
        pipeline.run(workspace)
        stages = ("student", "index", "served", "runs")
        keys.append({name: read_json(workspace.folder / name / "manifest.json")["key"] for name in stages})
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"index", "served", "runs"}


def test_the_tolerance_is_part_of_what_is_served(place: Path) -> None:
    workspace = workspace_of(place, "free", "inference_free", "masked", "max_length = 24")
    pipeline.run(workspace)
    path = workspace.folder / "served/manifest.json"
    before = read_json(path)["key"]
    pipeline.export(Workspace(workspace.path, workspace.folder, workspace.store, ["export.vector_tolerance=0.5"]))
    assert read_json(path)["key"] != before


def test_the_served_table_is_the_query_tower(place: Path) -> None:
    workspace = workspace_of(place, "free", "inference_free", "masked", "max_length = 24")
    pipeline.run(workspace)
    table = Encoder.load(workspace.folder / "served/fp32")
    loaded = SparseEncoder(str(workspace.folder / "student"), device="cpu")
    texts = ["sort sort the list", "xylophone?", "", " ".join(["lock"] * 30 + ["file"])]
    expected = loaded.encode_query(texts, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(table.encode(texts).toarray(), expected, atol=1e-6)
    assert table.encode(texts)[[2]].nnz == 0
    tower, same = list(workspace.sparse_towers.query), {"identity": {}, "document_identity": {}}
    with pytest.raises(InputError, match="SparseStaticEmbedding has no form 'int8'; a table of it is fp32"):
        export_table(tower, place / "int8", "int8", check_texts=texts, **same)


def test_a_live_teacher_that_begins_with_the_collection_is_refused(place: Path) -> None:
    """It would only when training begins, hours later."""
    path = workspace_of(place, "live", "splade", "masked").path
    live = f'[[live]]\nname = "tutor"\nkind = "inference_free"\nmodel = "{place / "masked"}"\n'
    path.write_text(path.read_text() + live)
    with pytest.raises(InputError, match="live teacher 'tutor' would begin with the collection"):
        Workspace(path, place / "work/live", place / "store")


def test_the_wrong_index_is_refused_before_anything_runs(place: Path) -> None:
    path = place / "wrong.toml"
    text = RECIPE.format(
        data=place / "toy", kind="splade", model=place / "masked", student="", regularizer=PENALTY
    ).replace('kind = "impact"\nweights = "float32"', 'kind = "faiss"')
    path.write_text(text)
    with pytest.raises(InputError, match=r"'faiss' does not take sparse vectors.*set index.kind = 'impact', or leave"):
        Workspace(path, place / "work/wrong", place / "store")
