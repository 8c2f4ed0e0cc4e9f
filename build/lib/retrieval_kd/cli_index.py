"""`rkd index`: the documents encoded and their index built, or what that would take."""

from __future__ import annotations

from dataclasses import asdict
from time import monotonic
from typing import TYPE_CHECKING

import typer

from retrieval_kd.cli_output import Json, Quiet, print_json, print_table
from retrieval_kd.cli_workspace import AllowUnknown, DryRun, Out, Recipe, Set, StoreFolder, open_workspace
from retrieval_kd.figures import ABSENT
from retrieval_kd.progress import console
from retrieval_kd.types import InputError

if TYPE_CHECKING:
    from retrieval_kd.pipeline.preflight import Preflight


def index(
    recipe: Recipe,
    out: Out = None,
    store: StoreFolder = None,
    set_: Set = None,
    allow_unknown_qrels: AllowUnknown = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Encode the documents with the trained student and build its index.

    Of a large collection vectors are kept in shards (`corpus` in a recipe), and a stopped run goes on at the last one.
    A dry run ends with an error if something would not fit.

    rkd index recipe.toml --dry-run
    """
    console.quiet = quiet
    workspace = open_workspace(recipe, out, store, set_, allow_unknown_qrels, dry_run)
    from retrieval_kd import pipeline

    if dry_run:
        from retrieval_kd.pipeline.preflight import preflight

        _show(preflight(workspace), json_)
        return
    began = monotonic()
    pipeline.index(workspace)
    print_json(json_, {"folder": str(workspace.folder), "seconds": round(monotonic() - began, 2)})


def _show(found: Preflight, json_: bool) -> None:
    if not console.quiet and not json_:
        rate = ABSENT if found.documents_per_second is None else f"{found.documents_per_second:,.0f} a second"
        rows = [
            ("documents", f"{found.documents:,}"),
            ("encoded already", f"{found.encoded:,}"),
            ("encoding", f"{found.seconds / 3600:,.3g} hours, {rate}"),
            ("disk: vectors", _gigabytes(found.vector_bytes)),
            ("disk: index", _gigabytes(found.index_bytes)),
            ("disk: texts", _gigabytes(found.text_bytes)),
            ("disk: free", _gigabytes(found.disk_free_bytes)),
            ("memory: peak", _gigabytes(found.memory_bytes)),
            ("memory: free", _gigabytes(found.memory_free_bytes)),
        ]
        print_table(["what", "how much"], rows)
        for note in found.notes:
            typer.echo(note)
        typer.echo("nothing written")
    print_json(json_, {**asdict(found), "problems": found.problems})
    if found.problems:
        raise InputError(
            f"this would not fit: {'; '.join(found.problems)}. Keep smaller vectors (corpus.vectors), choose a smaller "
            "index, or give folders on larger disks (--out, --store)."
        )


def _gigabytes(size: int | None) -> str:
    return ABSENT if size is None else f"{size / 1e9:,.3g} GB"
