"""Parquet files of one row a pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_kd.files import atomic
from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_objects, identifier, need_ids, need_scores, number, shown

ROWS = 2**18  # of a row group: they wait as Python objects, 200 bytes each


def read_pairs(path: Path, form: str, query: str, document: str) -> Iterator[Record]:
    """One record for the rows of a query that follow each other."""

    def parse(row: Any, where: str) -> tuple[str, str, float, str]:
        if not isinstance(row, dict) or not {query, document, "score"} <= row.keys():
            raise ValueError(f"{shown(row)} lacks a column")
        return identifier(row[query]), identifier(row[document]), number(row["score"]), where

    for query_id, group in groupby(from_objects(path, form, parse), key=lambda row: row[0]):
        rows = list(group)
        yield Record(query_id, None, [row[1] for row in rows], scores=[row[2] for row in rows], where=rows[0][3])


def write_columns(path: Path, schema: pa.Schema, rows: Iterable[tuple[Any, ...]]) -> int:
    """Write rows as Parquet, atomically and a row group at a time; returns how many there were."""
    count, waiting = 0, []
    with atomic(path) as scratch, pq.ParquetWriter(scratch, schema, compression="zstd") as file:
        for row in rows:
            waiting.append(row)
            count += 1
            if len(waiting) == ROWS:
                file.write_table(_table(waiting, schema))
                waiting.clear()
        file.write_table(_table(waiting, schema))
    return count


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    return pa.table([[row[place] for row in rows] for place in range(len(schema))], schema=schema)


def pairs_of(records: Iterable[Record]) -> Iterator[tuple[str, str, float]]:
    """(query id, document id, score) of every scored pair."""
    for record in records:
        query, documents = need_ids(record)
        for document, score in zip(documents, need_scores(record), strict=True):
            yield query, document, score
