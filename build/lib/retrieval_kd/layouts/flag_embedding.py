"""FlagEmbedding's training files (BGE): texts, with the teacher's scores of positives and negatives or without."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import aligned, from_objects, member, need_texts, split_places, text, write_objects

FORM = '{"query": "...", "pos": ["..."], "neg": ["..."], "pos_scores": [9.5], "neg_scores": [1.5]}, scores both or not'
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record a line, positives first."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    query = member(value, "query", str)
    positives, negatives = ([text(item) for item in member(value, key, list)] for key in ("pos", "neg"))
    scores = None
    if any(value.get(key) is not None for key in ("pos_scores", "neg_scores")):
        scores = aligned(value.get("pos_scores"), positives) + aligned(value.get("neg_scores"), negatives)
    marks = [True] * len(positives) + [False] * len(negatives)
    return Record(query=query, documents=positives + negatives, scores=scores, positive=marks, where=where)


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a query."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> dict[str, Any]:
    query, documents = need_texts(record)
    value: dict[str, Any] = {"query": query}
    for key, places in zip(("pos", "neg"), split_places(record), strict=True):
        value[key] = [documents[place] for place in places]
        if record.scores is not None:
            value[f"{key}_scores"] = [record.scores[place] for place in places]
    return value
