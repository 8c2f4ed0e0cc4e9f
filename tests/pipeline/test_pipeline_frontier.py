"""The frontier of a tiny student: every point measured once, in its own processes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_tiny_run
from typer.testing import CliRunner

from retrieval_kd import cli, pipeline
from retrieval_kd.encoder import Encoder
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.files import load_hits, read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.pipeline.frontier import frontier, points_of
from retrieval_kd.types import Hits, InputError

POINTS = """
[frontier]
steps = ["flat-fp32", "flat-int8", "hnsw"]

[[frontier.points]]
name = "flat"
query = "each"
index = { kind = "faiss", factory = "Flat" }

[[frontier.points]]
name = "hnsw"
index = { kind = "faiss", factory = "HNSW8", ef_search = 16 }

[[frontier.points]]
name = "half"
query = "fp32"
share = 0.5
index = { kind = "faiss", factory = "SQfp16" }
"""

FLAT = ["flat-fp32", "flat-int8", "flat-int8-16", "flat-fp32-binary"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny dense student, and its frontier."""
    path = write_tiny_run(tmp_path_factory.mktemp("frontier"))
    forms = 'forms = ["fp32", "int8", "int8-16", "fp32-binary"]\n'
    path.write_text(path.read_text().replace("[export]\n", f"[export]\n{forms}") + POINTS)
    pipeline.run(workspace(path))
    frontier(workspace(path))
    return path


def workspace(recipe: Path, *overrides: str) -> Workspace:
    return Workspace(recipe, recipe.parent / "work/tiny", recipe.parent / "store", overrides)


def test_quality_is_that_of_the_search(recipe: Path) -> None:
    made = workspace(recipe)
    report = read_json(made.folder / "frontier/frontier.json")
    assert list(report["points"]) == [*FLAT, "hnsw", "half"]
    student = made.trained
    documents = student.embed(student.render(made.collection.documents, "document"), "document")
    cuts = (("flat-fp32", "fp32", 32), ("flat-int8", "int8", 32), ("flat-int8-16", "int8", 16), ("half", "fp32", 16))
    for name, form, width in cuts:
        queries = Encoder.load(made.folder / "served" / form).encode(made.test_queries.texts)
        left, right = (v[:, :width] / np.linalg.norm(v[:, :width], axis=1, keepdims=True) for v in (queries, documents))
        full = left @ right.T
        hits = Hits(np.argsort(-full, axis=1).astype(np.int32), -np.sort(-full, axis=1))
        expected = per_query(hits, made.test_queries, made.collection.document_ids, ["nDCG@10", "R@1000"])
        one = report["points"][name]
        assert one["nDCG@10"] == pytest.approx(expected["nDCG@10"].mean(), abs=1e-6)
        found = load_hits(made.folder / f"frontier/points/{name}/deep")
        np.testing.assert_allclose(found.scores, hits.scores[:, :15], atol=2e-3)
        top = load_hits(made.folder / f"frontier/points/{name}/served")
        assert top.rows.shape == (8, 10)
        assert one["R@1000"] == pytest.approx(
            per_query(hits.top(15), made.test_queries, made.collection.document_ids, ["R@1000"])["R@1000"].mean()
        )
    assert report["points"]["half"]["index"] == "SQfp16, 16 coordinates"
    assert report["points"]["half"]["index_bytes"] < report["points"]["flat-fp32"]["index_bytes"]


def test_a_form_of_signs_searches_signs(recipe: Path) -> None:
    made = workspace(recipe)
    student = made.trained
    signs = [
        np.where(vectors > 0, 1, -1)
        for vectors in (
            Encoder.load(made.folder / "served/fp32").encode(made.test_queries.texts),
            student.embed(student.render(made.collection.documents, "document"), "document"),
        )
    ]
    full = signs[0] @ signs[1].T
    found = load_hits(made.folder / "frontier/points/flat-fp32-binary/deep")
    np.testing.assert_array_equal(found.scores, -np.sort(-full, axis=1)[:, :15])
    labels = {name: one["index"] for name, one in read_json(made.folder / "frontier/frontier.json")["points"].items()}
    assert (labels["flat-fp32-binary"], labels["flat-int8-16"]) == ("Flat, signs", "Flat, 16 coordinates")


def test_costs_are_measured(recipe: Path) -> None:
    report = read_json(recipe.parent / "work/tiny/frontier/frontier.json")
    for one in report["points"].values():
        for what in ("encode", "search"):
            assert 0 < one[f"{what}_p50_ms"] <= one[f"{what}_p95_ms"] <= one[f"{what}_p99_ms"]
        assert 0 < one["build_seconds"] < 60
        assert one["calls"] == 8
        for peak in ("build_peak_bytes", "search_peak_bytes"):
            assert 30e6 < one[peak] < 1e9  # numpy and FAISS are more than 30 MB; torch, which nothing here needs, a lot
    assert report["points"]["flat-fp32"]["encoder_bytes"] > report["points"]["flat-int8"]["encoder_bytes"]
    assert report["points"]["hnsw"]["query_encoder"] == "onnx int8"


