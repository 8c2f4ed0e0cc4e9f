"""TREC runs: of any re-ranker, Rank-DistiLLM's among them (Zenodo 15131907), and SPLADE's `trec` scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_lines, need_ids, need_scores, number, write_lines
from retrieval_kd.types import InputError

FORM = "qid Q0 docid rank score tag"


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other, in the order of the file; ranks are not read."""
    for query, group in groupby(from_lines(path, FORM, _parse), key=lambda row: row[0]):
        rows = list(group)
        yield Record(query, None, [row[1] for row in rows], scores=[row[2] for row in rows], where=rows[0][3])


def _parse(line: str, where: str) -> tuple[str, str, float, str]:
    cells = line.split()
    if len(cells) != 6:
        raise ValueError(f"{len(cells)} fields, not 6: {line[:60]!r}")
    return cells[0], cells[2], number(cells[4]), where


def write(path: Path, records: Iterable[Record]) -> None:
    """Documents by falling score, ranks from 1."""
    write_lines(path, _lines(records))


def _lines(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        query, documents = need_ids(record)
        for id_ in (query, *documents):
            if len(id_.split()) != 1:
                raise InputError(f"a TREC run cannot hold the id {id_!r}: its fields are separated by spaces.")
        best = sorted(zip(need_scores(record), documents, strict=True), key=lambda pair: -pair[0])
        for rank, (score, document) in enumerate(best, start=1):
            yield f"{query} Q0 {document} {rank} {score!r} rkd"
