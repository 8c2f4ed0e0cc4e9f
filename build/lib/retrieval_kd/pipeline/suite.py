"""A suite at work: every system on every collection, each result kept, and a report.

    OUT/COLLECTION/runs/SYSTEM/    rows.npy, scores.npy, run.trec
    OUT/COLLECTION/report/         comparison.json, per_query.tsv
    OUT/report.md, OUT/report.json

A stopped suite goes on where it was; what is finished is made again only if something that it depends on has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retrieval_kd.compare import FORMAT, compare
from retrieval_kd.encoder import Encoder
from retrieval_kd.evaluate.per_query import PER_QUERY, Measured, bounded, write_per_query
from retrieval_kd.evaluate.quality import per_query, without_self
from retrieval_kd.evaluate.registry import Judged, open_judged, registry
from retrieval_kd.evaluate.runs import read_judged_run
from retrieval_kd.evaluate.significance import LEVEL, ROUNDS
from retrieval_kd.files import (
    fingerprint,
    hash_texts,
    load_hits,
    read_json,
    save_hits,
    sha256,
    write_json,
    write_run,
)
from retrieval_kd.fusion import fuse_hits, normalise_hits
from retrieval_kd.pipeline.stage_folder import make_folder
from retrieval_kd.progress import say
from retrieval_kd.scoring import fill_scores, fill_vectors, rerank, retrieve
from retrieval_kd.suite import (
    OWN,
    Suite,
    SuiteCollection,
    SuiteSystem,
    file_name,
    load_suite,
    own_options,
    same_file_name,
)
from retrieval_kd.suite_report import check_expected, metrics_of, suite_report, write_suite_report
from retrieval_kd.tables import Component, did_you_mean, kind_module, options
from retrieval_kd.teachers import Embedder, Retriever, Teacher, load_teacher, scored_as
from retrieval_kd.types import Hits, InputError

Search = Callable[[], tuple[Hits, dict[str, Any]]]  # hits, and facts with notes

TRAINED = "student"  # the folder of a recipe's results that holds the student


def run_suite(
    path: Path, folder: Path | None = None, store: Path | None = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure every system on every collection (`only` those named), write the report, and return its JSON.

    `folder` is work/SUITE, and `store` work/store, if they are not given. File names in a suite are relative to it.
    """
    suite = load_suite(path)
    check_expected(suite)
    folder = folder or Path("work") / path.stem
    tables = _expanded(suite, only)
    for system in suite.systems:
        if system.kind not in OWN:
            options("teachers", _component(system))  # a mistake is told before anything is loaded
    measured = [
        _measure(Place(suite, path.parent, table, folder / file_name(table.title), store or folder.parent / "store"))
        for table in tables
    ]
    report = suite_report(path.stem, suite, measured)
    write_suite_report(folder, report)
    return report


@dataclass
class Place:
    """A suite at one collection: what is loaded there, and where results are kept."""

    suite: Suite
    beside: Path  # the suite's own folder
    table: SuiteCollection
    folder: Path
    store: Path

    @cached_property
    def judged(self) -> Judged:
        """The collection, read once."""
        keys = ("split", "metric", "relevance", "self_ids", "query", "allow_mismatch", "allow_unknown_qrels")
        judged = open_judged(self.table.name, **{key: getattr(self.table, key) for key in keys})
        for note in judged.notes:
            say(f"{self.table.title}: {note}")
        return judged

    @cached_property
    def texts_key(self) -> str:
        """A fingerprint of all ids and texts that are searched."""
        queries, collection = self.judged.queries, self.judged.collection
        texts = (queries.ids, queries.texts, collection.document_ids, collection.documents)
        return fingerprint([hash_texts(some) for some in texts])


