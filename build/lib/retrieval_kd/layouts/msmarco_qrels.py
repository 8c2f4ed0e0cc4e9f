"""MS MARCO's and TREC's qrels; a grade above 0 is a positive."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_lines

FORM = "qid 0 docid grade"


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other."""
    for query, group in groupby(from_lines(path, FORM, _parse), key=lambda row: row[0]):
        rows = list(group)
        yield Record(query, None, [row[1] for row in rows], positive=[row[2] > 0 for row in rows], where=rows[0][3])


def _parse(line: str, where: str) -> tuple[str, str, int, str]:
    cells = line.split()
    if len(cells) != 4:
        raise ValueError(f"{len(cells)} fields, not 4: {line[:60]!r}")
    return cells[0], cells[2], int(cells[3]), where
