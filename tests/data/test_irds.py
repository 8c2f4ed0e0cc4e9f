"""Collections of ir_datasets, with a stand-in for its registry."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ir_datasets
import pytest

from retrieval_kd.data import load_collection
from retrieval_kd.data.irds import load_irds
from retrieval_kd.types import InputError

Titled = namedtuple("Titled", "doc_id title text url")
Qrel = namedtuple("Qrel", "query_id doc_id relevance iteration")


class Plain(namedtuple("Plain", "doc_id body")):
    def default_text(self) -> str:
        return f"{self.body}\n"


class Query(namedtuple("Query", "query_id text narrative")):
    def default_text(self) -> str:
        return self.text


@dataclass
class Dataset:
    """What of ir_datasets' interface is used; None: the dataset has no such part."""

    docs: list[Any] = field(default_factory=list)
    queries: list[Query] | None = None
    qrels: list[Qrel] | None = None

    def docs_iter(self) -> Any:
        return iter(self.docs)

    def queries_iter(self) -> Any:
        return iter(self.queries or [])

    def qrels_iter(self) -> Any:
        return iter(self.qrels or [])

    def has_queries(self) -> bool:
        return self.queries is not None

    def has_qrels(self) -> bool:
        return self.qrels is not None


DOCS = [Titled("a", "Lists", "sort one", ""), Titled("b", "", "no title", ""), Titled("c", "", " ", "")]
QUERIES = [Query("2", "second", "long"), Query("1", "first", "long"), Query("3", "not judged", "")]
QRELS = [Qrel("1", "a", 2, "0"), Qrel("2", "c", 0, "0"), Qrel("1", "b", 1, "0")]

Register = Callable[[dict[str, Dataset]], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    monkeypatch.delenv("RKD_DATA", raising=False)

    def put(known: dict[str, Dataset]) -> None:
        monkeypatch.setattr(ir_datasets, "load", lambda name: known[name])  # KeyError, as the real one

    return put


def test_splits_are_subsets(register: Register) -> None:
    register(
        {
            "fake": Dataset(DOCS, [Query("9", "of the whole", "")]),
            "fake/train": Dataset(DOCS, [Query("5", "unjudged split", "")]),
            "fake/test": Dataset(DOCS, QUERIES, QRELS),
            "fake/other": Dataset(DOCS, QUERIES, []),
        }
    )
    collection = load_collection("fake")
    assert collection.name == "fake"
    assert list(collection.document_ids) == ["a", "b", "c"]
    assert list(collection.documents) == ["Lists sort one", "no title", ""]
    assert "1 documents have no text; they keep their rows." in collection.notes
    assert sorted(collection.splits) == ["test", "train"]
    test, train = collection.split("test"), collection.split("train")
    assert (list(test.ids), list(test.texts)) == (["2", "1"], ["second", "first"])
    assert list(test.qrels) == [{2: 0}, {0: 2, 1: 1}]
    assert (list(train.ids), list(train.texts), list(train.qrels)) == (["5"], ["unjudged split"], [])


def test_only_the_splits_asked_for_are_read(register: Register) -> None:
    register({"fake": Dataset(DOCS), "fake/test": Dataset(DOCS, QUERIES, QRELS), "fake/dev": Dataset(DOCS, QUERIES)})
    assert sorted(load_irds("fake", ["dev"]).splits) == ["dev"]
    assert load_irds("fake", ["train"]).splits == {}


def test_a_dataset_with_queries_and_no_subsets_is_its_test_split(register: Register) -> None:
    register({"cran": Dataset([Plain("a", "one"), Plain("b", "two")], QUERIES, QRELS[:1])})
    collection = load_irds("cran", ["train", "test"])
    assert list(collection.documents) == ["one", "two"]
    assert list(collection.splits) == ["test"]
    assert list(collection.split("test").qrels) == [{0: 2}]


def test_unknown_documents_are_refused_or_counted(register: Register) -> None:
    gone = [Qrel("3", "gone", 1, "0"), Qrel("1", "lost", 1, "0")]
    register({"fake": Dataset(DOCS), "fake/test": Dataset(DOCS, QUERIES, QRELS + gone)})
    with pytest.raises(InputError, match=r"fake/test: 2 judgements .*--allow-unknown-qrels"):
        load_irds("fake", ["test"])
    collection = load_irds("fake", ["test"], allow_unknown_qrels=True)
    assert list(collection.split("test").ids) == ["2", "1"]
    assert collection.split("test").qrels[1] == {0: 2, 1: 1}
    assert collection.notes[-1] == "test: 2 judgements name absent documents and were dropped."


def test_doubled_documents_are_refused(register: Register) -> None:
    register({"fake": Dataset([*DOCS, DOCS[0]])})
    with pytest.raises(InputError, match="document id 'a' occurs twice"):
        load_irds("fake", ["test"])


def test_unknown_names_are_explained(register: Register) -> None:
    register({})
    with pytest.raises(InputError, match=r"'scifcat' is neither a BEIR folder .* nor an ir_datasets id"):
        load_collection("scifcat")
