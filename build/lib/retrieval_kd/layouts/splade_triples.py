"""SPLADE's distillation triples by id: the cells of margin_mse in another order (naver/splade)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._triples import read_triples, write_triples

FORM = "query_id\tpos_id\tneg_id\tpos_score\tneg_score"
NEEDS_POSITIVE = True


def read(path: Path) -> Iterator[Record]:
    """One record a line."""
    return read_triples(path, FORM, scores_first=False, by_text=False)


def write(path: Path, records: Iterable[Record]) -> None:
    """A line for every pair of a positive and another document."""
    write_triples(path, records, scores_first=False, by_text=False)
