"""Scores that others published, or that came from elsewhere: a file in one of the layouts of `retrieval_kd.layouts`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import model_validator

from retrieval_kd.files import hash_texts, sha256
from retrieval_kd.layouts import Record, check_layout, read_records
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.operations import unknown_rows
from retrieval_kd.store.parts import schema_of
from retrieval_kd.store.store import Store
from retrieval_kd.tables import Table
from retrieval_kd.types import Collection, InputError

BATCH = 2**20  # judgements that are put into the store at once


class Options(Table):
    """Which file, and how it is read."""

    file: Path
    layout: str
    beside: Path | None = None  # the second file, of layouts that are two
    match: Literal["id", "text"] = "id"  # where the layout has both: what says which text is meant
    allow_unknown: bool = False  # drop and count queries and documents that the collection lacks

    @model_validator(mode="after")
    def _readable(self) -> Options:
        check_layout(self.layout, self.file, self.beside)
        return self


class Imported:
    """Judges nothing itself: what its file says is put into the store, and a pair that it lacks has no answer."""

    def __init__(self, options: Options, collection: Collection) -> None:
        self.options = options
        self.collection = collection

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The file by its hash, and the collection: it says which texts the file's ids mean."""
        files = {"source": self.options.file, "beside": self.options.beside}
        return {
            "kind": "imported",
            "layout": self.options.layout,
            "match": self.options.match,
            **{name: sha256(path) for name, path in files.items() if path},
            "collection": hash_texts(text for side in self._sides for text in (*side.ids, *side.texts)),
        }

    def render(self, texts: Sequence[str], side: str) -> list[str]:
        return list(texts)

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """NaN: what the file holds is in the store already."""
        return np.full(len(queries), np.nan, np.float32)

    def read_into(self, store: Store) -> dict[str, int]:
        """Put the file's scores, preferences and rankings into the store, those that it lacks.

        Read again, it adds nothing; stopped, it goes on. Of two scores of one pair the lower counts,
        as everywhere in the store. Returns counts: `scores`, `preferences` and `rankings` added;
        `conflicts`, scores that differ from one that the pair had already; and what
        `allow_unknown` dropped, `unknown_queries` and `unknown_documents`. Raises InputError for a malformed
        line, for an unknown query or document, and for a file without judgements.
        """
        began = time.monotonic()
        counts: Counter[str] = Counter()
        waiting, judged = _Waiting(), 0
        for record in read_records(self.options.layout, self.options.file, self.options.beside):
            judged += waiting.add(*self._mapped(record, counts))
            if len(waiting) >= BATCH:
                waiting.put(store, counts)
                waiting = _Waiting()
        waiting.put(store, counts)
        if not judged:
            raise InputError(
                f"{self.options.file} holds no scores, preferences or rankings, as layout "
                f"{self.options.layout!r} has them; there is nothing to import."
            )
        added = {name: counts[name] for name in ("scores", "preferences", "rankings")}
        if any(added.values()):
            store.record(pairs=sum(added.values()), texts=0, tokens=None, seconds=time.monotonic() - began)
        return added | {name: counts[name] for name in ("conflicts", "unknown_queries", "unknown_documents")}

    @cached_property
    def _sides(self) -> tuple[_Side, _Side]:
        splits = [self.collection.splits[name] for name in sorted(self.collection.splits)]
        ids = [id_ for split in splits for id_ in split.ids]
        queries = _Side("query", ids, [text for split in splits for text in split.texts])
        return queries, _Side("document", self.collection.document_ids, self.collection.documents)

    def _mapped(self, record: Record, counts: Counter[str]) -> tuple[int, list[int | None], Record]:
        """The keys of a record's query and documents; None for a document that is dropped."""
        queries, documents = self._sides
        query = self._find(queries, record.query_id, record.query, record.where)
        if query is None:
            counts["unknown_queries"] += 1
            return 0, [None] * len(record), record
        found = [
            self._find(
                documents,
                None if record.document_ids is None else record.document_ids[place],
                None if record.documents is None else record.documents[place],
                record.where,
            )
            for place in range(len(record))
        ]
        counts["unknown_documents"] += found.count(None)
        return query, found, record

    def _find(self, side: _Side, id_: str | None, text: str | None, where: str) -> int | None:
        if self.options.match == "text" and text is None:
            raise InputError(f"{where}: layout {self.options.layout!r} has no text of the {side.name} to go by.")
        by_id = id_ is not None and self.options.match == "id"
        key = side.by_id.get(id_ or "") if by_id else side.by_text.get(text or "")
        if key is None and not self.options.allow_unknown:
            shown = repr(id_) if by_id else f"with the text {(text or '')[:60]!r}"
            raise InputError(
                f"{where}: {side.name} {shown} is not in collection {self.collection.name!r}; to drop and count "
                "such, give --allow-unknown, or allow_unknown = true in a recipe."
            )
        return key


