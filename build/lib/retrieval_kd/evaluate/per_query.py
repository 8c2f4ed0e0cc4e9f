"""Values of systems query by query: read, written, and those of several places joined."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.files import atomic, read_lines
from retrieval_kd.metrics import parse_metric
from retrieval_kd.types import InputError

PER_QUERY = "per_query.tsv"  # of a report folder

Quality = Mapping[str, NDArray[np.float64]]  # metric -> (Q,)


@dataclass(frozen=True)
class Measured:
    """Per-query values of several systems over the same queries. Shapes: every value (Q,).

    `bounded` names the recalls of a system that the length of its lists bounds, where that is known: no file keeps it.
    """

    query_ids: Sequence[str]
    systems: Mapping[str, Quality]
    bounded: Mapping[str, Sequence[str]] = field(default_factory=dict)


def bounded(metrics: Iterable[str], depth: int, documents: int | None = None) -> list[str]:
    """The recalls among the metrics for which lists of `depth` results, of so many documents, are too short."""
    return [metric for metric in metrics if parse_metric(metric).is_bounded(depth, documents)]


def read_per_query(path: Path) -> Measured:
    """Read per_query.tsv, or that of the report folder `path`: a line for each query and system, metrics in columns.

    A metric that some system lacks is left out of it. Raises InputError where systems have other queries.
    """
    file = path / PER_QUERY if path.is_dir() else path
    rows = csv.reader((line for _, line in read_lines(file)), delimiter="\t")
    head = next(rows, [])
    if head[:2] != ["query", "system"] or len(head) < 3:
        raise InputError(f"{file}:1: expected the columns query, system, and metrics, found {head}.")
    found: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise InputError(f"{file}:{number}: {len(row)} columns, the first line has {len(head)}.")
        if row[0] in found.setdefault(row[1], {}):
            raise InputError(f"{file}:{number}: query {row[0]!r} of system {row[1]!r} occurs a second time.")
        found[row[1]][row[0]] = row[2:]
    if not found:
        raise InputError(f"{file} holds no values.")
    ids = list(next(iter(found.values())))
    systems: dict[str, Quality] = {}
    for system, of_query in found.items():
        if of_query.keys() != set(ids):
            raise InputError(f"{file}: system {system!r} has values of other queries than the first system.")
        columns = dict(zip(head[2:], zip(*(of_query[query_id] for query_id in ids), strict=True), strict=True))
        try:
            systems[system] = {name: np.array(column, np.float64) for name, column in columns.items() if all(column)}
        except ValueError as error:
            raise InputError(f"{file}: system {system!r}: {error}.") from None
    return Measured(ids, systems)


def write_per_query(path: Path, measured: Measured) -> None:
    """Write what `read_per_query` reads, atomically."""
    metrics = list(dict.fromkeys(metric for quality in measured.systems.values() for metric in quality))
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["query", "system", *metrics])
        for system, quality in measured.systems.items():
            for place, query_id in enumerate(measured.query_ids):
                values = [repr(float(quality[metric][place])) if metric in quality else "" for metric in metrics]
                writer.writerow([query_id, system, *values])


def join(parts: Mapping[str, Measured]) -> Measured:
    """Systems from several places over the same queries, in the order of the first; equal names are told apart.

    The keys say where each is from. Raises InputError if the queries are not the same.
    """
    first, ids = next((name, part.query_ids) for name, part in parts.items())
    names = [system for part in parts.values() for system in part.systems]
    systems: dict[str, Quality] = {}
    short: dict[str, Sequence[str]] = {}
    for where, part in parts.items():
        if differing := set(part.query_ids) ^ set(ids):
            raise InputError(
                f"{where} and {first} are of other queries ({sorted(differing)[0]!r} is in one alone); only results of "
                "the same queries can be compared."
            )
        place = {query_id: number for number, query_id in enumerate(part.query_ids)}
        order = [place[query_id] for query_id in ids]
        for system, quality in part.systems.items():
            name = system if names.count(system) == 1 else f"{where}: {system}"
            systems[name] = {metric: values[order] for metric, values in quality.items()}
            short[name] = part.bounded.get(system, ())
    return Measured(ids, systems, short)
