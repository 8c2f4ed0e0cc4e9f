"""OpenSearch's training lines, by id and by text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import aligned, from_objects, identifier, member, shown, text


def read_lists(path: Path, form: str, by_text: bool) -> Iterator[Record]:
    """One record a line: documents with scores, or a positive and negatives without."""

    def parse(value: Any, where: str) -> Record:
        if not isinstance(value, dict) or "query" not in value:
            raise ValueError(f"{shown(value)} is not an object with a 'query'")
        name = text if by_text else identifier
        query = name(value["query"])
        scores, marks = None, None
        if "docs" in value:
            documents = [name(item) for item in member(value, "docs", list)]
            scores = aligned(value.get("scores"), documents)
        else:
            found = value.get("pos")
            positives = [name(item) for item in (found if isinstance(found, list) else [found])]
            negatives = [name(item) for item in member(value, "negs", list)]
            documents, marks = positives + negatives, [True] * len(positives) + [False] * len(negatives)
        if by_text:
            return Record(query=query, documents=documents, scores=scores, positive=marks, where=where)
        return Record(query_id=query, document_ids=documents, scores=scores, positive=marks, where=where)

    return from_objects(path, form, parse)
