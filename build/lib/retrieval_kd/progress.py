"""Progress of long work: a bar on a terminal, nothing elsewhere or when told to be quiet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar for `total` units of work; call what is yielded as `advance(n, "note")`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal or console.quiet) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            bar.advance(task, amount)
            if note:
                bar.update(task, note=note)

        yield advance


def say(message: str) -> None:
    """Print one line of news about the run to standard error."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)
