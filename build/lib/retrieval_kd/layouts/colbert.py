"""ColBERTv2's n-way lists (colbertv2.0_msmarco_64way/examples.json), and Translate-Distill's: JSON Lines."""

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
    split_places,
    write_objects,
)

FORM = "[qid, [pid, score], ...] or [qid, pid, ...], the first document a positive"
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record a line; its first document is marked positive, as ColBERT's in-batch loss takes it."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{shown(value)} is not a list of a query and its documents")
    query, *items = value
    marks = [True] + [False] * (len(items) - 1)
    if not isinstance(items[0], list):
        ids = [identifier(item) for item in items]
        return Record(query_id=identifier(query), document_ids=ids, positive=marks, where=where)
    for item in items:
        if not isinstance(item, list) or len(item) != 2 or isinstance(item[0], list | float):
            raise ValueError(f"{shown(item)} is not [pid, score] (for [[score, pid], ...] read layout colbert_scorer)")
    return Record(
        query_id=identifier(query),
        document_ids=[identifier(item[0]) for item in items],
        scores=[number(item[1]) for item in items],
        positive=marks,
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """The list with scores, positives first."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> list[Any]:
    query, documents = need_ids(record)
    scores = need_scores(record)
    positives, negatives = split_places(record)
    items = [[published(documents[place]), scores[place]] for place in positives + negatives]
    return [published(query), *items]
