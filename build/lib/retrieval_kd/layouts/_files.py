"""Reading and writing lines, JSON and Parquet, packed or not, with errors that name file and line."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_kd.files import atomic
from retrieval_kd.layouts import Record
from retrieval_kd.types import InputError

T = TypeVar("T")
CODECS = {".gz": "gzip", ".zst": "zstd"}
KINDS: dict[Any, str] = {str: "a string", list: "a list", dict: "an object"}


@contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file; `.gz` and `.zst` are unpacked. A torn one is an InputError."""
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    try:
        with pa.input_stream(str(path), compression=CODECS.get(path.suffix)) as stream:
            yield io.BufferedReader(stream)
    except OSError as error:
        raise InputError(f"{path} cannot be unpacked: {error}; fetch or make it again.") from error


@contextmanager
def packing(path: Path) -> Iterator[TextIO]:
    """A text file to write, atomically; packed if its name ends in `.gz` or `.zst`."""
    with (
        atomic(path) as scratch,
        pa.output_stream(str(scratch), compression=CODECS.get(path.suffix)) as stream,
        io.TextIOWrapper(stream, encoding="utf-8", newline="\n") as file,
    ):
        yield file


def from_lines(path: Path, form: str, parse: Callable[[str, str], T]) -> Iterator[T]:
    """`parse(line, where)` of every line that is not blank; its ValueError becomes an InputError."""
    with unpacked(path) as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
                if line and not line.isspace():
                    yield parse(line, where)
            except ValueError as error:
                raise malformed(where, form, error) from None


def from_cells(path: Path, form: str, parse: Callable[[list[str], str], T]) -> Iterator[T]:
    """`parse(cells, where)` of every line of tab-separated cells, as many as `form` has."""
    count = len(form.split("\t"))

    def cells(line: str, where: str) -> T:
        found = line.split("\t")
        if len(found) != count:
            raise ValueError(f"{len(found)} tab-separated cells, not {count}: {line[:60]!r}")
        return parse(found, where)

    return from_lines(path, form, cells)


def from_objects(path: Path, form: str, parse: Callable[[Any, str], T]) -> Iterator[T]:
    """`parse(value, where)` of every line of JSON Lines, or of every row of a `.parquet` file."""
    if path.suffix != ".parquet":
        yield from from_lines(path, form, lambda line, where: parse(json.loads(line), where))
        return
    for number, row in enumerate(_parquet_rows(path), start=1):
        where = f"{path}: row {number}"
        try:
            yield parse(row, where)
        except ValueError as error:
            raise malformed(where, form, error) from None


def from_list(path: Path, form: str, parse: Callable[[Any, str], T]) -> Iterator[T]:
    """`parse(value, where)` of every item of one JSON list, which is read whole; also of JSON Lines."""
    with unpacked(path) as file:
        start = file.peek(64)[:64].lstrip()
    if start[:1] == b"{" or path.suffix == ".parquet":
        yield from from_objects(path, form, parse)
        return
    for number, value in enumerate(whole(path, form, list), start=1):
        where = f"{path}: item {number}"
        try:
            yield parse(value, where)
        except ValueError as error:
            raise malformed(where, form, error) from None


def whole(path: Path, form: str, kind: type[T]) -> T:
    """The one JSON value of a file, a list or an object."""
    with unpacked(path) as file:
        raw = file.read()
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise malformed(str(path), form, error) from None
    if not isinstance(value, kind):
        raise malformed(str(path), form, ValueError(f"{shown(value)} is not {KINDS[kind]}"))
    return value


def malformed(where: str, form: str, problem: Exception) -> InputError:
    """The error for a line that is not of its layout."""
    reason = f"not {'UTF-8' if isinstance(problem, UnicodeDecodeError) else 'JSON'} ({problem})"
    if not isinstance(problem, UnicodeDecodeError | json.JSONDecodeError):
        reason = str(problem)
    return InputError(f"{where}: {reason}; expected {form.replace(chr(9), '<tab>')}")


def member(value: Any, key: str, kind: type[T]) -> T:
    """`value[key]`, which must be of `kind`: str, list or dict."""
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is not an object")
    if key not in value:
        raise ValueError(f"there is no {key!r}")
    if not isinstance(value[key], kind):
        raise ValueError(f"{key!r} is {shown(value[key])}, not {KINDS[kind]}")
    found: T = value[key]
    return found


def identifier(value: Any) -> str:
    """An id as a string; files hold strings or whole numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{shown(value)} is not an id")
    return str(value)


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text")
    return value


def number(value: Any) -> float:
    """A score; a string is read as the number it spells."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{shown(value)} is not a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{shown(value)} is not a finite number")
    return found


def aligned(scores: Any, documents: Sequence[Any]) -> list[float]:
    """The scores of as many documents."""
    if not isinstance(scores, list) or len(scores) != len(documents):
        raise ValueError(f"scores {shown(scores)} for {len(documents)} documents")
    return [number(score) for score in scores]


def titled(passage: Any) -> str:
    """The text of a passage with a title, as collections have it: title, a space, text."""
    title = passage.get("title") or "" if isinstance(passage, dict) else ""
    return f"{text(title)} {member(passage, 'text', str)}".strip()


def shown(value: Any) -> str:
    """The beginning of a value, for an error."""
    whole_text = repr(value)
    return whole_text if len(whole_text) <= 60 else f"{whole_text[:60]}..."


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, atomically."""
    with packing(path) as file:
        file.writelines(f"{line}\n" for line in lines)


def write_objects(path: Path, values: Iterable[Any]) -> None:
    """Write JSON Lines, atomically."""
    write_lines(path, (dumps(value) for value in values))


def write_whole(path: Path, items: Iterable[str], brackets: str) -> None:
    """Write one JSON list or object of encoded items, one a line, atomically."""
    with packing(path) as file:
        file.write(brackets[0])
        for count, item in enumerate(items):
            file.write(f"{',' if count else ''}\n{item}")
        file.write(f"\n{brackets[1]}\n")


def dumps(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def cell(value: str) -> str:
    """A text as a cell of a tab-separated line, which can hold no tab and no line break."""
    if any(mark in value for mark in "\t\r\n"):
        raise InputError(f"a text with a tab or a line break does not fit into a line of cells: {shown(value)}.")
    return value


def published(id_: str) -> int | str:
    """An id as files with whole numbers for ids have it: a number if it is one, and no zero is lost."""
    return int(id_) if id_.isascii() and id_.isdecimal() and str(int(id_)) == id_ else id_


def need(value: T | None, what: str, record: Record) -> T:
    """`value`, which a layout cannot be written without."""
    if value is None:
        raise InputError(f"this layout needs {what}, which query {record.query_id or record.query!r} lacks.")
    return value


def need_ids(record: Record) -> tuple[str, list[str]]:
    """The ids of a record's query and documents."""
    return need(record.query_id, "ids", record), need(record.document_ids, "ids", record)


def need_texts(record: Record) -> tuple[str, list[str]]:
    """The texts of a record's query and documents."""
    return need(record.query, "texts", record), need(record.documents, "texts", record)


def need_scores(record: Record) -> list[float]:
    """The scores of a record."""
    return need(record.scores, "a score of every document", record)


def split_places(record: Record) -> tuple[list[int], list[int]]:
    """The places of a record's positives, of which there must be one, and of its other documents."""
    marks = record.positive or []
    positives = [place for place, mark in enumerate(marks) if mark]
    return need(positives or None, "a positive", record), [place for place, mark in enumerate(marks) if not mark]


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}; fetch or make it again.") from error
