"""Rank-DistiLLM's Parquet files (webis/rank-distillm, arXiv:2405.07920)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._columns import read_pairs

FORM = "rows with qid, docno and score"


def read(path: Path) -> Iterator[Record]:
    """One record for the rows of a query that follow each other."""
    return read_pairs(path, FORM, "qid", "docno")
