"""Syntriever's preferences (arXiv:2502.03824): the passage that a language model prefers, and the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_objects, member, need_texts, write_objects

FORM = '{"query": "...", "positive_passage": "...", "negative_passage": "..."}'
USES = ("preferences",)


def read(path: Path) -> Iterator[Record]:
    """One record a line: the first passage beats the second with certainty."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    documents = [member(value, f"{which}_passage", str) for which in ("positive", "negative")]
    return Record(query=member(value, "query", str), documents=documents, preferences=[(0, 1, 1.0)], where=where)


def write(path: Path, records: Iterable[Record]) -> None:
    """A line for each preference, its winner first; even ones are left out, for they prefer nothing."""
    write_objects(path, _values(records))


def _values(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        query, documents = need_texts(record)
        for first, second, probability in record.preferences or []:
            if probability != 0.5:
                better, worse = (first, second) if probability > 0.5 else (second, first)
                yield {
                    "query": query,
                    "positive_passage": documents[better],
                    "negative_passage": documents[worse],
                }
