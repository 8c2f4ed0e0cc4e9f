"""Parts: the Parquet files that the score store is made of, written once and never changed."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from retrieval_kd.files import atomic
from retrieval_kd.types import InputError

Kind = Literal["scores", "preferences", "rankings", "embeddings"]

GROUP_VALUES = 2**22  # values of a row group's widest column: 16 MiB of float32
DICTIONARY_BYTES = 2**26  # as large as a row group can need, so that a dictionary is never given up half-way


def schema_of(kind: Kind, width: int = 1) -> pa.Schema:
    """The columns of a part; `width` is that of the vectors, for embeddings."""
    key, number = pa.uint64(), pa.float32()
    columns: dict[Kind, dict[str, pa.DataType]] = {
        "scores": {"query_key": key, "document_key": key, "score": number},
        "preferences": {"query_key": key, "first_key": key, "second_key": key, "probability": number},
        "rankings": {"query_key": key, "document_keys": pa.list_(pa.field("element", key, nullable=False))},
        "embeddings": {"text_key": key, "vector": pa.list_(pa.field("element", number, nullable=False), width)},
    }
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in columns[kind].items()])


def write_part(folder: Path, table: pa.Table) -> Path:
    """Write `table` as a new part of `folder`, all or nothing, on disk when this returns.

    The name begins with the time and is unique, so any number of processes may write at once.
    """
    name = f"part-{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(8)}.parquet"
    width = max((field.type.list_size for field in table.schema if pa.types.is_fixed_size_list(field.type)), default=1)
    with atomic(folder / name) as scratch:
        pq.write_table(
            table,
            scratch,
            row_group_size=min(2**20, max(1, GROUP_VALUES // width)),
            compression="zstd",
            use_dictionary=_repeating(table),
            dictionary_pagesize_limit=DICTIONARY_BYTES,
            write_page_checksum=True,
        )
    return folder / name


def _repeating(table: pa.Table) -> list[str]:
    """The columns whose values come up twice or more on average: a dictionary makes those smaller.

    Where values are mostly new, as the keys of documents judged once, it makes them larger
    (10.2 bytes a key against 8, and 2.9 where each comes up ten times).
    """
    flat = [name for name in table.column_names if not pa.types.is_nested(table.schema.field(name).type)]
    return [name for name in flat if 2 * len(np.unique(table.column(name).to_numpy())) <= len(table)]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure to read the part at `path` into an InputError that names it and the remedy."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().rstrip(".")
        raise InputError(
            f"{path} cannot be read: {reason}. Move this file out of the store; "
            "what it held counts as not judged and will be asked again."
        ) from error


def open_part(path: Path, kind: Kind) -> pq.ParquetFile:
    """Open a part whose checksums are verified as its pages are read. Call inside `reading`.

    Raises pa.ArrowInvalid when it is not a whole Parquet file with the columns of `kind`.
    """
    part = pq.ParquetFile(path, page_checksum_verification=True)
    for field in schema_of(kind):
        if field.name not in part.schema_arrow.names:
            raise pa.ArrowInvalid(f"it has no column {field.name!r}, so it is no part of {kind}")
        stored = part.schema_arrow.field(field.name).type
        if field.name != "vector" and stored != field.type:
            raise pa.ArrowInvalid(f"its column {field.name!r} is {stored}, not {field.type}")
        if field.name == "vector" and not pa.types.is_fixed_size_list(stored):
            raise pa.ArrowInvalid(f"its column 'vector' is {stored}, not a list of fixed size")
    return part


def count_rows(path: Path, kind: Kind) -> int:
    """The rows of a part, from its footer."""
    with reading(path), open_part(path, kind) as part:
        return int(part.metadata.num_rows)


def check_part(path: Path, kind: Kind) -> None:
    """Read a part through; InputError if that fails anywhere."""
    with reading(path), open_part(path, kind) as part:
        for _ in part.iter_batches():
            pass


def embedding_width(path: Path) -> int:
    """The width D of the vectors of a part of embeddings."""
    with reading(path), open_part(path, "embeddings") as part:
        return int(part.schema_arrow.field("vector").type.list_size)


def vectors_of(column: pa.ChunkedArray, width: int) -> NDArray[np.float32]:
    """The vectors (n, D) of a column, without a copy where it lies in one piece."""
    pieces = [chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty((0, width), np.float32), *pieces])
