"""Layouts: the files that others publish teacher scores in. A layout's name is its module's name.

A module has FORM (what a line looks like, shown with every error) and `read`, which yields a Record
at a time; some have `write`. NEEDS_POSITIVE says that a writer cannot do without a relevant
document, BESIDE that a layout is two files, and what the second one is; USES names the kinds of
judgements that `write` puts down, where they are not scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from retrieval_kd.tables import kind_module, kinds
from retrieval_kd.types import InputError


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says about one query and some documents; None for what its layout does not tell.

    `scores` and `positive` (judged relevant) are aligned with the documents. `preferences` are
    (place, place, probability that the first document beats the second), `ranking` is places, best
    first; a place is a position among the documents. `found_by` names the systems that found each document.
    `where` is the file and line, for errors.
    """

    query_id: str | None = None
    query: str | None = None
    document_ids: list[str] | None = None
    documents: list[str] | None = None
    scores: list[float] | None = None
    positive: list[bool] | None = None
    preferences: list[tuple[int, int, float]] | None = None
    ranking: list[int] | None = None
    found_by: list[tuple[str, ...]] | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.document_ids if self.document_ids is not None else self.documents or [])


def check_layout(layout: str, path: Path, beside: Path | None = None) -> ModuleType:
    """The module of a layout; InputError for an unknown one, and for files that are not there."""
    module = kind_module("layouts", layout)
    second: str | None = getattr(module, "BESIDE", None)
    if second and beside is None:
        raise InputError(f"layout {layout!r} is two files; give the second one too (beside): {second}.")
    if beside is not None and not second:
        raise InputError(f"layout {layout!r} is one file; leave out {beside}.")
    for file in (path, beside):
        if file is not None and not file.is_file():
            raise InputError(f"{file} does not exist.")
    return module


def read_records(layout: str, path: Path, beside: Path | None = None) -> Iterator[Record]:
    """What the file holds, record by record; `.gz` and `.zst` are unpacked on the way.

    Raises InputError with file, line and form for a line that is not of the layout.
    """
    read: Callable[..., Iterator[Record]] = check_layout(layout, path, beside).read
    yield from read(path) if beside is None else read(path, beside)


def find_writer(layout: str) -> Callable[[Path, Iterable[Record]], None]:
    """The function that writes records in a layout, atomically, packed if the name ends in `.gz` or `.zst`."""
    module = kind_module("layouts", layout)
    if not hasattr(module, "write"):
        known = [name for name in kinds("layouts") if hasattr(kind_module("layouts", name), "write")]
        raise InputError(f"layout {layout!r} is only read, never written; written are {', '.join(known)}.")
    write: Callable[[Path, Iterable[Record]], None] = module.write
    return write
