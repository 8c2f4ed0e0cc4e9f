"""MS MARCO's runs: ranks without scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import cell, from_cells, need_ids, need_scores, write_lines

FORM = "query_id\tdocument_id\trank"
USES = ("rankings", "scores")


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other; its ranking goes by the ranks."""
    lines = from_cells(path, FORM, lambda cells, where: (cells[0], cells[1], int(cells[2]), where))
    for query, group in groupby(lines, key=lambda row: row[0]):
        rows = list(group)
        ranking = sorted(range(len(rows)), key=lambda place: rows[place][2])
        yield Record(query, None, [row[1] for row in rows], ranking=ranking, where=rows[0][3])


def write(path: Path, records: Iterable[Record]) -> None:
    """The ranking of each query, or its documents by falling score where there is none; ranks from 1."""
    write_lines(path, _lines(records))


def _lines(records: Iterable[Record]) -> Iterator[str]:
    for record in records:
        query, documents = need_ids(record)
        order = record.ranking
        if order is None:
            scores = need_scores(record)
            order = sorted(range(len(documents)), key=lambda place: -scores[place])
        for rank, place in enumerate(order, start=1):
            yield f"{cell(query)}\t{cell(documents[place])}\t{rank}"
