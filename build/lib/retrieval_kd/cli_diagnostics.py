"""`rkd scores stats` and `rkd scores parity`: what scores are like, and how far two engines are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieval_kd.cli_output import DocumentPrompt, Json, QueryPrompt, Quiet, Split, print_json, print_table
from retrieval_kd.cli_workspace import Out, Set, StoreFolder, open_workspace
from retrieval_kd.progress import console
from retrieval_kd.types import InputError


def stats(
    stores: Annotated[list[Path], typer.Argument(help="Folders of teacher scores, or of one teacher's.")],
    collection: Annotated[
        str | None, typer.Option("--collection", help="Only the scores of this collection, beside its judgements.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split of the collection.", show_default="train")] = None,
    query_prompt: Annotated[
        list[str] | None,
        typer.Option("--query-prompt", help="What the teachers read before each query: one for all, or one for each."),
    ] = None,
    document_prompt: Annotated[
        list[str] | None, typer.Option("--document-prompt", help="The same before each document.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A PNG of histograms and agreement to write.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Say what teachers' scores are like: coverage, range, ties, saturation, agreement with qrels and each other.

    With a scale and a temperature for each, and a word on what looks wrong. Teachers are told in the order given.

    rkd scores stats work/store --collection beir/scifact --split train --plot scores.png
    """
    console.quiet = quiet
    from retrieval_kd.data import load_collection
    from retrieval_kd.diagnostics import show
    from retrieval_kd.pipeline.diagnosis import Judge, diagnose
    from retrieval_kd.store.operations import stores as stores_in

    if collection is None and (split or query_prompt or document_prompt):
        raise InputError("--split and prompts say which texts of a collection were read; give --collection too.")
    found = [one for root in stores for one in stores_in(root) if one.parts("scores") or one.folder == root]
    if not found:
        raise InputError(f"there is no teacher with scores in {', '.join(map(str, stores))}.")
    prompts = [_of_each(given, len(found)) for given in (query_prompt, document_prompt)]
    loaded = load_collection(collection, [split or "train"]) if collection else None
    judges = [Judge(*judge) for judge in zip(found, *prompts, strict=True)]
    diagnosis = diagnose(judges, loaded, split or "train")
    if plot is not None:
        title = f"{loaded.name}, {split or 'train'}" if loaded else "all stored scores"
        show.plot(plot, diagnosis.teachers, diagnosis.agreements, diagnosis.counts, title)
    if not quiet and not json_:
        print_table(["", *diagnosis.teachers], show.teacher_rows(diagnosis.teachers))
        if diagnosis.agreements:
            columns = ["agreement of", "shared pairs", "queries", "Kendall's tau", "top-10 overlap"]
            print_table(columns, show.agreement_rows(diagnosis.agreements))
        for word in diagnosis.advice:
            typer.echo(word)
        if plot is not None:
            typer.echo(str(plot))
    print_json(json_, {**diagnosis.facts(), "plot": str(plot) if plot else None})


def _of_each(given: list[str] | None, count: int) -> list[str]:
    """One prompt for each of `count` teachers."""
    if given and len(given) not in (1, count):
        raise InputError(f"{len(given)} prompts for {count} teachers; give one for all, or one each in order.")
    return given * count if given and len(given) == 1 else given or [""] * count


def parity(
    first: Annotated[Path, typer.Argument(help="A recipe, or one teacher's folder in a store.", show_default=False)],
    second: Annotated[
        Path | None, typer.Argument(help="The folder of the same teacher on another engine.", show_default=False)
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Which teacher of the recipe.")] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="Its other engine: torch, openvino.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="Its other precision: fp32, bf16, int8.")] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Candidates of the recipe to score on both.")] = 2000,
    collection: Annotated[str | None, typer.Option("--collection", help="Of two folders, only its pairs.")] = None,
    split: Split = "test",
    query_prompt: QueryPrompt = "",
    document_prompt: DocumentPrompt = "",
    out: Out = None,
    store: StoreFolder = None,
    set_: Set = None,
    min_tau: Annotated[
        float | None, typer.Option("--min-tau", help="Exit code 1 where the mean Kendall's tau is below.")
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Say how far a teacher's scores on two engines are apart: errors, orders within lists, nDCG@10 with qrels.

    Of a recipe, both engines score a sample of its candidates, and their scores are kept; of two folders, it is
    what both hold.

    rkd scores parity recipe.toml --teacher ce --engine openvino --precision int8 --pairs 2000
    rkd scores parity work/store/ce-1a2b3c4d work/store/ce-5e6f7a8b --collection beir/scifact
    """
    console.quiet = quiet
    if first.is_dir() != (second is not None):
        raise InputError("give a recipe, or the folders of two teachers.")
    from retrieval_kd.data import load_collection
    from retrieval_kd.diagnostics import show
    from retrieval_kd.pipeline.parity import check_engines, check_stores
    from retrieval_kd.store.operations import open_folder

    changes = {name: value for name, value in (("engine", engine), ("precision", precision)) if value}
    if second is not None:
        if teacher or changes:
            raise InputError("--teacher, --engine and --precision are for a recipe; two folders hold their own.")
        loaded = load_collection(collection, [split]) if collection else None
        folders = open_folder(first), open_folder(second)
        found = check_stores(*folders, loaded, split, (query_prompt, document_prompt)).facts
    else:
        if teacher is None or not changes:
            raise InputError("give --teacher, and the --engine or --precision to compare it with.")
        workspace = open_workspace(first, out, store, set_, allow=False, dry=True)
        found = check_engines(workspace, teacher, changes, pairs, split).facts
    if not quiet and not json_:
        print_table(["", ""], show.parity_rows(found))
    print_json(json_, found)
    if min_tau is not None and not (found["kendall_tau"] or 0.0) >= min_tau:
        typer.echo(f"Kendall's tau {found['kendall_tau']} is below {min_tau}", err=True)
        raise typer.Exit(1)
