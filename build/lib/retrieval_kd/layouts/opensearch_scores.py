"""OpenSearch's score files: one JSON object of all queries, read whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    aligned,
    dumps,
    identifier,
    malformed,
    member,
    need_ids,
    need_scores,
    whole,
    write_whole,
)

FORM = '{"qid": {"doc_id": ["id", "id"], "score": [9.5, 1.5]}, ...}'


def read(path: Path) -> Iterator[Record]:
    """One record a query."""
    for query, value in whole(path, FORM, dict).items():
        where = f"{path}: query {query!r}"
        try:
            ids = [identifier(item) for item in member(value, "doc_id", list)]
            yield Record(query_id=query, document_ids=ids, scores=aligned(value.get("score"), ids), where=where)
        except ValueError as error:
            raise malformed(where, FORM, error) from None


def write(path: Path, records: Iterable[Record]) -> None:
    """One object, a query a line; a query may come once."""
    write_whole(path, map(_item, records), "{}")


def _item(record: Record) -> str:
    query, documents = need_ids(record)
    return f"{dumps(query)}: {dumps({'doc_id': documents, 'score': need_scores(record)})}"
