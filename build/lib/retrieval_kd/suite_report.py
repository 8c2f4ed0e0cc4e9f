"""The report of a suite: collections by systems, what was expected, and each collection's comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrieval_kd.compare import markdown
from retrieval_kd.evaluate.cost import machine
from retrieval_kd.evaluate.registry import Entry, registry
from retrieval_kd.evaluate.significance import LEVEL
from retrieval_kd.figures import decimals, markdown_table, plain
from retrieval_kd.files import atomic, write_json
from retrieval_kd.metrics import parse_metric
from retrieval_kd.suite import Suite, SuiteCollection
from retrieval_kd.tables import did_you_mean
from retrieval_kd.types import InputError

Report = dict[str, Any]
SCORE_TEXTS = ("collection", "metric")  # columns of `score_table`


def suite_report(name: str, suite: Suite, measured: Sequence[Mapping[str, Any]]) -> Report:
    """All that a report says, in JSON types. `measured` are the comparisons of the collections, with their notes."""
    collections = [{**one, "published": _published(suite, one)} for one in measured]
    return {
        "suite": name,
        "depth": suite.depth,
        "systems": {system.name: system.model_dump(mode="json", exclude={"name"}) for system in suite.systems},
        "collections": collections,
        "scores": _scores(suite, collections),
        "left_out": [table.title for table in suite.collections if not _found(table.name, table.title, collections)],
        "checks": _checks(suite, collections),
        "machine": machine(),
    }


def write_suite_report(folder: Path, report: Report) -> None:
    """Write report.json and report.md."""
    write_json(folder / "report.json", report)
    with atomic(folder / "report.md") as scratch:
        scratch.write_text(_text(report), encoding="utf-8")


def check_expected(suite: Suite) -> None:
    """InputError for an expected figure of a collection, or by a metric, that the suite does not measure."""
    entries = registry()
    measured: dict[str, list[str]] = {}
    for table in suite.collections:
        entry = entries.get(table.name)
        if entry is not None and entry.parts:
            measured |= {part: metrics_of(suite, table, entries[part]) for part in entry.parts}
        else:
            measured[table.title] = metrics_of(suite, table, entry)
    for one in suite.expected:
        if one.collection not in measured:
            known = did_you_mean(one.collection, sorted(measured))
            raise InputError(f"expected: there is no collection {one.collection!r} in the suite{known}.")
        for metric in (str(parse_metric(name)) for name in one.scores):
            if metric not in measured[one.collection]:
                raise InputError(f"expected: {metric} is not measured on {one.collection}; add it to `metrics`.")


def metrics_of(suite: Suite, table: SuiteCollection, entry: Entry | None) -> list[str]:
    """What is measured on a collection: what is tested, what the suite names, and what is published of BM25.

    `entry` is what is known of it, perhaps of another split than the one measured.
    """
    known = entry or Entry(folder=table.name)
    published = known.bm25 if table.split in (None, known.split) else {}
    names = [table.metric or known.metric, *suite.metrics, *published]
    return list(dict.fromkeys(str(parse_metric(name)) for name in names))


def score_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a line for each collection, and the mean of those with the same metric.

    A figure is followed by the letters of the systems that it beats significantly on its collection.
    """
    names = list(report["systems"])
    letters = {name: record["letter"] for one in report["collections"] for name, record in one["systems"].items()}
    beaten = {
        (one["collection"], name): " ".join(letters[other] for other in names if other in record["beats"])
        for one in report["collections"]
        for name, record in one["systems"].items()
    }
    heads = ["collection", "metric", "queries", *(f"{name} ({letters[name]})" for name in names)]
    rows = []
    for line in report["scores"]:
        cells = [
            f"{decimals(line['scores'][name])} {beaten.get((line['collection'], name), '')}".rstrip() for name in names
        ]
        queries = f"{line['queries']:,}" if line["queries"] is not None else ""
        rows.append([line["collection"], line["metric"], queries, *cells])
    return heads, rows


