"""BEIR folders, good and bad, made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from retrieval_kd.data import load_collection
from retrieval_kd.data.beir import load_beir
from retrieval_kd.types import InputError

CORPUS = [
    {"_id": "d1", "title": "Lists", "text": "Sort a list."},
    {"_id": "d2", "title": "", "text": "No title."},
    {"_id": "d3", "text": "Title left out.", "metadata": {}},
    {"_id": "d4", "title": "Only a title", "text": ""},
    {"_id": "d5", "title": "", "text": "  "},
    {"_id": "d6", "title": "", "text": "Line\u2028separator, Hofstätter."},
]
QUERIES = [
    {"_id": "q3", "text": "third"},
    {"_id": "q1", "text": "first", "title": "no part of a query"},
    {"_id": "q2", "text": "second"},
]
TEST = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq3\td6\t1\n"
TRAIN = "q2\td2\t-1\nq2\td4\t1\n"  # without a header


def lines(records: list[dict[str, object]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(lines(CORPUS), encoding="utf-8")
    (folder / "queries.jsonl").write_text(lines(QUERIES), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(TEST)
    (folder / "qrels" / "train.tsv").write_text(TRAIN)
    return folder


def test_a_good_folder(folder: Path) -> None:
    collection = load_beir(folder)
    assert collection.name == "tiny"
    assert list(collection.document_ids) == ["d1", "d2", "d3", "d4", "d5", "d6"]
    assert list(collection.documents) == [
        "Lists Sort a list.",
        "No title.",
        "Title left out.",
        "Only a title",
        "",
        "Line\u2028separator, Hofstätter.",
    ]
    assert sorted(collection.splits) == ["test", "train"]
    test, train = collection.split("test"), collection.split("train")
    assert (list(test.ids), list(test.texts)) == (["q3", "q1"], ["third", "first"])  # in the order of the queries
    assert list(test.qrels) == [{5: 1}, {0: 2, 2: 0}]
    assert (list(train.ids), list(train.qrels)) == (["q2"], [{1: -1, 3: 1}])


def test_documents_without_text_are_counted(folder: Path) -> None:
    notes = load_beir(folder).notes
    assert [note for note in notes if "no text" in note] == ["1 documents have no text; they keep their rows."]
    (folder / "corpus.jsonl").write_text(lines([r for r in CORPUS if r["_id"] != "d5"]), encoding="utf-8")
    assert not any("no text" in note for note in load_beir(folder).notes)


def test_split_files_without_judgements(folder: Path) -> None:
    (folder / "queries.synthetic.jsonl").write_text(lines([{"_id": "s1", "text": "one"}, {"_id": "q1", "text": "two"}]))
    (folder / "queries.train.jsonl").write_text(lines([{"_id": "s9", "text": "not read"}]))
    (folder / "queries.broken.jsonl").write_text("{")
    assert sorted(load_beir(folder).splits) == ["test", "train"]  # who did not ask for them does not get them
    collection = load_beir(folder, ["train", "synthetic", "dev"])
    assert sorted(collection.splits) == ["synthetic", "test", "train"]
    synthetic = collection.split("synthetic")
    assert (list(synthetic.ids), list(synthetic.texts), list(synthetic.qrels)) == (["s1", "q1"], ["one", "two"], [])
    assert list(collection.split("train").ids) == ["q2"]  # the judged ones win
    with pytest.raises(InputError, match="has no split 'dev'; it has synthetic, test, train"):
        collection.split("dev")


def test_load_collection_by_path_and_below_rkd_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_collection(str(folder)).name == "tiny"
    monkeypatch.setenv("RKD_DATA", str(folder.parent))
    assert list(load_collection("beir/tiny").document_ids) == list(load_beir(folder).document_ids)
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tgone\t1\n")
    with pytest.raises(InputError, match="'gone'"):
        load_collection("beir/tiny")
    assert len(load_collection("beir/tiny", allow_unknown_qrels=True).split("test")) == 2


def test_unknown_documents_are_refused_or_counted(folder: Path) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q2\tgone\t1\nq1\tgone\t2\n")
    with pytest.raises(InputError, match=r"test\.tsv:5: document 'gone' is not in corpus.*--allow-unknown-qrels"):
        load_beir(folder)
    collection = load_beir(folder, allow_unknown_qrels=True)
    assert list(collection.split("test").ids) == ["q3", "q1"]  # q2 has no judgement left
    assert collection.split("test").qrels[1] == {0: 2, 2: 0}
    assert [note for note in collection.notes if "absent" in note] == [
        "test.tsv: 2 judgements name absent documents and were dropped."
    ]


@pytest.mark.parametrize(
    ("file", "raw", "message"),
    [
        ("corpus.jsonl", b'{"_id": "d1", "text": ', r"corpus\.jsonl:2: not JSON .*'\{\"_id\": \"d1\", \"text\": '"),
        ("corpus.jsonl", b'["d1", "text"]', r"corpus\.jsonl:2: expected a JSON object"),
        ("corpus.jsonl", b'{"_id": "x", "text": "again"}', r"corpus\.jsonl:2: id 'x' occurs a second time"),
        ("corpus.jsonl", b'{"_id": 7, "text": "t"}', r"corpus\.jsonl:2: '_id' must be a string, found 7"),
        ("corpus.jsonl", b'{"text": "t"}', r"corpus\.jsonl:2: '_id' must be a string, found None"),
        ("corpus.jsonl", b'{"_id": "d1"}', r"corpus\.jsonl:2: 'text' must be a string, found None"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "t", "title": null}', r"corpus\.jsonl:2: 'title' must be a string"),
        ("corpus.jsonl", '{"_id": "d1", "text": "café"}'.encode("latin-1"), r"corpus\.jsonl:2: not UTF-8"),
        ("queries.jsonl", b'{"_id": "x", "text": "again"}', r"queries\.jsonl:2: id 'x' occurs a second time"),
        ("queries.jsonl", b'{"_id": "q1", "text": ["t"]}', r"queries\.jsonl:2: 'text' must be a string"),
        ("queries.jsonl", '{"_id": "q1", "text": "é"}'.encode("latin-1"), r"queries\.jsonl:2: not UTF-8"),
        ("queries.extra.jsonl", b"{", r"queries\.extra\.jsonl:2: not JSON"),
    ],
)
def test_bad_texts_name_file_and_line(folder: Path, file: str, raw: bytes, message: str) -> None:
    (folder / file).write_bytes(b'{"_id": "x", "text": "fine"}\n' + raw + b"\n")
    with pytest.raises(InputError, match=message):
        load_beir(folder, ["extra"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"q9\td1\t1", "query 'q9' is not in queries.jsonl"),
        (b"q1\td2\thigh", "the grade 'high' is not a whole number"),
        (b"q1\td2\t1.5", "the grade '1.5' is not a whole number"),
        (b"q1\td2", "has 3 tab-separated fields .* this line has 2"),
        (b"q1 0 d2 1", "this line has 1: 'q1 0 d2 1'"),
        (b"q1\t0\td2\t1", "this line has 4"),
        (b"q1\td1\t1", "'q1' and 'd1' are judged a second time"),
        (b"q\xe9\td1\t1", "not UTF-8"),
    ],
)
def test_bad_judgements_name_file_and_line(folder: Path, raw: bytes, message: str) -> None:
    (folder / "qrels" / "test.tsv").write_bytes(TEST.encode() + raw + b"\n")
    for allow in (False, True):  # the flag forgives absent documents, nothing else
        with pytest.raises(InputError, match=rf"test\.tsv:5: .*{message}"):
            load_beir(folder, allow_unknown_qrels=allow)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl"])
def test_missing_files_are_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"{file} does not exist"):
        load_beir(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "documents", "counts"),
    [
        ("scifact", 5183, {"train": 809, "test": 300}),
        ("nfcorpus", 3633, {"train": 2590, "test": 323}),
    ],
)
def test_published_counts(name: str, documents: int, counts: dict[str, int]) -> None:
    if not os.environ.get("RKD_DATA"):
        pytest.skip("RKD_DATA is not set")
    collection = load_collection(f"beir/{name}")
    assert len(collection) == documents  # Thakur et al. 2021, arXiv:2104.08663, table 1
    assert {split: len(collection.split(split)) for split in counts} == counts


@pytest.mark.slow
def test_published_counts_of_cranfield() -> None:
    if not os.environ.get("RKD_DATA"):
        pytest.skip("RKD_DATA is not set")
    collection = load_collection("cranfield", allow_unknown_qrels=True)
    assert len(collection) == 1400
    assert sum(not text for text in collection.documents) == 2
    assert any(note.startswith("2 documents have no text") for note in collection.notes)
    assert len(collection.split("test")) <= 225
