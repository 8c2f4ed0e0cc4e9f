"""Teacher scores in and out of the store: import a published file, export one, publish a data set."""

from __future__ import annotations

import heapq
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from retrieval_kd import __version__
from retrieval_kd.data import load_collection
from retrieval_kd.files import atomic, fingerprint
from retrieval_kd.layouts import Record, find_writer
from retrieval_kd.layouts._columns import pairs_of, write_columns
from retrieval_kd.layouts.pairs import SCHEMA as PAIRS
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.lookup import BLOCK, database, make_table, show
from retrieval_kd.store.parts import Kind
from retrieval_kd.store.store import Store
from retrieval_kd.tables import Component, kind_module
from retrieval_kd.teachers import Archive, load_teacher
from retrieval_kd.types import Collection, InputError, Queries

JUDGED: tuple[Kind, ...] = ("scores", "preferences", "rankings")
# Of each kind: query row, where it stands among the kinds, the documents it is about, and its value.
# NaN is left out later: DuckDB takes `isnan` for false where a file's statistics, which skip NaN, name a range.
ROWS: dict[Kind, str] = {
    "scores": """
        select q.row, 0, d.row, min(score) as score from parts
        join queries q on q.key = query_key join documents d on d.key = document_key
        group by q.row, d.row order by q.row, score desc, d.row
    """,
    "preferences": """
        select q.row, 1, a.row, b.row, probability from parts join queries q on q.key = query_key
        join documents a on a.key = first_key join documents b on b.key = second_key
        group by q.row, a.row, b.row, probability order by q.row, a.row, b.row, min((filename, file_row_number))
    """,
    "rankings": """
        select q.row, 2, document_keys from parts join queries q on q.key = query_key
        order by q.row, filename desc, file_row_number desc
    """,
}
PREFERENCES = pa.schema([(name, pa.string()) for name in ("query_id", "first_id", "second_id")]).append(
    pa.field("probability", pa.float32())
)
RANKINGS = pa.schema([("query_id", pa.string()), ("document_ids", pa.list_(pa.string()))])


@dataclass(frozen=True)
class Source:
    """One teacher's judgements of a split's queries; the prompts are what it read before each text."""

    store: Store
    collection: Collection
    split: str
    query_prompt: str = ""
    document_prompt: str = ""

    @property
    def queries(self) -> Queries:
        """The queries of the split."""
        return self.collection.split(self.split)


