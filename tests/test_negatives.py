"""Mining that ends in training data: quotas and ranks of sources, rounds that pay for new pairs, files of negatives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from tiny import tiny_sentence_transformer
from toy import draw_texts, write_beir
from typer.testing import CliRunner

from retrieval_kd import cli, pipeline
from retrieval_kd.data import load_collection
from retrieval_kd.files import read_json
from retrieval_kd.layouts import read_records
from retrieval_kd.pipeline import Workspace, write_negatives
from retrieval_kd.pipeline.scores import Source, import_scores, stored_records
from retrieval_kd.progress import console
from retrieval_kd.store.operations import open_folder
from retrieval_kd.teachers.bm25 import BM25
from retrieval_kd.types import InputError

DOCUMENTS, QUERIES = 60, 8
BI = "bi_encoder-model"
RECIPE = """
[data]
collection = "{data}"

[candidates]
sources = [{{ kind = "bm25", quota = 3, skip = 1 }}, {{ kind = "bi_encoder", model = "{model}", depth = 30 }}]
depth = 12

[[teachers]]
name = "lexical"
kind = "bm25"

[student]
kind = "dense"
model = "{model}"

[[stages]]
steps = 2
batch_size = 4
candidates = 4
learning_rate = 1e-2
deny = {{ teacher = "lexical", margin = 0.1, relative = true }}
terms = [{{ loss = "info_nce" }}]

[[stages]]
steps = 2
batch_size = 4
candidates = 4
mine = {{ depth = 12 }}
terms = [{{ loss = "info_nce" }}, {{ loss = "kl", teachers = ["lexical"] }}]
"""


@pytest.fixture(autouse=True)
def _quiet_again() -> Iterator[None]:
    yield
    console.quiet = False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of short texts, its last query without a relevant document, and a recipe."""
    folder = tmp_path_factory.mktemp("negatives")
    tiny_sentence_transformer(folder / "transformer").save(str(folder / "model"))
    qrels = {n: {n: 1, n + 20: 2} for n in range(QUERIES - 1)} | {QUERIES - 1: {0: 0}}
    texts = draw_texts(DOCUMENTS, QUERIES, words=4, seed=5)
    data = write_beir(folder / "toy", *texts, {"train": qrels, "test": qrels})
    (folder / "r.toml").write_text(RECIPE.format(data=data, model=folder / "model"))
    return folder


def workspace(place: Path, name: str, *overrides: str, store: str | None = None) -> Workspace:
    return Workspace(place / "r.toml", place / name, place / (store or f"store-{name}"), overrides)


def test_quotas_and_ranks_shape_the_training_candidates_alone(place: Path) -> None:
    made = workspace(place, "quotas")
    found = pipeline.mine(made)
    rows, ranks = (np.load(place / f"quotas/candidates/train/{name}.npy") for name in ("rows", "ranks"))
    negative = rows >= 0
    for number, grades in enumerate(made.train_queries.qrels):
        negative[number] &= ~np.isin(rows[number], [row for row, grade in grades.items() if grade > 0])
    dealt = (ranks[0] > 1) & negative  # the quota of 3, and what the other source found too
    assert (dealt.sum(1) >= 3).all()
    assert ((ranks[0] == 1) & negative & (ranks[1] == 0)).sum() == 0  # the first rank is left out
    alone = negative & (ranks[0] > 0) & (ranks[1] == 0)
    assert alone.sum(1).max() <= 3
    assert (rows >= 0).all()  # the source without a quota fills the rest
    assert ranks[1].max() > 12  # and is asked for 30
    both = negative & (ranks > 0).all(0)
    other = negative & (ranks[0] == 0)
    assert found["train"] == {"bm25": alone.sum(), BI: other.sum(), f"bm25 + {BI}": both.sum()}
    assert read_json(place / "quotas/candidates/train/manifest.json")["provenance"] == found["train"]
    plain = workspace(place, "plain", 'candidates.sources=[{ kind = "bm25" }, { kind = "bi_encoder", model = "x" }]')
    plain.recipe.candidates.sources[1].__pydantic_extra__["model"] = str(place / "model")
    pipeline.mine(plain)
    ours, theirs = (np.load(place / name / "candidates/test/rows.npy") for name in ("quotas", "plain"))
    np.testing.assert_array_equal(ours, theirs)


