"""FiD's files (Izacard and Grave 2020, arXiv:2012.04584): questions, and contexts, perhaps with ids and scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    dumps,
    from_list,
    identifier,
    member,
    need_scores,
    need_texts,
    number,
    titled,
    write_whole,
)

FORM = (
    '[{"id": "1", "question": "...", "ctxs": [{"id": "2", "title": "...", "text": "...", "score": 9.5}]}], ids or not'
)


def read(path: Path) -> Iterator[Record]:
    """One record a question: of a JSON list, which is read whole, or of JSON Lines."""
    return from_list(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    contexts = member(value, "ctxs", list)
    documents = [titled(context) for context in contexts]
    ids = [identifier(context["id"]) for context in contexts if context.get("id") is not None]
    scores = [number(context["score"]) for context in contexts if context.get("score") is not None]
    for found, what in ((ids, "an id"), (scores, "a score")):
        if found and len(found) != len(contexts):
            raise ValueError(f"some contexts have {what}, others have none")
    return Record(
        query_id=None if value.get("id") is None else identifier(value["id"]),
        query=member(value, "question", str),
        document_ids=ids or None,
        documents=documents,
        scores=scores or None,
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One JSON list, a question a line, without answers; a title stays at the head of its text."""
    write_whole(path, map(_item, records), "[]")


def _item(record: Record) -> str:
    query, documents = need_texts(record)
    contexts: list[dict[str, Any]] = [
        {"title": "", "text": document, "score": score}
        for document, score in zip(documents, need_scores(record), strict=True)
    ]
    for context, id_ in zip(contexts, record.document_ids or [], strict=record.document_ids is not None):
        context["id"] = id_
    return dumps({"id": record.query_id, "question": query, "ctxs": contexts})
