"""MS MARCO's queries.*.tsv: queries without documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_cells

FORM = "query_id\ttext"


def read(path: Path) -> Iterator[Record]:
    """One record a query."""
    return from_cells(path, FORM, lambda cells, where: Record(cells[0], cells[1], where=where))
