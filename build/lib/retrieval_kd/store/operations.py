"""What can be done to a store as a whole: look, verify, quarantine, compact, merge."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrieval_kd.files import atomic, fingerprint, read_json, read_lines, size_bytes
from retrieval_kd.store.locks import hold
from retrieval_kd.store.lookup import database, key_ranges
from retrieval_kd.store.parts import (
    Kind,
    check_part,
    count_rows,
    embedding_width,
    open_part,
    reading,
    schema_of,
    write_part,
)
from retrieval_kd.store.store import Store
from retrieval_kd.types import InputError

KINDS: tuple[Kind, ...] = get_args(Kind)
PART_BYTES = 2**26  # of a compacted part, before compression
# Rows with equal values in these columns are one judgement that stands twice.
SAME: dict[Kind, str] = {
    "scores": "query_key, document_key",
    "preferences": "query_key, first_key, second_key, probability",
    "rankings": "query_key, document_keys",
    "embeddings": "text_key",
}
# Each judgement of a range of keys once. Of a pair's scores the lower, NaN being the highest: what find_scores
# gives. Of answers that differ all stay, the older first. The names of parts begin with their time.
ONCE: dict[Kind, str] = {
    "scores": "select query_key, document_key, min(score) as score from parts where {range} group by all order by all",
    "preferences": "select query_key, first_key, second_key, probability from parts where {range} group by all "
    "order by query_key, first_key, second_key, min((filename, file_row_number))",
    "rankings": "select query_key, document_keys from parts where {range} group by all "
    "order by query_key, min((filename, file_row_number))",
}


def open_folder(folder: Path) -> Store:
    """The store in one teacher's folder; InputError when teacher.json does not say whose it is."""
    teacher = read_json(folder / "teacher.json")
    if not isinstance(teacher, dict) or teacher.get("fingerprint") != fingerprint(teacher.get("identity")):
        raise InputError(f"{folder / 'teacher.json'} does not say who the teacher is; restore it.")
    return Store(folder, teacher["identity"])


def stores(root: Path) -> list[Store]:
    """The stores under `root`, or the one that `root` is, by name of folder."""
    if not root.is_dir():
        raise InputError(f"{root} is no folder of teacher scores.")
    if (root / "teacher.json").exists():
        return [open_folder(root)]
    return [open_folder(path.parent) for path in sorted(root.glob("*/teacher.json"))]


def find_store(root: Path, teacher: str) -> Store:
    """The store of the teacher called `teacher`, or in the folder of that name; InputError unless it is one."""
    every = stores(root)
    found = [store for store in every if store.folder.name == teacher] or [
        store for store in every if read_json(store.folder / "teacher.json")["name"] == teacher
    ]
    if len(found) != 1:
        what = f"{len(found)} teachers" if found else "no teacher"
        names = ", ".join(store.folder.name for store in found or every) or "none"
        raise InputError(f"{root} holds {what} called {teacher!r}; give one of its folders: {names}.")
    return found[0]


def summary(store: Store) -> dict[str, Any]:
    """What a store holds, from the footers of its parts; parts that have none are counted as `torn`."""
    rows: Counter[str] = Counter()
    written: list[float] = []
    for kind in KINDS:
        counts, times = store.read(kind, partial(_footers, kind=kind))
        rows[kind] = sum(count for count in counts if count is not None)
        rows["torn"] += counts.count(None)
        written += times
    return {
        "folder": store.folder.name,
        "teacher": read_json(store.folder / "teacher.json")["name"],
        "kind": store.identity.get("kind"),
        "fingerprint": fingerprint(store.identity),
        "pairs": rows["scores"],
        "preferences": rows["preferences"],
        "rankings": rows["rankings"],
        "vectors": rows["embeddings"],
        "bytes": size_bytes(store.folder),
        "parts": len(written),
        "torn": rows["torn"],
        "written": datetime.fromtimestamp(max(written), UTC).isoformat(timespec="seconds") if written else None,
    }