def _expanded(suite: Suite, only: Sequence[str]) -> list[SuiteCollection]:
    """The collections that are measured: the parts of one that is the mean of others."""
    titles = [table.title for table in suite.collections]
    for name in only:
        if name not in titles:
            raise InputError(f"--only {name}: the suite has no such collection{did_you_mean(name, titles)}.")
    tables = []
    for table in suite.collections:
        entry = registry().get(table.name)
        if only and table.title not in only:
            continue
        if entry is not None and entry.parts:
            if table.label or table.split or table.query != "original":
                raise InputError(f"collection {table.name} has parts; label, split and query are for one collection.")
            tables += [table.model_copy(update={"name": part}) for part in entry.parts]
        else:
            tables.append(table)
    if same := same_file_name([table.title for table in tables]):
        raise InputError(f"{same[0]} is measured twice: as a part of another collection, and as {same[1]}; drop one.")
    return tables


def _measure(place: Place) -> dict[str, Any]:
    """Every system's run at one collection, and their comparison."""
    judged, suite = place.judged, place.suite
    runs: dict[str, Hits] = {}
    keys: dict[str, str] = {}
    notes = list(judged.notes)
    for system in suite.systems:
        inputs, search = _search(place, system, runs, keys)

        def work(folder: Path, system: SuiteSystem = system, search: Search = search) -> dict[str, Any]:
            hits, facts = search()
            if judged.self_ids:
                hits = without_self(hits, judged.queries.ids, judged.collection.document_ids)
            hits = hits.top(suite.depth)
            save_hits(folder, hits)
            ids = list(judged.collection.document_ids)
            write_run(folder / "run.trec", hits, judged.queries.ids, ids, system.name)
            return facts

        inputs = [inputs, suite.depth, judged.self_ids, place.texts_key]
        title = f"{place.table.title}: {system.name}"
        manifest = make_folder(place.folder / "runs" / system.name, title, inputs, work)
        keys[system.name] = manifest["key"]
        runs[system.name] = load_hits(place.folder / "runs" / system.name)
        notes += [f"{system.name}: {note}" for note in manifest["notes"]]
    return {**_compared(place, runs, keys), "notes": notes}


def _compared(place: Place, runs: dict[str, Hits], keys: dict[str, str]) -> dict[str, Any]:
    """The systems of a collection measured and compared; kept like the runs."""
    judged, suite = place.judged, place.suite
    metrics = metrics_of(suite, place.table, registry().get(place.table.name))
    grades = [sorted(grades.items()) for grades in judged.queries.qrels]

    def work(folder: Path) -> dict[str, Any]:
        queries, ids = judged.queries, list(judged.collection.document_ids)
        quality = {name: per_query(hits, queries, ids, metrics, judged.relevance) for name, hits in runs.items()}
        short = {name: bounded(metrics, hits.rows.shape[1], len(ids)) for name, hits in runs.items()}
        measured = Measured(queries.ids, quality, short)
        facts = {
            "collection": place.table.title,
            "name": place.table.name,
            "split": judged.split,
            "documents": len(judged.collection),
            "judgements": sum(map(len, queries.qrels)),
            "relevance": judged.relevance,
            "self_ids": judged.self_ids,
        }
        write_json(folder / "comparison.json", compare(measured, judged.metric, facts=facts))
        write_per_query(folder / PER_QUERY, measured)
        return {}

    measure = [metrics, judged.metric, judged.relevance]
    inputs = [keys, fingerprint(grades), measure, place.table.title, ROUNDS, LEVEL, FORMAT]
    make_folder(place.folder / "report", f"{place.table.title}: report", inputs, work)
    found: dict[str, Any] = read_json(place.folder / "report" / "comparison.json")
    return found


