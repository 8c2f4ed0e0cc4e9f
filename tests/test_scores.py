"""Scores out of the store and in again, published, and a recipe that learns from a file."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import tiny_sentence_transformer

from retrieval_kd import pipeline
from retrieval_kd.pipeline import Workspace, scores
from retrieval_kd.pipeline.scores import Source, export_scores, import_scores, publish, stored_records
from retrieval_kd.progress import console
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.operations import compact, open_folder
from retrieval_kd.store.parts import Kind
from retrieval_kd.store.store import Store
from retrieval_kd.tables import kind_module, kinds
from retrieval_kd.types import Collection, InputError, Queries

TEXTS = ["lock a file", "sort a list", "read a line", "open a path", "sort a list"]  # the last is the second again
COLLECTION = Collection(
    "toy",
    ["0", "1", "2", "3", "4"],
    TEXTS,
    {
        "train": Queries(
            ["7", "8", "9"], ["how to lock", "how to sort", "how to read"], [{0: 1, 3: 0}, {2: 2}, {2: 1}]
        ),
        "test": Queries(["5"], ["how to open"], [{3: 1}]),
    },
)
LOCK, SORT, READ = range(3)
# query, document, score: with an answer that is none, a positive below a negative, a query without positive
SCORED = [(LOCK, 0, 0.1), (LOCK, 2, 0.7), (LOCK, 3, np.nan), (SORT, 1, 2.0), (SORT, 2, -1.5), (READ, 3, 0.25)]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A teacher that reads prompts, and what it said of the train split."""
    store = Store.open(tmp_path / "store", "ce", {"kind": "cross_encoder", "model": "tiny", "revision": "abc"})
    queries = text_keys([f"q: {text}" for text in COLLECTION.splits["train"].texts])
    documents = text_keys([f"d: {text}" for text in TEXTS])
    q, d = (np.array([row[place] for row in SCORED]) for place in (0, 1))
    values = np.array([row[2] for row in SCORED], np.float32)
    store.append_scores(queries[q[:4]], documents[d[:4]], values[:4])
    store.append_scores(queries[q[2:]], documents[d[2:]], values[2:] + np.float32(0.5))  # two stand twice, higher
    store.append_scores(queries[q[4:]], documents[d[4:]], values[4:])
    store.append_preferences(
        queries[[LOCK, LOCK]], documents[[2, 0]], documents[[0, 2]], np.array([0.75, 0.125], np.float32)
    )
    nobody = np.array([np.nan], np.float32)  # asked in vain: exported nowhere
    store.append_preferences(queries[[LOCK]], documents[[1]], documents[[2]], nobody)
    for order in ([1, 0, 2], [0, 2]):
        store.append_rankings(queries[[LOCK]], [documents[order]])
    store.record(pairs=6, texts=0, tokens=None, seconds=2.5)
    return Source(store, COLLECTION, "train", "q: ", "d: ")


def test_records_of_the_store(source: Source) -> None:
    """Positives first, then by score; the lower of two scores; equal texts are two documents; the youngest order."""
    for _ in range(2):
        lock, sort, read = stored_records(source)
        assert (lock.query_id, lock.query, lock.document_ids) == ("7", "how to lock", ["0", "2"])
        assert lock.documents == ["lock a file", "read a line"]
        assert (lock.scores, lock.positive) == ([0.1, 0.7], [True, False])  # shortest decimals, not 0.10000000149
        assert lock.preferences == [(0, 1, 0.125), (1, 0, 0.75)]
        assert lock.ranking == [0, 1]
        assert (sort.document_ids, sort.scores, sort.positive) == (
            ["2", "1", "4"],
            [-1.5, 2.0, 2.0],
            [True, False, False],
        )
        assert (read.document_ids, read.scores, read.positive) == (["3"], [0.25], [False])
        for kind in ("scores", "preferences", "rankings"):
            compact(source.store, kind)


