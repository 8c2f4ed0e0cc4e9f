"""Diagnosis of stored scores: what each teacher's are like, how far teachers agree, and the qrels with them.

The pairs of all teachers are put in the order of queries once, out of core, and then read twice, a block of whole
lists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from retrieval_kd.diagnostics.teachers import (
    NOT_JUDGED,
    NOT_RELEVANT,
    RELEVANT,
    TOP,
    Agreement,
    Comparison,
    Extent,
    Tally,
    TeacherStats,
    advise,
    compare_in_words,
)
from retrieval_kd.files import read_json
from retrieval_kd.store.keys import text_keys
from retrieval_kd.store.lookup import database, make_table
from retrieval_kd.store.store import Store, read_all
from retrieval_kd.types import Collection, Hits, InputError, Queries

SAMPLE = 1000  # queries whose lists the suggested scale and temperature go by
READ = 2**17  # pairs read at once
HITS = 512  # lists that nDCG is computed of at once

# Every pair once, of two scores the lower, as find_scores gives it. NaN is left out later: see pipeline.scores.ROWS.
ALL = """
    create temp table pairs as
    select query_key as query, teacher, document_key as document, min(score) as score
    from parts join files using (filename) group by all order by query, teacher, document
"""
OF_SPLIT = """
    create temp table pairs as
    select q.row as query, teacher, d.row as document, min(score) as score
    from parts join files using (filename)
    join queries q on q.reads = files.reads and q.key = query_key
    join documents d on d.reads = files.reads and d.key = document_key
    group by all order by query, teacher, document
