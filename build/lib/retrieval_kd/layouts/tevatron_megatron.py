"""Tevatron's reranker distillation (rlhn-680K-qwen3-reranker-8b-top200): passages without ids, the first a positive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    aligned,
    from_objects,
    identifier,
    member,
    need_scores,
    need_texts,
    split_places,
    titled,
    write_objects,
)

FORM = '{"query_id": "1", "query": "...", "passages": [{"title": "...", "text": "..."}], "scores": [9.5]}'
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record a line; its first passage is marked positive."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    passages = [titled(passage) for passage in member(value, "passages", list)]
    return Record(
        query_id=identifier(value.get("query_id")),
        query=member(value, "query", str),
        documents=passages,
        scores=aligned(value.get("scores"), passages),
        positive=[place == 0 for place in range(len(passages))],
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a query, positives first; a title stays at the head of its text."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query, documents = need_texts(record)
    scores = need_scores(record)
    positives, negatives = split_places(record)
    order = positives + negatives
    return {
        "query_id": record.query_id,
        "query": query,
        "passages": [{"title": "", "text": documents[place]} for place in order],
        "scores": [scores[place] for place in order],
    }
