"""One row a pair, as `rkd scores push` publishes scores: Parquet, or JSON Lines of the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._columns import pairs_of, read_pairs, write_columns

FORM = "rows with query_id, document_id and score"
SCHEMA = pa.schema([("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.float32())])


def read(path: Path) -> Iterator[Record]:
    """One record for the rows of a query that follow each other."""
    return read_pairs(path, FORM, "query_id", "document_id")


def write(path: Path, records: Iterable[Record]) -> None:
    """Parquet."""
    write_columns(path, SCHEMA, pairs_of(records))
