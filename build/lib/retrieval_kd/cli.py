"""The command line: thin commands over the pipeline.

Every command takes `--quiet`, and `--json` to end with one JSON object on its last line. A user's
mistake is one line on standard error and exit code 2.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval_kd import __version__, cli_methods, cli_scores
from retrieval_kd.cli_evaluate import compare, evaluate_suite
from retrieval_kd.cli_frontier import frontier
from retrieval_kd.cli_index import index
from retrieval_kd.cli_output import AllowMissing, Json, Quiet, print_json, print_table
from retrieval_kd.cli_serve import serve
from retrieval_kd.cli_synthesize import synthesize
from retrieval_kd.cli_workspace import AllowUnknown, DryRun, Out, Recipe, Set, StoreFolder, hush, open_workspace
from retrieval_kd.extras import EXTRA_OF, missing_extra
from retrieval_kd.progress import console, say
from retrieval_kd.suite import is_suite
from retrieval_kd.types import InputError

if TYPE_CHECKING:
    from retrieval_kd.pipeline import Workspace

app = typer.Typer(
    name="rkd",
    help="Distil slow rankers into fast retrievers: mine, score, train, index, evaluate, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_methods.app, name="methods")
app.add_typer(cli_scores.app, name="scores")
app.command()(synthesize)
app.command()(serve)


class Cluster(StrEnum):
    """Where teachers can be asked, other than here."""

    ray = "ray"


@app.callback(invoke_without_command=True)
def _options(version_: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version_:
        typer.echo(f"retrieval-kd {__version__}")
        raise typer.Exit


def _stage(name: str, text: str) -> None:
    """Add a command that runs one stage of a recipe."""

    def command(
        recipe: Recipe,
        out: Out = None,
        store: StoreFolder = None,
        set_: Set = None,
        allow_unknown_qrels: AllowUnknown = False,
        quiet: Quiet = False,
        json_: Json = False,
    ) -> None:
        console.quiet = quiet
        workspace = open_workspace(recipe, out, store, set_, allow_unknown_qrels)
        from retrieval_kd import pipeline

        began = monotonic()
        stage: Callable[[Workspace], Any] = getattr(pipeline, name)
        result = stage(workspace)
        _finish(workspace, result, monotonic() - began, json_)

    command.__doc__ = text
    app.command(name)(command)


_stage("run", "Run every stage of RECIPE whose inputs changed, and print the report.\n\nStopped? Give it again.")
_stage("train", "Train the student of RECIPE; a stopped training goes on where it was.")
app.command()(index)
_stage("export", "Export the query encoder, with a gate on vectors and quality.")
_stage("search", "Search the test queries and write TREC runs.")


@app.command("eval")
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="A recipe, or a suite (TOML).", show_default=False)],
    out: Out = None,
    store: StoreFolder = None,
    set_: Set = None,
    allow_unknown_qrels: AllowUnknown = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Of a suite, this collection alone; may be given again.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 if a figure is not what the suite expects.")
    ] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Measure all systems of RECIPE on its test split, or of a suite on its collections, and write the report.

    A suite has tables `systems` and `collections`; stopped, it goes on where it was.

    rkd eval scripts/recipes/scifact-compact.toml
    rkd eval eval/local.toml --check
    """
    console.quiet = quiet
    if is_suite(recipe):
        if set_ or allow_unknown_qrels:
            raise InputError("--set and --allow-unknown-qrels are for recipes; write it into the suite.")
        hush()
        evaluate_suite(recipe, out, store, only or [], check, quiet, json_)
        return
    if only or check:
        raise InputError(f"--only and --check are for suites, and {recipe} has no [[systems]].")
    workspace = open_workspace(recipe, out, store, set_, allow_unknown_qrels)
    from retrieval_kd import pipeline

    began = monotonic()
    _finish(workspace, pipeline.evaluate(workspace), monotonic() - began, json_)


app.command()(compare)
app.command()(frontier)


