"""The stages from candidates to a served encoder. Each is a no-op when its inputs did not change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_kd.candidates import Candidates, merge
from retrieval_kd.encoder import Encoder
from retrieval_kd.evaluate.quality import per_query
from retrieval_kd.export import export_encoder
from retrieval_kd.files import fingerprint, load_hits, read_run, save_hits, sha256, size_bytes, write_run
from retrieval_kd.index import open_index
from retrieval_kd.pipeline.workspace import Workspace, source_name
from retrieval_kd.recipe import kind_module, options
from retrieval_kd.scoring import fill_scores, fill_vectors, rerank, retrieve
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.towers import Side
from retrieval_kd.train.loop import train as train_loop
from retrieval_kd.trainset import Tokens, TrainSet, mark_positives
from retrieval_kd.types import Hits, InputError, Queries


def mine(workspace: Workspace) -> None:
    """Find candidates for the test queries and, if some loss compares scores, for the training queries.

    Training candidates hold judged positives first; test candidates only what the sources find.
    """
    if workspace.needs.candidates:
        queries = workspace.train_queries
        positives = [{row for row, grade in grades.items() if grade > 0} for grades in queries.qrels]
        _mine(workspace, "candidates/train", queries, positives)
    _mine(workspace, "candidates/test", workspace.test_queries, [])
    if (validation := workspace.recipe.training.validation) is not None:
        _mine(workspace, "candidates/validation", workspace.collection.split(validation.split), [])


def _mine(workspace: Workspace, name: str, queries: Queries, positives: list[set[int]]) -> None:
    recipe = workspace.recipe.candidates
    identities = {key: source.identity for key, source in workspace.sources.items()}
    runs = _run_files(workspace, name.removeprefix("candidates/"))

    def work(folder: Path) -> dict[str, Any]:
        lists: list[Hits] = []
        for source in recipe.sources:
            if source.kind == "run":
                lists.append(read_run(runs[source_name(source)], queries.ids, workspace.collection.document_ids))
            else:
                key = source_name(source)
                documents = workspace.collection.documents
                lists.append(
                    retrieve(workspace.store, key, workspace.sources[key], queries.texts, documents, recipe.depth)
                )
        merged = merge(lists, recipe.depth, positives)
        merged.save(folder)
        per_source = (merged.ranks > 0).sum((1, 2)).tolist()
        return {
            "queries": len(queries),
            "candidates": int(merged.hits.valid.sum()),
            "sources": dict(zip([source_name(source) for source in recipe.sources], per_source, strict=True)),
        }

    inputs = [
        recipe.model_dump(),
        identities,
        {key: sha256(path) for key, path in runs.items()},
        workspace.texts_key,
        [sorted(rows) for rows in positives],
    ]
    workspace.make(name, inputs, work)


def _run_files(workspace: Workspace, split: str) -> dict[str, Path]:
    """The run file of each source that is one."""
    files = {}
    for source in workspace.recipe.candidates.sources:
        if source.kind == "run":
            path = source.options.get(split)
            if path is None or not Path(path).is_file():
                raise InputError(f"candidate source 'run' needs a file for the {split} queries: {split} = {path!r}.")
            files[source_name(source)] = Path(path)
    return files


def score(workspace: Workspace) -> None:
    """Let every teacher score the candidates that its store lacks, for training and for the test split."""
    splits = {"test": workspace.test_queries}
    if workspace.needs.candidates:
        splits["train"] = workspace.train_queries
    for split, queries in splits.items():
        if split == "test" and not workspace.teachers:
            continue
        manifest = workspace.made(f"candidates/{split}", "mine")
        hits = Candidates.load(workspace.folder / "candidates" / split).hits
        identities = {name: teacher.identity for name, teacher in workspace.teachers.items()}

        def work(folder: Path, queries: Queries = queries, hits: Hits = hits) -> dict[str, Any]:
            grids = score_candidates(workspace, queries, hits)
            np.save(folder / "scores.npy", grids)
            return {"teachers": list(workspace.teachers), "pairs": int(hits.valid.sum()) * len(grids)}

        workspace.make(f"scores/{split}", [manifest["key"], identities], work)


def score_candidates(workspace: Workspace, queries: Queries, hits: Hits) -> NDArray[np.float32]:
    """Scores (T, Q, K) of every teacher; T may be 0, since a recipe may learn from labels alone."""
    grids = [
        fill_scores(workspace.store, name, teacher, queries.texts, workspace.collection.documents, hits)
        for name, teacher in workspace.teachers.items()
    ]
    return np.stack(grids) if grids else np.zeros((0, *hits.rows.shape), np.float32)


def index(workspace: Workspace) -> None:
    """Encode the documents with the student's document tower and build the index over them."""
    if workspace.reranks:
        return
    workspace.made("student", "train")
    student = workspace.trained
    assert isinstance(student, BiEncoder)
    identity = student.tower_identity("document")
    component = workspace.recipe.index
    collection = workspace.collection

    def work(folder: Path) -> dict[str, Any]:
        vectors = fill_vectors(workspace.store, "student", student, collection.documents, "document")
        module = kind_module("index", component.kind)
        chosen = options("index", component)
        module.build(vectors, folder / "index", chosen, document_ids=collection.document_ids, identity=identity)
        with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
            for document_id, text in zip(collection.document_ids, collection.documents, strict=True):
                file.write(json.dumps({"_id": document_id, "text": text}, ensure_ascii=False) + "\n")
        return {"documents": len(collection), "bytes": size_bytes(folder / "index")}

    workspace.make("index", [identity, component.model_dump(), workspace.texts_key], work)


