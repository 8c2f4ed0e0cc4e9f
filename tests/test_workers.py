"""Several processes and a Ray cluster answer as this process does; one that dies is told, and costs nothing twice."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import checksum_teacher
import numpy as np
import pytest
from checksum_teacher import Checksum, Dying, Vectors
from tiny import collection_of, tiny_classifier, tiny_sentence_transformer
from toy import own_document, write_beir
from typer.testing import CliRunner

from retrieval_kd import answers, cli, pipeline, workers
from retrieval_kd.scoring import fill_scores, fill_vectors
from retrieval_kd.store.operations import verify
from retrieval_kd.store.store import Store
from retrieval_kd.teachers import Teacher
from retrieval_kd.types import Hits, InputError
from retrieval_kd.workers import Crew

QUERIES = [f"query {number}" for number in range(8)]
DOCUMENTS = [f"document {number} " * (number % 4) + ("unsure" if number % 7 == 0 else "") for number in range(40)]
ROWS = np.stack([np.random.default_rng(number).permutation(40)[:25] for number in range(8)]).astype(np.int32)
HITS = Hits(ROWS, np.zeros(ROWS.shape, np.float32))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK", 8)


@pytest.fixture
def whole(tmp_path: Path) -> np.ndarray:
    """What this process alone makes of it."""
    return fill_scores(tmp_path / "whole", "t", Checksum(), QUERIES, DOCUMENTS, HITS)


def store_of(root: Path) -> Store:
    return Store.open(root, "t", {"kind": "fake"})


def fill(root: Path, crew: Crew | None) -> np.ndarray:
    return fill_scores(root, "t", Checksum(), QUERIES, DOCUMENTS, HITS, crew)


def test_processes_share_the_work(tmp_path: Path, whole: np.ndarray) -> None:
    crew = Crew(partial(checksum_teacher.load, tmp_path / "pids", 0.005, 3), 3)
    np.testing.assert_array_equal(fill(tmp_path, crew), whole)
    store = store_of(tmp_path)
    distinct = len({(query, document) for query in range(8) for document in (DOCUMENTS[row] for row in ROWS[query])})
    assert store.count("scores") == distinct < ROWS.size  # texts that occur twice are one
    pids = {int(path.name) for path in (tmp_path / "pids").iterdir()}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert {int(path.name.split("-")[2]) for path in store.parts("scores")} == pids  # each appends its own
    assert sum(entry["pairs"] for entry in store.ledger()) == distinct
    assert len(store.ledger()) == 3
    np.testing.assert_array_equal(fill(tmp_path, Crew(broken, 3)), whole)  # nobody is asked again


def broken() -> Checksum:
    raise AssertionError("loaded again")


def test_no_more_processes_than_pairs(tmp_path: Path) -> None:
    hits = Hits(ROWS[:1, :2], HITS.scores[:1, :2])
    fill_scores(tmp_path, "t", Checksum(), QUERIES, DOCUMENTS, hits, Crew(partial(checksum_teacher.load, tmp_path), 9))
    assert len([path for path in tmp_path.iterdir() if path.name.isdecimal()]) <= 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", r"^t: process \d+ was killed by signal 9, of 2 processes. What the others answered is kept"),
        ("refused", r"^t: the key has expired; get another\.$"),
        ("broken", r"^t: Traceback[\s\S]*ValueError: a bug"),
    ],
)
def test_a_process_that_ends_is_told(tmp_path: Path, whole: np.ndarray, how: str, message: str) -> None:
    crew = Crew(partial(Dying, tmp_path / "mark", how), 2)
    with pytest.raises(InputError if how != "broken" else RuntimeError, match=message):
        fill(tmp_path, crew)
    store = store_of(tmp_path)
    kept, every = store.count("scores"), Store.open(tmp_path / "whole", "t", {"kind": "fake"}).count("scores")
    # a killed one loses its three chunks of 8; one that fails loses the third, and ends the work
    assert every - 3 * 8 <= kept < every if how == "killed" else 3 * 8 <= kept <= every - 8
    np.testing.assert_array_equal(fill(tmp_path, crew), whole)
    assert store.count("scores") == every
    assert verify(store).doubled == {}


def test_all_processes_killed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"process \d+ ended with code 7, process \d+ ended with code 7, of 2"):
        fill(tmp_path, Crew(partial(os._exit, 7), 2))
    assert store_of(tmp_path).count("scores") == 0


def test_another_teacher_in_another_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loads another teacher: {'kind': 'other'}, not {'kind': 'fake'}"):
        fill(tmp_path, Crew(partial(Checksum, "other"), 2))
    assert store_of(tmp_path).count("scores") == 0


def test_vectors_are_made_in_processes(tmp_path: Path) -> None:
    crew = Crew(partial(checksum_teacher.load, tmp_path / "pids", 0.005, 2, Vectors), 2)
    scores = fill_scores(tmp_path / "here", "t", Vectors(), QUERIES, DOCUMENTS, HITS)
    np.testing.assert_array_equal(fill_scores(tmp_path, "t", Vectors(), QUERIES, DOCUMENTS, HITS, crew), scores)
    store = Store.open(tmp_path, "t", Vectors().tower_identity("document"))
    made_by = {int(path.name.split("-")[2]) for path in store.parts("embeddings")}
    assert made_by <= {int(path.name) for path in (tmp_path / "pids").iterdir()}
    assert sum(entry["texts"] for entry in store.ledger()) == len({*DOCUMENTS})
    vectors = fill_vectors(tmp_path, "t", Vectors(), DOCUMENTS, "document", Crew(broken, 2))
    np.testing.assert_array_equal(vectors, Vectors().embed([f"document: {text}" for text in DOCUMENTS], "document"))


def test_two_runs_at_once_pay_once(
    tmp_path: Path, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second waits for the first, and then asks for what is missing still."""
    monkeypatch.setattr(answers, "COMMIT_SECONDS", 0.0)
    store, asked, grids = store_of(tmp_path), [], []

    class Counting(Checksum):
        def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
            asked.extend(zip(queries, documents, strict=True))
            return super().score(queries, documents)

    def run() -> None:
        grids.append(fill_scores(tmp_path, "t", Counting(pause=0.005), QUERIES, DOCUMENTS, HITS))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == len(set(asked)) == store.count("scores")
    assert verify(store).doubled == {}
    assert len(grids) == 2
    for grid in grids:
        np.testing.assert_array_equal(grid, whole)
    assert "t: another run asks this teacher; waiting" in capsys.readouterr().err


