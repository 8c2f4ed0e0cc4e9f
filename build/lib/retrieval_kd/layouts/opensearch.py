"""OpenSearch's msmarco-hard-negatives: columns of ids and scores, JSON Lines or Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import need_ids, need_scores, write_objects
from retrieval_kd.layouts._opensearch import read_lists

FORM = '{"query": "qid", "docs": ["id", "id"], "scores": [9.5, 1.5]} or {"query": "qid", "pos": "id", "negs": ["id"]}'


def read(path: Path) -> Iterator[Record]:
    """One record a line or row."""
    return read_lists(path, FORM, by_text=False)


def write(path: Path, records: Iterable[Record]) -> None:
    """The form with scores."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query, documents = need_ids(record)
    return {"query": query, "docs": documents, "scores": need_scores(record)}