def test_rounds_pay_for_new_pairs_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage mines with the student; its teacher is asked about what the first round did not have."""
    asked: list[tuple[str, str]] = []
    score = BM25.score

    def counting(self: BM25, queries: list[str], documents: list[str]) -> Any:
        asked.extend(zip(queries, documents, strict=True))
        return score(self, queries, documents)

    monkeypatch.setattr(BM25, "score", counting)
    made = workspace(place, "rounds")
    pipeline.mine(made)
    pipeline.score(made)
    first = set(asked)
    assert len(first) == len(asked)  # train and test share pairs, each asked once
    assert read_json(made.folder / "scores/test/manifest.json")["asked"] + (
        read_json(made.folder / "scores/train/manifest.json")["asked"]
    ) == len(asked)
    asked.clear()
    pipeline.train(made)
    mined = np.load(made.folder / "mined/1/rows.npy")
    queries, documents = made.train_queries.texts, made.collection.documents
    second = {(queries[q], documents[row]) for q, rows in enumerate(mined) for row in rows if row >= 0}
    assert sorted(asked) == sorted(second - first)
    assert 0 < len(asked) < len(second)
    manifest = read_json(made.folder / "mined/1/manifest.json")
    assert manifest["asked"] == len(asked)
    positives = np.load(made.folder / "mined/1/positive.npy").sum()
    assert sum(manifest["provenance"].values()) == (mined >= 0).sum() - positives
    stage = read_json(made.folder / "stages/0/manifest.json")
    assert stage["denied"] > 0
    assert stage["negatives"] == sum(stage["provenance"].values())
    assert set(stage["provenance"]) <= {"bm25", BI, f"bm25 + {BI}"}
    asked.clear()
    facts = write_negatives(made, "hard_negatives", place / "second.jsonl", number=1, allow_missing=True)
    assert (asked, facts["without_positive"]) == ([], 1)
    (one, *_) = read_records("hard_negatives", place / "second.jsonl")
    assert set(one.found_by[2:]) == {("student",)}


def expected(made: Workspace, margin: float = 0.1) -> dict[str, dict[str, float]]:
    """Each query's negatives and their scores, from the candidates and a BM25 of its own."""
    rows = np.load(made.folder / "candidates/train/rows.npy")
    teacher, collection = made.teachers["lexical"], made.collection
    found: dict[str, dict[str, float]] = {}
    for number, grades in enumerate(made.train_queries.qrels):
        listed = rows[number][rows[number] >= 0]
        text = made.train_queries.texts[number]
        scores = teacher.score([text] * len(listed), [collection.documents[row] for row in listed])
        good = np.array([grades.get(int(row), 0) > 0 for row in listed])
        if good.any():
            best = scores[good].max()
            left = ~good & (scores <= best - abs(best) * margin)
            ids = [collection.document_ids[row] for row in listed]
            found[f"q{number}"] = {ids[n]: float(scores[n]) for n in np.flatnonzero(good | left)}
    return found


def test_a_file_of_hard_negatives_and_back(place: Path) -> None:
    made = workspace(place, "file")
    with pytest.raises(InputError, match=r"query 'q7' has no relevant document that is judged and scored by lexical"):
        write_negatives(made, "hard_negatives", place / "out.jsonl.gz")
    facts = write_negatives(made, "hard_negatives", place / "out.jsonl.gz", allow_missing=True)
    want = expected(made)
    records = {record.query_id: record for record in read_records("hard_negatives", place / "out.jsonl.gz")}
    assert list(records) == list(want)
    names = list(made.named_sources)
    rows, ranks = (np.load(made.folder / f"candidates/train/{name}.npy") for name in ("rows", "ranks"))
    for query_id, record in records.items():
        number = int(query_id[1:])
        assert dict(zip(record.document_ids, record.scores, strict=True)) == pytest.approx(want[query_id], rel=1e-6)
        judged = {f"d{row}" for row, grade in made.train_queries.qrels[number].items() if grade > 0}
        for document, positive, who in zip(record.document_ids, record.positive, record.found_by, strict=True):
            assert positive == (document in judged)
            found = ranks[:, number, rows[number].tolist().index(int(document[1:]))] > 0
            assert set(who) == (set() if positive else {name for name, hit in zip(names, found, strict=True) if hit})
    negatives = sum(record.positive.count(False) for record in records.values())
    assert facts == {
        "stage": 0,
        "teacher": "lexical",
        "queries": 7,
        "positives": 14,
        "negatives": negatives,
        "denied": facts["denied"],
        "without_positive": 1,
        "without_negative": 0,
        "provenance": facts["provenance"],
    }
    assert facts["denied"] > 0
    assert sum(facts["provenance"].values()) == negatives
    # imported, the same rows with the same scores
    collection = load_collection(str(place / "toy"), ["train"])
    result = import_scores("hard_negatives", place / "out.jsonl.gz", collection, "again", place / "imported", {})
    assert result["scores"] == sum(map(len, want.values()))
    back = stored_records(Source(open_folder(Path(result["store"])), collection, "train"))
    for record in back:
        scores = dict(zip(record.document_ids, record.scores, strict=True))
        assert scores == pytest.approx(want[record.query_id], rel=1e-6)


