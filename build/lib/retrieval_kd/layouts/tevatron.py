"""Tevatron's training files, plain, or with the teacher's score in each passage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    from_objects,
    identifier,
    member,
    need_ids,
    need_texts,
    number,
    split_places,
    text,
    titled,
    write_objects,
)

FORM = (
    '{"query_id": "1", "query": "...", "positive_passages": [{"docid": "2", "title": "...", "text": "...", '
    '"score": 9.5}], "negative_passages": [...]}, with or without scores'
)
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record a line, ids and texts; positives first."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    passages = [
        (passage, key == "positive_passages")
        for key in ("positive_passages", "negative_passages")
        for passage in member(value, key, list)
    ]
    documents = [titled(passage) for passage, _ in passages]
    scores = [number(passage["score"]) for passage, _ in passages if passage.get("score") is not None]
    if scores and len(scores) != len(passages):
        raise ValueError("some passages have a score, others have none")
    return Record(
        query_id=identifier(value.get("query_id")),
        query=text(value["query_text"] if "query_text" in value else value.get("query")),
        document_ids=[identifier(passage.get("docid")) for passage, _ in passages],
        documents=documents,
        scores=scores or None,
        positive=[mark for _, mark in passages],
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a query; a title stays at the head of its text."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query_id, ids = need_ids(record)
    query, documents = need_texts(record)
    passages: list[dict[str, Any]] = [
        {"docid": id_, "title": "", "text": document} for id_, document in zip(ids, documents, strict=True)
    ]
    for passage, score in zip(passages, record.scores or [], strict=record.scores is not None):
        passage["score"] = score
    positives, negatives = split_places(record)
    return {
        "query_id": query_id,
        "query": query,
        "positive_passages": [passages[place] for place in positives],
        "negative_passages": [passages[place] for place in negatives],
    }
