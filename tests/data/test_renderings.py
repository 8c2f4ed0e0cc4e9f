"""Renderings of queries and documents: other texts under the same ids, read when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_datasets
import pytest

from retrieval_kd.data import load_collection
from retrieval_kd.data.beir import read_conversations
from retrieval_kd.types import ORIGINAL, Collection, InputError

TURNS = [
    {"_id": "q1", "turns": [{"speaker": "user", "text": "what do they eat?"}]},
    {
        "_id": "q2",
        "turns": [{"speaker": "user", "text": "a"}, {"speaker": "agent", "text": " b\n"}, {"text": "where?"}],
    },
]


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def put(folder: Path, name: str, texts: dict[str, str]) -> None:
    write(folder / name, [{"_id": id_, "text": text} for id_, text in texts.items()])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RKD_DATA", raising=False)
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    put(folder, "corpus.jsonl", {"d1": "hay", "d2": "a burrow"})
    write(folder / "corpus.de.jsonl", [{"_id": "d2", "title": "Bau", "text": "ein Bau"}, {"_id": "d1", "text": "Heu"}])
    put(folder, "queries.jsonl", {"q1": "what do they eat?", "q2": "where?", "q3": "why?"})
    put(folder, "queries.rewrite.jsonl", {"q2": "where do guinea pigs live?", "q1": "what do guinea pigs eat?"})
    write(folder / "conversations.jsonl", TURNS)
    (folder / "qrels/test.tsv").write_text("q1\td1\t1\nq2\td2\t1\n")
    (folder / "qrels/train.tsv").write_text("q2\td2\t1\nq3\td2\t1\n")
    return folder


def load(folder: Path, *splits: str) -> Collection:
    return load_collection(str(folder), splits or ("train", "test"))


def test_renderings_have_the_same_ids_in_any_order(folder: Path) -> None:
    collection = load(folder)
    test = collection.split("test")
    assert list(collection.query_texts(test)) == ["what do they eat?", "where?"]
    assert collection.query_texts(test, ORIGINAL) is test.texts
    assert list(collection.query_texts(test, "rewrite")) == ["what do guinea pigs eat?", "where do guinea pigs live?"]
    assert list(collection.document_texts()) == ["hay", "a burrow"]
    assert list(collection.document_texts("de")) == ["Heu", "Bau ein Bau"]  # by row, title first
    assert sorted(collection.splits) == ["test", "train"]  # a rendering is not a split


def test_a_conversation_is_read_most_recent_turn_first(folder: Path) -> None:
    collection = load(folder)
    expected = ["what do they eat?", "where? [SEP] b [SEP] a"]
    assert list(collection.query_texts(collection.split("test"), "conversation")) == expected
    put(folder, "queries.conversation.jsonl", {"q1": "mine", "q2": "own"})
    assert list(load(folder).query_texts(collection.split("test"), "conversation")) == ["mine", "own"]


@pytest.mark.parametrize(
    "record",
    [
        {"_id": "q1"},
        {"_id": "q1", "turns": []},
        {"_id": "q1", "turns": "said"},
        {"_id": "q1", "turns": ["said"]},
        {"_id": "q1", "turns": [{"text": "a"}, {"speaker": "agent"}]},
        {"_id": 1, "turns": [{"text": "a"}]},
    ],
)
def test_bad_conversations_name_file_and_line(folder: Path, record: dict[str, Any]) -> None:
    write(folder / "conversations.jsonl", [TURNS[1], record])
    with pytest.raises(InputError, match=r"conversations\.jsonl:2: expected a conversation such as"):
        read_conversations(folder / "conversations.jsonl")
    write(folder / "conversations.jsonl", [TURNS[1], TURNS[1]])
    with pytest.raises(InputError, match=r"conversations\.jsonl:2: id 'q2' occurs a second time"):
        read_conversations(folder / "conversations.jsonl")


def test_a_missing_query_matters_only_when_it_is_asked_for(folder: Path) -> None:
    collection = load(folder)
    assert len(collection.query_texts(collection.split("test"), "rewrite")) == 2
    with pytest.raises(InputError, match=r"queries\.rewrite\.jsonl has no query 'q3'"):
        collection.query_texts(collection.split("train"), "rewrite")


def test_documents_of_a_rendering_are_those_of_the_collection(folder: Path) -> None:
    put(folder, "corpus.more.jsonl", {"d1": "a", "d2": "b", "d3": "c"})
    with pytest.raises(InputError, match=r"corpus\.more\.jsonl has a document 'd3' that the collection 'toy' lacks"):
        load(folder).document_texts("more")
    put(folder, "corpus.less.jsonl", {"d1": "a", "d3": "c"})
    with pytest.raises(InputError, match=r"corpus\.less\.jsonl has no document 'd2'"):
        load(folder).document_texts("less")


def test_what_nobody_asks_for_is_not_read(folder: Path) -> None:
    for name in ("queries.bad.jsonl", "corpus.bad.jsonl", "conversations.jsonl"):
        (folder / name).write_bytes(b"\xff\xfe not JSON")
    collection = load(folder)
    assert len(collection.query_texts(collection.split("test"), "rewrite")) == 2
    assert len(collection.document_texts("de")) == 2
    for ask in (
        lambda: collection.query_texts(collection.split("test"), "bad"),
        lambda: collection.query_texts(collection.split("test"), "conversation"),
        lambda: collection.document_texts("bad"),
        lambda: load(folder, "bad"),
    ):
        with pytest.raises(InputError, match=r"(bad|conversations)\.jsonl:1: not UTF-8"):
            ask()


def test_queries_are_read_once(folder: Path) -> None:
    collection = load(folder)
    test = collection.split("test")
    before = list(collection.query_texts(test, "rewrite"))
    (folder / "queries.rewrite.jsonl").unlink()
    assert list(collection.query_texts(test, "rewrite")) == before


def test_the_file_of_a_rendering_may_also_be_a_split_without_judgements(folder: Path) -> None:
    collection = load(folder, "rewrite", "test")
    assert list(collection.split("rewrite").ids) == ["q2", "q1"]
    assert list(collection.split("rewrite").qrels) == []


def test_unknown_names_are_answered_with_those_there_are(folder: Path) -> None:
    collection = load(folder)
    with pytest.raises(
        InputError, match=r"no rendering 'rewrit', as .*jsonl does not exist; .*: conversation, rewrite"
    ):
        collection.query_texts(collection.split("test"), "rewrit")
    with pytest.raises(InputError, match=r"no rendering 'fr', .* there are: de"):
        collection.document_texts("fr")
    with pytest.raises(InputError, match=r"no rendering 'conversation', .* there are: de"):
        collection.document_texts("conversation")
    plain = Collection("mine", ["d"], ["text"], {})
    with pytest.raises(InputError, match="no rendering 'de'"):
        plain.document_texts("de")


def test_another_ir_datasets_id_is_a_rendering(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [SimpleNamespace(doc_id=f"d{n}", default_text=lambda n=n: f"文 {n}\n") for n in (2, 1)]
    queries = [SimpleNamespace(query_id=f"q{n}", default_text=lambda n=n: f"问 {n}") for n in (9, 2, 1)]
    whole = SimpleNamespace(docs_iter=lambda: documents, has_docs=lambda: True, has_queries=lambda: False)
    split = SimpleNamespace(queries_iter=lambda: queries, has_docs=lambda: False, has_queries=lambda: True)
    monkeypatch.setattr(ir_datasets, "load", lambda name: {"neu/zh": whole, "neu/zh/test": split}[name])
    for collection in (load(folder), load_collection("pydocs")):
        with pytest.raises(InputError, match="'irds:neu/fr' is no ir_datasets id"):
            collection.document_texts("irds:neu/fr")
    collection = load(folder)
    assert list(collection.document_texts("irds:neu/zh")) == ["文 1", "文 2"]
    assert list(collection.query_texts(collection.split("test"), "irds:neu/zh/test")) == ["问 1", "问 2"]
    with pytest.raises(InputError, match="ir_datasets neu/zh/test has no query 'q3'"):
        collection.query_texts(collection.split("train"), "irds:neu/zh/test")
    with pytest.raises(InputError, match="'irds:neu/zh' has no queries"):
        collection.query_texts(collection.split("test"), "irds:neu/zh")
    with pytest.raises(InputError, match="'irds:neu/zh/test' has no documents"):
        collection.document_texts("irds:neu/zh/test")
    with pytest.raises(InputError, match=r"'pydocs', which is no BEIR folder; .* 'irds:ID'"):
        load_collection("pydocs").document_texts("de")
