"""The embedded collection: its questions are sound and its documents the same everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import retrieval_kd
from retrieval_kd.data import load_collection, pydocs
from retrieval_kd.files import hash_texts
from retrieval_kd.types import Collection


@pytest.fixture(scope="module")
def collection() -> Collection:
    return load_collection("pydocs")


def stored() -> list[dict]:
    path = Path(retrieval_kd.__file__).parent / "data" / "pydocs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", text.lower())


def fours(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[place : place + 4]) for place in range(len(found) - 3)}


def test_questions_are_well_formed() -> None:
    questions = stored()
    assert questions == pydocs.questions()
    assert len(questions) >= 250
    splits = Counter(question["split"] for question in questions)
    assert set(splits) == {"train", "test"}
    assert min(splits.values()) >= 100
    assert len({question["_id"] for question in questions}) == len(questions)
    assert len({" ".join(words(question["text"])) for question in questions}) == len(questions)
    for question in questions:
        assert set(question) == {"_id", "text", "split", "relevant"}
        grades = question["relevant"].values()
        assert set(grades) <= {1, 2}, question
        assert 2 in grades, question


def test_documents_are_as_many_as_said(collection: Collection) -> None:
    assert 2000 <= len(collection) <= 3000
    assert len(set(collection.document_ids)) == len(collection)
    assert list(collection.document_ids) == sorted(collection.document_ids)
    for name, text in zip(collection.document_ids, collection.documents, strict=True):
        assert text.startswith(f"{name} ")
        assert text.strip() != name


@pytest.mark.parametrize("name", ["os.path.join", "json.loads", "itertools.chain", "collections.Counter", "re.sub"])
def test_known_documents_hold_their_docstrings(collection: Collection, name: str) -> None:
    module, _, last = name.rpartition(".")
    value = getattr(__import__(module, fromlist=["_"]), last)
    text = collection.documents[list(collection.document_ids).index(name)]
    assert " ".join(value.__doc__.split()) in " ".join(text.split())


def test_no_text_holds_a_memory_address_or_a_path_of_this_machine(collection: Collection) -> None:
    addressed = [text for text in collection.documents if re.search(r"\bat 0x[0-9a-fA-F]{8,}", text)]
    assert addressed == []
    assert [text[:60] for text in collection.documents if sys.prefix in text or f"{Path.home()}/" in text] == []


def test_no_text_holds_the_environment(collection: Collection) -> None:
    assert "environ({" not in " ".join(collection.documents)  # it may hold secrets
    secret = "RKD_TEST_SECRET"
    code = "from retrieval_kd.data import load_collection; print('\\n'.join(load_collection('pydocs').documents))"
    environment = {**os.environ, secret: "hunter2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "json.loads loads(" in done.stdout
    assert secret not in done.stdout


def test_judgements_are_the_stored_ones(collection: Collection) -> None:
    known = set(collection.document_ids)
    asked = 0
    for split in ("train", "test"):
        queries = collection.split(split)
        expected = {
            q["_id"]: (q["text"], {name: grade for name, grade in q["relevant"].items() if name in known})
            for q in stored()
            if q["split"] == split
        }
        for query_id, text, grades in zip(queries.ids, queries.texts, queries.qrels, strict=True):
            assert expected[query_id] == (text, {collection.document_ids[row]: grade for row, grade in grades.items()})
        asked += len(queries)
        assert len(queries) >= 100
    assert asked >= 250


def test_questions_do_not_quote_their_answers(collection: Collection) -> None:
    row_of = {name: row for row, name in enumerate(collection.document_ids)}
    quoted = []
    for question in stored():
        for name in question["relevant"]:
            if name not in row_of:
                continue
            text = collection.documents[row_of[name]].removeprefix(f"{name} ")
            lines = text.splitlines()
            last = name.rpartition(".")[2]
            described = lines[1:] if lines[0].startswith(f"{last}(") else lines  # after the signature
            first = next((line for line in described if line.strip()), "")
            if common := fours(question["text"]) & fours(first):
                quoted.append((question["_id"], name, common))
    assert quoted == []


def digest(collection: Collection) -> str:
    parts = [*collection.document_ids, *collection.documents, *collection.notes]
    parts += [repr((name, list(q.ids), list(q.texts), list(q.qrels))) for name, q in sorted(collection.splits.items())]
    return hash_texts(parts)


def test_two_loads_are_equal(collection: Collection) -> None:
    assert digest(load_collection("pydocs")) == digest(collection)


@pytest.mark.parametrize("seed", ["1", "4242"])
def test_another_interpreter_loads_the_same(collection: Collection, seed: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_pydocs import digest; "
        "from retrieval_kd.data import load_collection; print(digest(load_collection('pydocs')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parent,
    )
    assert done.stdout.strip() == digest(collection), done.stderr


def test_absent_names_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydocs, "read_stdlib", lambda: {"a.x": ("a.x", "x(n)\nText."), "b.y": ("b.y", "More.")})
    asked = [
        {"_id": "q1", "text": "one", "split": "test", "relevant": {"a.x": 2, "gone.z": 1}},
        {"_id": "q2", "text": "two", "split": "test", "relevant": {"gone.z": 2, "gone.w": 1}},
        {"_id": "q3", "text": "three", "split": "train", "relevant": {"b.y": 2, "a.x": 1}},
    ]
    monkeypatch.setattr(pydocs, "questions", lambda: asked)
    collection = pydocs.load_pydocs()
    assert list(collection.documents) == ["a.x x(n)\nText.", "b.y More."]
    test, train = collection.split("test"), collection.split("train")
    assert (list(test.ids), list(test.qrels)) == (["q1"], [{0: 2}])
    assert (list(train.ids), list(train.qrels)) == (["q3"], [{1: 2, 0: 1}])
    assert len(collection.notes) == 1
    assert "3 judged names are absent" in collection.notes[0]
    assert "1 questions with them" in collection.notes[0]
    monkeypatch.setattr(pydocs, "questions", lambda: asked[2:])
    complete = pydocs.load_pydocs()
    assert not any("absent" in note and not note.startswith(("Python 3.", "0")) for note in complete.notes)
    assert ": 0 judged names" in complete.notes[0]
    assert sorted(complete.splits) == ["train"]
