"""The stages from candidates to a served encoder. Each is a no-op when its inputs did not change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse import csr_array

from retrieval_kd.candidates import Candidates, merge, provenance
from retrieval_kd.corpus_vectors import check_disk
from retrieval_kd.encoder import FORMAT as ENCODER_FORMAT
from retrieval_kd.files import hash_texts, load_hits, map_array, read_run, save_hits, sha256, size_bytes, write_run
from retrieval_kd.index import FORMAT, Vectors, estimate_bytes, open_index
from retrieval_kd.pipeline.documents import VECTORS, corpus_form, document_vectors, encode_documents
from retrieval_kd.pipeline.exporting import build_indexes, cuts_of, export_forms, open_served
from retrieval_kd.pipeline.workspace import Split, Workspace
from retrieval_kd.progress import progress
from retrieval_kd.scoring import fill_scores, rerank, retrieve
from retrieval_kd.store.store import Store
from retrieval_kd.trainset import mark_positives
from retrieval_kd.types import SIDES, Hits, InputError, Queries


def mine(workspace: Workspace) -> dict[str, dict[str, int]]:
    """Find candidates for the test queries and, if some loss compares scores, for the training queries.

    Training candidates hold judged positives first, and keep to the sources' quotas and ranks; test candidates are the
    best of what the sources find. Returns who found how many, by split; in training, how many of the negatives.
    """
    workspace.check_scale()
    found: dict[str, dict[str, int]] = {}
    if workspace.needs.sources:
        queries = workspace.train_queries
        positives = [{row for row, grade in grades.items() if grade > 0} for grades in queries.qrels]
        found["train"] = _mine(workspace, "train", queries, positives)
    found["test"] = _mine(workspace, "test", workspace.test_queries, [])
    if workspace.recipe.training.validation is not None:
        found["validation"] = _mine(workspace, "validation", workspace.validation_queries, [])
    return found


def _mine(workspace: Workspace, split: Split, queries: Queries, positives: list[set[int]]) -> dict[str, int]:
    recipe = workspace.recipe.candidates
    identities = {key: source.identity for key, source in workspace.sources.items()}
    runs = _run_files(workspace, split)
    times = workspace.repeats if split == "train" else 1
    once = len(queries) // times  # sources read a query in one rendering, however many the student reads
    training = split == "train"  # the others are for re-ranking, from which the best documents must not be left out
    shapes = [(source.quota, source.skip, source.depth) if training else (None, 0, None) for source in recipe.sources]

    def work(folder: Path) -> dict[str, Any]:
        lists: list[Hits] = []
        for (key, source), (_, skip, depth) in zip(workspace.named_sources.items(), shapes, strict=True):
            if source.kind == "run":
                hits = read_run(runs[key], queries.ids[:once], workspace.collection.document_ids)
                hits = hits if depth is None else hits.top(skip + depth)
            else:
                texts = workspace.query_texts(split, source.render)[:once]
                documents = workspace.document_texts(source.render)
                found = skip + (depth or recipe.depth)
                hits = retrieve(workspace.store, key, workspace.sources[key], texts, documents, found)
            lists.append(Hits(np.tile(hits.rows, (times, 1)), np.tile(hits.scores, (times, 1))))
        quotas, skips = [quota for quota, _, _ in shapes], [skip for _, skip, _ in shapes]
        merged = merge(lists, recipe.depth, positives, quotas, skips)
        merged.save(folder)
        places = merged.hits.valid
        if positives:
            places = places & ~mark_positives(merged.hits, queries.qrels)
        return {
            "queries": len(queries),
            "candidates": int(merged.hits.valid.sum()),
            "sources": list(workspace.named_sources),
            "provenance": provenance(merged.ranks, list(workspace.named_sources), places),
        }

    inputs = [
        recipe.model_dump(exclude={"sources": {"__all__": {"quota", "skip", "depth"}}}),
        shapes,
        identities,
        {key: sha256(path) for key, path in runs.items()},
        [hash_texts(ids) for ids in (queries.ids, workspace.collection.document_ids)] if runs else [],
        workspace.fingerprint_texts("documents", split, renders=[source.render for source in recipe.sources]),
        [sorted(rows) for rows in positives],
    ]
    made: dict[str, int] = workspace.make(f"candidates/{split}", inputs, work)["provenance"]
    return made


def _run_files(workspace: Workspace, split: Split) -> dict[str, Path]:
    """The run file of each source that is one."""
    files = {}
    for key, source in workspace.named_sources.items():
        if source.kind == "run":
            path = source.options.get(split)
            if path is None or not Path(path).is_file():
                raise InputError(f"candidate source 'run' needs a file for the {split} queries: {split} = {path!r}.")
            files[key] = Path(path)
    return files


def score(workspace: Workspace) -> None:
    """Let every teacher score the candidates that its store lacks, for training and for the test split."""
    score_splits(workspace, workspace.scored_splits)


def score_splits(workspace: Workspace, splits: Sequence[Split]) -> None:
    """Let every teacher score the candidates of these splits that its store lacks."""
    for split in splits:
        if split == "test" and not workspace.teachers:
            continue
        manifest = workspace.made(f"candidates/{split}", "mine")
        hits = Candidates.load(workspace.folder / "candidates" / split).hits

        def work(folder: Path, split: Split = split, hits: Hits = hits) -> dict[str, Any]:
            grids, asked = score_candidates(workspace, split, hits, folder / "scores.npy")
            return {"teachers": list(workspace.teachers), "pairs": int(hits.valid.sum()) * len(grids), "asked": asked}

        workspace.make(f"scores/{split}", [manifest["key"], *workspace.scored_by(split)], work)


def score_candidates(
    workspace: Workspace, split: Split, hits: Hits, path: Path | None = None
) -> tuple[NDArray[np.float32], int]:
    """Scores (T, Q, K) of every teacher, and how many questions were put to them, the stores having the other answers.

    T may be 0, since a recipe may learn from labels alone. With `path` the scores are in that file, memory-mapped.
    """
    before = _asked(workspace)
    shape = (len(workspace.teachers), *hits.rows.shape)
    grids = map_array(path, shape) if path else np.empty(shape, np.float32)
    for grid, (name, teacher) in zip(grids, workspace.teachers.items(), strict=True):
        queries = workspace.query_texts(split, workspace.renders[name])
        documents = workspace.document_texts(workspace.renders[name])
        fill_scores(workspace.store, name, teacher, queries, documents, hits, workspace.crew(name), grid)
    return grids, _asked(workspace) - before


def _asked(workspace: Workspace) -> int:
    """The questions that the ledgers of the teachers' stores have counted so far."""
    stores = [Store.open(workspace.store, name, teacher.identity) for name, teacher in workspace.teachers.items()]
    return sum(entry["pairs"] for store in stores for entry in store.ledger())


