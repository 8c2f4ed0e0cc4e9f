"""Training as a command: for each stage its candidates, its train set, the loop; then the student of the last one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from retrieval_kd.candidates import Candidates, merge
from retrieval_kd.diagnostics.teachers import POINTED
from retrieval_kd.files import fingerprint
from retrieval_kd.losses import find_loss
from retrieval_kd.pipeline.steps import score_candidates
from retrieval_kd.pipeline.workspace import Workspace
from retrieval_kd.progress import say
from retrieval_kd.recipe import Live
from retrieval_kd.scoring import fill_vectors, find_preferences, retrieve
from retrieval_kd.stages import Stage
from retrieval_kd.students import load_student
from retrieval_kd.teachers import load_teacher
from retrieval_kd.teachers.bi_encoder import BiEncoder
from retrieval_kd.train.curate import Curated, curate, in_words, negatives_by_source, target_entropy
from retrieval_kd.train.loop import average
from retrieval_kd.train.loop import train as train_stage
from retrieval_kd.train.validation import make_validation
from retrieval_kd.trainset import Tokens, TrainSet, mark_positives
from retrieval_kd.types import Hits, InputError, Side


def train(workspace: Workspace) -> None:
    """Train the student, stage by stage; a stopped training goes on where it was.

    Launched by `torchrun` or `accelerate launch`, processes share each batch and the first one writes.
    """
    if "LOCAL_RANK" in os.environ:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    recipe = workspace.recipe
    if not len(workspace.train_queries):
        raise InputError("there are no training queries: name a split in data.train or add data.pseudo_queries.")
    if workspace.needs.labels and not any(g > 0 for grades in workspace.train_queries.qrels for g in grades.values()):
        raise InputError("a loss learns from labels, and no training query has a relevant document judged.")
    key = _start_key(workspace)
    _save_start(workspace)
    for number, stage in enumerate(recipe.stages):
        data, ranks, manifest = stage_trainset(workspace, number)
        _warn_of_saturation(data, number, stage)
        key = fingerprint([key, manifest["key"], stage.model_dump(), recipe.training.model_dump()])
        _run_stage(workspace, number, stage, curate(data, stage, ranks), key)
    last = len(recipe.stages) - 1

    def work(folder: Path) -> dict[str, Any]:
        shutil.copytree(_stage_folder(workspace, last) / "student", folder, dirs_exist_ok=True)
        return {"stages": last + 1}

    workspace.make("student", key, work)


def _stage_folder(workspace: Workspace, number: int) -> Path:
    """Where a stage leaves the student; -1 is the untrained one."""
    return workspace.folder / "stages" / ("start" if number < 0 else str(number))


def _start_key(workspace: Workspace) -> str:
    recipe = workspace.recipe
    return fingerprint([[*workspace.start_key, [one.model_dump() for one in recipe.live]], recipe.training.seed])


def _save_start(workspace: Workspace) -> None:
    """The untrained student, where the first stage mines with it or there is none."""
    first = workspace.recipe.stages[:1]
    if not first or (first[0].mine is not None and first[0].mine.by == "student"):
        workspace.make("stages/start", _start_key(workspace), lambda folder: _save(workspace.student, {}, folder))


def _save(student: Any, live: dict[str, nn.Module], folder: Path) -> dict[str, Any]:
    (folder / "student").mkdir()
    student.save(folder / "student")
    weights = {"student": student.state_dict(), **{name: module.state_dict() for name, module in live.items()}}
    torch.save(weights, folder / "weights.pt")
    return {}


def _run_stage(workspace: Workspace, number: int, stage: Stage, curated: Curated, key: str) -> None:
    recipe = workspace.recipe

    def weights_of(stage_number: int, name: str) -> dict[str, Any]:
        path = _stage_folder(workspace, stage_number) / "weights.pt"
        found: dict[str, dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True)
        return found[name]

    def work(folder: Path) -> dict[str, Any]:
        student: Any = workspace.load_student()
        snapshot: nn.Module | None = None
        live = {one.name: _load_live(one, recipe.training.seed) for one in recipe.live}
        if number > 0:
            if any("snapshot" in term.teachers for term in stage.terms):
                snapshot = workspace.load_student().requires_grad_(False)
                snapshot.load_state_dict(weights_of(number - 1, "student"))
            if stage.init == "previous":
                student.load_state_dict(weights_of(number - 1, "student"))
            for one in recipe.live:
                if one.trainable:
                    live[one.name].load_state_dict(weights_of(number - 1, one.name))
        facts = curated.facts()
        if facts["provenance"]:
            say(f"stages[{number}]: {in_words(facts)}")
        log = train_stage(
            student,
            _with_clusters(curated.data, stage, recipe.training.seed),
            stage,
            recipe.training,
            workspace.folder / "training" / str(number),
            key,
            number=number,
            live=live,
            snapshot=snapshot,
            validate=_validation(workspace, student),
        )
        if stage.average and stage.average.stages:
            others = [weights_of(other, "student") for other in stage.average.stages]
            student.load_state_dict(average([*others, student.state_dict()]))
        _save(student, {one.name: live[one.name] for one in recipe.live if one.trainable}, folder)
        return {**({"loss": round(log[-1]["loss"], 6)} if log else {}), **facts}

    workspace.make(f"stages/{number}", key, work, together=True)


def _load_live(live: Live, seed: int) -> nn.Module:
    module = load_student(live, seed)
    return module if live.trainable else module.requires_grad_(False)


def _with_clusters(data: TrainSet, stage: Stage, seed: int) -> TrainSet:
    """The train set with its queries clustered by k-means on a teacher's vectors, where batches come from clusters."""
    if stage.batching != "cluster":
        return data
    vectors = np.ascontiguousarray(data.query_vectors[str(stage.cluster_by)], np.float32)
    clusters = min(stage.clusters, len(vectors))
    kmeans = faiss.Kmeans(vectors.shape[1], clusters, niter=20, seed=seed, min_points_per_centroid=1)
    kmeans.train(vectors)
    return replace(data, clusters=kmeans.index.search(vectors, 1)[1][:, 0].astype(np.int32))


