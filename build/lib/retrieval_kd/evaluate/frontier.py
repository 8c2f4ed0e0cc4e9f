"""The frontier report: one student served in many ways, quality against latency and size, and where the points went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.evaluate.significance import bootstrap_interval, paired_test
from retrieval_kd.figures import decimals, digits, interval, markdown_table, p_value, plain
from retrieval_kd.files import atomic, write_json
from retrieval_kd.metrics import PRIMARY
from retrieval_kd.report import System, place_labels
from retrieval_kd.report_html import Cell, plot_of, point_of, queries_of, table_of, write_html
from retrieval_kd.types import Collection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEEP = "R@1000"
HEADS: tuple[str, ...] = ("point", "index", "query encoder", PRIMARY, "95% interval", DEEP, "encode p50 ms")
HEADS += ("encode p95 ms", "search p50 ms", "search p95 ms", "search p99 ms", "index MB", "encoder MB", "build s")
HEADS += ("build peak MB", "serving peak MB", "front")
STEP_HEADS = ("step", PRIMARY, "95% interval", "difference to the step before", "95% interval", "p")
LATENCY, SIZE = "encode and search, p50 ms, one thread", "index and query encoder on disk, MB"
CAPTION = "Filled: on the Pareto front, where no other point is as good for less."


@dataclass(frozen=True)
class MeasuredPoint:
    """A point: who it is, its quality a query (PRIMARY and DEEP, each (Q,)), and what `measure` says of its cost."""

    system: System
    index: str
    facts: Mapping[str, Any]
    encoder_bytes: int

    @property
    def latency_ms(self) -> float:
        """Median milliseconds of a query, encoded and searched."""
        return float(self.facts["encode_p50_ms"] + self.facts["search_p50_ms"])

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of what serves."""
        return int(self.facts["index_bytes"]) + self.encoder_bytes


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Which points are on the front: none has at most their cost and at least their value, and one of them better."""
    points = list(zip(costs, values, strict=True))

    def beaten(cost: float, value: float) -> bool:
        return any(c <= cost and v >= value and (c < cost or v > value) for c, v in points)

    return [not beaten(cost, value) for cost, value in points]


def waterfall(steps: Sequence[tuple[str, NDArray[np.float64]]]) -> list[dict[str, Any]]:
    """Where the points went: the mean of each step with its interval, and the paired difference to the step before.

    The interval of a difference is a bootstrap of the queries' differences; p is of the paired randomisation test, not
    corrected. Shapes: values (Q,), of the same queries.
    """
    found: list[dict[str, Any]] = []
    before: NDArray[np.float64] | None = None
    for name, values in steps:
        step: dict[str, Any] = {
            "name": name,
            "value": float(values.mean()),
            "interval": list(bootstrap_interval(values)),
        }
        if before is not None:
            difference = values - before
            step |= {
                "difference": float(difference.mean()),
                "difference_interval": list(bootstrap_interval(difference)),
            }
            step["p"] = paired_test(values, before)
        found.append(step)
        before = values
    return found


def write_frontier(
    folder: Path,
    points: Sequence[MeasuredPoint],
    steps: Sequence[tuple[str, NDArray[np.float64]]],
    collection: Collection,
    split: str,
    facts: Mapping[str, object],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write frontier.md, .json, .html and .png into `folder`; return the JSON. Every file is replaced atomically."""
    quality = [float(point.system.quality[PRIMARY].mean()) for point in points]
    fronts = {
        "latency": pareto([point.latency_ms for point in points], quality),
        "size": pareto([point.size_bytes for point in points], quality),
    }
    records = {}
    for number, point in enumerate(points):
        records[point.system.name] = {
            "index": point.index,
            "query_encoder": point.system.engine,
            PRIMARY: quality[number],
            "interval": list(bootstrap_interval(point.system.quality[PRIMARY])),
            DEEP: float(point.system.quality[DEEP].mean()),
            "encoder_bytes": point.encoder_bytes,
            **point.facts,
            "on_front_of": [name for name, front in fronts.items() if front[number]],
        }
    queries = collection.split(split)
    report: dict[str, Any] = {
        "collection": collection.name,
        "documents": len(collection),
        "split": split,
        "queries": len(queries),
        "points": records,
        "waterfall": waterfall(steps),
        "facts": dict(facts),
        "notes": list(notes),
        "machines": _machines(points),
    }
    write_json(folder / "frontier.json", report)
    rows = _cells(records)
    with atomic(folder / "frontier.md") as scratch:
        scratch.write_text(_markdown(report, rows), encoding="utf-8")
    with atomic(folder / "frontier.png") as scratch:
        _draw(scratch, report)
    systems = [point.system for point in points]
    low_first = [head for head in HEADS if head.endswith(("ms", "MB", " s"))]
    page = {
        "title": f"Frontier: {collection.name}, {split}",
        "subtitle": f"{len(queries):,} queries, {len(collection):,} documents",
        "tables": [table_of("Points", HEADS, rows, low_first, notes)],
        "plots": [_plot(title, records, key, label) for title, key, label in PLOTS],
        "steps": _steps(report["waterfall"]),
        "queries": queries_of(systems, queries, collection, PRIMARY, systems[0].name),
        "histograms": [],
        "lists": [
            {"title": "Facts", "items": [f"{key}: {plain(value)}" for key, value in facts.items()]},
            {"title": "Machine", "items": [plain(one) for one in report["machines"]]},
        ],
    }
    write_html(folder / "frontier.html", page)
    return report