def export(workspace: Workspace) -> None:
    """Write the query tower as one graph a form; refuse a form that loses more quality than allowed.

    fp32 must equal torch's vectors to `export.vector_tolerance`; int8 must keep nDCG@10 on the test
    split to `export.quality_tolerance` of torch's.
    """
    if workspace.reranks:
        return
    workspace.made("index", "index")
    student = workspace.trained
    assert isinstance(student, BiEncoder)
    settings, queries = workspace.recipe.export, workspace.test_queries
    identities = {side: student.tower_identity(side) for side in ("query", "document")}
    checked = [*queries.texts[:64], *workspace.collection.documents[:8]]

    def quality(vectors: NDArray[np.float32]) -> float:
        hits = open_index(workspace.folder / "index/index").search(vectors, 10)
        return float(per_query(hits, queries, workspace.collection.document_ids, ["nDCG@10"])["nDCG@10"].mean())

    def work(folder: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for form in settings.forms:
            export_encoder(
                list(student.towers.query),
                folder / form,
                form,
                prompt=student.towers.query_prompt,
                identity=identities["query"],
                document_identity=identities["document"],
                check_texts=checked,
                vector_tolerance=settings.vector_tolerance,
            )
            facts[f"{form} nDCG@10"] = round(quality(Encoder.load(folder / form).encode(queries.texts)), 6)
        if "int8" in settings.forms:
            exact = BiEncoder(student.towers, "fp32")
            whole = quality(exact.embed(exact.render(queries.texts, "query"), "query"))
            small = facts["int8 nDCG@10"]
            if small < whole * (1 - settings.quality_tolerance):
                raise InputError(
                    f"the int8 form has nDCG@10 {small:.4f} against {whole:.4f} in torch, more than "
                    f"{settings.quality_tolerance:.1%} lost; export fp32 only (export.forms), or allow it "
                    "(export.quality_tolerance)."
                )
        return facts

    workspace.make("served", [identities, settings.model_dump(), workspace.texts_key], work)


def search(workspace: Workspace) -> None:
    """Search the test queries with each exported form, or re-rank their candidates; write TREC runs."""
    queries, collection = workspace.test_queries, workspace.collection
    depth = workspace.recipe.evaluation.depth
    made = workspace.made("student", "train") if workspace.reranks else workspace.made("served", "export")

    def work(folder: Path) -> dict[str, Any]:
        if workspace.reranks:
            hits = Candidates.load(workspace.folder / "candidates/test").hits
            grid = fill_scores(workspace.store, "student", workspace.trained, queries.texts, collection.documents, hits)
            runs = {"student": rerank(hits, grid)}
        else:
            opened = open_index(workspace.folder / "index/index")
            runs = {
                student_name(form): opened.search(
                    Encoder.load(workspace.folder / "served" / form, threads=2).encode(queries.texts), depth
                )
                for form in workspace.recipe.export.forms
            }
        for name, hits in runs.items():
            (folder / name).mkdir()
            save_hits(folder / name, hits)
            write_run(folder / f"{name}.trec", hits, queries.ids, list(collection.document_ids), name)
        return {"systems": list(runs)}

    workspace.make("runs", [made["key"], depth, workspace.texts_key], work)


def student_name(form: str) -> str:
    """What a form of the student is called in runs and reports."""
    return "student" if form == "fp32" else f"student-{form}"


def load_runs(workspace: Workspace) -> dict[str, Hits]:
    """The student's runs by name."""
    manifest = workspace.made("runs", "search")
    return {name: load_hits(workspace.folder / "runs" / name) for name in manifest["systems"]}