def index(workspace: Workspace) -> None:
    """Encode the documents with the student's document tower and build the index over them."""
    if workspace.reranks:
        return
    workspace.made("student", "train")
    identity = workspace.tower_identity("document")
    component = workspace.recipe.index
    assert component is not None, "of a student that searches"
    collection, render = workspace.collection, workspace.recipe.student.render
    documents = workspace.document_texts(render)

    texts = workspace.fingerprint_texts("documents", renders=[render])
    if workspace.sparse:
        _keep_vectors(workspace, documents, [identity, texts])

    def work(folder: Path) -> dict[str, Any]:
        if workspace.sparse:
            vectors: Vectors = csr_array(scipy.sparse.load_npz(workspace.folder / "vectors" / VECTORS))
        else:
            vectors = document_vectors(workspace)
            needed = (estimate_bytes(component, *vectors.shape) or 0) + sum(map(len, documents))
            check_disk(folder.parent, needed, "the index and the texts", "choose a smaller index")
        build_indexes(workspace, vectors, collection.document_ids, folder)
        with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
            for document_id, text in zip(collection.document_ids, documents, strict=True):
                file.write(json.dumps({"_id": document_id, "text": text}, ensure_ascii=False) + "\n")
        return {"documents": len(collection), "bytes": size_bytes(folder / "index")}

    form = corpus_form(workspace)
    cuts = sorted(cuts_of(workspace))
    workspace.make("index", [identity, component.model_dump(), texts, FORMAT, cuts, *([form] if form else [])], work)


