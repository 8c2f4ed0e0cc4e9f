"""The index stage over shards, and what `rkd index --dry-run` says beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_tiny_run
from typer.testing import CliRunner

from retrieval_kd import cli, corpus_vectors, pipeline
from retrieval_kd.files import read_json, size_bytes
from retrieval_kd.index import open_index
from retrieval_kd.pipeline import Workspace
from retrieval_kd.pipeline import preflight as module
from retrieval_kd.pipeline.documents import corpus_form
from retrieval_kd.pipeline.preflight import preflight
from retrieval_kd.types import InputError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tiny dense student in work/tiny."""
    path = write_tiny_run(tmp_path_factory.mktemp("corpus"))
    for stage in (pipeline.mine, pipeline.score, pipeline.train):
        stage(workspace(path))
    return path


def workspace(recipe: Path, *overrides: str, dry: bool = False) -> Workspace:
    return Workspace(recipe, recipe.parent / "work/tiny", recipe.parent / "store", overrides, dry)


def command(recipe: Path, *arguments: str) -> list[str]:
    folders = ["--out", str(recipe.parent / "work/tiny"), "--store", str(recipe.parent / "store")]
    return ["index", str(recipe), *folders, *arguments]


def test_shards_are_encoded_once_and_give_the_same_index(recipe: Path) -> None:
    found = []
    queries = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    for vectors in ("store", "fp32", "fp16", "int8"):
        made = workspace(recipe, f"corpus.vectors={vectors}", "corpus.shard=8")
        pipeline.index(made)
        found.append(open_index(made.folder / "index/index").search(queries, 20))
        if vectors != "store":
            manifest = read_json(made.folder / "shards/vectors.json")
            assert (manifest["form"], manifest["documents"], len(manifest["shards"])) == (vectors, 20, 3)
    np.testing.assert_array_equal(found[0].rows, found[1].rows)
    for other, bound in ((1, 1e-6), (2, 1e-2), (3, 5e-2)):
        scores = [np.take_along_axis(hits.scores, np.argsort(hits.rows), 1) for hits in (found[0], found[other])]
        np.testing.assert_allclose(*scores, atol=bound)
        assert (np.abs(scores[0] - scores[1]).max() > 0) == (other > 1)


def test_a_large_collection_is_kept_in_shards(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert corpus_form(workspace(recipe)) is None
    monkeypatch.setattr("retrieval_kd.pipeline.documents.LARGE", 19)
    assert corpus_form(workspace(recipe)) == "fp16"
    assert corpus_form(workspace(recipe, "corpus.vectors=store")) is None


def test_a_dry_run_says_what_is_needed_and_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = workspace(recipe, "corpus.vectors=fp16", "corpus.shard=8", dry=True)
    for path in (made.folder / "shards").glob("*"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")}
    seen = preflight(made)
    assert before == {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")}
    assert (seen.documents, seen.encoded, seen.vector_bytes) == (20, 0, 20 * 2 * 32)
    assert seen.documents_per_second == pytest.approx(20 / seen.seconds)
    assert seen.problems == []
    pipeline.index(workspace(recipe, "corpus.vectors=fp16", "corpus.shard=8"))
    assert seen.index_bytes == pytest.approx(size_bytes(made.folder / "index/index/index.faiss"), rel=0.05)
    assert seen.text_bytes == sum(map(len, made.collection.documents))
    again = preflight(workspace(recipe, "corpus.vectors=fp16", "corpus.shard=8", dry=True))
    assert (again.encoded, again.seconds, again.documents_per_second, again.vector_bytes) == (20, 0.0, None, 0)
    pipeline.index(workspace(recipe))
    stored = preflight(workspace(recipe, dry=True))
    assert (stored.encoded, stored.store_bytes) == (20, 0)


def test_the_command(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(cli.app, command(recipe, "--dry-run"))
    assert done.exit_code == 0
    assert "nothing written" in done.stdout
    said = CliRunner().invoke(cli.app, command(recipe, "--dry-run", "--json", "--set", "corpus.vectors=int8"))
    facts = json.loads(said.stdout.splitlines()[-1])
    assert (facts["documents"], facts["vector_bytes"], facts["problems"]) == (20, 20 * 36, [])
    monkeypatch.setattr(module, "disk_free", lambda _: 100)
    small = CliRunner().invoke(cli.app, command(recipe, "--dry-run", "--set", "corpus.vectors=int8"))
    assert isinstance(small.exception, InputError)
    assert "this would not fit: the run's disk has 1e-07 GB free" in str(small.exception)


def test_a_small_disk_is_told_before_anything_is_encoded(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_vectors, "disk_free", lambda _: 1000)
    made = workspace(recipe, "corpus.vectors=fp32", "corpus.shard=5")
    monkeypatch.setattr("retrieval_kd.pipeline.documents.encode_corpus", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(InputError, match="the vectors of 20 documents take"):
        pipeline.index(made)


def test_a_sparse_student_has_no_such_vectors(recipe: Path, tmp_path: Path) -> None:
    sparse = write_tiny_run(tmp_path, "splade")
    with pytest.raises(InputError, match=r"\[corpus\] is about the vectors of a dense student, and this one is splade"):
        Workspace(sparse, tmp_path / "work", tmp_path / "store", ["corpus.vectors=int8"])


def test_a_sparse_student_is_looked_ahead_at_too(tmp_path: Path) -> None:
    sparse = write_tiny_run(tmp_path, "splade")
    made = Workspace(sparse, tmp_path / "work", tmp_path / "store")
    for stage in (pipeline.mine, pipeline.score, pipeline.train):
        stage(made)
    seen = preflight(Workspace(sparse, tmp_path / "work", tmp_path / "store", dry=True))
    assert seen.vector_bytes > 0
    assert seen.index_bytes is None
    assert any("index is about as large" in note for note in seen.notes)
