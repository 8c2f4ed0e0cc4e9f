"""Reports as one HTML file that needs nothing else: tables that sort, plots, and systems compared query by query.

What a page shows is JSON inside it, which a page without network, server or library draws. `report_page` makes the page
of a report; other tables and plots are pages too, with the same keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_kd.evaluate.per_query import Quality
from retrieval_kd.figures import plain
from retrieval_kd.files import atomic
from retrieval_kd.types import Collection, Hits, Queries

if TYPE_CHECKING:
    from retrieval_kd.report import System

TEMPLATE, _PLACE = "report.html", "{page}"
Cell = tuple[float | str | None, str]  # what a column is sorted by, None where it is not known; and what is printed

WITH_DOCUMENTS = 300  # queries whose documents are in the page: those on which the systems differ most
FOUND, RELEVANT = 3, 5  # documents of a query in the page: the best of a system, and those that are relevant
CHARACTERS = 240  # of a document's text
BINS = 30  # of a histogram of scores
EDGES = (0.001, 0.999)  # quantiles of the scores between which the bins lie


def write_html(path: Path, page: Mapping[str, Any]) -> None:
    """Write a page, atomically.

    Keys: `title`; `subtitle`; `tables`, from `table_of`; `plots`, from `plot_of`; `steps` (None, or `title`, `y_label`,
    `caption` and `steps`: `name`, `value`, `low`, `high`, `text`); `queries` (None, or from `queries_of` or
    `values_of`); `histograms`, from `histogram_of`; `lists`: `title` and `items`.
    """
    template = files("retrieval_kd").joinpath(TEMPLATE).read_text(encoding="utf-8")
    assert template.count(_PLACE) == 1, "one place for the page's data"
    data = json.dumps(page, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # no text may end the element that holds it
        data = data.replace(character, f"\\u{ord(character):04x}")
    with atomic(path) as scratch:
        scratch.write_text(template.replace(_PLACE, data), encoding="utf-8")


def report_page(
    report: Mapping[str, Any],
    table: Mapping[str, Any],
    systems: Sequence[System],
    queries: Queries,
    collection: Collection,
) -> dict[str, Any]:
    """The page of what `write_report` returns, whose systems are those of `systems`, in their order."""
    records: Mapping[str, Any] = report["systems"]
    metric = report["test"]["metric"]
    shown: list[dict[str, Any]] = []
    for title, key, unit, caption in (
        ("Quality against latency", "query_p50_ms", "encoding a query, p50 ms, one thread", "Dashed: not timed."),
        ("Quality against size", "bytes", "query encoder on disk, MB", ""),
    ):
        scale = 1.0 if key.endswith("ms") else 1e-6
        points = [
            point_of(name, record["engine"], record[metric], record["interval"], record[key] * scale)
            for name, record in records.items()
            if record[key]
        ]
        lines = [] if key == "bytes" else [(name, one[metric]) for name, one in records.items() if not one[key]]
        if points:
            shown.append(plot_of(title, points, unit, metric, lines, caption if lines else ""))
    return {
        "title": f"{report['collection']}, {report['split']}",
        "subtitle": f"{report['queries']:,} queries, {report['documents']:,} documents",
        "tables": [table],
        "plots": shown,
        "steps": None,
        "queries": queries_of(systems, queries, collection, metric, report["baseline"]),
        "histograms": [one for system in systems if (one := histogram_of(system.name, system.hits, queries))],
        "lists": [
            {"title": "Notes on the collection", "items": report["notes"]},
            {"title": "Facts", "items": [f"{key}: {plain(value)}" for key, value in report["facts"].items()]},
            {"title": "Machine", "items": [f"{key}: {plain(value)}" for key, value in report["machine"].items()]},
        ],
    }


def table_of(
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    low_first: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> dict[str, Any]:
    """A table with lines below it; the columns `low_first` are sorted from the lowest value at the first click.

    Columns in which nothing is known are left out.
    """
    known = [place for place in range(len(heads)) if any(row[place][0] is not None for row in rows)]
    columns = [
        {
            "label": heads[place],
            "numeric": not any(isinstance(row[place][0], str) for row in rows),
            "low_first": heads[place] in low_first,
        }
        for place in known
    ]
    shown = [[list(row[place]) for place in known] for row in rows]
    return {"title": title, "columns": columns, "rows": shown, "captions": list(captions)}


def point_of(
    name: str, group: str, value: float, interval: Sequence[float] | None, at: float, front: bool | None = None
) -> dict[str, Any]:
    """A point of a plot; `front` says whether it is on the Pareto front, None where there is none."""
    low, high = interval or (None, None)
    return {"name": name, "group": group, "y": value, "low": low, "high": high, "x": at, "front": front}


def plot_of(
    title: str,
    points: Sequence[Mapping[str, Any]],
    x_label: str,
    y_label: str,
    lines: Sequence[tuple[str, float]] = (),
    caption: str = "",
) -> dict[str, Any]:
    """A plot of points over a logarithmic axis; `lines` are values without a place on it."""
    across = [{"name": name, "y": value} for name, value in lines]
    labels = {"title": title, "x_label": x_label, "y_label": y_label, "caption": caption}
    return {**labels, "points": list(points), "lines": across}


def queries_of(
    systems: Sequence[System], queries: Queries, collection: Collection, metric: str, baseline: str
) -> dict[str, Any]:
    """Every query's values in every system, and texts: of all queries, and of the documents where systems differ most.

    The page opens with the baseline beside the last system.
    """
    grid = np.array([system.quality[metric] for system in systems])  # (systems, Q)
    chosen = np.argsort(-np.ptp(grid, axis=0), kind="stable")[:WITH_DOCUMENTS].tolist()
    relevant: dict[int, list[int]] = {}
    for number in chosen:
        grades = queries.qrels[number] if queries.qrels else {}
        relevant[number] = sorted((row for row in grades if grades[row] > 0), key=lambda row: -grades[row])[:RELEVANT]
    found: list[dict[int, list[int]] | None] = []
    for system in systems:
        hits = system.hits
        found.append(None if hits is None else {number: _best(hits, number) for number in chosen})
    wanted = {row for lists in (relevant, *filter(None, found)) for rows in lists.values() for row in rows}
    ids = collection.document_ids
    last = [system.name for system in systems if system.name != baseline][-1:]
    quality = {system.name: system.quality for system in systems}
    return {
        **values_of(queries.ids, queries.texts, quality, metric, (baseline, *last)),
        "relevant": {number: [ids[row] for row in rows] for number, rows in relevant.items()},
        "found": [one and {number: [ids[row] for row in rows] for number, rows in one.items()} for one in found],
        "documents": {ids[row]: _cut(collection.documents[row]) for row in sorted(wanted)},
    }


def values_of(
    query_ids: Sequence[str], texts: Sequence[str], systems: Mapping[str, Quality], metric: str, first: Sequence[str]
) -> dict[str, Any]:
    """Every query's values in every system by the metrics that all have, `metric` first, and its text.

    The page opens with the two systems `first`, of which the second is the challenger. Shapes: every value (Q,).
    """
    names, qualities = list(systems), list(systems.values())
    shared = [name for name in qualities[0] if all(name in quality for quality in qualities)]
    shared.sort(key=lambda name: name != metric)
    return {
        "systems": names,
        "first": [names.index(first[0]), names.index(first[-1])],
        "ids": list(query_ids),
        "texts": [_cut(text) for text in texts],
        "values": {name: [np.round(quality[name], 4).tolist() for quality in qualities] for name in shared},
        "relevant": {},
        "found": [None] * len(names),
        "documents": {},
    }


def histogram_of(name: str, hits: Hits | None, queries: Queries) -> dict[str, Any] | None:
    """The scores that a system gives to relevant results and to the others, as shares of each group; None without both.

    Scores beyond the bins count in the last one.
    """
    if hits is None or not queries.qrels:
        return None
    valid = hits.valid & np.isfinite(hits.scores)
    scores = np.asarray(hits.scores)[valid].astype(np.float64)
    good = np.zeros(hits.rows.shape, np.bool_)
    for number, grades in enumerate(queries.qrels):
        good[number] = np.isin(hits.rows[number], [row for row, grade in grades.items() if grade > 0])
    good = good[valid]
    if not good.any() or good.all():
        return None
    low, high = (float(end) for end in np.quantile(scores, EDGES))
    low, high = min(low, float(scores[good].min())), max(high, float(scores[good].max()))
    if high <= low:
        return None
    scores = np.clip(scores, low, high)
    shares = [np.histogram(some, BINS, (low, high))[0] / len(some) for some in (scores[good], scores[~good])]
    relevant, other = ([round(float(share), 5) for share in one] for one in shares)
    return {"name": name, "range": [low, high], "relevant": relevant, "other": other}


def _best(hits: Hits, number: int) -> list[int]:
    """The first rows of a query's results."""
    order = np.argsort(-hits.scores[number], kind="stable")
    rows = hits.rows[number][order]
    return [int(row) for row in rows[rows >= 0][:FOUND]]


def _cut(text: str) -> str:
    """A text of at most CHARACTERS, cut between words."""
    flat = " ".join(text.split())
    return flat if len(flat) <= CHARACTERS else flat[:CHARACTERS].rsplit(" ", 1)[0] + " …"