def _scores(suite: Suite, collections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The primary metric of each collection that the suite names, then its mean over collections, by metric."""
    names = [system.name for system in suite.systems]
    lines: list[dict[str, Any]] = []
    for table in suite.collections:
        found = _found(table.name, table.title, collections)
        if not found:
            continue
        metric = found[0]["metric"]
        values = {name: [one["systems"][name]["means"][metric] for one in found] for name in names}
        lines.append(
            {
                "collection": table.title,
                "metric": metric,
                "queries": sum(one["queries"] for one in found),
                "scores": {name: statistics.fmean(some) for name, some in values.items()},
            }
        )
    for metric in dict.fromkeys(line["metric"] for line in list(lines)):
        same = [line for line in lines if line["metric"] == metric]
        if len(same) > 1:
            means = {name: statistics.fmean(line["scores"][name] for line in same) for name in names}
            what = f"mean of {len(same)} collections"
            lines.append({"collection": what, "metric": metric, "queries": None, "scores": means})
    return lines


def _found(name: str, title: str, collections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What was measured of a collection of the suite: itself, or its parts."""
    entry = registry().get(name)
    titles = entry.parts if entry and entry.parts else [title]
    return [one for one in collections if one["collection"] in titles]


def _published(suite: Suite, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """BM25 as it is by default beside what is published of it, where both were measured in the same way."""
    entry = registry().get(found["name"])
    if entry is None or found["split"] not in (entry.split, entry.folder_split):
        return []
    if (found["relevance"], found["self_ids"]) != (entry.relevance, entry.self_ids):
        return []
    return [
        {
            "system": system.name,
            "metric": metric,
            "found": found["systems"][system.name]["means"][metric],
            "published": published,
            "tolerance": entry.tolerance,
            "within": abs(found["systems"][system.name]["means"][metric] - published) <= entry.tolerance,
            "source": entry.source,
        }
        for system in suite.systems
        if system.kind == "bm25" and not system.options
        for metric, published in entry.bm25.items()
        if (parse_metric(metric).cutoff or 1000) <= suite.depth
    ]


def _checks(suite: Suite, collections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the suite expects of the collections that were measured, and what was found."""
    by_title = {one["collection"]: one for one in collections}
    checks = []
    for one in suite.expected:
        if one.collection not in by_title:
            continue
        for name, score in one.scores.items():
            metric = str(parse_metric(name))
            means = by_title[one.collection]["systems"][one.system]["means"]
            checks.append(
                {
                    "collection": one.collection,
                    "system": one.system,
                    "metric": metric,
                    "found": means[metric],
                    "expected": score,
                    "tolerance": one.tolerance,
                    "within": abs(means[metric] - score) <= one.tolerance,
                    "source": one.source,
                }
            )
    return checks


def _text(report: Report) -> str:
    heads, rows = score_table(report)
    lines = [f"# {report['suite']}", "", *markdown_table(heads, rows, SCORE_TEXTS), ""]
    lines.append(
        "A letter behind a figure names a system that it beats: paired randomisation test, Holm over all pairs of the "
        f"collection, p < {LEVEL:g}. A mean is of collections, not of queries; no test is made of it."
    )
    if report["left_out"]:
        lines += ["", f"Not measured, though in the suite: {'; '.join(report['left_out'])}."]
    lines += ["", "## Systems", ""]
    for name, system in report["systems"].items():
        options = ", ".join(f"{key} {plain(value)}" for key, value in _said(system).items())
        lines.append(f"- {name}: {system['kind']}{', ' + options if options else ''}")
    if published := _with_collection(report):
        lines += ["", "## BM25 as it is published", "", *_check_table(published, "published")]
    if report["checks"]:
        shown = [one for one in report["checks"] if one["source"] or not one["within"]]
        met = len(report["checks"]) - len(shown)
        lines += ["", "## Expected", "", f"{met} figures of earlier runs are met within their tolerance.", ""]
        lines += _check_table(shown, "expected") if shown else []
    for one in report["collections"]:
        lines += ["", f"## {one['collection']}", "", _what(one), ""]
        lines += [
            *[f"- {note}" for note in one["notes"]],
            *([""] if one["notes"] else []),
            markdown(one).rstrip(),
        ]
    lines += ["", "## Machine", "", *[f"- {key}: {plain(value)}" for key, value in report["machine"].items()]]
    return "\n".join(lines) + "\n"


def _what(one: Mapping[str, Any]) -> str:
    rule = "; a query's own document is taken out of its results" if one["self_ids"] else ""
    relevant = f"; relevant from grade {one['relevance']}" if one["relevance"] > 1 else ""
    return (
        f"{one['name']}, split {one['split']}: {one['documents']:,} documents, {one['queries']:,} queries, "
        f"{one['judgements']:,} judgements{relevant}{rule}."
    )


def _with_collection(report: Report) -> list[dict[str, Any]]:
    return [{"collection": one["collection"], **line} for one in report["collections"] for line in one["published"]]


def _check_table(found: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    heads = ["collection", "system", "metric", "found", column, "difference", "tolerance", "", "source"]
    rows = [
        [
            *(line["collection"], line["system"], line["metric"]),
            *(f"{line['found']:.4f}", f"{line[column]:.4f}", f"{line['found'] - line[column]:+.4f}"),
            *(f"{line['tolerance']:g}", "within" if line["within"] else "**beyond**", line["source"] or ""),
        ]
        for line in found
    ]
    return markdown_table(heads, rows, ("collection", "system", "metric", "", "source"))


def _said(system: Mapping[str, Any]) -> dict[str, Any]:
    """What the suite says of a system."""
    unsaid = {"kind"} | ({"rerank", "rerank_depth"} if system.get("rerank") is None else set())
    return {key: value for key, value in system.items() if key not in unsaid}