def _validation(workspace: Workspace, student: Any) -> Callable[[nn.Module], float] | None:
    """The function that measures a student for early stopping, if the recipe asks for it."""
    settings = workspace.recipe.training.validation
    if settings is None:
        return None
    workspace.made("candidates/validation", "mine")
    hits = Candidates.load(workspace.folder / "candidates/validation").hits
    texts = workspace.query_texts("validation", workspace.recipe.student.render)
    data = TrainSet(
        query_tokens=Tokens.pack(student.tokenize(texts, "query")),
        document_tokens=_document_tokens(workspace, student),
        hits=hits,
        frozen=_frozen_vectors(workspace, student),
    )
    return make_validation(
        data, workspace.validation_queries, workspace.collection.document_ids, workspace.recipe.precision
    )


def stage_trainset(workspace: Workspace, number: int) -> tuple[TrainSet, NDArray[np.int64], dict[str, Any]]:
    """What a stage may read: the recipe's train set, or one of candidates mined for the stage.

    With it the ranks (Q,) from 1 that the student gave the first positives, 0 for unknown ones, and the manifest.
    """
    stage = workspace.recipe.stages[number]
    if stage.mine is None:
        manifest = make_trainset(workspace)
        data = TrainSet.load(workspace.folder / "trainset")
        return data, np.zeros(len(data), np.int64), manifest
    if number == 0:
        _save_start(workspace)
    elif stage.mine.by == "student":
        workspace.made(f"stages/{number - 1}", "train")
    manifest = _mined_trainset(workspace, number, stage)
    folder = workspace.folder / "mined" / str(number)
    return TrainSet.load(folder), np.load(folder / "student_ranks.npy"), manifest


def _warn_of_saturation(data: TrainSet, number: int, stage: Stage) -> None:
    for place, term in enumerate(stage.terms):
        if (nats := target_entropy(term, data)) is not None and nats < POINTED:
            say(
                f"stages[{number}].terms[{place}]: the teacher's lists have {nats:.3f} nats of entropy on average, one "
                "document taking nearly all; a teacher_temperature of 2 or more keeps what it knows of the others."
            )


def make_trainset(workspace: Workspace) -> dict[str, Any]:
    """The train set of the recipe's own candidates."""
    scored = [] if not workspace.needs.sources else [workspace.made("scores/train", "score")["key"]]

    def work(folder: Path) -> dict[str, Any]:
        if not workspace.needs.sources:
            return _write_trainset(workspace, folder)
        found = Candidates.load(workspace.folder / "candidates/train")
        scores = np.load(workspace.folder / "scores/train/scores.npy", mmap_mode="r")
        return _write_trainset(workspace, folder, found, list(workspace.named_sources), scores)

    return workspace.make("trainset", [scored, *_trainset_inputs(workspace)], work)


def _mined_trainset(workspace: Workspace, number: int, stage: Stage) -> dict[str, Any]:
    """Candidates found by the student as the stage before left it, or by a teacher, scored by the teachers."""
    mine = stage.mine
    assert mine is not None
    queries, own = workspace.train_queries, mine.by == "student"
    render = workspace.recipe.student.render if own else workspace.renders[mine.by]
    documents = workspace.document_texts(render)
    if own:
        before = _stage_folder(workspace, number - 1) / "student"
        searcher: Any = load_teacher(workspace.student_as_teacher(before), workspace.read_by(render))
    else:
        searcher = workspace.teachers[mine.by]

    def work(folder: Path) -> dict[str, Any]:
        texts = workspace.query_texts("train", render)
        found = retrieve(workspace.store, mine.by, searcher, texts, documents, mine.depth + mine.skip)
        positives = [{row for row, grade in grades.items() if grade > 0} for grades in queries.qrels]
        np.save(folder / "student_ranks.npy", _ranks(found, positives, len(queries)))
        merged = merge([found], mine.depth, positives, skips=[mine.skip])
        scores, asked = score_candidates(workspace, "train", merged.hits)
        return {**_write_trainset(workspace, folder, merged, [mine.by], scores), "asked": asked}

    inputs = [
        searcher.identity,
        mine.model_dump(),
        *workspace.scored_by("train"),
        [sorted(q.items()) for q in queries.qrels],
    ]
    return workspace.make(f"mined/{number}", [*inputs, *_trainset_inputs(workspace)], work)