@dataclass
class _Side:
    """The queries or the documents of a collection, and the keys of their texts."""

    name: str
    ids: Sequence[str]
    texts: Sequence[str]

    @cached_property
    def keys(self) -> list[int]:
        return [int(key) for key in text_keys(self.texts)]

    @cached_property
    def by_id(self) -> dict[str, int]:
        return dict(zip(self.ids, self.keys, strict=True))

    @cached_property
    def by_text(self) -> dict[str, int]:
        return dict(zip(self.texts, self.keys, strict=True))


class _Waiting:
    """Judgements on their way into the store, in columns."""

    def __init__(self) -> None:
        self.scores: tuple[list[int], list[int], list[float]] = [], [], []
        self.preferences: tuple[list[int], list[int], list[int], list[float]] = [], [], [], []
        self.rankings: tuple[list[int], list[list[int]]] = [], []

    def __len__(self) -> int:
        return len(self.scores[0]) + len(self.preferences[0]) + sum(map(len, self.rankings[1]))

    def add(self, query: int, keys: list[int | None], record: Record) -> bool:
        """Take a record's judgements of documents that have a key; whether it has any judgements at all."""
        for key, score in zip(keys, record.scores or (), strict=record.scores is not None):
            if key is not None:
                _append(self.scores, query, key, score)
        for first, second, probability in record.preferences or ():
            pair = keys[first], keys[second]
            if None not in pair:
                _append(self.preferences, query, *pair, probability)
        # two documents with one text are one key, at the better of their places
        ranked = [key for key in dict.fromkeys(keys[place] for place in record.ranking or ()) if key is not None]
        if ranked:
            _append(self.rankings, query, ranked)
        return bool(record.scores or record.preferences or record.ranking)

    def put(self, store: Store, counts: Counter[str]) -> None:
        """Append what the store lacks."""
        queries, documents = (np.array(column, np.uint64) for column in self.scores[:2])
        scores = np.array(self.scores[2], np.float32)
        if len(scores):
            order = np.lexsort((scores, documents, queries))
            queries, documents, scores = queries[order], documents[order], scores[order]
            again = np.zeros(len(order), np.bool_)
            again[1:] = (queries[1:] == queries[:-1]) & (documents[1:] == documents[:-1])
            counts["conflicts"] += int((again[1:] & (scores[1:] != scores[:-1])).sum())
            known, found = store.find_scores(queries, documents)
            counts["conflicts"] += int((found & ~again & ~np.isnan(known) & (scores != known)).sum())
            new = ~again & ~(known <= scores)  # also where the store has NaN, for no answer
            store.append_scores(queries[new], documents[new], scores[new])
            counts["scores"] += int(new.sum())
        if self.preferences[0]:
            table = unknown_rows(store, "preferences", pa.table(list(self.preferences), schema_of("preferences")))
            store.append_preferences(*(column.to_numpy() for column in table.columns))
            counts["preferences"] += len(table)
        if self.rankings[0]:
            table = unknown_rows(store, "rankings", pa.table(list(self.rankings), schema_of("rankings")))
            lists = [np.array(keys, np.uint64) for keys in table.column(1).to_pylist()]
            store.append_rankings(table.column(0).to_numpy(), lists)
            counts["rankings"] += len(table)


def _append(columns: tuple[list[Any], ...], *values: Any) -> None:
    for column, value in zip(columns, values, strict=True):
        column.append(value)


def load(options: Options, collection: Collection) -> Imported:
    """Make the teacher; the file is read when the store lacks a pair."""
    return Imported(options, collection)
