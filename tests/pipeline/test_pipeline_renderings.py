"""Which text each side reads, followed through mining, scoring, training and what is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS, tiny_sentence_transformer

from retrieval_kd import pipeline
from retrieval_kd.encoder import Encoder
from retrieval_kd.files import fingerprint, read_json
from retrieval_kd.pipeline import Workspace
from retrieval_kd.recipe import Rendering
from retrieval_kd.store.keys import text_keys
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.teachers.bm25 import BM25, Options
from retrieval_kd.trainset import TrainSet
from retrieval_kd.types import InputError

RECIPE = """
[data]
collection = "{data}"

[candidates]
sources = [{{ kind = "bm25" }}, {{ kind = "bm25", render = {{ query = "rewrite", document = "de" }} }}]
depth = 5

[[teachers]]
name = "teacher"
kind = "bi_encoder"
model = "{model}"
query_prompt = "find "
render = {{ query = "rewrite", query_template = "{{text}} {{text}}", document_template = "read {{text}}" }}

[student]
kind = "dense"
model = "{model}"
render = {{ query = ["full", "original"], document = "de" }}

[[stages]]
steps = 2
batch_size = 4
candidates = 3
terms = [
  {{ loss = "margin_mse", teachers = ["teacher"] }},
  {{ loss = "embedding_mse", teachers = ["teacher"] }},
  {{ loss = "embedding_mse", teachers = ["teacher"], side = "document" }},
]

[evaluation]
depth = 6
latency_queries = 1