def test_the_waterfall_begins_with_the_teacher(recipe: Path) -> None:
    folder = recipe.parent / "work/tiny"
    falls = read_json(folder / "frontier/frontier.json")["waterfall"]
    systems = read_json(folder / "report/report.json")["systems"]
    assert [step["name"] for step in falls] == ["teacher bm25", "flat-fp32", "flat-int8", "hnsw"]
    assert falls[0]["value"] == pytest.approx(systems["bm25"]["nDCG@10"])
    assert falls[1]["value"] == pytest.approx(systems["student"]["nDCG@10"], abs=1e-6)
    for before, after in pairwise(falls):
        assert after["difference"] == pytest.approx(after["value"] - before["value"])


def test_a_point_is_measured_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent / "work/tiny/frontier/points"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "hnsw/manifest.json").unlink()  # as if the run had been killed there
    folders = ["--out", str(folder.parent.parent), "--store", str(recipe.parent / "store")]
    done = CliRunner().invoke(cli.app, ["frontier", str(recipe), *folders, "--json"])
    assert done.exit_code == 0, done.exception
    assert set(json.loads(done.stdout.splitlines()[-1])["points"]) == {*FLAT, "hnsw", "half"}
    changed = {path for path in before if not path.exists() or path.stat().st_mtime_ns != before[path]}
    assert {path.relative_to(folder).parts[0] for path in changed if path != folder} == {"hnsw"}
    capsys.readouterr()
    frontier(workspace(recipe, "frontier.repeats=2"))
    assert capsys.readouterr().err.count("inputs changed, made again") == 6


def test_mistakes_are_told(recipe: Path) -> None:
    for overrides, message in (
        (['frontier.steps=["nobody"]'], "frontier.steps names 'nobody', which is no point: flat-fp32"),
        (["frontier.points.1.query=bf16"], "point 'hnsw': form 'bf16' is not exported"),
        (['frontier.points.1.index={kind="impact"}'], "point 'hnsw': index kind 'impact' takes no dense vectors"),
        (['frontier.points.1.index={kind="faiss", factory="Nonsense"}'], "point 'hnsw': .*cannot build 'Nonsense'"),
        (['frontier.points.1.index={kind="faiss", nprob=3}'], "unknown key 'nprob'; did you mean 'nprobe'"),
        (["frontier.points.2.query=fp32-binary"], "point 'half': share is of the coordinates of dense vectors"),
        (["frontier.points.1.name=half"], "two frontier points are called 'half'"),
        (["frontier.teacher=nobody"], "frontier.teacher 'nobody' is not in the report: bm25, student"),
    ):
        with pytest.raises(InputError, match=message):
            frontier(workspace(recipe, *overrides))


def test_without_a_teacher_a_system_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "renders", {})  # as a recipe without teachers has them
    with pytest.raises(InputError, match=r"name a system, frontier\.teacher: bm25, student"):
        frontier(workspace(recipe))


def test_without_points_those_of_the_kind(recipe: Path) -> None:
    points, steps = points_of(workspace(recipe, "frontier.points=[]", "frontier.steps=[]"))
    names = [point.name for point in points]
    assert names[:6] == [*FLAT, "fp16", "int8"]
    assert steps == ["flat-fp32", "flat-int8", "hnsw"]
    factories = {point.name: point.index.options["factory"] for point in points}
    assert factories["ivf-pq"] == "IVF1,PQ4"  # of 20 documents of width 32
    assert {point.query for point in points[4:]} == {"int8"}


@pytest.mark.slow
def test_a_sparse_student_has_a_frontier_too(tmp_path: Path) -> None:
    path = write_tiny_run(tmp_path, "splade")
    made = Workspace(path, tmp_path / "work/tiny", tmp_path / "store")
    with pytest.raises(InputError, match=r"run `rkd export \S+tiny.toml` first"):
        frontier(made)
    pipeline.run(made)
    points = '[{name = "small", query = "fp32", index = {kind = "impact"}}]'
    asked = Workspace(path, tmp_path / "work/tiny", tmp_path / "store", [f"frontier.points={points}"])
    report = frontier(asked)
    systems = read_json(made.folder / "report/report.json")["systems"]
    assert report["points"]["small"]["nDCG@10"] == pytest.approx(systems["student"]["nDCG@10"])
    assert report["points"]["small"]["query_encoder"] == "onnx fp32"
    assert [step["name"] for step in report["waterfall"]] == ["teacher bm25"]
    defaults, steps = points_of(made)
    assert {"impact-float", "impact"} <= {point.name for point in defaults}
    assert steps[:2] == ["impact-float", "impact"]
