"""PyLate's distillation sets (lightonai/ms-marco-en-bge), JSON Lines or Parquet; lists may be spelled as strings."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    aligned,
    from_objects,
    identifier,
    need_ids,
    need_scores,
    published,
    shown,
    write_objects,
)

FORM = '{"query_id": 1, "document_ids": [2, 3], "scores": [0.9, 0.1]}, lists perhaps as strings'


def read(path: Path) -> Iterator[Record]:
    """One record a line or row."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is not an object")
    ids = [identifier(item) for item in _list(value.get("document_ids"))]
    scores = aligned(_list(value.get("scores")), ids)
    return Record(query_id=identifier(value.get("query_id")), document_ids=ids, scores=scores, where=where)


def _list(value: Any) -> list[Any]:
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{shown(value)} is not a list")
    return found


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a query, lists as lists."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query, documents = need_ids(record)
    ids = [published(document) for document in documents]
    return {"query_id": published(query), "document_ids": ids, "scores": need_scores(record)}
