"""`rkd scores`: teacher scores in the layouts of others, and care for the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval_kd.cli_diagnostics import parity, stats
from retrieval_kd.cli_output import (
    AllowMissing,
    DocumentPrompt,
    Json,
    QueryPrompt,
    Quiet,
    Split,
    print_json,
    print_table,
)
from retrieval_kd.progress import console, say
from retrieval_kd.tables import kind_module, kinds
from retrieval_kd.types import InputError

app = typer.Typer(
    name="scores",
    help="Teacher scores: import, export, list, diagnose, compare engines, verify, compact, merge, publish.",
    no_args_is_help=True,
)

Root = Annotated[Path, typer.Argument(help="A folder of teacher scores, or of one teacher's.", show_default=False)]
Store = Annotated[Path, typer.Option("--store", help="Folder of teacher scores.")]
Layout = Annotated[str, typer.Argument(help="Name of a layout; see `rkd scores layouts`.", show_default=False)]
CollectionName = Annotated[str, typer.Option("--collection", help="pydocs, a BEIR folder, or an ir_datasets id.")]
Splits = Annotated[
    list[str] | None, typer.Option("--split", help="Splits with the queries.", show_default="train, dev, test")
]
Teacher = Annotated[str, typer.Option("--teacher", help="Name of the teacher, or of its folder in the store.")]


@app.command()
def layouts(quiet: Quiet = False, json_: Json = False) -> None:
    """List the layouts of published score files: what a line looks like, and whether it is written too."""
    facts = {}
    for name in kinds("layouts"):
        module = kind_module("layouts", name)
        about = (module.__doc__ or "").strip().splitlines()[0]
        facts[name] = {"about": about, "form": module.FORM, "written": hasattr(module, "write")}
    if not quiet and not json_:
        rows = [(name, "rw" if fact["written"] else "r", fact["about"]) for name, fact in facts.items()]
        print_table(["layout", "", "about"], rows)
    print_json(json_, facts)


@app.command("import")
def import_(
    layout: Layout,
    file: Annotated[Path, typer.Argument(help="The file, perhaps .gz or .zst.", show_default=False)],
    collection: CollectionName,
    teacher: Annotated[str, typer.Option("--teacher", help="What to call the teacher.")],
    store: Store = Path("work/store"),
    split: Splits = None,
    beside: Annotated[Path | None, typer.Option("--beside", help="The second file of layouts that are two.")] = None,
    match: Annotated[str, typer.Option("--match", help="Go by id or by text, where the layout has both.")] = "id",
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Drop and count queries and documents that the collection lacks.")
    ] = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Put a published file of scores, preferences or rankings into the store.

    rkd scores import margin_mse bert_cat_ensemble.tsv --collection msmarco-passage --split train --teacher t2
    """
    console.quiet = quiet
    from retrieval_kd.data import load_collection
    from retrieval_kd.pipeline.scores import import_scores

    options = {"match": match, "allow_unknown": allow_unknown, **({"beside": beside} if beside else {})}
    loaded = load_collection(collection, split or ["train", "dev", "test"])
    counts = import_scores(layout, file, loaded, teacher, store, options)
    say(", ".join(f"{name} {value:,}" for name, value in counts.items() if name != "store"))
    print_json(json_, counts)


