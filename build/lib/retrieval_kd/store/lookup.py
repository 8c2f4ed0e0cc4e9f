"""Finding what parts hold about many keys at once, in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrieval_kd.store.parts import Kind, check_part, embedding_width, open_part, reading, schema_of, vectors_of
from retrieval_kd.types import InputError

MEMORY_LIMIT = "400MB"  # of DuckDB; beyond it, it works from a temporary folder
BLOCK = 2**21  # rows that are looked at or wanted at once

# Sorting out the queries first makes the join three times as fast: pairs are wanted query by query. Their
# range is cheaper still where they are neighbours, as in `find_grid`.
FIND = """
    select position, score
    from (from parts where query_key between $1 and $2 and query_key in (select q from wanted))
    join wanted on query_key = q and document_key = d
"""


@contextmanager
def database(parts: Sequence[Path]) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB in bounded memory, with a view `parts` of the rows of `parts`, each with its file and its place there."""
    with tempfile.TemporaryDirectory(prefix="rkd-") as scratch, duckdb.connect() as connection:
        connection.execute("set memory_limit = $1", [MEMORY_LIMIT])
        connection.execute("set temp_directory = $1", [scratch])
        show(connection, parts)
        yield connection


def show(connection: duckdb.DuckDBPyConnection, parts: Sequence[Path]) -> None:
    """Make the view `parts` that of these parts, unless there are none."""
    if parts:
        files = ", ".join("'" + str(path).replace("'", "''") + "'" for path in parts)
        source = f"read_parquet([{files}], filename = true, file_row_number = true, hive_partitioning = false)"
        connection.execute(f"create or replace view parts as from {source}")


def make_table(connection: duckdb.DuckDBPyConnection, name: str, columns: Mapping[str, Any]) -> None:
    """Make a temporary table of arrays of one length; unlike of Arrow data, the planner knows how large it is."""
    connection.register("given", pa.table({key: pa.array(values) for key, values in columns.items()}))
    connection.execute(f"create temp table {name} as from given")
    connection.unregister("given")


def find_pairs(
    parts: Sequence[Path], query_keys: NDArray[np.uint64], document_keys: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Every row of `parts` that answers a wanted pair: the pair's position and the score.

    A position comes up once for each row that holds its pair, in no order.
    Shapes: query_keys, document_keys (n,); returns two arrays (m,).
    """
    if not parts:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    try:
        with database(parts) as connection:
            connection.execute("set preserve_insertion_order = false")
            make_table(
                connection, "wanted", {"q": query_keys, "d": document_keys, "position": np.arange(len(query_keys))}
            )
            ends = [int(query_keys.min()), int(query_keys.max())]
            answer = connection.execute(FIND, ends).fetchnumpy()
    except duckdb.Error:
        for path in parts:
            check_part(path, "scores")  # names the part at fault, if one is
        raise
    return answer["position"], answer["score"]


def key_ranges(rows: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of keys that together hold every key, and each about BLOCK of so many rows.

    Keys are hashes, so that equal ranges hold about as many.
    """
    edges = [place * 2**64 // max(1, -(-rows // BLOCK)) for place in range(max(1, -(-rows // BLOCK)) + 1)]
    return [(start, end - 1) for start, end in pairwise(edges)]


def find_rows(parts: Sequence[Path], kind: Kind, query_keys: NDArray[np.uint64] | None) -> pa.Table:
    """The rows of `parts` about some queries, or all of them if none are given, in the order of the parts.

    Memory: that of the rows, and 2^18 others.
    """
    schema = schema_of(kind)
    found = [schema.empty_table()]
    for path in parts:
        with reading(path), open_part(path, kind) as part:
            for batch in part.iter_batches(2**18, columns=schema.names):
                table = pa.Table.from_batches([batch])
                if query_keys is not None:
                    table = table.filter(pc.is_in(table.column("query_key"), pa.array(query_keys)))
                found.append(table.cast(schema))
    return pa.concat_tables(found)


def find_vectors(parts: Sequence[Path], keys: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The vector that `parts` hold for each key, the first part's where several do.

    Reads only the row groups that hold a wanted vector. Shapes: keys (n,), which may repeat;
    returns vectors (n, D), NaN where there is none, and found (n,).
    """
    width = embedding_width(parts[0]) if parts else 0
    vectors = np.full((len(keys), width), np.nan, np.float32)
    found = np.zeros(len(keys), np.bool_)
    for path in parts:
        missing = np.flatnonzero(~found)
        if not len(missing):
            break
        if embedding_width(path) != width:
            raise InputError(
                f"{path} holds vectors of width {embedding_width(path)}, {parts[0]} of {width}; one teacher has "
                "one width, so one of them was made by another model. Move that file out of the store."
            )
        with reading(path), open_part(path, "embeddings") as part:
            stored = part.read(["text_key"]).column(0).to_numpy()
            row_of, hit = find_places(stored, keys[missing])
            found[missing[hit]] = True
            wanted, row = missing[hit], row_of[hit]
            start = 0
            for group in range(part.num_row_groups):
                stop = start + part.metadata.row_group(group).num_rows
                here = (row >= start) & (row < stop)
                if here.any():
                    column = part.read_row_group(group, ["vector"]).column(0)
                    vectors[wanted[here]] = vectors_of(column, width)[row[here] - start]
                start = stop
    return vectors, found


def find_places(stored: NDArray[np.uint64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where each key stands first in `stored`, and whether it does at all (else its place means nothing).

    Shapes: (n,), (m,) to (m,), (m,).
    """
    if not len(stored):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
    order = np.argsort(stored, kind="stable")
    at = np.minimum(np.searchsorted(stored, keys, sorter=order), len(stored) - 1)
    rows = order[at]
    return rows, stored[rows] == keys