def _machines(points: Sequence[MeasuredPoint]) -> list[Any]:
    found: list[Any] = []
    for point in points:
        if point.facts["machine"] not in found:
            found.append(point.facts["machine"])
    return found


def latency_of(record: Mapping[str, Any]) -> float:
    """Median milliseconds of a point's query, encoded and searched."""
    return float(record["encode_p50_ms"] + record["search_p50_ms"])


def megabytes_of(record: Mapping[str, Any]) -> float:
    """Megabytes on disk of a point's index and query encoder."""
    return float(record["index_bytes"] + record["encoder_bytes"]) / 1e6


PLOTS = (("Quality against latency", "latency", LATENCY), ("Quality against size", "size", SIZE))
COST = {"latency": latency_of, "size": megabytes_of}


def _plot(title: str, records: Mapping[str, Any], key: str, label: str) -> dict[str, Any]:
    points = [
        point_of(name, one["query_encoder"], one[PRIMARY], None, COST[key](one), key in one["on_front_of"])
        for name, one in records.items()
    ]
    return plot_of(title, points, label, PRIMARY, caption=CAPTION)


def _steps(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = []
    for step in found:
        low, high = step["interval"]
        text = decimals(step["value"])
        if "difference" in step:
            text = f"{step['difference']:+.3f} ({interval(step['difference_interval'], signed=True)})"
        steps.append({"name": step["name"], "value": step["value"], "low": low, "high": high, "text": text})
    caption = (
        "Each step beside the one before: the paired difference with its 95% interval. Lines: intervals of the means."
    )
    return {"title": "Where the points went", "y_label": PRIMARY, "caption": caption, "steps": steps}


def _cells(records: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for name, one in records.items():
        peaks = [one["build_peak_bytes"] / 1e6, one["search_peak_bytes"] / 1e6]
        numbers = [one[f"{key}_ms"] for key in ("encode_p50", "encode_p95", "search_p50", "search_p95", "search_p99")]
        numbers += [one["index_bytes"] / 1e6, one["encoder_bytes"] / 1e6, one["build_seconds"], *peaks]
        front = ", ".join(one["on_front_of"])
        rows.append(
            [(name, name), (one["index"], one["index"]), (one["query_encoder"], one["query_encoder"])]
            + [(one[PRIMARY], decimals(one[PRIMARY])), (one["interval"][0], interval(one["interval"]))]
            + [(one[DEEP], decimals(one[DEEP]))]
            + [(value, digits(value)) for value in numbers]
            + [(front or None, front)]
        )
    return rows


def _markdown(report: Mapping[str, Any], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [
        f"# Frontier: {report['collection']}, {report['split']}: {report['queries']} queries, "
        f"{report['documents']:,} documents",
        "",
        *markdown_table(HEADS, [[text for _, text in row] for row in rows], (*HEADS[:3], HEADS[-1])),
        "",
        *(f"{note}  " for note in report["notes"]),
        "",
        "![Quality against latency and size, and where the points went](frontier.png)",
        "",
        "## Where the points went",
        "",
        *markdown_table(STEP_HEADS, [_step_cells(step) for step in report["waterfall"]], STEP_HEADS[:1]),
    ]
    for title, items in (
        ("Facts", [f"{key}: {plain(value)}" for key, value in report["facts"].items()]),
        ("Machine", [plain(one) for one in report["machines"]]),
    ):
        lines += ["", f"## {title}", "", *[f"- {item}" for item in items]]
    return "\n".join(lines) + "\n"


def _step_cells(step: Mapping[str, Any]) -> list[str]:
    found = [step["name"], decimals(step["value"]), interval(step["interval"])]
    if "difference" not in step:
        return [*found, "", "", ""]
    between = interval(step["difference_interval"], signed=True)
    return [*found, f"{step['difference']:+.4f}", between, p_value(step["p"])]


def _draw(path: Path, report: Mapping[str, Any]) -> None:
    """Three panels: quality against latency, against size, and the waterfall."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2)
    panels = [figure.add_subplot(grid[0, place]) for place in range(len(PLOTS))]
    for axes, (title, key, label) in zip(panels, PLOTS, strict=True):
        axes.set(title=title, xlabel=f"{label} (log scale)", ylabel=PRIMARY)
        _scatter(axes, report["points"], key)
    _bars(figure.add_subplot(grid[1, :]), report["waterfall"])
    figure.draw_without_rendering()  # fixes the layout that the labels are placed in
    for axes, (_, key, _) in zip(panels, PLOTS, strict=True):
        _label(axes, report["points"], key)
    figure.savefig(path, format="png")


def _scatter(axes: Axes, records: Mapping[str, Any], key: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    encoders = list(dict.fromkeys(one["query_encoder"] for one in records.values()))
    for number, encoder in enumerate(encoders):
        for filled in (True, False):
            some = [
                one
                for one in records.values()
                if one["query_encoder"] == encoder and (key in one["on_front_of"]) == filled
            ]
            axes.scatter(
                [COST[key](one) for one in some],
                [one[PRIMARY] for one in some],
                facecolors=f"C{number}" if filled else "none",
                edgecolors=f"C{number}",
                label=encoder if filled else None,
                zorder=3,
            )
    front = sorted((COST[key](one), one[PRIMARY]) for one in records.values() if key in one["on_front_of"])
    axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.2, y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(title="query encoder", fontsize=8, title_fontsize=8, loc="lower right")


def _label(axes: Axes, records: Mapping[str, Any], key: str) -> None:
    encoders = list(dict.fromkeys(one["query_encoder"] for one in records.values()))
    colours = [f"C{encoders.index(one['query_encoder'])}" for one in records.values()]
    at = [(COST[key](one), one[PRIMARY]) for one in records.values()]
    place_labels(axes, [(name, *xy, colour) for name, xy, colour in zip(records, at, colours, strict=True)], [])


def _bars(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    values = [step["value"] for step in steps]
    ends = [end for step in steps for end in step["interval"]]
    spread = max(ends) - min(ends) or 0.1
    bottom = max(0.0, min(ends) - spread / 4)
    axes.set_ylim(bottom, max(ends) + spread / 4)
    for place, step in enumerate(steps):
        before = values[place - 1] if place else bottom
        color = "C0" if not place else "C2" if values[place] >= before else "C3"
        axes.bar(place, values[place] - before, bottom=before, width=0.55, color=color, alpha=0.75)
        low, high = step["interval"]
        axes.plot([place, place], [low, high], color="0.3", linewidth=1)
        text = decimals(step["value"])
        if place:
            axes.plot([place - 1, place + 0.28], [before, before], color="0.5", linewidth=0.8, linestyle=":")
            text += f"\n{step['difference']:+.3f} ({interval(step['difference_interval'], signed=True)})"
        axes.annotate(
            text, (place, max(high, before)), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xticks(range(len(steps)), [step["name"] for step in steps])
    axes.set(title="Where the points went: paired differences with 95% intervals", ylabel=PRIMARY)
