"""Systems compared query by query: one structure of JSON types, written as Markdown, LaTeX or HTML.

{"collection", "split", "queries", "metric", "relevance", "level", "rounds",
 "systems": {name: {"letter", "means": {metric: mean}, "bounded": [metrics], "interval": [low, high],
  "beats": [names]}}, best first,
 "pairs": [fields of `Pair`], "power": [lines], "listing": [{"first", "second", "wins", "losses"}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.evaluate.per_query import Measured, Quality
from retrieval_kd.evaluate.significance import LEVEL, ROUNDS, Pair, bootstrap_interval, pairwise
from retrieval_kd.figures import BOUNDED, decimals, interval, markdown_table, p_value
from retrieval_kd.files import atomic, write_json
from retrieval_kd.metrics import parse_metric
from retrieval_kd.report_html import Cell, table_of, values_of, write_html
from retrieval_kd.types import InputError

FORMAT = 2  # of a comparison, raised when what it holds changes

Comparison = dict[str, Any]


def compare(
    measured: Measured,
    metric: str,
    *,
    texts: Sequence[str] = (),
    listing: int = 0,
    rounds: int = ROUNDS,
    level: float = LEVEL,
    facts: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare all systems with one another by `metric`; the other metrics are shown beside it.

    Systems have letters in the order given, and come best first. One beats another if the paired randomisation test,
    corrected by Holm over all pairs, gives p < `level`.
    `listing` is the number of queries, with their `texts` (Q,), that are listed of each pair as won and lost most.
    `facts` (collection, split, relevance) are put in front.
    """
    name = str(parse_metric(metric))
    values = {system: _of(system, quality, name) for system, quality in measured.systems.items()}
    order = sorted(values, key=lambda system: -float(values[system].mean()))
    ordered = {system: values[system] for system in order}
    letters = dict(zip(values, _letters(), strict=False))
    pairs = pairwise(ordered, rounds, level) if len(ordered) > 1 else []
    records = {
        system: {
            "letter": letters[system],
            "means": {metric: float(each.mean()) for metric, each in measured.systems[system].items()},
            "interval": list(bootstrap_interval(ordered[system], rounds, 1 - level)),
            "bounded": list(measured.bounded.get(system, ())),
            "beats": [other for pair in pairs if (other := _beaten(pair, system, level)) is not None],
        }
        for system in order
    }
    return {
        **(facts or {}),
        "queries": len(measured.query_ids),
        "metric": name,
        "level": level,
        "rounds": rounds,
        "systems": records,
        "pairs": [{**asdict(pair), "interval": list(pair.interval)} for pair in pairs],
        "power": _power(pairs, len(measured.query_ids), level),
        "listing": [_listing(measured, texts, pair, ordered, listing) for pair in pairs if listing],
    }


def markdown(comparison: Comparison) -> str:
    """Tables of the systems and of their pairs, what the queries cannot show, and the listing."""
    lines = _markdown_cells(*_system_rows(comparison))
    lines += ["", *notes] if (notes := _footnotes(comparison)) else []
    pairs = comparison["pairs"]
    if pairs:
        lines += ["", *_markdown_cells(*_pair_rows(pairs))]
        lines += ["", f"*{_method(comparison)}*"]
    lines += ["", *[f"- {note}" for note in comparison["power"]]] if comparison["power"] else []
    for one in comparison["listing"]:
        lines += ["", f"### {one['first']} against {one['second']}"]
        for title, key in (("won", "wins"), ("lost", "losses")):
            if one[key]:
                lines += ["", f"Most {title} by {one['first']}:", ""]
                found = [
                    [case["query"], *(decimals(case[side]) for side in ("first", "second")), case["text"]]
                    for case in one[key]
                ]
                lines += markdown_table(["query", one["first"], one["second"], "text"], found, ("query", "text"))
    return "\n".join(lines) + "\n"


