"""OpenSearch's training lines with texts in the place of ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import need_scores, need_texts, write_objects
from retrieval_kd.layouts._opensearch import read_lists

FORM = (
    '{"query": "...", "docs": ["...", "..."], "scores": [9.5, 1.5]} or {"query": "...", "pos": "...", "negs": ["..."]}'
)


def read(path: Path) -> Iterator[Record]:
    """One record a line or row."""
    return read_lists(path, FORM, by_text=True)


def write(path: Path, records: Iterable[Record]) -> None:
    """The form with scores."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query, documents = need_texts(record)
    return {"query": query, "docs": documents, "scores": need_scores(record)}
