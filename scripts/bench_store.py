"""The score store at scale: synthetic scores of one teacher, each operation in a process of its own.

    python scripts/bench_store.py                                # 100 million pairs, 100 candidates a query
    python scripts/bench_store.py --candidates 1000
    python scripts/bench_store.py --pairs 1_000_000_000          # 25 GB of disk, removed afterwards

Queries have distinct documents out of 8.8 million; scores are float32 with all their bits. They are appended a
million at a time, and read back before and after `compact`; what is read is compared with what was written.
Seconds are of the operation, memory is the most that its process ever held. Beside it: the nested dict in a pickle
that others keep.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

DOCUMENTS = 8_841_823  # as many as MS MARCO has passages
PART = 1_000_000  # pairs that are appended at once
PLANNED = 1_000_000  # pairs of the anti-join, of which half are stored
TRAINED = 100_000_000  # pairs of the train set, at most
TARGETS = {
    "append": "12 bytes a pair",
    "open": "1 s",
    "anti-join": "4 s",
    "train set": "1,000,000 pairs/s",
}


@dataclass(frozen=True)
class Scores:
    """Scores that anybody can compute again: those of query q are known from q alone."""

    folder: Path
    pairs: int
    candidates: int

    @property
    def queries(self) -> int:
        return self.pairs // self.candidates

    @cached_property
    def query_keys(self) -> NDArray[np.uint64]:
        keys: NDArray[np.uint64] = np.load(self.folder / "query_keys.npy", mmap_mode="r")
        return keys

    @cached_property
    def document_keys(self) -> NDArray[np.uint64]:
        keys: NDArray[np.uint64] = np.load(self.folder / "document_keys.npy", mmap_mode="r")
        return keys

    def rows(self, queries: NDArray[np.int64]) -> NDArray[np.int32]:
        """(n, K): the documents of queries, a walk with a stride that meets none twice."""
        start, stride = (scramble(queries * 2 + side) % DOCUMENTS for side in (0, 1))
        stride[np.gcd(stride, DOCUMENTS) > 1] = 1
        steps = np.arange(self.candidates, dtype=np.uint64)
        return ((start[:, None] + steps * stride[:, None]) % np.uint64(DOCUMENTS)).astype(np.int32)

    def scores(self, queries: NDArray[np.int64], rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """(n, K): about normal, as logits are, with noise down to the last bit."""
        mixed = scramble(queries[:, None] * DOCUMENTS + rows)
        noise = (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-34)
        found: NDArray[np.float32] = _normal()[mixed % np.uint64(2**20)] + noise
        return found

    def store(self) -> Any:
        from retrieval_kd.store.store import Store

        return Store.open(self.folder / "store", "synthetic", {"kind": "synthetic", "pairs": self.pairs})


def scramble(numbers: Any) -> NDArray[np.uint64]:
    """A 64-bit hash of whole numbers (splitmix64)."""
    mixed = np.asarray(numbers).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@cache
def _normal() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 4, 2**20).astype(np.float32)


class Numbered(Sequence[str]):
    """Texts that take no memory: a word and a number."""

    def __init__(self, word: str, count: int) -> None:
        self.word, self.count_ = word, count

    def __len__(self) -> int:
        return self.count_

    def __getitem__(self, place: Any) -> Any:
        if place >= self.count_:
            raise IndexError(place)
        return f"{self.word} {place}"


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    """Put the seconds of what is inside into `found`."""
    began = time.perf_counter()
    yield
    found["seconds"] = round(time.perf_counter() - began, 3)


def prepare(given: Scores) -> dict[str, Any]:
    """Keys of the texts, and the candidates that the train set is made of."""
    from retrieval_kd.store.keys import text_keys

    np.save(given.folder / "query_keys.npy", text_keys(Numbered("query", given.queries)))
    np.save(given.folder / "document_keys.npy", text_keys(Numbered("document", DOCUMENTS)))
    shape = (min(given.pairs, TRAINED) // given.candidates, given.candidates)
    rows, ranks = (
        open_memmap(given.folder / f"{name}.npy", "w+", kind, shape)
        for name, kind in (("rows", np.int32), ("ranks", np.float32))
    )
    for start in range(0, len(rows), 10_000):
        rows[start : start + 10_000] = given.rows(np.arange(start, min(start + 10_000, len(rows))))
        ranks[start : start + 10_000] = 1 / np.arange(1, given.candidates + 1, dtype=np.float32)
    return {}


def append(given: Scores) -> dict[str, Any]:
    """Append everything, in parts of a million pairs; the time of making them up is not counted."""
    store, seconds, step = given.store(), 0.0, PART // given.candidates
    for start in range(0, given.queries, step):
        queries = np.arange(start, min(start + step, given.queries))
        rows = given.rows(queries)
        keys = np.repeat(given.query_keys[queries], given.candidates), given.document_keys[rows.ravel()]
        scores = given.scores(queries, rows).ravel()
        found: dict[str, Any] = {}
        with timed(found):
            store.append_scores(*keys, scores)
        seconds += found["seconds"]
    return {"seconds": round(seconds, 3), "pairs": given.pairs, **_size(store, given)}


def _size(store: Any, given: Scores) -> dict[str, Any]:
    parts = store.parts("scores")
    return {"parts": len(parts), "bytes_a_pair": sum(path.stat().st_size for path in parts) / given.pairs}


def open_(given: Scores) -> dict[str, Any]:
    """Open the store and count what it holds."""
    found: dict[str, Any] = {}
    with timed(found):
        count = given.store().count("scores")
    assert count == given.pairs
    return found


def anti_join(given: Scores) -> dict[str, Any]:
    """Which of a million planned pairs are missing, and the scores of the others."""
    store, found = given.store(), {"pairs": PLANNED}
    rng = np.random.default_rng(1)
    queries = rng.choice(given.queries, PLANNED // given.candidates, replace=False)
    rows = given.rows(queries)
    known = rng.random(rows.shape) < 0.5
    keys = given.document_keys[rows] ^ np.where(known, 0, 1).astype(np.uint64)  # texts that nobody has
    order = rng.permutation(PLANNED)
    wanted = np.repeat(given.query_keys[queries], given.candidates)[order], keys.ravel()[order]
    with timed(found):
        scores, there = store.find_scores(*wanted)
    np.testing.assert_array_equal(there, known.ravel()[order])
    np.testing.assert_array_equal(scores[there], given.scores(queries, rows).ravel()[order][there])
    return found


def train_set(given: Scores) -> dict[str, Any]:
    """Store and candidates into the arrays of a train set."""
    from retrieval_kd.trainset import Tokens, TrainSet, mark_positives
    from retrieval_kd.types import Hits

    store = given.store()
    hits = Hits(*(np.load(given.folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "ranks")))
    count = len(hits)
    found: dict[str, Any] = {"pairs": hits.rows.size}
    judged = [{int(row): 1} for row in hits.rows[: min(count, 100_000), 0]]
    (given.folder / "trainset").mkdir()
    with timed(found):
        grids = open_memmap(given.folder / "scores.npy", "w+", np.float32, (1, *hits.rows.shape))
        missing = store.find_grid(given.query_keys[:count], given.document_keys, hits.rows, grids[0])
        positive = mark_positives(hits, judged)
        data = TrainSet(Tokens.pack([]), hits=hits, teachers=["synthetic"], scores=grids, positive=positive)
        data.save(given.folder / "trainset")
    assert not len(missing)
    made = TrainSet.load(given.folder / "trainset")
    some = np.sort(np.random.default_rng(2).choice(count, 1000, replace=False))
    assert made.scores is not None
    np.testing.assert_array_equal(made.scores[0, some], given.scores(some, given.rows(some)))
    shutil.rmtree(given.folder / "trainset")
    return found


def export(given: Scores) -> dict[str, Any]:
    """A split of a tenth of the queries in a published layout: ids and scores in Parquet."""
    from retrieval_kd.pipeline.scores import Source, export_scores
    from retrieval_kd.types import Collection, Queries

    queries = Numbered("query", min(given.queries // 10, 10_000_000 // given.candidates))
    texts = Numbered("document", DOCUMENTS)
    collection = Collection("synthetic", texts, texts, {"train": Queries(queries, queries)})
    found: dict[str, Any] = {}
    with timed(found):
        counts = export_scores("pairs", given.folder / "export.parquet", Source(given.store(), collection, "train"))
    assert counts["documents"] == len(queries) * given.candidates
    (given.folder / "export.parquet").unlink()
    return {**found, "pairs": counts["documents"]}


def verify(given: Scores) -> dict[str, Any]:
    """Read everything through, and look for pairs that stand twice."""
    from retrieval_kd.store.operations import verify as verify_store

    found: dict[str, Any] = {"pairs": given.pairs}
    with timed(found):
        verdict = verify_store(given.store())
    assert (verdict.torn, verdict.doubled) == ({}, {})
    return found


def compact(given: Scores) -> dict[str, Any]:
    """Write everything anew in few parts."""
    from retrieval_kd.store.operations import compact as compact_store

    store, found = given.store(), {"pairs": given.pairs}
    with timed(found):
        counts = compact_store(store, "scores")
    assert counts["rows"] == given.pairs
    return {**found, **_size(store, given)}


def pickle_write(given: Scores) -> dict[str, Any]:
    """The nested dict of others, query id -> document id -> score, into a pickle."""
    names: dict[int, str] = {}
    nested: dict[str, dict[str, float]] = {}
    for query in range(given.queries):
        rows = given.rows(np.array([query]))
        ids = [names.setdefault(row, str(row)) for row in rows[0].tolist()]
        nested[str(query)] = dict(zip(ids, given.scores(np.array([query]), rows)[0].tolist(), strict=True))
    found: dict[str, Any] = {"pairs": given.pairs}
    with timed(found), (given.folder / "scores.pickle").open("wb") as file:
        pickle.dump(nested, file, pickle.HIGHEST_PROTOCOL)
    return {**found, "bytes_a_pair": (given.folder / "scores.pickle").stat().st_size / given.pairs}


def pickle_read(given: Scores) -> dict[str, Any]:
    """The pickle back into memory: what has to be done before the first score is known."""
    found: dict[str, Any] = {"pairs": given.pairs}
    with timed(found), (given.folder / "scores.pickle").open("rb") as file:
        nested = pickle.load(file)
    assert sum(map(len, nested.values())) == given.pairs
    return found


OPERATIONS: dict[str, Callable[[Scores], dict[str, Any]]] = {
    "prepare": prepare,
    "append": append,
    "open": open_,
    "anti-join": anti_join,
    "train set": train_set,
    "verify": verify,
    "compact": compact,
    "open, compacted": open_,
    "anti-join, compacted": anti_join,
    "train set, compacted": train_set,
    "export, compacted": export,
    "pickle, write": pickle_write,
    "pickle, read": pickle_read,
}


def main() -> None:
    """Run every operation in turn and print the table, then one JSON line."""
    arguments = _arguments()
    if arguments.operation:
        folder, name, pairs = arguments.operation
        found = OPERATIONS[name](Scores(Path(folder), int(pairs), arguments.candidates))
        print(json.dumps(found | {"peak_mb": round(_peak_mb())}))
        return
    figures: dict[str, Any] = {"pairs": arguments.pairs, "candidates": arguments.candidates}
    folder = tempfile.mkdtemp(prefix="bench-store-", dir=arguments.folder)
    try:
        print(
            "| operation | seconds | million pairs/s | peak MB | bytes a pair | target |\n|---|---:|---:|---:|---:|---|"
        )
        for name in OPERATIONS:
            pairs = arguments.pickled if name.startswith("pickle") else arguments.pairs
            found = _spawn(arguments, folder, name, pairs)
            if name == "prepare":
                continue
            figures[name] = found
            rate = found["pairs"] / found["seconds"] / 1e6 if "pairs" in found else None
            size = found.get("bytes_a_pair")
            cells = [f"{found['seconds']:.2f}", f"{rate:.2f}" if rate else "", str(found["peak_mb"])]
            cells += [f"{size:.2f}" if size else "", TARGETS.get(name.split(",")[0], "")]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    finally:
        shutil.rmtree(folder)
    ours, theirs = figures["append"], figures["pickle, write"]
    loaded = figures["pickle, read"]
    figures["ratios"] = {
        "pickle_bytes": round(theirs["bytes_a_pair"] / ours["bytes_a_pair"], 2),
        "pickle_bytes_of_memory_a_pair": round(loaded["peak_mb"] * 1e6 / arguments.pickled),
        "pickle_seconds_to_open_a_million": round(loaded["seconds"] / arguments.pickled * 1e6, 3),
    }
    figures |= {"machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"}
    figures |= {"versions": {name: version(name) for name in ("duckdb", "pyarrow", "numpy")}}
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--candidates", type=int, default=100, help="documents a query")
    parser.add_argument("--pickled", type=int, default=10_000_000, help="pairs of the nested dict")
    parser.add_argument("--folder", type=Path, help="where to write; it is removed afterwards [default: temporary]")
    parser.add_argument("--operation", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _spawn(arguments: argparse.Namespace, folder: str, name: str, pairs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--candidates", str(arguments.candidates)]
    done = subprocess.run([*command, "--operation", folder, name, str(pairs)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_mb() -> float:
    """The most memory that this process has held, pages of files included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


if __name__ == "__main__":
    main()