def _ranks(found: Hits, positives: Sequence[set[int]], count: int) -> NDArray[np.int64]:
    """The rank from 1 of the first positive of each query (Q,); 0 where none was found."""
    ranks = np.zeros(count, np.int64)
    for query, rows in enumerate(positives):
        at = np.flatnonzero(np.isin(found.rows[query], list(rows)))
        ranks[query] = at[0] + 1 if len(at) else 0
    return ranks


def _trainset_inputs(workspace: Workspace) -> list[Any]:
    needs, recipe, texts = workspace.needs, workspace.recipe, workspace.fingerprint_texts
    vectors = {"train": sorted(needs.query_vectors), "documents": sorted(needs.document_vectors)}
    towers = {name: workspace.teachers[name].identity for name in {*vectors["train"], *vectors["documents"]}}
    live = [live for live in recipe.live if live.name in needs.live]
    return [
        towers,
        [one.model_dump() for one in live],
        texts("train", renders=[recipe.student.render, *(one.render for one in live)]),
        texts("documents", renders=[recipe.student.render] if needs.documents else []),
        texts("documents", renders=[one.render for one in live]),
        texts("train", renders=[workspace.renders[name] for name in vectors["train"]]),
        texts("documents", renders=[workspace.renders[name] for name in vectors["documents"]]),
        *workspace.start_key,
        recipe.precision,
        vectors,
        needs.preferences,
    ]


def _write_trainset(
    workspace: Workspace,
    folder: Path,
    candidates: Candidates | None = None,
    sources: Sequence[str] = (),
    scores: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Gather what the stages read into memory-mapped arrays."""
    hits = None if candidates is None else candidates.hits
    needs, queries, recipe = workspace.needs, workspace.train_queries, workspace.recipe
    student = workspace.student
    vectors: dict[Side, dict[str, Any]] = {"query": {}, "document": {}}
    wanted: dict[Side, frozenset[str]] = {"query": needs.query_vectors, "document": needs.document_vectors}
    for side, names in wanted.items():
        for name in sorted(names):
            read, teacher = workspace.renders[name], workspace.teachers[name]
            texts = workspace.query_texts("train", read) if side == "query" else workspace.document_texts(read)
            assert isinstance(teacher, BiEncoder)
            vectors[side][name] = fill_vectors(workspace.store, name, teacher, texts, side)
    live = {}
    for one in recipe.live:
        if one.name in needs.live:
            reader: Any = load_student(one, recipe.training.seed)
            live[one.name] = (
                Tokens.pack(reader.tokenize(workspace.query_texts("train", one.render), "query")),
                Tokens.pack(reader.tokenize(workspace.document_texts(one.render), "document")),
            )
    pairs, chances = _preferences(workspace, hits) if needs.preferences else (None, None)
    frozen = _frozen_vectors(workspace, student) if needs.documents else None
    trainset = TrainSet(
        query_tokens=Tokens.pack(student.tokenize(workspace.query_texts("train", recipe.student.render), "query")),
        document_tokens=_document_tokens(workspace, student) if needs.documents else None,
        hits=hits,
        teachers=list(workspace.teachers),
        scores=scores,
        positive=None if hits is None else mark_positives(hits, queries.qrels),
        sources=sources,
        ranks=None if candidates is None else candidates.ranks,
        query_vectors=vectors["query"],
        document_vectors=vectors["document"],
        frozen=frozen,
        preference_pairs=pairs,
        preferences=chances,
        live=live,
    )
    trainset.save(folder)
    return {"queries": len(queries), **({} if hits is None else {"provenance": negatives_by_source(trainset)})}


def _preferences(workspace: Workspace, hits: Hits | None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The stored preferences of the one teacher that a preference loss names."""
    terms = [term for stage in workspace.recipe.stages for term in stage.terms]
    names = {name for term in terms if "preference" in find_loss(term.loss).needs for name in term.teachers}
    assert hits is not None
    assert len(names) == 1, "checked when the recipe is read"
    name = names.pop()
    queries = workspace.query_texts("train", workspace.renders[name])
    documents = workspace.document_texts(workspace.renders[name])
    return find_preferences(workspace.store, name, workspace.teachers[name], queries, documents, hits)


def _document_tokens(workspace: Workspace, student: Any) -> Tokens | None:
    """The documents as the student reads them; None where a frozen tower's vectors stand in."""
    if student.frozen_documents:
        return None
    documents = workspace.document_texts(workspace.recipe.student.render)
    return Tokens.pack(student.tokenize(documents, "document"))


def _frozen_vectors(workspace: Workspace, student: Any) -> NDArray[np.float32] | None:
    if not student.frozen_documents:
        return None
    tower = BiEncoder(student.towers, workspace.recipe.precision)
    documents = workspace.document_texts(workspace.recipe.student.render)
    return fill_vectors(workspace.store, "student", tower, documents, "document")
