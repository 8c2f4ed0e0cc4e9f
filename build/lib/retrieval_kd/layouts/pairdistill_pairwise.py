"""PairDistill's pairwise answers (arXiv:2410.01383): logits that the first document is the more relevant, or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import from_cells, number

FORM = "query_id\tfirst_id\tsecond_id\tlogit_true\tlogit_false"


def read(path: Path) -> Iterator[Record]:
    """One record for the lines of a query that follow each other; P is the softmax of its two logits."""

    def parse(cells: list[str], where: str) -> tuple[str, str, str, float, str]:
        margin = number(cells[3]) - number(cells[4])
        return cells[0], cells[1], cells[2], 0.5 + 0.5 * math.tanh(margin / 2), where  # the logistic function

    for query, group in groupby(from_cells(path, FORM, parse), key=lambda row: row[0]):
        rows = list(group)
        places: dict[str, int] = {}
        for _, first, second, _, _ in rows:
            places.setdefault(first, len(places))
            places.setdefault(second, len(places))
        pairs = [(places[first], places[second], probability) for _, first, second, probability, _ in rows]
        yield Record(query, None, list(places), preferences=pairs, where=rows[0][4])
