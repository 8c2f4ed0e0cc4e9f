"""MS MARCO's triples.train.small.tsv: three texts, no scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_cells

FORM = "query\tpositive\tnegative"


def read(path: Path) -> Iterator[Record]:
    """One record a line."""
    return from_cells(
        path,
        FORM,
        lambda cells, where: Record(query=cells[0], documents=cells[1:], positive=[True, False], where=where),
    )
