"""The student and another searcher as one system, their shares given or tuned on the train split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.files import load_hits, save_hits, write_run
from retrieval_kd.fusion import RELATIVE_WEIGHTS, fuse_hits, tune_weight
from retrieval_kd.metrics import PRIMARY
from retrieval_kd.pipeline.steps import search_student
from retrieval_kd.pipeline.workspace import Split, Workspace
from retrieval_kd.recipe import Hybrid, Rendering
from retrieval_kd.scoring import retrieve
from retrieval_kd.teachers import Teacher
from retrieval_kd.types import Hits, InputError, Queries

QUERIES = 1000  # of the train split, at most


def fuse_with_student(workspace: Workspace, hybrid: Hybrid, run: Hits) -> tuple[Hits, dict[str, Any]]:
    """The student's test run fused with that of another searcher, and what the report says of it.

    A weight that the recipe does not give is the best for nDCG@10 on at most QUERIES judged train queries; the student
    may have learnt from these, and then trusts itself a little too much. The folder `hybrid` keeps the fused run.
    """
    searcher, render = _searcher(workspace, hybrid.searcher)
    own, depth = workspace.recipe.student.render, workspace.recipe.evaluation.depth
    document_ids = list(workspace.collection.document_ids)
    tuned, numbers = _judged(workspace) if hybrid.weight is None else (Queries([], []), [])

    def found(texts: Sequence[str]) -> Hits:
        documents = workspace.document_texts(render)
        return retrieve(workspace.store, hybrid.searcher, searcher, texts, documents, depth)

    def train_texts(render: Rendering) -> list[str]:
        texts = workspace.query_texts("train", render)
        return [texts[number] for number in numbers]

    def quality(hits: Hits) -> float:
        return float(per_query(hits, tuned, document_ids, [PRIMARY])[PRIMARY].mean())

    def work(folder: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {"searcher": hybrid.searcher, "weight": hybrid.weight}
        if hybrid.weight is None:
            student = search_student(workspace, train_texts(own), depth)
            facts["weight"], tried = tune_weight(student, found(train_texts(render)), quality, depth)
            facts["tuned"] = f"{PRIMARY} of {len(numbers)} train queries"
            facts["tried"] = {f"{weight:.6g}": round(value, 6) for weight, value in tried.items()}
        other = found(workspace.query_texts("test", render))
        fused = fuse_hits([run, other], [1.0, facts["weight"]], depth)
        save_hits(folder, fused)
        write_run(folder / "hybrid.trec", fused, workspace.test_queries.ids, document_ids, "hybrid")
        return facts

    splits: list[Split] = ["test"] if hybrid.weight is not None else ["test", "train"]
    read = workspace.fingerprint_texts("documents", *splits, renders=[render, own])
    tuning = [tuned.ids, tuned.qrels, PRIMARY, RELATIVE_WEIGHTS]
    searched = workspace.made("runs", "search")["key"]
    made = workspace.make("hybrid", [hybrid.model_dump(), searched, searcher.identity, depth, read, tuning], work)
    said: dict[str, Any] = {key: made[key] for key in ("searcher", "weight", "tuned") if key in made}
    return load_hits(workspace.folder / "hybrid"), said


def _searcher(workspace: Workspace, name: str) -> tuple[Teacher, Rendering]:
    """The teacher or candidate source of this name, and what it reads."""
    if name in workspace.teachers:
        return workspace.teachers[name], workspace.renders[name]
    return workspace.sources[name], workspace.named_sources[name].render


def _judged(workspace: Workspace) -> tuple[Queries, list[int]]:
    """Queries of the train split with a relevant document, at most QUERIES drawn at random; their numbers in it."""
    queries = workspace.train_queries
    once = queries.qrels[: len(queries) // workspace.repeats]
    judged = [number for number, grades in enumerate(once) if any(grade > 0 for grade in grades.values())]
    if not judged:
        raise InputError(
            "evaluation.hybrid tunes its weight by the judgements of the train split, which has none; give the weight: "
            "evaluation.hybrid.weight."
        )
    rng = np.random.default_rng(workspace.recipe.training.seed)
    numbers = sorted(rng.permutation(judged)[:QUERIES].tolist())
    return queries.take(numbers), numbers