def _keep_vectors(workspace: Workspace, documents: Sequence[str], inputs: list[Any]) -> None:
    """Keep the documents' sparse vectors, so that another index of them encodes nothing."""

    def work(folder: Path) -> dict[str, Any]:
        with progress("encode documents", len(documents)) as advance:
            vectors = encode_documents(workspace, documents, advance)
        scipy.sparse.save_npz(folder / VECTORS, vectors, compressed=False)
        return {"active_terms_a_document": round(vectors.nnz / max(1, len(documents)), 1)}

    workspace.make("vectors", inputs, work)


def export(workspace: Workspace) -> None:
    """Write the query tower as one graph or table a form; refuse a form that loses more quality than allowed.

    fp32 must equal torch's vectors to `export.vector_tolerance`; every form must keep nDCG@10 on the test split, or
    on `export.collection`, to `export.quality_tolerance` of torch's.
    """
    if workspace.reranks:
        return
    built = workspace.made("index", "index")["key"]
    render = workspace.recipe.student.render
    read = workspace.fingerprint_texts("documents", "train", "test", renders=[render])
    identities = {side: workspace.tower_identity(side) for side in SIDES}
    inputs = [identities, workspace.recipe.export.model_dump(), read, built, ENCODER_FORMAT]
    workspace.make("served", inputs, lambda folder: export_forms(workspace, folder))


def search(workspace: Workspace) -> None:
    """Search the test queries with each exported form, or re-rank their candidates; write TREC runs."""
    queries, collection, render = workspace.test_queries, workspace.collection, workspace.recipe.student.render
    texts = workspace.query_texts("test", render)
    depth = workspace.recipe.evaluation.depth
    if workspace.reranks:
        read_from = [workspace.made("student", "train")["key"]]
    else:
        read_from = [
            workspace.made(name, command)["key"] for name, command in (("served", "export"), ("index", "index"))
        ]

    def work(folder: Path) -> dict[str, Any]:
        active: dict[str, float] = {}
        if workspace.reranks:
            hits = Candidates.load(workspace.folder / "candidates/test").hits
            documents = workspace.document_texts(render)
            grid = fill_scores(workspace.store, "student", workspace.trained, texts, documents, hits)
            runs = {"student": rerank(hits, grid)}
        else:
            runs = {}
            for served in open_served(workspace, threads=2):
                vectors = served.encode(texts)
                if workspace.sparse and not runs:
                    active["active_terms_a_query"] = round(vectors.nnz / max(1, len(texts)), 1)
                runs[served.name] = open_index(served.index).search(vectors, depth)
        for name, hits in runs.items():
            (folder / name).mkdir()
            save_hits(folder / name, hits)
            write_run(folder / f"{name}.trec", hits, queries.ids, list(collection.document_ids), name)
        return {"systems": list(runs), **active}

    read = workspace.fingerprint_texts("documents", "test", renders=[render])
    workspace.make("runs", [*read_from, depth, read], work)


def search_student(workspace: Workspace, texts: Sequence[str], k: int) -> Hits:
    """The `k` best documents of each query by the student, in its first exported form, through its index."""
    served = open_served(workspace, threads=2)[0]
    return open_index(served.index).search(served.encode(texts), k)


def load_runs(workspace: Workspace) -> dict[str, Hits]:
    """The student's runs by name."""
    manifest = workspace.made("runs", "search")
    return {name: load_hits(workspace.folder / "runs" / name) for name in manifest["systems"]}