def _markdown_cells(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    return markdown_table(heads, [[text for _, text in row] for row in rows], ("letter", "system", "beats", "pair"))


def latex(comparison: Comparison) -> str:
    """A booktabs table: the best mean of a column in bold; superscripts name the systems that one beats."""
    systems = comparison["systems"]
    metrics = _metrics(comparison)
    best = {
        metric: max(record["means"][metric] for record in systems.values() if metric in record["means"])
        for metric in metrics
    }
    lines = [r"\begin{tabular}{ll" + "r" * len(metrics) + "}", r"\toprule"]
    lines.append(" & ".join(["", "System", *map(_tex, metrics)]) + r" \\")
    lines.append(r"\midrule")
    for name, record in systems.items():
        cells = [record["letter"], _tex(name)]
        for metric in metrics:
            if metric not in record["means"]:
                cells.append("--")
                continue
            value = record["means"][metric]
            cell = rf"\textbf{{{value:.3f}}}" if value == best[metric] else f"{value:.3f}"
            letters = sorted(systems[other]["letter"] for other in record["beats"] if metric == comparison["metric"])
            above = "".join(letters) + (r"\dagger" if metric in record["bounded"] else "")
            cells.append(cell + (f"$^{{{above}}}$" if above else ""))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {line}" for line in (*_footnotes(comparison), _method(comparison))]
    return "\n".join(lines) + "\n"


def html_page(comparison: Comparison, measured: Measured, texts: Sequence[str] = ()) -> dict[str, Any]:
    """The page of a comparison of `measured`, as `write_html` takes it; queries are shown by `texts` (Q,) or ids."""
    names, pairs = list(comparison["systems"]), comparison["pairs"]
    tables = [table_of("Systems", *_system_rows(comparison), captions=_footnotes(comparison))]
    if pairs:
        captions = [_method(comparison), *comparison["power"]]
        tables.append(table_of("Pairs", *_pair_rows(pairs), ("p (Holm)", "t-test p (Holm)"), captions))
    quality = {name: measured.systems[name] for name in names}
    shown = values_of(measured.query_ids, texts or measured.query_ids, quality, comparison["metric"], names[1::-1])
    of = [comparison[key] for key in ("collection", "split") if key in comparison]
    return {
        "title": ", ".join(of) or "Systems compared",
        "subtitle": f"{comparison['queries']:,} queries, by {comparison['metric']}",
        "tables": tables,
        "plots": [],
        "steps": None,
        "queries": shown,
        "histograms": [],
        "lists": [],
    }


def write_comparison(path: Path, comparison: Comparison, measured: Measured, texts: Sequence[str] = ()) -> None:
    """Write what `compare` made of `measured`, atomically, in the form that the name's suffix says: one of SUFFIXES."""
    if path.suffix == ".json":
        write_json(path, comparison)
    elif path.suffix == ".html":
        write_html(path, html_page(comparison, measured, texts))
    else:
        with atomic(path) as scratch:
            scratch.write_text({".md": markdown, ".tex": latex}[path.suffix](comparison), encoding="utf-8")


SUFFIXES = (".md", ".tex", ".html", ".json")


def _of(system: str, quality: Quality, metric: str) -> NDArray[np.float64]:
    if metric not in quality:
        raise InputError(f"system {system!r} was not measured by {metric}; it has {', '.join(quality) or 'no metric'}.")
    return quality[metric]


def _beaten(pair: Pair, system: str, level: float) -> str | None:
    """Who is beaten by `system` in this pair, if anybody is."""
    if pair.adjusted_p >= level:
        return None
    winner, loser = (pair.first, pair.second) if pair.difference > 0 else (pair.second, pair.first)
    return loser if winner == system else None


def _letters() -> Iterator[str]:
    """a to z, then aa, ab, ..."""
    words = [""]
    while True:
        words = [word + letter for word in words for letter in "abcdefghijklmnopqrstuvwxyz"]
        yield from words


def _power(pairs: Sequence[Pair], queries: int, level: float) -> list[str]:
    """What so many queries could not have shown, of the pairs that do not differ significantly."""
    notes = []
    for pair in pairs:
        if pair.adjusted_p >= level and pair.detectable is not None and abs(pair.difference) < pair.detectable:
            notes.append(
                f"{pair.first}, {pair.second}: no difference is shown ({pair.difference:+.3f}); {queries:,} queries "
                f"that differ as these do show one of {pair.detectable:.3f} four times in five, smaller ones less."
            )
    return notes


def _listing(
    measured: Measured, texts: Sequence[str], pair: Pair, values: Mapping[str, NDArray[np.float64]], count: int
) -> dict[str, Any]:
    first, second = values[pair.first], values[pair.second]
    order = np.argsort(second - first, kind="stable")  # won most, first

    def cases(places: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "query": measured.query_ids[place],
                "text": texts[place] if len(texts) else "",
                "first": float(first[place]),
                "second": float(second[place]),
            }
            for place in places
        ]

    return {
        "first": pair.first,
        "second": pair.second,
        "wins": cases(order[: min(count, pair.wins)].tolist()),
        "losses": cases(order[::-1][: min(count, pair.losses)].tolist()),
    }