@app.command()
def score(
    recipe: Recipe,
    out: Out = None,
    store: StoreFolder = None,
    set_: Set = None,
    allow_unknown_qrels: AllowUnknown = False,
    dry_run: DryRun = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Ask each teacher in so many processes.", show_default="1; on Ray, its CPUs"),
    ] = None,
    engine_cluster: Annotated[
        Cluster | None, typer.Option(help="Ask the teachers on a Ray cluster, that of RAY_ADDRESS or this machine.")
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Let the teachers of RECIPE score the candidates; stored scores are not computed again.

    Stopped, or a process killed? Give it again: only what is missing is asked. Two runs at once take turns.
    Teachers that are metered, or that hold a collection (bm25), are asked in this process.

    rkd score recipe.toml --dry-run
    rkd score recipe.toml --processes 4
    rkd score recipe.toml --engine-cluster ray
    """
    console.quiet = quiet
    if dry_run and (processes or engine_cluster):
        raise InputError("--dry-run times a sample in this process; leave --processes and --engine-cluster out.")
    workspace = open_workspace(recipe, out, store, set_, allow_unknown_qrels, dry_run)
    if dry_run:
        from retrieval_kd import cli_pricing
        from retrieval_kd.pipeline.pricing import price

        cli_pricing.show(price(workspace), json_)
        return
    from retrieval_kd import pipeline

    workspace.processes, workspace.cluster = processes, engine_cluster.value if engine_cluster else None
    began = monotonic()
    pipeline.score(workspace)
    _finish(workspace, None, monotonic() - began, json_)


@app.command()
def mine(
    recipe: Recipe,
    file: Annotated[
        Path | None, typer.Argument(help="Score and filter too, and write the negatives here.", show_default=False)
    ] = None,
    layout: Annotated[
        str, typer.Option("--layout", help="Layout of FILE; see `rkd scores layouts`.")
    ] = "hard_negatives",
    stage: Annotated[int, typer.Option("--stage", help="The stage whose candidates and filters make FILE.")] = 0,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Whose scores go into FILE.", show_default="who denies, or the only one"),
    ] = None,
    negatives: Annotated[
        int | None, typer.Option("--negatives", min=1, help="Most of a query, chosen as the stage samples.")
    ] = None,
    allow_missing: AllowMissing = False,
    out: Out = None,
    store: StoreFolder = None,
    set_: Set = None,
    allow_unknown_qrels: AllowUnknown = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Find candidate documents for the queries of RECIPE, and say who found them; or end in a file of hard negatives.

    rkd mine recipe.toml negatives.jsonl.gz --layout hard_negatives --negatives 7
    """
    console.quiet = quiet
    if file is None and (layout != "hard_negatives" or stage or teacher or negatives or allow_missing):
        raise InputError("--layout, --stage, --teacher, --negatives and --allow-missing are about FILE; give it too.")
    from retrieval_kd.layouts import find_writer

    find_writer(layout)  # a layout that is never written is told before anything is mined
    workspace = open_workspace(recipe, out, store, set_, allow_unknown_qrels)
    from retrieval_kd import pipeline

    began = monotonic()
    facts: dict[str, Any] = {}
    if file is None:
        found = pipeline.mine(workspace)
    else:
        facts = pipeline.write_negatives(workspace, layout, file, stage, teacher, negatives, allow_missing)
        found = {str(file): facts["provenance"]}
        counts = {name: value for name, value in facts.items() if isinstance(value, int) and name != "stage"}
        say(f"{file}: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    if not quiet and not json_:
        _print_provenance(found)
    facts = {"file": str(file), **facts} if file else {"provenance": found}
    print_json(json_, {"folder": str(workspace.folder), **facts, "seconds": round(monotonic() - began, 2)})


def _print_provenance(found: dict[str, dict[str, int]]) -> None:
    """A table of who found how many candidates, of training queries without the judged relevant ones."""
    rows = [
        (name, who, f"{count:,}", f"{count / sum(counts.values()):.1%}")
        for name, counts in found.items()
        for who, count in counts.items()
    ]
    print_table(["candidates", "found by", "places", "share"], rows)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the results.")] = Path("work/demo"),
    set_: Set = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Distil MiniLM into a compact query encoder for Python's documentation, here, in minutes."""
    console.quiet = quiet
    from retrieval_kd import pipeline

    began = monotonic()
    workspace = open_workspace(Path(__file__).parent / "demo.toml", out, None, set_, False)
    result = pipeline.run(workspace)
    if not quiet:
        typer.echo(f"\nNext, serve the query encoder (no torch needed):\n\n    rkd serve {out}\n")
    _finish(workspace, result, monotonic() - began, json_)


@app.command()
def doctor(quiet: Quiet = False, json_: Json = False) -> None:
    """Say what is installed, what is missing and which extra brings it, and which precision is fast here."""
    import os

    packages = {}
    for module, extra in sorted(EXTRA_OF.items(), key=lambda item: (item[1], item[0])):
        packages[module] = {"extra": extra, "version": _version(module)}
    facts: dict[str, Any] = {
        "retrieval_kd": __version__,
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "RKD_DATA": os.environ.get("RKD_DATA"),
        "packages": packages,
    }
    if _version("torch"):
        from retrieval_kd.engines import matrix_rates

        facts["matrix_products"] = matrix_rates()
    if not quiet and not json_:
        rows = [
            (module, fact["extra"], fact["version"] or f'missing: pip install "retrieval-kd[{fact["extra"]}]"')
            for module, fact in packages.items()
        ]
        title = f"retrieval-kd {__version__}, Python {facts['python']}"
        print_table(["package", "extra", "version"], rows, title)
        typer.echo(f"{facts['cores']} cores; RKD_DATA {facts['RKD_DATA'] or 'not set'}")
        if rates := facts.get("matrix_products"):
            fast = max(rates, key=rates.__getitem__)
            speeds = ", ".join(f"{precision} {rate:.0f}" for precision, rate in rates.items())
            typer.echo(f'matrix products in torch: {speeds} GFLOP/s; precision = "{fast}" is the fast one here')
    print_json(json_, facts)


def _finish(workspace: Workspace, result: Any, seconds: float, json_: bool) -> None:
    """Print the report where there is one, and the JSON line."""
    report = result if isinstance(result, dict) and "systems" in result else None
    if report is not None and not console.quiet:
        from retrieval_kd.report import systems_markdown

        typer.echo(f"\n{systems_markdown(report['systems'], report['baseline'])}\n")
        say(f"report: {workspace.folder / 'report' / 'report.md'}")
    outcome: dict[str, Any] = {"systems": report["systems"]} if report else {"folder": str(workspace.folder)}
    print_json(json_, {**outcome, "seconds": round(seconds, 2)})


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    for name in (module, module.replace("_", "-"), {"Stemmer": "PyStemmer", "seismic": "pyseismic-lsr"}.get(module)):
        try:
            return version(name or module)
        except PackageNotFoundError:
            continue
    return "installed"


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        explained = missing_extra(error)
        if explained is error:
            raise
        typer.echo(f"Error: {explained}", err=True)
        raise SystemExit(2) from None
