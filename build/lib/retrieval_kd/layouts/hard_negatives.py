"""Hard negatives of sentence-transformers (msmarco-hard-negatives.jsonl.gz): ids, or the older form with scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    from_objects,
    identifier,
    member,
    need_ids,
    number,
    published,
    split_places,
    write_objects,
)

FORM = '{"qid": 1, "pos": [2], "neg": {"bm25": [3]}} or, for each id, {"pid": 2, "ce-score": 9.5}'
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record a line; a document that several systems found stands once."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    found: dict[str, tuple[float | None, bool]] = {}
    found_by: dict[str, tuple[str, ...]] = {}
    for systems, positive in (({"pos": member(value, "pos", list)}, True), (member(value, "neg", dict), False)):
        for system in systems:
            for item in member(systems, system, list):
                scored = isinstance(item, dict)
                score = number(item.get("ce-score")) if scored else None
                document = identifier(item.get("pid") if scored else item)
                found.setdefault(document, (score, positive))
                found_by[document] = found_by.get(document, ()) + (() if positive else (system,))
    scores = [score for score, _ in found.values() if score is not None]
    if scores and len(scores) != len(found):
        raise ValueError("some documents have a score, others have none")
    return Record(
        query_id=identifier(value.get("qid")),
        document_ids=list(found),
        scores=scores or None,
        positive=[positive for _, positive in found.values()],
        found_by=list(found_by.values()),
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """The form with scores where there are any; negatives under each system that found them, or else `mined`."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query, documents = need_ids(record)
    ids: list[Any] = [published(document) for document in documents]
    if record.scores is not None:
        ids = [{"pid": id_, "ce-score": score} for id_, score in zip(ids, record.scores, strict=True)]
    positives, negatives = split_places(record)
    systems: dict[str, list[Any]] = {}
    for place in negatives:
        for system in (record.found_by[place] if record.found_by else ()) or ("mined",):
            systems.setdefault(system, []).append(ids[place])
    neg = systems or {"mined": []}
    return {"qid": published(query), "pos": [ids[place] for place in positives], "neg": neg}
