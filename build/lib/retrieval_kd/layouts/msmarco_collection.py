"""MS MARCO's collection.tsv: documents without a query."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_cells

FORM = "document_id\ttext"


def read(path: Path) -> Iterator[Record]:
    """One record a document."""
    return from_cells(path, FORM, lambda cells, where: Record(document_ids=cells[:1], documents=cells[1:], where=where))
