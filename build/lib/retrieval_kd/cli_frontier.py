"""`rkd frontier`: one student over several indexes and query encoders."""

from __future__ import annotations

from time import monotonic

import typer

from retrieval_kd.cli_output import Json, Quiet, print_json, print_table
from retrieval_kd.cli_workspace import AllowUnknown, Out, Recipe, Set, StoreFolder, open_workspace
from retrieval_kd.progress import console, say


def frontier(
    recipe: Recipe,
    out: Out = None,
    store: StoreFolder = None,
    set_: Set = None,
    allow_unknown_qrels: AllowUnknown = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Measure the student of RECIPE over several indexes and query encoders: quality against latency and size.

    Needs a finished run. Points come from `frontier` in the recipe, or are those of its student's kind. Stopped? Give
    it again: what is measured stays, unless what it was measured on changed.

    rkd frontier recipe.toml
    rkd frontier recipe.toml --set frontier.repeats=3
    """
    console.quiet = quiet
    workspace = open_workspace(recipe, out, store, set_, allow_unknown_qrels)
    from retrieval_kd.pipeline.frontier import FOLDER, frontier

    began = monotonic()
    report = frontier(workspace)
    if not quiet and not json_:
        rows = []
        for name, one in report["points"].items():
            size = (one["index_bytes"] + one["encoder_bytes"]) / 1e6
            times = f"{one['encode_p50_ms']:.2f}", f"{one['search_p50_ms']:.3f}"
            rows.append((name, one["index"], one["query_encoder"], f"{one['nDCG@10']:.3f}", *times, f"{size:.1f}"))
        print_table(["point", "index", "query", "nDCG@10", "encode ms", "search ms", "MB"], rows)
        falls = [f"{step['name']} {step['value']:.3f}" for step in report["waterfall"]]
        typer.echo("where the points went: " + " → ".join(falls))
        say(f"report: {workspace.folder / FOLDER / 'frontier.md'}")
    facts = {"points": report["points"], "waterfall": report["waterfall"]}
    print_json(json_, {**facts, "seconds": round(monotonic() - began, 2)})
