"""The score store: every judgement of a teacher is kept on disk, and paid for once.

    store/<teacher name>-<fingerprint8>/
      teacher.json                who judged: name, fingerprint, identity
      scores/part-*.parquet       query_key, document_key, score
      preferences/part-*.parquet  query_key, first_key, second_key, probability
      rankings/part-*.parquet     query_key, document_keys
      embeddings/part-*.parquet   text_key, vector
      ledger.jsonl                what each run cost
      .lock  .compact             held by the run that asks the teacher, or compacts

Parts are written whole, under unique names, and never changed, so any number of processes may
append and read at once, and a killed one loses at most the batch that it had in hand. Two that append
the same judgement do no harm: the answer is the same whatever the order, `verify` counts it as doubled, and
`compact` leaves it once. So that nothing is paid for twice, whoever asks the teacher for what the
store lacks does so inside `Store.alone`: a second run waits for the first, and finds its answers.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval_kd.files import fingerprint, pick, put, read_json, read_lines, room, write_json
from retrieval_kd.store.locks import Lock, hold
from retrieval_kd.store.lookup import BLOCK, find_pairs, find_rows, find_vectors
from retrieval_kd.store.parts import Kind, count_rows, embedding_width, schema_of, write_part
from retrieval_kd.types import InputError

T = TypeVar("T")
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Store:
    """One teacher's judgements on disk. The keys are `text_keys` of the texts as the teacher reads them."""

    folder: Path
    identity: dict[str, Any]

    @classmethod
    def open(cls, root: Path, name: str, identity: Mapping[str, Any]) -> Store:
        """Open the store of the teacher that `identity` describes, under `root`; make it if there is none.

        `identity` holds all that the teacher's answers depend on (model, revision, prompt, lengths,
        dtype), as JSON can. It alone decides: a teacher keeps its store under another `name`, and
        another teacher never gets it. Raises InputError when a folder cannot be told apart.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise InputError(f"teacher name {name!r} names a folder; use letters, digits, '_', '.' and '-' only.")
        found = cls.find(root, identity)
        if found is not None:
            return found
        who = _read_back(identity)
        mark = fingerprint(who)
        folder = root / f"{name}-{mark[:8]}"
        write_json(folder / "teacher.json", {"name": name, "fingerprint": mark, "identity": who})
        return cls(folder, who)

    @classmethod
    def find(cls, root: Path, identity: Mapping[str, Any]) -> Store | None:
        """The store of the teacher that `identity` describes, under `root`; unlike `open` it makes none."""
        who = _read_back(identity)
        mark = fingerprint(who)
        known = [folder for folder in sorted(root.glob(f"*-{mark[:8]}")) if _holds(folder, mark, who)]
        if len(known) > 1:
            raise InputError(
                f"{known[0]} and {known[1]} hold the same teacher; move the parts and ledger lines of one "
                "into the other (part names never clash) and delete its folder."
            )
        return cls(known[0], who) if known else None

    def find_scores(self, query_keys: Keys, document_keys: Keys) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The scores of pairs, and which of them are known. Pairs may repeat.

        A pair that is found with NaN was asked, and the teacher gave no answer. Where two processes
        scored the same pair, the lower score is taken, a number before NaN, whatever the order.
        Shapes: query_keys, document_keys (n,); returns scores (n,), NaN where not found, and found (n,).
        """
        assert query_keys.dtype == document_keys.dtype == np.uint64, "keys are uint64"
        assert query_keys.shape == document_keys.shape, "two arrays (n,)"
        scores = np.full(len(query_keys), np.nan, np.float32)
        found = np.zeros(len(query_keys), np.bool_)
        order = np.argsort(query_keys)  # so that a block is of a range of keys
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            find = partial(find_pairs, query_keys=query_keys[block], document_keys=document_keys[block])
            position, score = self.read("scores", find)
            found[block[position]] = True
            np.fmin.at(scores, block[position], score)
        return scores, found

    def find_grid(
        self,
        query_keys: Keys,
        document_keys: Keys,
        rows: NDArray[np.int32],
        scores: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Fill `scores` of candidate lists, and return the places (n, 2) of queries and ranks that have none.

        What is filled is what `find_scores` gives, and -inf where there is no candidate. Queries are taken in the
        order of their keys, a block at a time, so that memory is that of a block beside the arrays,
        and nothing where these are memory-mapped. Shapes: query_keys (Q,), document_keys (N,), rows and scores (Q, K).
        """
        missing = [np.empty(0, np.int64)]
        order, width = np.argsort(query_keys), max(1, rows.shape[1])
        step = max(1, BLOCK // width)
        for start in range(0, len(order), step):
            block = np.sort(order[start : start + step])
            wanted = pick(rows, block)  # (b, K)
            query, rank = np.nonzero(wanted >= 0)
            found = np.full(wanted.shape, -np.inf, np.float32)
            values, known = self.find_scores(query_keys[block[query]], document_keys[wanted[query, rank]])
            found[query, rank] = values
            put(scores, block, found)
            missing.append(block[query[~known]] * width + rank[~known])
        return np.stack(np.divmod(np.sort(np.concatenate(missing)), width), axis=1)

    def append_scores(self, query_keys: Keys, document_keys: Keys, scores: NDArray[np.float32]) -> None:
        """Keep the scores of pairs, NaN for no answer; on disk when this returns.

        Each call makes one file, so give thousands of pairs at once. Shapes: all (n,).
        """
        order = np.lexsort((document_keys, query_keys))
        self._append("scores", query_keys[order], document_keys[order], scores[order])

    def find_embeddings(self, keys: Keys) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The teacher's vectors of texts, and which of them are known. Keys may repeat.

        Shapes: keys (n,); returns vectors (n, D), NaN where not found, and found (n,). D is 0 in an
        empty store.
        """
        assert keys.dtype == np.uint64, "keys are uint64"
        return self.read("embeddings", lambda parts: find_vectors(parts, keys))

    def append_embeddings(self, keys: Keys, vectors: NDArray[np.float32]) -> None:
        """Keep the vectors of texts. Shapes: keys (n,), vectors (n, D)."""
        _, width = vectors.shape
        assert width > 0, "vectors (n, D)"
        stored = self.read("embeddings", lambda parts: embedding_width(parts[0]) if parts else width)
        if stored != width:
            raise InputError(
                f"{self.folder} holds vectors of width {stored}, these have {width}; "
                "a teacher with another width is another teacher, so its identity must say so."
            )
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        vector = pa.FixedSizeListArray.from_arrays(flat, type=schema_of("embeddings", width).field("vector").type)
        self._append("embeddings", keys, vector, width=width)

    def append_preferences(
        self, query_keys: Keys, first_keys: Keys, second_keys: Keys, probabilities: NDArray[np.float32]
    ) -> None:
        """Keep the probabilities that the first document beats the second. Shapes: all (n,)."""
        self._append("preferences", query_keys, first_keys, second_keys, probabilities)

    def append_rankings(self, query_keys: Keys, document_keys: Sequence[Keys]) -> None:
        """Keep the teacher's order of documents, best first. Shapes: query_keys (n,), document_keys n x (any,)."""
        ends = np.cumsum([0, *map(len, document_keys)], dtype=np.int32)
        flat = np.concatenate([np.empty(0, np.uint64), *document_keys])
        kind = schema_of("rankings").field("document_keys").type
        self._append("rankings", query_keys, pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), type=kind))

    def preferences(self, query_keys: Keys | None = None) -> pa.Table:
        """The preferences of some queries, or all, oldest part first: query_key, first_key, second_key, probability."""
        return self.read("preferences", lambda parts: find_rows(parts, "preferences", query_keys))

    def rankings(self, query_keys: Keys | None = None) -> pa.Table:
        """The rankings of some queries, or all, oldest part first: query_key, document_keys."""
        return self.read("rankings", lambda parts: find_rows(parts, "rankings", query_keys))

    def alone(self, name: str) -> AbstractContextManager[Lock]:
        """Be the one run that asks the teacher, called `name`; another that wants to waits.

        Look inside what the store lacks, also if you have looked before. Reading needs no lock, nor does appending
        what has been paid for.
        """
        wait = "waiting until it has ended, so that nothing is paid for twice"
        return hold(self.folder / ".lock", f"{name}: another run asks this teacher; {wait}")

    def parts(self, kind: Kind) -> list[Path]:
        """The files that hold the judgements of one kind, oldest first."""
        return sorted((self.folder / kind).glob("part-*.parquet"))

    def read(self, kind: Kind, read: Callable[[list[Path]], T]) -> T:
        """What `read` makes of the parts of one kind; made again if `compact` took some away meanwhile."""
        return read_all([self], kind, lambda parts: read(parts[0]))

    def count(self, kind: Kind) -> int:
        """The judgements of one kind on disk, from the footers; those made twice count twice."""
        return self.read(kind, lambda parts: sum(count_rows(path, kind) for path in parts))

    def record(self, pairs: int, texts: int, tokens: int | None, seconds: float, money: float | None = None) -> None:
        """Add what a run cost to the ledger; `tokens` is None where the teacher does not count them.

        `money` is in the currency of the prices that the recipe gives, and left out where it gives none.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "pairs": pairs, "texts": texts, "tokens": tokens, "seconds": round(seconds, 3)}
        if money is not None:
            entry["money"] = round(money, 9)
        line = json.dumps(entry).encode() + b"\n"
        path = self.folder / "ledger.jsonl"
        with room(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                end = os.fstat(handle).st_size
                if os.write(handle, line) < len(line):
                    os.ftruncate(handle, end)  # half a line could be read by nobody
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)

    def ledger(self) -> list[dict[str, Any]]:
        """What each run cost, oldest first."""
        path = self.folder / "ledger.jsonl"
        entries = []
        for number, line in read_lines(path) if path.exists() else ():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not valid JSON ({error}); delete this line.") from None
        return entries

    def _append(self, kind: Kind, *columns: NDArray[Any] | pa.Array, width: int = 1) -> None:
        assert len({len(column) for column in columns}) == 1, "columns of one length"
        assert all(column.dtype == np.uint64 for column in columns[:-1]), "keys are uint64"
        if len(columns[0]):
            write_part(self.folder / kind, pa.table(list(columns), schema=schema_of(kind, width)))


def read_all(stores: Sequence[Store], kind: Kind, read: Callable[[list[list[Path]]], T]) -> T:
    """What `read` makes of the parts of one kind in each store; made again if `compact` took some away meanwhile."""
    while True:
        parts = [store.parts(kind) for store in stores]
        try:
            return read(parts)
        except (InputError, OSError, duckdb.Error):
            if all(path.exists() for some in parts for path in some):
                raise


def _read_back(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it will be read back: lists for tuples."""
    found: dict[str, Any] = json.loads(json.dumps(dict(identity)))
    return found


def _holds(folder: Path, mark: str, identity: dict[str, Any]) -> bool:
    """Whether `folder` is the store of this teacher; False where a killed writer left it empty."""
    judged = any(folder.glob("*/part-*.parquet"))  # before looking for teacher.json, which is written first
    path = folder / "teacher.json"
    if not path.exists():
        if judged:
            raise InputError(f"{path} is gone, so nobody can say whose judgements {folder} holds; restore it.")
        return False
    teacher = read_json(path)
    if not isinstance(teacher, dict) or not {"fingerprint", "identity"} <= teacher.keys():
        raise InputError(f"{path} does not say who the teacher is; restore it or move {folder} away.")
    if (teacher["fingerprint"], teacher["identity"]) != (mark, identity):
        raise InputError(
            f"{folder} belongs to another teacher, though its name ends in the same 8 digits: "
            f"{teacher['identity']} (fingerprint {teacher['fingerprint']}), not {identity} ({mark}). "
            "If teacher.json was edited, restore it; otherwise keep this teacher's store in another folder."
        )
    return True