def _metrics(comparison: Comparison) -> list[str]:
    """The primary metric, then the others."""
    every = dict.fromkeys(metric for record in comparison["systems"].values() for metric in record["means"])
    return [comparison["metric"], *(metric for metric in every if metric != comparison["metric"])]


def _system_rows(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    metrics, systems = _metrics(comparison), comparison["systems"]
    heads = ["letter", "system", metrics[0], f"{1 - comparison['level']:.0%} interval", "beats", *metrics[1:]]
    rows: list[list[Cell]] = []
    for name, record in systems.items():
        first, *others = [_cell(record, metric) for metric in metrics]
        beaten = " ".join(sorted(systems[other]["letter"] for other in record["beats"]))
        between = (record["interval"][0], interval(record["interval"]))
        rows.append(
            [(record["letter"], record["letter"]), (name, name), first, between, (beaten or None, beaten), *others]
        )
    return heads, rows


def _cell(record: Mapping[str, Any], metric: str) -> Cell:
    value = record["means"].get(metric)
    return value, decimals(value) + (BOUNDED if metric in record["bounded"] else "")


def _footnotes(comparison: Comparison) -> list[str]:
    """What the marks of the table of systems mean."""
    if not any(record["bounded"] for record in comparison["systems"].values()):
        return []
    return [f"{BOUNDED} The lists are shorter than that: a higher value was out of reach."]


def _pair_rows(pairs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    heads = ["pair", "Δ", "interval", "p (Holm)", "t-test p (Holm)", "won, tied, lost", "Δ shown at 80 % power"]
    rows: list[list[Cell]] = []
    for pair in pairs:
        name, counts = f"{pair['first']}, {pair['second']}", f"{pair['wins']}, {pair['ties']}, {pair['losses']}"
        rows.append(
            [(name, name), (pair["difference"], f"{pair['difference']:+.3f}")]
            + [(pair["interval"][0], interval(pair["interval"], signed=True))]
            + [(pair[key], p_value(pair[key])) for key in ("adjusted_p", "adjusted_t_p")]
            + [(pair["wins"], counts), (pair["detectable"], decimals(pair["detectable"]))]
        )
    return heads, rows


def _method(comparison: Comparison) -> str:
    return (
        f"{comparison['metric']} of {comparison['queries']:,} queries. A system beats another by a paired "
        f"randomisation test, two-sided, {comparison['rounds']:,} rounds, Holm over {len(comparison['pairs'])} "
        f"pairs, at {comparison['level']:g}. Intervals: percentile bootstrap over queries, as many rounds."
    )


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(special.get(sign, sign) for sign in text)