"""


@dataclass(frozen=True)
class Judge:
    """A teacher's store, and what it read before each text."""

    store: Store
    query_prompt: str = ""
    document_prompt: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the teachers, by name, and of each two; `counts` are the histograms (3, BINS) of their scores.

    The rows of a histogram are of documents judged relevant, judged not relevant, and not judged. `silent` teachers
    have no score, or none of the split.
    """

    teachers: dict[str, TeacherStats]
    agreements: list[Agreement]
    silent: list[str]
    advice: list[str]
    counts: dict[str, NDArray[np.int64]]

    def facts(self) -> dict[str, Any]:
        """Everything but the histograms, as JSON has it."""
        return {
            "teachers": {name: asdict(stats) for name, stats in self.teachers.items()},
            "agreements": [asdict(agreement) for agreement in self.agreements],
            "silent": self.silent,
            "advice": self.advice,
        }


def diagnose(judges: Sequence[Judge], collection: Collection | None = None, split: str = "train") -> Diagnosis:
    """Sum up the scores of one or several teachers: all of them, or those of a collection's split.

    Without a collection nothing is known of qrels and coverage, and two teachers share the pairs whose texts they
    read alike. With one, documents of equal text are two documents, as they are where scores are exported.
    Memory: DuckDB's limit, a block of pairs, the keys of the collection, and a few numbers a query; what exceeds it
    goes to a temporary folder, 20 bytes a pair. Raises InputError when no teacher has a score.
    """
    names = _names(judges)
    queries = collection.split(split) if collection else None

    def read(parts: list[list[Path]]) -> tuple[dict[int, Tally], dict[tuple[int, int], Comparison]]:
        with database([path for some in parts for path in some]) as connection:
            return _read(connection, parts, judges, collection, queries)

    try:
        tallies, both = read_all([judge.store for judge in judges], "scores", read)
    except duckdb.Error as error:
        raise InputError(f"the stores cannot be read: {error}; run `rkd scores verify` on them.") from error
    if not tallies:
        where = f" of split {split!r} of {collection.name!r}" if collection else ""
        raise InputError(
            f"no score{where} in {', '.join(str(judge.store.folder) for judge in judges)}; if a teacher reads prompts "
            "before the texts, give them (--query-prompt, --document-prompt)."
        )
    grades = [grade for judged in queries.qrels for grade in judged.values()] if queries and queries.qrels else None
    relevant = None if grades is None else sum(grade > 0 for grade in grades)
    teachers = {names[n]: tally.finish(len(queries) if queries else None, relevant) for n, tally in tallies.items()}
    agreements = [comparison.finish(names[left], names[right]) for (left, right), comparison in both.items()]
    silent = [name for number, name in enumerate(names) if number not in tallies]
    advice = [f"{name}: no score here; if it reads prompts before the texts, give them." for name in silent]
    advice += [word for name, stats in teachers.items() for word in advise(name, stats)]
    advice += [word for agreement in agreements for word in compare_in_words(agreement)]
    counts = {names[number]: tally.counts for number, tally in tallies.items()}
    return Diagnosis(teachers, agreements, silent, advice, counts)


def _read(
    connection: duckdb.DuckDBPyConnection,
    parts: Sequence[Sequence[Path]],
    judges: Sequence[Judge],
    collection: Collection | None,
    queries: Queries | None,
) -> tuple[dict[int, Tally], dict[tuple[int, int], Comparison]]:
    """The two passes over the pairs of all teachers, for those that have a score and for each two of them."""
    extents = {number: Extent() for number in _gather(connection, parts, judges, collection, queries)}
    if not extents:
        return {}, {}
    for block in _blocks(connection):
        for number in np.unique(block.teachers).tolist():
            extents[number].add(block.scores[block.teachers == number])
    tallies = {number: Tally(extent) for number, extent in extents.items() if extent.answered}
    both = {pair: Comparison() for pair in combinations(tallies, 2)}
    sample = f"select query from (select distinct query from pairs) order by hash(query), query limit {SAMPLE}"
    sampled = np.sort(connection.sql(sample).fetchnumpy()["query"])
    for block in _blocks(connection):
        _add(block.answered(), tallies, both, sampled, collection, queries)
    return tallies, both


def _names(judges: Sequence[Judge]) -> list[str]:
    """What the teachers are called, or their folders where two are called alike."""
    folders = [judge.store.folder for judge in judges]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"a teacher is given twice: {', '.join(map(str, folders))}; give each once.")
    names = [str(read_json(folder / "teacher.json")["name"]) for folder in folders]
    plain = [folder.name if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
    return plain if len(set(plain)) == len(plain) else [str(folder) for folder in folders]


def _gather(
    connection: duckdb.DuckDBPyConnection,
    parts: Sequence[Sequence[Path]],
    judges: Sequence[Judge],
    collection: Collection | None,
    queries: Queries | None,
) -> list[int]:
    """Make the table `pairs` of the parts of all teachers; return the numbers of those that have any."""
    reads: dict[tuple[str, str], int] = {}
    files: list[tuple[str, int, int]] = []
    for number, (judge, some) in enumerate(zip(judges, parts, strict=True)):
        read = reads.setdefault((judge.query_prompt, judge.document_prompt), len(reads))
        files += [(str(path), number, read) for path in some]
    if not files:
        return []
    make_table(connection, "files", dict(zip(("filename", "teacher", "reads"), zip(*files, strict=True), strict=True)))
    if collection is not None and queries is not None:
        for name, texts, side in (("queries", queries.texts, 0), ("documents", collection.documents, 1)):
            keys = [text_keys([prompts[side] + text for text in texts]) for prompts in reads]
            columns = {
                "key": np.concatenate(keys),
                "row": np.tile(np.arange(len(texts)), len(reads)),
                "reads": np.repeat(np.arange(len(reads)), len(texts)),
            }
            make_table(connection, name, columns)
    connection.execute(ALL if collection is None else OF_SPLIT)
    return [int(number) for (number,) in connection.execute("select distinct teacher from pairs order by 1").fetchall()]


@dataclass(frozen=True)
class Block:
    """Whole lists of some queries, in the order of query, teacher, document. Shapes: all (n,)."""

    queries: NDArray[np.integer]
    teachers: NDArray[np.integer]
    documents: NDArray[np.integer]
    scores: NDArray[np.float32]

    def answered(self) -> Block:
        """The pairs that have a score."""
        known = np.isfinite(self.scores)
        return Block(self.queries[known], self.teachers[known], self.documents[known], self.scores[known])


def _blocks(connection: duckdb.DuckDBPyConnection) -> Iterator[Block]:
    """The pairs, about READ at a time, no query in two blocks."""
    waiting: list[NDArray[Any]] = []
    columns = ("query", "teacher", "document", "score")
    for batch in connection.sql("from pairs").to_arrow_reader(READ):
        new = [batch.column(name).to_numpy() for name in columns]
        waiting = [np.concatenate(both) for both in zip(waiting, new, strict=True)] if waiting else new
        whole = int(np.searchsorted(waiting[0], waiting[0][-1]))
        if whole:
            yield Block(*(column[:whole] for column in waiting))
            waiting = [column[whole:] for column in waiting]
    if waiting:
        yield Block(*waiting)


def _add(
    block: Block,
    tallies: dict[int, Tally],
    both: dict[tuple[int, int], Comparison],
    sampled: NDArray[np.integer],
    collection: Collection | None,
    queries: Queries | None,
) -> None:
    """Add a block to the second pass."""
    if not len(block.scores):
        return
    known, query = np.unique(block.queries, return_inverse=True)
    rows, document = np.unique(block.documents, return_inverse=True)
    codes = query * len(rows) + document  # a pair of the block as one number
    judged = _judged(codes, known, rows, queries)
    mine = {number: np.flatnonzero(block.teachers == number) for number in tallies}
    for number, places in mine.items():
        if not len(places):
            continue
        starts = _starts(query[places])
        lists = query[places][starts[:-1]]
        ndcg = np.zeros(0)
        if collection is not None and queries is not None and queries.qrels:
            ndcg = _ndcg(starts, known[lists], block.documents[places], block.scores[places], collection, queries)
        is_sampled = np.isin(known[lists], sampled)
        tallies[number].add(starts, block.scores[places], judged[places], ndcg, is_sampled)
    for (left, right), comparison in both.items():
        pairs = codes[mine[left]], codes[mine[right]]
        _, one, two = np.intersect1d(pairs[0], pairs[1], assume_unique=True, return_indices=True)
        if len(one):
            one, two = mine[left][one], mine[right][two]
            comparison.add(_starts(query[one]), block.scores[one], block.scores[two])


def _starts(queries: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where each query's list starts, and where the last one ends. Shapes: (n,), equal ones together, to (L + 1,)."""
    return np.concatenate([[0], np.flatnonzero(queries[1:] != queries[:-1]) + 1, [len(queries)]]).astype(np.int64)


