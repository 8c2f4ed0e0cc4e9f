"""LEAD's training files (arXiv:2212.05225), as DPR's with ids: candidates without scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import dumps, from_list, identifier, member, need, split_places, write_whole

FORM = '[{"question": "...", "positive_ctxs": ["1"], "hard_negative_ctxs": ["2"]}]'
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record an item: the query by its text, the documents by id."""
    return from_list(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    positives, negatives = (
        [identifier(item) for item in member(value, key, list)] for key in ("positive_ctxs", "hard_negative_ctxs")
    )
    return Record(
        query=member(value, "question", str),
        document_ids=positives + negatives,
        positive=[True] * len(positives) + [False] * len(negatives),
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One JSON list, a question a line."""
    write_whole(path, map(_item, records), "[]")


def _item(record: Record) -> str:
    question, documents = need(record.query, "texts", record), need(record.document_ids, "ids", record)
    positives, negatives = ([documents[place] for place in places] for places in split_places(record))
    return dumps({"question": question, "positive_ctxs": positives, "hard_negative_ctxs": negatives})
