"""Runs that others made: TREC files, which may hold queries that are not judged."""

from __future__ import annotations

from pathlib import Path

from retrieval_kd.evaluate.registry import Judged
from retrieval_kd.files import read_lines, read_run
from retrieval_kd.types import Hits, InputError


def read_judged_run(file: Path, judged: Judged) -> tuple[Hits, list[str]]:
    """The judged queries' results in a TREC run, and notes: queries that are not judged, and those that it lacks.

    Raises InputError for a run without any judged query. Shapes: hits (Q, K), K the longest list of the file.
    """
    ids = list(judged.queries.ids)
    found = dict.fromkeys(line.split(maxsplit=1)[0] for _, line in read_lines(file))
    wanted = set(ids)
    others = [query_id for query_id in found if query_id not in wanted]
    missing = len(wanted - found.keys())
    if missing == len(ids):
        raise InputError(
            f"{file} has no query of split {judged.split!r} of {judged.name}; it is of another collection."
        )
    hits = read_run(file, [*ids, *others], judged.collection.document_ids)
    notes = [f"{len(others):,} queries of the run are not judged, and left out"] if others else []
    notes += [f"{missing:,} judged queries are not in the run, and count 0"] if missing else []
    return Hits(hits.rows[: len(ids)], hits.scores[: len(ids)]), notes