def test_a_query_at_a_time_gives_the_same_records(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(stored_records(source))
    monkeypatch.setattr(scores, "BLOCK", 1)
    assert list(stored_records(source)) == whole
    assert len(whole) == 3


@pytest.mark.parametrize("kind", ["scores", "preferences", "rankings"])
def test_a_torn_part_names_the_remedy(source: Source, kind: Kind) -> None:
    part = source.store.parts(kind)[0]
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(InputError, match=r"(?s)cannot be read: .*run `rkd scores verify` on it"):
        list(stored_records(source))


def test_an_import_waits_for_the_run_that_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else both would put the same rows into the store."""
    monkeypatch.setattr(console, "quiet", False)
    (tmp_path / "scores.trec").write_text("7 Q0 0 1 9.5 x\n")
    given = "trec", tmp_path / "scores.trec", COLLECTION, "x", tmp_path / "store", {}
    with ThreadPoolExecutor() as threads:
        folder = Path(import_scores(*given)["store"])
        store = open_folder(folder)
        store.parts("scores")[0].unlink()
        with store.alone("the test"):
            done = threads.submit(import_scores, *given)
            deadline = time.monotonic() + 60
            while "x: another run asks this teacher; waiting" not in capsys.readouterr().err:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert store.count("scores") == 0
        assert done.result()["scores"] == store.count("scores") == 1


def test_the_wrong_prompts_or_split_are_an_error(source: Source) -> None:
    bare = Source(source.store, COLLECTION, "train")
    with pytest.raises(InputError, match=r"holds no scores .* of split 'train' of 'toy'; .*--query-prompt"):
        list(stored_records(bare))
    with pytest.raises(InputError, match="of split 'test'"):
        list(stored_records(Source(source.store, COLLECTION, "test", "q: ", "d: ")))


WRITTEN = [layout for layout in kinds("layouts") if hasattr(kind_module("layouts", layout), "write")]


@pytest.mark.parametrize("layout", WRITTEN)
def test_out_and_in_again(source: Source, tmp_path: Path, layout: str) -> None:
    """Through each layout: what is imported is what the layout holds of what was there."""
    path = tmp_path / ("out.parquet" if layout == "pairs" else "out.gz")
    counts = export_scores(layout, path, source, allow_missing=True)
    needs_positive = getattr(kind_module("layouts", layout), "NEEDS_POSITIVE", False)
    assert counts["left_out"] == needs_positive
    if layout in ("prod", "lead"):
        assert counts == {"queries": 2, "documents": 5, "left_out": 1}
        return
    new = tmp_path / "new"
    result = import_scores(layout, path, COLLECTION, "again", new, {})
    again = Source(
        Store.open(new, "again", json.loads(Path(result["store"], "teacher.json").read_text())["identity"]),
        COLLECTION,
        "train",
    )
    expected, found = (list(stored_records(one)) for one in (source, again))
    if layout == "syntriever":
        (record,) = found
        assert record.document_ids == ["0", "2"]
        assert record.preferences == [(1, 0, 1.0)]  # both preferences say that 2 beats 0
        return
    if layout == "msmarco_run":
        assert [
            (record.query_id, [(record.document_ids or [])[place] for place in record.ranking or []])
            for record in found
        ] == [("7", ["0", "2"]), ("8", ["1", "4", "2"]), ("9", ["3"])]
        return
    if needs_positive:
        expected = [record for record in expected if any(record.positive or ())]
    assert [(r.query_id, r.document_ids, r.scores, r.positive) for r in found] == [
        (r.query_id, r.document_ids, r.scores, r.positive) for r in expected
    ]
    if layout == "pairdistill":
        assert found[0].preferences == [(0, 1, pytest.approx(0.125)), (1, 0, pytest.approx(0.75))]


def test_a_query_without_positive_is_named(source: Source, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"query '9' has no relevant document .* layout 'colbert' needs; .*--allow-missing"
    ):
        export_scores("colbert", tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    assert export_scores("trec", tmp_path / "out", source) == {"queries": 3, "documents": 6, "left_out": 0}


def test_a_preference_about_a_document_without_score_is_told(source: Source, tmp_path: Path) -> None:
    keys = text_keys(["q: how to read"]), text_keys(["d: lock a file"]), text_keys(["d: open a path"])
    source.store.append_preferences(*keys, np.array([0.5], np.float32))
    with pytest.raises(InputError, match="needs a score of every document, which query '9' lacks"):
        export_scores("pairdistill", tmp_path / "out", source)


def test_a_published_data_set(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    counts = publish(source, folder, "cc-by-4.0", "Judged for a test.")
    assert counts == {"scores": 6, "preferences": 2, "rankings": 1}
    table = pq.read_table(folder / "scores/train.parquet")
    assert {(row["query_id"], row["document_id"]): row["score"] for row in table.to_pylist()} == {
        ("7", "0"): np.float32(0.1),
        ("7", "2"): np.float32(0.7),
        ("8", "1"): 2.0,
        ("8", "4"): 2.0,
        ("8", "2"): -1.5,
        ("9", "3"): 0.25,
    }
    assert pq.read_table(folder / "rankings/train.parquet").to_pylist() == [
        {"query_id": "7", "document_ids": ["0", "2"]}
    ]
    pairs = pq.read_table(folder / "preferences/train.parquet").to_pylist()
    assert pairs[0] == {"query_id": "7", "first_id": "0", "second_id": "2", "probability": 0.125}
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["license"] == "cc-by-4.0"
    assert facts["counts"] == counts
    assert facts["teacher"] == {
        "kind": "cross_encoder",
        "model": "tiny",
        "revision": "abc",
        "fingerprint": source.store.folder.name[3:] + facts["teacher"]["fingerprint"][8:],
        "query_prompt": "q: ",
        "document_prompt": "d: ",
    }
    for config in facts["configs"]:  # as the Hub and `datasets` find the files
        (file,) = config["data_files"]
        assert (file["split"], (folder / file["path"]).is_file()) == ("train", True)
    assert "Judged for a test." in body
    assert "2 s of work" in body
    with pytest.raises(InputError, match="exists; give a folder that does not"):
        publish(source, folder, "mit")
    again = import_scores("pairs", folder / "scores/train.parquet", COLLECTION, "x", tmp_path / "new", {})
    assert again["scores"] == 5  # two documents are one text


def test_datasets_reads_what_is_published(source: Source, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    publish(source, tmp_path / "published", "mit")
    assert len(datasets.load_dataset(str(tmp_path / "published"), "scores", split="train")) == 6


def test_only_kinds_that_hold_something_are_published(source: Source, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", "bare", {"kind": "x"})
    keys = text_keys(["how to lock"]), text_keys(TEXTS[:1])
    store.append_scores(*keys, np.ones(1, np.float32))
    store.append_preferences(text_keys(["another split"]), keys[1], keys[1], np.ones(1, np.float32))
    assert publish(Source(store, COLLECTION, "train"), tmp_path / "published", "mit") == {"scores": 1}
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == ["README.md", "scores"]
    with pytest.raises(InputError, match="holds no scores or preferences or rankings"):
        publish(Source(store, COLLECTION, "test"), tmp_path / "none", "mit")
    assert not (tmp_path / "none").exists()


def test_pushing_needs_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="nobody is logged in"):
        scores.push(tmp_path, "me/scores")


RECIPE = """
[data]
collection = "{folder}/toy"

[candidates]
depth = 4

[[teachers]]
name = "reader"
kind = "imported"
file = "{folder}/scores.trec"
layout = "trec"

[student]
kind = "dense"
normalize = false
model = "{folder}/model"

[[stages]]
steps = 2
batch_size = 2
candidates = 3
learning_rate = 1e-3
terms = [{{ loss = "margin_mse", teachers = ["reader"] }}]
"""


def beir(folder: Path) -> None:
    """COLLECTION as a BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": id_, "title": "", "text": text}) for id_, text in zip("01234", TEXTS, strict=True)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    queries = []
    for name, split in COLLECTION.splits.items():
        queries += [json.dumps({"_id": id_, "text": text}) for id_, text in zip(split.ids, split.texts, strict=True)]
        judged = [
            f"{id_}\t{row}\t{grade}"
            for id_, grades in zip(split.ids, split.qrels, strict=True)
            for row, grade in grades.items()
        ]
        (folder / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(judged))
    (folder / "queries.jsonl").write_text("\n".join(queries))


def test_a_recipe_learns_from_a_file(tmp_path: Path) -> None:
    beir(tmp_path / "toy")
    tiny_sentence_transformer(tmp_path / "transformer").save(str(tmp_path / "model"))
    given = {("7", 0): 9.5, ("7", 2): 1.25, ("8", 1): 4.0, ("5", 3): 2.0}
    (tmp_path / "scores.trec").write_text("".join(f"{q} Q0 {d} 1 {s} x\n" for (q, d), s in given.items()))
    (tmp_path / "reader.toml").write_text(RECIPE.format(folder=tmp_path))
    workspace = Workspace(tmp_path / "reader.toml", tmp_path / "work/reader")
    pipeline.mine(workspace)
    pipeline.score(workspace)
    for split in ("train", "test"):
        rows = np.load(workspace.folder / f"candidates/{split}/rows.npy")
        (grid,) = np.load(workspace.folder / f"scores/{split}/scores.npy")
        ids = workspace.collection.split(split).ids
        expected = [
            [-np.inf if row < 0 else given.get((id_, TEXTS.index(TEXTS[row])), np.nan) for row in line]
            for id_, line in zip(ids, rows.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(grid, np.array(expected, np.float32))
        assert np.isfinite(grid).any()
    assert workspace.teachers["reader"].identity["layout"] == "trec"
    (tmp_path / "scores.trec").write_text("7 Q0 77 1 1 x\n")
    with pytest.raises(InputError, match=r"scores.trec:1: document '77' is not in collection 'toy'"):
        pipeline.score(Workspace(tmp_path / "reader.toml", tmp_path / "work/reader"))
