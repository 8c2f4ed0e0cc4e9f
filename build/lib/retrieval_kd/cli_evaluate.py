"""`rkd eval` of a suite, and `rkd compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_kd.cli_output import Json, Quiet, print_json
from retrieval_kd.metrics import PRIMARY
from retrieval_kd.progress import console, say
from retrieval_kd.types import InputError


def evaluate_suite(
    suite: Path, out: Path | None, store: Path | None, only: list[str], check: bool, quiet: bool, json_: bool
) -> None:
    """Measure a suite, print its table, and with `check` end with exit code 1 if a figure is not what is expected."""
    from retrieval_kd.figures import markdown_table
    from retrieval_kd.pipeline.suite import run_suite
    from retrieval_kd.suite import load_suite
    from retrieval_kd.suite_report import SCORE_TEXTS, score_table

    if check and not load_suite(suite).expected:
        raise InputError(f"{suite} has no [[expected]] to check; write what systems should have, or leave --check out.")
    report = run_suite(suite, out, store, only)
    folder = out or Path("work") / suite.stem
    if not quiet and not json_:
        typer.echo("\n" + "\n".join(markdown_table(*score_table(report), SCORE_TEXTS)) + "\n")
    say(f"report: {folder / 'report.md'}")
    beyond = [one for one in report["checks"] if not one["within"]]
    if check and not json_:
        for one in beyond:
            typer.echo(
                f"{one['collection']}: {one['system']}: {one['metric']} is {one['found']:.4f}, expected "
                f"{one['expected']:.4f} within {one['tolerance']:g}",
                err=True,
            )
    print_json(json_, {"folder": str(folder), "scores": report["scores"], "checks": report["checks"]})
    if check and beyond:
        raise typer.Exit(1)


def compare(
    results: Annotated[
        list[Path], typer.Argument(help="TREC runs, per_query.tsv files, or report folders.", show_default=False)
    ],
    collection: Annotated[
        str | None, typer.Option("--collection", help="Whose judgements measure the runs, and whose queries are shown.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the collection.", show_default="test")] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What is tested.", show_default="the collection's, or nDCG@10")
    ] = None,
    relevance: Annotated[
        int | None,
        typer.Option("--relevance", min=1, help="Lowest relevant grade.", show_default="the collection's, or 1"),
    ] = None,
    listing: Annotated[
        int, typer.Option("--listing", min=0, help="Queries to list of each pair, won and lost most.")
    ] = 0,
    out: Annotated[list[Path] | None, typer.Option("--out", help="A file to write: .md, .tex, .html or .json.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Compare systems query by query: tests of every pair, intervals, what so many queries can show, wins and losses.

    rkd compare work/local/beir-scifact/report --listing 3 --collection beir/scifact
    rkd compare bm25.trec mine.trec --collection beir/scifact --out table.tex --out table.html
    """
    console.quiet = quiet
    from retrieval_kd import compare as compare_module

    for file in out or ():
        if file.suffix not in compare_module.SUFFIXES:
            raise InputError(f"--out {file}: a comparison is written as .md, .tex, .html or .json.")
    measured, texts, primary, facts = _read(results, collection, split, relevance)
    comparison = compare_module.compare(measured, metric or primary, texts=texts, listing=listing, facts=facts)
    for file in out or ():
        compare_module.write_comparison(file, comparison, measured, texts)
        say(f"written: {file}")
    if not quiet and not json_:
        typer.echo(compare_module.markdown(comparison))
    print_json(json_, comparison)


def _read(
    results: list[Path], collection: str | None, split: str | None, relevance: int | None
) -> tuple[Any, list[str], str, dict[str, Any]]:
    """Values of all systems, texts of the queries, the primary metric, and facts."""
    from retrieval_kd.evaluate.per_query import Measured, bounded, join, read_per_query
    from retrieval_kd.evaluate.registry import open_judged

    if collection is None and (split or relevance):
        raise InputError("--split and --relevance are of a collection's judgements; give --collection too.")
    runs = [path for path in results if not _is_measured(path)]
    if relevance and not runs:
        raise InputError("--relevance measures runs, and these values are measured already; leave it out.")
    judged = open_judged(collection, split, relevance=relevance, allow_mismatch=True) if collection else None
    parts: dict[str, Measured] = {}
    for path in results:
        if _is_measured(path):
            parts[str(path)] = read_per_query(path)
            continue
        if judged is None:
            raise InputError(f"{path} is a run; say whose judgements measure it: --collection NAME, perhaps --split.")
        from retrieval_kd.evaluate.quality import per_query, without_self
        from retrieval_kd.evaluate.runs import read_judged_run
        from retrieval_kd.metrics import STANDARD

        hits, notes = read_judged_run(path, judged)
        for note in [*judged.notes, *notes]:
            say(f"{path}: {note}")
        ids = list(judged.collection.document_ids)
        if judged.self_ids:
            hits = without_self(hits, judged.queries.ids, ids)
        metrics = list(dict.fromkeys([judged.metric, *STANDARD]))
        quality = per_query(hits, judged.queries, ids, metrics, judged.relevance)
        short = bounded(metrics, hits.rows.shape[1], len(ids))
        parts[str(path)] = Measured(judged.queries.ids, {path.stem: quality}, {path.stem: short})
    measured = join(parts)
    if judged is None:
        return measured, [], PRIMARY, {}
    text_of = dict(zip(judged.queries.ids, judged.queries.texts, strict=True))
    if unknown := [query_id for query_id in measured.query_ids if query_id not in text_of]:
        raise InputError(f"{results[0]} has query {unknown[0]!r}, which split {judged.split!r} of {collection} lacks.")
    facts = {"collection": judged.name, "split": judged.split, **({"relevance": judged.relevance} if runs else {})}
    return measured, [text_of[query_id] for query_id in measured.query_ids], judged.metric, facts


def _is_measured(path: Path) -> bool:
    """Whether a path is a report folder or a per_query.tsv, which its first line says; else it is a run."""
    from retrieval_kd.files import read_lines

    return path.is_dir() or next((line for _, line in read_lines(path)), "").startswith("query\tsystem\t")