RECIPE = """
[data]
collection = "{place}/toy"

[candidates]
depth = 5

[[teachers]]
name = "bm25"
kind = "bm25"

[[teachers]]
name = "reader"
kind = "bi_encoder"
model = "{place}/model"

[student]
kind = "dense"
model = "{place}/model"

[[stages]]
steps = 1
terms = [{{ loss = "kl", teachers = ["bm25", "reader"], normalize = "minmax" }}]
"""


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `rkd score` is told about processes reaches each teacher, which another process can make."""
    write_beir(tmp_path / "toy", ["open the file"], ["open"], {"train": own_document(1), "test": own_document(1)})
    tiny_sentence_transformer(tmp_path / "t").save(str(tmp_path / "model"))
    (tmp_path / "r.toml").write_text(RECIPE.format(place=tmp_path))
    seen: list[pipeline.Workspace] = []
    monkeypatch.setattr(pipeline, "score", seen.append)
    for more in ([], ["--processes", "2"], ["--engine-cluster", "ray"]):
        done = CliRunner().invoke(cli.app, ["score", str(tmp_path / "r.toml"), "--out", str(tmp_path / "work"), *more])
        assert done.exit_code == 0, done.output
    crews = [workspace.crew("reader") for workspace in seen]
    assert crews[0] is None
    assert [(crew.processes, crew.cluster) for crew in crews[1:] if crew] == [(2, None), (None, "ray")]
    for crew in crews[1:]:
        assert crew
        assert pickle.loads(pickle.dumps(crew.load))().identity == seen[0].teachers["reader"].identity


@pytest.mark.parametrize("kind", ["cross_encoder", "bi_encoder"])
def test_an_int8_teacher_is_made_from_its_calibration_sample(kind: str, tmp_path: Path) -> None:
    """Another process gets a few documents as the teacher reads them, and makes the same teacher of them."""
    texts = [f"sort list number {number}" for number in range(300)]
    write_beir(tmp_path / "toy", texts, ["sort"], {"train": own_document(1), "test": own_document(1)})
    tiny_sentence_transformer(tmp_path / "transformer").save(str(tmp_path / "bi_encoder"))
    tiny_classifier(tmp_path / "cross_encoder")
    (tmp_path / "recipe.toml").write_text(
        f"""
        data = {{ collection = "{tmp_path / "toy"}" }}
        student = {{ kind = "dense", model = "{tmp_path / "bi_encoder"}" }}
        [[teachers]]
        name = "small"
        kind = "{kind}"
        model = "{tmp_path / kind}"
        engine = "openvino"
        precision = "int8"
        render = {{ document_template = "text: {{text}}" }}
        """
    )
    workspace = pipeline.Workspace(tmp_path / "recipe.toml", tmp_path / "work/toy", dry=True)
    assert workspace.crew("small") is None
    workspace.processes = 2
    crew = workspace.crew("small")
    assert crew is not None
    sent = pickle.dumps(crew.load)
    assert sent.count(b"text: sort list number") == 128
    teacher = pickle.loads(sent)()
    assert teacher.identity == workspace.teachers["small"].identity
    assert teacher.identity != replace_documents(crew, texts).identity  # as other texts would have it


def replace_documents(crew: Crew, documents: Sequence[str]) -> Teacher:
    load = cast(partial[Teacher], crew.load)
    return load.func(load.args[0], collection_of(documents))
