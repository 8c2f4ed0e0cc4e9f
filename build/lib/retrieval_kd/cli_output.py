"""What commands print, tables and the JSON line, and the options that several of them take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no news.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
Split = Annotated[str, typer.Option("--split", help="Split of the collection.")]
QueryPrompt = Annotated[str, typer.Option("--query-prompt", help="What the teacher read before each query.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="Leave out and count queries without a positive.")]
DocumentPrompt = Annotated[str, typer.Option("--document-prompt", help="What the teacher read before each document.")]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table as wide as the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    Console().print(table)


def print_json(json_: bool, facts: dict[str, Any]) -> None:
    """With `--json`, end with one object on a line."""
    if json_:
        typer.echo(json.dumps(facts, ensure_ascii=False))
