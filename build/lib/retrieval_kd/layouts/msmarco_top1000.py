"""MS MARCO's top1000.*.tsv: candidates of BM25 with their texts, in no order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_cells

FORM = "query_id\tdocument_id\tquery\tdocument"


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other."""
    lines = from_cells(path, FORM, lambda cells, where: (*cells, where))
    for query_id, group in groupby(lines, key=lambda row: row[0]):
        rows = list(group)
        ids, documents = [row[1] for row in rows], [row[3] for row in rows]
        yield Record(query_id, rows[0][2], ids, documents, where=rows[0][4])
