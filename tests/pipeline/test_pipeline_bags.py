"""Static and lexical students through a whole run: start, training, index, served table, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tiny import tiny_sentence_transformer
from toy import draw_texts, own_document, write_beir

from retrieval_kd import pipeline
from retrieval_kd.encoder import Encoder
from retrieval_kd.files import load_hits, read_json
from retrieval_kd.index import open_index
from retrieval_kd.pipeline import Workspace
from retrieval_kd.types import InputError

RECIPE = """
[data]
collection = "{place}/toy"

[candidates]
depth = 8

[[teachers]]
name = "tutor"
kind = "bi_encoder"
model = "{place}/model"

[student]
model = "{place}/model"
{student}

[[stages]]
steps = 40
batch_size = 8
learning_rate = 1e-2
terms = [{terms}]

[evaluation]
depth = 10
latency_queries = 2
fused = false

[export]
quality_tolerance = 0.5
"""
BOTH = ", ".join(
    f'{{ loss = "embedding_mse", teachers = ["tutor"], side = "{side}" }}' for side in ("query", "document")
)
QUERIES = '{ loss = "embedding_mse", teachers = ["tutor"] }'
GRAM = '{ loss = "kl", teachers = ["tutor"], relation = "gram", side = "document", temperature = 0.01 }'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BEIR collection (20 documents, 8 queries) and a model."""
    folder = tmp_path_factory.mktemp("bags")
    tiny_sentence_transformer(folder / "t", width=32).save(str(folder / "model"))
    write_beir(folder / "toy", *draw_texts(), {"train": own_document(), "test": own_document()})
    return folder


def workspace_of(place: Path, name: str, student: str, terms: str) -> Workspace:
    path = place / f"{name}.toml"
    path.write_text(RECIPE.format(place=place, student=student, terms=terms))
    return Workspace(path, place / "work" / name, place / "store")


FROZEN = '\n[student.document]\nmodel = "{place}/model"'
CASES = {
    "static": ('kind = "static"\nweights = "zipf"', BOTH),
    "static-queries": ('kind = "static"', QUERIES),
    "lexical": ('kind = "lexical"\nhidden = [8, 16]\ndimension = 12', GRAM),
    "lexical-queries": ('kind = "lexical"\nstart = "teacher"\nhidden = [16]\nlongest = 2', QUERIES),
}


@pytest.mark.parametrize("name", CASES)
def test_a_whole_run(name: str, place: Path) -> None:
    student, terms = CASES[name]
    frozen = name.endswith("queries")
    workspace = workspace_of(place, name, student + (FROZEN.format(place=place) if frozen else ""), terms)
    pipeline.run(workspace)
    log = [json.loads(line) for line in (workspace.folder / "training/0/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    loaded = SentenceTransformer(str(workspace.folder / "student"), device="cpu", trust_remote_code="lexical" in name)
    queries = list(workspace.test_queries.texts)
    documents = loaded.encode_document(list(workspace.collection.documents))
    if frozen:
        tutor = SentenceTransformer(str(place / "model"), device="cpu")
        np.testing.assert_allclose(documents, tutor.encode(list(workspace.collection.documents)), atol=1e-5)
    scores = loaded.encode_query(queries) @ documents.T
    hits = load_hits(workspace.folder / "runs/student")
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, hits.rows, 1), atol=1e-5)
    np.testing.assert_allclose(hits.scores[:, 0], scores.max(1), atol=1e-5)
    report = read_json(workspace.folder / "report/report.json")
    assert report["systems"]["student"]["engine"] == "table fp32"
    assert report["systems"]["student-int8"]["bytes"] < report["systems"]["student"]["bytes"]
    assert report["systems"]["student"]["query_p50_ms"] < 5
    before = Workspace(workspace.path, workspace.folder, place / "store")
    pipeline.run(before)  # nothing is made again
    assert read_json(workspace.folder / "student/manifest.json") == read_json(before.folder / "student/manifest.json")


def test_it_is_served_without_torch(place: Path) -> None:
    """The vectors of the table and its index, in a process that cannot import torch."""
    student, terms = CASES["lexical"]
    workspace = workspace_of(place, "served", student, terms)
    pipeline.run(workspace)
    code = f"""
import sys, pathlib
sys.modules["torch"] = None
from retrieval_kd.encoder import Encoder
from retrieval_kd.server import create_app, load_model
from retrieval_kd.index import open_index
folder = pathlib.Path({str(workspace.folder)!r})
encoder = Encoder.load(folder / "served/fp32")
create_app([load_model(str(folder))])
vectors = encoder.encode([{workspace.test_queries.texts[0]!r}])
print(open_index(folder / "index/index").search(vectors, 3).rows[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    encoder = Encoder.load(workspace.folder / "served/fp32")
    found = open_index(workspace.folder / "index/index").search(encoder.encode([workspace.test_queries.texts[0]]), 3)
    assert json.loads(done.stdout) == found.rows[0].tolist()


def test_a_damaged_table_is_refused(place: Path) -> None:
    student, terms = CASES["static-queries"]
    workspace = workspace_of(place, "damaged", student + FROZEN.format(place=place), terms)
    pipeline.run(workspace)
    table: Any = workspace.folder / "served/fp32/table.npz"
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"table\.npz is not the file that was exported"):
        Encoder.load(table.parent)
    table.unlink()
    with pytest.raises(InputError, match=r"has no table\.npz"):
        Encoder.load(table.parent)


def test_targets_beyond_a_cosine_are_refused(place: Path) -> None:
    bm25 = CASES["static"][0] + '\n[[teachers]]\nname = "bm25"\nkind = "bm25"'
    with pytest.raises(InputError, match=r"cosines.*Set normalize = 'minmax' or a scale\.$"):
        workspace_of(place, "beyond", bm25, '{ loss = "margin_mse", teachers = ["bm25"] }')
