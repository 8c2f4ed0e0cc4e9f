"""Lines of a query, a positive, a negative and their two scores, in either order of cells, by id or by text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    cell,
    from_cells,
    need_ids,
    need_scores,
    need_texts,
    number,
    split_places,
    write_lines,
)


def read_triples(path: Path, form: str, scores_first: bool, by_text: bool) -> Iterator[Record]:
    """One record a line: positive, then negative."""

    def parse(cells: list[str], where: str) -> Record:
        if scores_first:
            better, worse, query, positive, negative = cells
        else:
            query, positive, negative, better, worse = cells
        scores, marks = [number(better), number(worse)], [True, False]
        if by_text:
            return Record(query=query, documents=[positive, negative], scores=scores, positive=marks, where=where)
        return Record(query_id=query, document_ids=[positive, negative], scores=scores, positive=marks, where=where)

    return from_cells(path, form, parse)


def write_triples(path: Path, records: Iterable[Record], scores_first: bool, by_text: bool) -> None:
    """Every pair of a positive and another document of each record."""
    write_lines(path, _lines(records, scores_first, by_text))


def _lines(records: Iterable[Record], scores_first: bool, by_text: bool) -> Iterator[str]:
    for record in records:
        scores = need_scores(record)
        query, documents = need_texts(record) if by_text else need_ids(record)
        positives, negatives = split_places(record)
        for positive in positives:
            for negative in negatives:
                numbers = [f"{scores[positive]!r}", f"{scores[negative]!r}"]
                names = [cell(query), cell(documents[positive]), cell(documents[negative])]
                yield "\t".join(numbers + names if scores_first else names + numbers)