def _footers(parts: Sequence[Path], kind: Kind) -> tuple[list[int | None], list[float]]:
    """The rows of each part, None where it cannot be read, and when it was written."""
    counts: list[int | None] = []
    for path in parts:
        try:
            counts.append(count_rows(path, kind))
        except InputError:
            counts.append(None)
    return counts, [path.stat().st_mtime for path in parts]


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: how many parts, which are torn and why, which are out of order, what stands twice."""

    parts: int
    torn: dict[Path, str]
    unsorted: list[Path]
    doubled: dict[str, int]  # kind -> rows too many; harmless, and `compact` takes them out


def verify(store: Store) -> Verdict:
    """Read every part through, its checksums and statistics too, and count the judgements that stand twice."""
    verdict = Verdict(0, {}, [], {})
    for kind in KINDS:
        found = store.read(kind, partial(_verify, kind=kind))
        verdict = Verdict(
            verdict.parts + found.parts,
            verdict.torn | found.torn,
            verdict.unsorted + found.unsorted,
            verdict.doubled | found.doubled,
        )
    return verdict


def _verify(parts: Sequence[Path], kind: Kind) -> Verdict:
    found = {path: _inspect(path, kind) for path in parts}
    torn = {path: problem for path, (problem, _) in found.items() if problem is not None}
    if gone := [path for path in torn if not path.exists()]:
        raise FileNotFoundError(gone[0])  # by `compact`: all are looked at again
    healthy = [path for path in parts if path not in torn]
    extra = _count_doubled(healthy, kind) if healthy else 0
    unsorted = [path for path in healthy if not found[path][1]]
    return Verdict(len(parts), torn, unsorted, {kind: extra} if extra else {})


def quarantine(part: Path) -> Path:
    """Move one part out of its store, to the folder `quarantine` beside the kinds; returns where it is now.

    What it held counts as not judged from then on.
    """
    store = part.parent.parent
    if part.parent.name not in KINDS or not (store / "teacher.json").exists() or not part.match("part-*.parquet"):
        raise InputError(f"{part} is no part of a store (STORE/TEACHER/scores/part-....parquet).")
    if not part.is_file():
        raise InputError(f"{part} does not exist.")
    place = store / "quarantine" / part.parent.name / part.name
    place.parent.mkdir(parents=True, exist_ok=True)
    part.rename(place)
    return place


def compact(store: Store, kind: Kind) -> dict[str, int]:
    """Write the judgements of one kind anew in few large parts, each once; the same are found as before.

    Kill it at any moment and nothing is lost: the old parts go only when the new ones are on disk.
    What stands twice then changes no answer, and the next `compact` takes it out. Other processes
    may append and read meanwhile: who finds a listed part gone lists them again. Memory: DuckDB's
    limit and two parts; for embeddings, one part and 24 bytes a vector.
    Returns the parts and rows before and after. Raises InputError when a part is torn.
    """
    with hold(store.folder / ".compact", f"{store.folder.name}: another process compacts it; waiting"):
        return _compact(store, kind)


def _compact(store: Store, kind: Kind) -> dict[str, int]:
    old = store.parts(kind)
    for path in old:
        check_part(path, kind)  # as DuckDB would read a flipped bit without a word, and the original would go
    rows = sum(count_rows(path, kind) for path in old)
    unchanged = {"parts_before": len(old), "parts": len(old), "rows_before": rows, "rows": rows}
    size = PART_BYTES // _row_bytes(old, kind) if rows else 1
    if len(old) <= max(1, -(-rows // size)) and (not rows or not _count_doubled(old, kind)):
        return unchanged
    written = kept = 0
    for table in _once(old, kind, size):
        write_part(store.folder / kind, table)
        written, kept = written + 1, kept + len(table)
    for path in reversed(old):  # the youngest first: what is left to be found first is still the oldest
        path.unlink(missing_ok=True)
    return unchanged | {"parts": written, "rows": kept}


def merge(into: Store, other: Store) -> dict[str, int]:
    """Copy the parts and the ledger of another folder of the same teacher; what is there already is left out.

    `other` stays as it is. Start it again when it was stopped. Raises InputError for another teacher's
    store, and for a torn part. Returns how many parts were copied.
    """
    if into.identity != other.identity:
        raise InputError(
            f"{into.folder} and {other.folder} belong to two teachers: {into.identity} and {other.identity}; "
            "scores of one are not scores of the other."
        )
    if into.folder.resolve() == other.folder.resolve():
        raise InputError(f"{into.folder} is given twice.")
    copied = 0
    for kind in KINDS:
        known = {path.name: path for path in into.parts(kind)}
        for path in other.parts(kind):
            if path.name in known:
                if known[path.name].stat().st_size != path.stat().st_size:
                    raise InputError(f"{path} and {known[path.name]} differ; verify both stores.")
                continue
            check_part(path, kind)
            with atomic(into.folder / kind / path.name) as scratch:
                shutil.copyfile(path, scratch)
            copied += 1
    ledgers = [store.folder / "ledger.jsonl" for store in (into, other)]
    here, there = ([line for _, line in read_lines(path)] if path.exists() else [] for path in ledgers)
    if new := list((Counter(there) - Counter(here)).elements()):
        with ledgers[0].open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in new)
            file.flush()
            os.fsync(file.fileno())
    return {"copied": copied}


def unknown_rows(store: Store, kind: Kind, table: pa.Table) -> pa.Table:
    """The rows of `table` that the store does not hold, each once; rows are one judgement as SAME says."""

    def unknown(parts: Sequence[Path]) -> pa.Table:
        with database(parts) as connection:
            connection.register("given", table)
            query = f"select distinct on ({SAME[kind]}) * from given"
            if parts:
                query = f"select * from ({query}) anti join parts using ({SAME[kind]})"
            return connection.sql(query).to_arrow_table().cast(table.schema)

    return store.read(kind, unknown)


def _count_doubled(parts: Sequence[Path], kind: Kind) -> int:
    extra = 0
    with database(parts) as connection:
        for keys in _ranges(parts, kind):
            groups = f"select count(*) as n from parts where {keys} group by {SAME[kind]}"
            query = f"select coalesce(sum(n - 1), 0) from ({groups})"
            extra += int(cast(tuple[int], connection.execute(query).fetchone())[0])
    return extra


def _ranges(parts: Sequence[Path], kind: Kind) -> list[str]:
    """Conditions on the first key, each of which holds for about as many rows as fit into memory."""
    column = schema_of(kind).names[0]
    ranges = key_ranges(sum(count_rows(path, kind) for path in parts))
    return [f"{column} between {first}::ubigint and {last}::ubigint" for first, last in ranges]


def _row_bytes(parts: Sequence[Path], kind: Kind) -> int:
    """Bytes of a row before compression; of a ranking, on average."""
    if kind == "embeddings":
        return 8 + 4 * max(embedding_width(path) for path in parts)
    if kind == "rankings":
        with database(parts) as connection:
            (mean,) = cast(tuple[float], connection.execute("select avg(len(document_keys)) from parts").fetchone())
        return 8 + round(8 * mean)
    return {"scores": 20, "preferences": 28}[kind]


def _once(parts: Sequence[Path], kind: Kind, size: int) -> Iterator[pa.Table]:
    """Every judgement of `parts` once, in tables of `size` rows."""
    if kind == "embeddings":
        yield from _vectors_once(parts, size)
        return
    schema = schema_of(kind)
    with database(parts) as connection:
        waiting: list[pa.Table] = []
        for keys in _ranges(parts, kind):
            waiting.append(connection.sql(ONCE[kind].format(range=keys)).to_arrow_table().cast(schema))
            while sum(map(len, waiting)) >= size:
                table = pa.concat_tables(waiting)
                yield table[:size]
                waiting = [table[size:]]
        if sum(map(len, waiting)):
            yield pa.concat_tables(waiting)


def _vectors_once(parts: Sequence[Path], size: int) -> Iterator[pa.Table]:
    """The vector of each text in the oldest part that has one: what find_embeddings gives."""
    widths = {embedding_width(path) for path in parts}
    if len(widths) > 1:
        raise InputError(f"{parts[0].parent} holds vectors of widths {sorted(widths)}; one teacher has one width.")
    keys = []
    for path in parts:
        with reading(path), open_part(path, "embeddings") as part:
            keys.append(part.read(["text_key"]).column(0).to_numpy())
    first = np.zeros(sum(map(len, keys)), np.bool_)
    first[np.unique(np.concatenate(keys), return_index=True)[1]] = True
    schema = schema_of("embeddings", widths.pop())
    waiting, start = [schema.empty_table()], 0
    for path in parts:
        with reading(path), open_part(path, "embeddings") as part:
            for batch in part.iter_batches(2**14):
                mask = pa.array(first[start : start + len(batch)])
                waiting.append(pa.Table.from_batches([batch]).select(schema.names).filter(mask).cast(schema))
                start += len(batch)
                while sum(map(len, waiting)) >= size:
                    table = pa.concat_tables(waiting)
                    yield table[:size]
                    waiting = [table[size:]]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _inspect(path: Path, kind: Kind) -> tuple[str | None, bool]:
    """What is wrong with a part, None for nothing; and whether its scores are in the order of their keys."""
    in_order = True
    last: NDArray[np.uint64] | None = None
    rows = 0
    try:
        with open_part(path, kind) as part:
            for group in range(part.num_row_groups):
                table = part.read_row_group(group)
                if len(table) != part.metadata.row_group(group).num_rows:
                    return "its footer counts other rows than there are", in_order
                rows += len(table)
                if problem := _statistics(part.metadata.row_group(group), table):
                    return problem, in_order
                if kind == "scores" and len(table):
                    keys = np.stack([table.column(name).to_numpy() for name in ("query_key", "document_key")], axis=1)
                    keys = keys if last is None else np.concatenate([last[None], keys])
                    later = (keys[1:, 0] > keys[:-1, 0]) | (
                        (keys[1:, 0] == keys[:-1, 0]) & (keys[1:, 1] >= keys[:-1, 1])
                    )
                    in_order, last = in_order and bool(later.all()), keys[-1]
            if rows != part.metadata.num_rows:
                return "its footer counts other rows than there are", in_order
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        return str(error).strip().rstrip(".") or type(error).__name__, in_order
    return None, in_order


def _statistics(group: Any, table: pa.Table) -> str | None:
    """What the footer says wrongly about a row group: readers leave groups out by it, and it has no checksum."""
    for place in range(group.num_columns):
        column = group.column(place)
        if "." in column.path_in_schema or not column.is_stats_set or column.path_in_schema not in table.column_names:
            continue
        values = table.column(column.path_in_schema)
        if values.null_count:
            return f"its column {column.path_in_schema!r} has nulls"
        if not column.statistics.has_min_max or not len(values):
            continue
        if pa.types.is_floating(values.type):
            values = values.filter(pc.invert(pc.is_nan(values)))
        found = pc.min_max(values).as_py()
        if (found["min"], found["max"]) != (column.statistics.min, column.statistics.max):
            return f"its footer gives another range of {column.path_in_schema!r} than its rows have"
    return None
