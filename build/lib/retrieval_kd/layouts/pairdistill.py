"""PairDistill's pairs.train.jsonl (arXiv:2410.01383): scores, and log probabilities that one beats another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retrieval_kd.layouts import Record
from retrieval_kd.layouts._files import (
    from_objects,
    identifier,
    need_ids,
    need_scores,
    number,
    published,
    shown,
    write_objects,
)

FORM = "[qid, [pid, score, [[j, log P(this beats item j)], ...]], ...]"
USES = ("scores", "preferences")
LEAST = 2.0**-126  # the smallest ordinary float32, for the logarithm of a probability of 0


def read(path: Path) -> Iterator[Record]:
    """One record a line."""
    return from_objects(path, FORM, _parse)


def _parse(value: Any, where: str) -> Record:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{shown(value)} is not a list of a query and its documents")
    query, *items = value
    preferences = []
    for place, item in enumerate(items):
        if not isinstance(item, list) or len(item) != 3 or not isinstance(item[2], list):
            raise ValueError(f"{shown(item)} is not [pid, score, pairs]")
        for pair in item[2]:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
                raise ValueError(f"{shown(pair)} is not [j, log P]")
            if not 0 <= pair[0] < len(items) or pair[0] == place:
                raise ValueError(f"item {place} is compared with item {pair[0]} of {len(items)}")
            if number(pair[1]) > 1e-6:
                raise ValueError(f"{pair[1]} is above 0, so it is no logarithm of a probability")
            preferences.append((place, pair[0], math.exp(min(0.0, number(pair[1])))))
    return Record(
        query_id=identifier(query),
        document_ids=[identifier(item[0]) for item in items],
        scores=[number(item[1]) for item in items],
        preferences=preferences,
        where=where,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    """One line a query, documents by falling score; a probability of 0 is written as the smallest float32."""
    write_objects(path, map(_value, records))


def _value(record: Record) -> list[Any]:
    query, documents = need_ids(record)
    scores = need_scores(record)
    order = sorted(range(len(documents)), key=lambda place: -scores[place])
    new_place = {place: new for new, place in enumerate(order)}
    pairs: dict[int, list[tuple[int, float]]] = {}
    for first, second, probability in record.preferences or []:
        pairs.setdefault(first, []).append((new_place[second], math.log(max(probability, LEAST))))
    items = [[published(documents[place]), scores[place], pairs.get(place, [])] for place in order]
    return [published(query), *items]
