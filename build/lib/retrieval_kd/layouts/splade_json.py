"""SPLADE's score and judgement files: one JSON object of all queries, read whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import dumps, malformed, need_ids, need_scores, number, shown, whole, write_whole

FORM = '{"qid": {"document id": score, ...}, ...}'


def read(path: Path) -> Iterator[Record]:
    """One record a query."""
    for query, scores in whole(path, FORM, dict).items():
        where = f"{path}: query {query!r}"
        try:
            if not isinstance(scores, dict):
                raise ValueError(f"{shown(scores)} is not an object")
            numbers = [number(score) for score in scores.values()]
            yield Record(query_id=query, document_ids=list(scores), scores=numbers, where=where)
        except ValueError as error:
            raise malformed(where, FORM, error) from None


def write(path: Path, records: Iterable[Record]) -> None:
    """One object, a query a line; a query may come once."""
    write_whole(path, map(_item, records), "{}")


def _item(record: Record) -> str:
    query, documents = need_ids(record)
    return f"{dumps(query)}: {dumps(dict(zip(documents, need_scores(record), strict=True)))}"
