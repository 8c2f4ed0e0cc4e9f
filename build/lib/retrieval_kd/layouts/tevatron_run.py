"""Tevatron's rankings: three cells, by falling score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import cell, from_cells, need_ids, need_scores, number, write_lines

FORM = "query_id\tdocument_id\tscore"


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other."""

    def parse(cells: list[str], where: str) -> tuple[str, str, float, str]:
        return cells[0], cells[1], number(cells[2]), where

    for query, group in groupby(from_cells(path, FORM, parse), key=lambda row: row[0]):
        rows = list(group)
        yield Record(query, None, [row[1] for row in rows], scores=[row[2] for row in rows], where=rows[0][3])


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a pair."""
    write_lines(path, _lines(records))


def _lines(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        query, documents = need_ids(record)
        for score, document in sorted(zip(need_scores(record), documents, strict=True), key=lambda pair: -pair[0]):
            yield f"{cell(query)}\t{cell(document)}\t{score!r}"