def _search(place: Place, system: SuiteSystem, runs: dict[str, Hits], keys: dict[str, str]) -> tuple[Any, Search]:
    """What a system's run depends on, and the function that makes it: hits, and facts with notes."""
    judged, depth = place.judged, place.suite.depth + place.judged.self_ids  # one more where one may be taken out
    if system.kind == "fusion":
        of = own_options(system)

        def fuse() -> tuple[Hits, dict[str, Any]]:
            lists = [normalise_hits(runs[name]) for name in of.of]
            return fuse_hits(lists, of.shares or [1.0] * len(lists), depth), {"notes": []}

        return [system.kind, [keys[name] for name in of.of], of.shares], fuse
    if system.kind == "run":
        file = place.beside / own_options(system).file.replace("{collection}", file_name(place.table.title))
        if not file.is_file():
            raise InputError(f"system {system.name!r} has no run of {place.table.title}: {file} does not exist.")

        def read() -> tuple[Hits, dict[str, Any]]:
            hits, notes = read_judged_run(file, judged)
            return hits, {"notes": notes}

        return [system.kind, sha256(file)], read

    form = own_options(system).form if system.kind == "student" else "torch"
    teacher = load_teacher(_component(system, place.beside), judged.collection)
    texts, documents = judged.queries.texts, judged.collection.documents
    if form != "torch" and system.rerank is not None:
        raise InputError(f"system {system.name!r}: the form {form} encodes queries alone, and cannot re-rank.")
    if isinstance(teacher, Embedder) and form != "torch":
        served = Encoder.load(place.beside / own_options(system).work / "served" / form)

        def search_served() -> tuple[Hits, dict[str, Any]]:
            vectors = fill_vectors(place.store, system.name, teacher, documents, "document")
            scores, rows = faiss.knn(
                served.encode(texts), vectors, min(depth, len(documents)), metric=faiss.METRIC_INNER_PRODUCT
            )
            return Hits(rows.astype(np.int32), scores), {"notes": []}

        return [system.kind, teacher.tower_identity("document"), served.manifest], search_served
    if form != "torch":
        raise InputError(
            f"system {system.name!r}: a suite searches exported forms of dense students only; drop `form`."
        )
    if system.rerank is None and isinstance(teacher, Embedder | Retriever):

        def search() -> tuple[Hits, dict[str, Any]]:
            return retrieve(place.store, system.name, teacher, texts, documents, depth), {"notes": []}

        return [system.kind, teacher.identity], search
    return _reranking(place, system, teacher, runs, keys)


def _reranking(
    place: Place, system: SuiteSystem, teacher: Teacher, runs: dict[str, Hits], keys: dict[str, str]
) -> tuple[Any, Search]:
    base = system.rerank
    if base is None:
        raise InputError(
            f"system {system.name!r} cannot search a collection; say whose results it re-ranks: rerank = 'bm25'."
        )
    hits, queries = runs[base].top(system.rerank_depth), place.judged.queries

    def work() -> tuple[Hits, dict[str, Any]]:
        documents = place.judged.collection.documents
        grid = fill_scores(place.store, system.name, teacher, queries.texts, documents, hits)
        silent = int((hits.valid & np.isnan(grid)).sum())
        notes = [f"no answer for {silent:,} of {int(hits.valid.sum()):,} pairs, which are left out"] if silent else []
        return rerank(hits, grid), {"notes": notes}

    return [system.kind, scored_as(teacher), keys[base], system.rerank_depth], work


def _component(system: SuiteSystem, beside: Path = Path()) -> Component:
    """The teacher that a system is; a student is what its recipe says that reads its folder."""
    if system.kind != "student":
        return Component(kind=system.kind, **system.options)
    folder = beside / own_options(system).work
    if not (folder / TRAINED).is_dir():
        raise InputError(f"system {system.name!r}: {folder} holds no trained student; run its recipe first.")
    recipe = read_json(folder / "recipe.json")
    student = Component.model_validate({key: value for key, value in recipe["student"].items() if key != "render"})
    kind = kind_module("students", student.kind).TEACHER
    settings: dict[str, Any] = {"model": str(folder / TRAINED), "precision": recipe["precision"]}
    if kind == "cross_encoder":  # its folder does not hold the length that it was trained with
        settings["max_length"] = options("students", student).max_length
    return Component(kind=kind, **settings)
