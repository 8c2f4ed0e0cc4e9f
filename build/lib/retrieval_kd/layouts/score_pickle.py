"""Scores of sentence-transformers: cross-encoder-ms-marco-MiniLM-L-6-v2-scores.pkl.gz. Read whole: one pickle."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from retrieval_kd.files import atomic
from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import CODECS, identifier, malformed, need_ids, need_scores, number, published, shown
from retrieval_kd.layouts._pickles import load_pickle

FORM = "a pickle of {query id: {document id: score}}"


def read(path: Path) -> Iterator[Record]:
    """One record a query. Only dictionaries, numbers and strings are unpickled."""
    for query, scores in load_pickle(path, FORM).items():
        where = f"{path}: query {shown(query)}"
        try:
            if not isinstance(scores, dict):
                raise ValueError(f"{shown(scores)} is not a dictionary")
            yield Record(
                query_id=identifier(query),
                document_ids=[identifier(document) for document in scores],
                scores=[number(score) for score in scores.values()],
                where=where,
            )
        except ValueError as error:
            raise malformed(where, FORM, error) from None


def write(path: Path, records: Iterable[Record]) -> None:
    """One dictionary of all queries, held in memory."""
    found: dict[int | str, dict[int | str, float]] = {}
    for record in records:
        query, documents = need_ids(record)
        pairs = zip(map(published, documents), need_scores(record), strict=True)
        found.setdefault(published(query), {}).update(pairs)
    with atomic(path) as scratch, pa.output_stream(str(scratch), compression=CODECS.get(path.suffix)) as stream:
        stream.write(pickle.dumps(found))
