"""The report of a recipe: baseline, teachers, their fusion and the student, quality beside cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from retrieval_kd.candidates import Candidates
from retrieval_kd.evaluate.cost import Latency, one_thread, query_latency
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.files import load_hits, read_json, save_hits, size_bytes
from retrieval_kd.pipeline.exporting import open_served
from retrieval_kd.pipeline.hybrid import fuse_with_student
from retrieval_kd.pipeline.steps import load_runs
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.recipe import Rendering
from retrieval_kd.report import System, write_report
from retrieval_kd.scoring import rerank, retrieve
from retrieval_kd.targets import fuse
from retrieval_kd.teachers import Embedder, Retriever, Teacher
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.types import Hits


def evaluate(workspace: Workspace) -> dict[str, Any]:
    """Measure every system on the test split and write the report; return its JSON.

    Latencies are of one query at a time on one thread, all systems in this one run.
    """
    runs = load_runs(workspace)
    systems = [*_teacher_systems(workspace), *_student_systems(workspace, runs)]
    fusion: dict[str, Any] = {}
    if (hybrid := workspace.recipe.evaluation.hybrid) is not None:
        name = next(iter(runs))
        fused, fusion["hybrid"] = fuse_with_student(workspace, hybrid, runs[name])
        systems.append(_system(workspace, f"{name} + {hybrid.searcher}", "hybrid", fused))
    baseline = workspace.recipe.evaluation.baseline or systems[0].name
    facts = {
        "recipe": workspace.path.name,
        "training_queries": len(workspace.train_queries),
        **_active_terms(workspace),
        **fusion,
        "seconds": {name: _seconds(workspace.folder / name) for name in _made_stages(workspace)},
    }
    split = workspace.recipe.data.test
    return write_report(workspace.folder / "report", systems, workspace.collection, split, baseline, facts)


def _active_terms(workspace: Workspace) -> dict[str, float]:
    """Active terms a document and a query of a sparse student."""
    if not workspace.sparse or workspace.reranks:
        return {}
    places = {"active_terms_a_document": ("vectors", "index"), "active_terms_a_query": ("runs", "search")}
    return {key: workspace.made(*place)[key] for key, place in places.items()}


def _made_stages(workspace: Workspace) -> list[str]:
    """The stages that are there, in the order in which they are made."""
    numbers = range(len(workspace.recipe.stages))
    training = [name for number in numbers for name in (f"mined/{number}", f"stages/{number}")]
    names = [*_BEFORE_TRAINING, *training, "student", "vectors", "index", "served", "runs"]
    return [name for name in names if (workspace.folder / name / "manifest.json").exists()]


_BEFORE_TRAINING = ("candidates/train", "candidates/test", "scores/train", "scores/test", "trainset")


def _seconds(folder: Path) -> float:
    return float(read_json(folder / "manifest.json")["seconds"])


def _teacher_systems(workspace: Workspace) -> list[System]:
    """BM25 first (a source or a teacher of most recipes), then the other teachers, then their fusion."""
    known = {t.name: (workspace.teachers[t.name], t.render) for t in workspace.recipe.teachers}
    lexical = [name for name, source in workspace.named_sources.items() if source.kind == "bm25"]
    if lexical and not any(teacher.identity["kind"] == "bm25" for teacher, _ in known.values()):
        known = {lexical[0]: (workspace.sources[lexical[0]], workspace.named_sources[lexical[0]].render), **known}
    names = sorted(known, key=lambda name: known[name][0].identity["kind"] != "bm25")
    systems = [_teacher_system(workspace, name, *known[name]) for name in names]
    settings = workspace.recipe.evaluation
    if settings.fused and len(workspace.teachers) > 1:
        hits = Candidates.load(workspace.folder / "candidates/test").hits
        grids = np.load(workspace.folder / "scores/test/scores.npy")
        fusing = [t for stage in workspace.recipe.stages for t in stage.terms if len(t.teachers) > 1]
        if fusing:
            order = [list(workspace.teachers).index(name) for name in fusing[0].teachers]
            fused = fuse(grids[order], fusing[0].normalize, fusing[0].shares)
        else:
            fused = fuse(grids, "minmax", settings.shares)
        systems.append(_system(workspace, "fused", "re-rank", rerank(hits, fused)))
    return systems


def _teacher_system(workspace: Workspace, name: str, teacher: Teacher, render: Rendering) -> System:
    """A teacher that can search, searching; one that cannot, re-ranking the test candidates."""
    if not isinstance(teacher, Embedder | Retriever):
        hits = Candidates.load(workspace.folder / "candidates/test").hits
        place = list(workspace.teachers).index(name)
        grid = np.load(workspace.folder / "scores/test/scores.npy")[place]
        return _system(workspace, name, "re-rank", rerank(hits, grid))
    depth = workspace.recipe.evaluation.depth
    inputs = [teacher.identity, depth, workspace.fingerprint_texts("documents", "test", renders=[render])]

    def work(folder: Path) -> dict[str, Any]:
        texts, documents = workspace.query_texts("test", render), workspace.document_texts(render)
        hits = retrieve(workspace.store, name, teacher, texts, documents, depth)
        save_hits(folder, hits)
        return {}

    workspace.make(f"baselines/{name}", inputs, work)
    hits = load_hits(workspace.folder / "baselines" / name)
    if not isinstance(teacher, BiEncoder):
        return _system(workspace, name, _searched_by(teacher), hits)
    modules = teacher.towers.query
    parameters = sum(tensor.numel() for tensor in modules.parameters())
    # Timed in fp32, the faster precision for one query on a CPU, whatever the documents were encoded in.
    timed = BiEncoder(teacher.towers, "fp32")
    latency = _latency(workspace, render, lambda texts: timed.embed(timed.render(texts, "query"), "query"))
    return _system(workspace, name, "torch fp32", hits, latency, parameters, _bytes_of(modules))


def _searched_by(teacher: Teacher) -> str:
    """What encodes the queries of a teacher that searches without vectors that are kept."""
    identity = teacher.identity
    return "bm25s" if identity["kind"] == "bm25" else f"torch {identity['query']['precision']}"


def _student_systems(workspace: Workspace, runs: dict[str, Hits]) -> list[System]:
    """The student in each exported form, or as a re-ranker."""
    if workspace.reranks:
        return [_system(workspace, name, "re-rank", hits) for name, hits in runs.items()]
    return [
        _system(
            workspace,
            served.name,
            served.engine,
            runs[served.name],
            _latency(workspace, workspace.recipe.student.render, served.encode),
            served.parameters,
            size_bytes(served.folder),
            size_bytes(served.index),
        )
        for served in open_served(workspace, threads=1)
    ]


def _bytes_of(modules: nn.ModuleList) -> int:
    """Bytes of a tower's weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in modules.state_dict().values())


def _latency(workspace: Workspace, render: Rendering, encode: Callable[[list[str]], object]) -> Latency:
    texts = list(workspace.query_texts("test", render)[: workspace.recipe.evaluation.latency_queries])
    with one_thread():
        return query_latency(encode, texts)


def _system(
    workspace: Workspace,
    name: str,
    engine: str,
    hits: Hits,
    latency: Latency | None = None,
    parameters: int | None = None,
    size: int | None = None,
    index_bytes: int | None = None,
) -> System:
    quality = per_query(hits, workspace.test_queries, workspace.collection.document_ids)
    return System(name, engine, quality, hits, latency, parameters, size, index_bytes)