def import_scores(
    layout: str, file: Path, collection: Collection, name: str, root: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Put a published file into the store, as the teacher `name`; see `teachers.imported`. Returns its counts."""
    chosen: dict[str, Any] = {"layout": layout, "file": file, **options}
    teacher = load_teacher(Component(kind="imported", **chosen), collection)
    assert isinstance(teacher, Archive)
    store = Store.open(root, name, teacher.identity)
    with store.alone(name):
        return {"store": str(store.folder), **teacher.read_into(store)}


def export_scores(layout: str, path: Path, source: Source, allow_missing: bool = False) -> dict[str, int]:
    """Write what a teacher judged of a split in a published layout; a pair without an answer is left out.

    A layout that needs a positive cannot hold a query without a judged and scored one: an
    InputError, or left out and counted with `allow_missing`. Returns the queries and documents
    written, and the queries left out.
    """
    write = find_writer(layout)
    module = kind_module("layouts", layout)
    needs_positive = getattr(module, "NEEDS_POSITIVE", False)
    kinds: tuple[Kind, ...] = getattr(module, "USES", ("scores",))
    counts = {"queries": 0, "documents": 0, "left_out": 0}

    def chosen() -> Iterator[Record]:
        for record in stored_records(source, kinds):
            if needs_positive and not any(record.positive or ()):
                if not allow_missing:
                    raise InputError(
                        f"query {record.query_id!r} has no relevant document that is judged in split {source.split!r} "
                        f"and scored, which layout {layout!r} needs; to leave such queries out, give --allow-missing."
                    )
                counts["left_out"] += 1
                continue
            counts["queries"] += 1
            counts["documents"] += len(record)
            yield record

    write(path, chosen())
    return counts


def stored_records(source: Source, kinds: Sequence[Kind] = JUDGED) -> Iterator[Record]:
    """What a teacher judged of each query of a split, in the order of the split: positives first, then by score.

    A record has scores if all its documents have one, and of several rankings the youngest. Raises InputError when
    the store knows nothing of the split. Memory: the keys of the collection, and DuckDB's limit.
    """
    empty = True
    for record in _records(source, kinds):
        empty = False
        yield record
    if empty:
        raise InputError(
            f"{source.store.folder} holds no {' or '.join(kinds)} of split {source.split!r} of "
            f"{source.collection.name!r}; if the teacher reads prompts before the texts, give them "
            "(--query-prompt, --document-prompt)."
        )


def _records(source: Source, kinds: Sequence[Kind]) -> Iterator[Record]:
    queries, collection = source.queries, source.collection
    keys = {
        "queries": text_keys(source.query_prompt + text for text in queries.texts),
        "documents": text_keys(source.document_prompt + text for text in collection.documents),
    }
    rows_of: dict[int, list[int]] = {}
    for row, key in enumerate(keys["documents"]) if "rankings" in kinds else ():
        rows_of.setdefault(int(key), []).append(row)
    streams = [_rows(source.store, kind, keys) for kind in kinds if source.store.parts(kind)]
    for query, rows in groupby(heapq.merge(*streams, key=lambda row: row[:2]), key=lambda row: row[0]):
        record = _record(source, query, list(rows), rows_of)
        if len(record):
            yield record


def _rows(store: Store, kind: Kind, keys: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The judgements of one kind, by query: of so many queries at once that their rows fit into memory."""

    def answer(parts: Sequence[Path], query: str) -> pa.Table:
        show(connection, parts)
        return connection.sql(query).to_arrow_table()

    try:
        with database([]) as connection:
            for name, column in keys.items():
                make_table(connection, f"all_{name}", {"key": column, "row": np.arange(len(column), dtype=np.int32)})
            connection.execute("create temp view documents as from all_documents")
            count = len(keys["queries"])
            rows = "select count(*) from parts where query_key in (select key from all_queries)"
            step = max(1, count * BLOCK // max(1, store.read(kind, partial(answer, query=rows))[0][0].as_py()))
            for start in range(0, count, step):
                some = f"from all_queries where row >= {start} and row < {start + step}"
                connection.execute(f"create or replace temp view queries as {some}")
                for batch in store.read(kind, partial(answer, query=ROWS[kind])).to_batches(2**14):
                    yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
    except duckdb.Error as error:
        raise InputError(f"{store.folder} cannot be read: {error}; run `rkd scores verify` on it.") from error


def _record(source: Source, query: int, rows: list[tuple[Any, ...]], rows_of: dict[int, list[int]]) -> Record:
    """The judgements of one query: rows of scores, then of preferences, then of rankings."""
    queries, collection = source.queries, source.collection
    grades = queries.qrels[query] if queries.qrels else None
    scores = {row[2]: row[3] for row in rows if row[1] == 0 and not math.isnan(row[3])}
    pairs = [row[2:] for row in rows if row[1] == 1 and not math.isnan(row[4])]
    rankings = [row[2] for row in rows if row[1] == 2]
    ranking = [row for key in rankings[0] for row in rows_of.get(key, [])] if rankings else []
    documents = list(dict.fromkeys([*scores, *ranking, *(row for pair in pairs for row in pair[:2])]))
    if grades is not None:
        documents.sort(key=lambda row: grades.get(row, 0) <= 0)  # stable: positives first
    place = {row: number for number, row in enumerate(documents)}
    return Record(
        query_id=queries.ids[query],
        query=queries.texts[query],
        document_ids=[collection.document_ids[row] for row in documents],
        documents=[collection.documents[row] for row in documents],
        scores=[short(scores[row]) for row in documents] if len(scores) == len(documents) else None,
        positive=None if grades is None else [grades.get(row, 0) > 0 for row in documents],
        preferences=[(place[first], place[second], short(p)) for first, second, p in pairs] or None,
        ranking=[place[row] for row in ranking] or None,
        where=f"{source.store.folder}: query {queries.ids[query]}",
    )


def short(value: float) -> float:
    """A float32 as the shortest decimal that means it: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))


def publish(source: Source, folder: Path, licence: str, about: str = "") -> dict[str, int]:
    """Write a Hugging Face data set of what a teacher judged of a split: Parquet, and a card; returns counts.

    `{scores,preferences,rankings}/{split}.parquet` hold ids of the collection, README.md the card with
    the teacher's identity, its prompts, the licence, and how the set was made.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; give a folder that does not, or remove it.")
    counts: dict[str, int] = {}
    with atomic(folder) as scratch:
        scratch.mkdir()
        next(stored_records(source))  # if there is nothing at all, it is an error
        for kind in JUDGED:
            path = scratch / kind / f"{source.split}.parquet"
            if count := _write(kind, path, _records(source, [kind])):
                counts[kind] = count
            else:
                shutil.rmtree(path.parent)
        (scratch / "README.md").write_text(_card(source, licence, about, counts), encoding="utf-8")
    return counts


def _write(kind: Kind, path: Path, records: Iterable[Record]) -> int:
    if kind == "scores":
        return write_columns(path, PAIRS, pairs_of(records))
    if kind == "rankings":
        lists = ((r.query_id, [(r.document_ids or [])[place] for place in r.ranking or []]) for r in records)
        return write_columns(path, RANKINGS, lists)
    pairs = (
        (record.query_id, (record.document_ids or [])[first], (record.document_ids or [])[second], probability)
        for record in records
        for first, second, probability in record.preferences or []
    )
    return write_columns(path, PREFERENCES, pairs)


def push(folder: Path, repo: str) -> str:
    """Upload a published folder as the data set `repo` of the Hugging Face Hub; returns its address."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(f"nobody is logged in, so {folder} stays here; run `hf auth login`, or set HF_TOKEN.")
    address = HfApi().create_repo(repo, repo_type="dataset", exist_ok=True)
    HfApi().upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder)
    return str(address)


COLUMNS = {
    "scores": "`query_id`, `document_id`, `score`: raw, as the teacher gives it; pairs without an answer are left out",
    "preferences": "`query_id`, `first_id`, `second_id`, `probability` that the first document beats the second",
    "rankings": "`query_id`, `document_ids`, best first",
}


def _card(source: Source, licence: str, about: str, counts: dict[str, int]) -> str:
    from huggingface_hub import DatasetCardData

    store, collection = source.store, source.collection
    identity = store.identity
    entries = store.ledger()
    teacher = {
        **identity,
        "fingerprint": fingerprint(identity),
        "query_prompt": source.query_prompt,
        "document_prompt": source.document_prompt,
    }
    configs = [
        {"config_name": kind, "data_files": [{"split": source.split, "path": f"{kind}/{source.split}.parquet"}]}
        for kind in counts
    ]
    header = DatasetCardData(
        license=licence,
        pretty_name=f"Teacher scores of {store.folder.name} on {collection.name}",
        tags=["information-retrieval", "knowledge-distillation", "retrieval-kd"],
        configs=configs,
        teacher=teacher,
        collection=collection.name,
        counts=counts,
    ).to_yaml()
    table = "\n".join(f"| {kind} | {count:,} | {COLUMNS[kind]} |" for kind, count in counts.items())
    seconds = sum(entry["seconds"] for entry in entries)
    days = f"{entries[0]['time'][:10]} to {entries[-1]['time'][:10]}" if entries else "on unknown days"
    return f"""---
{header}
---

# Teacher scores: {store.folder.name} on {collection.name}

{about}

| kind | rows | columns |
|---|---:|---|
{table}

Ids are those of `{collection.name}`, split `{source.split}`.

The teacher, with all that its answers depend on (prompts are part of the text that it reads):

```json
{json.dumps(teacher, indent=2, ensure_ascii=False)}
```

Made with retrieval_kd {__version__}, {days}, in {seconds:,.0f} s of work; written on {date.today().isoformat()}.
Read it back with `rkd scores import pairs scores/{source.split}.parquet --collection {collection.name} --teacher NAME`.
"""


def open_source(store: Store, collection: str, split: str, query_prompt: str = "", document_prompt: str = "") -> Source:
    """A source with its collection loaded by name."""
    source = Source(store, load_collection(collection, [split]), split, query_prompt, document_prompt)
    source.collection.split(split)
    return source
