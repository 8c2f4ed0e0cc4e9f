"""PROD's training files (arXiv:2209.13335): candidates without scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import dumps, from_list, identifier, member, need, need_ids, split_places, write_whole

FORM = '[{"query_id": "1", "query_string": "...", "pos_id": ["2"], "neg_id": ["3"]}]'
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record an item of the list, which is read whole."""
    return from_list(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    positives, negatives = ([identifier(item) for item in member(value, key, list)] for key in ("pos_id", "neg_id"))
    return Record(
        query_id=identifier(value.get("query_id")),
        query=member(value, "query_string", str),
        document_ids=positives + negatives,
        positive=[True] * len(positives) + [False] * len(negatives),
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One JSON list, a query a line."""
    write_whole(path, map(_item, records), "[]")


def _item(record: Record) -> str:
    query, documents = need_ids(record)
    string = need(record.query, "texts", record)
    positives, negatives = ([documents[place] for place in places] for places in split_places(record))
    return dumps({"query_id": query, "query_string": string, "pos_id": positives, "neg_id": negatives})
