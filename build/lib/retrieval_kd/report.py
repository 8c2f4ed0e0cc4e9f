"""Reports: quality with intervals and tests, cost beside it, as Markdown, HTML, JSON, TSV and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_kd.evaluate.cost import Latency, machine
from retrieval_kd.evaluate.per_query import PER_QUERY, Measured, Quality, bounded, write_per_query
from retrieval_kd.evaluate.significance import CONFIDENCE, ROUNDS, Difference, against_baseline, bootstrap_interval
from retrieval_kd.figures import ABSENT, BOUNDED, decimals, digits, interval, markdown_table, p_value, plain
from retrieval_kd.files import atomic, write_json
from retrieval_kd.metrics import PRIMARY, STANDARD
from retrieval_kd.report_html import Cell, report_page, table_of, write_html
from retrieval_kd.types import Collection, Hits, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


Record = Mapping[str, Any]


@dataclass(frozen=True)
class System:
    """One row of a report. Shapes: every value of `quality` (Q,), as `per_query` returns it."""

    name: str  # "bm25", "minilm (teacher)", "student int8"
    engine: str  # what encodes the query: "bm25s", "torch fp32", "onnx int8", "re-rank"
    quality: Quality
    hits: Hits | None = None
    latency: Latency | None = None  # query encoding, one thread
    parameters: int | None = None  # of the query encoder
    bytes: int | None = None  # query encoder on disk
    index_bytes: int | None = None


def write_report(
    folder: Path,
    systems: Sequence[System],
    collection: Collection,
    split: str,
    baseline: str,
    facts: Mapping[str, object],
) -> dict[str, Any]:
    """Write report.md, report.html, report.json, per_query.tsv and quality_latency.png; return the JSON.

    `baseline` is the name of the system that the others are tested against; `facts` are free keys
    and values printed at the end. Every file is replaced atomically.
    """
    queries = collection.split(split)
    for system in systems:
        if {len(values) for values in system.quality.values()} - {len(queries)}:
            raise InputError(
                f"system {system.name!r} was measured on another number of queries than "
                f"the {len(queries)} of split {split!r} of {collection.name!r}."
            )
    records = summarise(systems, baseline, len(collection))
    report: dict[str, Any] = {
        "collection": collection.name,
        "documents": len(collection),
        "split": split,
        "queries": len(queries),
        "baseline": baseline,
        "test": {
            "metric": PRIMARY,
            "name": "paired randomisation test, two-sided",
            "rounds": ROUNDS,
            "correction": "Holm",
            "comparisons": len(systems) - 1,
            "interval": f"percentile bootstrap, {CONFIDENCE:.0%}",
        },
        "systems": records,
        "notes": list(collection.notes),
        "facts": json.loads(json.dumps(dict(facts), default=str)),
        "machine": machine(),
    }
    write_json(folder / "report.json", report)
    with atomic(folder / "report.md") as scratch:
        scratch.write_text(_markdown(report), encoding="utf-8")
    write_per_query(folder / PER_QUERY, Measured(queries.ids, {system.name: system.quality for system in systems}))
    with atomic(folder / "quality_latency.png") as scratch:
        _plot(scratch, records, f"{collection.name}, {split}, {len(queries)} queries")
    heads, rows = cells(records, baseline)
    low_first = [head for head in heads if head.endswith(("ms", "MB")) or head == "parameters"]
    table = table_of("Systems", heads, rows, low_first, [*_footnotes(records), _method(report)])
    write_html(folder / "report.html", report_page(report, table, systems, queries, collection))
    return report


def summarise(systems: Sequence[System], baseline: str, documents: int | None = None) -> dict[str, Record]:
    """What a report says of each system, by name, in JSON types; None where it is not known.

    Means under the metrics' canonical names; `interval` and the fields of `Difference`, all of nDCG@10;
    the cost; `depth` K of the hits, and `bounded`, the recalls that K limits (none where K covers `documents`).
    """
    by_name = {system.name: system for system in systems}
    if len(by_name) < len(systems):
        raise InputError(f"two systems of a report have one name; the names are {[one.name for one in systems]}.")
    if baseline not in by_name:
        raise InputError(f"the baseline {baseline!r} is not among the systems: {', '.join(by_name) or 'none'}.")
    for system in systems:
        if PRIMARY not in system.quality:
            raise InputError(f"system {system.name!r} was not measured by {PRIMARY}, which a report is about.")
    compared = against_baseline(
        by_name[baseline].quality[PRIMARY],
        {name: system.quality[PRIMARY] for name, system in by_name.items() if name != baseline},
        ROUNDS,
    )
    records: dict[str, Record] = {}
    for name, system in by_name.items():
        depth = system.hits.rows.shape[1] if system.hits is not None else None
        records[name] = {
            "engine": system.engine,
            **{metric: float(values.mean()) for metric, values in system.quality.items()},
            "interval": list(bootstrap_interval(system.quality[PRIMARY], ROUNDS, CONFIDENCE)),
            **{key.name: getattr(compared.get(name), key.name, None) for key in fields(Difference)},
            "query_p50_ms": system.latency.p50_ms if system.latency else None,
            "query_p95_ms": system.latency.p95_ms if system.latency else None,
            "parameters": system.parameters,
            "bytes": system.bytes,
            "index_bytes": system.index_bytes,
            "depth": depth,
            "bounded": [] if depth is None else bounded(system.quality, depth, documents),
        }
    return records


def systems_markdown(records: Mapping[str, Record], baseline: str) -> str:
    """The table of a report, from `summarise` or from the "systems" of a report.json, in their order."""
    heads, rows = cells(records, baseline)
    return "\n".join(markdown_table(heads, [[text for _, text in row] for row in rows], heads[:2]))


def cells(records: Mapping[str, Record], baseline: str) -> tuple[list[str], list[list[Cell]]]:
    """The heads of a report's table, and its rows: of each cell what it is sorted by, and what is printed."""
    heads = ["system", "query engine", PRIMARY, f"{CONFIDENCE:.0%} interval", *STANDARD[1:]]
    heads += [f"Δ to {baseline}", "p (Holm)", "query p50 ms", "p95 ms", "parameters", "MB", "index MB"]
    rows: list[list[Cell]] = []
    for name, record in records.items():
        rows.append(
            [(name, name), (record["engine"], record["engine"]), (record[PRIMARY], _value(record, PRIMARY))]
            + [(record["interval"][0], interval(record["interval"]))]
            + [(record.get(metric), _value(record, metric)) for metric in STANDARD[1:]]
            + [(record["difference"], _difference(record, name == baseline))]
            + [(record["adjusted_p"], p_value(record["adjusted_p"]))]
            + [(record[key], digits(record[key])) for key in ("query_p50_ms", "query_p95_ms")]
            + [(record["parameters"], _count(record["parameters"]))]
            + [(record[key], _megabytes(record[key])) for key in ("bytes", "index_bytes")]
        )
    return heads, rows


