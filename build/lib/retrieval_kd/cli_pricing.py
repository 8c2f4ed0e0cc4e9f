"""`rkd score --dry-run`: the table and the JSON of what scoring would cost."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from retrieval_kd.cli_output import print_json, print_table
from retrieval_kd.figures import ABSENT
from retrieval_kd.progress import console

if TYPE_CHECKING:
    from retrieval_kd.pricing import Price


def show(prices: list[Price], json_: bool) -> None:
    """Print a table of the prices, what was spent so far beside them, and the JSON line."""
    if not console.quiet and not json_:
        rows = []
        for one in prices:
            asked = f"{one.open:,} {one.unit}"
            cells = [one.teacher, one.kind, f"{one.pairs:,}", _number(one.stored), asked, _number(one.tokens)]
            cells += [_hours(one.seconds), ABSENT if one.money is None else f"{one.money:.4g}", _spent(one)]
            rows.append(cells)
        columns = ["teacher", "kind", "pairs", "stored", "to ask", "tokens", "hours", "money", "spent so far"]
        print_table(columns, rows)
        for one in prices:
            for note in one.notes:
                typer.echo(f"{one.teacher}: {note}")
        seconds = sum(one.seconds or 0.0 for one in prices)
        typer.echo(f"in all {_hours(seconds)} hours, as far as is known; nothing was asked for keeps, nothing written")
    print_json(json_, {"teachers": [facts(one) for one in prices]})


def facts(price: Price) -> dict[str, Any]:
    """A price as JSON holds it, in hours too."""
    return {**asdict(price), "hours": None if price.seconds is None else price.seconds / 3600}


def _spent(price: Price) -> str:
    spent = price.spent
    if not spent.runs:
        return "nothing"
    parts = [f"{spent.pairs:,} pairs"] if spent.pairs else []
    parts += [f"{spent.texts:,} texts"] if spent.texts else []
    parts += [f"{spent.tokens:,} tokens"] if spent.tokens is not None else []
    parts += [f"{_hours(spent.seconds)} hours"]
    parts += [f"{spent.money:.4g} money"] if spent.money is not None else []
    return ", ".join(parts)


def _number(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def _hours(seconds: float | None) -> str:
    return ABSENT if seconds is None else f"{seconds / 3600:.3g}"