def _judged(
    codes: NDArray[np.int64], known: NDArray[np.integer], rows: NDArray[np.integer], queries: Queries | None
) -> NDArray[np.int64]:
    """What the qrels say of each pair (n,)."""
    judged = np.full(len(codes), NOT_JUDGED)
    if queries is None or not queries.qrels:
        return judged
    pairs = [(place, row, grade) for place, q in enumerate(known) for row, grade in queries.qrels[int(q)].items()]
    if not pairs:
        return judged
    place, row, grade = np.array(pairs).T
    at = np.minimum(np.searchsorted(rows, row), len(rows) - 1)
    inside = rows[at] == row
    code, grade = (place * len(rows) + at)[inside], grade[inside]
    for kind, chosen in ((RELEVANT, grade > 0), (NOT_RELEVANT, grade <= 0)):
        judged[np.isin(codes, code[chosen])] = kind
    return judged


def _ndcg(
    starts: NDArray[np.int64],
    numbers: NDArray[np.integer],
    documents: NDArray[np.integer],
    scores: NDArray[np.float32],
    collection: Collection,
    queries: Queries,
) -> NDArray[np.float64]:
    """nDCG@10 of the lists of judged queries, as trec_eval orders them. `numbers` (L,) are the lists' queries."""
    from retrieval_kd.evaluate.quality import per_query  # imports ranx

    judged = [place for place, number in enumerate(numbers) if queries.qrels[int(number)]]
    lists = sorted(judged, key=lambda place: int(starts[place + 1] - starts[place]))  # little padding
    found = [np.zeros(0)]
    for first in range(0, len(lists), HITS):
        chunk = lists[first : first + HITS]
        width = int(starts[chunk[-1] + 1] - starts[chunk[-1]])
        hits = Hits(np.full((len(chunk), width), -1, np.int32), np.full((len(chunk), width), -np.inf, np.float32))
        for place, number in enumerate(chunk):
            one = slice(starts[number], starts[number + 1])
            hits.rows[place, : starts[number + 1] - starts[number]] = documents[one]
            hits.scores[place, : starts[number + 1] - starts[number]] = scores[one]
        chosen = queries.take([int(numbers[number]) for number in chunk])
        found.append(per_query(hits, chosen, collection.document_ids, [f"nDCG@{TOP}"])[f"nDCG@{TOP}"])
    return np.concatenate(found)
