"""PairDistill's pointwise answers (arXiv:2410.01383): the logits of true and false for each document."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_cells, number

FORM = "query_id\tdocument_id\tlogit_true\tlogit_false"


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other; a score is the logit of true minus that of false."""

    def parse(cells: list[str], where: str) -> tuple[str, str, float, str]:
        return cells[0], cells[1], number(cells[2]) - number(cells[3]), where

    for query, group in groupby(from_cells(path, FORM, parse), key=lambda row: row[0]):
        rows = list(group)
        yield Record(query, None, [row[1] for row in rows], scores=[row[2] for row in rows], where=rows[0][3])
