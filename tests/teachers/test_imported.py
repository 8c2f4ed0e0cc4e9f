"""Published scores as a teacher: ids become texts, what the file lacks is no answer, nothing is added twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval_kd.scoring import fill_scores
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.store import Store
from retrieval_kd.tables import Component
from retrieval_kd.teachers import Archive, imported, load_teacher
from retrieval_kd.types import Collection, Hits, InputError, Queries

DOCUMENTS = [f"text {number}" for number in range(6)]
COLLECTION = Collection(
    "toy",
    [f"d{number}" for number in range(6)],
    DOCUMENTS,
    {"train": Queries(["q0", "q1"], ["query 0", "query 1"], [{0: 1}, {1: 1}]), "test": Queries(["q2"], ["query 2"])},
)
RUN = "q0 Q0 d0 1 2.5 x\nq0 Q0 d3 2 -1 x\nq2 Q0 d0 1 0.25 x\nq1 Q0 d1 1 7 x\n"


def teacher_of(folder: Path, content: str = RUN, layout: str = "trec", name: str = "run", **options: Any) -> Archive:
    (folder / name).write_text(content)
    loaded = load_teacher(Component(kind="imported", layout=layout, file=folder / name, **options), COLLECTION)
    assert isinstance(loaded, Archive)
    return loaded


def stored(store: Store) -> dict[tuple[str, str], float]:
    """Every known score by query id and document id."""
    queries = {
        id_: text for split in COLLECTION.splits.values() for id_, text in zip(split.ids, split.texts, strict=True)
    }
    found = {}
    for query, text in queries.items():
        keys = text_keys([text] * 6)
        scores, known = store.find_scores(keys, text_keys(DOCUMENTS))
        found |= {(query, f"d{row}"): float(scores[row]) for row in np.flatnonzero(known)}
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", "reader", {"kind": "test"})


def test_ids_become_texts(tmp_path: Path, store: Store) -> None:
    counts = teacher_of(tmp_path).read_into(store)
    assert stored(store) == {("q0", "d0"): 2.5, ("q0", "d3"): -1.0, ("q2", "d0"): 0.25, ("q1", "d1"): 7.0}
    assert counts["scores"] == 4
    assert sum(counts.values()) == 4
    assert [entry["pairs"] for entry in store.ledger()] == [4]


@pytest.mark.parametrize("batch", [1, 3, 2**20])
def test_read_again_it_adds_nothing(tmp_path: Path, store: Store, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported, "BATCH", batch)
    lines = "[0, [0, 1.5, [[1, -0.5]]], [1, 0.5, []]]\n[1, [1, 2.5, [[1, 0.0]]], [2, 0.25, []]]\n"
    collection = Collection("toy", list("012"), DOCUMENTS[:3], {"train": Queries(list("01"), ["query 0", "query 1"])})
    (tmp_path / "pairs").write_text(lines * 2)
    options = imported.Options(file=tmp_path / "pairs", layout="pairdistill")
    counts = imported.load(options, collection).read_into(store)
    assert (counts["scores"], counts["preferences"], counts["conflicts"]) == (4, 2, 0)
    again = imported.load(options, collection).read_into(store)
    assert set(again.values()) == {0}
    assert (store.count("scores"), store.count("preferences"), len(store.ledger())) == (4, 2, 1)
    pairs = [tuple(row.values()) for row in store.preferences().to_pylist()]
    key = dict(
        zip(["query 0", "query 1", *DOCUMENTS], text_keys(["query 0", "query 1", *DOCUMENTS]).tolist(), strict=True)
    )
    assert sorted(pairs) == sorted(
        [
            (key["query 0"], key["text 0"], key["text 1"], pytest.approx(np.exp(-0.5))),
            (key["query 1"], key["text 1"], key["text 2"], 1.0),
        ]
    )


def test_rankings_are_kept_in_their_order(tmp_path: Path, store: Store) -> None:
    teacher = teacher_of(tmp_path, "q0\td3\t2\nq0\td1\t1\nq1\td0\t1\n", "msmarco_run")
    assert teacher.read_into(store)["rankings"] == 2
    assert teacher.read_into(store)["rankings"] == 0
    found = {row["query_key"]: row["document_keys"] for row in store.rankings().to_pylist()}
    keys = text_keys(["query 0", "query 1"]).tolist()
    assert found == {
        keys[0]: text_keys(["text 1", "text 3"]).tolist(),
        keys[1]: text_keys(["text 0"]).tolist(),
    }


@pytest.mark.parametrize("batch", [1, 2**20])
def test_of_two_scores_the_lower_counts_and_is_told(
    tmp_path: Path, store: Store, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imported, "BATCH", batch)
    keys = text_keys(["query 0"]), text_keys(["text 0"])
    store.append_scores(*keys, np.array([np.nan], np.float32))  # asked before, no answer: not a conflict
    counts = teacher_of(tmp_path, "".join(f"q0 Q0 d0 1 {score} x\n" for score in (2, 1, 1, 3))).read_into(store)
    assert stored(store) == {("q0", "d0"): 1.0}
    assert counts["conflicts"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q9 Q0 d0 1 1 x", r"run:5: query 'q9' is not in collection 'toy'; .*--allow-unknown"),
        ("q0 Q0 d9 1 1 x", r"run:5: document 'd9' is not in collection 'toy'; .*allow_unknown = true"),
    ],
)
def test_unknown_ids_are_named_or_counted(tmp_path: Path, store: Store, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        teacher_of(tmp_path, f"{RUN}{line}\n").read_into(store)
    counts = teacher_of(tmp_path, f"{RUN}{line}\n", allow_unknown=True).read_into(store)
    assert len(stored(store)) == 4
    assert counts["unknown_queries"] + counts["unknown_documents"] == 1
    assert counts["unknown_queries"] == ("q9" in line)


def test_what_is_dropped_takes_its_preferences_and_ranks_along(tmp_path: Path, store: Store) -> None:
    options = {"allow_unknown": True, "layout": "msmarco_run"}
    teacher_of(tmp_path, "q0\td3\t3\nq0\td9\t2\nq0\td1\t1\n", **options).read_into(store)
    assert store.rankings().to_pylist()[0]["document_keys"] == text_keys(["text 1", "text 3"]).tolist()
    lines = [{"query": "query 0", "positive_passage": f"text {n}", "negative_passage": "text 0"} for n in (1, 77)]
    content = "\n".join(map(json.dumps, lines))
    counts = teacher_of(tmp_path, content, "syntriever", "prefs", allow_unknown=True).read_into(store)
    assert (counts["preferences"], counts["unknown_documents"]) == (1, 1)


def test_texts_are_found_as_they_stand(tmp_path: Path, store: Store) -> None:
    line = {"query": "query 1", "pos": ["text 5"], "neg": ["text 0"], "pos_scores": [3], "neg_scores": [1]}
    teacher_of(tmp_path, json.dumps(line), "flag_embedding").read_into(store)
    assert stored(store) == {("q1", "d5"): 3.0, ("q1", "d0"): 1.0}
    line["pos"] = ["text 5 "]
    with pytest.raises(InputError, match=r"run:1: document with the text 'text 5 ' is not in collection"):
        teacher_of(tmp_path, json.dumps(line), "flag_embedding").read_into(store)


def test_ids_of_another_numbering_are_left_aside(tmp_path: Path, store: Store) -> None:
    """FiD numbers its questions and passages itself: `match = "text"` goes by what they say."""
    item = {"id": "17", "question": "query 2", "ctxs": [{"id": "d1", "title": "", "text": "text 4", "score": 2.0}]}
    with pytest.raises(InputError, match="query '17' is not in collection"):
        teacher_of(tmp_path, json.dumps([item]), "fid").read_into(store)
    teacher_of(tmp_path, json.dumps([item]), "fid", match="text").read_into(store)
    assert stored(store) == {("q2", "d4"): 2.0}
    with pytest.raises(InputError, match="layout 'trec' has no text of the query to go by"):
        teacher_of(tmp_path, match="text").read_into(store)


@pytest.mark.parametrize(
    ("layout", "content"),
    [("prod", '[{"query_id": "q0", "query_string": "", "pos_id": ["d0"], "neg_id": []}]'), ("trec", "\n")],
)
def test_a_file_without_judgements_is_refused(tmp_path: Path, store: Store, layout: str, content: str) -> None:
    with pytest.raises(InputError, match="holds no scores, preferences or rankings"):
        teacher_of(tmp_path, content, layout).read_into(store)


def test_the_identity_is_the_file_and_the_collection(tmp_path: Path) -> None:
    identity = teacher_of(tmp_path).identity
    assert identity["source"] == hashlib.sha256(RUN.encode()).hexdigest()
    assert (identity["kind"], identity["layout"]) == ("imported", "trec")
    assert teacher_of(tmp_path, name="renamed").identity == identity
    assert teacher_of(tmp_path, allow_unknown=True).identity == identity
    assert teacher_of(tmp_path, RUN.replace("7", "8")).identity != identity
    shifted = Collection("toy", ["d5", *COLLECTION.document_ids[:5]], DOCUMENTS, COLLECTION.splits)
    options = imported.Options(file=tmp_path / "renamed", layout="trec")
    assert imported.load(options, COLLECTION).identity == identity
    assert imported.load(options, shifted).identity != identity  # the same ids, other texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "trek"}, "there is no layouts kind 'trek'; did you mean 'trec'"),
        ({"file": Path("none.trec")}, r"none\.trec does not exist"),
        ({"layout": "rankgpt"}, "layout 'rankgpt' is two files"),
        ({"match": "texts"}, "Input should be 'id' or 'text'"),
        ({"fil": "x"}, "unknown key 'fil'; did you mean 'file'"),
    ],
)
def test_options_are_checked_before_anything_is_read(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "run").write_text(RUN)
    with pytest.raises(InputError, match=message):
        load_teacher(Component(kind="imported", **{"file": tmp_path / "run", "layout": "trec", **options}), COLLECTION)


def test_scoring_reads_the_file_once_and_what_it_lacks_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = imported.read_records, []
    monkeypatch.setattr(imported, "read_records", lambda *arguments: times.append(1) or read(*arguments))
    hits = Hits(np.array([[0, 3, 5], [1, 0, -1]], np.int32), np.array([[3, 2, 1], [2, 1, -np.inf]], np.float32))
    queries = COLLECTION.splits["train"].texts
    expected = np.array([[2.5, -1.0, np.nan], [7.0, np.nan, -np.inf]], np.float32)
    for name in ("reader", "another"):
        grid = fill_scores(tmp_path / "store", name, teacher_of(tmp_path), queries, DOCUMENTS, hits)
        np.testing.assert_array_equal(grid, expected)
    assert len(times) == 1
    wider = Hits(np.array([[0, 4], [1, 5]], np.int32), np.zeros((2, 2), np.float32))
    grid = fill_scores(tmp_path / "store", "reader", teacher_of(tmp_path), queries, DOCUMENTS, wider)
    np.testing.assert_array_equal(grid, np.array([[2.5, np.nan], [7.0, np.nan]], np.float32))