def test_as_many_as_asked_for(place: Path) -> None:
    every = write_negatives(workspace(place, "file"), "pylate", place / "all.jsonl", allow_missing=True)
    for sampling in ("top", "random", "bins"):
        made = workspace(place, "file", f"stages.0.sampling={sampling}")
        facts = write_negatives(made, "hard_negatives", place / "two.jsonl", count=2, allow_missing=True)
        assert (facts["queries"], facts["positives"], facts["negatives"]) == (7, 14, 14)
        assert facts["negatives"] < every["negatives"]
        want = expected(made)
        for record in read_records("hard_negatives", place / "two.jsonl"):
            assert set(record.document_ids) < set(want[record.query_id])
            if sampling == "top":  # the first that are left, in the order of the candidates
                ids = [id_ for id_ in want[record.query_id] if id_ not in record.document_ids[:2]]
                assert sorted(record.document_ids[2:]) == sorted(ids[:2])
    strict = workspace(place, "file", 'stages.0.deny={ teacher = "lexical", max_score = 0.0 }')
    facts = write_negatives(strict, "hard_negatives", place / "strict.jsonl", allow_missing=True)
    assert facts["without_negative"] + facts["queries"] == 7
    for record in read_records("hard_negatives", place / "strict.jsonl"):
        assert [score for score, good in zip(record.scores, record.positive, strict=True) if not good] == [0.0] * (
            record.positive.count(False)
        )


def test_without_teachers_there_are_labels_alone(place: Path) -> None:
    text = (place / "r.toml").read_text()
    start, end = text.index("[[teachers]]"), text.index("[student]")
    lines = [line for line in (text[:start] + text[end:]).splitlines() if not line.startswith(("deny", "mine"))]
    (place / "labels.toml").write_text("\n".join(lines).replace(', { loss = "kl", teachers = ["lexical"] }', ""))
    made = Workspace(place / "labels.toml", place / "labels", place / "store-labels")
    facts = write_negatives(made, "hard_negatives", place / "labels.jsonl", allow_missing=True)
    assert facts["teacher"] is None
    records = list(read_records("hard_negatives", place / "labels.jsonl"))
    assert all(record.scores is None for record in records)
    assert facts["negatives"] == sum(record.positive.count(False) for record in records)


def test_what_cannot_be_written_is_told(place: Path) -> None:
    for overrides, arguments, message in (
        ((), {"layout": "syntriever"}, "layout 'syntriever' holds no scores"),
        ((), {"layout": "d2llm"}, "is only read, never written"),
        ((), {"number": 2}, "has 2 stages, numbered from 0, and no stage 2"),
        ((), {"teacher": "lexicl"}, "has no teacher 'lexicl'; did you mean 'lexical'"),
        ((), {"number": 1}, "stages/0 is not there yet; run `rkd train"),
        (
            ('stages=[{ steps = 1, terms = [{ loss = "mse", teachers = ["lexical"] }] }]',),
            {"layout": "nothing"},
            "no layouts kind 'nothing'",
        ),
    ):
        made = workspace(place, "wrong", *overrides)
        with pytest.raises(InputError, match=message):
            write_negatives(made, **{"layout": "hard_negatives", "path": place / "no.jsonl", **arguments})
    assert not (place / "no.jsonl").exists()


def rkd(place: Path, *arguments: object) -> Result:
    given = ["mine", place / "r.toml", *arguments, "--out", place / "file", "--store", place / "store-file"]
    return CliRunner().invoke(cli.app, list(map(str, given)), env={"COLUMNS": "200"})


def test_the_command(place: Path) -> None:
    shown = rkd(place)
    assert shown.exit_code == 0, shown.output
    assert f"bm25 + {BI}" in shown.stdout
    assert "test" in shown.stdout
    found = json.loads(rkd(place, "--json").stdout.splitlines()[-1])
    assert list(found["provenance"]) == ["train", "test"]
    file = place / "cli.jsonl"
    done = rkd(place, file, "--layout", "hard_negatives", "--negatives", 3, "--allow-missing", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["file"], facts["queries"], facts["negatives"]) == (str(file), 7, 21)
    assert len(file.read_text().splitlines()) == 7
    with pytest.raises(InputError, match="are about FILE; give it too"):
        raise rkd(place, "--negatives", 3).exception or AssertionError