@app.command()
def export(
    layout: Layout,
    out: Annotated[Path, typer.Argument(help="The file to write; .gz and .zst are packed.", show_default=False)],
    collection: CollectionName,
    teacher: Teacher,
    split: Split = "train",
    store: Store = Path("work/store"),
    query_prompt: QueryPrompt = "",
    document_prompt: DocumentPrompt = "",
    allow_missing: AllowMissing = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Write what a teacher judged of a split in a published layout.

    rkd scores export colbert examples.jsonl --collection beir/scifact --split train --teacher ce
    """
    console.quiet = quiet
    from retrieval_kd.layouts import find_writer
    from retrieval_kd.pipeline.scores import export_scores, open_source
    from retrieval_kd.store.operations import find_store

    find_writer(layout)  # a layout that is never written is told before the collection is loaded
    source = open_source(find_store(store, teacher), collection, split, query_prompt, document_prompt)
    counts = export_scores(layout, out, source, allow_missing)
    say(f"{out}: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()))
    print_json(json_, {"file": str(out), **counts})


@app.command()
def ls(store: Root, quiet: Quiet = False, json_: Json = False) -> None:
    """List the teachers of a store and what is kept of each."""
    from retrieval_kd.store.operations import stores, summary

    found = [summary(one) for one in stores(store)]
    if not quiet and not json_:
        columns = ["teacher", "kind", "fingerprint", "pairs", "preferences", "rankings", "vectors", "bytes", "parts"]
        rows = [[*(_cell(fact[name]) for name in columns), fact["written"] or "never"] for fact in found]
        print_table([*columns, "last written"], rows)
        for fact in found:
            if fact["torn"]:
                typer.echo(f"{fact['folder']}: {fact['torn']} parts cannot be read; see `rkd scores verify {store}`")
    print_json(json_, {"teachers": found})


app.command()(stats)
app.command()(parity)


@app.command()
def verify(store: Root, quiet: Quiet = False, json_: Json = False) -> None:
    """Read every part through, checksums included. Exit code 1, and their names, if some are torn.

    Judgements that stand twice are counted: they change no answer, and `compact` takes them out.
    """
    from retrieval_kd.store.operations import stores
    from retrieval_kd.store.operations import verify as verify_store

    found: dict[str, Any] = {}
    torn: dict[Path, str] = {}
    for one in stores(store):
        verdict = verify_store(one)
        torn |= verdict.torn
        found[one.folder.name] = {
            "parts": verdict.parts,
            "torn": {str(path): problem for path, problem in verdict.torn.items()},
            "unsorted": [str(path) for path in verdict.unsorted],
            "doubled": verdict.doubled,
        }
        if not quiet and not json_:
            notes = [f"{count:,} {kind} stand twice" for kind, count in verdict.doubled.items()]
            notes += [f"{len(verdict.unsorted)} parts out of order"] if verdict.unsorted else []
            notes += [f"{len(verdict.torn)} torn"] if verdict.torn else ["all whole"]
            typer.echo(f"{one.folder.name}: {verdict.parts} parts, {', '.join(notes)}")
    if not json_:
        for path, problem in torn.items():
            typer.echo(f"{path}: {problem}", err=True)
    print_json(json_, {"whole": not torn, "teachers": found})
    if torn:
        raise typer.Exit(1)


@app.command()
def quarantine(
    part: Annotated[Path | None, typer.Argument(help="A part to move out of its store.", show_default=False)] = None,
    all_torn: Annotated[Path | None, typer.Option("--all-torn", help="Move every torn part of this store.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Move a part, or every torn one, out of its store; what it held counts as not judged from then on.

    rkd scores quarantine --all-torn work/store
    """
    from retrieval_kd.store.operations import quarantine as move
    from retrieval_kd.store.operations import stores
    from retrieval_kd.store.operations import verify as verify_store

    if (part is None) == (all_torn is None):
        raise InputError("give a part to quarantine, or --all-torn STORE.")
    parts = [part] if part else []
    for one in stores(all_torn) if all_torn else ():
        parts += verify_store(one).torn
    moved = {str(path): str(move(path)) for path in parts}
    if not quiet and not json_:
        for old, new in moved.items():
            typer.echo(f"{old} -> {new}")
    print_json(json_, {"moved": moved})


@app.command()
def compact(
    store: Root,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Only this teacher.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Write many small parts anew as few large ones, each judgement once. Stopped at any moment, nothing is lost.

    Others may go on scoring into the store and reading from it meanwhile; a second `compact` waits for the first.
    """
    from retrieval_kd.store.operations import KINDS, find_store, stores
    from retrieval_kd.store.operations import compact as compact_store

    done: dict[str, Any] = {}
    for one in [find_store(store, teacher)] if teacher else stores(store):
        for kind in KINDS:
            if not one.parts(kind):
                continue
            counts = compact_store(one, kind)
            done.setdefault(one.folder.name, {})[kind] = counts
            if not quiet and not json_:
                before, rows = counts["parts_before"], counts["rows_before"]
                typer.echo(
                    f"{one.folder.name}: {kind}: {before:,} parts -> {counts['parts']:,}, "
                    f"{rows:,} rows -> {counts['rows']:,}"
                )
    print_json(json_, {"teachers": done})


@app.command()
def merge(
    into: Annotated[Path, typer.Argument(help="One teacher's folder in a store.", show_default=False)],
    other: Annotated[Path, typer.Argument(help="The same teacher's folder from elsewhere.", show_default=False)],
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Copy what another folder of the same teacher holds into INTO; another teacher's is refused.

    rkd scores merge work/store/ce-1a2b3c4d /mnt/other/store/ce-1a2b3c4d
    """
    from retrieval_kd.store.operations import merge as merge_stores
    from retrieval_kd.store.operations import open_folder

    counts = merge_stores(open_folder(into), open_folder(other))
    if not quiet and not json_:
        typer.echo(f"{into}: {counts['copied']} parts copied; {other} is as it was")
    print_json(json_, counts)


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="Folder of the data set to write.", show_default=False)],
    collection: CollectionName,
    teacher: Teacher,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the scores, as the Hub calls it: apache-2.0.")],
    split: Split = "train",
    store: Store = Path("work/store"),
    query_prompt: QueryPrompt = "",
    document_prompt: DocumentPrompt = "",
    about: Annotated[str, typer.Option("--about", help="A paragraph for the card.")] = "",
    repo: Annotated[str | None, typer.Option("--repo", help="Upload it too, as this data set of the Hub.")] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Write a Hugging Face data set of a teacher's judgements, with a card that says whose they are; upload it.

    rkd scores push out --collection beir/scifact --teacher ce --licence apache-2.0 --repo me/scifact-scores
    """
    console.quiet = quiet
    from retrieval_kd.pipeline import scores
    from retrieval_kd.store.operations import find_store

    source = scores.open_source(find_store(store, teacher), collection, split, query_prompt, document_prompt)
    counts = scores.publish(source, out, licence, about)
    say(f"{out}: " + ", ".join(f"{kind} {count:,}" for kind, count in counts.items()))
    address = scores.push(out, repo) if repo else None
    if address:
        say(address)
    print_json(json_, {"folder": str(out), **counts, "address": address})


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