[export]
forms = ["fp32"]
"""
DOCUMENTS, QUERIES, TRAIN, TEST = 10, 6, [0, 1, 2, 3], [3, 4, 5]


def write(path: Path, texts: dict[str, str]) -> None:
    path.write_text("".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in texts.items()))


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose recipe has run whole; one query rendering and one of documents are not to be read."""
    place = tmp_path_factory.mktemp("renderings")
    tiny_sentence_transformer(place / "transformer").save(str(place / "model"))
    data = place / "toy"
    (data / "qrels").mkdir(parents=True)
    rng = np.random.default_rng(4)

    def draw(words: int, letter: str, count: int) -> dict[str, str]:
        return {f"{letter}{n}": " ".join(rng.choice(WORDS[7:], words, replace=False)) for n in range(count)}

    for name in ("corpus", "corpus.de"):
        write(data / f"{name}.jsonl", draw(7, "d", DOCUMENTS))
    for name in ("queries", "queries.rewrite", "queries.full"):
        write(data / f"{name}.jsonl", draw(4, "q", QUERIES))
    for name in ("queries.broken", "corpus.broken"):
        (data / f"{name}.jsonl").write_bytes(b"\xff")
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        (data / f"qrels/{split}.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in numbers))
    (place / "r.toml").write_text(RECIPE.format(data=data, model=place / "model"))
    workspace = Workspace(place / "r.toml", place / "work/r")
    pipeline.run(workspace)
    return workspace


def toy(made: Workspace, name: str, numbers: list[int] | None = None) -> list[str]:
    """The texts of a file of the collection, as they stand there."""
    texts = texts_of(made.path.parent / f"toy/{name}.jsonl")
    return texts if numbers is None else [texts[number] for number in numbers]


def test_sources_read_their_renderings(made: Workspace) -> None:
    assert list(made.named_sources) == ["bm25", "bm25-rewrite-de"]
    for split, numbers, times in (("train", TRAIN, 2), ("test", TEST, 1)):
        rows = np.load(made.folder / f"candidates/{split}/rows.npy")
        ranks = np.load(made.folder / f"candidates/{split}/ranks.npy")
        assert len(rows) == times * len(numbers)
        for place, (documents, queries) in enumerate((("corpus", "queries"), ("corpus.de", "queries.rewrite"))):
            best = BM25(Options(), toy(made, documents)).retrieve(toy(made, queries, numbers), 1).rows[:, 0]
            assert rows[ranks[place] == 1].tolist() == [row for row in best.tolist() * times if row >= 0]
        np.testing.assert_array_equal(rows, np.tile(rows[: len(numbers)], (times, 1)))  # of repeated queries


def test_scores_are_kept_under_the_texts_that_the_teacher_read(made: Workspace) -> None:
    """And are those of these texts, computed here one by one."""
    rows = np.load(made.folder / "candidates/train/rows.npy")
    scores = np.load(made.folder / "scores/train/scores.npy")[0]
    model = made.teachers["teacher"].towers.model  # type: ignore[attr-defined]
    queries = [f"find {text} {text}" for text in toy(made, "queries.rewrite")]
    documents = [f"read {text}" for text in toy(made, "corpus")]
    left, right = model.encode(queries, prompt=""), model.encode(documents, prompt="")
    expected = np.where(rows >= 0, np.einsum("qd,qkd->qk", left[TRAIN + TRAIN], right[rows]), -np.inf)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    (folder,) = made.store.glob(f"*-{fingerprint(made.teachers['teacher'].identity)[:8]}")
    stored = {pair for part in folder.glob("scores/part-*.parquet") for pair in pairs(part)}
    asked = {
        (number, row)
        for split, numbers in (("train", TRAIN + TRAIN), ("test", TEST))
        for number, found in zip(numbers, np.load(made.folder / f"candidates/{split}/rows.npy").tolist(), strict=True)
        for row in found
        if row >= 0
    }
    query_keys, document_keys = text_keys(queries), text_keys(documents)
    assert stored == {(int(query_keys[number]), int(document_keys[row])) for number, row in asked}


def pairs(part: Path) -> list[tuple[int, int]]:
    import pyarrow.parquet as pq

    table = pq.read_table(part)
    return list(zip(table["query_key"].to_pylist(), table["document_key"].to_pylist(), strict=True))


def test_training_queries_are_repeated_for_each_rendering_of_the_student(made: Workspace) -> None:
    """The student reads them all, the teacher its own; ids and judgements are those of the query."""
    assert made.train_queries.ids == [f"q{n}" for n in TRAIN] * 2
    assert made.train_queries.qrels == [{n: 1} for n in TRAIN] * 2
    trainset = TrainSet.load(made.folder / "trainset")
    tokenizer = made.student.towers.query[0].tokenizer
    read = [*toy(made, "queries.full", TRAIN), *toy(made, "queries", TRAIN)]
    assert [list(ids) for ids in trainset.query_tokens] == tokenizer(read)["input_ids"]
    assert trainset.document_tokens is not None
    assert [list(ids) for ids in trainset.document_tokens] == tokenizer(toy(made, "corpus.de"))["input_ids"]
    model = made.teachers["teacher"].towers.model  # type: ignore[attr-defined]
    rewrites = [f"find {text} {text}" for text in toy(made, "queries.rewrite", TRAIN)]
    np.testing.assert_allclose(trainset.query_vectors["teacher"], model.encode(rewrites * 2, prompt=""), atol=1e-5)
    documents = [f"read {text}" for text in toy(made, "corpus")]
    np.testing.assert_allclose(trainset.document_vectors["teacher"], model.encode(documents, prompt=""), atol=1e-5)
    assert trainset.positive is not None
    assert trainset.positive.sum(1).tolist() == [1] * 8


def test_evaluation_and_index_are_of_the_student_s_first_rendering(made: Workspace) -> None:
    assert texts_of(made.folder / "index/documents.jsonl") == toy(made, "corpus.de")
    student = made.trained
    assert isinstance(student, BiEncoder)
    queries, documents = toy(made, "queries.full", TEST), toy(made, "corpus.de")
    full = student.embed(queries, "query") @ student.embed(documents, "document").T
    run = pipeline.steps.load_runs(made)["student"]
    np.testing.assert_allclose(-np.sort(-full, axis=1)[:, :6], run.scores, atol=1e-4)
    np.testing.assert_allclose(
        Encoder.load(made.folder / "served/fp32").encode(queries), student.embed(queries, "query"), atol=1e-4
    )
    teacher = np.load(made.folder / "baselines/teacher/scores.npy")
    model = made.teachers["teacher"].towers.model  # type: ignore[attr-defined]
    left = model.encode([f"find {text} {text}" for text in toy(made, "queries.rewrite", TEST)], prompt="")
    right = model.encode([f"read {text}" for text in toy(made, "corpus")], prompt="")
    np.testing.assert_allclose(teacher, -np.sort(-(left @ right.T), axis=1)[:, :6], atol=1e-5)
    assert list(read_json(made.folder / "report/report.json")["systems"]) == ["bm25", "teacher", "student"]


@pytest.mark.parametrize(
    ("file", "number", "changed"),
    [
        ("queries", 0, ["candidates/train", "scores/train", "trainset"]),
        ("queries.rewrite", 0, ["candidates/train", "scores/train", "trainset"]),
        ("queries.rewrite", 4, ["candidates/test", "scores/test"]),
        ("queries.full", 0, ["trainset"]),
        ("queries.full", 4, []),  # only what is evaluated
        ("corpus.de", 0, ["candidates/train", "candidates/test", "scores/test", "scores/train", "trainset"]),
        ("queries.broken", 0, []),
    ],
)
def test_what_is_made_again_when_a_text_changes(
    made: Workspace, capsys: pytest.CaptureFixture[str], file: str, number: int, changed: list[str]
) -> None:
    def trainset() -> list[str]:
        again = Workspace(made.path, made.folder)
        capsys.readouterr()
        for stage in (pipeline.mine, pipeline.score, pipeline.training.make_trainset):
            stage(again)
        end = ": inputs changed, made again"
        return [line.removesuffix(end) for line in capsys.readouterr().err.splitlines() if line.endswith(end)]

    path = made.path.parent / f"toy/{file}.jsonl"
    before = path.read_bytes()
    try:
        if file.endswith("broken"):
            path.write_bytes(b"\xfe")
        else:
            texts = {json.loads(line)["_id"]: json.loads(line)["text"] for line in before.decode().splitlines()}
            write(path, texts | {f"{file[0] if file[0] == 'q' else 'd'}{number}": "thread lock time"})
        assert trainset() == changed
    finally:
        path.write_bytes(before)
        assert trainset() == changed  # back, and for the same reasons


def test_the_key_of_every_later_stage_follows_what_the_student_reads(made: Workspace) -> None:
    def keys(render: str) -> list[str]:
        other = Workspace(made.path, made.folder, overrides=[f"student.render={render}"])
        read = other.recipe.student.render
        return [other.fingerprint_texts(side, renders=[read]) for side in ("documents", "train", "test")]

    plain, full, german = keys("{}"), keys('{query = "full"}'), keys('{document = "de"}')
    assert [a == b for a, b in zip(plain, full, strict=True)] == [True, False, False]
    assert [a == b for a, b in zip(plain, german, strict=True)] == [False, True, True]
    both = keys('{query = ["original", "full"]}')
    assert [a == b for a, b in zip(plain, both, strict=True)] == [True, False, True]  # the first is evaluated


def test_a_missing_text_stops_the_stage_that_reads_it(made: Workspace, tmp_path: Path) -> None:
    path = made.path.parent / "toy/queries.part.jsonl"
    write(path, {f"q{n}": "sort list" for n in TEST})
    part = Workspace(made.path, tmp_path / "r", made.store, ['teachers.0.render.query="part"'])
    pipeline.mine(part)
    with pytest.raises(InputError, match=r"queries\.part\.jsonl has no query 'q0'"):
        pipeline.score(part)
    assert (part.folder / "scores/test/manifest.json").exists()


def test_a_name_can_hold_the_split(made: Workspace) -> None:
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        write(made.path.parent / f"toy/queries.mt-{split}.jsonl", {f"q{n}": f"{split} {n}" for n in numbers})
    render = Rendering(query="mt-{split}", query_template="<{text}>")
    assert made.query_texts("train", render) == [f"<train {n}>" for n in TRAIN * 2]
    assert made.query_texts("test", render) == [f"<test {n}>" for n in TEST]


def test_run_files_serve_repeated_queries(made: Workspace, tmp_path: Path) -> None:
    for split, numbers in (("train", TRAIN), ("test", TEST)):
        lines = [f"q{n} Q0 d{row} 1 {9 - row} x\n" for n in numbers for row in (n, 9)]
        (tmp_path / f"{split}.trec").write_text("".join(lines))
    files = ", ".join(f'{split} = "{tmp_path / split}.trec"' for split in ("train", "test"))
    override = f'candidates.sources=[{{ kind = "run", {files} }}]'
    again = Workspace(made.path, tmp_path / "r", made.store, [override])
    pipeline.mine(again)
    rows = np.load(again.folder / "candidates/train/rows.npy")
    assert rows[:, :2].tolist() == [[n, 9] for n in TRAIN * 2]


def test_sources_of_one_kind_are_told_apart(made: Workspace) -> None:
    sources = 'candidates.sources=[{kind="bm25"}, {kind="bm25", k1=1.2}, {kind="bm25", render={query="irds:a/b"}}]'
    other = Workspace(made.path, made.folder, overrides=[sources])
    assert list(other.named_sources) == ["bm25", "bm25-2", "bm25-irds-a-b"]
    Workspace(made.path, made.folder)  # writes the recipe as it was
