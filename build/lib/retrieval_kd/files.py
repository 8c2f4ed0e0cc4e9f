"""Files as every step reads and writes them: atomically, with errors that name file and line."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from retrieval_kd.types import Hits, InputError

PIECE_BYTES = 2**24  # of an array that is written
PIECE = 2**10  # rows of an array that are touched at once: each may bring 64 KiB of its file into memory


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`; it takes `path`'s place only if the block succeeds.

    The block may make a file or a folder there. A reader sees the old content or the new one,
    never a part; a killed writer leaves a scratch file (its name starts with a dot) and nothing else.
    Raises InputError when the disk is full.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(scratch)
        try:
            yield scratch
            for file in [scratch, *scratch.rglob("*")] if scratch.is_dir() else [scratch]:
                _sync(file)
            if path.is_dir():
                _remove(path)  # a folder cannot be replaced in one step: absent for a moment, never half
            scratch.replace(path)
            _sync(path.parent)
        finally:
            _remove(scratch)


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` for want of space into an InputError that names its folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{path.parent} is on a full disk, and {path.name} could not be written; what was written before is "
            "whole. Free some space, or move the folder to a larger disk, and give the command again: it goes on "
            "from there."
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line without its end) of a UTF-8 file; blank lines are left out."""
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); "
                    "convert the file, for example with `iconv -f latin1 -t utf-8`."
                ) from None
            if line.strip():
                yield number, line


def fingerprint(value: Any) -> str:
    """A 64-bit hash (16 hex digits) of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """A 64-bit hash (16 hex digits) of a sequence of texts, order and borders included."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_bytes(path: Path) -> int:
    """Bytes on disk of a file, or of everything in a folder."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(FileNotFoundError):  # a scratch file that has got its name meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def map_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A new array of zeros in the .npy file `path`, memory-mapped, which has its place on the disk.

    Without, a disk that is full when a page is written would end the process (SIGBUS). Raises InputError
    when there is no room.
    """
    with room(path):
        array: NDArray[np.float32] = open_memmap(path, "w+", np.float32, shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def forget(array: NDArray[Any]) -> None:
    """Give back the memory that a memory-mapped array takes; its pages are read again when they are needed."""
    if isinstance(array, np.memmap) and array.mode in ("r", "r+", "w+"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def pick(array: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """`array[places]`; of a memory-mapped array, little of the file is in memory at any time."""
    found = np.empty((len(places), *array.shape[1:]), array.dtype)
    for start in range(0, len(places), PIECE):
        found[start : start + PIECE] = array[places[start : start + PIECE]]
        forget(array)
    return found


def put(array: NDArray[Any], places: NDArray[np.int64], values: NDArray[Any]) -> None:
    """`array[places] = values`; of a memory-mapped array, little of the file is in memory at any time."""
    for start in range(0, len(places), PIECE):
        array[places[start : start + PIECE]] = values[start : start + PIECE]
        forget(array)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write `array` as .npy, a piece at a time, so that a memory-mapped one need not fit into memory."""
    with path.open("wb") as file:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        step = max(1, PIECE_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(array), step):
            file.write(np.ascontiguousarray(array[start : start + step]).data)
            forget(array)


def save_hits(folder: Path, hits: Hits) -> None:
    """Write `rows.npy` and `scores.npy` into an existing folder."""
    save_array(folder / "rows.npy", hits.rows)
    save_array(folder / "scores.npy", hits.scores)


def load_hits(folder: Path) -> Hits:
    """Open the arrays that `save_hits` wrote, memory-mapped."""
    return Hits(np.load(folder / "rows.npy", mmap_mode="r"), np.load(folder / "scores.npy", mmap_mode="r"))


def write_run(path: Path, hits: Hits, query_ids: Iterable[str], document_ids: list[str], tag: str) -> None:
    """Write hits as a TREC run: `qid Q0 docid rank score tag`, rank from 1."""
    with atomic(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for query_id, rows, scores in zip(query_ids, hits.rows, hits.scores, strict=True):
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1):
                if row >= 0:
                    file.write(f"{query_id} Q0 {document_ids[row]} {rank} {score:.9g} {tag}\n")


def read_run(path: Path, query_ids: Iterable[str], document_ids: Iterable[str]) -> Hits:
    """Read a TREC run, in the order of its scores; queries that it lacks get no results.

    Shapes: Hits (Q, K), K the longest list of the file.
    """
    row_of = {document_id: row for row, document_id in enumerate(document_ids)}
    found: dict[str, dict[int, float]] = {query_id: {} for query_id in query_ids}
    for number, line in read_lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise InputError(
                f"{path}:{number}: a TREC run line has 6 fields (qid Q0 docid rank score tag), "
                f"this one has {len(fields)}: {line[:60]!r}."
            )
        query_id, _, document_id, _, score, _ = fields
        if document_id not in row_of:
            raise InputError(f"{path}:{number}: document {document_id!r} is not in the collection.")
        results = found.get(query_id)
        if results is None:
            raise InputError(f"{path}:{number}: query {query_id!r} is not in the split.")
        if row_of[document_id] in results:
            raise InputError(f"{path}:{number}: {document_id!r} appears twice for query {query_id!r}.")
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):  # NaN has no order, and -inf stands for no result
            raise InputError(f"{path}:{number}: the score {score!r} is not a number.")
        results[row_of[document_id]] = value
    width = max((len(results) for results in found.values()), default=0)
    rows = np.full((len(found), width), -1, np.int32)
    scores = np.full((len(found), width), -np.inf, np.float32)
    for number, results in enumerate(found.values()):
        best = sorted(results.items(), key=lambda item: -item[1])
        rows[number, : len(best)] = [row for row, _ in best]
        scores[number, : len(best)] = [score for _, score in best]
    return Hits(rows, scores)
