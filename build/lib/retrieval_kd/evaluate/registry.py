"""What is known of public test collections (collections.toml): how they are measured, and what they must hold."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pydantic import model_validator

from retrieval_kd.metrics import parse_metric
from retrieval_kd.tables import Positive, Table, did_you_mean, parse
from retrieval_kd.types import ORIGINAL, Collection, InputError, Queries

FILE = Path(__file__).with_name("collections.toml")


class Entry(Table):
    """A collection with one set of judged queries; or `parts`, whose mean it is. The keys are explained in the file."""

    irds: str | None = None
    split: str = "test"
    folder: str | None = None
    folder_split: str = "test"
    parts: tuple[str, ...] = ()
    metric: str = "nDCG@10"
    relevance: Positive = 1
    self_ids: bool = False
    documents: Positive | None = None
    queries: Positive | None = None
    judgements: Positive | None = None
    absent_documents: bool = False
    bm25: Mapping[str, float] = {}
    source: str | None = None
    tolerance: float = 0.01

    @model_validator(mode="after")
    def _is_whole(self) -> Entry:
        if not (self.parts or self.irds or self.folder):
            raise ValueError("say where the collection is: irds, folder, or parts")
        if bool(self.bm25) != bool(self.source):
            raise ValueError("figures of BM25 and their source go together")
        for name in (self.metric, *self.bm25):
            parse_metric(name)
        return self


@cache
def registry(file: Path = FILE) -> dict[str, Entry]:
    """Every known collection by name."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    entries = {name: parse(Entry, table, f"{file}: {name}") for name, table in tables.items()}
    for name, entry in entries.items():
        if unknown := [part for part in entry.parts if part not in entries]:
            raise InputError(f"{file}: {name}: there is no part {unknown[0]!r}{did_you_mean(unknown[0], [*entries])}.")
    return entries


def load_known(name: str, entry: Entry) -> tuple[Collection, str]:
    """The collection of an entry, and the split of it that is measured.

    From its BEIR folder below RKD_DATA where that is there, else through ir_datasets. Raises InputError where neither
    has it: some licences allow no distribution.
    """
    local = Path(os.environ["RKD_DATA"], entry.folder) if "RKD_DATA" in os.environ and entry.folder else None
    if local is not None and (local / "corpus.jsonl").is_file():
        from retrieval_kd.data.beir import load_beir

        return load_beir(local, [entry.folder_split], entry.absent_documents), entry.folder_split
    if entry.irds is None:
        raise InputError(
            f"collection {name!r} is not in ir_datasets (its licence); make its BEIR folder, and put it at "
            f"{local or Path('$RKD_DATA', entry.folder or '')}."
        )
    from retrieval_kd.data.irds import load_irds

    return load_irds(entry.irds, [entry.split], entry.absent_documents), entry.split


def count_mismatches(entry: Entry, documents: int, qrels: Sequence[Mapping[int, int]], dropped: int = 0) -> list[str]:
    """What this copy of a collection holds more or less of than the published one, a line each.

    `dropped` judgements named absent documents; with them, queries that had no other may be gone.
    """
    found = []
    if entry.documents is not None and documents != entry.documents:
        found.append(f"{documents:,} documents, {entry.documents:,} expected")
    if entry.queries is not None and not entry.queries - dropped <= len(qrels) <= entry.queries:
        found.append(f"{len(qrels):,} queries with judgements, {entry.queries:,} expected")
    judgements = sum(map(len, qrels)) + dropped
    if entry.judgements is not None and judgements != entry.judgements:
        found.append(f"{judgements:,} judgements, {entry.judgements:,} expected")
    return found


@dataclass(frozen=True)
class Judged:
    """A collection with one set of judged queries, and how results on it are measured.

    `entry` is what is known of it, None for one that the registry does not have; `notes` are for the report.
    """

    name: str
    collection: Collection
    split: str
    queries: Queries
    metric: str
    relevance: int
    self_ids: bool
    entry: Entry | None
    notes: Sequence[str]


def open_judged(
    name: str,
    split: str | None = None,
    *,
    metric: str | None = None,
    relevance: int | None = None,
    self_ids: bool | None = None,
    query: str = ORIGINAL,
    allow_mismatch: bool = False,
    allow_unknown_qrels: bool = False,
) -> Judged:
    """Load a collection that the registry knows by `name`, or any other, by its test split if none is named.

    What is given here goes before what the registry says; `query` names a rendering of the queries. Raises InputError
    when a known collection does not hold what it must, unless `allow_mismatch`: then the notes say so.
    """
    entry = registry().get(name)
    if entry is not None and entry.parts:
        raise InputError(f"{name} is the mean of {len(entry.parts)} collections; name one: {', '.join(entry.parts)}.")
    known = entry if entry is not None and split in (None, entry.split) else None
    if known is not None:
        collection, found = load_known(name, known)
    else:
        from retrieval_kd.data import load_collection

        found = split or "test"
        collection = load_collection(name, [found], allow_unknown_qrels)
    queries = collection.split(found)
    if not queries.qrels:
        raise InputError(f"split {found!r} of {name!r} has no judgements, so nothing can be measured on it.")
    root = os.environ.get("RKD_DATA")
    notes = [note.replace(str(Path(root)), "$RKD_DATA") if root else note for note in collection.notes]
    if known is not None:
        wrong = count_mismatches(known, len(collection), queries.qrels, collection.dropped.get(found, 0))
        if wrong and not allow_mismatch:
            raise InputError(
                f"this copy of {name} is not the published one: {'; '.join(wrong)}. Get another copy, or set "
                "allow_mismatch = true for it in the suite, and its figures are reported with this line."
            )
        notes += [f"not the published {name}: {line}" for line in wrong]
    if query != ORIGINAL:
        queries = replace(queries, texts=collection.query_texts(queries, query))
        notes.append(f"queries as {query!r} has them")
    how = entry or Entry(folder=name)
    return Judged(
        name,
        collection,
        found,
        queries,
        str(parse_metric(metric or how.metric)),
        relevance or how.relevance,
        how.self_ids if self_ids is None else self_ids,
        known,
        notes,
    )
