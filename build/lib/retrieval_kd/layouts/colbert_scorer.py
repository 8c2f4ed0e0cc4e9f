"""What ColBERT's own ranking_scorer.py writes: one level deeper than its training file, and score before id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    from_objects,
    identifier,
    need_ids,
    need_scores,
    number,
    published,
    shown,
    write_objects,
)

FORM = "[qid, [[score, pid], ...]]"


def read(path: Path) -> Iterator[Record]:
    """One record a line."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        raise ValueError(f"{shown(value)} is not a list of a query and one list")
    for item in value[1]:
        if not isinstance(item, list) or len(item) != 2:
            raise ValueError(f"{shown(item)} is not [score, pid] (for [qid, [pid, score], ...] read layout colbert)")
    return Record(
        query_id=identifier(value[0]),
        document_ids=[identifier(item[1]) for item in value[1]],
        scores=[number(item[0]) for item in value[1]],
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a query."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> list[Any]:
    query, documents = need_ids(record)
    pairs = zip(need_scores(record), map(published, documents), strict=True)
    return [published(query), [list(pair) for pair in pairs]]