def terminal_table(systems: Sequence[System], baseline: str, documents: int | None = None) -> Table:
    """The table of a report for a terminal of 120 columns; `documents` is the size of the collection."""
    from rich.markup import escape
    from rich.table import Table

    records = summarise(systems, baseline, documents)
    caption = [f"Δ: {PRIMARY} to {baseline}; p: paired randomisation test, Holm", *_footnotes(records)]
    table = Table(caption=escape("\n".join(caption)), caption_justify="left")
    for head in ("system", "query engine"):
        table.add_column(head, overflow="fold")
    for head in (*STANDARD, "Δ", "p", "p50 ms", "MB"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, record in records.items():
        table.add_row(
            *(escape(name), escape(record["engine"])),
            *(_value(record, metric) for metric in STANDARD),
            _difference(record, name == baseline).replace("baseline", "base"),
            *(p_value(record["adjusted_p"]), digits(record["query_p50_ms"]), _megabytes(record["bytes"])),
        )
    return table


def _footnotes(records: Mapping[str, Record]) -> list[str]:
    """A line for each depth that bounds a recall."""
    names_of: dict[tuple[int, str], list[str]] = {}
    for name, record in records.items():
        for metric in record["bounded"]:
            names_of.setdefault((record["depth"], metric), []).append(name)
    return [
        f"{BOUNDED} {metric} of {', '.join(names)} is bounded by the depth of the lists, {depth}."
        for (depth, metric), names in names_of.items()
    ]


def _markdown(report: Mapping[str, Any]) -> str:
    lines = [
        f"# {report['collection']}, {report['split']}: {report['queries']} queries, {report['documents']:,} documents",
        "",
        systems_markdown(report["systems"], report["baseline"]),
        "",
        *[f"{line}  " for line in _footnotes(report["systems"])],
        f"*{_method(report)}*",
        "",
        "![nDCG@10 against query latency](quality_latency.png)",
    ]
    for title, items in (
        ("Notes on the collection", report["notes"]),
        ("Facts", [f"{key}: {plain(value)}" for key, value in report["facts"].items()]),
        ("Machine", [f"{key}: {plain(value)}" for key, value in report["machine"].items()]),
    ):
        if items:
            lines += ["", f"## {title}", "", *[f"- {item}" for item in items]]
    return "\n".join(lines) + "\n"


def _method(report: Mapping[str, Any]) -> str:
    """How intervals, tests and latencies were made."""
    test = report["test"]
    return (
        f"Δ and p: {test['metric']} against {report['baseline']}, {test['name']}, {test['rounds']:,} rounds; "
        f"correction: {test['correction']}; comparisons: {test['comparisons']}; queries: {report['queries']}. "
        f"Interval: {test['interval']}, {test['rounds']:,} rounds. Latency: encoding one query, on one thread."
    )


def _value(record: Record, metric: str) -> str:
    if metric not in record:
        return ABSENT
    return f"{decimals(record[metric])}{BOUNDED if metric in record['bounded'] else ''}"


def _difference(record: Record, is_baseline: bool) -> str:
    return "baseline" if is_baseline else f"{record['difference']:+.3f}"


def _megabytes(size: int | None) -> str:
    return digits(None if size is None else size / 1e6)


def _count(number: int | None) -> str:
    if number is None:
        return ABSENT
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _plot(path: Path, records: Mapping[str, Record], title: str) -> None:
    """nDCG@10 with its interval over query latency; systems without latency are dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    engines = list(dict.fromkeys(one["engine"] for one in records.values() if one["query_p50_ms"] is not None))
    timed = [one["query_p50_ms"] for one in records.values() if one["query_p50_ms"] is not None] or [1.0]
    axes.set_xlim(min(timed) / 3, max(timed) * 5)
    labels, bars = [], []
    for name, record in records.items():
        value, (low, high), at = record[PRIMARY], record["interval"], record["query_p50_ms"]
        if at is None:
            axes.axhline(value, linestyle="--", linewidth=1, color="0.45", zorder=1)
            labels.append((name, axes.get_xlim()[0] * 1.02, value, "0.3"))
            continue
        number = engines.index(record["engine"])
        label = None if record["engine"] in axes.get_legend_handles_labels()[1] else record["engine"]
        bar = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([at], [value], bar, fmt="os^Dv"[number % 5], color=f"C{number}", capsize=3, label=label)
        labels.append((name, at, value, f"C{number}"))
        bars.append((at, low, high))
    axes.set(title=title, ylabel=f"{PRIMARY}, {CONFIDENCE:.0%} interval")
    dashed = "; dashed: not timed" if any(one["query_p50_ms"] is None for one in records.values()) else ""
    axes.set_xlabel(f"query encoding, p50 ms, one thread (log scale){dashed}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.25, which="major")
    if engines:
        axes.legend(title="query engine", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.draw_without_rendering()  # fixes the layout that the labels are placed in
    place_labels(axes, labels, bars)
    figure.savefig(path, format="png")


def place_labels(
    axes: Axes, labels: Sequence[tuple[str, float, float, str]], bars: Sequence[tuple[float, float, float]]
) -> None:
    """Write (text, x, y, colour) beside each point, off points, bars (x, low, high) and other labels where it can."""
    from matplotlib.transforms import Bbox

    place = axes.transData.transform
    taken = [Bbox([place((x, y)) - 10, place((x, y)) + 10]) for _, x, y, _ in labels]
    taken += [Bbox([place((x, low)), place((x, high))]) for x, low, high in bars]
    offsets = [(side * 8, way * (6 + 9 * step)) for step in range(6) for side in (1, -1) for way in (1, -1)]
    for text, x, y, colour in labels:
        best = None
        for right, up in offsets:
            note = axes.annotate(
                text,
                (x, y),
                (right, up),
                textcoords="offset points",
                fontsize=8,
                color=colour,
                ha="left" if right > 0 else "right",
                va="bottom" if up > 0 else "top",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
            box = note.get_window_extent()
            outside = not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
            meets = box.count_overlaps(taken) + 2 * outside
            if best is None or meets < best[0]:
                if best:
                    best[1].remove()
                best = (meets, note, box)
            else:
                note.remove()
            if not meets:
                break
        assert best is not None
        taken.append(best[2])
